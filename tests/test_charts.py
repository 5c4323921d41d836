"""Charts of what defenses saw: the numbers are those of the details, and nothing in a name or a detail breaks one."""

import io
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from molehunt.charts import CHARTS, chart_of
from molehunt.defenses import DEFENSES
from molehunt.figures import CHART, CHART_DPI, INK, REST, SAID, Picture, drawable
from molehunt.findings import Finding
from molehunt.triggers import Patch

torch.set_num_threads(1)

DIGITS = tuple("0123456789")
HOSTILE = (
    r"$\frac{1}{0}$ $\undefined{",
    "W" * 5000,
    "\u6f22\u5b57",  # the font has none of these signs
    "\u202e]bad[",
    "a $ b",
    "</text><script>",
    "^_{}$$",
    "",
    "\x00\n",
    "\U0001f42d",
)


def curve() -> Finding:
    accuracies = torch.tensor([0.98] * 9 + [0.95] * 3 + [0.5, 0.3, 0.1], dtype=torch.float64)
    details = {"curve": accuracies, "pruned": 11}
    return Finding(defense="fine_pruning", details=details, record={"configuration": {"tolerance": 0.04}})


def outliers() -> Finding:
    """Ninety samples from 0 to 8.9, ten from 50 to 59, of which six are removed."""
    scores = torch.cat((50 + torch.arange(10.0), torch.arange(90) / 10)).sort(descending=True).values
    details = {"outliers": {"class": 3, "scores": scores}, "removed_per_class": [0, 0, 0, 6] + [0] * 6}
    return Finding(defense="spectral_signatures", details=details)


def entropies() -> Finding:
    rows = [
        {"target": 2, "score": 0.1, "entropies": torch.full((30,), 0.9)},
        {"target": 7, "score": 0.74, "entropies": torch.cat((torch.full((60,), 0.05), torch.full((20,), 1.0)))},
    ]
    calibration = {"boundary": 0.25}
    details = {"clean_entropies": torch.linspace(0.25, 1.75, 101), "calibration": calibration, "candidates": rows}
    return Finding(defense="strip", details=details)


def stimulated() -> Finding:
    logits = torch.zeros(3, 10)
    logits[:, 7] = torch.tensor([-1.25, 8.0, 21.5])
    logits[2, 4] = 3.25
    best = {"target": 7, "layer": "trunk.4", "channel": 12}
    return Finding(defense="abs", details={"best": best, "stimulation": {"levels": [0.0, 1.6, 3.2], "logits": logits}})


def masks() -> Finding:
    norms = [40.0, 42.0, 44.0, 46.0, 41.0, 43.0, 45.0, 5.5, 47.0, 39.0]
    details = {"norms": norms, "searched": list(range(10))}
    return Finding(defense="neural_cleanse", details=details, trigger=Patch.square((1, 28, 28)), target=7)


def copies() -> Finding:
    details = {"accuracies": torch.tensor([0.5, 0.25, 0.75, 0.9], dtype=torch.float64), "accuracy": 0.985}
    return Finding(defense="pruning_detection", details=details, record={"configuration": {"sampling": "targeted"}})


def neurons() -> Finding:
    details = {
        "accuracies": torch.tensor([0.98, 0.97, 0.96, 0.9, 0.1], dtype=torch.float64),
        "successes": torch.tensor([1.0, 0.625, 0.04, 0.02, 0.0], dtype=torch.float64),
        "pruned": 2,
    }
    return Finding(defense="neuron_pruning", details=details)


def pasted() -> Finding:
    rows = [
        {"defense": "abs", "target": 2, "fooled": 0.5, "confidence": 0.75, "score": 0.5},
        {"defense": "neural_cleanse", "target": 7, "fooled": 0.975, "confidence": 0.625, "score": 0.625},
        {"defense": "abs", "target": 3, "score": 0.0},
    ]
    return Finding(defense="sentinet", details={"candidates": rows})


def metas() -> Finding:
    scores = torch.tensor([-4.0, -3.5, -4.5, -5.0, -4.0, -3.0, -2.5, 6.25, -4.0, -3.75])
    return Finding(defense="mntd", class_scores=scores, details={"logits": [6.0, 6.5, 6.25], "queries": 30})


def ways() -> Finding:
    excess = torch.zeros(10, 10, dtype=torch.float64)
    excess[2, 7], excess[4, 9], excess[1, 7] = 1.625, 0.5, 0.25
    patch = Patch.square((1, 28, 28))
    return Finding(defense="pair_inversion", details={"excess": excess}, trigger=patch, target=7, sources=(2,))


def certified() -> Finding:
    table = [
        {"radius": 0.0, "rate": 0.98, "accuracy": 0.96},
        {"radius": 0.05, "rate": 0.75, "accuracy": 0.74},
        {"radius": 0.1, "rate": 0.0, "accuracy": 0.0},
        {"radius": 2.0, "rate": 0.0, "accuracy": 0.0},
    ]
    return Finding(defense="rab", details={"certificate": {"table": table, "words": "said"}})


@cache
def made(name: str) -> Picture:
    return drawn(MADE[name])


MADE = {
    f.defense: f
    for f in (
        curve(),
        outliers(),
        entropies(),
        stimulated(),
        masks(),
        copies(),
        neurons(),
        pasted(),
        metas(),
        ways(),
        certified(),
    )
}


def drawn(finding: Finding, classes: tuple[str, ...] = DIGITS) -> Picture:
    picture = chart_of(finding, classes)
    assert picture is not None
    return picture


def seen(picture: Picture, color: str) -> NDArray[np.bool_]:
    """Where the picture has a color, or nearly."""
    pixels = np.asarray(Image.open(io.BytesIO(picture.png)).convert("RGB")).astype(int)
    wanted = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)])
    found: NDArray[np.bool_] = np.abs(pixels - wanted).sum(-1) < 40
    return found


def dashes(picture: Picture) -> NDArray[np.int64]:
    """Columns that are gray and dark along much of the picture: first the axis, last the dashed line."""
    pixels = np.asarray(Image.open(io.BytesIO(picture.png)).convert("RGB")).astype(int)
    dark = (pixels.max(-1) < 140) & (np.ptp(pixels, -1) < 30)
    return np.nonzero(dark.mean(0) > 0.3)[0]


def test_every_chart_is_of_a_defense_and_every_one_is_tested_here() -> None:
    assert CHARTS.keys() == MADE.keys() <= DEFENSES.keys()
    assert all(chart.caption.endswith(".") for chart in CHARTS.values())


@pytest.mark.parametrize("name", MADE)
def test_every_picture_has_one_size_and_few_bytes_and_is_the_same_again(name: str) -> None:
    picture = made(name)
    assert (picture.width, picture.height) == tuple(int(side * CHART_DPI) for side in CHART)
    assert len(picture.png) < 12_000
    assert drawn(MADE[name]).png == picture.png
    assert seen(picture, SAID).sum() > 300


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("fine_pruning", ("98.0 % with none", "95.0 % at the stop after 11", "10.0 % with all 14", "down to 94.0 %")),
        ("spectral_signatures", ("100 training samples of “3”", "median 4.95", "largest 59", "the 6 above 53.5 are")),
        ("strip", ("101 clean", "median 1.00", "80 under the best candidate trigger for “7”", "75.0 % of the others")),
        ("abs", ("channel 12 of trunk.4", "“7” from −1.25 at 0 to 21.5 at 3.2", "“4” with 3.25")),
        ("neural_cleanse", ("each of 10 classes: median 42.5", "smallest 5.5 for “7”", "reported is “7” with 5.5")),
        (
            "neuron_pruning",
            (
                "accuracy 98.0 %",
                "100.0 % with none",
                "96.0 % and 4.0 % at the stop after 2",
                "10.0 % and 0.0 % with all 4",
            ),
        ),
        ("sentinet", ("2 recovered triggers", "the best, of neural_cleanse for “7”, 97.5 % and 62.5 %")),
        ("mntd", ("3 meta-classifiers", "30 pictures", "10 classes", "6.25 for “7”", "is 6.25")),
        ("pair_inversion", ("largest 1.62 from “2” to “7”", "next 0.5", "the first is reported")),
        ("rab", ("98.0 % at 0", "96.0 % of all are right", "none from 0.1 on")),
        ("pruning_detection", ("4 pruned copies: 25.0 % (copy 2) to 90.0 %", "mean 60.0 %", "unpruned 98.5 %")),
    ],
)
def test_the_words_hold_the_numbers(name: str, parts: tuple[str, ...]) -> None:
    for part in parts:
        assert part in made(name).alt


def test_a_stream_is_shown_beside_regions_of_clean_images() -> None:
    details = {
        "parabola": {"a": 0.0, "b": 0.0, "c": 0.5},
        "clean_confidence": torch.linspace(0.25, 0.75, 11),
        "clean_fooled": torch.linspace(0.0, 0.5, 11),
        "stream_confidence": torch.full((4,), 0.875),
        "stream_fooled": torch.tensor([0.0, 1.0, 1.0, 1.0]),
    }
    picture = drawn(Finding(defense="sentinet", details=details))
    assert "regions of 4 inputs of a stream, median Fooled 100.0 % and AvgConf 87.5 %" in picture.alt
    assert "11 regions of clean images, 25.0 % and 50.0 %" in picture.alt
    # The parabola is flat at one half, over the clean points alone, and the stream's lie right of it.
    pixels = seen(picture, SAID)[picture.height // 4 :]
    assert np.nonzero(pixels.any(0))[0].min() > 0.7 * picture.width
    for gone in ("clean_fooled", "stream_confidence"):
        assert chart_of(Finding(defense="sentinet", details={**details, gone: [1.0]}), DIGITS) is None


def test_what_a_vote_of_parts_certifies_is_counted_in_samples() -> None:
    table = [{"flips": k, "rate": 1.0 - k / 4, "accuracy": 0.5} for k in range(4)]
    alt = drawn(Finding(defense="rab", details={"certificate": {"table": table, "words": ""}})).alt
    assert "by changed samples: 100.0 % at 0" in alt
    assert "25.0 % at 3" in alt


def test_meta_classifiers_with_one_logit_for_all_classes_have_no_chart() -> None:
    assert chart_of(replace(metas(), class_scores=None), DIGITS) is None


def test_of_many_classes_the_largest_logits_are_shown() -> None:
    many = replace(metas(), class_scores=torch.arange(100.0))
    alt = drawn(many, tuple(f"class number {k}" for k in range(100))).alt
    assert "99 for “class number 99”" in alt
    assert alt.endswith("the 43 largest are shown")


def test_the_stop_and_the_tolerance_are_marked_where_they_are() -> None:
    picture = made("fine_pruning")
    left, stop = dashes(picture)[[0, -1]]
    right = np.nonzero(seen(picture, SAID).any(0))[0][-1]
    assert (stop - left) / (right - left) == pytest.approx(11 / 14, abs=0.02)
    without = drawn(replace(curve(), record={}))
    assert "tolerance" not in without.alt
    assert without.png != picture.png


def test_what_is_removed_lies_beyond_the_threshold() -> None:
    picture = made("spectral_signatures")
    left, threshold = dashes(picture)[[0, -1]]
    bars = slice(picture.height // 4, None)  # below the key
    assert np.nonzero(seen(picture, SAID)[bars].any(0))[0][0] >= threshold - 2
    kept = np.nonzero(seen(picture, REST)[bars].any(0))[0]
    assert kept[-1] <= threshold + 2
    right = np.nonzero(seen(picture, SAID)[bars].any(0))[0][-1]
    assert (threshold - left) / (right - left) == pytest.approx(53.5 / 59, abs=0.02)


def test_where_nothing_is_removed_there_is_no_threshold() -> None:
    kept = replace(outliers(), details={**outliers().details, "removed_per_class": [0] * 10})
    assert "none is removed" in drawn(kept).alt
    flat = {"class": 3, "scores": torch.zeros(8)}
    assert "largest 0" in drawn(replace(outliers(), details={**outliers().details, "outliers": flat})).alt


def test_the_quantum_score_is_called_spectre() -> None:
    quantum = replace(outliers(), details={**outliers().details, "criteria": torch.zeros(10, 3)})
    assert drawn(quantum).alt.startswith("SPECTRE")


def test_without_a_candidate_strip_shows_the_stream_and_without_both_nothing() -> None:
    details = {key: value for key, value in entropies().details.items() if key != "candidates"}
    stream = Finding(defense="strip", details=details, input_scores=-torch.linspace(0.0, 1.0, 50))
    assert "50 of the stream" in drawn(stream).alt
    assert chart_of(Finding(defense="strip", details=details), DIGITS) is None
    assert chart_of(Finding(defense="strip", details={**details, "candidates": []}), DIGITS) is None


def test_the_boundary_parts_most_of_the_stamped_images_from_the_clean_ones() -> None:
    picture = made("strip")
    boundary = dashes(picture)[-1]
    bars = slice(picture.height // 3, None)
    assert np.nonzero(seen(picture, REST)[bars].any(0))[0][0] >= boundary - 2
    blue = seen(picture, SAID)[bars]
    assert blue[:, :boundary].sum() > 2 * blue[:, boundary:].sum()


def test_the_reported_class_is_the_low_bar_and_no_class_need_be_reported() -> None:
    lower = made("neural_cleanse").height // 3
    blue, other = (np.nonzero(seen(made("neural_cleanse"), c)[lower:])[1] for c in (SAID, REST))
    assert other.min() < blue.min()
    assert blue.max() < other.max()
    assert len(blue) < len(other) / 20
    clean = replace(masks(), trigger=None, target=None)
    picture = drawn(clean)
    assert "no class is reported" in picture.alt
    assert not seen(picture, SAID)[lower:].any()


def test_classes_without_a_mask_that_works_have_no_bar() -> None:
    norms, searched = [5.0, 60.0, 60.0, 40.0], [0, 1, 2, 3]
    some = Finding(
        defense="neural_cleanse",
        details={"norms": norms, "searched": searched, "censored": [False, True, True, False]},
    )
    alt = drawn(some).alt
    assert "each of 2 classes, 2 more have no mask that works: median 22.5, smallest 5 for “0”" in alt
    none = replace(some, details={**some.details, "censored": [True] * 4})
    assert chart_of(none, DIGITS) is None


def test_huge_numbers_have_three_digits() -> None:
    many = Finding(defense="neural_cleanse", details={"norms": [1e30, 2.5e30], "searched": [0, 1]})
    assert "smallest 1e+30 for “0”" in drawn(many).alt


def test_of_many_classes_the_smallest_masks_are_shown() -> None:
    norms = [100.0 + k for k in range(200)]
    norms[150] = 3.0
    many = Finding(defense="neural_cleanse", details={"norms": norms, "searched": list(range(200))})
    picture = drawn(many, tuple(f"class number {k}" for k in range(200)))
    assert "smallest 3 for “class number 150”" in picture.alt
    assert picture.alt.endswith("the 43 smallest are shown")
    logits = torch.zeros(3, 400)
    logits[:, 399] = torch.tensor([0.0, 1.0, 2.0])
    best = {"target": 399, "layer": "a.very.long.path.to.a.layer", "channel": 1023}
    wide = Finding(defense="abs", details={"best": best, "stimulation": {"levels": [0, 1, 2], "logits": logits}})
    assert "class 399 from 0 at 0 to 2 at 2" in drawn(wide).alt


@pytest.mark.parametrize(
    ("name", "first"),
    [("neural_cleanse", k) for k in range(10)] + [(n, k) for n in ("abs", "strip", "sentinet", "mntd") for k in (0, 3)],
)
def test_no_name_of_a_class_breaks_a_chart(name: str, first: int) -> None:
    # Warnings are errors here, so a sign that the font lacks would be seen.
    picture = drawn(MADE[name], HOSTILE[first:] + HOSTILE[:first])
    assert (picture.width, picture.height) == tuple(int(side * CHART_DPI) for side in CHART)
    assert len(picture.alt) < 400
    assert not set("\u202e\x00\n") & set(picture.alt)


def test_dollar_signs_are_drawn_as_they_are() -> None:
    """Between two of them matplotlib would read a formula, in italics and without the dollars."""
    plain, dollars = (drawn(masks(), (*DIGITS[:7], name, "8", "9")) for name in ("xyz", "$y$"))
    italics = drawn(masks(), (*DIGITS[:7], "y", "8", "9"))
    assert len({plain.png, dollars.png, italics.png}) == 3
    assert "“$y$”" in dollars.alt
    widths = [np.nonzero(seen(p, INK)[:60].any(0))[0][-1] for p in (dollars, italics)]
    assert widths[0] > widths[1] + 8, "the key of three signs is wider than that of one"


def test_the_font_is_asked_for_every_sign() -> None:
    assert drawable("“7” … ü −")
    assert not drawable("7 \u6f22")


def smaller(details: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Details without one entry each, and with entries that are of another kind."""
    odd: tuple[Any, ...] = (None, "text", [], {}, [None], torch.zeros(0), torch.zeros(2, 2, 2), [[1.0]])
    kept = [{k: v for k, v in details.items() if k != key} for key in details]
    return kept + [{**details, key: value} for key in details for value in odd]


@pytest.mark.parametrize("name", MADE)
def test_where_a_detail_is_missing_or_odd_there_is_no_chart_and_no_error(name: str) -> None:
    for details in smaller(MADE[name].details):
        picture = chart_of(replace(MADE[name], details=details, input_scores=None), DIGITS)
        assert picture is None
    assert chart_of(Finding(defense=name), DIGITS) is None


def test_a_plug_in_has_no_chart_whatever_its_details_are() -> None:
    odd = {"curve": "x", "norms": {"a": 1}, "outliers": 3, "candidates": [1, None]}
    assert chart_of(Finding(defense="my_own", details=odd), DIGITS) is None
    assert chart_of(replace(curve(), defense="my_own"), DIGITS) is None


def test_success_falls_below_accuracy_where_neurons_of_the_trigger_are_cut() -> None:
    picture = made("neuron_pruning")
    # Where three of four neurons are cut success is .02, at the foot of the picture, and accuracy .9.
    rows = np.nonzero(seen(picture, SAID)[:, int(0.72 * picture.width) : int(0.78 * picture.width)])[0]
    assert rows.min() > 0.75 * picture.height
