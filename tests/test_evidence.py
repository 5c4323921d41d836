"""A suspect as files: written once, read back equal, named by content."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from molehunt.evidence import Store, assemble, describe, digests
from molehunt.findings import Candidate
from molehunt.foreign import adapted, pixels
from molehunt.metas import Meta, Settings, digest
from molehunt.networks import Adapted, build
from molehunt.suspect import Access, Suspect
from molehunt.tasks import Images, Task
from molehunt.testing import planted
from molehunt.triggers import Patch, Sinusoid

TASK = Task(
    name="a" * 64, shape=(1, 16, 16), classes=("b" * 64, "cat"), augment="crop", network="lenet5", mean=(0.5,), std=(1,)
)


@pytest.fixture(scope="module")
def suspect() -> Suspect:
    rng = torch.Generator().manual_seed(0)
    first, second = (build("wrn_16_1", TASK.shape, 2, mean=(0.3,), std=(0.2,), rng=rng) for _ in range(2))
    images = Images(torch.rand(6, *TASK.shape, generator=rng), torch.randint(2, (6,), generator=rng))
    return Suspect.of(
        first,
        TASK,
        clean=images,
        training=Images(images.x[:4], images.y[:4]),
        inputs=images.x[2:],
        candidates=tuple(
            Candidate(trigger=t, target=1, defense="x") for t in (Patch.square(TASK.shape), Sinusoid(shape=TASK.shape))
        ),
        references=(second,),
        metas=(Meta(TASK.shape, 2, (0.3,), (0.2,), Settings(queries=3), rng),),
        dtype=torch.float32,
    )


def test_comes_back_equal(suspect: Suspect, tmp_path: Path) -> None:
    document = json.loads(json.dumps(describe(suspect, Store(tmp_path))))
    again = assemble(document, Store(tmp_path))
    assert again.task == TASK
    assert again.grants == frozenset(Access)
    assert (again.device, again.dtype) == (suspect.device, suspect.dtype)
    for a, b in ((again.clean, suspect.clean), (again.training, suspect.training)):
        assert a is not None
        assert b is not None
        assert torch.equal(a.x, b.x)
        assert torch.equal(a.y, b.y)
    assert suspect.inputs is not None
    assert torch.equal(again.logits(suspect.inputs), suspect.logits(suspect.inputs))
    assert again.references is not None
    assert suspect.references is not None
    assert torch.equal(again.references[0](suspect.inputs), suspect.references[0](suspect.inputs))
    assert again.metas is not None
    assert suspect.metas is not None
    assert digest(again.metas) == digest(suspect.metas)
    assert torch.equal(again.metas[0].scores([again.model]), suspect.metas[0].scores([suspect.model]))
    assert again.candidates is not None
    assert suspect.candidates is not None
    for mine, yours in zip(again.candidates, suspect.candidates, strict=True):
        assert (mine.target, mine.defense) == (yours.target, yours.defense)
        assert torch.equal(mine.trigger(suspect.inputs), yours.trigger(suspect.inputs))


def test_a_network_behind_layers_for_other_pictures_is_data_too(tmp_path: Path) -> None:
    inner = build("wrn_16_1", (3, 20, 20), 2, rng=torch.Generator().manual_seed(0))
    whole, _ = adapted(inner, TASK, name="stranger", pixels=pixels("signed", TASK), size=(20, 20), channels=3)
    suspect = Suspect.of(whole, TASK, dtype=torch.float32)
    again = assemble(json.loads(json.dumps(describe(suspect, Store(tmp_path)))), Store(tmp_path))
    x = torch.rand(2, *TASK.shape, generator=torch.Generator().manual_seed(1))
    assert torch.equal(again.logits(x), suspect.logits(x))
    assert isinstance(again.model, Adapted)
    assert again.model.name == "stranger"


def test_what_was_not_granted_stays_absent(suspect: Suspect, tmp_path: Path) -> None:
    nothing = dict.fromkeys(("clean", "training", "inputs", "candidates", "references", "metas"))
    bare = dataclasses.replace(suspect, **nothing)  # type: ignore[arg-type]
    document = describe(bare, Store(tmp_path))
    assert assemble(document, Store(tmp_path)).grants == frozenset()
    assert len(list(tmp_path.iterdir())) == 1
    empty = dataclasses.replace(bare, candidates=())
    assert assemble(describe(empty, Store(tmp_path)), Store(tmp_path)).candidates == ()


def test_names_every_file_and_nothing_else(suspect: Suspect, tmp_path: Path) -> None:
    document = describe(suspect, Store(tmp_path))
    found = set(digests(document))
    assert {path.name for path in tmp_path.iterdir()} == {f"{digest}.safetensors" for digest in found}


def test_equal_tensors_are_one_file_and_known_ones_are_not_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path)
    tensor = torch.arange(5.0)
    digest = store.put({"x": tensor})
    assert store.put({"x": tensor.clone()}) == digest
    assert len(list(tmp_path.iterdir())) == 1
    monkeypatch.setattr("safetensors.torch.save_file", None)
    assert store.put({"x": tensor}) == digest
    tensor.add_(1)
    with pytest.raises(TypeError):  # it would have to be read again
        store.put({"x": tensor})


def test_a_new_tensor_in_the_place_of_an_old_one_is_read(tmp_path: Path) -> None:
    store = Store(tmp_path)
    names = set()
    for value in range(50):
        names.add(store.put({"x": torch.full((3,), float(value))}))  # freed at once, so ids come back
    assert len(names) == 50
    assert len(store._known) <= 2


def test_writing_to_what_was_read_leaves_the_file_alone(tmp_path: Path) -> None:
    store = Store(tmp_path)
    digest = store.put({"x": torch.zeros(3)})
    store.get(digest)["x"].add_(1)
    assert store.get(digest)["x"].sum() == 0


def test_refuses_names_that_are_no_digests(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected a SHA-256"):
        Store(tmp_path).get("../secret")


def test_refuses_models_that_are_code(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(784, 2))
    with pytest.raises(ValueError, match="'Sequential'"):
        describe(Suspect.of(model, TASK), Store(tmp_path))
    with pytest.raises(ValueError, match="'planted'"):
        describe(planted().suspect, Store(tmp_path))
