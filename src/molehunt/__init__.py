"""Molehunt: a security game about backdoored neural networks, and the tools for both of its sides."""

import importlib
from typing import Any

__version__ = "0.1.0"
__all__ = ["__version__", "scan"]

# Where a public name lies, imported at first use: the package itself imports nothing heavy. Types: `__init__.pyi`.
_HOMES = {"scan": "inspection"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
