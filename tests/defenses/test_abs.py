import dataclasses
import functools
import math
import time
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from molehunt.defenses._maximization import Patches
from molehunt.defenses._reasr import Held, Trial, hold
from molehunt.defenses._stimulation import Channel
from molehunt.defenses.abs import ABS, Row, _warnings
from molehunt.engine import Cancelled, OutOfTime, Run
from molehunt.findings import Finding
from molehunt.runner import name_of
from molehunt.suspect import Access, Suspect
from molehunt.tasks import Images
from molehunt.testing import DEFENSE_CHECKS, planted
from molehunt.testing import Trial as Contract
from molehunt.triggers import Patch

from .trained import trained

# Enough for the planted networks, whose ten class channels are candidates too.
SHORT = ABS(steps=60, restarts=2, look=0.5, pool=20, held=60, images=6)


def asked(defense: ABS, suspect: Suspect, seed: int = 0, **lent: Any) -> Finding:
    return defense(suspect, Run(rng=torch.Generator().manual_seed(seed), **lent))


@functools.cache
def contract() -> Contract:
    """One trial, so that its answers are computed once for all checks."""
    return Contract(SHORT)


@pytest.mark.parametrize("check", DEFENSE_CHECKS)
def test_it_keeps_the_contract(check: str) -> None:
    DEFENSE_CHECKS[check](contract())


def answer(backdoored: bool = True) -> Finding:
    return contract().finding(frozenset({Access.CLEAN}), backdoored)


def test_it_is_called_abs() -> None:
    assert name_of(ABS()) == answer().defense == "abs"


# ------------------------------------------------------------------------------------- what it finds


def test_the_planted_channel_class_and_square_are_found_and_nothing_in_the_twin() -> None:
    found, twin = answer(), answer(backdoored=False)
    best = next(told for told in found.details["candidates"] if told["kind"] == "patch")
    assert (best["layer"], best["channel"], best["target"]) == ("trunk.0", 10, 3)
    assert best["reasr"] > 0.9
    assert best["baseline"] == 0.0
    assert found.target == 3
    assert isinstance(found.trigger, Patch)
    truth = contract().suspect(frozenset({Access.CLEAN}), True).trigger.mask > 0
    strong = found.trigger.mask > 0
    assert float((strong & truth).sum() / (strong | truth).sum()) > 0.3
    assert set(found.trigger.mask.unique().tolist()) <= {0.0, 1.0}  # type: ignore[no-untyped-call]
    assert int(strong.sum()) <= round(0.06 * 144)
    assert twin.score is not None
    assert twin.score < 0.5
    assert twin.details["best"]["reasr"] < 0.5


def test_the_score_is_the_highest_class_score_and_ties_are_broken() -> None:
    for finding in (answer(), answer(backdoored=False)):
        assert finding.class_scores is not None
        assert finding.class_scores.shape == (10,)
        assert float(finding.class_scores.max()) == finding.score
        aimed = {row["target"] for row in finding.details["candidates"]}
        assert {k for k, s in enumerate(finding.class_scores.tolist()) if s == 0.0} == set(range(10)) - aimed
        some = [s for s in finding.class_scores.tolist() if s != 0.0]
        assert len(set(some)) == len(some) > 5  # although REASR is 0 for nearly all of them


def test_details_tell_of_every_layer_and_candidate() -> None:
    details = answer().details
    assert details["stimulated"] == {"trunk.0": 11}  # the head's channels are the logits themselves
    assert details["compromised"] == 11
    assert details["warnings"] == []
    assert len(details["candidates"]) == 2 * 11
    assert {row["kind"] for row in details["candidates"]} == {"patch", "filter"}
    shares = [row["suspicion"] for row in details["candidates"]]
    assert shares == sorted(shares, reverse=True)
    for row in details["candidates"]:
        images = row["images"]
        assert images < 60
        assert row["reasr"] * images == pytest.approx(round(row["reasr"] * images), abs=1e-9)


def test_details_hold_what_stimulating_the_reported_channel_does() -> None:
    details = answer().details
    curve, best = details["stimulation"], details["best"]
    assert curve["levels"] == list(SHORT.levels)
    assert curve["logits"].shape == (5, 10)
    lifted = curve["logits"][1:].max(0).values - curve["logits"][0]
    assert int(lifted.argmax()) == best["target"]
    # The lead on every image is at least the channel's value, and on all the last level lifts most: so do the means.
    first, second = lifted.topk(2).values.tolist()
    assert first - second >= best["value"] - 1e-3


class Flipped(nn.Module):
    """Turns the picture around first."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flip(2, 3)


def test_the_square_is_found_wherever_it_lies_and_inside_of_any_model() -> None:
    case = planted(target=5)
    assert case.suspect.clean is not None
    clean = Images(case.suspect.clean.x.flip(2, 3), case.suspect.clean.y)
    model = nn.Sequential(Flipped(), case.suspect.model)  # a network that is not cut: a hook stimulates it
    found = asked(SHORT, Suspect.of(model, case.suspect.task, clean=clean, dtype=torch.float32))
    assert found.target == 5
    assert found.score is not None
    assert found.score > 0.9
    assert isinstance(found.trigger, Patch)
    assert int(found.trigger.mask[0, :3, :3].sum()) >= 6


def test_a_network_that_no_channel_moves_scores_nothing() -> None:
    case = planted(classes=4)
    model = case.suspect.model
    model.head.weight.zero_()  # type: ignore[union-attr, operator]
    found = asked(SHORT, Suspect.of(model, case.suspect.task, clean=case.suspect.clean, dtype=torch.float32))
    assert found.score == 0.0
    assert found.trigger is None
    assert found.target is None
    assert found.class_scores is not None
    assert found.class_scores.tolist() == [0.0] * 4
    assert "no channel lifts one class" in found.details["warnings"][0]
    assert "stimulation" not in found.details


def test_filters_can_be_left_out() -> None:
    found = asked(dataclasses.replace(SHORT, filters=False, steps=20), planted().suspect)
    assert {row["kind"] for row in found.details["candidates"]} == {"patch"}


def row(kind: str, suspicious: float, target: int = 1, reasr: float = 0.5) -> Row:
    patch = Patch.square((3, 12, 12)) if kind == "patch" else None
    matrix = torch.full((3, 12), suspicious) if kind == "filter" else None
    channel = Channel("trunk.0", round(100 * suspicious), target, 1.0)
    return Row(kind, channel, Trial(reasr, 0.0, -1.0, 10), suspicious, patch, matrix)


def test_where_a_filter_is_best_the_best_patch_is_handed_on_and_the_matrix_is_told() -> None:
    suspect = planted().suspect
    rows = [row("patch", 0.2, 4), row("filter", 0.9, 7), row("patch", 0.3, 2), row("filter", 0.4, 2)]
    found = ABS()._answer(suspect, {}, 4, rows)
    assert found.score == 0.9
    assert found.target == 2
    assert found.details["best"]["kind"] == "filter"
    assert torch.equal(found.details["filter"], torch.full((3, 12), 0.9))
    assert found.class_scores is not None
    assert found.class_scores.tolist() == pytest.approx([0, 0, 0.4, 0, 0.2, 0, 0, 0.9, 0, 0])
    assert [told["suspicion"] for told in found.details["candidates"]] == [0.9, 0.4, 0.3, 0.2]
    useless = ABS()._answer(suspect, {}, 2, [row("patch", 0.001, reasr=0.0)])
    assert useless.trigger is None
    assert useless.score == 0.001


def test_of_the_restarts_of_a_channel_only_the_best_is_told() -> None:
    channel = Channel("trunk.0", 3, 1, 1.0)
    rows = [row("patch", s)._replace(channel=channel) for s in (0.2, 0.6, 0.1)]
    found = ABS()._answer(planted().suspect, {}, 1, rows)
    assert [told["suspicion"] for told in found.details["candidates"]] == [0.6]


# --------------------------------------------------------------------------------- how it is measured


def test_images_of_stimulation_search_and_measurement_are_disjoint_and_every_class_takes_part() -> None:
    y = torch.tensor([0] * 300 + [1] * 60 + [2] * 30 + [3] * 10)
    clean = Images(torch.arange(400.0).view(-1, 1, 1, 1), y)
    parts = ABS(seeds=12).split(clean, torch.Generator().manual_seed(0))
    rows = [set(part.x.flatten().tolist()) for part in parts]
    assert [len(part) for part in rows] == [12, 40, 200]
    assert len(rows[0] | rows[1] | rows[2]) == 252
    # Half of the ten of the rarest class are kept to measure on.
    assert [torch.bincount(part.y).tolist() for part in parts] == [[3, 3, 3, 3], [13, 13, 12, 2], [136, 44, 15, 5]]
    few = ABS().split(Images(clean.x[:30], y[:30]), torch.Generator())
    assert [len(part.y) for part in few] == [10, 5, 15]
    for part in parts:
        assert torch.equal(part.y, y[part.x.flatten().long()])


def test_a_rare_class_does_not_hide_a_backdoor() -> None:
    """Were all of its images used up before, no image would be left that the trigger moves."""
    case = planted(classes=2, target=1)
    clean = case.suspect.clean
    assert clean is not None
    rows = torch.cat(((clean.y == 0).nonzero().flatten()[:25], (clean.y == 1).nonzero().flatten()[:200]))
    few = Images(clean.x[rows], clean.y[rows])
    assert torch.bincount(few.y).tolist()[0] == 25
    found = asked(SHORT, Suspect.of(case.suspect.model, case.suspect.task, clean=few))
    assert found.score is not None
    assert found.score > 0.9
    assert found.target == 1


def test_a_class_that_nothing_measures_is_told() -> None:
    channel = Channel("trunk.0", 0, 1, 1.0)
    rows = [Row("patch", channel, Trial(0.0, 0.0, -math.inf, 0), 0.0, Patch.square((1, 4, 4), size=1), None)]
    assert _warnings(rows, ("cat", "dog")) == ["no image of another class than dog was left to measure on: not judged"]
    assert _warnings([rows[0]._replace(trial=Trial(0.1, 0.0, 0.0, 9))], ("cat", "dog")) == []


def test_rows_that_the_baseline_explains_do_not_push_out_a_backdoor(monkeypatch: pytest.MonkeyPatch) -> None:
    from molehunt.defenses import abs as module

    went_on: list[list[int]] = []

    def spy(_logits: Any, _layers: Any, aim: Any, kind: Any, *_: Any, drop: Any, **__: Any) -> Any:
        went_on.append(drop[1](kind, aim).tolist())
        return kind

    turn = iter(range(10_000))

    def trial(_suspect: Any, _held: Any, _target: int, _stamped: Tensor, natural: Tensor | None = None) -> Trial:
        assert natural is not None, "patches are judged against a piece of a real image, also on the way"
        return Trial(0.5, 0.0, 0.0, 50) if next(turn) == 3 else Trial(0.9, 0.9, 0.0, 50)

    monkeypatch.setattr(module, "maximize", spy)
    monkeypatch.setattr(module, "judge", trial)
    asked(dataclasses.replace(SHORT, filters=False, keep=0.01), planted().suspect)
    assert went_on == [[3]]


def test_no_search_sees_what_measures_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from molehunt.defenses import abs as module

    seen: dict[str, Tensor] = {}
    start = Patches.start

    def begin(x: Tensor, *rest: Any) -> Any:
        seen["search"] = x
        return start(x, *rest)

    def look(suspect: Suspect, images: Images) -> Held:
        seen.setdefault("held", images.x)
        return hold(suspect, images)

    monkeypatch.setattr(Patches, "start", begin)
    monkeypatch.setattr(module, "hold", look)
    asked(dataclasses.replace(SHORT, filters=False, steps=2), planted().suspect)
    both = torch.cat((seen["search"], seen["held"])).flatten(1)
    assert len(both.unique(dim=0)) == len(both) == 80  # type: ignore[no-untyped-call]


# ------------------------------------------------------------------------------------------ the rest


def test_a_filter_that_no_longer_looks_like_the_picture_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    from molehunt.defenses import abs as module

    def always(*_: Any, **__: Any) -> Trial:
        return Trial(1.0, 0.0, 0.0, 54)

    monkeypatch.setattr(module, "judge", always)
    for floor, reasr in ((-1.0, 1.0), (1.0, 0.0)):
        found = asked(dataclasses.replace(SHORT, likeness=floor, steps=6), planted().suspect)
        shares = {told["reasr"] for told in found.details["candidates"] if told["kind"] == "filter"}
        assert shares == {reasr}


def test_the_search_that_does_best_is_the_one_that_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    from molehunt.defenses import abs as module

    case, went_on = planted(), []

    def spy(_logits: Any, _layers: Any, aim: Any, kind: Any, *_: Any, drop: Any, **__: Any) -> Any:
        row = aim.targets.tolist().index(3)
        kind.free[0][row] = torch.where(case.trigger.mask > 0, 2.0, -2.0)
        kind.free[1][row] = case.trigger.pattern
        went_on.append((drop[0], row, drop[1](kind, aim).tolist()))
        return kind

    monkeypatch.setattr(module, "maximize", spy)
    asked(dataclasses.replace(SHORT, filters=False, keep=0.01), case.suspect)
    ((step, row, rows),) = went_on
    assert step == 30  # half of the 60 steps
    assert rows == [row]


def test_stops_when_told_and_when_the_time_is_over() -> None:
    suspect = planted().suspect
    with pytest.raises(Cancelled):
        asked(ABS(), suspect, cancelled=lambda: True)
    begun = time.monotonic()
    with pytest.raises(OutOfTime):
        asked(ABS(steps=100_000), suspect, deadline=begun + 1.0)
    assert not any(m._forward_hooks for m in suspect.frozen.modules())


@pytest.mark.parametrize("filters", [True, False])
def test_reports_progress_to_its_end(filters: bool) -> None:
    told: list[tuple[int, int]] = []
    defense = dataclasses.replace(SHORT, steps=3, filters=filters)
    asked(defense, planted().suspect, report=lambda done, total: told.append((done, total)))
    total = told[0][1]
    assert told == [(done, total) for done in range(1, total + 1)]
    assert total == 1 + (6 if filters else 3)  # eleven channels share one pass


def test_the_official_preset_is_the_authors_script() -> None:
    official = ABS.official()
    assert (official.top_n, official.restarts, official.steps, official.rate) == (20, 1, 1000, 0.1)
    assert official.levels == pytest.approx([i * 8 / 5 for i in range(5)])
    assert official.filter_rate == 2e-3
    assert official.look == 1.0  # nothing ends early
    assert official.logit == 0.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seeds": 0}, "seeds must be at least 1, got 0"),
        ({"restarts": 0}, "restarts must be at least 1, got 0"),
        ({"seeds": 4, "spare": 2}, "more than half of 4 seeds must agree, so spare cannot be 2"),
        ({"spare": -1}, "spare cannot be -1"),
        ({"levels": (0.0,)}, "levels must be two or more rising numbers"),
        ({"levels": (1.0, 2.0)}, "begin with 0"),
        ({"levels": (0.0, 2.0, 1.0)}, "rising"),
        ({"levels": (0.0, math.inf)}, "levels must be"),
        ({"levels": (0.0, math.nan)}, "levels must be"),
        ({"size": 0.0}, r"size must lie in \(0, 1\), got 0.0"),
        ({"size": 1.0}, "size must lie"),
        ({"look": 0.0}, r"look must lie in \(0, 1\], got 0.0"),
        ({"keep": 1.5}, "keep must lie"),
        ({"rate": 0.0}, "rate must be positive, got 0.0"),
        ({"filter_rate": math.nan}, "filter_rate must be positive"),
        ({"likeness": 2.0}, "likeness must lie in"),
        ({"logit": -1.0}, "logit must not be negative, got -1.0"),
    ],
)
def test_refuses_settings_that_mean_nothing(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ABS(**settings)


def test_refuses_too_few_pictures() -> None:
    with pytest.raises(ValueError, match="ABS needs 30 clean images or more for 10 seeds, got 29"):
        asked(ABS(), planted(images=29).suspect)
    with pytest.raises(ValueError, match="got 0"):
        asked(ABS(), planted(grants=[]).suspect)


@pytest.mark.slow
def test_on_a_trained_mnist_network() -> None:
    """A 5x5 square; patches may be as large as that."""
    case = trained()
    found = [
        asked(ABS(size=25 / 784), Suspect.of(model, case.task, clean=case.clean))
        for model in (case.backdoored, case.twin)
    ]
    assert found[0].score is not None
    assert found[1].score is not None
    assert found[0].target == 1
    assert found[0].details["best"]["reasr"] > 0.9
    assert found[1].details["best"]["reasr"] < 0.5
    assert found[0].score > found[1].score
    assert isinstance(found[0].trigger, Patch)
    assert isinstance(case.trigger, Patch)
    strong, square = found[0].trigger.mask > 0, case.trigger.mask > 0
    assert float((strong & square).sum() / (strong | square).sum()) > 0.3
