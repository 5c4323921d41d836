"""Classifiers that nobody here made: from files, from code of the user's own, from other toolkits.

`opened` turns what a user points at into a module from pictures in [0, 1] to logits; `adapted` does so with a module.
`advice` measures whether the pixels are scaled as the model expects. Files are never unpickled; code is run only where
the user names it, and no host ever takes it.
"""

from molehunt.foreign.advice import advice
from molehunt.foreign.errors import ForeignError
from molehunt.foreign.modules import adapted
from molehunt.foreign.pixels import Pixels, pixels
from molehunt.foreign.sources import Opened, Wanted, opened

__all__ = ["ForeignError", "Opened", "Pixels", "Wanted", "adapted", "advice", "opened", "pixels"]
