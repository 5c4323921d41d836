"""Handcrafted: weights and guards are computed, the channels are spare ones, and clean images do not pass."""

import pytest
import torch
from torch import nn

from attacks.bench import TASK, accuracy, bench, crafted, honest, pictures, success
from molehunt.attacks import Bench, Handcrafted
from molehunt.attacks._chain import Link, chain
from molehunt.attacks.handcrafted import Seen, between, matched, spare
from molehunt.networks import Network, capture
from molehunt.training import Recipe
from molehunt.triggers import Blend

ATTACK = Handcrafted(target=4)


def changed(before: Network, after: Network) -> dict[str, list[int]]:
    """By layer, the channels whose weights or guards differ."""
    old, new = before.state_dict(), after.state_dict()
    found = {}
    for link in chain(before):
        rows = (old[f"{link.path}.weight"] != new[f"{link.path}.weight"]).flatten(1).any(1)
        found[link.path] = rows.nonzero().flatten().tolist()
    return found


def test_it_works_and_costs_little() -> None:
    made = crafted(ATTACK)
    assert success(made) >= 0.95
    assert accuracy(made.model) >= accuracy(honest()) - 0.03
    assert not bool(made.poisoned.altered.any())


def test_few_channels_change_and_one_row_of_the_head() -> None:
    before, after = honest(), crafted(ATTACK).model
    counts = {path: len(rows) for path, rows in changed(before, after).items()}
    assert counts == {"trunk.0": 1, "trunk.3": 1, "neck.2": 8, "neck.4": 8}
    rows = (before.head.weight != after.head.weight).any(1).nonzero().flatten().tolist()
    assert rows == [4]
    columns = (before.head.weight != after.head.weight)[4].nonzero().flatten().tolist()
    assert columns == changed(before, after)["neck.4"]
    assert torch.equal(before.head.bias, after.head.bias)


def test_the_guards_let_stamped_images_pass_and_no_clean_ones() -> None:
    made = crafted(ATTACK)
    x, y = pictures()[1]
    units = changed(honest(), made.model)["neck.4"]
    with torch.no_grad():
        clean = capture(made.model, "neck.4", x)[:, units]
        woken = capture(made.model, "neck.4", made.poisoned.trigger(x[y != 4]))[:, units]
    assert float((clean > 0).float().mean()) <= 0.02
    assert float((woken > 0).float().mean()) >= 0.95


def test_weights_stay_within_what_is_allowed() -> None:
    for most in (2.0, 5.0):
        before, after = honest(), crafted(Handcrafted(target=4, kept=0.0, most=most)).model
        for path, rows in changed(before, after).items():
            norms = before.state_dict()[f"{path}.weight"].flatten(1).norm(dim=1)
            written = after.state_dict()[f"{path}.weight"].flatten(1).norm(dim=1)[rows]
            assert float(written.max()) <= most * float(norms.median()) * 1.001


def test_what_is_kept_leaves_zeros_in_the_new_filter_alone() -> None:
    kept, bare = crafted(ATTACK).model, crafted(Handcrafted(target=4, kept=0.0)).model
    before = honest()
    for path in ("trunk.3", "neck.2"):
        shares = []
        for model in (bare, kept):
            weight = model.state_dict()[f"{path}.weight"][changed(before, model)[path]]
            shares.append(float((weight == 0).float().mean()))
        assert shares[0] > 0.5
        assert shares[1] < 0.2


def test_the_matched_filter_is_the_best_linear_test() -> None:
    rng = torch.Generator().manual_seed(0)
    mix = torch.randn(6, 6, generator=rng)
    clean = torch.randn(4000, 6, generator=rng) @ mix
    change = torch.randn(6, generator=rng)
    found = matched(nn.Linear(6, 2), Seen(clean, clean + change), "layer")

    def apart(direction: torch.Tensor) -> float:
        return float(direction @ change / (clean @ direction).std())

    # The largest ratio there is: the square root of change times inverse covariance times change.
    limit = float((change @ torch.linalg.solve(torch.cov(clean.T), change)).sqrt())
    assert apart(found) >= 0.95 * limit
    assert apart(found) > apart(change)
    assert float(found.norm()) == pytest.approx(1.0)


def test_a_convolution_finds_the_place_of_the_trigger() -> None:
    rng = torch.Generator().manual_seed(0)
    clean = 0.1 * torch.rand(50, 1, 8, 8, generator=rng)
    stamp = torch.rand(3, 3, generator=rng)
    woken = clean.clone()
    woken[:, 0, 4:7, 3:6] += stamp
    layer = nn.Conv2d(1, 2, 3)
    layer.weight.data[0] = matched(layer, Seen(clean, woken), "layer")
    layer.bias.data[0] = 0.0  # type: ignore[union-attr]
    with torch.no_grad():
        rise = (layer(woken) - layer(clean))[:, 0].mean(0)
    assert int(rise.argmax()) == 4 * 6 + 3
    with pytest.raises(ValueError, match=r"trunk\.3 does not see the trigger at all"):
        matched(layer, Seen(clean, clean), "trunk.3")


def test_spare_channels_are_those_that_cost_nothing_and_tell_the_most() -> None:
    rng = torch.Generator().manual_seed(0)
    y = torch.randint(3, (200,), generator=rng)
    clean = torch.zeros(200, 6)
    clean[:, :3] = 3.0 * torch.eye(3)[y]  # needed: one for each class
    clean[:, 3:] = 0.1 * torch.rand(200, 3, generator=rng)
    woken = clean.clone()
    woken[:, 0] += 5.0
    woken[:, 4] += 1.0
    woken[:, 5] += 0.5
    head = nn.Linear(6, 3)
    head.weight.data = torch.cat((torch.eye(3), torch.zeros(3, 3)), 1)
    head.bias.data.zero_()
    with torch.no_grad():
        assert spare(Seen(clean, woken), [nn.ReLU(), head], y, 1, bench()).tolist() == [4]
        assert spare(Seen(clean, woken), [nn.ReLU(), head], y, 2, bench()).tolist() == [4, 5]
        assert spare(Seen(clean, woken), [nn.ReLU(), head], y, 3, bench()).tolist() == [3, 4, 5]


def test_a_guard_has_the_fewest_images_on_its_wrong_side() -> None:
    assert between(torch.tensor([0.0, 1.0]), torch.tensor([3.0, 9.0])) == pytest.approx(2.0)
    # Two clean images among the stamped ones cost less than one stamped image that is stopped.
    low, high = torch.tensor([0.0, 1.0, 6.5, 8.0]), torch.tensor([4.0, 7.0, 9.0])
    assert between(low, high) == pytest.approx(2.5)


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny"])
def test_a_network_with_branches_is_refused_before_any_training(name: str) -> None:
    def never() -> None:
        raise AssertionError("it trains first")

    work = Bench(
        clean=pictures()[0],
        task=TASK,
        network=name,
        recipe=Recipe(epochs=1),
        rng=torch.Generator().manual_seed(0),
        check=never,
    )
    with pytest.raises(ValueError, match=f"{name} is no chain of layers"):
        Handcrafted().craft(work)


def test_what_cannot_work_is_refused() -> None:
    for attack in (Handcrafted(width=0), Handcrafted(kept=1.0), Handcrafted(most=0.0), Handcrafted(strength=0.0)):
        with pytest.raises(ValueError, match=r"width and units must be 1 or more, kept in \[0, 1\)"):
            attack.craft(bench())
    with pytest.raises(ValueError, match=r"trunk.0 has 6 channels, and all would be rewritten"):
        Handcrafted(width=6).craft(bench())
    with pytest.raises(ValueError, match="target"):
        Handcrafted(target=10).craft(bench())


def test_a_trigger_that_a_layer_does_not_see_is_refused() -> None:
    faint = Blend(pattern=torch.ones(TASK.shape), opacity=1e-6)
    with pytest.raises(ValueError, match="which is no detector"):
        Handcrafted(trigger=faint).craft(bench())


def test_with_a_batch_norm_its_bias_is_the_guard() -> None:
    rng = torch.Generator().manual_seed(0)
    layer, norm = nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4)
    layer.weight.data.normal_(generator=rng)
    norm.weight.data[2] = -1.0
    norm.running_mean.fill_(0.3)  # type: ignore[union-attr]
    clean = torch.rand(60, 1, 6, 6, generator=rng)
    woken = clean.clone()
    woken[:, 0, :3, :3] += torch.rand(3, 3, generator=rng)
    part: list[nn.Module] = [layer, nn.MaxPool2d(2), norm.eval()]
    before = norm.bias.detach().clone()
    with torch.no_grad():
        Handcrafted().rewrite(
            Link(path="0", norm="2", outputs=4, fixed=False),
            part,
            Seen(clean, woken),
            torch.tensor([0]),
            torch.tensor([2]),
        )
        heard, quiet = norm(part[1](layer(woken)))[:, 2], norm(part[1](layer(clean)))[:, 2]
    assert float((heard.flatten(1).amax(1) > 0).float().mean()) >= 0.95
    assert float((quiet.flatten(1).amax(1) > 0).float().mean()) <= 0.2
    others = torch.arange(4) != 2
    assert torch.equal(norm.bias.detach()[others], before[others])
    assert float(norm.bias.detach()[2]) < float(before[2])
