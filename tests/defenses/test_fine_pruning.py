import copy
import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from molehunt.defenses import FinePruning
from molehunt.defenses._channels import (
    activity,
    block_output,
    find_reader,
    fold,
    level_logits,
    level_masks,
    masked,
)
from molehunt.defenses._held_out import split
from molehunt.defenses.fine_pruning import Repair, prune_curve, stop
from molehunt.engine import Run
from molehunt.findings import Finding
from molehunt.networks import NETWORKS, Network, Normalize, anatomy, build
from molehunt.suspect import Access, Suspect
from molehunt.tasks import Images
from molehunt.testing import Planted, attack_success, planted, share_right
from molehunt.training import Recipe, Trained, train

from .trained import trained

SHAPE = (3, 16, 16)


def run(defense: FinePruning, suspect: Suspect, seed: int = 0) -> Finding:
    return defense(suspect, Run(rng=torch.Generator().manual_seed(seed)))


def with_state(model: nn.Module, state: Any) -> nn.Module:
    other = copy.deepcopy(model)
    other.load_state_dict(dict(state))
    return other


def pictures(count: int, shape: tuple[int, int, int] = SHAPE, seed: int = 0) -> Tensor:
    return torch.rand(count, *shape, generator=torch.Generator().manual_seed(seed))


def network(kind: str) -> nn.Module:
    """A small random network whose head reads pooled channels ("pool"), or a hidden layer that does ("hidden")."""
    rng = torch.Generator().manual_seed(3)
    if kind == "hidden":
        return build("badnets_cnn", SHAPE, 5, rng=rng).eval()
    if kind == "flat":
        trunk = nn.Sequential(nn.Conv2d(3, 7, 3, stride=2), nn.ReLU())
        neck, head = nn.Sequential(nn.MaxPool2d(2), nn.Flatten()), nn.Linear(63, 5)
    else:
        trunk = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 9, 3), nn.ReLU())
        neck, head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), nn.Linear(9, 5)
    made = Network(
        name="small",
        shape=SHAPE,
        classes=5,
        normalize=Normalize(torch.zeros(3, 1, 1), torch.ones(3, 1, 1)),
        trunk=trunk,
        neck=neck,
        head=head,
    )
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=rng))
    return made.eval()


KINDS = pytest.mark.parametrize("kind", ["pool", "flat", "hidden"])


# ------------------------------------------------------------------------------------------ ranking


def test_activity_is_the_mean_over_images_and_positions() -> None:
    model = network("pool")
    x = pictures(30)
    expected = model.trunk(model.normalize(x)).double().mean((0, 2, 3))  # type: ignore[operator]
    torch.testing.assert_close(activity(model, "trunk", x), expected)


def test_the_order_of_the_images_and_batches_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = network("hidden"), pictures(40)
    straight = activity(model, "trunk", x)
    torch.testing.assert_close(activity(model, "trunk", x.flip(0)), straight, rtol=1e-12, atol=0)
    monkeypatch.setattr("molehunt.defenses._channels.BATCH", 7)
    torch.testing.assert_close(activity(model, "trunk", x), straight, rtol=1e-6, atol=0)


def test_a_strongly_negative_channel_is_active_not_dormant() -> None:
    model = nn.Sequential(nn.Conv2d(1, 3, 1), nn.Flatten(), nn.Linear(12, 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([-5.0, 0.1, 1.0]).view(3, 1, 1, 1))  # type: ignore[operator]
        model[0].bias.zero_()  # type: ignore[operator]
    assert activity(model, "0", pictures(5, (1, 2, 2))).argsort().tolist() == [1, 2, 0]


def test_ranking_needs_images() -> None:
    with pytest.raises(ValueError, match="at least one image"):
        activity(network("pool"), "trunk", pictures(0))


# ---------------------------------------------------------------------------------------- the curve


@given(channels=st.integers(1, 30), seed=st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_level_j_masks_exactly_the_first_j_channels(channels: int, seed: int) -> None:
    order = torch.randperm(channels, generator=torch.Generator().manual_seed(seed))
    masks = level_masks(order)
    assert masks.shape == (channels + 1, channels)
    for level, mask in enumerate(masks):
        assert (mask == 0).nonzero().flatten().tolist() == sorted(order[:level].tolist())


@KINDS
def test_every_level_is_what_a_mask_on_the_block_gives(kind: str) -> None:
    model, x = network(kind).double(), pictures(11).double()
    parts = anatomy(model, x[:1])
    a = block_output(model, parts.block, x)
    reader = find_reader(model, parts, a, x[:1])
    assert reader is not None
    assert (reader.path == parts.head) == (kind != "hidden")
    order = activity(model, parts.block, x).argsort()
    levels = level_logits(model, parts, a, order, x[:1], reader)
    general = level_logits(model, parts, a, order, x[:1], None)
    assert levels.shape == (len(order) + 1, 11, 5)
    for level, mask in enumerate(level_masks(order)):
        with torch.no_grad(), masked(model, parts.block, mask):
            expected = model(x)
        torch.testing.assert_close(levels[level], expected, rtol=0, atol=1e-10)
        torch.testing.assert_close(general[level], expected, rtol=0, atol=1e-10)


@KINDS
def test_the_curve_counts_right_answers(kind: str) -> None:
    model, x = network(kind), pictures(50)
    held = Images(x, torch.arange(50) % 5)
    parts = anatomy(model, x[:1])
    a = block_output(model, parts.block, x)
    order = activity(model, parts.block, x).argsort()
    reader = find_reader(model, parts, a, x[:1])
    curve = prune_curve(model, parts, a, held, order, reader, Run())
    for level, mask in enumerate(level_masks(order)):
        with masked(model, parts.block, mask):
            assert float(curve[level]) == pytest.approx(share_right(model, held))


def test_no_pruning_changes_no_bit_and_full_pruning_leaves_a_constant() -> None:
    model, x = network("pool"), pictures(6)
    with torch.no_grad():
        before = model(x)
        with masked(model, "trunk", torch.ones(9)):
            assert torch.equal(model(x), before)
        with masked(model, "trunk", torch.zeros(9)):
            assert torch.equal(model(x), model.head.bias.expand(6, -1))  # type: ignore[operator,union-attr]
        assert torch.equal(model(x), before), "the hook stayed"


@pytest.mark.parametrize(
    ("curve", "tolerance", "expected"),
    [
        ([0.9, 0.9, 0.9], 0.04, 2),
        ([0.9, 0.87, 0.85, 0.9], 0.04, 1),  # recovers later: the first crossing counts
        ([0.9, 0.5, 0.9], 0.04, 0),
        ([0.9, 0.86, 0.1], 0.04, 1),  # exactly the tolerance is allowed
        ([0.9, 0.95, 0.86, 0.8], 0.04, 2),
        ([0.9, 0.0], 1.0, 1),
    ],
)
def test_pruning_stops_before_the_first_crossing(curve: list[float], tolerance: float, expected: int) -> None:
    assert stop(torch.tensor(curve, dtype=torch.float64), tolerance) == expected


# ------------------------------------------------------------------------------------------ cutting


@pytest.mark.parametrize("name", NETWORKS)
def test_channels_can_be_cut_out_of_every_network(name: str) -> None:
    model = build(name, (3, 16, 16), 4, rng=torch.Generator().manual_seed(0)).eval()
    x = pictures(3)
    parts = anatomy(model, x[:1])
    a = block_output(model, parts.block, x)
    reader = find_reader(model, parts, a, x[:1])
    assert reader is not None
    channels = a.shape[1]
    assert set(reader.owner.tolist()) == set(range(channels))
    mask = (torch.arange(channels) % 3 > 0).float()
    with torch.no_grad():
        with masked(model, parts.block, mask):
            expected = model(x)
        whole = model(x)
        fold(model, parts, reader, mask)
        torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-6)
        assert not torch.allclose(whole, expected)


class Odd(nn.Module):
    """A network in which channels cannot be cut for one reason or another."""

    def __init__(self, why: str) -> None:
        super().__init__()
        self.why = why
        self.conv = nn.Conv2d(3, 6, 3)
        self.act = nn.ReLU()
        self.norm = nn.LayerNorm(6)
        self.first = nn.Linear(6, 8)
        self.second = nn.Linear(6, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        z = self.act(self.conv(x)).mean((2, 3))
        if self.why == "mixed":
            z = self.norm(z)
        if self.why == "averaged":
            z = z + z.mean(1, keepdim=True)
        if self.why == "shifted":
            z = z + 1
        hidden = self.first(z)
        if self.why == "read twice":
            hidden = hidden + self.second(z)
        logits: Tensor = self.head(hidden)
        return logits


@pytest.mark.parametrize(
    ("why", "can", "scale"),
    [
        ("", True, 1.0),
        ("mixed", False, 1.0),
        ("shifted", False, 1.0),
        ("read twice", False, 1.0),
        ("", True, 1e-6),
        # Logits so small that comparing them shows nothing: the probe has to tell.
        ("mixed", False, 1e-6),
        ("averaged", False, 1e-6),
        ("shifted", False, 1e-6),
    ],
)
def test_a_network_that_mixes_channels_before_reading_them_is_recognized(why: str, can: bool, scale: float) -> None:
    model = Odd(why).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        model.head.weight.mul_(scale)
    x = pictures(4)
    parts = anatomy(model, x[:1])
    assert parts.block == "act"
    reader = find_reader(model, parts, block_output(model, parts.block, x), x[:1])
    assert (reader is not None) == can


def test_where_nothing_can_be_cut_nothing_is_pruned_and_a_warning_says_so() -> None:
    case = planted()
    model = copy.deepcopy(case.suspect.model)
    scale = nn.LayerNorm(11)
    model.neck = nn.Sequential(nn.Flatten(), scale)
    suspect = Suspect.of(model, case.suspect.task, clean=case.suspect.clean, dtype=torch.float32)
    found = run(FinePruning(steps=5), suspect)
    assert found.details["pruned"] == 0
    assert "cannot be cut" in found.details["warnings"][0]
    assert found.repaired is not None
    assert found.repaired.keys() == model.state_dict().keys()


# --------------------------------------------------------------------------------------- the method


def test_the_planted_channel_ranks_first_and_pruning_it_alone_removes_the_backdoor() -> None:
    case = planted()
    found = run(FinePruning(steps=0), case.suspect)
    assert int(found.details["order"][0]) == 10
    assert found.details["pruned"] == 1  # the next channel is a class, and costs ten points
    repaired = with_state(case.suspect.model, found.repaired)
    assert case.success(case.suspect.model) == 1.0
    assert case.success(repaired) == 0.0
    with torch.no_grad():
        assert torch.equal(repaired(case.hidden.x), case.suspect.model(case.hidden.x))


def decoyed(case: Planted) -> nn.Module:
    """The planted model of a pruning-aware attacker: the target's own channel sees the trigger, and a decoy sleeps."""
    model = copy.deepcopy(case.suspect.model)
    convolution, head = model.trunk[0], model.head  # type: ignore[index]
    assert isinstance(convolution, nn.Conv2d)
    assert isinstance(head, nn.Linear)
    assert convolution.bias is not None
    with torch.no_grad():
        convolution.weight[3] += 8 * convolution.weight[10]
        convolution.bias[3] += 8 * -0.05
        convolution.bias[10] -= 1.0
        head.weight[3, 10] = 0.0
    return model


def test_a_decoy_ranks_first_and_pruning_alone_leaves_the_backdoor() -> None:
    case = planted()
    model = decoyed(case)
    suspect = Suspect.of(model, case.suspect.task, clean=case.suspect.clean, dtype=torch.float32)
    found = run(FinePruning(baselines=True), suspect)
    assert int(found.details["order"][0]) == 10
    pruned = with_state(model, found.details["prune_only"])
    assert attack_success(model, case.hidden, case.trigger, case.target) == 1.0
    assert attack_success(pruned, case.hidden, case.trigger, case.target) == 1.0


def test_pruned_channels_stay_dead_through_fine_tuning() -> None:
    case = planted()
    defense = FinePruning(steps=30, tolerance=0.25, baselines=True)
    found = run(defense, case.suspect)
    assert found.repaired is not None
    dead = found.details["order"][: found.details["pruned"]]
    assert len(dead) == 3
    assert bool((found.repaired["head.weight"][:, dead] == 0).all())
    alive = found.details["order"][found.details["pruned"] :]
    moved = found.repaired["head.weight"] - case.suspect.model.state_dict()["head.weight"]
    assert bool((moved[:, alive] != 0).any())
    assert not torch.equal(found.details["fine_tune_only"]["head.weight"], found.repaired["head.weight"])


def test_the_mask_is_in_place_while_fine_tuning() -> None:
    """Without weight decay the filters of dead channels keep every bit, for no gradient reaches them."""
    case = planted()
    found = run(FinePruning(steps=30, tolerance=0.25, weight_decay=0.0), case.suspect)
    assert found.repaired is not None
    before, after = case.suspect.model.state_dict()["trunk.0.weight"], found.repaired["trunk.0.weight"]
    same = (before == after).flatten(1).all(1)
    assert sorted(found.details["order"][: found.details["pruned"]].tolist()) == same.nonzero().flatten().tolist()
    assert len(before) > int(same.sum()) > 1


def test_masking_and_cutting_agree_after_fine_tuning() -> None:
    """What is handed back is the network that was fine-tuned, though it needs no mask any more."""
    model = build("badnets_cnn", SHAPE, 5, rng=torch.Generator().manual_seed(0)).eval()
    case = planted()
    task = dataclasses.replace(case.suspect.task, shape=SHAPE, classes=tuple("abcde"), augment="crop")
    clean = Images(pictures(60), torch.arange(60) % 5)
    suspect = Suspect.of(model, task, clean=clean, dtype=torch.float32)
    found = run(FinePruning(steps=10, batch=20, tolerance=0.5, lr=0.05), suspect)
    assert found.details["pruned"] > 0
    mask = level_masks(found.details["order"])[found.details["pruned"]]
    repaired = with_state(model, found.repaired)
    with torch.no_grad():
        cut = repaired(clean.x)
        with masked(repaired, "trunk", mask):
            torch.testing.assert_close(repaired(clean.x), cut, rtol=0, atol=1e-6)


def test_the_chosen_level_obeys_the_tolerance_and_the_next_does_not() -> None:
    found = run(FinePruning(steps=0, tolerance=0.15), planted().suspect)
    curve, pruned = found.details["curve"], found.details["pruned"]
    assert len(curve) == 12
    assert bool((curve[: pruned + 1] >= curve[0] - 0.15 - 1e-9).all())
    assert float(curve[pruned + 1]) < float(curve[0]) - 0.15
    assert found.details["accuracy"]["pruned"] == pytest.approx(float(curve[pruned]))
    assert found.details["accuracy"]["repaired"] == pytest.approx(float(curve[pruned]))


def test_a_whitening_layer_is_left_as_it_is() -> None:
    rng = torch.Generator().manual_seed(0)
    model = build("narrow_cifar", SHAPE, 5, rng=rng)
    assert isinstance(model, Network)
    model.initialize(pictures(20))
    task = dataclasses.replace(planted().suspect.task, shape=SHAPE, classes=tuple("abcde"))
    suspect = Suspect.of(model, task, clean=Images(pictures(20), torch.arange(20) % 5), dtype=torch.float32)
    found = run(FinePruning(steps=2, batch=8, tolerance=0.0), suspect)
    assert found.repaired is not None
    moved = {key for key, value in suspect.model.state_dict().items() if not torch.equal(value, found.repaired[key])}
    assert "trunk.0.weight" not in moved
    assert {"trunk.2.weight", "head.weight", "head.bias"} <= moved


def test_held_out_images_never_train() -> None:
    case = planted(images=200)
    assert case.suspect.clean is not None
    tune, held = split(case.suspect.clean, 0.3, torch.Generator())
    assert (len(tune.y), len(held.y)) == (140, 60)
    both = {picture.numpy().tobytes() for picture in tune.x} & {picture.numpy().tobytes() for picture in held.x}
    assert not both


def test_the_budget_is_counted_in_steps() -> None:
    from molehunt.runner import inspect

    for images in (100, 400):
        outcome = inspect(FinePruning(steps=7, batch=32), planted(images=images).suspect, seed=0)
        assert isinstance(outcome, Finding)
        assert outcome.cost is not None
        assert outcome.cost.backward == 7 * 32


@pytest.mark.parametrize(("dtype", "precision"), [(torch.float32, "float32"), (torch.bfloat16, "fast")])
def test_it_trains_in_the_number_format_of_the_suspect(
    dtype: torch.dtype, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def spy(model: nn.Module, images: Images, recipe: Recipe, **rest: Any) -> Trained:
        seen.append(recipe.precision)
        return train(model, images, recipe, **rest)

    monkeypatch.setattr("molehunt.defenses.fine_pruning.train", spy)
    case = planted()
    run(
        FinePruning(steps=2, attempts=1),
        Suspect.of(case.suspect.model, case.suspect.task, clean=case.suspect.clean, dtype=dtype),
    )
    assert seen == [precision]


def tuned(defense: FinePruning, answers: list[float | None], monkeypatch: pytest.MonkeyPatch) -> Finding:
    """What is found when the fine-tunings of a planted model have these accuracies; None for one that diverges."""
    state, left = planted().suspect.model.state_dict(), list(answers)

    def attempt(self: FinePruning, *arguments: Any) -> Repair:
        answer = left.pop(0)
        if answer is None:
            raise FloatingPointError("diverged")
        return Repair(state=state, accuracy=answer, lr=arguments[-1])

    monkeypatch.setattr(FinePruning, "_attempt", attempt)
    return run(defense, planted().suspect)


@pytest.mark.parametrize(
    ("answers", "tried", "taken"),
    [
        ([0.96, 1.0, 1.0], 1, 0),
        ([0.95, 0.97, 1.0], 2, 1),
        ([0.9, 0.95, 0.93], 3, 1),
        ([0.95, 0.9, 0.8], 3, 0),
        ([None, 0.97, 1.0], 2, 1),
        ([0.9, None, 0.8], 3, 0),
    ],
)
def test_a_rate_that_costs_too_much_is_followed_by_a_third_of_it(
    answers: list[float | None], tried: int, taken: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    details = tuned(FinePruning(lr=0.9), answers, monkeypatch).details
    assert details["accuracy"]["before"] == 1.0, "else the answers above are not what they seem"
    rates = [0.9, 0.3, 0.1]
    assert [one["lr"] for one in details["rates"]] == pytest.approx(rates[:tried])
    assert [one["accuracy"] for one in details["rates"]] == answers[:tried]
    assert details["lr"] == pytest.approx(rates[taken])
    assert details["accuracy"]["repaired"] == answers[taken]
    costly = [text for text in details["warnings"] if "costs more than 4 points" in text]
    assert len(costly) == (answers[taken] is not None and answers[taken] < 0.96)  # type: ignore[operator]


def test_fine_tuning_that_diverges_at_every_rate_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FloatingPointError):
        tuned(FinePruning(attempts=2), [None, None], monkeypatch)


def test_every_attempt_begins_with_the_weights_of_the_suspect() -> None:
    case = planted()
    costly = FinePruning(lr=0.0, tolerance=0.0, attempts=2)  # cannot cost anything: one attempt, and nothing moves
    found = run(costly, case.suspect)
    assert len(found.details["rates"]) == 1
    ruinous = FinePruning(lr=2.0, warmup=0.0, tolerance=0.02, steps=30)
    rates = run(ruinous, case.suspect).details["rates"]
    assert len(rates) > 1, "the first rate was meant to ruin the model"
    # Had the second begun where the first ended, it would not have come back in 30 steps of a third.
    assert rates[-1]["accuracy"] >= 0.98


def test_the_suspect_keeps_its_weights_and_gets_no_hooks() -> None:
    case = planted()
    before = copy.deepcopy(case.suspect.model.state_dict())
    run(FinePruning(steps=3), case.suspect)
    after = case.suspect.model.state_dict()
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in case.suspect.model.modules())


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"tolerance": -0.1}, r"tolerance must lie in \[0, 1\], got -0.1"),
        ({"held_out": 0.0}, "held_out must lie in"),
        ({"held_out": 1.0}, "held_out must lie in"),
        ({"steps": -1}, "steps must be 0 or more"),
        ({"steps": 10**6}, "epochs is out of range"),
        ({"batch": 0}, "batch 1 or more"),
        ({"lr": -1.0}, "lr"),
        ({"attempts": 0}, "attempts must be 1 or more, got 0"),
        ({"momentum": 1.0}, "momentum"),
    ],
)
def test_settings_out_of_range_are_refused(settings_: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FinePruning(**settings_)


def test_too_few_clean_images_are_refused() -> None:
    case = planted()
    assert case.suspect.clean is not None
    few = Images(case.suspect.clean.x[:3], case.suspect.clean.y[:3])
    suspect = Suspect.of(case.suspect.model, case.suspect.task, clean=few, dtype=torch.float32)
    with pytest.raises(ValueError, match="needs 4 clean images or more"):
        run(FinePruning(), suspect)
    assert frozenset({Access.CLEAN}) in FinePruning.needs


@pytest.mark.slow
def test_on_a_trained_mnist_network() -> None:
    """A 5x5 square: ASR fell from .99 to between .02 and .72 over four such networks, for 1.2 points of accuracy."""
    case = trained()
    for model, backdoored in ((case.backdoored, True), (case.twin, False)):
        found = run(FinePruning(), Suspect.of(model, case.task, clean=case.clean))
        repaired = with_state(model, found.repaired)
        assert share_right(repaired, case.hidden) >= share_right(model, case.hidden) - 0.03
        before = attack_success(model, case.hidden, case.trigger, case.target)
        after = attack_success(repaired, case.hidden, case.trigger, case.target)
        assert before >= 0.95 if backdoored else before <= 0.05
        assert after <= 0.75 * before if backdoored else after <= 0.05
