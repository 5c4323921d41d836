"""Molehunt: a security game about backdoored neural networks, and the tools for both of its sides."""

__version__ = "0.1.0"
