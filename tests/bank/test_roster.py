"""Who is in the bank: partitions share no seed, recipe or trigger, and families have equal shares."""

from collections import Counter

import pytest
import torch

from molehunt.attacks import Poisoned
from molehunt.bank.roster import CLEAN, FAMILIES, OPAQUE, PARTITIONS, SIZES, EasyClass, Entry, entries
from molehunt.tasks import Images, get_task

BANK = entries("mnist5k", "badnets_cnn")


def few() -> Images:
    images = get_task("mnist5k").load("train")
    return Images(images.x[:300], images.y[:300])


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
        assert planted.keys() == FAMILIES.keys()
        assert max(planted.values()) - min(planted.values()) <= 1
        assert sum(planted[k] for k in OPAQUE) <= 0.25 * planted.total()


def test_half_of_the_clean_models_are_hard() -> None:
    kinds = Counter(e.kind for e in entries("mnist5k", "badnets_cnn", "calibrate") if not e.planted)
    assert kinds.keys() == set(CLEAN)
    assert 45 <= kinds["plain"] <= 54
    recipes = {e.kind: e.recipe for e in BANK if not e.planted}
    assert recipes["adversarial"].adversarial > 0
    assert recipes["strong augmentation"].shift > recipes["plain"].shift


@pytest.mark.parametrize("family", FAMILIES)
def test_no_two_partitions_share_a_trigger(family: str) -> None:
    task = get_task("mnist5k")
    images = task.load("train")
    turn = list(FAMILIES).index(family)
    seen = []
    for partition in PARTITIONS:
        for number in (turn, turn + len(FAMILIES)):
            e = Entry(task="mnist5k", network="badnets_cnn", partition=partition, planted=True, number=number)
            assert e.kind == family
            assert e.poison is not None
            poisoned = e.poison(images, task, torch.Generator().manual_seed(e.seed))
            assert isinstance(poisoned, Poisoned)
            seen.append(poisoned.trigger(images.x[:20]))
    assert not any(torch.equal(a, b) for i, a in enumerate(seen) for b in seen[:i])


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
