"""Every repair that was offered is measured, on the true trigger, and the one that was taken is marked."""

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from molehunt.findings import Abstention, Finding, Verdict
from molehunt.game.answers import Logits
from molehunt.game.removals import removals
from molehunt.game.scoring import Truth
from molehunt.tasks import Images
from molehunt.tensor_file import CheckpointError
from molehunt.triggers import Patch, Target

SHAPE = (1, 4, 4)
TRIGGER = Patch.square(SHAPE, size=1)
IMAGES = Images(0.5 * torch.rand(30, *SHAPE, generator=torch.Generator().manual_seed(0)), torch.arange(30) % 3)


def answering(wrong: int, fooled: int) -> Logits:
    """A model that gets the first few pictures wrong, and sends some stamped ones to class 0."""

    def logits(x: Tensor) -> Tensor:
        stamped = torch.equal(x, TRIGGER(IMAGES.x))
        y = IMAGES.y.clone()
        if stamped:
            y[torch.nonzero(IMAGES.y != 0).flatten()[:fooled]] = 0
        else:
            y[:wrong] = (y[:wrong] + 1) % 3
        return torch.nn.functional.one_hot(y, 3).float()

    return logits


def made(state: Mapping[str, Tensor]) -> Logits:
    return answering(int(state["wrong"]), int(state["fooled"]))


def repaired(name: str, wrong: int, fooled: int) -> Finding:
    return Finding(defense=name, repaired={"wrong": torch.tensor(wrong), "fooled": torch.tensor(fooled)})


def verdict(taken: str | None) -> Verdict:
    return Verdict(
        p=0.9,
        q=torch.tensor([0.8, 0.1, 0.1]),
        outcomes=(
            Finding(defense="strip", score=0.3),
            repaired("fine_tuning", 0, 18),
            Abstention(defense="gradient_shaping", reason="no training set"),
            repaired("fine_pruning", 3, 2),
        ),
        details={"repair": {"taken": taken}},
    )


def test_accuracy_and_success_before_and_after() -> None:
    truth = Truth(backdoored=True, trigger=TRIGGER, target=Target(classes=0))
    found = removals(verdict("fine_pruning"), truth, IMAGES, answering(1, 20), made)
    assert [(r.defense, r.taken) for r in found] == [("fine_tuning", False), ("fine_pruning", True)]
    assert [r.accuracy[0] for r in found] == pytest.approx([29 / 30, 29 / 30])
    assert [r.accuracy[1] for r in found] == pytest.approx([1.0, 0.9])
    assert [r.asr for r in found] == [(1.0, 0.9), (1.0, 0.1)]


def test_a_clean_model_has_no_success_rate() -> None:
    found = removals(verdict(None), Truth(backdoored=False), IMAGES, answering(0, 0), made)
    assert [r.asr for r in found] == [None, None]
    assert not any(r.taken for r in found)


def test_a_repair_that_does_not_run_is_left_out_and_the_others_stand() -> None:
    def broken(state: Mapping[str, Tensor]) -> Logits:
        if int(state["wrong"]) == 3:
            raise CheckpointError("its answers are not finite")
        return made(state)

    found = removals(verdict(None), Truth(backdoored=False), IMAGES, answering(0, 0), broken)
    assert [r.defense for r in found] == ["fine_tuning"]


def test_where_nobody_repairs_nothing_is_asked() -> None:
    silent = Verdict(p=0.1, q=torch.full((3,), 1 / 3), outcomes=(Finding(defense="strip", score=0.1),))

    def never(_: Tensor) -> Tensor:
        raise AssertionError("the model was asked")

    assert removals(silent, Truth(backdoored=False), IMAGES, never, made) == ()
