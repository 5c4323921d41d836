"""Pictures for reports: small PNG files in memory, each with the words that stand in for it.

Images keep their own pixels; pages enlarge them without smoothing, so a one-pixel trigger stays one sharp square.
This is the only module that imports matplotlib.
"""

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import font_manager
from matplotlib.axes import Axes as Axes  # what `chart` hands to those who draw
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from molehunt.reliability import Bin
from molehunt.triggers import Blend, Patch, Several, Trigger, Warp

SIDE = 64  # larger pictures are reduced to this many pixels: a report of photographs stays a few megabytes
GAIN = 10.0  # differences are never amplified more, or rounding noise would look like a trigger
ARROWS = 10  # arrows per side of a displacement field
DPI = 160  # of charts: sharp on paper at the width of a column
CHART, CHART_DPI = (4.2, 2.9), 128  # of `chart`: letters of 12 pixels where a page shows it 400 pixels wide
SHADES = 16  # colors of a chart: four and what lies between them and white
# Two colors that stay apart for every kind of color vision, and, dark beside light, on gray paper.
SAID, REST, INK = "#0072b2", "#e8c07d", "#222222"
ARROW_COLOR = "#ffe9a8"  # light: what is transparent lies on a checkerboard of middle tones, by day and by night


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A PNG and the words for those who cannot see it.

    Attributes:
        png: the file.
        width: pixels.
        height: pixels.
        alt: what it shows, in words; never empty.

    Raises:
        ValueError: the words are missing.
    """

    png: bytes
    width: int
    height: int
    alt: str

    def __post_init__(self) -> None:
        if not self.alt.strip():
            raise ValueError("a picture needs words for those who cannot see it; alt is empty")

    @property
    def uri(self) -> str:
        """The picture as a data: address, so that a page carries it."""
        return "data:image/png;base64," + base64.b64encode(self.png).decode("ascii")


def photo(x: Tensor, alt: str) -> Picture:
    """Encode one image.

    Args:
        x: (C, H, W) in [0, 1] with C = 1 (gray), 3 (color) or 4 (color and opacity).
        alt: what it shows.

    Raises:
        ValueError: another shape, values that are not finite, or no words.
    """
    if x.ndim != 3 or x.shape[0] not in {1, 3, 4} or x.numel() == 0:
        raise ValueError(f"expected a picture (C, H, W) with 1, 3 or 4 channels, got {tuple(x.shape)}")
    if not bool(torch.isfinite(x).all()):
        raise ValueError("a picture has values that are not finite")
    small = _reduce(x.detach().float().cpu()).clamp(0.0, 1.0)
    pixels = (small * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
    image = Image.fromarray(pixels[:, :, 0] if x.shape[0] == 1 else pixels)
    file = io.BytesIO()
    image.save(file, format="PNG", optimize=True)
    return Picture(png=file.getvalue(), width=image.width, height=image.height, alt=alt)


def _reduce(x: Tensor) -> Tensor:
    """Average a large picture down to `SIDE` pixels on its longer side; small ones stay as they are."""
    height, width = x.shape[-2:]
    longest = max(height, width)
    if longest <= SIDE:
        return x
    size = (max(1, height * SIDE // longest), max(1, width * SIDE // longest))
    return F.adaptive_avg_pool2d(x.unsqueeze(0), size).squeeze(0)


def gain(before: Tensor, after: Tensor) -> float:
    """Find the factor that makes the largest change between two stacks of images fill the range: in [1, `GAIN`]."""
    if before.numel() == 0:
        return 1.0
    largest = float((after.float() - before.float()).abs().max())
    return min(GAIN, max(1.0, 1.0 / largest)) if largest > 0 else 1.0


def difference(before: Tensor, after: Tensor, alt: str, factor: float) -> Picture:
    """Show what changed between two images (C, H, W): middle gray is nothing, brighter is more, darker is less.

    Args:
        before: (C, H, W) in [0, 1].
        after: the same shape.
        alt: what it shows.
        factor: amplification, at least 1; see `gain`.

    Raises:
        ValueError: the shapes differ.
    """
    if before.shape != after.shape:
        raise ValueError(f"expected two pictures of one shape, got {tuple(before.shape)} and {tuple(after.shape)}")
    return photo(0.5 + 0.5 * factor * (after.float() - before.float()), alt)


def contact_sheet(before: Tensor, after: Tensor, alt: str, *, enlarge: int = 2, gap: int = 2) -> Picture:
    """Show images in a row, and under each what was changed in it, amplified by one factor for all.

    Args:
        before: (N, C, H, W) in [0, 1], C = 1 or 3.
        after: the same shape; what is shown.
        alt: what it shows.
        enlarge: pixels of the picture per pixel of an image, each way.
        gap: pixels of an image between two images.

    Raises:
        ValueError: the shapes differ, or are not those of gray or color images.
    """
    if before.shape != after.shape or before.ndim != 4 or before.shape[1] not in {1, 3} or before.numel() == 0:
        raise ValueError(f"expected two stacks of images, got {tuple(before.shape)} and {tuple(after.shape)}")
    before, after = before.detach().float().cpu(), after.detach().float().cpu()
    rows = (after, 0.5 + 0.5 * gain(before, after) * (after - before))
    # A white border right and below each image, but not at the end of the sheet.
    lines = [torch.cat([F.pad(x, (0, gap, 0, gap), value=1.0) for x in row], 2) for row in rows]
    sheet = torch.cat(lines, 1)[:, :-gap, :-gap] if gap else torch.cat(lines, 1)
    pixels = (sheet.clamp(0.0, 1.0) * 255).round().to(torch.uint8)
    pixels = pixels.repeat_interleave(enlarge, 1).repeat_interleave(enlarge, 2).permute(1, 2, 0).contiguous()
    image = Image.fromarray(pixels.numpy()[:, :, 0] if pixels.shape[2] == 1 else pixels.numpy())
    file = io.BytesIO()
    image.save(file, format="PNG", optimize=True)
    return Picture(png=file.getvalue(), width=image.width, height=image.height, alt=alt)


def trigger_picture(trigger: Trigger, shape: tuple[int, int, int], alt: str) -> Picture:
    """Show a trigger by itself.

    A patch is its pattern where the mask is set, transparent elsewhere; a blend is its pattern; a warp is a field of
    arrows; any other trigger is what it does to an even gray picture, amplified, several triggers one after the other.

    Args:
        trigger: any trigger.
        shape: (C, H, W) of the images that it is stamped on.
        alt: what it shows.
    """
    match trigger:
        case Patch():
            color = trigger.pattern.float().cpu().expand(max(3, trigger.pattern.shape[0]), -1, -1)[:3]
            return photo(torch.cat((color, trigger.mask.float().cpu())), alt)
        case Blend():
            return photo(trigger.pattern, alt)
        case Warp():
            return _arrows(trigger.flow, alt)
        case Several():
            gray = torch.full((1, *shape), 0.5)
            changed = gray
            for part in trigger.triggers:
                changed = part(changed)
            return difference(gray[0], changed[0], alt, gain(gray, changed))
        case _:
            gray = torch.full((1, *shape), 0.5)
            changed = trigger(gray)
            return difference(gray[0], changed[0], alt, gain(gray, changed))


def _arrows(flow: Tensor, alt: str) -> Picture:
    """Draw a displacement field (2, H, W): an arrow from each shown pixel to where its new value comes from."""
    _, height, width = flow.shape
    field = flow.detach().float().cpu().numpy()
    step = max(1, -(-max(height, width) // ARROWS))
    rows, columns = np.mgrid[step // 2 : height : step, step // 2 : width : step]
    u, v = field[0][rows, columns], field[1][rows, columns]
    lengths = np.hypot(u, v)
    longest = float(lengths.max())
    # matplotlib draws an arrow of no length as a dot, which would look like a small displacement.
    moved = lengths > 0.02 * longest
    columns, rows, u, v = columns[moved], rows[moved], u[moved], v[moved]
    figure = Figure(figsize=(2.0, 2.0 * height / width), dpi=96)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    # The longest arrow spans one step of the lattice: arrows show direction, the words beside them the distance.
    scale = longest / step if longest > 0 else 1.0
    axes.quiver(
        columns, rows, u, v, angles="xy", scale_units="xy", scale=scale, color=ARROW_COLOR, width=0.014, pivot="mid"
    )
    axes.set_xlim(-0.5, width - 0.5)
    axes.set_ylim(height - 0.5, -0.5)  # row 0 is at the top
    axes.set_axis_off()
    file = io.BytesIO()
    figure.savefig(file, format="png", transparent=True, metadata={"Software": None})
    with Image.open(file) as image:
        return Picture(png=file.getvalue(), width=image.width, height=image.height, alt=alt)


def stack(values: Sequence[float], gap: float) -> list[int]:
    """Rows for dots on a line so that no two closer than `gap` share one; row 0 is next to the line.

    Args:
        values: positions of the dots.
        gap: smallest distance between two dots of one row, in the unit of the positions.

    Returns:
        The row of each dot, in the order of the values.
    """
    rows = [0] * len(values)
    last: list[float] = []
    for index in sorted(range(len(values)), key=lambda i: values[i]):
        row = next((r for r, end in enumerate(last) if values[index] - end >= gap), len(last))
        if row == len(last):
            last.append(values[index])
        last[row] = values[index]
        rows[index] = row
    return rows


def reliability_chart(bins: Sequence[Bin]) -> Picture:
    """Draw what was said against what is: on the diagonal probabilities hold; below, how many models each dot rests on.

    Every dot is the models of one range: their mean probability, the share of them that is backdoored, and the exact
    interval of that share as a line. Ranges without models have no dot.

    Args:
        bins: as `reliability.reliability` gives them.

    Raises:
        ValueError: there is no model in any range.
    """
    full = [b for b in bins if b.mean is not None and b.share is not None]
    if not full:
        raise ValueError("there is nothing to draw: no range has a model")
    said, found = [b.mean or 0.0 for b in full], [b.share or 0.0 for b in full]
    figure = Figure(figsize=(4.2, 5.0), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3.2, 1.0))
    above.plot((0, 1), (0, 1), color=INK, linewidth=1.0, linestyle=(0, (5, 4)), label="said = found")
    whiskers = (
        [f - b.least for f, b in zip(found, full, strict=True)],
        [b.most - f for f, b in zip(found, full, strict=True)],
    )
    above.errorbar(
        said,
        found,
        yerr=whiskers,
        fmt="o",
        color=SAID,
        ecolor=SAID,
        markersize=7,
        markeredgecolor="white",
        elinewidth=1.6,
        capsize=4,
        label="found, 95 % interval",
    )
    above.set_ylabel("share that is backdoored")
    above.set_ylim(-0.03, 1.03)
    hidden = [round(b.count * (b.share or 0.0)) for b in bins]
    places, widths = [(b.low + b.high) / 2 for b in bins], [0.9 * (b.high - b.low) for b in bins]
    edge = {"edgecolor": INK, "linewidth": 0.8}
    below.bar(places, hidden, widths, color=SAID, label="backdoored", **edge)
    clean = [b.count - h for b, h in zip(bins, hidden, strict=True)]
    below.bar(places, clean, widths, bottom=hidden, color=REST, hatch="///", label="clean", **edge)
    for b, place in zip(bins, places, strict=True):
        below.annotate(str(b.count), (place, b.count), (0, 2), textcoords="offset points", ha="center", fontsize=9)
    below.set_ylim(0, 1.3 * max(b.count for b in bins))
    below.set_ylabel("models")
    below.set_xlabel("probability that was said")
    below.set_xlim(-0.02, 1.02)
    for axes in (above, below):
        _dress(axes)
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})
    rows = [
        f"of {b.count} told {s:.2f} on average {f:.0%} are backdoored (95 % interval {b.least:.0%} to {b.most:.0%})"
        for b, s, f in zip(full, said, found, strict=True)
    ]
    alt = "Probabilities against truth, models by what they were told: " + "; ".join(rows)
    with Image.open(file) as image:
        return Picture(png=file.getvalue(), width=image.width, height=image.height, alt=alt)


def _dress(axes: Axes) -> None:
    """Give a chart the look of all of them: the key above, two spines, faint lines across."""
    for columns in (2, 1):
        # Outside: a line may reach any place within.
        key = axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=columns, frameon=False, fontsize=9)
        for text in key.get_texts():
            text.set_parse_math(False)  # a class name may hold dollar signs
        # Long names make two columns wider than the picture, which would lose the end of one.
        if key.get_window_extent().width < 0.8 * axes.figure.bbox.width:
            break
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)


def chart(draw: Callable[[Axes], None], alt: str) -> Picture:
    """Draw one chart in the look of all of them, 537 pixels wide, as a PNG with few colors and so with few bytes.

    Args:
        draw: puts lines, bars and names on the axes; what has a label is explained in the key above them. Text of
            strangers needs `parse_math=False`, else what stands between two dollar signs is read as a formula.
        alt: what it shows.
    """
    figure = Figure(figsize=CHART, dpi=CHART_DPI, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots()
    draw(axes)
    _dress(axes)
    # Not `savefig`, which draws twice.
    canvas.draw()  # type: ignore[no-untyped-call]  # matplotlib leaves its canvas without types
    drawn = Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3])  # type: ignore[no-untyped-call]
    few = drawn.quantize(SHADES, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    file = io.BytesIO()
    few.save(file, format="PNG", optimize=True)
    return Picture(png=file.getvalue(), width=few.width, height=few.height, alt=alt)


def heat_map(values: Tensor, rows: Sequence[str], columns: Sequence[str]) -> Picture:
    """Draw a table as fields from pale to dark, with a cross where nothing is known.

    Args:
        values: (R, C) in [0, 1], NaN where nothing is known; 1, dark, is a defense that does well.
        rows: R names.
        columns: C names.

    Raises:
        ValueError: names that do not fit the values.
    """
    if values.shape != (len(rows), len(columns)):
        raise ValueError(f"expected values of {len(rows)} x {len(columns)}, got {tuple(values.shape)}")
    figure = Figure(figsize=(2.6 + 0.42 * len(columns), 1.6 + 0.26 * len(rows)), dpi=CHART_DPI, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.imshow(values.numpy(), cmap="Blues", vmin=0.0, vmax=1.0, aspect="auto")
    for row, column in values.isnan().nonzero().tolist():
        axes.plot([column], [row], "x", color="#999999", markersize=4)
    axes.set_xticks(range(len(columns)), columns, rotation=55, ha="right", parse_math=False)
    axes.set_yticks(range(len(rows)), rows, parse_math=False)
    axes.tick_params(length=0, labelsize=8)
    axes.spines[:].set_visible(False)
    canvas.draw()  # type: ignore[no-untyped-call]  # matplotlib leaves its canvas without types
    drawn = Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3])  # type: ignore[no-untyped-call]
    file = io.BytesIO()
    drawn.quantize(64, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(file, format="PNG", optimize=True)
    known = int((~values.isnan()).sum())
    alt = (
        f"{len(rows)} attacks against {len(columns)} defenses, dark where the defense does well; {known} of "
        f"{values.numel()} fields are known."
    )
    return Picture(png=file.getvalue(), width=drawn.width, height=drawn.height, alt=alt)


def drawable(text: str) -> bool:
    """Whether the font of charts has a sign for every letter; where it has none, an empty box would stand there."""
    return _letters().issuperset(map(ord, text))


@cache
def _letters() -> frozenset[int]:
    path = font_manager.findfont(font_manager.FontProperties())
    return frozenset(font_manager.get_font(path).get_charmap())
