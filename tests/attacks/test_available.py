"""Attacks of installed packages: found by their entry point, and kept from replacing anything."""

from importlib.metadata import EntryPoint

import pytest

from molehunt import plugins
from molehunt.attacks import ATTACKS, BadNets, available


def point(name: str) -> EntryPoint:
    return EntryPoint(name=name, value="molehunt.attacks.badnets:BadNets", group="molehunt.attacks")


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> list[EntryPoint]:
    """The entry points that packages have, to be filled."""
    points: list[EntryPoint] = []

    def entry_points(*, group: str) -> list[EntryPoint]:
        return points if group == "molehunt.attacks" else []

    monkeypatch.setattr(plugins, "entry_points", entry_points)
    return points


def test_a_package_adds_an_attack(installed: list[EntryPoint]) -> None:
    assert available() == ATTACKS
    installed.append(point("mine"))
    assert available() == {**ATTACKS, "mine": BadNets}


@pytest.mark.parametrize("name", ["badnets", "none"])
def test_a_package_replaces_nothing(name: str, installed: list[EntryPoint]) -> None:
    installed.append(point(name))
    with pytest.raises(ValueError, match=f"may not replace a built-in attack: '{name}'"):
        available()


def test_two_packages_with_one_name_are_refused(installed: list[EntryPoint]) -> None:
    installed.extend([point("mine"), point("mine")])
    with pytest.raises(ValueError, match="two plug-ins have one name: 'mine'"):
        available()


def test_a_package_that_cannot_be_loaded_is_named(installed: list[EntryPoint]) -> None:
    installed.append(EntryPoint(name="gone", value="no_such_package:Attack", group="molehunt.attacks"))
    with pytest.raises(ValueError, match=r"attack 'gone' .* cannot be loaded from no_such_package:Attack: Module"):
        available()
