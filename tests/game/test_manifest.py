"""The open manifest: exactly what everybody may know."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from game.tricks import honest
from molehunt import strict_json
from molehunt.game.manifest import Manifest

FIELDS = honest.MANIFEST.model_dump()


def test_has_the_fields_that_cannot_tell_honest_from_backdoored() -> None:
    assert set(Manifest.model_fields) == {"format", "team", "round", "task", "network", "recipe"}


def test_has_one_spelling() -> None:
    shuffled = dict(reversed(FIELDS.items()))
    assert Manifest(**shuffled).canonical() == honest.MANIFEST.canonical()
    assert Manifest.model_validate(strict_json.loads(honest.MANIFEST.canonical())) == honest.MANIFEST


@pytest.mark.parametrize("team", ["Yellow Square", "Équipe 7", "守り手", "a", "O'Brien & <Sons>"])
def test_teams_may_be_called_what_they_like(team: str) -> None:
    assert Manifest(**{**FIELDS, "team": team}).team == team


@given(st.text(min_size=1, max_size=8))
def test_what_is_accepted_can_be_printed_on_one_line(team: str) -> None:
    try:
        accepted = Manifest(**{**FIELDS, "team": team}).team
    except ValidationError:
        return
    assert accepted.isprintable()
    assert accepted == accepted.strip() == team


@pytest.mark.parametrize("field", ["round", "network", "recipe"])
@pytest.mark.parametrize("value", ["", "a b", "../x", "a\n", "-rf", "a" * 65, "é"])
def test_other_names_are_plain(field: str, value: str) -> None:
    with pytest.raises(ValidationError, match=field):
        Manifest(**{**FIELDS, field: value})
