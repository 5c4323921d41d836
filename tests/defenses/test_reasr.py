import dataclasses
import math

import pytest
import torch
from torch import Tensor, nn

from molehunt.defenses._reasr import Held, Trial, hold, judge, same_class, suspicion
from molehunt.suspect import Suspect
from molehunt.tasks import Images
from molehunt.testing import planted


class Brightness(nn.Module):
    """Says class 2 for pictures brighter than a half, class 0 for dark ones, class 1 in between."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 1)
        self.head = nn.Linear(1, 3)

    def forward(self, x: Tensor) -> Tensor:
        z = x.mean((2, 3))
        return torch.cat((0.3 - z, 0.2 - (z - 0.4).abs(), z - 0.5), 1)


def gray(*values: float) -> Tensor:
    return torch.tensor(values).view(-1, 1, 1, 1).expand(-1, 1, 2, 2).clone()


def bright(values: Tensor, y: list[int]) -> tuple[Suspect, Held]:
    task = dataclasses.replace(planted(classes=3, target=0).suspect.task, shape=(1, 2, 2))
    suspect = Suspect.of(Brightness(), task, dtype=torch.float32)
    return suspect, Held(values, torch.tensor(y), suspect.logits(values).argmax(1), 1.0)


def test_success_counts_images_of_other_classes_that_were_not_sent_there_anyway() -> None:
    suspect, held = bright(gray(0.1, 0.1, 0.4, 0.9, 0.9), [0, 0, 1, 2, 0])
    # To class 2: of four images of other classes one (0.9) goes there without any trigger and is no success.
    trial = judge(suspect, held, 2, held.x + torch.tensor([0.9, 0.0, 0.6, 0.0, 0.1]).view(-1, 1, 1, 1))
    assert trial.reasr == pytest.approx(2 / 4)
    assert trial.images == 4
    leads = [1.0 - 0.5 - (0.3 - 1.0), 0.1 - 0.5 - (0.3 - 0.1), 1.0 - 0.5 - (0.2 - 0.6), 1.0 - 0.5 - (0.2 - 0.6)]
    leads[0] = 0.5 - max(0.3 - 1.0, 0.2 - 0.6)
    assert trial.margin == pytest.approx(sum(leads) / 4, abs=1e-6)


def test_the_image_of_the_target_class_is_not_even_looked_at() -> None:
    suspect, held = bright(gray(0.1, 0.4), [0, 2])
    one = judge(suspect, held, 2, held.x + torch.tensor([0.0, 0.6]).view(-1, 1, 1, 1))
    assert (one.reasr, one.images) == (0.0, 1)
    none = judge(suspect, Held(held.x, torch.tensor([2, 2]), held.plain, 1.0), 2, held.x)
    assert (none.reasr, none.baseline, none.images) == (0.0, 0.0, 0)
    assert suspicion(none, held) == 0.0


def test_what_a_real_piece_of_the_class_does_is_subtracted() -> None:
    suspect, held = bright(gray(0.1, 0.1, 0.4, 0.4), [0, 0, 1, 1])
    trial = judge(suspect, held, 2, held.x + 0.6, natural=gray(0.9, 0.1, 0.1, 0.1))
    assert (trial.reasr, trial.baseline) == (1.0, 0.25)
    assert 0.75 < suspicion(trial, held) < 0.75 + 1 / 4
    worse = judge(suspect, held, 2, held.x, natural=gray(0.9, 0.1, 0.1, 0.1))
    assert 0.0 < suspicion(worse, held) < 1 / 4  # never below nothing


def test_the_tie_break_is_less_than_one_image_and_keeps_the_order() -> None:
    held = Held(torch.zeros(20, 1, 1, 1), torch.zeros(20), torch.zeros(20), 2.0)
    for hits in range(20):
        low, high = (Trial(h / 19, 0.0, m, 19) for h, m in ((hits, 1e9), (hits + 1, -1e9)))
        assert suspicion(low, held) < suspicion(high, held)
    leads = [-math.inf, -1e9, -5.0, -0.1, 0.0, 0.1, 5.0, 1e9]
    found = [suspicion(Trial(0.0, 0.0, lead, 19), held) for lead in leads]
    assert found == sorted(found)
    assert len(set(found)) == len(found)
    assert found[0] == 0.0
    assert found[4] == pytest.approx(0.5 / 21)


def test_a_piece_of_the_class_is_that_of_real_images_under_the_mask() -> None:
    x = gray(0.1, 0.2, 0.3, 0.8, 0.9)
    held = Held(x, torch.tensor([0, 1, 1, 2, 2]), torch.zeros(5), 1.0)
    mask = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    pieces = same_class(held, 2, mask)
    assert pieces is not None
    assert pieces[:, 0, 0, 0].tolist() == pytest.approx([0.8, 0.9, 0.8, 0.9, 0.8])
    assert torch.equal(pieces[:, 0, 0, 1], x[:, 0, 0, 1])
    assert torch.equal(pieces[:, 0, 1, 1], pieces[:, 0, 0, 0])
    assert same_class(held, 3, mask) is None


def test_the_unit_of_leads_is_the_usual_lead_of_clean_images() -> None:
    suspect, _ = bright(gray(0.1), [0])
    held = hold(suspect, Images(gray(0.1, 0.9), torch.tensor([0, 2])))
    assert held.plain.tolist() == [0, 2]
    # 0.2 over -0.1, and 0.4 over -0.3.
    assert held.unit == pytest.approx((0.3 + 0.7) / 2, abs=1e-6)
    suspect.frozen.head = nn.Identity()
    flat = hold(suspect, Images(torch.full((2, 1, 2, 2), torch.nan), torch.tensor([0, 2])))
    assert flat.unit == 1.0
