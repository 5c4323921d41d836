"""What installed packages add to our tables of contents, by entry points."""

from collections.abc import Collection, Mapping
from importlib.metadata import entry_points
from typing import TypeVar

T = TypeVar("T")


def with_plugins(group: str, built_in: Mapping[str, T], kind: str, *, reserved: Collection[str] = ()) -> dict[str, T]:
    """Return what is built in and what installed packages add, by name.

    Args:
        group: of the entry points.
        built_in: what may not be replaced.
        kind: what one of them is, for messages, such as "attack".
        reserved: further names that no package may use.

    Raises:
        ValueError: two packages use one name, a package uses one that is built in or reserved, or one cannot be
            loaded.
    """
    plugins: dict[str, T] = {}
    for point in entry_points(group=group):
        if point.name in built_in or point.name in reserved:
            raise ValueError(f"a plug-in may not replace a built-in {kind}: {point.name!r} is {point.value}")
        if point.name in plugins:
            raise ValueError(f"two plug-ins have one name: {point.name!r}, the second is {point.value}")
        try:
            plugins[point.name] = point.load()
        except Exception as error:  # a stranger's package may raise anything while it is imported
            raise ValueError(
                f"the {kind} {point.name!r} of an installed package cannot be loaded from {point.value}: {error!r}; "
                "repair or uninstall that package"
            ) from error
    return {**built_in, **plugins}
