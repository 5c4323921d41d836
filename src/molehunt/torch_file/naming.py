"""What wrappers put in front of the names of weights. Imports nothing: the converting child uses it, too."""

from collections.abc import Iterable

PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "network.", "backbone.", "_model.")


def stripped(names: Iterable[str]) -> tuple[dict[str, str], list[str]]:
    """Take off whatever wrappers put in front of *every* name.

    Args:
        names: of tensors.

    Returns:
        The short name by the full one, and what was taken off, in order.
    """
    short = {name: name for name in names}
    taken: list[str] = []
    while short and (found := [p for p in PREFIXES if all(s.startswith(p) and s != p for s in short.values())]):
        taken.append(found[0])
        short = {name: s.removeprefix(found[0]) for name, s in short.items()}
    return short, taken
