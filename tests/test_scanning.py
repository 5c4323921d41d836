"""Scanning: on models whose truth is known, and on pictures that do not fit."""

import html
import io
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import nn

from molehunt import checkpoints, runner
from molehunt.calibration import Population, Reference
from molehunt.defenses import Defense, FinePruning, NeuralCleanse
from molehunt.examination import Inspect
from molehunt.findings import Abstention, Finding, Outcome
from molehunt.networks import Network, build
from molehunt.repair import REPAIR_FROM
from molehunt.report import ScanReport, answer, scan_html, scan_json, scan_text
from molehunt.scanning import clean_images, comparable, scan
from molehunt.suspect import Suspect
from molehunt.tasks import DEFENDER, TASKS, Images, Split, Task, get_task
from molehunt.testing import Planted, planted

QUICK: Mapping[str, Defense] = {"fine_pruning": FinePruning(), "neural_cleanse": NeuralCleanse()}
TARGET = 3


def ask(name: str, defense: Defense, suspect: Suspect) -> Outcome:
    return runner.inspect(defense, suspect, name=name, seed=0)


def case(*, backdoored: bool = True) -> Planted:
    """A model built by hand, or its clean twin."""
    return planted(backdoored=backdoored, target=TARGET, images=500)


def look(
    subject: Planted, inspect: Inspect = ask, population: Population | None = None, recipe: str | None = None
) -> ScanReport:
    model, clean = subject.suspect.model, subject.suspect.clean
    assert isinstance(model, Network)
    assert clean is not None
    return scan(
        model,
        subject.suspect.task,
        clean,
        name="a stranger's",
        defenses=QUICK,
        inspect=inspect,
        population=population,
        recipe=recipe,
        command="molehunt scan",
        notes=("A note.",),
    )


def population(report: ScanReport, score: float, count: int = 19) -> Population:
    """Clean models with about this score, in the settings of the scan."""
    finding = next(o for o in report.verdict.outcomes if o.defense == "neural_cleanse")
    assert isinstance(finding, Finding)
    return Population(
        task=report.task,
        network=report.network,
        recipe="usual",
        models=tuple(Reference(seed=i, scores={"neural_cleanse": score + i / 100}) for i in range(count)),
        defenses={"neural_cleanse": {"configuration": finding.record["configuration"], "stream": False}},
        dtype=finding.record["dtype"],
    )


@pytest.fixture(scope="module")
def found() -> ScanReport:
    return look(case())


def test_a_planted_backdoor_is_reported(found: ScanReport) -> None:
    verdict = found.verdict
    assert int(verdict.q.argmax()) == verdict.target == TARGET
    assert {o.defense for o in verdict.outcomes} == set(QUICK)
    assert found.asr is not None
    assert found.asr.before > 0.8
    assert found.accuracy is not None
    assert found.accuracy.before > 0.9
    assert (verdict.repaired is None) == (found.accuracy.after is None) == (found.asr.after is None)
    assert found.pictures is not None
    assert found.pictures.recovered is not None
    assert found.pictures.recovered_says == (found.classes[TARGET],) * len(found.pictures.clean)
    assert TARGET not in [found.classes.index(name) for name in found.pictures.clean_says]
    assert found.notes == ("A note.",)
    assert {"molehunt", "torch", "python"} <= found.versions.keys()


def test_references_decide(found: ScanReport) -> None:
    suspect = case()
    assert answer(found.verdict) == "unsure", "without references nothing is sure"
    assert answer(look(suspect, population=population(found, 2.0)).verdict) == "found"
    ordinary = look(suspect, population=population(found, 1000.0)).verdict
    assert ordinary.p < 0.5


@pytest.mark.parametrize(
    ("recipe", "dtype", "says"),
    [
        (None, None, "Recipe unknown: nothing says how this model was trained."),
        (
            "<b>odd</b>",
            None,
            "No calibration for the recipe of this model: it names '<b>odd</b>', the reference models",
        ),
        ("usual", "float16", "Another number format: the defenses worked in"),
    ],
)
def test_what_keeps_model_and_references_from_being_alike_is_said_everywhere(
    found: ScanReport, recipe: str | None, dtype: str | None, says: str
) -> None:
    known = population(found, 2.0)
    report = look(case(), population=replace(known, dtype=dtype or known.dtype), recipe=recipe)
    (warning,) = scan_json(report)["details"]["warnings"]
    assert warning.startswith(says)
    file = io.StringIO()
    Console(file=file, width=500, color_system=None).print(scan_text(report))
    assert warning in file.getvalue()
    page = scan_html(report)
    assert warning in html.unescape(page)
    assert "<b>odd</b>" not in page


def test_a_network_without_calibration_is_told_so(found: ScanReport) -> None:
    for said in (found.verdict.details["warnings"][0], scan_html(found)):
        assert "No calibration for this network" in said


def test_the_twin_is_less_suspicious(found: ScanReport) -> None:
    known = population(found, 2.0)
    backdoored, twin = (look(case(backdoored=b), population=known).verdict for b in (True, False))
    assert twin.p < backdoored.p


def test_no_opinion_is_not_clear() -> None:
    def silent(name: str, defense: Defense, suspect: Suspect) -> Outcome:
        return runner.inspect(defense, replace(suspect, clean=None), name=name, seed=0)

    report = look(case(), silent)
    assert answer(report.verdict) == "unsure"
    assert report.pictures is None
    assert report.asr is None


def test_the_defenses_do_not_see_what_their_answers_are_measured_on() -> None:
    seen: list[Images] = []

    def note(name: str, defense: Defense, suspect: Suspect) -> Outcome:
        assert suspect.clean is not None
        assert suspect.training is None
        seen.append(suspect.clean)
        return ask(name, defense, suspect)

    report = look(case(), note)
    assert {len(images.y) for images in seen} == {400}
    assert report.pictures is not None
    for picture in report.pictures.clean:
        assert not (seen[0].x == picture).flatten(1).all(1).any()


def test_a_model_for_something_else_is_noticed() -> None:
    twin = case(backdoored=False)
    clean = twin.suspect.clean
    assert clean is not None
    shifted = replace(twin.suspect, clean=Images(clean.x, (clean.y + 1) % 10))
    assert "right task" in look(replace(twin, suspect=shifted)).notes[-1]


def test_the_training_split_is_never_read(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Split] = []
    load = Task.load

    def noting(task: Task, split: Split) -> Images:
        asked.append(split)
        return load(task, split)

    monkeypatch.setattr(Task, "load", noting)
    first = clean_images(TASKS["mnist5k"], 0)
    assert set(asked) == {"test"}
    assert torch.equal(first.x, clean_images(TASKS["mnist5k"], 0).x)
    assert not torch.equal(first.y, clean_images(TASKS["mnist5k"], 1).y)


def folder_of_digits(folder: Path, per_class: int = 12, classes: int = 10) -> Path:
    """Real digits as a folder of pictures, one folder per class."""
    x, y = TASKS["mnist5k"].load("test")
    for k in range(classes):
        (folder / str(k)).mkdir(parents=True)
        for i, picture in enumerate(x[y == k][:per_class]):
            Image.fromarray((picture[0] * 255).round().numpy().astype(np.uint8)).save(folder / str(k) / f"{i}.png")
    return folder


def test_a_folder_gives_all_its_pictures(tmp_path: Path) -> None:
    pictures = get_task(f"folder:{folder_of_digits(tmp_path)}")
    images = clean_images(TASKS["mnist5k"], 0, pictures)
    assert torch.bincount(images.y).tolist() == [12] * 10
    assert len(images.y) <= DEFENDER
    assert len(set(images.y[:20].tolist())) > 3, "classes are mixed"


def test_pictures_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    pictures = get_task(f"folder:{folder_of_digits(tmp_path, classes=3)}")
    with pytest.raises(ValueError, match="3 classes, the model needs"):
        clean_images(TASKS["mnist5k"], 0, pictures)
    with pytest.raises(ValueError, match=r"size=HEIGHTxWIDTH"):
        clean_images(TASKS["cifar10"], 0, pictures)


def test_references_of_other_models_are_refused() -> None:
    known = Population(task="mnist5k", network="badnets_cnn")
    assert comparable(known, TASKS["mnist5k"], "badnets_cnn") is known
    for task, network in (("mnist", "badnets_cnn"), ("mnist5k", "lenet5")):
        with pytest.raises(ValueError, match="the references are badnets_cnn models of mnist5k"):
            comparable(known, TASKS[task], network)


@pytest.mark.parametrize("backdoored", [True, False])
def test_repairs_are_asked_only_where_one_may_be_taken(backdoored: bool, found: ScanReport) -> None:
    clean = population(found, 0.9)
    planted_ones = tuple(
        Reference(seed=100 + i, scores={"neural_cleanse": 40.0 + i}, attack=f"family {i % 4}") for i in range(40)
    )
    known = replace(clean, models=clean.models + planted_ones)
    asked = []

    def spy(name: str, defense: Defense, suspect: Suspect) -> Outcome:
        asked.append(name)
        # The twin looks cleaner than every reference, the planted one like the planted ones.
        outcome = ask(name, defense, suspect)
        assert isinstance(outcome, Finding)
        return outcome if outcome.score is None else replace(outcome, score=45.0 if backdoored else 0.1)

    report = look(case(backdoored=backdoored), spy, known)
    assert (report.verdict.p >= REPAIR_FROM) == backdoored
    assert asked == ["neural_cleanse", "fine_pruning"][: 1 + backdoored]
    repair = next(o for o in report.verdict.outcomes if o.defense == "fine_pruning")
    if backdoored:
        assert isinstance(repair, Finding)
        assert report.verdict.repaired is not None
    else:
        assert isinstance(repair, Abstention)
        assert "the submitted weights stand" in repair.reason
        assert report.verdict.repaired is None


def test_the_report_names_what_was_scanned_and_what_it_was_compared_with() -> None:
    task = get_task("mnist5k")
    images = task.secret(0)[0]
    some = Images(images.x[:50], images.y[:50])
    network = build("badnets_cnn", task.shape, task.num_classes)

    def looked(model: nn.Module, population: Population | None) -> ScanReport:
        return scan(model, task, some, name="m", defenses={}, inspect=unasked, population=population)

    def unasked(*_: object) -> Outcome:
        raise AssertionError("nobody is to be asked")

    known = Population(task="mnist5k", network="badnets_cnn", models=(Reference(seed=1),))
    first, second = looked(network, known), looked(network, replace(known, models=(Reference(seed=2),)))
    assert first.model_sha256 == checkpoints.digest(checkpoints.canonical(network.state_dict()))
    assert first.model_sha256 == second.model_sha256
    assert first.references_sha256 != second.references_sha256
    assert looked(network, None).references_sha256 == ""
    other = build("badnets_cnn", task.shape, task.num_classes, rng=torch.Generator().manual_seed(9))
    assert looked(other, known).model_sha256 != first.model_sha256
