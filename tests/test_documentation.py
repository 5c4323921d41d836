"""The documentation: links arrive, dependencies have reasons, and the code in it runs."""

import contextlib
import json
import re
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from molehunt.networks import NETWORKS, build, capture, features
from molehunt.training.recipes import RECIPES, SMALL

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
RUN = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*/README.md")])


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def anchors(page: Path) -> set[str]:
    """Headings as a reader of Markdown turns them into anchors."""
    heads = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_link_within_the_repository_arrives(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), f"{named(page)} links to {target}"
        assert not anchor or anchor in anchors(found), f"{named(page)} links to {target}"


@pytest.mark.parametrize("page", RUN, ids=named)
def test_the_code_in_the_doors_runs(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        module = ModuleType("documentation")
        monkeypatch.setitem(sys.modules, module.__name__, module)  # dataclasses look their module up
        exec(compile(block, named(page), "exec"), vars(module))


def test_the_readme_begins_with_the_two_commands() -> None:
    lines = [line for line in (ROOT / "README.md").read_text().splitlines() if line and not line.startswith("```")]
    assert lines[0] == "# Molehunt"
    assert [line.split("#")[0].strip() for line in lines[1:3]] == ["make play", "make test"]


def test_every_dependency_has_its_reason_and_no_reason_lacks_its_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    listed = [*project["dependencies"], *(d for extra in project["optional-dependencies"].values() for d in extra)]
    names = {re.split(r"[\[<>=~! ;]", d)[0] for d in listed}
    rows = re.findall(r"^\| `([\w-]+)` \| (.+) \|$", (ROOT / "docs/extend/dependencies.md").read_text(), re.MULTILINE)
    assert {name for name, _ in rows} == names
    assert all(len(reason) > 4 for _, reason in rows)


def table(page: str, title: str) -> list[list[str]]:
    """Rows of the first table after a heading, as cells without code marks."""
    text = (ROOT / page).read_text()
    assert f"\n## {title}\n" in text, f"{page} has no heading {title!r}"
    lines = text.split(f"\n## {title}\n", 1)[1].splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("|"))
    cells = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        cells.append([cell.strip().strip("`") for cell in line.strip("|").split("|")])
    return cells


def test_the_table_of_networks_is_what_is_counted() -> None:
    counted = []
    for name in NETWORKS:
        shape = (1, 28, 28) if name in {"badnets_cnn", "lenet5", "mntd_mnist"} else (3, 32, 32)
        model = build(name, shape, 10).eval()
        x = torch.zeros(1, *shape)
        with FlopCounterMode(display=False) as flops, torch.no_grad():
            inside = features(model, "head", x)[1]
            block = capture(model, "trunk", x)
        count = sum(p.numel() for p in model.parameters())
        mflop = flops.get_total_flops() / 2e6  # two passes
        sides = "x".join(map(str, block.shape[1:]))
        row = [name, "x".join(map(str, shape)), f"{count:,}".replace(",", " "), f"{mflop:.1f}"]
        counted.append([*row, str(least_side(name, shape[0])), sides, str(inside.shape[1])])
    assert table("docs/reference/networks.md", "The eleven") == counted


def least_side(name: str, channels: int) -> int:
    for side in range(1, 33):
        with contextlib.suppress(ValueError):
            build(name, (channels, side, side), 2)
            return side
    raise AssertionError(f"{name} takes no picture of up to 32 pixels")


def test_the_tables_of_recipes_are_the_recipes() -> None:
    recipes = [(name, "", recipe) for name, recipe in RECIPES.items()]
    recipes += [(name, task, recipe) for task, own in SMALL.items() for name, recipe in own.items()]
    wanted = []
    for name, task, r in recipes:
        least = f"{r.least_images:,}".replace(",", " ") if r.least_images else ""
        rates = [f"{r.lr:g}", f"{r.muon_lr:g}" if r.optimizer == "muon" else "", f"{r.momentum:g}"]
        last = [f"{r.weight_decay:g}", r.schedule, f"{r.warmup:g}", f"{r.label_smoothing:g}", str(r.shift)]
        wanted.append([name, task, f"{r.epochs:g}", least, str(r.batch), r.optimizer, *rates, *last])
        assert r.muon_momentum == 0.6, "the page says so in a sentence"
    assert table("docs/reference/training.md", "Recipes") == wanted


def test_the_figures_of_training_are_those_that_were_measured() -> None:
    figures = json.loads((ROOT / "benchmarks/results/training.json").read_text())["figures"]
    names = ("time", "accuracy", "ASR", "loss of accuracy against its clean twin", "work")
    shown = set()
    for recipe, attack, models, *cells in table("docs/reference/training.md", "Figures"):
        assert int(models) == len(figures[f"{recipe}, {attack}, time"]["seeds"])
        for name, cell in zip(names, cells, strict=True):
            key = f"{recipe}, {attack}, {name}"
            if not cell:
                assert key not in figures, f"the page leaves out {key}"
                continue
            shown.add(key)
            spread = [figures[key]["spread"][k] * (1 if name in {"time", "work"} else 100) for k in WRITTEN]
            numbers = [float(number) for number in re.findall(r"-?[\d.]+", cell)]
            assert numbers[0] == pytest.approx(spread[0], abs=0.051 if name == "time" else 0.0051), key
            rest = numbers[1:] or [numbers[0]] * 2
            assert rest == pytest.approx(spread[1:], abs=0.051 if name == "time" else 0.0051), key
    assert shown == set(figures), "run: python benchmarks/training.py collect"


WRITTEN = ("median", "min", "max")  # "12.6 (12.0 to 13.0)"
