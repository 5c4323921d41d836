"""A defense in a process of its own that sees the evidence and nothing else, for models and code of strangers.

A `Sandbox` keeps one warm process (`molehunt.zygote`) that forks a child per evaluation. The child has no network, no
credentials, no way to other processes, limited memory, time and disk, and can open only Python, the system's libraries
and the files of this evaluation. Its answer comes back as JSON and tensors and is checked like a stranger's. What the
walls are and what they do not stop is in `docs/extend/isolation.md`.
"""

import contextlib
import dataclasses
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

import molehunt
from molehunt import runner
from molehunt.aftermath import Ended, answer, bytes_below, failure, last_words
from molehunt.confinement import Limits, Unavailable
from molehunt.defenses import Defense
from molehunt.engine import never, silent
from molehunt.evidence import Store, describe
from molehunt.findings import Abstention, Cost, Failure, Outcome
from molehunt.suspect import Suspect

Json = dict[str, Any]
START = 180.0  # seconds for the warm process to import torch, on a slow disk under load
LOAD = 60.0  # seconds for a child to read the evidence and import the defense
DISK = 2**30  # bytes that an evaluation may leave on disk
# Variables that the warm process keeps: where things are and how to print, never who somebody is.
_KEPT = ("PATH", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "LD_LIBRARY_PATH", "GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
# The last two say how long threads wait busily for each other; see `molehunt.cli`.


class Sandbox:
    """Runs defenses confined, one at a time; make several for several at once. A context manager.

    Attributes:
        folder: where evidence and results lie meanwhile, once it has started.
        missing: walls that this system does not offer, in words; others stand in for them unless `strict` is off.

    Args:
        folder: where evidence and results lie meanwhile; a temporary folder by default.
        limits: memory, processor time and size of a file, for each evaluation.
        threads: of each evaluation; by default as many as this process uses.
        plugins: folders from which the code of foreign defenses is imported.
        hidden: paths that no evaluation may see, such as the sealed store; starting fails if one would be readable.
        strict: refuse to start where a wall is missing; else warn and go on.
    """

    def __init__(
        self,
        *,
        folder: Path | None = None,
        limits: Limits | None = None,
        threads: int | None = None,
        plugins: Sequence[Path] = (),
        hidden: Sequence[Path] = (),
        strict: bool = True,
    ) -> None:
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self._given = None if folder is None else folder.resolve()
        self.limits = limits or Limits()
        self.threads = threads
        self.plugins = tuple(path.resolve() for path in plugins)
        self.hidden = tuple(path.resolve() for path in hidden)
        self.strict = strict
        self.missing: tuple[str, ...] = ()
        self._zygote: subprocess.Popen[bytes] | None = None
        self._rest = b""
        self._busy = False  # a child is running, or may be
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        with self._lock:
            self._start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def inspect(
        self,
        defense: Defense,
        suspect: Suspect,
        *,
        name: str | None = None,
        seed: int,
        seconds: float | None = None,
        report: Callable[[int, int], None] | None = None,
        cancelled: Callable[[], bool] | None = None,
        scratch: Path | None = None,
    ) -> Outcome:
        """Ask one defense about one suspect; arguments and answer are those of `runner.inspect`.

        The clock is kept from outside: after `seconds` and `runner.grace` the child is killed, and once `cancelled`
        answers true, too. Images forward and backward are counted in the child and are a claim where its code is a
        stranger's; seconds and memory are measured here.

        Raises:
            KeyboardInterrupt: Ctrl-C; the child is killed first.
            ValueError: the defense cannot be made again from its configuration, the suspect's model is no `Network`, or
                the suspect is not on the CPU.
            Unavailable: a wall is missing, in strict mode.
        """
        name = name or runner.name_of(defense)
        if (reason := runner.missing(defense, suspect)) is not None:
            return Abstention(defense=name, reason=reason)
        if suspect.device.type != "cpu":
            raise ValueError(f"isolated evaluations run on the CPU, the suspect is on {suspect.device}")
        facts = runner.record(defense, suspect, seed=seed, seconds=seconds)
        document = {"class": facts["class"], "configuration": facts["configuration"], "name": name}
        if runner.configuration(runner.remake(document)) != facts["configuration"]:
            raise ValueError(f"{name} cannot be made again from its configuration {facts['configuration']}")
        threads = self.threads or torch.get_num_threads()
        with self._lock:
            self._start()
            request = {"defense": document, "suspect": describe(suspect, self.store), "seed": seed, "seconds": seconds}
            with self._working(scratch) as work:
                self._send(self._request(work, scratch, threads, seconds) | request)
                ended = self._watch([work, scratch or work], seconds, report or silent, cancelled or never)
                outcome = answer(work, ended, suspect)
        facts |= {"threads": threads, "isolation": {"memory": self.limits.memory, "missing": list(self.missing)}}
        claim = outcome.cost or Cost(seconds=0.0)
        forward, backward = (n if type(n) is int and n >= 0 else 0 for n in (claim.forward, claim.backward))
        cost = Cost(seconds=ended.seconds, forward=forward, backward=backward, peak_bytes=ended.peak_bytes)
        return dataclasses.replace(outcome, defense=name, cost=cost, record=facts)

    def close(self) -> None:
        """End the warm process and whatever it runs, and remove what lies in the temporary folder."""
        self._end()
        if self._temporary is not None:
            self._temporary.cleanup()
            self._temporary = None

    def _end(self) -> None:
        """End the warm process, which takes its child with it; the next evaluation starts another."""
        process, self._zygote, self._rest, self._busy = self._zygote, None, b"", False
        if process is None or process.stdin is None or process.stdout is None:
            return
        with contextlib.suppress(OSError):
            process.stdin.close()  # it kills its child and ends
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5.0)
        process.kill()
        process.wait()
        process.stdout.close()

    def _start(self) -> None:
        """Start the warm process if there is none and make sure that its walls hold."""
        if self._zygote is not None and self._zygote.poll() is None:
            return
        if not hasattr(os, "pidfd_open") or sys.platform != "linux":
            raise Unavailable(f"isolation needs Linux, this is {sys.platform}; run the defense with runner.inspect")
        self._end()
        if self._given is None:
            self._temporary = self._temporary or tempfile.TemporaryDirectory(prefix="molehunt-")
        self.folder = self._given or Path(self._temporary.name if self._temporary else "").resolve()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.store = Store(self.folder / "evidence")
        environment = {key: os.environ[key] for key in _KEPT if key in os.environ}
        environment |= {
            "PYTHONPATH": str(Path(molehunt.__file__).parents[1]),
            "PYTHONDONTWRITEBYTECODE": "1",
            "OPENBLAS_NUM_THREADS": "1",  # it would start threads on import, and a process with threads is not to fork
        }
        log = self.folder / "zygote.log"
        with log.open("wb") as errors:
            self._zygote = subprocess.Popen(
                # -P: not what happens to lie in the working folder, which may be the game's.
                [sys.executable, "-P", "-m", "molehunt.zygote"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=environment,
                start_new_session=True,  # Ctrl-C is ours to hand on
            )
        try:
            hello = next(self._events(time.monotonic() + START), None)
            if hello is None:
                raise RuntimeError(f"the sandbox did not start: {last_words(log)}")
            self._check_hidden(hello["readable"])
            self._check_walls()
        except BaseException:
            self.close()
            raise

    def _check_hidden(self, readable: Sequence[str]) -> None:
        """Refuse to work where what must stay hidden lies below what everybody may read."""
        for place in (*map(Path, readable), *self.plugins):
            for hidden in (*self.hidden, self.folder):
                if hidden.is_relative_to(place):
                    raise ValueError(f"{hidden} must stay hidden but lies in {place}, which every evaluation can read")

    def _check_walls(self) -> None:
        """Let a child try what no child may do."""
        with self._working(None) as work:
            canary = self.folder / "canary"
            canary.write_text("seen")
            self._send(self._request(work, None, 1, 60.0) | {"canary": str(canary)})
            found, ended = [], False
            for event in self._events(time.monotonic() + LOAD):
                found += [event["missing"]] if "missing" in event else []
                if "exit" in event:
                    ended = event["exit"] == 0
                    break
            output = last_words(work / "output.txt")
        if not ended:
            raise Unavailable(f"isolation is not available here: {output.strip().splitlines()[-1:] or 'no answer'}")
        self.missing = tuple(found)
        leaks = [text for text in found if text.startswith("the child can ")]
        if leaks and self.strict:
            raise Unavailable(f"isolation is not complete here: {'; '.join(found)}")
        if leaks:
            warnings.warn(f"isolation is not complete here: {'; '.join(found)}", RuntimeWarning, stacklevel=4)

    def _request(self, work: Path, scratch: Path | None, threads: int, seconds: float | None) -> Json:
        cpu = self.limits.cpu
        if seconds is not None:
            cpu = min(cpu, int(threads * (seconds + runner.grace(seconds) + LOAD)) + 1)
        return {
            "work": str(work),
            "store": str(self.store.folder),
            "scratch": None if scratch is None else str(scratch.resolve()),
            "threads": threads,
            "limits": dataclasses.asdict(self.limits) | {"cpu": cpu},
            "plugins": [str(path) for path in self.plugins],
            "readable": [str(path) for path in self._readable()],
            "strict": self.strict,
        }

    def _readable(self) -> Sequence[Path]:
        """What an evaluation may read beyond Python, the system's libraries and its own evidence."""
        return self.plugins

    @contextlib.contextmanager
    def _working(self, scratch: Path | None) -> Iterator[Path]:
        """A folder for one evaluation. However it ends, no child is left running."""
        if scratch is not None:
            scratch.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix="evaluation-", dir=self.folder))
        try:
            for name in ("scratch", "result"):
                (work / name).mkdir()
            yield work
        except BaseException:
            self._stop_child()
            raise
        finally:
            shutil.rmtree(work, ignore_errors=True)

    def _stop_child(self) -> None:
        """Kill the child that is running now, if there is one."""
        if self._busy:
            with contextlib.suppress(OSError):
                self._send("kill")
                for event in self._events(time.monotonic() + 5.0):
                    if "exit" in event:
                        return
            self._end()

    def _send(self, request: Json | str) -> None:
        assert self._zygote is not None
        assert self._zygote.stdin is not None
        text = request if isinstance(request, str) else json.dumps(request, allow_nan=False)
        self._busy = True
        self._zygote.stdin.write(text.encode() + b"\n")
        self._zygote.stdin.flush()

    def _events(self, until: float, pause: float | None = None) -> Iterator[Json]:
        """Events of the warm process until a moment or its end; with `pause` an empty event at least so often."""
        assert self._zygote is not None
        assert self._zygote.stdout is not None
        descriptor = self._zygote.stdout.fileno()
        while (left := until - time.monotonic()) > 0:
            ready, _, _ = select.select([descriptor], [], [], left if pause is None else min(left, pause))
            if not ready:
                yield {}
                continue
            data = os.read(descriptor, 2**16)
            if not data:
                return
            *lines, self._rest = (self._rest + data).split(b"\n")
            for event in map(json.loads, lines):
                self._busy &= "exit" not in event
                yield event

    def _watch(
        self,
        places: Sequence[Path],
        seconds: float | None,
        report: Callable[[int, int], None],
        cancelled: Callable[[], bool],
    ) -> Ended:
        """Follow a child to its end, which comes when it is done, or we or the kernel kill it."""
        began = time.monotonic()
        deadline = began + LOAD
        looked = began
        why: Failure | None = None
        for event in self._events(float("inf"), pause=0.1):
            now = time.monotonic()
            if "go" in event:
                began = now
                deadline = float("inf") if seconds is None else now + seconds + runner.grace(seconds)
            elif "progress" in event:
                done, total = event["progress"]
                report(done, total)
            elif "exit" in event:
                return Ended(event["exit"], now - began, event["peak_bytes"], why)
            if why is not None:
                continue
            if now > deadline:
                limit = LOAD if seconds is None or deadline == began + LOAD else seconds
                why = failure("time", f"killed: no answer within its {limit:g} s")
            elif cancelled():
                why = failure("cancelled", "killed: stopped by the user")
            elif now - looked > 0.5:
                looked = now
                if (size := sum(map(bytes_below, set(places)))) > DISK:
                    why = failure("died", f"killed: it wrote {size} bytes to disk, at most {DISK} are allowed")
            if why is not None:
                self._send("kill")
        self._end()
        return Ended(-signal.SIGKILL, time.monotonic() - began, 0, why or failure("died", "the sandbox itself died"))
