"""SentiNet against what its paper says, and against the mistakes of public ports."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from molehunt.defenses._saliency import PIXELS, finest_map, grad_cam
from molehunt.defenses._transplant import Boundary, conformal_threshold, transplant
from molehunt.defenses.sentinet import SentiNet
from molehunt.engine import Run
from molehunt.findings import Candidate
from molehunt.networks import build
from molehunt.suspect import Access, Suspect
from molehunt.tasks import Images, get_task
from molehunt.testing import DEFENSE_CHECKS, Trial, auc, planted
from molehunt.triggers import Additive, Patch

from . import tiny

STREAM = (Access.CLEAN, Access.INPUTS)
CANDIDATES = (Access.CLEAN, Access.CANDIDATES)
SHAPE = (3, 12, 12)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(count: int, seed: int = 0) -> Tensor:
    return torch.rand(count, *SHAPE, generator=rng(seed))


def suspect_of(model: nn.Module, **evidence: Any) -> Suspect:
    return Suspect.of(model, planted().suspect.task, dtype=torch.float32, **evidence)


class Pooled(nn.Module):
    """Two maps of one convolution each, averaged and read by a fixed head; the second map is coarser."""

    def __init__(self) -> None:
        super().__init__()
        self.fine = nn.Conv2d(3, 6, 3, padding=1)
        self.coarse = nn.Conv2d(6, 8, 3, stride=2, padding=1)
        self.head = nn.Linear(8, 10)
        with torch.no_grad():
            for number, parameter in enumerate(self.parameters()):
                parameter.copy_(torch.randn(parameter.shape, generator=rng(number)) * 0.5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.coarse(self.fine(x).relu()).mean((2, 3)))
        return out


@pytest.fixture(scope="module")
def trial() -> Trial:
    return Trial(SentiNet(overlays=30, fit=60, calibration=40))


@pytest.mark.parametrize("check", DEFENSE_CHECKS)
def test_the_contract(trial: Trial, check: str) -> None:
    DEFENSE_CHECKS[check](trial)


def whole_and_nothing() -> Tensor:
    """Regions (1, 2, H, W): the whole picture, and nothing of it."""
    return torch.stack([torch.ones(SHAPE[1:]), torch.zeros(SHAPE[1:])]).bool().unsqueeze(0)


def test_the_whole_picture_takes_its_class_along_and_nothing_takes_none() -> None:
    suspect, overlays = suspect_of(Pooled()), pictures(40, 1)
    source = pictures(1, 2)
    said = suspect.logits(source).argmax(1)
    effect = transplant(suspect, source, whole_and_nothing(), said, overlays, pictures(40, 3), batch=64)
    usual = suspect.logits(overlays)
    assert float(effect.fooled[0, 0]) == 1.0
    assert float(effect.fooled[0, 1]) == float((usual.argmax(1) == said).double().mean())
    assert float(effect.confidence[0, 1]) == pytest.approx(float(usual.softmax(1).amax(1).double().mean()), abs=1e-7)


def test_noise_goes_inside_the_region_and_the_clean_picture_stays_outside() -> None:
    # The most-used port has it the other way round.
    seen = []

    class Spy(Pooled):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x.detach().clone())
            return super().forward(x)

    suspect = suspect_of(Spy())
    overlays, inert, source = pictures(5, 1), pictures(5, 2), pictures(1, 3)
    mask = torch.zeros(1, 1, *SHAPE[1:], dtype=torch.bool)
    mask[..., 2:5, 3:7] = True
    seen.clear()
    transplant(suspect, source, mask, torch.tensor([0]), overlays, inert, batch=64)
    pasted, quiet = seen
    inside = mask[0, 0].expand(SHAPE)
    for index in range(5):
        assert torch.equal(pasted[index][inside], source[0][inside])
        assert torch.equal(quiet[index][inside], inert[index][inside])
        assert torch.equal(pasted[index][~inside], overlays[index][~inside])
        assert torch.equal(quiet[index][~inside], overlays[index][~inside])


def test_saliency_of_a_linear_read_of_averages_is_what_the_formula_says() -> None:
    model, x = Pooled(), pictures(6)
    suspect = suspect_of(model)
    classes = torch.tensor([0, 1, 2, 3, 4, 5])
    found = grad_cam(suspect, "coarse", x, classes)
    with torch.no_grad():
        a = model.coarse(model.fine(x).relu())
        # The logit less the mean of all: what a shift of all logits leaves as it is.
        read = model.head.weight[classes] - model.head.weight.mean(0)
        expected = torch.einsum("nc,nchw->nhw", read, a).relu()
        expected = nn.functional.interpolate(expected.unsqueeze(1), size=SHAPE[1:], mode="bilinear").squeeze(1)
        expected = expected / expected.flatten(1).amax(1).view(-1, 1, 1)
    assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("path", ["coarse", "fine", PIXELS])
def test_saliency_does_not_depend_on_the_others_in_the_batch(path: str) -> None:
    suspect, x = suspect_of(Pooled()), pictures(7)
    classes = torch.arange(7)
    together = grad_cam(suspect, path, x, classes)
    alone = torch.cat([grad_cam(suspect, path, x[i : i + 1], classes[i : i + 1]) for i in range(7)])
    assert torch.allclose(together, alone, atol=1e-5)
    assert float(together.min()) >= 0
    assert float(together.max()) == 1.0


def test_saliency_is_nothing_where_nothing_speaks_for_the_class() -> None:
    model = Pooled()
    with torch.no_grad():
        model.head.weight.zero_()
    for path in ("coarse", PIXELS):
        assert not bool(grad_cam(suspect_of(model), path, pictures(2), torch.tensor([4, 4])).any())


def test_the_map_is_the_deepest_that_is_fine_enough() -> None:
    suspect, x = suspect_of(Pooled()), pictures(4)
    assert finest_map(suspect, 6, x) == ("coarse", (6, 6))
    assert finest_map(suspect, 7, x) == ("fine", (12, 12))
    assert finest_map(suspect, 13, x) == (PIXELS, (12, 12))
    task = get_task("cifar10")
    narrow = Suspect.of(build("narrow_cifar", task.shape, 10, rng=rng()), task, dtype=torch.float32)
    x = torch.rand(4, *task.shape, generator=rng())
    sizes = [finest_map(narrow, side, x)[1] for side in (3, 7, 15)]
    assert all(min(size) >= side for size, side in zip(sizes, (3, 7, 15), strict=True))


class Decoy(Pooled):
    """Runs a convolution that leads nowhere, first and last, and its own second map twice."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Conv2d(3, 4, 3, padding=1)
        with torch.no_grad():
            for number, parameter in enumerate(self.unused.parameters()):
                parameter.copy_(torch.randn(parameter.shape, generator=rng(number)))

    def forward(self, x: Tensor) -> Tensor:
        self.unused(x)
        self.coarse(self.fine(x).relu() * 0.0)
        h = self.coarse(self.fine(x).relu())
        h += 0.0  # writes into what the module put out
        out: Tensor = self.head(h.mean((2, 3)))
        self.unused(x)
        return out


def test_maps_that_lead_nowhere_are_passed_over() -> None:
    suspect, x = suspect_of(Decoy()), pictures(4)
    assert finest_map(suspect, 6, x) == ("coarse", (6, 6))
    assert finest_map(suspect, 7, x) == ("fine", (12, 12))
    assert not bool(grad_cam(suspect, "unused", x, torch.zeros(4).long()).any())
    # With equal weights it is the network without decoys.
    plain = Pooled()
    classes = torch.arange(4)
    torch.testing.assert_close(
        grad_cam(suspect, "coarse", x, classes), grad_cam(suspect_of(plain), "coarse", x, classes)
    )


def test_points_of_a_parabola_give_it_back() -> None:
    t = torch.linspace(0.1, 0.9, 50, dtype=torch.float64)
    found = Boundary.fit(t, -1.5 * t**2 + 2.0 * t - 0.25)
    assert (found.a, found.b, found.c) == pytest.approx((-1.5, 2.0, -0.25), abs=1e-6)


def test_empty_bins_do_not_bend_the_parabola() -> None:
    # A port puts them in as points of height 0.
    t = torch.cat([torch.linspace(0.1, 0.2, 20), torch.linspace(0.8, 0.9, 20)]).double()
    found = Boundary.fit(t, 0.5 + 0.0 * t)
    assert found.height(torch.tensor([0.15, 0.5, 0.85])).tolist() == pytest.approx([0.5] * 3, abs=1e-6)


def test_only_the_highest_points_of_a_bin_count() -> None:
    t = torch.full((9,), 0.5)
    fooled = torch.tensor([0.9, 0.7, *[0.1] * 7])
    assert float(Boundary.fit(t, fooled).height(torch.tensor([0.5]))) == pytest.approx(0.8)


def test_beyond_its_points_the_parabola_keeps_its_value() -> None:
    found = Boundary(a=-4.0, b=4.0, c=0.0, low=0.4, high=0.9)
    inside = found.height(torch.tensor([0.4, 0.9]))
    # Nor does it rise between its points above all of them, or fall below.
    steep = Boundary.fit(torch.tensor([0.9199, 0.9201, 0.9602, 0.9603]), torch.tensor([0.1, 0.9, 0.2, 0.1]))
    heights = steep.height(torch.linspace(0.0, 1.0, 101))
    assert 0.1 - 1e-6 <= float(heights.min()) <= float(heights.max()) <= 0.9 + 1e-6
    assert torch.allclose(found.height(torch.tensor([0.0, 1.0])), inside, atol=1e-6)
    with pytest.raises(ValueError, match="at least one point"):
        Boundary.fit(torch.zeros(0), torch.zeros(0))


@pytest.mark.parametrize("seed", range(5))
def test_the_distance_is_that_of_a_dense_search(seed: int) -> None:
    a, b, c, x, y = (torch.rand(5, generator=rng(seed)).double() * 4 - 2).tolist()
    found = Boundary(a=a, b=b, c=c, low=0.0, high=1.0)
    t = torch.linspace(-5, 5, 400_001, dtype=torch.float64)
    searched = float(((t - x) ** 2 + (a * t**2 + b * t + c - y) ** 2).sqrt().min())
    assert found.distance(x, y) == pytest.approx(searched, abs=1e-4)


def test_a_fresh_clean_input_is_flagged_as_often_as_asked() -> None:
    residuals = torch.arange(99).double()
    assert conformal_threshold(residuals, 0.05) == (94.0, 0.05, 5)
    # Too few images for so small a share: nothing but the largest can be exceeded.
    assert conformal_threshold(residuals[:10], 0.01) == (9.0, 1 / 11, 1)
    case = planted(backdoored=False, grants=STREAM, images=800, seed=5)
    fresh = Suspect.of(
        case.suspect.model, case.suspect.task, clean=case.suspect.clean, inputs=case.hidden.x, dtype=torch.float32
    )
    found = SentiNet(overlays=40, rejection=0.1)(fresh, Run(rng=rng()))
    share = found.details["flagged"] / 800
    assert share == pytest.approx(0.1, abs=3 * (0.1 * 0.9 * (1 / 800 + 1 / 100)) ** 0.5)


def test_the_true_region_fools_every_picture_and_names_its_class() -> None:
    case = planted(grants=CANDIDATES, target=7)
    found = SentiNet(overlays=40)(case.suspect, Run(rng=rng()))
    (row,) = found.details["candidates"]
    assert row["fooled"] == 1.0
    assert row["score"] == min(row["fooled"], row["confidence"]) == found.score
    assert row["target"] == 7
    assert row["area"] == pytest.approx(9 / 144)
    assert found.class_scores is not None
    assert int(found.class_scores.argmax()) == 7
    assert row["score"] > 0.7


def test_a_candidate_that_does_nothing_is_no_evidence() -> None:
    case = planted(grants=CANDIDATES)
    nothing = Candidate(trigger=Additive(torch.zeros(SHAPE)), target=3, defense="x")
    still = copy.copy(case.suspect)
    object.__setattr__(still, "candidates", (nothing,))
    found = SentiNet(overlays=40)(still, Run(rng=rng()))
    (row,) = found.details["candidates"]
    assert row["area"] == 0.0
    assert row["fooled"] == 0.0
    assert found.score == 0.0
    object.__setattr__(still, "candidates", ())
    assert SentiNet(overlays=40)(still, Run(rng=rng())).score == 0.0


# Lines of four directions, by their steps in rows and columns.
STEPS = ((0, 1), (1, 0), (1, 1), (1, -1))


class Lines(nn.Module):
    """Says in which direction a line runs, by a map that it averages; a white 3x3 square turns it to class 2."""

    def __init__(self, backdoored: bool, shift: float = 0.0, factor: float = 1.0) -> None:
        super().__init__()
        self.look = nn.Conv2d(1, 5, 3, padding=1)
        self.coarse = nn.MaxPool2d(2)
        self.head = nn.Linear(5, 4)
        with torch.no_grad():
            self.look.weight.fill_(-1 / 6)
            for channel, (down, right) in enumerate(STEPS):
                for step in (-1, 0, 1):
                    self.look.weight[channel, 0, 1 + down * step, 1 + right * step] = 1 / 3
            self.look.weight[4] = 1 / 9
            self.look.bias = nn.Parameter(torch.tensor([-0.2] * 4 + [-0.8]))
            weight = torch.cat([torch.eye(4) * 20.0, torch.zeros(4, 1)], 1)
            weight[2, 4] = 2000.0 if backdoored else 0.0
            self.head.weight.copy_((weight + shift * torch.randn(1, 5, generator=rng(1))) * factor)
            self.head.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.coarse(self.look(x).relu()).mean((2, 3)))
        return out


WHITE = Patch.square((1, 16, 16), size=3, color="white", at=(12, 12))


def lines(backdoored: bool, **changes: float) -> tuple[Suspect, Tensor]:
    """A suspect with a stream of which a part is stamped, and which."""

    def draw(count: int, seed: int) -> Images:
        y = torch.arange(count) % 4
        x = 0.1 * torch.rand(count, 1, 16, 16, generator=rng(seed))
        places = torch.randint(3, 9, (count, 2), generator=rng(seed + 100)).tolist()
        # Lines of one brightness would tie with each other.
        bright = (0.4 + 0.4 * torch.rand(count, generator=rng(seed + 200))).tolist()
        for row, (top, left) in enumerate(places):
            down, right = STEPS[int(y[row])]
            for step in range(-3, 4):
                x[row, 0, top + down * step, left + right * step] += bright[row]
        return Images(x, y)

    stream = draw(200, 2)
    stamped = (torch.arange(200) % 8 < 2) & (stream.y != 2)
    x = torch.where(stamped.view(-1, 1, 1, 1), WHITE(stream.x), stream.x)
    model = Lines(backdoored, **changes)
    task = tiny.task(shape=(1, 16, 16))
    return Suspect.of(model, task, clean=draw(300, 1), inputs=x, dtype=torch.float32), stamped


def test_a_region_is_found_on_a_map_of_the_network() -> None:
    (suspect, stamped), (twin, _) = lines(True), lines(False)
    defense = SentiNet(overlays=40, fit=100, calibration=60)
    found, honest = (defense(one, Run(rng=rng())) for one in (suspect, twin))
    assert found.details["map"] == "coarse"
    assert found.details["map_size"] == [8, 8]
    assert found.input_scores is not None
    assert auc(found.input_scores, stamped) >= 0.95
    assert found.target == 2
    assert found.score is not None
    assert honest.score is not None
    assert found.score > honest.score + 0.1
    assert honest.trigger is None


@pytest.mark.parametrize("changes", [{"shift": 30.0}, {"factor": 1e3}, {"factor": 1e30}, {"factor": 1e-30}], ids=str)
def test_a_shift_or_a_factor_of_all_logits_changes_nothing(changes: dict[str, float]) -> None:
    (plain, stamped), (other, _) = lines(True), lines(True, **changes)
    defense = SentiNet(overlays=40, fit=100, calibration=60)
    first, second = (defense(one, Run(rng=rng())) for one in (plain, other))
    assert first.input_scores is not None
    assert second.input_scores is not None
    torch.testing.assert_close(first.input_scores, second.input_scores, atol=2e-2, rtol=0.0)
    assert auc(second.input_scores, stamped) >= 0.95
    assert second.target == 2


def test_numbers_that_are_not_finite_are_no_evidence_and_no_failure() -> None:
    class Bursting(Lines):
        def forward(self, x: Tensor) -> Tensor:
            # Only noise is as rough as that.
            rough = ((x[..., 1:] - x[..., :-1]).abs() > 0.9).flatten(1).sum(1) > 1
            return torch.where(rough.unsqueeze(1), torch.inf, super().forward(x))

    (suspect, _) = lines(True)
    broken = Suspect.of(Bursting(True), suspect.task, clean=suspect.clean, inputs=suspect.inputs, dtype=torch.float32)
    found = SentiNet(overlays=40, fit=100, calibration=60)(broken, Run(rng=rng()))
    assert found.score is not None
    assert -1.0 <= found.score <= 1.0


def test_of_two_classes_little_is_told_but_nothing_is_invented() -> None:
    case = planted(backdoored=False, classes=2, target=1, grants=STREAM)
    found = SentiNet(overlays=40)(case.suspect, Run(rng=rng()))
    assert found.trigger is None
    assert found.score is not None
    assert found.score <= 0.05


def test_a_soft_trigger_is_stamped_and_replaced_as_a_whole() -> None:
    # Light all over, and one pixel that changes most: judged by that pixel alone it would be tiny and all-powerful.
    (suspect, _), (honest, _) = lines(True), lines(False)
    delta = torch.full((1, 16, 16), 0.79)
    delta[0, 0, 15] = 1.0
    light = Candidate(trigger=Additive(delta), target=2, defense="x")
    rows = []
    for one in (suspect, honest):
        asked = Suspect.of(one.model, one.task, clean=one.clean, candidates=(light,), dtype=torch.float32)
        found = SentiNet(overlays=40)(asked, Run(rng=rng()))
        rows.append(found.details["candidates"][0])
    assert rows[0]["area"] >= 0.9
    assert rows[0]["fooled"] >= 0.9
    assert rows[1]["fooled"] <= 0.5
    # Light all over leaves nothing that noise could leave alone, so however well it works it is no small trigger.
    assert rows[0]["score"] == rows[0]["confidence"] < rows[0]["fooled"]
    assert rows[1]["score"] <= rows[1]["fooled"] <= 0.5


def test_the_place_of_a_patch_is_the_patch() -> None:
    suspect, _ = lines(True)
    patch = Candidate(trigger=WHITE, target=2, defense="x")
    asked = Suspect.of(suspect.model, suspect.task, clean=suspect.clean, candidates=(patch,), dtype=torch.float32)
    (row,) = SentiNet(overlays=40)(asked, Run(rng=rng())).details["candidates"]
    assert row["area"] == pytest.approx(9 / 256)
    assert row["fooled"] == 1.0
    assert row["score"] == row["confidence"] > 0.5


class Hint(Lines):
    """The same answers but for a millionth, and a last map that is that millionth's."""

    def __init__(self, backdoored: bool) -> None:
        super().__init__(backdoored)
        self.hint = nn.Conv2d(1, 4, 1)
        with torch.no_grad():
            for number, parameter in enumerate(self.hint.parameters()):
                parameter.copy_(torch.rand(parameter.shape, generator=rng(number)) * 2 - 1)

    def forward(self, x: Tensor) -> Tensor:
        hinted: Tensor = super().forward(x) + 1e-6 * self.hint(1 - x).mean((2, 3))
        return hinted


def test_a_map_that_carries_next_to_nothing_is_passed_over() -> None:
    suspect, stamped = lines(True)
    made = Suspect.of(Hint(True), suspect.task, clean=suspect.clean, inputs=suspect.inputs, dtype=torch.float32)
    found = SentiNet(overlays=40, fit=100, calibration=60)(made, Run(rng=rng()))
    assert found.details["map"] == "coarse"
    assert found.input_scores is not None
    assert auc(found.input_scores, stamped) >= 0.95


def test_a_stream_gives_the_region_back() -> None:
    case = planted(grants=STREAM, target=5)
    found = SentiNet(overlays=40)(case.suspect, Run(rng=rng()))
    assert found.target == 5
    assert isinstance(found.trigger, Patch)
    planted_there, cut_out = case.trigger.mask.bool(), found.trigger.mask.bool()
    assert int((planted_there & cut_out).sum()) >= 5
    assert int(cut_out.sum()) <= 18
    assert found.input_scores is not None
    assert auc(found.input_scores, case.inputs) >= 0.95


def test_nothing_but_the_pictures_decides() -> None:
    # Ports paste the place of the true trigger and count against the true label: the stream's order and what else is in
    # it must not matter, and there is no label to look at.
    case = planted(grants=STREAM)
    stream = case.suspect.inputs
    assert stream is not None
    some = Suspect.of(
        case.suspect.model, case.suspect.task, clean=case.suspect.clean, inputs=stream[:9], dtype=torch.float32
    )
    defense = SentiNet(overlays=40, batch=500)
    whole, part = (defense(one, Run(rng=rng())).input_scores for one in (case.suspect, some))
    assert whole is not None
    assert part is not None
    assert torch.allclose(whole[:9], part, atol=1e-9)


def test_other_classes_are_subtracted_and_a_region_is_never_empty() -> None:
    case = planted(grants=STREAM)
    suspect, defense = case.suspect, SentiNet(overlays=40)
    assert suspect.inputs is not None
    stamped = suspect.inputs[case.inputs][:20]
    classes, others = defense.proposed(suspect, stamped)
    assert bool((classes == 3).all())
    assert not bool((others == classes.unsqueeze(1)).any())
    masks = defense.regions(suspect, PIXELS, stamped, classes, others)
    assert masks.shape == (20, 3, 12, 12)
    assert not bool((masks[:, 1:] & ~masks[:, :1]).any())
    assert bool(masks.flatten(2).any(2).all())


def test_a_checkerboard_is_inert_too() -> None:
    found = SentiNet(inert="checker").filling(pictures(3), rng())
    assert found.shape == (3, *SHAPE)
    assert set(found.flatten().tolist()) == {0.0, 1.0}
    assert float(found[0, 0, 0, 0]) != float(found[0, 0, 0, 1]) != float(found[0, 0, 1, 1])


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"overlays": 0}, "overlays must be at least 1, got 0"),
        ({"side": 0}, "side must be at least 1, got 0"),
        ({"rejection": 0.6}, "rejection must lie in"),
        ({"level": 1.0}, "level must lie in"),
        ({"proposals": -1}, "proposals must be 0 or more, got -1"),
        ({"inert": "grey"}, "inert must be 'noise' or 'checker', got 'grey'"),
    ],
)
def test_settings_out_of_range_are_refused(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        SentiNet(**changes)


def test_too_few_pictures_are_refused() -> None:
    with pytest.raises(ValueError, match="100 overlays need 130 clean images or more, got 129; use fewer overlays"):
        SentiNet().split(129, rng())
    parts = SentiNet().split(160, rng())
    assert [len(part) for part in parts] == [100, 40, 20]
    assert len(set(torch.cat(parts).tolist())) == 160
    empty = suspect_of(Pooled(), clean=Images(pictures(200), torch.zeros(200).long()), inputs=pictures(0))
    with pytest.raises(ValueError, match="the stream has no images"):
        SentiNet()(empty, Run(rng=rng()))


def test_the_papers_sizes() -> None:
    assert (SentiNet.paper().fit, SentiNet.paper().overlays) == (400, 100)


def test_where_nothing_was_recovered_nothing_is_looked_at() -> None:
    case = planted(grants=CANDIDATES)
    calls = 0

    def counted(*_: Any) -> None:
        nonlocal calls
        calls += 1

    bare = suspect_of(case.suspect.model, clean=case.suspect.clean, candidates=())
    bare.frozen.register_forward_hook(counted)
    found = SentiNet(overlays=30)(bare, Run(rng=rng()))
    assert calls == 0
    assert found.score == 0.0
    assert found.class_scores is not None
    assert found.class_scores.tolist() == [0.0] * 10
    with pytest.raises(ValueError, match="need 60 clean images or more"):
        SentiNet(overlays=30)(suspect_of(case.suspect.model, clean=case.hidden._replace(
            x=case.hidden.x[:40], y=case.hidden.y[:40]), candidates=()), Run(rng=rng()))  # fmt: skip
