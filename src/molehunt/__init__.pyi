"""The types of the public names, which `__init__.py` imports at first use."""

from molehunt.inspection import scan as scan

__version__: str
