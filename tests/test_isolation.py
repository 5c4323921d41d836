"""What an isolated evaluation cannot do, and that it answers as one in this process does."""

import dataclasses
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from mischief import Mischief
from molehunt import aftermath, confinement, isolation, runner
from molehunt.confinement import Limits, Unavailable
from molehunt.defenses import STRIP
from molehunt.engine import Run
from molehunt.findings import Abstention, Candidate, Failure, Finding
from molehunt.isolation import Sandbox
from molehunt.metas import Meta, Settings
from molehunt.networks import build
from molehunt.suspect import Access, Suspect
from molehunt.tasks import Images, Task
from molehunt.triggers import Patch, Sinusoid

HERE = Path(__file__).parent
TASK = Task(
    name="toy", shape=(1, 16, 16), classes=tuple("abcdefghij"), augment="none", network="wrn_16_1", mean=(0.5,),
    std=(0.25,),
)  # fmt: skip
MEMORY = 2**30


def unavailable() -> str:
    """Why nothing can be isolated here; empty if it can."""
    if sys.platform != "linux":
        return f"isolation needs Linux, this is {sys.platform}"
    if confinement.landlock_version() < 1:
        return "this kernel has no Landlock"
    if os.uname().machine not in confinement._CALLS:
        return f"no list of system calls for {os.uname().machine}"
    return ""


pytestmark = pytest.mark.skipif(
    bool(unavailable()), reason=f"NOT TESTED, untrusted code cannot run here: {unavailable()}"
)


@pytest.fixture(scope="module")
def suspect() -> Suspect:
    rng = torch.Generator().manual_seed(0)
    model = build("wrn_16_1", TASK.shape, 10, rng=rng)
    clean = Images(torch.rand(99, *TASK.shape, generator=rng), torch.randint(10, (99,), generator=rng))
    return Suspect.of(model, TASK, clean=clean, dtype=torch.float32)


@pytest.fixture(scope="module")
def sealed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("store") / "sealed.json"
    path.write_text("target class 7")
    return path


@pytest.fixture(scope="module")
def sandbox(sealed: Path) -> Iterator[Sandbox]:
    os.environ["MOLEHUNT_TEST_TOKEN"] = "secret"
    limits = Limits(memory=MEMORY, file=2**26)
    with Sandbox(plugins=[HERE], hidden=[sealed.parent], limits=limits, threads=1) as sandbox:
        yield sandbox
    del os.environ["MOLEHUNT_TEST_TOKEN"]


def details(outcome: object) -> Any:
    assert isinstance(outcome, Finding), outcome
    return dict(outcome.details)


def failure(outcome: object) -> Failure:
    assert isinstance(outcome, Failure), outcome
    return outcome


class TestWalls:
    """Each act succeeds in this process, or the test would prove nothing, and fails in the sandbox."""

    def both(self, sandbox: Sandbox, suspect: Suspect, act: str, where: object = "") -> tuple[Any, Any]:
        mischief = Mischief(act=act, where=str(where))
        return details(runner.inspect(mischief, suspect, seed=0)), details(sandbox.inspect(mischief, suspect, seed=0))

    @pytest.mark.parametrize("act", ["read", "read_late", "link"])
    def test_the_sealed_part_cannot_be_read(
        self,
        sandbox: Sandbox,
        suspect: Suspect,
        sealed: Path,
        act: str,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.chdir(tmp_path)
        open_, closed = self.both(sandbox, suspect, act, sealed)
        assert open_ == {"got": "target class 7"}
        assert closed == {"refused": "Permission denied"}

    def test_nor_listed(self, sandbox: Sandbox, suspect: Suspect, sealed: Path) -> None:
        open_, closed = self.both(sandbox, suspect, "listing", sealed.parent)
        assert open_ == {"got": ["sealed.json"]}
        assert closed == {"refused": "Permission denied"}

    @pytest.mark.parametrize("act", ["write", "truncate", "chmod"])
    def test_nothing_outside_can_be_changed(self, sandbox: Sandbox, suspect: Suspect, act: str, tmp_path: Path) -> None:
        path = tmp_path / "theirs"
        path.write_text("theirs")
        assert details(sandbox.inspect(Mischief(act=act, where=str(path)), suspect, seed=0)).keys() == {"refused"}
        assert path.read_text() == "theirs"
        assert details(runner.inspect(Mischief(act=act, where=str(path)), suspect, seed=0)).keys() == {"got"}
        assert path.stat().st_mode & 0o777 == 0 or path.read_text() != "theirs"

    def test_evidence_of_other_evaluations_cannot_be_listed(self, sandbox: Sandbox, suspect: Suspect) -> None:
        sandbox.inspect(Mischief(act="read"), suspect, seed=0)
        for folder in (sandbox.folder, sandbox.store.folder):
            open_, closed = self.both(sandbox, suspect, "listing", folder)
            assert open_["got"]
            assert closed == {"refused": "Permission denied"}

    def test_no_network(self, sandbox: Sandbox, suspect: Suspect) -> None:
        with socket.create_server(("127.0.0.1", 0)) as server, Serving(server):
            open_, closed = self.both(sandbox, suspect, "connect", server.getsockname()[1])
        assert open_ == {"got": "hello"}
        assert closed.keys() == {"refused"}

    def test_no_sockets_in_the_file_system(self, sandbox: Sandbox, suspect: Suspect, tmp_path: Path) -> None:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(tmp_path / "s"))
            server.listen()
            with Serving(server):
                open_, closed = self.both(sandbox, suspect, "connect_unix", tmp_path / "s")
        assert open_ == {"got": "hello"}
        assert closed.keys() == {"refused"}

    def test_no_credentials(self, sandbox: Sandbox, suspect: Suspect) -> None:
        open_, closed = self.both(sandbox, suspect, "environment")
        assert open_["got"]["MOLEHUNT_TEST_TOKEN"] == "secret"
        assert "secret" not in str(closed)
        allowed = {*isolation._KEPT, "PYTHONPATH", "PYTHONDONTWRITEBYTECODE", "OPENBLAS_NUM_THREADS", "HOME", "TMPDIR"}
        # torch may set variables of its own for its libraries.
        assert all(k in allowed or k.startswith(("TORCH", "KMP", "PYTORCH")) for k in closed["got"])

    @pytest.mark.parametrize("act", ["environment_of_parent", "fork", "kill_parent"])
    def test_no_other_processes(self, sandbox: Sandbox, suspect: Suspect, act: str) -> None:
        open_, closed = self.both(sandbox, suspect, act)
        assert open_.keys() == {"got"}
        assert closed.keys() == {"refused"}

    def test_no_programs(self, sandbox: Sandbox, suspect: Suspect) -> None:
        # In this process it would replace the test run.
        assert details(sandbox.inspect(Mischief(act="execute"), suspect, seed=0)).keys() == {"refused"}

    def test_no_descriptors(self, sandbox: Sandbox, suspect: Suspect) -> None:
        with Path(__file__).open():
            open_, closed = self.both(sandbox, suspect, "descriptors")
        assert open_["got"]
        assert closed == {"got": [3]}  # the pipe for its progress

    @pytest.mark.parametrize(("act", "got"), [("threads", 800), ("lazy_import", "colorsyswave"), ("scratch", "kept")])
    def test_what_honest_defenses_need_still_works(
        self, sandbox: Sandbox, suspect: Suspect, act: str, got: object
    ) -> None:
        assert details(sandbox.inspect(Mischief(act=act), suspect, seed=0)) == {"got": got}


class Serving:
    """Greets one connection."""

    def __init__(self, server: socket.socket) -> None:
        self.server = server
        self.thread = threading.Thread(target=self.greet, daemon=True)

    def greet(self) -> None:
        connection, _ = self.server.accept()
        with connection:
            connection.sendall(b"hello")

    def __enter__(self) -> None:
        self.thread.start()

    def __exit__(self, *_: object) -> None:
        self.thread.join(5)


class TestLimits:
    def ask(self, sandbox: Sandbox, suspect: Suspect, act: str, **settings: Any) -> Failure:
        return failure(sandbox.inspect(Mischief(act=act), suspect, seed=0, **settings))

    @pytest.mark.parametrize("act", ["allocate", "allocate_slowly"])
    def test_memory(self, sandbox: Sandbox, suspect: Suspect, act: str) -> None:
        found = self.ask(sandbox, suspect, act, seconds=60)
        assert found.kind == "memory"
        assert found.cost is not None
        assert found.cost.peak_bytes < MEMORY + 2**30

    @pytest.mark.parametrize("act", ["sleep", "spin"])
    def test_time(self, sandbox: Sandbox, suspect: Suspect, act: str) -> None:
        found = self.ask(sandbox, suspect, act, seconds=0.2)
        assert found.kind == "time"
        assert found.message == "killed: no answer within its 0.2 s"
        assert found.cost is not None
        assert 1.2 < found.cost.seconds < 100

    def test_processor_time(self, sandbox: Sandbox, suspect: Suspect, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sandbox, "limits", dataclasses.replace(sandbox.limits, cpu=2))
        found = self.ask(sandbox, suspect, "spin")
        assert (found.kind, found.message) == ("time", "killed by the system: its processor time is used up")

    def test_disk(self, sandbox: Sandbox, suspect: Suspect, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(isolation, "DISK", 2**24)
        found = self.ask(sandbox, suspect, "fill_disk", seconds=60)
        assert found.kind == "died"
        assert "to disk" in found.message

    def test_size_of_a_file(self, sandbox: Sandbox, suspect: Suspect) -> None:
        found = self.ask(sandbox, suspect, "large_file", seconds=60)
        assert "File too large" in found.message

    def test_segfault(self, sandbox: Sandbox, suspect: Suspect) -> None:
        found = self.ask(sandbox, suspect, "segfault")
        assert (found.kind, found.message) == ("died", "died of SIGSEGV")
        assert "string_at" in found.trace
        assert found.record["configuration"] == {"act": "segfault", "where": ""}

    def test_leaving_without_an_answer(self, sandbox: Sandbox, suspect: Suspect) -> None:
        found = self.ask(sandbox, suspect, "leave")
        assert found.kind == "raised"
        assert "does not hold" in found.message

    def test_cancelled(self, sandbox: Sandbox, suspect: Suspect) -> None:
        until = time.monotonic() + 0.5
        found = self.ask(sandbox, suspect, "sleep", cancelled=lambda: time.monotonic() > until)
        assert found.kind == "cancelled"

    def test_control_c_kills_the_child(self, sandbox: Sandbox, suspect: Suspect) -> None:
        calls = []

        def interrupt() -> bool:
            calls.append(1)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return False

        with pytest.raises(KeyboardInterrupt):
            sandbox.inspect(Mischief(act="sleep"), suspect, seed=0, cancelled=interrupt)
        assert sandbox._zygote is not None
        assert children(sandbox._zygote.pid) == []
        assert details(sandbox.inspect(Mischief(act="scratch"), suspect, seed=0)) == {"got": "kept"}


def children(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


class TestAnswers:
    @pytest.mark.parametrize(
        ("act", "message"),
        [
            ("not_a_number", "not all values are finite"),
            ("change_weights", "changed normalize"),
            ("forged rubbish", "does not hold"),
            ("forged verdict", "does not answer with a Abstention"),
            ("forged path", "expected a SHA-256"),
            ("forged scores", "does not hold"),
            ("forged nest", "JSON nested 100000 deep"),
            ("forged twice", "is there twice"),
            ("forged length", "bytes of text"),
        ],
    )
    def test_a_wrong_answer_is_a_failure(self, sandbox: Sandbox, suspect: Suspect, act: str, message: str) -> None:
        found = failure(sandbox.inspect(Mischief(act=act), suspect, seed=0))
        assert found.kind == "raised"
        assert message.removesuffix(" normalize") in found.message

    def test_a_tensor_counts_as_often_as_it_is_mentioned(
        self, sandbox: Sandbox, suspect: Suspect, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert isinstance(sandbox.inspect(Mischief(act="repeat"), suspect, seed=0), Finding)
        monkeypatch.setattr(aftermath, "ANSWER", 20 * 400)
        found = failure(sandbox.inspect(Mischief(act="repeat"), suspect, seed=0))
        assert "its answer mentions tensors of" in found.message

    def test_name_record_and_cost_are_ours(self, sandbox: Sandbox, suspect: Suspect) -> None:
        found = sandbox.inspect(Mischief(act="forged cost"), suspect, seed=3)
        assert isinstance(found, Finding)
        assert found.defense == "mischief"
        assert found.record["seed"] == 3
        assert found.cost is not None
        assert found.cost.seconds > 0
        assert found.cost.peak_bytes > 2**20
        assert (found.cost.forward, found.cost.backward) == (0, 0)

    def test_progress_is_relayed_and_chatter_is_not(self, sandbox: Sandbox, suspect: Suspect) -> None:
        seen: list[tuple[int, int]] = []
        found = sandbox.inspect(Mischief(act="chatter"), suspect, seed=0, report=lambda d, t: seen.append((d, t)))
        assert isinstance(found, Finding)
        assert seen == [(7, 9), (1, 4), (4, 4)]

    def test_abstains_without_a_process(self, suspect: Suspect) -> None:
        blind = dataclasses.replace(suspect, clean=None)
        assert isinstance(Sandbox().inspect(STRIP(), blind, seed=0), Abstention)

    def test_is_the_answer_of_this_process(self, sandbox: Sandbox, suspect: Suspect) -> None:
        """All kinds of evidence arrive, and the same numbers come back."""
        assert suspect.clean is not None
        patch = Patch.square(TASK.shape, color="white")
        wave = Sinusoid(shape=TASK.shape)
        full = Suspect.of(
            suspect.model, TASK, clean=suspect.clean, training=suspect.clean, inputs=patch(suspect.clean.x[:8]),
            candidates=tuple(Candidate(trigger=t, target=3, defense="a") for t in (patch, wave)),
            references=(suspect.model, suspect.model), dtype=torch.float32,
            metas=(Meta(TASK.shape, 10, TASK.mean, TASK.std, Settings(queries=3), torch.Generator().manual_seed(1)),),
        )  # fmt: skip
        ours = runner.inspect(Everything(), full, seed=5, seconds=60)
        theirs = sandbox.inspect(Everything(), full, seed=5, seconds=60)
        assert isinstance(ours, Finding)
        assert isinstance(theirs, Finding), theirs
        assert theirs.score == ours.score
        assert theirs.class_scores is not None
        assert ours.class_scores is not None
        assert torch.equal(theirs.class_scores, ours.class_scores)
        assert theirs.repaired is not None
        assert ours.repaired is not None
        assert all(torch.equal(theirs.repaired[k], v) for k, v in ours.repaired.items())
        assert theirs.details == ours.details
        assert theirs.cost is not None
        assert ours.cost is not None
        assert (theirs.cost.forward, theirs.cost.backward) == (ours.cost.forward, ours.cost.backward)
        assert theirs.cost.forward > 0
        assert {k: v for k, v in theirs.record.items() if k != "isolation"} == ours.record

    def test_real_defense(self, sandbox: Sandbox, suspect: Suspect) -> None:
        assert suspect.clean is not None
        full = Suspect.of(suspect.model, TASK, clean=suspect.clean, inputs=suspect.clean.x[:8], dtype=torch.float32)
        ours, theirs = (ask(STRIP(), full, seed=5) for ask in (runner.inspect, sandbox.inspect))
        assert isinstance(ours, Finding)
        assert isinstance(theirs, Finding), theirs
        assert theirs.score == ours.score


@dataclasses.dataclass(frozen=True, kw_only=True)
class Everything:
    """Uses all evidence and fills in all fields."""

    needs: ClassVar[tuple[frozenset[Access], ...]] = (frozenset(Access),)
    shares: tuple[float, ...] = (0.5, 0.25)

    def __call__(self, suspect: Suspect, run: Run) -> Finding:
        """Mix everything into a few numbers."""
        assert suspect.clean is not None
        assert suspect.training is not None
        assert suspect.inputs is not None
        assert suspect.candidates is not None
        assert suspect.references is not None
        assert suspect.metas is not None
        x = suspect.clean.x[:4].clone().requires_grad_()
        suspect.forward(x).sum().backward()  # type: ignore[no-untyped-call]
        assert x.grad is not None
        stamped = [suspect.logits(c.trigger(suspect.training.x)).mean(0) for c in suspect.candidates]
        references = sum(float(m(suspect.inputs).sum()) for m in suspect.references)
        noise = torch.rand(10, generator=run.rng)
        read = sum(float(meta.scores([suspect.model]).amax()) for meta in suspect.metas)
        return Finding(
            defense="?",
            score=float(x.grad.sum()) + references + read + float(suspect.training.y.sum()),
            class_scores=torch.stack(stamped).sum(0) + noise,
            input_scores=suspect.logits(suspect.inputs).amax(1),
            trigger=suspect.candidates[0].trigger,
            target=suspect.candidates[0].target,
            repaired=suspect.model.state_dict(),
            details={"candidates": [c.defense for c in suspect.candidates], "shares": self.shares},
        )


class TestStart:
    def test_a_readable_secret_is_refused(self, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
        sandbox._check_hidden(["/usr"])
        with pytest.raises(ValueError, match="must stay hidden"):
            sandbox._check_hidden([str(sandbox.folder.parent)])
        monkeypatch.setattr(sandbox, "hidden", (HERE / "store",))
        with pytest.raises(ValueError, match="must stay hidden"):
            sandbox._check_hidden([])  # it lies in a plug-in's folder

    def test_a_leak_is_refused_or_at_least_said(self, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
        sandbox._check_walls()
        monkeypatch.setattr(sandbox, "_readable", lambda: [sandbox.folder])
        with pytest.raises(Unavailable, match="the child can read files of others"):
            sandbox._check_walls()
        monkeypatch.setattr(sandbox, "strict", False)
        with pytest.warns(RuntimeWarning, match="read files of others"):
            sandbox._check_walls()
        assert list(sandbox.missing) == ["the child can read files of others"]
        monkeypatch.undo()
        sandbox._check_walls()
        assert list(sandbox.missing) == []

    def test_a_defense_that_cannot_be_made_again(self, sandbox: Sandbox, suspect: Suspect) -> None:
        class Rounded(str):
            def __eq__(self, other: object) -> bool:
                return False

            __hash__ = str.__hash__

        with pytest.raises(ValueError, match="cannot be made again"):
            sandbox.inspect(Mischief(act=Rounded("read")), suspect, seed=0)

    def test_a_model_that_is_code(self, sandbox: Sandbox) -> None:
        model = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.Flatten(), torch.nn.Linear(784, 10))
        with pytest.raises(ValueError, match="only what `build` makes"):
            sandbox.inspect(Mischief(act="read"), Suspect.of(model, TASK), seed=0)

    def test_nothing_is_left_behind(self, suspect: Suspect, tmp_path: Path) -> None:
        with Sandbox(folder=tmp_path, plugins=[HERE]) as sandbox:
            assert sandbox._zygote is not None
            assert sandbox._zygote.stdin is not None
            pid = sandbox._zygote.pid
            found = sandbox.inspect(
                Mischief(act="write", where="mine/note"), suspect, seed=0, scratch=tmp_path / "mine"
            )
            assert details(found) == {"refused": "No such file or directory"}  # relative to a folder of its own
            note = tmp_path / "mine" / "note"
            found = sandbox.inspect(Mischief(act="write", where=str(note)), suspect, seed=0, scratch=note.parent)
            assert details(found) == {"got": "written"}
            assert {p.name for p in tmp_path.iterdir()} == {"evidence", "canary", "mine", "zygote.log"}

            # What the kernel does when this process dies: the pipe closes. Warm process and child must go.
            processes: list[str] = []

            def die() -> bool:
                processes[:] = [str(pid), *children(pid)]
                if len(processes) == 2 and sandbox._zygote is not None and sandbox._zygote.stdin is not None:
                    sandbox._zygote.stdin.close()
                return False

            found = sandbox.inspect(Mischief(act="sleep"), suspect, seed=0, cancelled=die)
            assert failure(found).message == "the sandbox itself died"
            until = time.monotonic() + 10
            while any(Path(f"/proc/{p}").exists() for p in processes) and time.monotonic() < until:
                time.sleep(0.05)
            assert not any(Path(f"/proc/{p}").exists() for p in processes)


def test_only_linux_can_isolate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(Unavailable, match="needs Linux"), Sandbox():
        pass
