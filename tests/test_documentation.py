"""The documentation: links arrive, dependencies have reasons, and the code in it runs."""

import ast
import contextlib
import json
import re
import statistics
import sys
import tomllib
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from molehunt.attacks import ATTACKS
from molehunt.confinement import Limits
from molehunt.defenses import RAB, Unlearning
from molehunt.game.attacker import describe
from molehunt.game.rules import ROUNDS
from molehunt.isolation import DISK
from molehunt.metas import Settings
from molehunt.networks import NETWORKS, build, capture, features
from molehunt.runner import configuration
from molehunt.testing import auc
from molehunt.training.recipes import RECIPES, SMALL

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
# data.md runs in tests/datasets, isolation.md shows a host's half of a conversation.
RUN = sorted(page for page in PAGES if page.name not in {"data.md", "isolation.md"} and "```python" in page.read_text())


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


def test_every_page_can_be_reached_from_the_readme() -> None:
    reached, waiting = set(), [ROOT / "README.md"]
    while waiting:
        page = waiting.pop()
        if page in reached:
            continue
        reached.add(page)
        for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
            found = (page.parent / target).resolve()
            # A link to a folder shows what lies in it.
            waiting += found.glob("*.md") if found.is_dir() else [found] if found.suffix == ".md" else []
    assert set(PAGES) == reached


@pytest.mark.parametrize("page", RUN, ids=named)
def test_the_code_in_the_pages_runs(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        module = ModuleType("documentation")
        monkeypatch.setitem(sys.modules, module.__name__, module)  # dataclasses look their module up
        exec(compile(block, named(page), "exec"), vars(module))


def test_the_readme_begins_with_the_two_commands() -> None:
    lines = [line for line in (ROOT / "README.md").read_text().splitlines() if line and not line.startswith("```")]
    assert lines[0] == "# Molehunt"
    assert [line.split("#")[0].strip() for line in lines[1:3]] == ["make play", "make test"]


@pytest.mark.parametrize("page", ["SECURITY.md", "docs/extend/isolation.md"])
def test_the_limits_of_a_confined_defense_are_those_of_the_code(page: str) -> None:
    limits, text = Limits(), (ROOT / page).read_text()
    for said in (
        f"{limits.memory // 2**30} GiB",
        f"{limits.file // 2**20} MiB",
        f"{DISK // 2**30} GiB",
        str(limits.open_files),
    ):
        assert re.search(rf"\b{said}\b", text), f"{page} does not say {said}"


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
    heading = re.search(rf"^###? {re.escape(title)}$", text, re.MULTILINE)
    assert heading, f"{page} has no heading {title!r}"
    lines = text[heading.end() :].splitlines()
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


def test_the_budgets_of_removals_are_those_of_the_rules() -> None:
    wanted = [
        [played.name, name, str(repair.steps), str(repair.batch), f"{repair.lr:g}"]
        for played in ROUNDS.values()
        for name in played.defenses
        if (repair := played.repairs.get(name)) is not None
    ]
    assert table("docs/run/scoring.md", "What removals may spend") == wanted


def test_the_figures_of_populations_are_those_that_were_measured() -> None:
    figures = json.loads((ROOT / "benchmarks/results/population.json").read_text())["figures"]
    rows = {row[0]: row for row in table("docs/reference/populations.md", "Figures")}
    ratio = "MNTD network on MNIST, times as many models per second as the official recipe"
    for title, key, digits, factor in (
        ("official, seconds per model", "MNTD network on MNIST, seconds per model, official", 1, 1),
        ("equal passes, times as many models per second", f"{ratio}, equal", 2, 1),
        ("short, times as many models per second", f"{ratio}, short", 1, 1),
        ("1 024 MNIST shadows, minutes", "1024 networks, mnist, time", 1, 1),
        ("1 024 MNIST shadows, memory, GiB", "1024 networks, mnist, memory", 2, 1),
        ("their accuracy, %", "1024 networks, mnist, accuracy", 1, 100),
    ):
        figure, (_, goal, ours, spread) = figures[key], rows[title]
        # The ratio of a schedule that has not passed its gate is kept as a spread alone.
        value = figure["spread"]["median"] if figure["value"] is None else figure["value"]
        assert ours == f"{factor * value:.{digits}f}", title
        if isinstance(figure.get("spread"), dict):
            assert spread == " to ".join(f"{factor * figure['spread'][k]:.{digits}f}" for k in ("min", "max")), title
        if figure.get("goal") is not None:
            assert float(goal) == figure["goal"], title


def test_the_figures_of_the_guard_are_those_that_were_measured() -> None:
    (row,) = [row for row in lines_of("population") if row["kind"] == "guard"]
    shown = table("docs/reference/bank.md", "The guard")
    for cells, sort in zip(shown, ("repeated", "added", "backdoored"), strict=True):
        chance, norm = row[sort]["permuted"], row["norm"]
        assert cells[0].startswith(f"*{sort}*")
        assert cells[1:] == [
            f"{row[sort]['auc']:.3f}",
            f"{chance['min']:.2f} to {chance['max']:.2f}",
            f"{norm['clean']['median']:.2f} and {norm[sort]['median']:.2f}",
        ]


def test_the_figures_of_badnets_are_those_that_were_measured() -> None:
    figures = json.loads((ROOT / "benchmarks/results/training.json").read_text())["figures"]
    rows = {row[0]: row for row in table("docs/reference/attacks/badnets.md", "Figures")}
    for title, key in (
        ("MNIST, clean error more than the twin's", "loss of accuracy against its clean twin"),
        ("MNIST, all-to-one ASR", "ASR"),
    ):
        spread = figures[f"badnets_cnn, badnets, {key}"]["spread"]
        ours, (low, high) = rows[title][2], re.findall(r"[\d.]+", rows[title][5])[:2]
        assert ours.split()[0] == f"{100 * spread['median']:.2f}"
        assert [low, high] == [f"{100 * spread['min']:.2f}", f"{100 * spread['max']:.2f}"]


def test_the_figures_of_neural_cleanse_on_reference_models_are_those_that_were_measured() -> None:
    path = ROOT / "benchmarks/results/population-mnist5k-badnets_cnn.jsonl"
    models: dict[str, list[dict[str, Any]]] = {}
    for line in path.read_text().splitlines():
        model = json.loads(line)
        kind, number = model["name"].split()
        # benchmarks/populations.py plants the three kinds in turn.
        what = ("BadNets models, one target", "Blended models", "all-to-all models")[int(number) % 3]
        models.setdefault("clean models" if kind == "clean" else what, []).append(model)
    page = "docs/reference/defenses/neural_cleanse.md"
    rows = {row[0]: row for row in table(page, "Figures")}
    for kind, found in models.items():
        scores = [model["scores"]["neural_cleanse"] for model in found]
        row = rows[f"score of {kind}"]
        assert row[2] == f"{statistics.median(scores):.2f} (median)"
        assert row[3].startswith(f"{len(scores)}")
        assert row[5].startswith(f"{min(scores):.2f} to {max(scores):.2f}")
        rates = [model["asr"] for model in found if model["asr"] is not None]
        assert not rates or f"{min(rates):.2f} to {max(rates):.2f}" in (ROOT / page).read_text()


def test_the_figures_of_neural_cleanse_on_cifar_are_those_that_were_measured() -> None:
    path = ROOT / "benchmarks/results/neural_cleanse.jsonl"
    models = [row for line in path.read_text().splitlines() if "backdoored" in (row := json.loads(line))]
    bad, good = ([m for m in models if m["backdoored"] is kind] for kind in (True, False))
    rows = {row[0]: row for row in table("docs/reference/defenses/neural_cleanse.md", "Figures")}
    hits = sum(m["guess"] == m["trigger"]["target"] for m in bad)
    assert rows["correct target, CIFAR-10"][2] == f"{hits} of {len(bad)}"
    rates = [m["asr"] for m in bad]
    assert rows["correct target, CIFAR-10"][5] == f"ASR {min(rates):.3f} to {max(rates):.3f}"
    for title, found, field, digits in (
        ("score of these ten", bad, "score", 2),
        ("score of clean models, CIFAR-10", good, "score", 2),
        ("seconds, ten classes, CIFAR-10", models, "seconds", 1),
    ):
        values = [m[field] for m in found]
        assert rows[title][2] == f"{statistics.median(values):.{digits}f} (median)"
        assert rows[title][5] == f"{min(values):.{digits}f} to {max(values):.{digits}f}"


@pytest.mark.parametrize(
    ("task", "heading"), [("mnist5k", "How many backdoors work"), ("mnist", "The same on the whole of MNIST")]
)
def test_the_figures_of_the_bank_are_those_that_were_measured(task: str, heading: str) -> None:
    figures = json.loads((ROOT / "benchmarks/results/bank.json").read_text())["figures"]
    rows = table("docs/reference/bank.md", heading)
    for family, passed, count, rate in rows:
        key = f"{task}, badnets_cnn, calibrate, {family}"
        assert figures[f"{key}, passes the gates"]["note"] == f"{count} models"
        assert figures[f"{key}, passes the gates"]["value"] == pytest.approx(int(passed) / int(count))
        assert 100 * figures[f"{key}, ASR"]["value"] == pytest.approx(float(rate), abs=0.051)
    text = (ROOT / "docs/reference/bank.md").read_text()
    whole = [sum(int(row[i]) for row in rows) for i in (2, 1)]
    assert f"of {whole[0]} planted models {whole[1]} pass" in text


@pytest.mark.parametrize(("attack", "title"), [("badnets", "The grid"), ("blended", "The grid, Blended")])
def test_the_grid_of_gradient_shaping_is_what_was_measured(attack: str, title: str) -> None:
    told: dict[tuple[Any, Any], list[str]] = {}
    for row in sorted(rows_of("gradient_shaping"), key=lambda row: int(row["seed"])):
        if (row["attack"], row["task"]) == (attack, "mnist") and row["seed"] in (0, 1):
            cell = " / ".join(in_percent([row["after"]], "accuracy", "asr"))
            told.setdefault((row["factor"], row["sigma"]), []).append(cell)
    page = "docs/reference/defenses/gradient_shaping.md"
    shown = {
        (float(factor), sigma): cell.split("; ")
        for factor, *cells in table(page, title)
        for sigma, cell in zip((0.0, 0.01, 0.1, 1.0), cells, strict=True)
    }
    control = told.pop((None, 0.0))
    assert shown == told
    assert all(len(cells) == 2 for cells in told.values())
    assert f"without clipping and noise: {'; '.join(control)}." in (ROOT / page).read_text()


def test_how_fresh_models_are_judged_is_what_was_measured() -> None:
    measured = json.loads((ROOT / "benchmarks/results/calibration.json").read_text())["figures"]
    names = {
        "ABS": "abs",
        "MNTD": "mntd",
        "Neural Cleanse": "neural_cleanse",
        "pair inversion": "pair_inversion",
        "pruning detection": "pruning_detection",
        "SentiNet": "sentinet",
        "STRIP": "strip",
    }
    shown = list(table("docs/reference/calibration.md", "Fresh models, judged"))
    assert [row[0] for row in shown] == [*names, "all fused"]
    for told, value, spread in shown:
        figure = measured[f"mnist badnets_cnn, fresh models, AUC of {names.get(told, told)}"]
        assert value == f"{figure['value']:.3f}"
        assert spread == f"{figure['spread']['min']:.3f} to {figure['spread']['max']:.3f}"
    brier = measured["mnist badnets_cnn, fresh models, Brier score"]["value"]
    assert f"Brier score is {brier:.3f}" in (ROOT / "docs/reference/calibration.md").read_text()


def test_the_figures_of_pruning_detection_are_those_that_were_measured() -> None:
    measured = json.loads((ROOT / "benchmarks/results/rounds_1_2.json").read_text())["figures"]
    title = "pruning-based detection on mnist, badnets_cnn, "
    figures = {key.removeprefix(title): value for key, value in measured.items() if key.startswith(title)}
    rows = list(table("docs/reference/defenses/pruning_detection.md", "Figures"))
    held, shuffled = figures["held-out AUC"], figures["AUC with shuffled labels"]
    low, high = held["spread"]
    assert rows[0][1:] == [f"{held['value']:.3f}", f"{low:.3f} to {high:.3f} (95 % of bootstrap draws)"]
    spread, p = shuffled["spread"], figures["permutation p-value"]["value"]
    told = f"{spread['min']:.3f} to {spread['max']:.3f} (99 shuffles); p = {p:.2f}"
    assert rows[1][1:] == [f"{shuffled['value']:.3f}", told]
    assert rows[2][1] == f"{figures['AUC without a regression, reset targeted l1']['value']:.3f}"
    seconds = figures["seconds of one model, reset targeted l1"]
    assert rows[3][1] == f"{seconds['value']:.2f}"
    assert "50 clean, 49 planted" in held["note"]


def finished_attacks() -> list[dict[str, Any]]:
    """The latest row of every model; see `finished` of benchmarks/attacks.py."""
    lines = (ROOT / "benchmarks/results/attacks.jsonl").read_text().splitlines()
    names = ("attack", "task", "network", "seed")
    return list({tuple(row[k] for k in names): row for row in map(json.loads, lines)}.values())


def attack_rows(name: str) -> list[dict[str, Any]]:
    return [row for row in finished_attacks() if row["attack"] == name]


@pytest.mark.parametrize(
    ("page", "title", "name", "value"),
    [
        ("badnets", "MNIST, all-to-all", "badnets (all-to-all)", lambda row: 1 - row["asr"]),
        ("multi_trigger", "MNIST, a target each", "multi_trigger (a target each)", lambda row: min(row["further_asr"])),
    ],
)
def test_the_figures_of_other_forms_are_those_that_were_measured(
    page: str, title: str, name: str, value: Callable[[dict[str, Any]], float]
) -> None:
    values = [100 * value(row) for row in attack_rows(name)]
    found = {row[0].split(":")[0]: row for row in table(f"docs/reference/attacks/{page}.md", "Figures")}[title]
    assert found[2] == f"{statistics.median(values):.2f} %"
    assert found[5] == f"{min(values):.2f} to {max(values):.2f} %, {len(values)} seeds"


def test_what_a_network_learns_of_perturbed_pictures_is_what_was_measured() -> None:
    measured: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for line in (ROOT / "benchmarks/results/label_consistent.jsonl").read_text().splitlines():
        row = json.loads(line)
        told = round(255 * row["epsilon"])
        epsilon = {0: "0", 26: "0.1"}.get(told, f"{told}/255") + ("*" if row["crafted"] == "0.1" else "")
        rates = [f"{row['poison_rate']:g}", f"{row.get('cover_rate', 0):g}", f"{row.get('epochs', 3):g}"]
        measured.setdefault((epsilon, *rates), []).append(row)
    shown = {
        tuple(row[:4]): row[4:]
        for row in table("docs/reference/attacks/label_consistent.md", "What the network learns")
    }
    assert shown.keys() == measured.keys()
    for key, rows in measured.items():
        for cell, name in zip(shown[key], ("accuracy", "asr", "perturbed_to_target"), strict=True):
            assert cell == ", ".join(f"{100 * row[name]:.1f}" for row in rows if name in row)


def middle(values: list[float], digits: int) -> str:
    """A median with its range, as pages have it."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def lines_of(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (ROOT / f"benchmarks/results/{name}.jsonl").read_text().splitlines()]


def mntd_cells(row: dict[str, Any]) -> list[str]:
    low, high = row["interval_95"]
    families = [row["families"][k] for k in ("badnets", "blended", "stripes", "adap_blend", "refool", "tact")]
    auc = f"{row['auc']:.3f} ({low:.3f} to {high:.3f})"
    return [f"{row['shadows']} + {row['shadows']}", auc, *(f"{value:.2f}" for value in families)]


def test_how_mntd_was_set_is_what_was_measured() -> None:
    measured = [row for row in lines_of("mntd-develop") if "bank" in row]
    assert all(row["part"] == "develop" for row in measured)
    shown = table("docs/reference/defenses/mntd.md", "How the settings were chosen")
    assert len(shown) == len(measured)
    for cells, row in zip(shown, measured, strict=True):
        words = ", ".join(f"{k}={v}" for k, v in row["settings"].items()) or "default"
        assert [cells[0].replace("`", ""), *cells[1:]] == [words, *mntd_cells(row)]
        assert (row["clean"], row["backdoored"]) == (40, 37)


def test_the_figures_of_mntd_are_those_that_were_measured() -> None:
    measured = sorted((row for row in lines_of("mntd") if "bank" in row), key=lambda row: int(row["shadows"]))
    shown = table("docs/reference/defenses/mntd.md", "Figures")
    assert len(shown) == len(measured)
    names = ("blended", "stripes", "adap_blend", "ftrojan", "refool", "wanet", "badnets", "tact")
    for cells, row in zip(shown, measured, strict=True):
        assert row["part"] == "evaluate", "no setting was chosen on these models"
        assert row["configuration"] == asdict(Settings()), "today's defaults"
        assert cells == mntd_cells(row)[:2] + [f"{row['families'][name]:.2f}" for name in names]


def test_what_rab_says_of_sets_of_the_bank_is_what_was_measured() -> None:
    def span(values: list[float], digits: int) -> str:
        ends = [f"{end:.{digits}f}" for end in (min(values), max(values))]
        return " to ".join(ends[: len(values)])

    groups: dict[str | None, list[dict[str, Any]]] = {}
    for row in lines_of("rab"):
        if row["what"] == "bank":
            assert row["settings"] == configuration(RAB()), "today's defaults"
            groups.setdefault(row["hidden"], []).append(row)
    shown = table("docs/reference/defenses/rab.md", "Figures")
    assert len(shown) == len(groups)
    for cells, (hidden, rows) in zip(shown, groups.items(), strict=True):
        pairs = [
            " / ".join(span([100 * row[name][i] for row in rows], 1) for i in (0, 1))
            for name in ("asr", "accuracy")
            if name in rows[0]
        ]
        told = ["", "", pairs[0]] if hidden is None else [span([r["against"][0] for r in rows], 2), *pairs]
        assert cells == [hidden or "nothing", str(len(rows)), span([r["score"] for r in rows], 3), *told]


def test_the_score_of_recovered_triggers_is_the_statistic_that_was_best_on_develop_models() -> None:
    measured = [row for row in lines_of("sentinet-develop") if "bank" in row]
    truth = torch.tensor([row["hidden"] is not None for row in measured])
    assert (int((~truth).sum()), int(truth.sum())) == (40, 37)
    shown = table("docs/reference/defenses/sentinet.md", "How the score of recovered triggers was chosen")
    ways: tuple[tuple[str, Callable[[dict[str, Any]], float]], ...] = (
        ("the smaller of Fooled and AvgConf", lambda one: min(one["fooled"], one["confidence"])),
        ("their product", lambda one: one["fooled"] * one["confidence"]),
        ("Fooled", lambda one: one["fooled"]),
        ("AvgConf", lambda one: one["confidence"]),
        ("residual over the parabola, less the threshold", lambda one: one["residual"]),
    )
    found = []
    for name, way in ways:
        scores = torch.tensor([max(map(way, row["candidates"])) for row in measured])
        found.append(auc(scores, truth))
        assert [name, f"{found[-1]:.3f}"] in shown
    assert len(shown) == len(ways)
    assert max(found) == found[0]
    assert [row["score"] for row in measured] == [max(map(ways[0][1], row["candidates"])) for row in measured]


@pytest.mark.parametrize("defense", ["unlearning", "neuron_pruning"])
def test_the_figures_of_a_mitigation_are_those_that_were_measured(defense: str) -> None:
    shown = {row[0]: row[2:] for row in table(f"docs/reference/defenses/{defense}.md", "Figures")}
    for attack, word in (("badnets", "square"), ("blended", "blend")):
        rows = [row for row in lines_of("mitigations") if row["attack"] == attack and not row["settings"]]
        assert len(rows) == 10
        assert shown[f"MNIST, {word}"] == [
            middle([100 * row["before"]["asr"] for row in rows], 2),
            middle([100 * row[defense]["asr"] for row in rows], 2),
            middle([100 * (row["before"]["accuracy"] - row[defense]["accuracy"]) for row in rows], 2),
            middle([row[defense]["seconds"] for row in rows if row[defense]["triggers"]], 2),
        ]
        assert all(row["unlearning"]["configuration"]["lr"] == Unlearning().lr for row in rows), "today's defaults"


def test_the_figures_of_the_activation_filter_are_those_that_were_measured() -> None:
    shown = {row[0]: row[1:] for row in table("docs/reference/defenses/neuron_pruning.md", "Activation filter")}
    for attack, word in (("badnets", "square"), ("blended", "blend")):
        rows = [row for row in lines_of("mitigations") if row["attack"] == attack]
        found = [row["activation_filter"] for row in rows if "activation_filter" in row]
        assert shown[word] == [
            f"{len(found)} of {len(rows)}",
            middle([f["auc"] for f in found], 3),
            middle([100 * f["let_through"] for f in found], 1),
            middle([100 * f["false_alarms"] for f in found], 1),
        ]


def test_what_repairs_leave_and_how_unlearning_was_set_is_what_was_measured() -> None:
    shown = {row[0]: row[1:] for row in table("docs/reference/defenses/unlearning.md", "Beside the other repairs")}
    rows = lines_of("repairs-develop")
    assert shown.keys() == rows[0]["repairs"].keys()
    for name, cells in shown.items():
        # Where a repair hands nothing back the model is what it was.
        said = [row["repairs"][name] or row for row in rows]
        lost = [100 * (row["accuracy"] - one["accuracy"]) for row, one in zip(rows, said, strict=True)]
        assert cells == [str(len(rows)), middle([100 * one["asr"] for one in said], 1), middle(lost, 1)]

    words = {"0.005": {"lr": 0.005}, "0.01": {"lr": 0.01}, "0.02": {}, "0.05": {"lr": 0.05}}
    words |= {"200 steps": {"steps": 200}, "half of the pictures": {"share": 0.5}}
    tried = table("docs/reference/defenses/unlearning.md", "How the rate was chosen")
    assert len(tried) == len(words)
    for (word, settings), cells in zip(words.items(), tried, strict=True):
        assert word in cells[0]
        wanted = []
        for attack in ("badnets", "blended"):
            mine = [r for r in lines_of("mitigations-develop") if r["attack"] == attack and r["settings"] == settings]
            assert len(mine) == 5
            wanted.append(middle([100 * row["unlearning"]["asr"] for row in mine], 2))
            wanted.append(
                middle([100 * (row["before"]["accuracy"] - row["unlearning"]["accuracy"]) for row in mine], 2)
            )
        assert cells[1:] == wanted


def test_why_label_consistent_fails_on_digits_is_what_was_measured() -> None:
    lines = (ROOT / "benchmarks/results/label_consistent-digits.jsonl").read_text().splitlines()
    measured = [json.loads(line) for line in lines]
    shown = table("docs/reference/attacks/label_consistent.md", "Why it fails on MNIST")
    assert len(shown) == len(measured)
    for cells, row in zip(shown, measured, strict=True):
        told = [row["right"], row["accuracy"], row["asr"], row["ink"]["0.5"], row["ink"]["0.1"]]
        assert cells[1:6] == [f"{100 * value:.1f}" for value in told]
        assert cells[6] == f"{100 * row['ink']['0.0']:.0f}"
        words = {"network": row["network"], "target": f"target {row['target']}", "optimizer": "SGD"}
        words |= {"epsilon": f"by {row['epsilon']:g}", "cover_rate": f"covers {row['cover_rate']:g}"}
        words |= {"mixed": f"{100 * row['mixed']:.0f} % another digit", "noise": f"noise of {row['noise']:g}"}
        usual = measured[0]
        assert all((word in cells[0]) == (row[name] != usual[name]) for name, word in words.items()), cells[0]


@pytest.mark.parametrize("attack", ATTACKS)
def test_the_page_of_an_attack_shows_ten_pictures_under_its_trigger(attack: str) -> None:
    folder = ROOT / "docs/reference/attacks"
    assert f"]({attack}.png)" in (folder / f"{attack}.md").read_text()
    with Image.open(folder / f"{attack}.png") as picture:
        assert picture.width > 9 * picture.height / 4, "ten pictures in a row, and the change below"


@pytest.mark.parametrize("attack", ATTACKS)
def test_the_figures_of_an_attack_are_those_that_were_measured(attack: str) -> None:
    wanted: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in finished_attacks():
        name, _, form = row["attack"].partition(" (")
        if name == attack:
            task = row["task"] + (f", {form.rstrip(')').replace(') (', ', ')}" if form else "")
            wanted.setdefault((task, row["network"]), []).append(row)
    text = (ROOT / f"docs/reference/attacks/{attack}.md").read_text()
    assert ("\n### Through the gates\n" in text) == bool(wanted), "run: python benchmarks/attacks.py collect"
    if not wanted:
        return
    found = re.findall(r"^\| ([\w, -]+) \| `(\w+)` \| (.*) \|$", text.split("### Through")[1], re.M)
    shown = {(task, network): rest for task, network, rest in found}
    assert shown.keys() == wanted.keys()
    for key, rows in wanted.items():
        models, *cells, missed = shown[key].split(" | ")
        assert int(models) == len(rows)
        for cell, values in zip(
            cells,
            (
                [r["accuracy"] for r in rows],
                [r["twin"] - r["accuracy"] for r in rows],
                [r["asr"] for r in rows],
                [r["base_rate"] for r in rows],
            ),
            strict=True,
        ):
            numbers = [float(number) for number in re.findall(r"-?[\d.]+", cell)]
            assert numbers[0] == pytest.approx(100 * statistics.median(values), abs=0.0051)
            assert (numbers[1:] or [numbers[0]] * 2) == pytest.approx(
                [100 * min(values), 100 * max(values)], abs=0.0051
            )
        assert (missed == "none") == all(r["passed"] for r in rows)


def rows_of(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (ROOT / f"benchmarks/results/{name}.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("attack", ATTACKS)
def test_the_settings_tried_of_an_attack_are_those_that_were_measured(attack: str) -> None:
    own = json.loads(json.dumps(describe(ATTACKS[attack]())))
    del own["attack"]
    # Rows from before an attack got a setting, or lost one, are of another attack; a later row replaces an earlier one.
    last = {
        json.dumps(row["settings"] | {"task": row["task"]}, sort_keys=True): row
        for row in rows_of("attacks-develop")
        if row["attack"] == attack and row["settings"].keys() == own.keys()
    }
    page = f"docs/reference/attacks/{attack}.md"
    if "\n### Settings tried\n" not in (ROOT / page).read_text():
        # These four tell in words what was tried.
        assert not last or attack in {"badnets", "blended", "label_consistent", "multi_trigger"}
        return
    shown = set()
    for told, task, *cells, missed in table(page, "Settings tried"):
        changed = {k: json.loads(v) for k, v in re.findall(r"`?(\w+)` (.+?)(?=, `|$)", told)}
        assert bool(changed) == (told != "defaults")
        key = json.dumps(own | changed | {"task": task}, sort_keys=True)
        assert key in last, f"{told} was not measured on {task}"
        row = last[key]
        shown.add(key)
        assert missed == (", ".join(gate["name"] for gate in row["gates"] if not gate["passed"]) or "none")
        values = [row.get(k) for k in ("accuracy", "twin", "asr", "cover_accuracy")][: len(cells)]
        assert cells == ["" if value is None else f"{100 * value:.1f}" for value in values], told
    assert shown == last.keys(), f"run: python benchmarks/tried.py {attack}"


def in_percent(rows: list[dict[str, Any]], *names: str) -> list[str]:
    """Medians of some fields, and the smallest and largest where there are several rows."""
    cells = []
    for name in names:
        values = [100 * row[name] for row in rows]
        spread = f" ({min(values):.1f} to {max(values):.1f})" if len(values) > 1 else ""
        cells.append(f"{statistics.median(values):.1f}{spread}")
    return cells


@pytest.mark.parametrize("attack", ["adap_blend", "adap_patch", "adversarial_embedding", "tact"])
def test_how_far_poisoned_rows_lie_apart_is_what_was_measured(attack: str) -> None:
    measured: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows_of("latent_separation"):
        measured.setdefault((row["attack"], f"{100 * row['poison']:.0f} %"), []).append(row)
    shown = table(f"docs/reference/attacks/{attack}.md", "Do poisoned rows lie apart")
    assert {name for name, *_ in shown} == {attack, "badnets"}
    for name, rate, models, *cells in shown:
        rows = measured[name, rate]
        assert int(models) == len(rows)
        assert all(row["task"] == "mnist" for row in rows)
        most = f"{100 * statistics.median(row['ceiling'] for row in rows):.1f}"
        assert cells == [*in_percent(rows, "accuracy", "asr", "recall"), most, *in_percent(rows, "auc")], name


@pytest.mark.parametrize("attack", ["bpp", "wanet"])
def test_what_more_passes_give_is_what_was_measured(attack: str) -> None:
    measured: dict[str, list[dict[str, Any]]] = {}
    for row in rows_of("attacks-longer"):
        if row["attack"] == attack:
            measured.setdefault(f"{row['passes']:g}", []).append(row)
    shown = table(f"docs/reference/attacks/{attack}.md", "More passes")
    assert [passes for passes, *_ in shown] == sorted(measured, key=float)
    for passes, models, *cells in shown:
        assert int(models) == len(measured[passes])
        assert cells == in_percent(measured[passes], "accuracy", "asr", "cover_accuracy")


def test_what_more_passes_give_other_forms_is_what_was_measured() -> None:
    measured: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows_of("attacks-longer"):
        if row["attack"].startswith("badnets"):
            form = row["attack"].removeprefix("badnets (").removesuffix(")")
            measured.setdefault((form, f"{row['passes']:g}"), []).append(row)
    shown = table("docs/reference/attacks/badnets.md", "More passes")
    assert {(form, passes) for form, passes, *_ in shown} == measured.keys()
    for form, passes, models, *cells in shown:
        assert int(models) == len(measured[form, passes])
        assert cells == in_percent(measured[form, passes], "accuracy", "asr")


def constant(script: str, name: str) -> Any:
    """A literal that a benchmark assigns, read and not run."""
    for node in ast.parse((ROOT / "benchmarks" / script).read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            return ast.literal_eval(node.value)
    raise AssertionError(f"{script} assigns no {name}")


VERSIONS = constant("data_board.py", "VERSIONS")


@pytest.mark.parametrize("attack", ["issba", "wanet", "bpp"])
def test_what_the_data_board_changes_is_what_was_measured(attack: str) -> None:
    measured: dict[str, list[dict[str, Any]]] = {}
    for row in rows_of("data_board"):
        if row["attack"] == attack:
            measured.setdefault(VERSIONS[row["version"]], []).append(row)
    shown = table(f"docs/reference/attacks/{attack}.md", "What the data board changes")
    assert (
        [version for version, *_ in shown] == list(VERSIONS.values()) == [v for v in VERSIONS.values() if v in measured]
    )
    for version, models, *cells in shown:
        assert int(models) == len(measured[version])
        assert cells == in_percent(measured[version], "accuracy", "asr")


WRITTEN = ("median", "min", "max")  # "12.6 (12.0 to 13.0)"


def test_what_is_left_of_the_pruning_aware_attack_is_what_was_measured() -> None:
    names = {"badnets": "BadNets", "pruning_aware": "pruning-aware"}
    wanted = []
    for attack, name in names.items():
        kept = [row for row in lines_of("pruning_aware") if row["attack"] == attack]
        assert sorted(row["seed"] for row in kept) == [0, 1, 2]
        for version in ("before", "pruning alone", "fine-tuning alone", "fine-pruning"):
            cells = [middle([100 * row["left"][version][place] for row in kept], 1) for place in (0, 1)]
            wanted.append([name, version, *cells])
    assert table("docs/reference/attacks/pruning_aware.md", "What pruning and tuning leave") == wanted
    # The curve that is spoken of: cut as far as the defender cuts, the one backdoor is gone and the other whole.
    for row in lines_of("pruning_aware"):
        left = row["curve"][row["pruned"]][1]
        assert left < 0.05 if row["attack"] == "badnets" else left > 0.95


def test_what_short_shadows_are_worth_is_what_was_measured() -> None:
    row = [row for row in lines_of("population") if row["kind"] == "gate"][-1]
    shown = table("docs/reference/populations.md", "Are short shadows good enough?")
    for cells, name in zip(shown, ("official", "short"), strict=True):
        assert cells[0].startswith(name)
        assert cells[1].split() == [f"{value:.3f}"[1:] for value in row["auc"][name]]
        assert cells[2] == f"{row['permuted_95'][name]:.3f}"[1:]
    text = (ROOT / "docs/reference/populations.md").read_text()
    low, high = (f"{value:.4f}"[1:] for value in row["interval_95"])
    assert f"The paired difference is {row['difference']:.4f}"[:-1].replace("0.", ".") in text
    assert f"lower 95 % bound, over targets and starts, is {row['lower_95_one_sided']:.4f}".replace("0.", ".") in text
    assert f"the two-sided interval {low} to {high}" in text


def test_the_page_shows_what_whole_scans_gave() -> None:
    lines = (ROOT / "benchmarks/results/verdict.jsonl").read_text().splitlines()
    kept = [row for row in map(json.loads, lines) if row["hidden"] is None or row["works"]]
    truth = torch.tensor([row["hidden"] is not None for row in kept])
    bad = [row for row in kept if row["hidden"] is not None and row["p"] >= 0.5]
    shown = {row[0]: row[1] for row in table("docs/reference/verdict.md", "Figures")}
    measured = {
        "AUC": auc(torch.tensor([row["p"] for row in kept]).double(), truth),
        "detected": len(bad) / int(truth.sum()),
        "target first, of those detected": statistics.mean(row["guess"] == row["target"] for row in bad),
        "success of the true trigger after the repair": statistics.median(row["asr"][-1] for row in bad),
        "accuracy lost in the repair": statistics.median(row["accuracy"][0] - row["accuracy"][-1] for row in bad),
    }
    assert {name: shown[name] for name in measured} == {name: f"{value:.3f}" for name, value in measured.items()}
    # What is said of them below the table.
    missed = [row["hidden"] for row in bad if row["guess"] != row["target"]]
    assert {kind: missed.count(kind) for kind in set(missed)} == {"wanet": 5, "tact": 4}
