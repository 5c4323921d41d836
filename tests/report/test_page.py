"""The page: one file, no script, no network, every picture with words, and strangers' text never becomes markup."""

import base64
import hashlib
import io
import itertools
import re
from dataclasses import replace
from html.parser import HTMLParser

import made_up
import pytest
import torch
from PIL import Image

from molehunt.charts import CHARTS, chart_of
from molehunt.findings import Finding
from molehunt.report import Change, ScanReport, game_html, scan_html

VOID = {"meta", "img", "br", "link", "input", "hr"}
COLORED = (3, 32, 32)
MANY = tuple(f"class {k}" for k in range(43))


class Page(HTMLParser):
    """Reads a page strictly: every element must be closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"an attribute twice in <{tag}>: {names}"
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.text.append(data)

    def all(self, *tags: str) -> list[dict[str, str]]:
        return [attributes for tag, attributes in self.elements if tag in tags]

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    return {
        "game": game_html(made_up.game()),
        "hostile": game_html(made_up.game(teams=made_up.HOSTILE, shape=COLORED, classes=MANY)),
        "scan": scan_html(made_up.scan()),
        "silent scan": scan_html(made_up.scan(0.3, recovered=False, silent=True, name=made_up.HOSTILE[0])),
    }


NAMES = ("game", "hostile", "scan", "silent scan")


@pytest.mark.parametrize("name", NAMES)
def test_it_parses_and_has_the_bones_of_a_page(pages: dict[str, str], name: str) -> None:
    text = pages[name]
    assert text.startswith("<!doctype html>")
    page = Page(text)
    assert page.all("html") == [{"lang": "en"}]
    for tag in ("head", "main", "h1", "header", "footer"):
        assert len(page.all(tag)) == 1, tag
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.all("meta")
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert all(b <= a + 1 for a, b in itertools.pairwise(levels)), f"a heading level was left out: {levels}"


@pytest.mark.parametrize("name", NAMES)
def test_it_runs_nothing_and_asks_the_network_for_nothing(pages: dict[str, str], name: str) -> None:
    page = Page(pages[name])
    allowed = {"img", "meta", "a", "style"}
    for tag, attributes in page.elements:
        assert tag not in {"script", "link", "iframe", "object", "embed", "base", "form", "input", "foreignobject"}
        assert not [a for a in attributes if a.startswith("on") or a == "style"], (tag, attributes)
        for name_, value in attributes.items():
            if name_ in {"src", "href", "srcset", "xlink:href", "action", "poster", "data"}:
                assert tag in allowed
                assert value.startswith(("data:image/png;base64,", "#")), value[:60]
    style = re.search(r"<style>(.*?)</style>", pages[name], re.DOTALL)
    assert style is not None
    assert "url(" not in style[1]
    assert "@import" not in style[1]


@pytest.mark.parametrize("name", NAMES)
def test_the_policy_allows_this_one_style_and_nothing_else(pages: dict[str, str], name: str) -> None:
    style = re.search(r"<style>(.*?)</style>", pages[name], re.DOTALL)
    assert style is not None
    digest = base64.b64encode(hashlib.sha256(style[1].encode()).digest()).decode()
    policy = Page(pages[name]).all("meta")[1]
    assert policy["http-equiv"] == "Content-Security-Policy"
    rules = set(policy["content"].split("; "))
    assert rules == {
        "default-src 'none'",
        "img-src data:",
        f"style-src 'sha256-{digest}'",
        "base-uri 'none'",
        "form-action 'none'",
    }


@pytest.mark.parametrize("name", NAMES)
def test_every_picture_is_carried_along_and_described(pages: dict[str, str], name: str) -> None:
    pictures = Page(pages[name]).all("img")
    assert pictures or name == "silent scan"
    for picture in pictures:
        assert picture["alt"].strip()
        data = base64.b64decode(picture["src"].removeprefix("data:image/png;base64,"), validate=True)
        with Image.open(io.BytesIO(data)) as image:
            assert (str(image.width), str(image.height)) == (picture["width"], picture["height"])


@pytest.mark.parametrize("name", NAMES)
def test_tables_have_captions_charts_have_names_and_what_scrolls_has_a_tab_stop(
    pages: dict[str, str], name: str
) -> None:
    page = Page(pages[name])
    assert len(page.all("caption")) == len(page.all("table"))
    for drawing in page.all("svg"):
        known = drawing.get("aria-hidden") == "true" or "aria-label" in drawing or drawing.get("overflow") == "visible"
        assert known, drawing
    for region in page.all("div", "pre"):
        if "scroll" in region.get("class", "").split():
            assert region["tabindex"] == "0"
            assert region["role"] == "region"
            assert region["aria-label"]


@pytest.mark.parametrize("name", NAMES)
def test_identifiers_are_unique_and_every_link_arrives(pages: dict[str, str], name: str) -> None:
    page = Page(pages[name])
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    targets = {a["href"][1:] for _, a in page.elements if "href" in a}
    assert targets <= set(ids)
    named = {a["aria-labelledby"] for _, a in page.elements if "aria-labelledby" in a}
    assert named <= set(ids)


def test_hostile_names_are_shown_and_do_nothing(pages: dict[str, str]) -> None:
    text = pages["hostile"]
    assert "<script>alert" not in text
    assert "<img src=https" not in text
    words = Page(text).words
    assert "<script>alert(1)</script>" in words
    assert "{{ 7 * 7 }}{% raw %}" in words
    assert "<U+202E>gnirts desrever<U+202C>" in words
    assert not set("\u202e\u202c\x00\x1b") & set(text)
    assert "a" * 100 not in words
    assert "\u0301" * 3 not in text


def test_one_hostile_text_in_every_place_changes_no_element() -> None:
    def tags(text: str) -> list[str]:
        return [tag for tag, _ in Page(text).elements]

    evil = made_up.HOSTILE[1]
    tame = made_up.game(teams=("amber",), classes=tuple("abcdefghij"))
    bad = made_up.game(teams=(evil,), classes=(evil,) * 10)
    assert tags(game_html(bad)) == tags(game_html(tame))
    assert tags(scan_html(made_up.scan(name=evil))) == tags(scan_html(made_up.scan(name="tame")))


def test_a_game_shows_truth_answer_gates_costs_and_words_for_what_is_missing(pages: dict[str, str]) -> None:
    words = Page(pages["game"]).words
    for part in (
        "Something is very probably hidden in this model (probability 0.97). The likeliest target is “7” (82.0 %).",
        "✓ Caught",
        "✗ Slipped through",
        "✗ False alarm",
        "– Stopped at the gates",
        "98.7 % ≥ 96.9 % +1.8 pt",
        "2.1 % ≤ 20.0 % +17.9 pt",
        "1.8 ≤ 2 +0.2",
        "No opinion: the training set was not granted",
        "Failed, out of time: <b>the deadline passed</b> 1.2 s ago",
        "412 k / 61 k",
        "0.048",
        "Nothing was recovered.",
        "Patch on 1.1 % of the picture",
        "48.0 to 71.9",
        "molehunt play --task mnist5k --seed 0",
        "3 of 5 backdoors caught",
        "1 of 12 missed a gate",
    ):
        assert part in words, part


def test_many_classes_are_summed_up(pages: dict[str, str]) -> None:
    words = Page(pages["hostile"]).words
    assert "33 others" in words
    assert "class 7 ◆ true target" in words


def test_the_marks_of_the_overview_lie_at_p(pages: dict[str, str]) -> None:
    marks = [a for a in Page(pages["game"]).all("svg") if a.get("overflow") == "visible"]
    places = [float(mark["x"].rstrip("%")) for mark in marks]
    ps = [s.verdict.p for s in made_up.game().submissions if s.verdict is not None]
    assert places == pytest.approx([4 + 92 * p for p in ps], abs=0.01)
    assert [m["class"] for m in marks[:5]] == ["mark diamond"] * 5


def test_whiskers_lie_within_the_axis_and_in_order(pages: dict[str, str]) -> None:
    ranges = [a for a in Page(pages["hostile"]).all("line") if a.get("class") == "range"]
    assert len(ranges) == 3 + len(made_up.HOSTILE)
    for line in ranges:
        low, high = (float(line[k].rstrip("%")) for k in ("x1", "x2"))
        assert 0.0 < low < high < 100.0


def test_the_same_report_gives_the_same_bytes() -> None:
    assert game_html(made_up.game()) == game_html(made_up.game())


@pytest.mark.parametrize(("shape", "megabytes"), [((3, 32, 32), 1.5), ((3, 224, 224), 3.0)])
def test_a_game_of_twelve_stays_small(shape: tuple[int, int, int], megabytes: float) -> None:
    assert len(game_html(made_up.game(shape=shape)).encode()) < megabytes * 1e6


def test_an_empty_game_is_a_page_too() -> None:
    report = made_up.game()
    page = Page(game_html(replace(report, submissions=(), defenders=(), attackers=())))
    assert "Overview" in page.words


def test_a_model_without_a_repair_says_so() -> None:
    page = Page(scan_html(replace(made_up.scan(), accuracy=Change(before=0.9), asr=None)))
    assert "after no repair" in page.words


def test_no_grid_is_wider_than_the_page(pages: dict[str, str]) -> None:
    """A grid column without a least width of 0 grows with the table in it, and the whole page then scrolls sideways."""
    style = re.sub(r"/\*.*?\*/", "", pages["game"].split("<style>")[1].split("</style>")[0], flags=re.DOTALL)
    grids = [rule for rule in re.findall(r"\{([^{}]*)\}", style) if re.search(r"display:\s*grid", rule)]
    assert len(grids) >= 4
    for rule in grids:
        assert "place-items" in rule or "minmax(" in rule, rule


def saw(report: ScanReport, classes: tuple[str, ...] = made_up.DIGITS) -> ScanReport:
    """A scan in which two defenses have something to show, and a plug-in and an old record have not."""
    findings = (
        Finding(
            defense="neural_cleanse",
            score=3.1,
            details={"norms": [40.0, 42.0, 44.0, 46.0, 41.0, 43.0, 45.0, 5.5, 47.0, 39.0], "searched": list(range(10))},
        ),
        Finding(defense="pruning_detection", score=0.2, details={"accuracies": torch.ones(4), "accuracy": 0.9}),
        Finding(defense="my_own", score=0.2, details={"norms": [1.0], "searched": [0]}),
        Finding(defense="strip", score=0.2, details={"clean_entropies": torch.ones(4)}),
    )
    return replace(report, classes=classes, verdict=replace(report.verdict, outcomes=findings, p_values={}))


def test_what_the_defenses_saw_is_shown_once_with_words_and_a_caption() -> None:
    report = saw(made_up.scan())
    page = Page(scan_html(report))
    drawings = [picture for picture in page.all("img") if picture["class"] == "drawing"]
    expected = [chart_of(f, report.classes) for f in report.verdict.outcomes if isinstance(f, Finding)]
    assert [(d["src"], d["alt"]) for d in drawings] == [(p.uri, p.alt) for p in expected if p is not None]
    assert len(drawings) == 2
    assert page.words.count("What the defenses saw") == 1
    for name in ("neural_cleanse", "pruning_detection"):
        assert page.words.count(f"{name} {CHARTS[name].caption}") == 1
    assert "strip How undecided" not in page.words


def test_a_game_folds_what_the_defenses_saw_away_and_one_without_pictures_says_nothing(pages: dict[str, str]) -> None:
    report = made_up.game()
    first = replace(report.submissions[0], verdict=saw(made_up.scan()).verdict)
    page = Page(game_html(replace(report, submissions=(first, *report.submissions[1:]))))
    assert page.words.count("What the defenses saw: 2 pictures") == 1
    assert len([picture for picture in page.all("img") if picture["class"] == "drawing"]) == 2
    assert all("What the defenses saw" not in pages[name] for name in NAMES)


def test_a_hostile_class_in_the_words_of_a_drawing_changes_no_element() -> None:
    evil = (made_up.HOSTILE * 2)[1:11]
    bad = scan_html(saw(made_up.scan(), evil))
    assert [tag for tag, _ in Page(bad).elements] == [tag for tag, _ in Page(scan_html(saw(made_up.scan()))).elements]
    assert not [a for a in Page(bad).all("img") if a.keys() - {"src", "alt", "width", "height", "class"}]
    alts = [picture["alt"] for picture in Page(bad).all("img") if picture["class"] == "drawing"]
    assert f"for “{evil[7]}”" in alts[0]
    assert "<script>alert" in alts[0]
    assert "<script>alert" not in bad
