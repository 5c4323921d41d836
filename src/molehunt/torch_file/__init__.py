"""Reading the tensors of a ``.pt`` file without unpickling it.

A ``.pt`` file is a zip of raw numbers and one pickle that says which of them are which tensor. A pickle is a program,
and unpickling runs it; restricted unpicklers run it with restrictions, and have had holes. What is here runs nothing.
It is used by a child process (`child`), which imports nothing else of the package and no torch.
"""
