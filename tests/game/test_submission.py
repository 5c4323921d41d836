"""Submissions: packed alike whatever they hide, read strictly, and split where they arrive."""

import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from game.tricks import Trick, all_archives, archives, honest, parameters, torch_files
from molehunt import networks
from molehunt.attacks import BadNets
from molehunt.game import seal, submission
from molehunt.game.rules import Board
from molehunt.game.seal import Sealed
from molehunt.game.submission import (
    Manifest,
    SubmissionError,
    ingest,
    open_stored_seal,
    open_stored_set,
    pack,
    read_submission,
    sealed_path,
    weights_path,
    write_submission,
    write_training_set,
)
from molehunt.game.training_set import TrainingSet
from molehunt.tasks import TASKS
from molehunt.tensor_file import encode

TASK = honest.TASK


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A submission folder with a backdoor."""
    write_submission(tmp_path / "mine", honest.model(), honest.MANIFEST, honest.backdoor(), nonce=honest.NONCE)
    return tmp_path / "mine"


@pytest.mark.parametrize("trick", parameters(all_archives()))
def test_refuses(trick: Trick, tmp_path: Path) -> None:
    path = trick.make(tmp_path)
    with pytest.raises(SubmissionError, match=trick.says):
        ingest(path, tmp_path / "weights", tmp_path / "sealed")
    assert not (tmp_path / "weights").exists()
    assert not (tmp_path / "sealed").exists()


def test_there_are_enough_tricks() -> None:
    assert len(all_archives()) >= 25


def test_an_honest_archive_is_taken(tmp_path: Path) -> None:
    """The tricks spoil this one, so it must be good to begin with."""
    done = ingest(archives.plain(tmp_path / "a.zip"), tmp_path / "weights", tmp_path / "sealed")
    assert done.manifest == honest.MANIFEST


def test_what_is_written_packed_and_ingested_is_what_was_trained(folder: Path, tmp_path: Path) -> None:
    done = ingest(pack(folder), tmp_path / "weights", tmp_path / "sealed", task=TASK)
    content = weights_path(tmp_path / "weights", done.weights).read_bytes()
    assert hashlib.sha256(content).hexdigest() == done.weights
    assert content == b"".join(encode(honest.state()))
    assert done.manifest == honest.MANIFEST
    found = open_stored_seal(tmp_path / "sealed", done.commitment, TASK)
    assert (found.attack, found.target, found.details) == (
        "badnets",
        honest.backdoor().target,
        honest.backdoor().details,
    )


def test_weights_and_seals_go_to_stores_of_their_own(folder: Path, tmp_path: Path) -> None:
    done = ingest(pack(folder), tmp_path / "weights", tmp_path / "sealed")
    assert [path.name for path in (tmp_path / "weights").iterdir()] == [f"{done.weights}.safetensors"]
    assert [path.name for path in (tmp_path / "sealed").iterdir()] == [f"{done.commitment}.sealed"]
    assert (tmp_path / "sealed").stat().st_mode & 0o077 == 0
    assert sealed_path(tmp_path / "sealed", done.commitment).stat().st_mode & 0o077 == 0
    assert weights_path(tmp_path / "weights", done.weights).stat().st_mtime == 0
    everything = b"".join(path.read_bytes() for path in (tmp_path / "weights").iterdir())
    assert b"badnets" not in everything
    assert honest.NONCE not in everything


def test_ingesting_again_changes_nothing(folder: Path, tmp_path: Path) -> None:
    stores = tmp_path / "weights", tmp_path / "sealed"
    path = pack(folder)
    first = ingest(path, *stores)
    before = {p: p.read_bytes() for store in stores for p in store.iterdir()}
    assert ingest(path, *stores) == first
    assert {p: p.read_bytes() for store in stores for p in store.iterdir()} == before


def test_honest_and_backdoored_archives_have_the_same_size(folder: Path, tmp_path: Path) -> None:
    manifest = honest.MANIFEST
    write_submission(tmp_path / "other", networks.build(honest.NETWORK, TASK.shape, 10), manifest, Sealed())
    assert pack(folder).stat().st_size == pack(tmp_path / "other").stat().st_size


def test_packing_depends_on_the_contents_alone(folder: Path, tmp_path: Path) -> None:
    first = pack(folder, tmp_path / "a.zip").read_bytes()
    os.utime(folder / "manifest.json", (1, 1))
    (folder / "notes.txt").write_text("the trigger is yellow")
    (folder / "manifest.json").write_text(json.dumps(dict(reversed(honest.MANIFEST.model_dump().items())), indent=7))
    state = {**honest.state(), "bn.num_batches_tracked": torch.tensor(0)}
    state.pop("bn.num_batches_tracked")
    metadata = {"framework": "pt", "note": "poisoned"}
    (folder / "model.safetensors").write_bytes(safetensors.torch.save(dict(reversed(state.items())), metadata))
    second = pack(folder, tmp_path / "b.zip").read_bytes()
    assert first == second
    assert b"poisoned" not in second
    assert pack(folder) == folder.with_name("mine.zip")


def test_a_folder_reads_like_its_archive(folder: Path) -> None:
    one, other = read_submission(folder), read_submission(pack(folder))
    assert (one.manifest, one.envelope) == (other.manifest, other.envelope)
    assert all(torch.equal(value, other.state[name]) for name, value in one.state.items())
    assert one.open_seal().attack == "badnets"
    x = torch.rand(2, *TASK.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(one.model()(x), honest.model()(x))


@pytest.mark.parametrize("name", ["manifest.json", "model.safetensors", "sealed.bin"])
def test_a_folder_without_one_of_the_files_is_refused(name: str, folder: Path) -> None:
    (folder / name).unlink()
    with pytest.raises(SubmissionError, match=f"{name} is missing"):
        pack(folder)


def test_a_file_of_a_folder_has_the_same_limit_as_in_an_archive(folder: Path) -> None:
    (folder / "manifest.json").write_bytes(honest.MANIFEST.canonical().ljust(2**14 + 1))
    with pytest.raises(SubmissionError, match=r"manifest\.json has 16385 bytes; at most 16384"):
        read_submission(folder)


def test_the_private_files_are_for_the_team_alone(folder: Path) -> None:
    assert (folder / "sealed.bin").stat().st_mode & 0o077 == 0


def test_the_id_names_exactly_what_was_handed_in(folder: Path, tmp_path: Path) -> None:
    def id_of(manifest: Manifest, sealed: Sealed, nonce: bytes, model: torch.nn.Module) -> str:
        write_submission(tmp_path / "x", model, manifest, sealed, nonce=nonce)
        return ingest(pack(tmp_path / "x"), tmp_path / "weights", tmp_path / "sealed").id

    base = (honest.MANIFEST, honest.backdoor(), honest.NONCE, honest.model())
    other_model = networks.build(honest.NETWORK, TASK.shape, 10, rng=torch.Generator().manual_seed(2))
    ids = [
        id_of(*base),
        id_of(honest.MANIFEST.model_copy(update={"team": "B"}), *base[1:]),
        id_of(base[0], Sealed(), *base[2:]),
        id_of(*base[:2], bytes(32), base[3]),
        id_of(*base[:3], other_model),
    ]
    assert len(set(ids)) == 5
    assert id_of(*base) == ids[0]


def test_nonces_are_drawn_anew(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_submission(tmp_path / name, honest.model(), honest.MANIFEST, Sealed())
    assert (tmp_path / "a" / "sealed.bin").read_bytes() != (tmp_path / "b" / "sealed.bin").read_bytes()


def test_the_host_takes_only_what_the_round_allows(folder: Path) -> None:
    with pytest.raises(SubmissionError, match="for 'mnist5k', expected 'cifar10'"):
        read_submission(folder, task=TASKS["cifar10"])
    with pytest.raises(SubmissionError, match="unknown network 'wrn_16_1'; accepted here: lenet5"):
        read_submission(folder, allowed_networks=["lenet5"])


def test_a_task_of_one_s_own_must_be_given(tmp_path: Path) -> None:
    own = dataclasses.replace(TASK, name="folder:/home/me/pictures")
    manifest = honest.MANIFEST.model_copy(update={"task": own.name})
    with pytest.raises(SubmissionError, match="unknown task 'folder:/home/me/pictures'"):
        write_submission(tmp_path / "x", honest.model(), manifest, Sealed())
    write_submission(tmp_path / "x", honest.model(), manifest, Sealed(), task=own)
    assert read_submission(pack(tmp_path / "x", task=own), task=own).task == own


def test_a_model_that_is_broken_is_not_written(tmp_path: Path) -> None:
    model = honest.model()
    with torch.no_grad():
        model.head.bias[0] = float("nan")
    with pytest.raises(SubmissionError, match=r"model\.safetensors: 'head.bias' has values that are not finite"):
        write_submission(tmp_path / "x", model, honest.MANIFEST, Sealed())
    with pytest.raises(SubmissionError, match=r"model\.safetensors: missing"):
        write_submission(tmp_path / "x", torch.nn.Linear(2, 2), honest.MANIFEST, Sealed())
    assert not (tmp_path / "x").exists()


def test_a_stored_seal_that_was_changed_does_not_open(folder: Path, tmp_path: Path) -> None:
    done = ingest(pack(folder), tmp_path / "weights", tmp_path / "sealed")
    sealed_path(tmp_path / "sealed", done.commitment).write_bytes(seal.seal(Sealed(), TASK))
    with pytest.raises(SubmissionError, match="not the one that was committed to"):
        open_stored_seal(tmp_path / "sealed", done.commitment, TASK)
    with pytest.raises(SubmissionError, match="cannot open"):
        open_stored_seal(tmp_path / "sealed", "0" * 64, TASK)


class TestDataBoard:
    """Submissions that hand over a training set."""

    @pytest.fixture
    def handed(self, tmp_path: Path) -> Path:
        """The folder of a training set with a backdoor."""
        made = TrainingSet.of(
            BadNets(poison_rate=0.05)(TASK.load("train"), TASK, torch.Generator().manual_seed(0)),
            TASK.load("train"),
            torch.Generator().manual_seed(0),
        )
        write_training_set(tmp_path / "set", made, honest.HANDED, honest.backdoor(), nonce=honest.NONCE)
        return tmp_path / "set"

    def test_sets_and_seals_go_to_stores_that_only_their_owner_reads(self, handed: Path, tmp_path: Path) -> None:
        sets, sealed = tmp_path / "sets", tmp_path / "sealed"
        done = ingest(pack(handed), sets, sealed, board="data", task=TASK)
        assert done.training is not None
        assert (done.weights, done.manifest) == ("", honest.HANDED)
        assert [path.name for path in sets.iterdir()] == [f"{done.training}.safetensors"]
        path = weights_path(sets, done.training)
        assert hashlib.sha256(path.read_bytes()).hexdigest() == done.training
        assert (sets.stat().st_mode | path.stat().st_mode) & 0o077 == 0
        assert open_stored_set(sets, done.training, TASK).changes(TASK.load("train")) == (175, 175)
        assert open_stored_seal(sealed, done.commitment, TASK).attack == "badnets"
        assert done == ingest(pack(handed), sets, sealed, board="data")

    def test_a_stored_set_that_was_changed_is_not_used(self, handed: Path, tmp_path: Path) -> None:
        done = ingest(pack(handed), tmp_path / "sets", tmp_path / "sealed", board="data")
        assert done.training is not None
        weights_path(tmp_path / "sets", done.training).write_bytes(b"".join(honest.training_set().encode()))
        with pytest.raises(SubmissionError, match="not the one that was handed in"):
            open_stored_set(tmp_path / "sets", done.training, TASK)

    def test_honest_and_backdoored_sets_have_the_same_size(self, handed: Path, tmp_path: Path) -> None:
        write_training_set(tmp_path / "other", honest.training_set(), honest.HANDED, Sealed())
        assert pack(handed).stat().st_size == pack(tmp_path / "other").stat().st_size

    def test_a_submission_for_the_other_board_is_refused(self, handed: Path, folder: Path, tmp_path: Path) -> None:
        stores = tmp_path / "store", tmp_path / "sealed"
        with pytest.raises(SubmissionError, match="for the data board, the game is on the weights board"):
            ingest(pack(handed), *stores)
        with pytest.raises(SubmissionError, match="for the weights board, the game is on the data board"):
            ingest(pack(folder), *stores, board="data")
        assert not stores[0].exists()

    def test_a_submission_for_another_round_or_network_is_refused(
        self, handed: Path, folder: Path, tmp_path: Path
    ) -> None:
        stores = tmp_path / "store", tmp_path / "sealed"
        boards: list[tuple[Path, Board]] = [(pack(handed), "data"), (pack(folder), "weights")]
        for path, board in boards:
            with pytest.raises(SubmissionError, match=f"for round '{honest.MANIFEST.round}', this is round 'IV'"):
                ingest(path, *stores, board=board, round_="IV")
            with pytest.raises(SubmissionError, match=f"unknown network '{honest.NETWORK}'; accepted here: lenet5"):
                ingest(path, *stores, board=board, allowed_networks=["lenet5"])
            assert not stores[0].exists()
            ingest(path, *stores, board=board, round_=honest.MANIFEST.round, allowed_networks=[honest.NETWORK])
            shutil.rmtree(stores[0])

    def test_it_holds_no_model_and_replaces_one(self, handed: Path) -> None:
        contents = read_submission(handed)
        assert contents.board == "data"
        with pytest.raises(SubmissionError, match="the host trains the model from it"):
            contents.model()
        write_submission(handed, honest.model(), honest.MANIFEST, Sealed())
        assert read_submission(handed).board == "weights"
        write_training_set(handed, honest.training_set(), honest.HANDED, Sealed())
        assert read_submission(handed).board == "data"

    def test_what_the_host_would_refuse_is_not_written(self, tmp_path: Path) -> None:
        few = honest.training_set()
        few = dataclasses.replace(few, rows=few.rows[:9], x=few.x[:9], y=few.y[:9])
        with pytest.raises(SubmissionError, match=r"training\.safetensors: it lists 9 rows"):
            write_training_set(tmp_path / "x", few, honest.HANDED, Sealed())
        with pytest.raises(SubmissionError, match="by its own recipe"):
            write_training_set(tmp_path / "x", honest.training_set(), honest.MANIFEST, Sealed())
        assert not (tmp_path / "x").exists()


PARTS = honest.members()


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(sorted(PARTS)),
    st.lists(st.tuples(st.integers(0, 3000), st.integers(1, 255)), min_size=1, max_size=3),
)
def test_damaged_members_are_refused_or_read(name: str, flips: list[tuple[int, int]]) -> None:
    content = bytearray(PARTS[name])
    for place, bits in flips:
        content[place % len(content)] ^= bits
    with tempfile.TemporaryDirectory() as folder:
        path = archives.plain(Path(folder) / "damaged.zip", {name: bytes(content)})
        try:
            read_submission(path).open_seal()
        except SubmissionError:
            return


MEASURE = """
import json, resource, sys
from pathlib import Path
from molehunt.conversion import convert
from molehunt.files import Refused
from molehunt.game.submission import ingest
peaks = {}
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
base = peak()
for name in sorted(json.loads(sys.argv[1])):
    path = Path(name)
    try:
        if path.suffix == ".pt":
            convert(path, path.with_suffix(".out"))
        else:
            ingest(path, path.parent / "weights", path.parent / "sealed")
        raise SystemExit(f"{name} was accepted")
    except Refused:
        pass
children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
print(json.dumps({"more": peak() - base, "all": peak(), "children": children}))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_no_trick_takes_memory(tmp_path: Path) -> None:
    """All of them, one after the other, in one process: the worst one sets the peak."""
    paths = []
    for number, trick in enumerate(all_archives().values()):
        (tmp_path / str(number)).mkdir()
        paths.append(str(trick.make(tmp_path / str(number))))
    # Every trick goes through the converter's own test; here those that ask for memory, since each takes a process.
    for name in ("stride_of_zero", "compressed_bomb", "deep_nesting", "billion_laughs", "sizes_that_lie"):
        path = tmp_path / f"{name}.pt"
        path.write_bytes(torch_files.TRICKS[name].make())
        paths.append(str(path))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", MEASURE, json.dumps(paths)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    # In KiB. The zip bomb claims 64 MiB, the lies up to terabytes; what is held is a model and its copies.
    assert found["more"] < 150 * 2**10, found
    assert found["all"] < 2**20, found
    assert found["children"] < 2**20, found


def test_every_refusal_of_this_package_is_one_type() -> None:
    assert issubclass(submission.SubmissionError, ValueError)
