import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from molehunt.defenses._pruning import chosen, filters, pruned
from molehunt.defenses.pruning_detection import PruningDetection, masking, reset_accuracies
from molehunt.engine import Cancelled, Run
from molehunt.networks import build
from molehunt.suspect import Suspect
from molehunt.tasks import Images, get_task
from molehunt.testing import DEFENSE_CHECKS, Trial

TASK = get_task("mnist5k")


def run(seed: int = 0) -> Run:
    return Run(rng=torch.Generator().manual_seed(seed))


def suspect(name: str = "badnets_cnn", count: int = 60) -> Suspect:
    """A network as drawn, with labels that it mostly gives itself, so that accuracies vary."""
    model = build(name, TASK.shape, 10, rng=torch.Generator().manual_seed(1)).eval()
    images = TASK.load("validation")
    x = images.x[:count]
    with torch.no_grad():
        y = model(x).argmax(1)
    y[::5] = images.y[:count:5]
    return Suspect.of(model, TASK, clean=Images(x, y), dtype=torch.float32, device="cpu")


def by_hand(defense: PruningDetection, seen: Suspect, seed: int = 0) -> list[float]:
    """The accuracies from copies of the weights, one by one."""
    assert seen.clean is not None
    rng = torch.Generator().manual_seed(seed)
    images = defense.pick(seen.clean, rng)
    lost = {
        path: chosen(
            seen.model.get_submodule(path).weight,  # type: ignore[arg-type]
            defense.copies,
            defense.fraction,
            defense.ranking,
            defense.sampling,
            rng,
        )
        for path in filters(seen.model)
    }
    found = []
    for s in range(defense.copies):
        model = pruned(seen.model, {path: rows[s] for path, rows in lost.items()}, defense.mode, images.x[:1])
        with torch.no_grad():
            found.append(float((model(images.x).argmax(1) == images.y).double().mean()))
    return found


@pytest.mark.parametrize("sampling", ["targeted", "uniform", "random"])
@pytest.mark.parametrize("mode", ["reset", "remove", "trim"])
def test_all_copies_at_once_are_the_copies_one_by_one(mode: Any, sampling: Any) -> None:
    defense = PruningDetection(mode=mode, sampling=sampling, copies=4, share=0.4, images=23)
    seen = suspect()
    found = defense(seen, run())
    accuracies = found.details["accuracies"]
    assert accuracies.tolist() == pytest.approx(by_hand(defense, seen))
    assert found.details["images"] == 23
    assert found.details["layers"] == {"trunk.0": 6, "trunk.3": 12}
    assert len(set(accuracies.tolist())) > 1


def test_a_norm_behind_the_filter_makes_no_constant_of_it() -> None:
    defense = PruningDetection(copies=3, share=0.5, images=20)
    model = build("narrow_cifar", (3, 32, 32), 10, rng=torch.Generator().manual_seed(2)).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            # Scales of both signs: behind a max-pool such a norm stays where it is.
            module.weight.data.copy_(torch.randn(len(module.weight), generator=torch.Generator().manual_seed(3)))
            module.bias.data.fill_(2.0)
    task = get_task("cifar10")
    x = torch.rand(40, 3, 32, 32, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        y = model(x).argmax(1)
    seen = Suspect.of(model, task, clean=Images(x, y), dtype=torch.float32, device="cpu")
    assert defense(seen, run()).details["accuracies"].tolist() == pytest.approx(by_hand(defense, seen))
    # Accuracies are coarse: the logits tell.
    rng = torch.Generator().manual_seed(6)
    lost = {path: torch.rand(2, rows, generator=rng) < 0.4 for path, rows in counts(seen).items()}
    with masking(seen, lost, 3):
        got = seen.logits(x[:3].repeat_interleave(2, 0)).view(3, 2, -1)
    for s in range(2):
        copied = pruned(seen.model, {path: rows[s] for path, rows in lost.items()}, "reset", x[:1])
        torch.testing.assert_close(got[:, s], copied(x[:3]), rtol=1e-3, atol=1e-3)


def counts(seen: Suspect) -> dict[str, int]:
    """Filters of every convolution."""
    layers = {path: seen.model.get_submodule(path) for path in filters(seen.model)}
    return {path: layer.out_channels for path, layer in layers.items() if isinstance(layer, nn.Conv2d)}


def test_pruning_nothing_changes_nothing() -> None:
    seen = suspect()
    for mode in ("reset", "remove", "trim"):
        found = PruningDetection(mode=mode, share=0.0, copies=3)(seen, run())
        assert found.details["accuracies"].tolist() == [found.details["accuracy"]] * 3
        assert found.score == pytest.approx(0.0, abs=1e-12)


def test_the_suspect_is_as_it_was_and_no_hook_is_left() -> None:
    for mode in ("reset", "remove", "trim"):
        seen = suspect()
        before = copy.deepcopy(seen.model.state_dict()), copy.deepcopy(seen.frozen.state_dict())
        PruningDetection(mode=mode, copies=3)(seen, run())
        for model, state in zip((seen.model, seen.frozen), before, strict=True):
            assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
            assert not any(m._forward_hooks for m in model.modules())


def test_the_order_of_filters_in_a_layer_does_not_matter() -> None:
    seen = suspect()
    other = copy.deepcopy(seen.model)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(5))
    first, second = other.get_submodule("trunk.0"), other.get_submodule("trunk.3")
    assert isinstance(first, nn.Conv2d)
    assert isinstance(second, nn.Conv2d)
    assert first.bias is not None
    first.weight.data, first.bias.data = first.weight.data[order], first.bias.data[order]
    second.weight.data = second.weight.data[:, order]
    turned = Suspect.of(other, TASK, clean=seen.clean, dtype=torch.float32, device="cpu")
    for ranking in ("l1", "l2", "linf", "std"):
        defense = PruningDetection(ranking=ranking, share=0.3, copies=6)
        one, two = defense(seen, run()), defense(turned, run())
        assert one.details["accuracies"].tolist() == pytest.approx(two.details["accuracies"].tolist())


def test_the_images_are_drawn_evenly_over_the_classes() -> None:
    y = torch.tensor([0] * 50 + [1] * 6 + [2] * 30)
    x = torch.rand(86, *TASK.shape)
    got = PruningDetection(images=24).pick(Images(x, y), torch.Generator().manual_seed(0))
    assert torch.bincount(got.y).tolist() == [9, 6, 9]
    assert len({row.numpy().tobytes() for row in got.x}) == 24
    few = PruningDetection(images=500).pick(Images(x, y), torch.Generator().manual_seed(0))
    assert len(few.y) == 86


def test_scores_worked_by_hand() -> None:
    accuracies = torch.tensor([0.5, 0.7], dtype=torch.float64)
    assert PruningDetection(copies=2).judge(accuracies) == pytest.approx(0.1 / 0.6)
    assert PruningDetection(copies=2).judge(torch.zeros(2)) == 1.0
    assert PruningDetection(copies=2).judge(torch.tensor([0.0, 1.0])) == 1.0
    fitted = PruningDetection(copies=2, weights=(0.25, 2.0, -1.0))
    assert fitted.judge(accuracies) == pytest.approx(0.25 + 1.0 - 0.7)
    # A coefficient of -1 is a number like any other.
    assert PruningDetection(copies=2, weights=(0.0, -1.0, 0.0)).judge(accuracies) == pytest.approx(-0.5)


def test_default_shares_are_those_of_the_paper() -> None:
    assert [PruningDetection(copies=n).fraction for n in (15, 25, 35)] == [0.067, 0.040, 0.029]
    assert PruningDetection(mode="trim").fraction == pytest.approx(0.134)
    assert PruningDetection(mode="trim", copies=2).fraction == 1.0
    assert PruningDetection(share=0.25).fraction == 0.25


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"mode": "cut"}, "unknown mode 'cut'"),
        ({"sampling": "all"}, "unknown sampling 'all'"),
        ({"ranking": "l3"}, "unknown ranking 'l3'"),
        ({"copies": 1}, "copies must be 2 or more"),
        ({"images": 0}, "images 1 or more"),
        ({"share": 1.5}, "share must lie in"),
        ({"copies": 3, "weights": (1.0, 2.0)}, "has 4 weights, got 2"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        PruningDetection(**settings)


def test_it_needs_a_convolution_and_an_image() -> None:
    seen = suspect(count=6)
    with pytest.raises(ValueError, match="needs clean images"):
        PruningDetection()(replace(seen, clean=None), run())
    flat = Suspect.of(nn.Sequential(nn.Flatten(), nn.Linear(784, 10)), TASK, clean=seen.clean)
    with pytest.raises(ValueError, match="no convolution"):
        PruningDetection()(flat, run())


def test_it_stops_when_told() -> None:
    seen = suspect(count=6)
    for mode in ("reset", "trim"):
        with pytest.raises(Cancelled):
            PruningDetection(mode=mode)(seen, Run(cancelled=lambda: True))


CANNOT = {"ranks_the_planted_above_the_twin"}
"""Only clean accuracy is measured, and the planted model and its twin get every clean picture alike."""


@pytest.mark.parametrize("check", DEFENSE_CHECKS)
def test_the_contract(check: str) -> None:
    trial = Trial(PruningDetection())
    if check in CANNOT:
        with pytest.raises(AssertionError, match="planted models score"):
            DEFENSE_CHECKS[check](trial)
    else:
        DEFENSE_CHECKS[check](trial)


def test_masks_are_of_the_copy_whatever_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = suspect(count=30)
    lost = {"trunk.0": torch.zeros(3, 16, dtype=torch.bool), "trunk.3": torch.zeros(3, 32, dtype=torch.bool)}
    lost["trunk.3"][1, :20] = True
    assert seen.clean is not None
    whole = reset_accuracies(seen, lost, seen.clean, run())
    monkeypatch.setattr("molehunt.defenses.pruning_detection.BATCH", 7)
    assert torch.equal(whole, reset_accuracies(seen, lost, seen.clean, run()))
    assert whole[0] == whole[2]
    assert whole[1] != whole[0]
