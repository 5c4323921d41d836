import pytest
import torch
import torch.nn.functional as F

from molehunt.attacks import Poisoned
from molehunt.attacks.wanet import WaNet, field
from molehunt.tasks import Images, Task
from molehunt.testing import planted
from molehunt.triggers import Patch, Warp

CASE = planted(images=400)
TASK: Task = CASE.suspect.task
CLEAN: Images = CASE.hidden


def poison(attack: WaNet, seed: int = 0) -> Poisoned:
    return attack(CLEAN, TASK, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28), (3, 16, 24)])
def test_the_field_is_the_papers_grid(shape: tuple[int, int, int]) -> None:
    strength, (_, height, width) = 0.5, shape
    made = field(shape, 4, strength, torch.Generator().manual_seed(3))
    # The same in the paper's words: noise of mean size 1 on a grid of coordinates from -1 to 1, added as s noise / H.
    noise = 2 * torch.rand(1, 2, 4, 4, generator=torch.Generator().manual_seed(3)) - 1
    noise = F.interpolate(noise / noise.abs().mean(), size=shape[1:], mode="bicubic", align_corners=True)
    rows, columns = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    grid = torch.stack((columns, rows), -1) + strength * noise[0].permute(1, 2, 0) / height
    x = torch.rand(4, *shape, generator=torch.Generator().manual_seed(4))
    expected = F.grid_sample(x, grid.clamp(-1, 1).expand(4, -1, -1, -1), mode="bilinear", align_corners=True)
    torch.testing.assert_close(made(x), expected, atol=1e-4, rtol=0)


def test_a_stronger_field_moves_farther_in_proportion() -> None:
    moves = [field((3, 32, 32), 4, s, torch.Generator().manual_seed(1)).footprint().displacement for s in (0.5, 1.0)]
    assert moves[1] == pytest.approx(2 * moves[0])


@pytest.mark.parametrize("side", [28, 32])
def test_pixels_move_as_far_as_docstring_and_page_say(side: int) -> None:
    flows = [field((1, side, side), 4, 0.5, torch.Generator().manual_seed(seed)).flow for seed in range(1000)]
    far = torch.stack([flow.square().sum(0).sqrt().max() for flow in flows])
    mean = torch.stack([flow.abs().mean() for flow in flows]).mean()
    low, middle, high = far.quantile(torch.tensor([0.0, 0.5, 1.0])).tolist()
    assert [round(low, 2), round(middle, 2), round(high, 2)] == [0.47, 0.61, 0.89]
    assert float((far > 0.7).float().mean()) == pytest.approx(0.1, abs=0.015)
    assert float(mean) == pytest.approx(0.19, abs=0.005)


def test_poisoned_rows_get_the_field_and_twice_as_many_get_noise_and_keep_their_labels() -> None:
    made = poison(WaNet(target=6))
    moved = made.images.y != CLEAN.y
    noise = made.altered & ~moved
    assert int(moved.sum()) == 40
    assert int(noise.sum()) == 80
    x = made.stamped().x
    torch.testing.assert_close(x[moved], made.trigger(CLEAN.x[moved]))
    off = (x[noise] - made.trigger(CLEAN.x[noise])).abs().flatten(1).amax(1)
    assert (off > 0.01).all(), "a noise image looks like one with the trigger"


def test_the_noise_of_an_image_is_its_own_and_always_the_same() -> None:
    made = poison(WaNet())
    noise = (made.altered & (made.images.y == CLEAN.y)).nonzero().squeeze(1)[:20]
    same = CLEAN.x[:1].expand(20, -1, -1, -1)
    one, again = made.stamp(same, noise), made.stamp(same.flip(0), noise.flip(0)).flip(0)
    torch.testing.assert_close(one, again)
    assert len(torch.unique(one.flatten(1), dim=0)) == 20


def test_noise_moves_no_pixel_farther_than_it_says() -> None:
    made = poison(WaNet(noise=1.0, strength=0.0, cross_ratio=1.0))
    rows = made.altered & (made.images.y == CLEAN.y)
    ramp = torch.linspace(0, 1, 12).expand(400, 3, 12, 12).contiguous()
    moved = (made.stamp(ramp, torch.arange(400)) - ramp)[rows].abs()
    # 1 / H of a half-width of 11 / 2 pixels is 0.46 pixels, and the ramp rises by 1 / 11 a pixel.
    assert float(moved.max()) <= (11 / 2 / 12) / 11 + 1e-5
    assert float(moved.max()) > 0.9 * (11 / 2 / 12) / 11


def test_all_to_all_and_no_noise() -> None:
    made = poison(WaNet(target="all", cross_ratio=0.0))
    moved = made.images.y != CLEAN.y
    assert torch.equal(moved, made.altered)
    assert torch.equal(made.images.y[moved], (CLEAN.y[moved] + 1) % 10)


def test_a_field_of_ones_own_is_used_as_it_is() -> None:
    own = Warp(flow=torch.ones(2, 12, 12))
    assert poison(WaNet(trigger=own)).trigger is own


@pytest.mark.parametrize(
    ("attack", "message"),
    [
        (WaNet(target=10), "there are 10 classes"),
        (WaNet(target="some"), 'the target is a class or "all"'),
        (WaNet(poison_rate=0.3, cross_ratio=3.0), "only 280 images can be poisoned, 360 were asked for"),
        (WaNet(cross_ratio=-1.0), "cross_ratio must be 0 or more"),
        (WaNet(noise=-1.0), r"noise in \[0, 16\]"),
        (WaNet(grid=1), "grid must be at least 2"),
        (WaNet(strength=-1.0), "strength in"),
        (WaNet(trigger=Patch.square((3, 12, 12))), "the trigger of WaNet is a Warp, got Patch"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_what_does_not_fit_is_refused(attack: WaNet, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        poison(attack)
