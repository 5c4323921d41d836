"""What the benchmarks do with their rows; what they measure takes too long for here."""

import importlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
Load = Callable[[str], ModuleType]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Load]:
    """Import a benchmark, its results in an empty folder."""
    names = {path.stem for path in (ROOT / "benchmarks").glob("*.py")}
    # Tests lie in packages of the same names.
    others = {name: sys.modules.pop(name) for name in names & sys.modules.keys()}
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setattr(importlib.import_module("record"), "RESULTS", tmp_path)
    yield importlib.import_module
    for name in names & sys.modules.keys():
        del sys.modules[name]
    sys.modules.update(others)


def test_a_row_cut_off_by_a_kill_costs_nothing_but_itself(load: Load, tmp_path: Path) -> None:
    record = load("record")
    record.append("some", {"seed": 0, "value": 1})
    with (tmp_path / "some.jsonl").open("a") as file:
        file.write('{"seed": 1, "val')
    assert record.rows("some") == [{"seed": 0, "value": 1}]
    record.append("some", {"seed": 1, "value": 2})
    assert record.rows("some") == [{"seed": 0, "value": 1}, {"seed": 1, "value": 2}]
    assert list(record.todo("some", [{"seed": 1}, {"seed": 2}])) == [{"seed": 2}]
    record.fill("some", [{"seed": 1}, {"seed": 2}], lambda key: {**key, "value": 3})
    assert record.rows("some")[2:] == [{"seed": 2, "value": 3}], "the missing row alone"


def test_a_figure_without_a_value_never_meets_its_goal_and_a_new_one_leaves_the_others(load: Load) -> None:
    record = load("record")
    lower = record.Figure(value=3.0, unit="s", goal=3.0, better="lower")
    assert lower.met is True
    assert record.Figure(value=3.1, unit="s", goal=3.0, better="lower").met is False
    assert record.Figure(value=None, unit="s", goal=3.0, better="lower").met is None
    assert record.Figure(value=2.9, unit="", goal=3.0, better="higher").met is False
    record.write("some", {"first": lower})
    path = record.write("some", {"second": record.Figure(value=None, unit="s", goal=1.0, better="lower")})
    figures = json.loads(path.read_text())["figures"]
    assert figures["first"]["value"] == 3.0
    assert figures["second"] == {"value": None, "unit": "s", "goal": 1.0, "better": "lower"}


def attack_row(seed: int, **changes: Any) -> dict[str, Any]:
    gates = [{"name": "attack success", "measured": 0.99, "limit": 0.9, "passed": True, "message": ""}]
    row = {"attack": "sig", "task": "mnist", "network": "badnets_cnn", "seed": seed, "gates": gates, "passed": True}
    return {**row, "accuracy": 0.99, "twin": 0.9931, "asr": 0.95, "base_rate": 0.001, **changes}


def test_the_table_of_an_attack_has_medians_ranges_and_the_gates_that_were_missed(load: Load) -> None:
    attacks = load("attacks")
    missed = [{"name": "attack success", "measured": 0.5, "limit": 0.9, "passed": False, "message": ""}]
    rows = [attack_row(0), attack_row(1, asr=0.97), attack_row(2, asr=0.5, gates=missed, passed=False)]
    other = attack_row(0, task="cifar10", network="fast_cifar", gates=missed, passed=False)
    form = attack_row(0, attack="sig (all-to-all)")
    assert attacks.table_of([*rows, other, form]) == [
        "| mnist | `badnets_cnn` | 3 | 99.00 (99.00 to 99.00) | 0.31 (0.31 to 0.31) | 95.00 (50.00 to 97.00) "
        "| 0.10 (0.10 to 0.10) | attack success (1 of 3) |",
        "| cifar10 | `fast_cifar` | 1 | 99.00 | 0.31 | 95.00 | 0.10 | attack success |",
        "| mnist, all-to-all | `badnets_cnn` | 1 | 99.00 | 0.31 | 95.00 | 0.10 | none |",
    ]


def test_a_model_that_was_gated_against_more_references_counts_in_its_place(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    attacks = load("attacks")
    kept = [attack_row(0, references=1), attack_row(1, references=1), attack_row(0, references=5, asr=0.5)]
    monkeypatch.setattr(attacks, "rows", lambda name: kept)
    assert [(row["seed"], row["references"]) for row in attacks.finished()] == [(0, 5), (1, 1)]


def test_the_table_of_an_attack_is_put_into_its_page_once_and_taken_out_again(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attacks = load("attacks")
    monkeypatch.setattr(attacks, "PICTURES", tmp_path)
    page, text = tmp_path / "sig.md", "# SIG\n\n## Figures\n\n| a |\n\n## Known departures\n\n- One.\n"
    page.write_text(text)
    attacks.write_table("sig", [attack_row(0)])
    once = page.read_text()
    assert (
        once.index("| a |") < once.index("| mnist | `badnets_cnn` | 1 |") < once.index("## Known departures\n\n- One.")
    )
    attacks.write_table("sig", [attack_row(0)])
    assert page.read_text() == once
    attacks.write_table("sig", [])
    assert page.read_text() == text


def test_rows_of_the_bank_come_back_where_the_bank_looks_for_them_the_latest_of_each(
    load: Load, tmp_path: Path
) -> None:
    bank = load("bank")
    name = bank.name_of("mnist5k", "badnets_cnn")
    for row in (
        {"name": "calibrate-clean-000", "accuracy": 0.5},
        {"name": "calibrate-clean-000", "asked": {}, "scores": {"strip": 0.1}},
        {"name": "calibrate-clean-000", "accuracy": 0.9},
    ):
        load("record").append(name, {"busy": 0.0, "row": row})
    folder = bank.restore("mnist5k", "badnets_cnn", tmp_path / "banks")
    assert json.loads((folder / "calibrate-clean-000.json").read_text())["accuracy"] == 0.9
    assert json.loads((folder / "scores/calibrate-clean-000.json").read_text())["scores"] == {"strip": 0.1}


def test_a_calibration_is_not_shipped_before_all_models_are_there(load: Load, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="198 models are not trained yet, calibrate-clean-000 first"):
        load("bank").ship("mnist5k", "badnets_cnn", tmp_path)


def test_a_model_that_was_finished_out_of_turn_before_a_kill_is_kept(load: Load, tmp_path: Path) -> None:
    bank, record = load("bank"), load("record")
    first, second = {"name": "calibrate-clean-000"}, {"name": "calibrate-clean-001", "asked": {}}
    record.append("bank-mnist5k-badnets_cnn", {"busy": 0.0, "row": first})
    folder = bank.restore("mnist5k", "badnets_cnn", tmp_path / "banks")
    (folder / "scores/calibrate-clean-001.json").write_text(json.dumps(second))
    for _ in range(2):
        bank.adopt("mnist5k", "badnets_cnn", folder)
        assert [one["row"] for one in record.rows("bank-mnist5k-badnets_cnn")] == [first, second]


def test_what_lies_on_disk_is_newer_than_what_was_kept_or_is_not_taken(load: Load, tmp_path: Path) -> None:
    bank, record = load("bank"), load("record")
    name = "bank-mnist5k-badnets_cnn"
    now = round(time.time())
    folder = tmp_path / "mnist5k-badnets_cnn"
    (folder / "scores").mkdir(parents=True)
    for number, at in ((0, now - 1000), (1, now + 1000)):
        row = {"name": f"calibrate-clean-00{number}", "digest": "of an older format"}
        record.append(name, {"busy": 0.0, "at": at, "row": row})
        (folder / f"{row['name']}.json").write_text(json.dumps({**row, "digest": "here"}))
    bank.adopt("mnist5k", "badnets_cnn", folder)
    bank.restore("mnist5k", "badnets_cnn", tmp_path)
    found = [json.loads((folder / f"calibrate-clean-00{n}.json").read_text())["digest"] for n in (0, 1)]
    assert found == ["here", "of an older format"]


def test_super_fine_tuning_is_judged_on_images_that_no_repair_saw(load: Load) -> None:
    from molehunt.tasks import get_task

    task = get_task("mnist5k")
    for develop in (False, True):
        mine, hidden = load("reproduce_super_fine_tuning").parts(task, 3, develop=develop)
        both = task.load("validation" if develop else "test")
        assert len(mine.y) == round(0.05 * len(task.load("train").y))
        assert len(mine.y) + len(hidden.y) == len(both.y)
        pictures = {x.numpy().tobytes() for x in mine.x} & {x.numpy().tobytes() for x in hidden.x}
        assert not pictures


def test_a_population_is_compared_image_by_image_and_a_short_one_counts_by_its_gate(load: Load) -> None:
    population = load("population")
    # Official: 2 models of 100 passes over 1 200 and 1 800 images in 30 s, so 1e-4 s an image. Ours: 8 models of 100
    # passes over 1 200 in 24 s, 2.5e-5 s: four times, not (30 / 2) / (24 / 8) = 5 times.
    row = {
        "official": {"models": 2, "seconds": 30.0, "images": 300_000},
        "equal": {"models": 8, "seconds": 24.0, "images": 960_000},
        "short": {"models": 64, "seconds": 19.2, "images": 64 * 12_000},
    }
    assert population.ratio(row, "equal") == pytest.approx(4.0)
    assert population.ratio(row, "short") == pytest.approx(40.0)
    gate = {"auc": {"official": [0.9, 0.8]}, "permuted_95": {"official": 0.56}, "lower_95_one_sided": -0.01}
    assert population.holds(gate)
    assert not population.holds({**gate, "lower_95_one_sided": -0.03})
    # Two classifiers that know nothing do not differ either.
    assert not population.holds({**gate, "auc": {"official": [0.9, 0.5]}})


def test_fine_pruning_is_tried_on_images_that_no_figure_uses(load: Load) -> None:
    from molehunt.tasks import get_task

    task = get_task("mnist5k")
    mine, hidden = load("reproduce_fine_pruning").parts(task, 3, develop=True)
    validation = {x.numpy().tobytes() for x in task.load("validation").x}
    seen = [{x.numpy().tobytes() for x in part.x} for part in (mine, hidden)]
    assert not seen[0] & seen[1]
    assert seen[0] | seen[1] == validation
    assert len(mine.y) + len(hidden.y) == len(task.load("validation").y)


PAGE = "# A defense\n\nWords.\n\n## Figures\n\n| a |\n\n## Known limits\n\n- One.\n"


def test_a_section_made_from_rows_is_put_where_it_belongs_and_replaced_the_next_time(
    load: Load, tmp_path: Path
) -> None:
    pages, page = load("pages"), tmp_path / "page.md"
    page.write_text(PAGE)
    assert pages.section(page, "Speed") == ""
    pages.put(page, "Speed", pages.written([], "How."), before="Known limits")
    assert pages.section(page, "Speed") == "Not measured yet.\n\nHow."
    assert page.read_text() == PAGE.replace(
        "## Known limits", "## Speed\n\nNot measured yet.\n\nHow.\n\n## Known limits"
    )
    pages.put(page, "Speed", pages.written(["| 3 |"], "How."), before="no such heading")
    assert page.read_text() == PAGE.replace("## Known limits", "## Speed\n\n| 3 |\n\nHow.\n\n## Known limits")
    pages.put(page, "Known limits", "None.", before="Figures")
    assert page.read_text().endswith("## Known limits\n\nNone.\n")
    with pytest.raises(ValueError, match="has no section 'Costs', and no 'Prices'"):
        pages.put(page, "Costs", "Many.", before="Prices")
    with pytest.raises(ValueError, match="one heading"):
        pages.put(page, "Speed", "Fast.\n\n## Another", before="Figures")


@pytest.mark.parametrize("name", ["rab_tables", "neural_cleanse_speed", "neural_cleanse_pairs", "neural_cleanse_bank"])
def test_sections_of_the_pages_say_what_their_rows_say(load: Load, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    script = load(name)
    monkeypatch.setattr(load("record"), "RESULTS", ROOT / "benchmarks/results")
    assert load("pages").section(script.PAGE, script.HEADING) == script.table(), f"collect the rows of {name}"


def bank_rows(settings: Any, **changes: Any) -> list[dict[str, Any]]:
    """Twenty clean models that score 0 to 1.9, and patches: two found, one under a wrong class, one not found."""
    place = {"task": "mnist", "network": "badnets_cnn", "partition": "evaluate", "settings": settings, "seconds": 2.0}
    clean = [{**place, "hidden": None, "works": False, "score": i / 10, "guess": 1} for i in range(20)]
    patches = [
        {"score": 8.0, "guess": 3, "iou": 0.6, "iou_anywhere": 0.7, "recovered_asr": 0.99},
        {"score": 6.0, "guess": 3, "iou": 0.4, "iou_anywhere": 0.7, "recovered_asr": 0.97},
        {"score": 5.0, "guess": 4, "iou": 0.0, "iou_anywhere": 0.2, "recovered_asr": 0.95},
        {"score": 0.5, "guess": 3, "iou": 0.1, "iou_anywhere": 0.2, "recovered_asr": 0.95},
    ]
    common = {**place, "hidden": "badnets", "works": True, "target": 3, "pixels": 16}
    return [*clean, *({**common, **patch, **changes} for patch in patches)]


def test_neural_cleanse_on_the_bank_counts_masks_where_the_target_is_named_and_nothing_that_fails_a_gate(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = load("neural_cleanse_bank")
    settings = script.configuration(script.NeuralCleanse())
    kept = bank_rows(settings)
    # A backdoor that does not work, a patch that is too large, and settings of another day.
    kept += [{**kept[-1], "works": False}, {**kept[-1], "pixels": 25}, {**kept[-1], "settings": {"restarts": 99}}]
    monkeypatch.setattr(script, "rows", lambda name: kept)
    ((place, found),) = script.answers().items()
    assert place == ("mnist", "badnets_cnn", "evaluate", "badnets")
    assert (found["clean"], found["patches"], found["detected"], found["named"]) == (20, 4, 3, 2)
    # Three above all clean ones; one above five of them and level with a sixth.
    assert found["auc"] == pytest.approx((3 + 5.5 / 20) / 4)
    assert found["iou"] == [0.6, 0.4]
    assert "| 20 | 4 | 0.819 (" in script.table()
    assert "| 3 of 4 | 2 of 3 | 0.50 (0.40 to 0.60) | 1 of 2 | 0.70 (0.70) |" in script.table()
    figures = script.figures_of(place, found)
    named = "Neural Cleanse, mnist, badnets_cnn, evaluate, badnets of the bank"
    assert figures[f"{named}, right target among detections"].value == pytest.approx(2 / 3)
    assert figures[f"{named}, IoU of the recovered patch"].value == pytest.approx(0.5)
    # Nobody is named: there is no mask to measure, which is not an overlap of 0.
    monkeypatch.setattr(script, "rows", lambda name: bank_rows(settings, guess=9))
    ((place, found),) = script.answers().items()
    assert f"{named}, IoU of the recovered patch" not in script.figures_of(place, found)
    assert "| 0 of 3 |  | 0 of 0 |  |" in script.table()


def test_only_small_patches_of_the_bank_and_its_clean_models_are_searched(load: Load) -> None:
    script = load("neural_cleanse_bank")
    listed = script.listed("mnist", "badnets_cnn", "evaluate")
    assert len([entry for entry in listed if not entry.planted]) == 100
    planted = [entry for entry in listed if entry.planted]
    assert {entry.kind for entry in planted} == {"badnets", "tact"}
    assert {int(script.patch_of(entry).mask.sum()) for entry in planted} == {9, 16}


def test_neural_cleanse_is_compared_image_by_image_and_extrapolated_to_ten_classes(load: Load) -> None:
    script = load("neural_cleanse_speed")
    # 2 ms an image against .5 ms; 10 classes of 1 000 sweeps of 992 images take 19 840 s, and a run of ours 20 s.
    row = {"official": {"seconds": 8.0, "images": 4_000}, "ours": {"seconds": 20.0, "images": 40_000}}
    found = script.sides([row], 1000)
    assert found["ratio"] == [pytest.approx(4.0)]
    assert found["official_seconds"] == [pytest.approx(19_840.0)]
    assert found["ratio_whole"] == [pytest.approx(992.0)]
    assert script.sides([row], 100)["ratio_whole"] == [pytest.approx(99.2)]


def test_the_loop_class_by_class_searches_for_real(load: Load) -> None:
    import torch

    from molehunt.testing import planted

    script, case = load("neural_cleanse_speed"), planted(target=3)
    assert case.suspect.clean is not None
    rule = replace(script.OFFICIAL, updates=5, batch=8)
    rng = torch.Generator().manual_seed(0)
    found = script.class_by_class(case.suspect.model, case.suspect.clean.x, rule, (3, 5), 3, rng)
    assert found["images"] == 2 * 3 * 5 * 8
    assert found["seconds"] > 0
    # With lambda at 0 both classes are reached within a few sweeps.
    assert min(found["success"]) >= 0.9


def test_pairs_of_digits_show_the_number_that_is_their_class(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    from molehunt.tasks import get_task

    script, digits = load("neural_cleanse_pairs"), get_task("mnist5k")
    monkeypatch.setattr(script, "get_task", lambda name: digits)
    task = script.pairs()
    known = {x.numpy().tobytes(): int(y) for x, y in zip(*digits.load("test"), strict=True)}
    x, y = task.load("test")
    assert tuple(x.shape) == (43 * 60, *task.shape)
    halves = [[known[half.contiguous().numpy().tobytes()] for half in x[..., at : at + 28]] for at in (0, 28)]
    assert [10 * left + right for left, right in zip(*halves, strict=True)] == y.tolist()
    assert sorted(set(y.tolist())) == list(range(43))


@pytest.fixture
def little(load: Load, tmp_path: Path) -> tuple[ModuleType, Any, Path]:
    """A small ensemble on embedded digits, and a folder with its layout."""
    script, state = load("rab_ensembles"), tmp_path / "state"
    script.Layout(block=2).write(state / "mntd_mnist-layout.json")
    return script, script.Case(task="mnist5k", images=60, members=3, epochs=6, batch=20, sigma=0.2), state


def test_an_ensemble_goes_on_from_the_blocks_that_are_finished(
    little: tuple[ModuleType, Any, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    script, case, state = little
    whole, cost = script.ensemble(case, state)
    about = script.material(case)
    assert tuple(whole.shape) == (3, 2 * 60)
    assert cost["taught"] == 3
    # Every member has learned something, and from noise of its own.
    assert min((row[:60] == about.y[:60]).double().mean() for row in whole) >= 0.7
    first, second = sorted(state.rglob("members-*"))
    kept = second.read_bytes()
    second.unlink()
    trained: list[list[int]] = []
    learned = script.learned

    def watched(about: Any, numbers: range) -> Any:
        trained.append(list(numbers))
        return learned(about, numbers)

    monkeypatch.setattr(script, "learned", watched)
    again, _ = script.ensemble(case, state)
    assert trained == [[2]], "the missing block alone"
    assert first.exists()
    assert (again == whole).all()
    assert len(second.read_bytes()) == len(kept)
    with pytest.raises(ValueError, match="holds other members"):
        script.read(first, replace(case, sigma=0.3), range(2))


def test_the_trigger_of_the_curves_has_the_norm_that_it_is_said_to_have(little: tuple[ModuleType, Any, Path]) -> None:
    script, case, _ = little
    about = script.material(case)
    change = (about.asked[60:] - about.asked[:60]).flatten(1)
    assert [float(norm) for norm in change.norm(dim=1)] == pytest.approx([case.norm] * 60)
    assert int((change != 0).sum(1).max()) == 1
    assert about.poisoned == 6
    assert set(about.y.tolist()) == {0, 1}


def test_a_member_that_diverges_votes_for_class_0_and_the_others_as_ever(
    little: tuple[ModuleType, Any, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    script, case, _ = little
    begun = script.begun

    def spoiled(about: Any, number: int) -> Any:
        network, images, rng = begun(about, number)
        return network, images._replace(x=images.x * float("nan")) if number == 1 else images, rng

    monkeypatch.setattr(script, "begun", spoiled)
    assert [network is None for network in script.learned(case, [0, 1])] == [False, True]


def passes_row(sigma: float, lower: list[float], **changes: Any) -> dict[str, Any]:
    row = {"what": "passes", "sigma": sigma, "members": 100, "passes": [2, 20], "images": None, "at": [0.0, 0.2]}
    return {**row, "difference": [0.01, -0.002], "lower_95_one_sided": lower, **changes}


def test_few_passes_are_enough_only_where_every_size_of_noise_says_so(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables = load("rab_tables")
    kept = [passes_row(0.5, [0.0, -0.009])]
    monkeypatch.setattr(tables, "rows", lambda name: kept)
    with pytest.raises(ValueError, match=r"no comparison of passes at sigma \[1.0\]"):
        tables.enough((0.5, 1.0))
    kept.append(passes_row(1.0, [0.0, 0.0], images=300))
    with pytest.raises(ValueError, match="no comparison"):
        tables.enough((0.5, 1.0))
    kept.append(passes_row(1.0, [0.02, -0.008]))
    assert tables.enough((0.5, 1.0))
    kept.append(passes_row(1.0, [0.02, -0.02]))
    assert not tables.enough((0.5, 1.0))
    assert "-0.20 points at worst (95 % one-sided: -2.00), so they are not enough" in tables.table()


def test_curves_are_told_as_rows_have_them_and_drawn(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    tables = load("rab_tables")
    at = [0.0, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0]
    curve = {"pictures": 200, "right": 0.95, "rate": [0.9, 0.8, 0.7, 0.6, 0, 0, 0]}
    curve["accuracy"] = [0.89, 0.79, 0.69, 0.59, 0, 0, 0]
    row = {"what": "curve", "task": "cifar10", "pair": [0, 2], "members": 250, "sigma": 1.0, "epochs": 10, "at": at}
    row |= {"images": None, "most": 0.4, "clean": curve, "triggered": {**curve, "right": 0.5}, "poison": 1.41421}
    timed = {"what": "speed", "task": "mnist", "pair": [0, 1], "epochs": 20, "images": None, "threads": 2}
    timed |= {"dtype": "bfloat16", "busy": 0.1, "ours": {"members": 8, "seconds": 10.0, "accuracy": 0.99}}
    # One member in 5 s against 8 in 10 s: four times as many.
    timed |= {side: {"members": 1, "seconds": 5.0, "accuracy": 0.99} for side in ("loader", "tensor")}
    monkeypatch.setattr(tables, "rows", lambda name: [{**row, "poisoned": 200}, timed, {**row, "images": 300}])
    told = tables.table()
    assert "| cifar10, airplane against bird | 250 | 1 | 10 | clean | 95.0 | 0.40 | 90.0 / 89.0 | 80.0 / 79.0 |" in told
    assert "- cifar10, airplane against bird: 1.41, on 200 rows." in told
    assert "4.00 (4.00) times those of a float32 loop with a data loader (goal 3.5)" in told
    assert "![RAB, 250 networks on cifar10, airplane against bird" in told
    assert "sigma 1: 90.0 % at 0, of which 89.0 % of all are right, none from 0.40 on](rab_curves.png)" in told
    figures = tables.figures()
    name = "RAB, cifar10, airplane against bird, N = 250, sigma 1, 10 passes, certified accuracy at 0.2"
    assert figures[name].value == 0.59
    assert not any(key.endswith("at 0.5") for key in figures), "beyond what unanimous votes certify"
    (rate,) = [figure for figure in figures.values() if figure.goal is not None]
    assert rate.met is True
    assert tables.picture_of(tables.whole("curve")).png.startswith(b"\x89PNG")


def test_the_curves_of_an_ensemble_are_those_of_its_votes(
    load: Load, little: tuple[ModuleType, Any, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from molehunt.defenses._certificates import clopper_pearson, gaussian_radius

    script, (ensembles, case, state) = load("rab_curves"), little
    case = replace(case, members=50, sigma=1.0)
    y = ensembles.material(case).y
    ballots = y.repeat(50, 1)
    ballots[:, 0] = 1 - y[0]  # all wrong on one clean picture
    ballots[45:, 1] = 1 - y[1]  # five of forty that bound are against another
    ballots[:10, 2] = 1 - y[2]  # those that choose are wrong, all others right: nothing is certified
    ballots[:, 60:] = 1  # under the trigger all say its class
    monkeypatch.setattr(script, "ensemble", lambda *asked: (ballots, {"seconds": 1.0, "taught": 50, "layout": {}}))
    row = script.curve({"what": "curve"}, case, state)
    low, most = (clopper_pearson(votes, 40, 0.001) for votes in (35, 40))
    assert row["most"] == pytest.approx(gaussian_radius(most, 1 - most, 1.0))
    clean = {at: (r, a) for at, r, a in zip(row["at"], row["clean"]["rate"], row["clean"]["accuracy"], strict=True)}
    assert row["clean"]["right"] == pytest.approx(58 / 60)
    assert clean[0.0] == pytest.approx((59 / 60, 58 / 60))
    beyond = min(at for at in clean if at >= gaussian_radius(low, 1 - low, 1.0))
    assert clean[beyond] == pytest.approx((58 / 60, 57 / 60))
    assert clean[2.0] == (0.0, 0.0)
    share = float((y[60:] == 1).double().mean())
    assert row["triggered"]["accuracy"][0] == pytest.approx(share)
    assert row["triggered"]["rate"][0] == 1.0
    assert row["poison"] == pytest.approx(6**0.5)
    # The same votes differ nowhere, and the interval says so.
    same = script.compared({}, case, case, state)
    assert same["difference"] == same["lower_95_one_sided"] == [0.0] * 4
