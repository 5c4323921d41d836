"""The one error of this package."""

from molehunt.files import Refused


class ForeignError(Refused):
    """A model cannot be taken as it is; the message says why, and what to do."""
