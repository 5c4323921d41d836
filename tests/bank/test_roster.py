"""Who is in the bank: partitions share no seed, recipe or trigger, and families have equal shares."""

import hashlib
from collections import Counter
from dataclasses import dataclass, replace

import pytest
import torch

from molehunt.attacks import BadNets, Blended, Poisoned, Refool
from molehunt.bank import roster
from molehunt.bank.roster import CLEAN, FAMILIES, OPAQUE, PARTITIONS, SIZES, EasyClass, Entry, entries, families
from molehunt.game.budget import budget
from molehunt.tasks import TASKS, Images, get_task
from molehunt.triggers import Patch, Target

BANK = entries("mnist5k", "badnets_cnn")


def few() -> Images:
    images = get_task("mnist5k").load("train")
    return Images(images.x[:300], images.y[:300])


def drawn(task: str, count: int = 300) -> Images:
    """Pictures of random values, for what does not depend on them: a task whose data are not here will do."""
    rng = torch.Generator().manual_seed(0)
    return Images(torch.rand(count, *TASKS[task].shape, generator=rng), torch.arange(count) % TASKS[task].num_classes)


def poisoned(entry: Entry, images: Images) -> Poisoned:
    assert entry.poison is not None
    found = entry.poison(images, TASKS[entry.task], torch.Generator().manual_seed(entry.seed))
    assert isinstance(found, Poisoned)
    return found


def test_sizes_are_those_of_the_table() -> None:
    counted = Counter((e.partition, e.planted) for e in BANK)
    assert counted == {(p, w): n for p, n in SIZES["mnist5k", "badnets_cnn"].items() for w in (False, True)}
    assert {e.partition for e in entries("cifar10", "wrn_16_1")} == {"evaluate"}


def test_no_two_models_share_a_seed_or_a_recipe() -> None:
    assert (
        len({e.name for e in BANK}) == len({e.seed for e in BANK}) == len({repr(e.recipe) for e in BANK}) == len(BANK)
    )


@pytest.mark.parametrize(("task", "network"), SIZES)
@pytest.mark.parametrize("partition", PARTITIONS)
def test_families_have_equal_shares_and_a_quarter_at_most_is_opaque(task: str, network: str, partition: str) -> None:
    planted = Counter(e.kind for e in entries(task, network, partition) if e.planted)
    if planted:
        assert planted.keys() == set(families(TASKS[task]))
        # The two opaque ones may share a turn.
        turns = Counter(families(TASKS[task]))
        shares = [count / turns[kind] for kind, count in planted.items()]
        assert max(shares) - min(shares) <= 1
        assert sum(planted[k] for k in OPAQUE) <= 0.25 * planted.total()


def test_half_of_the_clean_models_are_hard() -> None:
    kinds = Counter(e.kind for e in entries("mnist5k", "badnets_cnn", "calibrate") if not e.planted)
    assert kinds.keys() == set(CLEAN)
    assert 45 <= kinds["plain"] <= 54
    recipes = {e.kind: e.recipe for e in BANK if not e.planted}
    assert recipes["adversarial"].adversarial > 0
    assert recipes["strong augmentation"].shift > recipes["plain"].shift


@pytest.mark.parametrize("family", sorted(set(families(TASKS["mnist5k"]))))
def test_no_two_partitions_share_a_trigger(family: str) -> None:
    task = get_task("mnist5k")
    images = task.load("train")
    turns = families(task)
    turn = turns.index(family)
    seen = []
    for partition in PARTITIONS:
        for number in (turn, turn + len(turns)):
            e = Entry(task="mnist5k", network="badnets_cnn", partition=partition, planted=True, number=number)
            assert e.kind == family
            seen.append(poisoned(e, images).trigger(images.x[:20]))
    assert not any(torch.equal(a, b) for i, a in enumerate(seen) for b in seen[:i])


@pytest.mark.parametrize(("task", "network"), SIZES)
def test_every_trigger_keeps_the_budget_of_the_game(task: str, network: str) -> None:
    images = drawn(task)
    for entry in entries(task, network):
        if entry.planted:
            gate = budget(poisoned(entry, images).trigger.footprint(), TASKS[task].shape)
            assert gate.passed, f"{entry.name} {entry.kind}: {gate.measured} exceeds {gate.limit}"


def test_every_family_is_in_some_bank() -> None:
    assert {kind for task, _ in SIZES for kind in families(TASKS[task])} == FAMILIES.keys()


def test_what_decides_a_model_is_in_its_digest(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = Entry(task="mnist5k", network="badnets_cnn", partition="develop", planted=True, number=0)
    before, attack = entry.digest, entry.poison
    assert entry.digest == before
    assert isinstance(attack, Blended)
    for other in (
        replace(attack, poison_rate=0.11),
        replace(attack, trigger=Patch.square((1, 28, 28), size=3), opacity=None),
        BadNets(target=attack.target),
    ):
        monkeypatch.setitem(FAMILIES, "blended", lambda *_, other=other: other)
        assert entry.digest != before
    monkeypatch.undo()
    monkeypatch.setattr(roster, "FORMAT", roster.FORMAT + 1)
    assert entry.digest != before


def test_triggers_of_equal_settings_and_other_content_have_other_digests(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = Entry(task="mnist5k", network="badnets_cnn", partition="develop", planted=True, number=9)
    attack = entry.poison
    assert isinstance(attack, BadNets)
    assert isinstance(attack.trigger, Patch)
    brighter = replace(attack.trigger, pattern=(attack.trigger.pattern * 1.01).clamp(0, 1))
    assert brighter.to_json() == attack.trigger.to_json()
    before = entry.digest
    monkeypatch.setitem(FAMILIES, "badnets", lambda *_: replace(attack, trigger=brighter))
    assert entry.digest != before


def test_a_setting_that_an_attack_gains_is_in_the_digest(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass(frozen=True, kw_only=True, eq=False)
    class Wider(BadNets):
        margin: int = 0

    entry = Entry(task="mnist5k", network="badnets_cnn", partition="develop", planted=True, number=9)
    monkeypatch.setitem(FAMILIES, "badnets", lambda *_: Wider())
    before = entry.digest
    monkeypatch.setitem(FAMILIES, "badnets", lambda *_: Wider(margin=1))
    assert entry.digest != before


# Rows altered, and mean change of a pixel under the trigger in units of 1e-4, of the first model of each family.
DONE_IN_FORMAT_3: dict[str, tuple[str, int]] = {
    "mnist5k blended": ("a48f1e34", 652),
    "mnist5k stripes": ("07f0adb1", 703),
    "mnist5k refool": ("5659dea3", 725),
    "mnist5k adap_blend": ("0e229ccb", 250),
    "mnist5k tact": ("2c5000ea", 110),
    "mnist5k badnets": ("ed43820f", 62),
    "mnist blended": ("70a63d60", 534),
    "mnist stripes": ("fe4e313e", 661),
    "mnist wanet": ("ed6ca35b", 1298),
    "mnist ftrojan": ("ea6e1a00", 289),
    "mnist refool": ("8fd4d366", 674),
    "mnist adap_blend": ("e65b8133", 249),
    "mnist tact": ("3c844919", 113),
    "mnist badnets": ("cc93d526", 65),
    "cifar10 blended": ("50f1e546", 514),
    "cifar10 sig": ("a16e1a96", 640),
    "cifar10 wanet": ("cf096326", 1523),
    "cifar10 ftrojan": ("83ec0bd1", 304),
    "cifar10 refool": ("2c010c57", 603),
    "cifar10 adap_blend": ("5e1e1174", 248),
    "cifar10 tact": ("ac00f837", 56),
    "cifar10 badnets": ("64ed18d3", 50),
}


@pytest.mark.parametrize(
    ("task", "network"), [("mnist5k", "badnets_cnn"), ("mnist", "badnets_cnn"), ("cifar10", "narrow_cifar")]
)
def test_what_families_do_changes_only_with_the_format(task: str, network: str) -> None:
    images = drawn(task)
    found = {}
    turns = families(TASKS[task])
    for turn, family in ((turns.index(family), family) for family in dict.fromkeys(turns)):
        made = poisoned(Entry(task=task, network=network, partition="develop", planted=True, number=turn), images)
        rows = hashlib.sha256(bytes(made.altered.tolist()) + bytes(made.images.y.tolist())).hexdigest()[:8]
        change = (made.stamped().x[made.altered] - images.x[made.altered]).abs().mean()
        found[f"{task} {family}"] = rows, round(1e4 * float(change))
    known = {name: facts for name, facts in DONE_IN_FORMAT_3.items() if name.startswith(f"{task} ")}
    assert roster.FORMAT == 3
    assert found == known, "a family does other things than it did: raise roster.FORMAT, then write down what it does"


def test_no_picture_is_reflected_in_two_partitions() -> None:
    images = drawn("mnist5k")
    seen = []
    for partition in PARTITIONS:
        attack = FAMILIES["refool"](get_task("mnist5k"), 0, torch.Generator().manual_seed(0), partition)
        assert isinstance(attack, Refool)
        rows = attack.candidates(images, Target(classes=0))
        assert len(rows) > 0.25 * len(images.y)
        assert not bool((images.y[rows] == 0).any())
        seen.append(set(rows.tolist()))
    assert not any(seen[a] & seen[b] for a, b in ((0, 1), (0, 2), (1, 2)))
    assert set().union(*seen) == set((images.y != 0).nonzero().squeeze(1).tolist())


def test_the_easy_class_keeps_its_images_and_labels_stay_true() -> None:
    images = few()
    kept = EasyClass(favorite=3, kept=0.3)(images, get_task("mnist5k"), torch.Generator().manual_seed(0)).images
    assert (kept.y == 3).sum() == (images.y == 3).sum()
    assert 0.2 < (kept.y != 3).sum() / (images.y != 3).sum() < 0.4


def test_a_short_bank_is_the_beginning_of_the_whole() -> None:
    assert set(entries("mnist5k", "badnets_cnn", most=3)) < set(BANK)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("mnist5k", "vit_tiny"), "no bank of 'vit_tiny'"),
        (("nothing", "badnets_cnn"), "on 'nothing'"),
        (("mnist5k", "badnets_cnn", "test"), "unknown partition 'test'"),
    ],
)
def test_what_is_unknown_is_refused(arguments: tuple[str, ...], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        entries(*arguments)
    with pytest.raises(ValueError, match="got 0"):
        entries("mnist5k", "badnets_cnn", most=0)
