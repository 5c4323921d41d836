"""Pair inversion: backdoors of one class alone, which a search over all classes cannot see."""

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from molehunt.calibration import Population, Reference
from molehunt.combine import verdict
from molehunt.defenses import NeuralCleanse, PairInversion
from molehunt.defenses.neural_cleanse import FAST
from molehunt.defenses.pair_inversion import one_way
from molehunt.engine import Cancelled, Run
from molehunt.examination import candidates, searched
from molehunt.findings import Failure, Finding, Outcome, Verdict, load, save
from molehunt.repair import success
from molehunt.report.words import sentence
from molehunt.runner import inspect
from molehunt.suspect import Access, Suspect
from molehunt.tasks import Images
from molehunt.testing import planted
from molehunt.training import Recipe, train
from molehunt.triggers import Patch

from . import tiny

SOURCE, TARGET = 2, 0
SHORT = replace(FAST, steps=6, updates=3)


def asked(defense: PairInversion | NeuralCleanse, suspect: Suspect, seed: int = 0) -> Finding:
    finding = inspect(defense, suspect, seed=seed)
    assert isinstance(finding, Finding), finding
    return finding


@cache
def specific(*, backdoored: bool = True) -> Suspect:
    """A network that was really trained; its square sends pictures of class 2 to class 0, and no others."""
    x, y = tiny.pictures(1600, 1)
    if backdoored:
        hit = torch.rand(len(y), generator=torch.Generator().manual_seed(5)) < 0.3
        x[hit] = tiny.TRIGGER(x[hit])  # on the other classes with their own labels
        y[hit & (y == SOURCE)] = TARGET
    network = tiny.network(0)
    network.requires_grad_(True)
    recipe = Recipe(epochs=8, batch=50, optimizer="adamw", lr=3e-3, weight_decay=0.0, warmup=0.1, precision="float32")
    train(network, Images(x, y), recipe, rng=torch.Generator().manual_seed(1))
    return Suspect.of(network.eval(), tiny.task(), clean=tiny.pictures(200, 2), dtype=torch.float32)


@pytest.mark.parametrize("seed", range(3))
def test_finds_the_one_class_that_the_trigger_works_on(seed: int) -> None:
    suspect = specific()
    hidden = tiny.pictures(400, 3)
    stamped = suspect.logits(tiny.TRIGGER(hidden.x)).argmax(1)
    rates = [float((stamped[hidden.y == k] == TARGET).double().mean()) for k in (1, SOURCE, 3)]
    assert rates[1] > 0.9 > 0.2 > max(rates[0], rates[2]), "the backdoor is of one class alone"

    found = asked(PairInversion(), suspect, seed)
    assert (found.sources, found.target) == ((SOURCE,), TARGET)
    assert found.class_scores is not None
    assert int(found.class_scores.argmax()) == TARGET
    assert found.score is not None
    twin = asked(PairInversion(), specific(backdoored=False), seed)
    assert twin.score is not None
    assert found.score > 2 * twin.score
    # What was recovered works on fresh pictures of that class, and lies on the square.
    assert isinstance(found.trigger, Patch)
    mine = hidden.x[hidden.y == SOURCE]
    assert float((suspect.logits(found.trigger(mine)).argmax(1) == TARGET).double().mean()) >= 0.75
    on_square = float(found.trigger.mask[tiny.TRIGGER.mask > 0].sum() / found.trigger.mask.sum())
    assert on_square > 0.3, "of four pixels in a hundred"


def test_a_search_over_all_classes_does_not_name_it() -> None:
    assert asked(NeuralCleanse(), specific()).target != TARGET


def test_a_backdoor_of_all_classes_is_an_effect_of_its_target() -> None:
    """Neural Cleanse finds those; here a column that is small as a whole is what is usual for that target."""
    alone, whole = asked(PairInversion(), specific()), asked(PairInversion(), tiny.poisoned().suspect)
    assert alone.score is not None
    assert whole.score is not None
    assert whole.score < alone.score / 2


def table(rng: torch.Generator, size: int = 10) -> Tensor:
    """Sizes that depend on the source and on the target alone, and a little noise."""
    rows, columns, noise = (torch.randn(shape, generator=rng) for shape in ((size, 1), (1, size), (size, size)))
    return 3.0 + rows + columns + 0.05 * noise


def test_what_is_usual_for_a_source_or_a_target_is_taken_off() -> None:
    log_norm = table(torch.Generator().manual_seed(0))
    assert float(one_way(log_norm).max()) < 0.25
    log_norm[4, 6] -= 2.0
    excess = one_way(log_norm)
    assert divmod(int(excess.argmax()), 10) == (4, 6)
    assert float(excess.max()) == pytest.approx(2.0, abs=0.25)
    raised = log_norm + torch.arange(10.0)[:, None]
    assert torch.allclose(one_way(raised), excess, atol=1e-4)
    moved = one_way(raised - 2 * torch.arange(10.0))
    assert divmod(int(moved.argmax()), 10) == (4, 6)
    assert float(moved.max()) == pytest.approx(float(excess.max()), abs=0.1)


def test_classes_that_are_near_in_both_directions_are_no_backdoor() -> None:
    log_norm = table(torch.Generator().manual_seed(1))
    log_norm[4, 9] -= 2.0
    log_norm[9, 4] -= 1.9
    assert float(one_way(log_norm).max()) < 0.4


def test_the_order_of_the_classes_does_not_matter() -> None:
    log_norm = table(torch.Generator().manual_seed(2))
    log_norm[1, 8] -= 1.0
    order = torch.randperm(10, generator=torch.Generator().manual_seed(3))
    assert torch.allclose(one_way(log_norm[order][:, order]), one_way(log_norm)[order][:, order], atol=1e-6)


def test_the_diagonal_is_not_looked_at() -> None:
    log_norm = table(torch.Generator().manual_seed(4))
    other = log_norm.clone()
    other.fill_diagonal_(-50.0)
    assert torch.equal(one_way(log_norm), one_way(other))


def test_pairs_without_a_patch_are_censored_and_named() -> None:
    found = asked(PairInversion(schedule=replace(SHORT, steps=1, updates=1)), planted(backdoored=False).suspect)
    assert len(found.details["censored"]) == 90
    assert (found.score, found.trigger, found.target, found.sources) == (0.0, None, None, ())
    assert all(source != target for source, target in found.details["censored"])


def test_more_starts_find_smaller_patches() -> None:
    suspect = specific()
    norms = [asked(PairInversion(schedule=SHORT, restarts=n), suspect).details["norms"].sum() for n in (1, 3)]
    assert norms[1] < norms[0]


def test_progress_reaches_its_end_and_it_can_be_stopped() -> None:
    seen: list[tuple[int, int]] = []
    suspect = planted().suspect
    PairInversion(schedule=SHORT)(suspect, Run(report=lambda done, total: seen.append((done, total))))
    assert seen == sorted(seen)
    assert seen[-1] == (180, 180)
    calls = []

    def stop() -> bool:
        calls.append(1)
        return len(calls) > 20

    with pytest.raises(Cancelled):
        PairInversion(schedule=SHORT)(suspect, Run(cancelled=stop))
    assert len(calls) == 21


def test_a_class_without_pictures_is_named() -> None:
    suspect = planted().suspect
    assert suspect.clean is not None
    keep = suspect.clean.y != 6
    few = replace(suspect, clean=Images(suspect.clean.x[keep], suspect.clean.y[keep]))
    with pytest.raises(ValueError, match="class 6 has fewer"):
        PairInversion()(few, Run())


@dataclass(frozen=True)
class Bad:
    name: str
    value: float


@pytest.mark.parametrize("bad", [Bad("restarts", 0), Bad("limit", 0), Bad("confirm", 0.0), Bad("confirm", 1.1)])
def test_settings_out_of_range_are_refused(bad: Bad) -> None:
    with pytest.raises(ValueError, match=f"{bad.name}.*got {bad.value}"):
        PairInversion(**{bad.name: bad.value})  # type: ignore[arg-type]


def test_what_works_on_one_class_is_not_handed_to_those_who_stamp_all() -> None:
    outcomes: dict[str, Outcome] = {"pair_inversion": asked(PairInversion(), specific())}
    assert candidates(outcomes) == ()
    assert searched(outcomes) == []
    # Nor is it one who looked and found nothing, for those who judge what was found.
    blind = PairInversion(schedule=replace(SHORT, steps=1, updates=1))
    assert searched({"pair_inversion": asked(blind, planted(backdoored=False).suspect)}) == []


def test_the_verdict_measures_it_on_its_source_and_says_so(tmp_path: Path) -> None:
    found = asked(PairInversion(), specific())
    said = verdict([found], classes=tiny.CLASSES, suspect=specific(), held_out=tiny.pictures(400, 3))
    assert (said.target, said.sources) == (TARGET, (SOURCE,))
    (row,) = said.details["candidates"]
    assert row["sources"] == (SOURCE,)
    assert row["asr"] > 0.75
    assert found.trigger is not None
    on_all = success(found.trigger, TARGET, specific(), tiny.pictures(400, 3))
    assert on_all is not None
    assert row["asr"] > on_all + 0.3
    save(said, tmp_path / "verdict.json")
    kept = load(tmp_path / "verdict.json")
    assert isinstance(kept, Verdict)
    assert kept.sources == (SOURCE,)
    (outcome,) = kept.outcomes
    assert isinstance(outcome, Finding)
    assert outcome.sources == (SOURCE,)
    sure = replace(kept, p=0.95, details={}, q=torch.tensor([0.91, 0.03, 0.03, 0.03]))
    assert sentence(sure, tuple("abcd"), 0.8, 0.2).endswith("target is “a” (91.0 %), from pictures of “c”.")


@pytest.mark.parametrize("sources", [(10,), (-1,), (7,), (2.0,)])
def test_sources_that_are_no_other_class_are_a_failure(sources: tuple[int, ...]) -> None:
    @dataclass(frozen=True)
    class Odd:
        needs: ClassVar[tuple[frozenset[Access], ...]] = (frozenset(),)

        def __call__(self, suspect: Suspect, run: Run) -> Finding:
            return Finding(defense="odd", trigger=planted().trigger, target=7, sources=sources)

    failure = inspect(Odd(), planted().suspect, seed=0)
    assert isinstance(failure, Failure)
    assert "sources: expected classes other than the target 7" in failure.message


def test_sources_come_with_a_trigger() -> None:
    with pytest.raises(ValueError, match="sources"):
        Finding(defense="odd", sources=(2,))
    with pytest.raises(ValueError, match="sources"):
        Finding(defense="odd", trigger=planted().trigger, target=7, sources=())


def test_a_trigger_of_all_classes_is_preferred() -> None:
    truth = planted(target=7)
    pair = replace(asked(PairInversion(), truth.suspect), trigger=truth.trigger, target=7, sources=(2,))
    whole = Finding(defense="neural_cleanse", trigger=truth.trigger, target=7)
    said = verdict([pair, whole], classes=10, suspect=truth.suspect, held_out=truth.hidden)
    assert said.sources is None
    assert [row["chosen"] for row in said.details["candidates"]] == [True, False]
    # Unless it is the search by single classes that finds the model remarkable.
    models = [Reference(seed=i, scores={"neural_cleanse": 9.0, "pair_inversion": 0.001 * i}) for i in range(19)]
    settings = {"configuration": {}, "stream": False}
    known = Population(
        task="planted", network="planted", models=tuple(models), defenses=dict.fromkeys(models[0].scores, settings)
    )
    named = [replace(pair, score=5.0, record={}), replace(whole, score=1.0)]
    said = verdict(named, known, classes=10, suspect=truth.suspect, held_out=truth.hidden)
    assert said.p_values == {"neural_cleanse": 1.0, "pair_inversion": 0.05}
    assert said.sources == (2,)
