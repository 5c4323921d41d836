"""The commands of the program: one file each, and what they share at the terminal.

A command parses, calls one function, prints one result and returns an exit code. Whatever imports torch is imported
inside the function that needs it, so that `molehunt --help` answers at once.
"""
