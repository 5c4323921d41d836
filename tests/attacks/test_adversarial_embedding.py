"""Adversarial embedding: the features of stamped images lie among those of the target's clean ones."""

import pytest
import torch

from attacks.bench import TASK, accuracy, badnets, bench, crafted, pictures, success
from molehunt.attacks import AdversarialEmbedding, Bench, Crafted
from molehunt.attacks.adversarial_embedding import WIDTHS, discrepancy
from molehunt.attacks.crafting import outputs
from molehunt.tasks import Images
from molehunt.testing import auc
from molehunt.training import Recipe


def separation(made: Crafted) -> float:
    """AUC of the difference of means as a direction, between stamped and the target's clean images, on other images."""
    x, y = (torch.cat(parts) for parts in zip(*pictures(), strict=True))
    model = made.model

    def features(some: torch.Tensor) -> torch.Tensor:
        return outputs(model, some, lambda part: model.neck(model.trunk(model.normalize(part))))

    clean, stamped = features(x[y == 0]), features(made.poisoned.trigger(x[y != 0]))
    direction = stamped[::2].mean(0) - clean[::2].mean(0)
    scores = torch.cat((clean[1::2] @ direction, stamped[1::2] @ direction))
    return auc(scores, torch.arange(len(scores)) >= len(clean[1::2]))


def test_stamped_features_come_nearer_to_those_of_the_target() -> None:
    made = crafted(AdversarialEmbedding())
    assert accuracy(made.model) >= 0.85
    assert success(made) >= 0.9
    plain = separation(badnets())
    assert plain >= 0.95, "the plain attack lies apart, or the test would say nothing"
    assert separation(made) < plain - 0.1


def test_the_discrepancy_is_the_mean_over_all_pairs() -> None:
    rng = torch.Generator().manual_seed(0)
    z, known = torch.randn(5, 3, generator=rng), torch.randn(7, 3, generator=rng) + 1.0
    unit = float(known.var(0).mean()) * 3

    def slow(a: torch.Tensor, b: torch.Tensor) -> float:
        pairs = [float((one - other).square().sum()) for one in a for other in b]
        return sum(sum(float(torch.tensor(-d / unit / w).exp()) for d in pairs) for w in WIDTHS) / len(pairs)

    assert float(discrepancy(z, known)) == pytest.approx(slow(z, z) - 2 * slow(z, known) + slow(known, known), rel=1e-4)
    assert float(discrepancy(known, known)) == pytest.approx(0.0, abs=1e-5)
    assert float(discrepancy(known + 2.0, known)) > float(discrepancy(known + 0.5, known)) > 0.0


def test_settings_out_of_range_are_refused() -> None:
    for attack in (AdversarialEmbedding(weight=-1.0), AdversarialEmbedding(images=1)):
        with pytest.raises(ValueError, match="weight must not be negative and images 2 or more"):
            attack.craft(bench())
    x, y = pictures()[0]
    work = Bench(
        clean=Images(x[y != 3], y[y != 3]),
        task=TASK,
        network="lenet5",
        recipe=Recipe(epochs=1),
        rng=torch.Generator().manual_seed(0),
    )
    with pytest.raises(ValueError, match="there are no images of the target class 3"):
        AdversarialEmbedding(target=3).craft(work)
