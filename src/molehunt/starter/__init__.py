"""The starter kit: what a student begins with, written out for one task."""

from molehunt.starter.kit import FILES, write

__all__ = ["FILES", "write"]
