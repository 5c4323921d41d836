"""Where a command writes: its result to the standard output, everything else to the standard error."""

from rich.console import Console


def result() -> Console:
    """The standard output, for what was asked for."""
    return _plain(stderr=False)


def messages() -> Console:
    """The standard error, for progress and complaints, so that the output can be handed on."""
    return _plain(stderr=True)


def _plain(*, stderr: bool) -> Console:
    # No markup, no emoji codes, no guessed colors: texts of strangers are only text.
    return Console(stderr=stderr, markup=False, emoji=False, highlight=False)
