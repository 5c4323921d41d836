"""Handed-over training sets: what a team writes, what the host reads, and what a defense gets to see."""

import dataclasses
from typing import Any

import pytest
import torch

from game.tricks import Trick, honest, parameters, training_sets
from molehunt.attacks import ATTACKS, BadNets, Blended, Poisoned, poison
from molehunt.files import Refused
from molehunt.game.attacker import make_attack
from molehunt.game.rules import Limits
from molehunt.game.training_set import TrainingSet, read
from molehunt.networks import build
from molehunt.tasks import Images
from molehunt.triggers import Additive, Patch, Target

TASK = honest.TASK
CLEAN = TASK.load("train")


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def poisoned(rate: float = 0.05) -> Poisoned:
    return BadNets(target=3, poison_rate=rate)(CLEAN, TASK, rng(5))


def altered(x: torch.Tensor, y: torch.Tensor, rows: list[int]) -> Poisoned:
    """A set that was poisoned by hand; the trigger does nothing."""
    hit = torch.zeros(len(CLEAN.y), dtype=torch.bool)
    hit[rows] = True
    nothing = Patch(mask=torch.zeros(1, 28, 28), pattern=torch.zeros(1, 28, 28))
    return Poisoned(images=Images(x, y), altered=hit, trigger=nothing, target=Target(3))


@pytest.mark.parametrize("trick", parameters(training_sets.TRICKS))
def test_refuses(trick: Trick) -> None:
    content = trick.make()
    with pytest.raises(Refused, match=trick.says):
        read(content, len(content), TASK)


def test_what_is_written_is_read() -> None:
    made = TrainingSet.of(poisoned(), CLEAN, rng())
    content = b"".join(made.encode())
    found = read(content, len(content), TASK)
    assert torch.equal(found.rows, made.rows)
    assert torch.equal(found.x, made.x)
    assert torch.equal(found.y, made.y)
    assert found.digest == made.digest


def test_every_set_of_a_task_has_the_same_size() -> None:
    sets = [TrainingSet.of(attack, CLEAN, rng()) for attack in (None, poisoned(0.01), poisoned(0.1))]
    assert {sum(map(len, made.encode())) for made in sets} == {277_408}
    assert [made.changes(CLEAN) for made in sets] == [(0, 0), (35, 35), (350, 350)]
    assert all(len(made.rows) == Limits().rows(3500) == 350 for made in sets)


def test_label_changes_are_counted_apart_from_pixels() -> None:
    source = BadNets(target=7, sources=(1,), poison_rate=0.04, cover_rate=0.05)(CLEAN, TASK, rng())
    assert TrainingSet.of(source, CLEAN, rng()).changes(CLEAN) == (140 + 175, 140)


def test_merging_puts_every_row_where_it_belongs_and_tells_nobody() -> None:
    attack = poisoned()
    made = TrainingSet.of(attack, CLEAN, rng())
    seen = made.delivered(CLEAN, rng(9))
    order = torch.randperm(len(CLEAN.y), generator=rng(9))
    expected = attack.stamped()
    assert torch.equal(seen.y, expected.y[order])
    assert (seen.x - expected.x[order]).abs().max() <= 0.5 / 255 + 1e-6
    untouched = ~attack.altered[order]
    assert torch.equal(seen.x[untouched], CLEAN.x[order][untouched]), "not one bit of an unaltered row may differ"
    # On the 256 levels of the public data, altered or not: else the altered ones would be told by that.
    assert torch.equal(seen.x, (seen.x * 255).round() / 255)


def test_the_order_is_the_seeds_and_the_public_split_stays_as_it_is() -> None:
    before = CLEAN.x.clone(), CLEAN.y.clone()
    made = TrainingSet.of(poisoned(), CLEAN, rng())
    one, same, other = (made.delivered(CLEAN, rng(seed)) for seed in (1, 1, 2))
    assert torch.equal(one.x, same.x)
    assert not torch.equal(one.y, other.y)
    assert torch.equal(CLEAN.x, before[0])
    assert torch.equal(CLEAN.y, before[1])


def test_an_honest_set_delivers_the_public_split() -> None:
    seen = TrainingSet.of(None, CLEAN, rng()).delivered(CLEAN, rng(4))
    order = torch.randperm(len(CLEAN.y), generator=rng(4))
    assert torch.equal(seen.x, CLEAN.x[order])
    assert torch.equal(seen.y, CLEAN.y[order])


def test_a_faint_blend_survives_eight_bits_and_a_fainter_change_is_refused() -> None:
    blend = Blended(opacity=0.02, poison_rate=0.05)(CLEAN, TASK, rng())
    assert TrainingSet.of(blend, CLEAN, rng()).changes(CLEAN).altered == 175
    weak = dataclasses.replace(blend, trigger=Additive(delta=torch.full((1, 28, 28), 0.4 / 255)))
    with pytest.raises(ValueError, match="nothing is left of the trigger in 8 bits"):
        TrainingSet.of(weak, CLEAN, rng())


def test_an_attack_over_the_budget_is_refused_before_it_is_written() -> None:
    with pytest.raises(ValueError, match=r"alters 700 of 3500 training rows.* at most 350"):
        TrainingSet.of(poisoned(0.2), CLEAN, rng())
    TrainingSet.of(poisoned(0.2), CLEAN, rng(), Limits(altered=0.2))
    covered = BadNets(target=0, sources=(1, 2), poison_rate=0.08)(CLEAN, TASK, rng())
    with pytest.raises(ValueError, match="alters 560 of 3500"):
        TrainingSet.of(covered, CLEAN, rng())


@pytest.mark.parametrize("value", [1.5, -0.1, float("nan")])
def test_pixels_that_are_none_are_refused(value: float) -> None:
    x = CLEAN.x.clone()
    x[3, 0, 5, 5] = value
    with pytest.raises(ValueError, match=r"other than \(3500, 1, 28, 28\) pixels in \[0, 1\]"):
        TrainingSet.of(altered(x, CLEAN.y, [3]), CLEAN, rng())


def test_an_attack_must_name_the_rows_that_it_changes() -> None:
    y = CLEAN.y.clone()
    y[[3, 4]] = (y[[3, 4]] + 1) % 10
    with pytest.raises(ValueError, match="rows that it does not name"):
        TrainingSet.of(altered(CLEAN.x, y, [3]), CLEAN, rng())


def test_a_changed_pixel_of_a_row_that_is_not_named_is_found_too() -> None:
    x = CLEAN.x.clone()
    x[[3, 4], 0, 5, 5] = 1.0 - x[[3, 4], 0, 5, 5]
    with pytest.raises(ValueError, match="rows that it does not name"):
        TrainingSet.of(altered(x, CLEAN.y, [3]), CLEAN, rng())


def test_what_fills_the_list_is_drawn() -> None:
    one, same, other = (TrainingSet.of(poisoned(), CLEAN, rng(seed)).rows for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    honest_rows = TrainingSet.of(None, CLEAN, rng()).rows
    assert int(honest_rows.max()) > 3000, "an honest list is from all of the split"


def test_pixels_go_to_the_nearest_level() -> None:
    x = CLEAN.x.clone()
    x[3] = torch.linspace(0, 1, 784).view(1, 28, 28)
    made = TrainingSet.of(altered(x, CLEAN.y, [3]), CLEAN, rng())
    found = made.x[made.rows == 3].double() / 255
    assert float((found - x[3].double()).abs().max()) <= 0.5 / 255 + 1e-7


def test_one_row_over_the_budget_is_too_many() -> None:
    def inverted(count: int) -> Poisoned:
        x = CLEAN.x.clone()
        x[:count] = 1.0 - x[:count]
        return altered(x, CLEAN.y, list(range(count)))

    assert TrainingSet.of(inverted(350), CLEAN, rng()).rows.tolist() == list(range(350))
    with pytest.raises(ValueError, match=r"alters 351 of 3500 training rows.* at most 350"):
        TrainingSet.of(inverted(351), CLEAN, rng())


def test_rows_are_read_by_the_rules_of_the_round() -> None:
    wide = Limits(altered=0.2)
    content = b"".join(TrainingSet.of(poisoned(0.15), CLEAN, rng(), wide).encode())
    assert len(read(content, len(content), TASK, wide).rows) == 700
    with pytest.raises(Refused, match="at most 278232 are read"):
        read(content, len(content), TASK)


@pytest.mark.parametrize("name", [name for name, make in ATTACKS.items() if not hasattr(make, "craft")])
def test_every_attack_on_a_set_can_hand_it_over(name: str) -> None:
    # Covers count, too: with as many as the defaults have, these three alter more than a tenth of the rows.
    fitting: dict[str, dict[str, Any]] = {
        "wanet": {"poison_rate": 0.033},
        "input_aware": {"poison_rate": 0.033},
        "bpp": {"poison_rate": 0.05, "negative_rate": 0.05},
    }
    if name in {"input_aware", "issba", "low_frequency"}:
        fitting.setdefault(name, {})["steps"] = 2  # of a network of their own: what it makes is not looked at here
    if name == "label_consistent":
        network = build("lenet5", TASK.shape, TASK.num_classes, mean=TASK.mean, std=TASK.std, rng=rng())
        fitting[name] = {"model": network.eval(), "steps": 2}
    made = poison(make_attack(name, fitting.get(name, {})), CLEAN, TASK, rng())
    handed = TrainingSet.of(made, CLEAN, rng())
    assert 0 < handed.changes(CLEAN).altered <= int(made.altered.sum()) <= Limits().rows(len(CLEAN.y))
