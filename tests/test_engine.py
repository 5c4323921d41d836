"""Deadlines, cancellation, and where work runs."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from molehunt.engine import Cancelled, Local, OutOfTime, Processes, Run


def test_a_run_without_limits_goes_on() -> None:
    run = Run()
    run.check()
    run.report(1, 2)
    assert run.remaining() is None
    assert run.scratch is None


def test_the_deadline_is_a_moment() -> None:
    run = Run(deadline=time.monotonic() + 100)
    left = run.remaining()
    assert left is not None
    assert 50 < left <= 100
    run.check()


def test_out_of_time_says_by_how_much() -> None:
    run = Run(deadline=time.monotonic() - 2)
    left = run.remaining()
    assert left is not None
    assert left < -1.9
    with pytest.raises(OutOfTime, match=r"\d+\.\d s ago"):
        run.check()


def test_the_user_comes_before_the_clock() -> None:
    run = Run(deadline=time.monotonic() - 2, cancelled=lambda: True)
    with pytest.raises(Cancelled, match="stopped by the user"):
        run.check()


def test_every_run_has_a_generator_of_its_own() -> None:
    before = torch.get_rng_state()
    first, second = Run(), Run()
    assert first.rng is not second.rng
    torch.rand(1, generator=first.rng)
    assert torch.equal(torch.get_rng_state(), before)


def test_local_keeps_the_order_and_works_when_asked() -> None:
    seen = []

    def numbers() -> Iterator[int]:
        for i in range(3):
            seen.append(i)
            yield i

    results = Local().map(lambda i: i * 10, numbers())
    assert seen == []
    assert next(results) == 0
    assert seen == [0]
    assert list(results) == [10, 20]


def work(item: int) -> tuple[int, int, int]:
    """What a worker is asked: late items are quicker, so that order is not luck."""
    if item == 4:
        raise ValueError("item 4 is bad")
    time.sleep(0.05 * (4 - item))
    return item, os.getpid(), torch.get_num_threads()


def test_processes_keep_the_order_and_raise_here() -> None:
    results = Processes(2, threads=1).map(work, range(5))
    found = [next(results) for _ in range(4)]
    assert [item for item, _, _ in found] == [0, 1, 2, 3]
    assert os.getpid() not in {pid for _, pid, _ in found}
    assert {threads for _, _, threads in found} == {1}
    with pytest.raises(ValueError, match="item 4 is bad"):
        next(results)


def die(item: int) -> int:
    if item == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return item


def test_when_the_work_is_done_no_worker_is_left() -> None:
    """Else the interpreter, if it ends soon after, finds a pipe closed that it wants to write to."""
    before = set(multiprocessing.active_children())
    assert list(Processes(2).map(abs, [-1, 2, -3])) == [1, 2, 3]
    assert not set(multiprocessing.active_children()) - before


def test_a_worker_that_was_killed_is_an_error_that_says_what_to_do() -> None:
    with pytest.raises(ChildProcessError, match="one of 2 worker processes was killed, most likely because memory"):
        list(Processes(2).map(die, range(4)))


def tell_and_wait(item: tuple[str, int]) -> None:
    folder, number = item
    (Path(folder) / str(number)).write_text(str(os.getpid()))
    time.sleep(60)


ORPHANS = """
import sys
sys.path.insert(0, sys.argv[2])
from molehunt.engine import Processes
from tests.test_engine import tell_and_wait

if __name__ == "__main__":
    list(Processes(2).map(tell_and_wait, [(sys.argv[1], i) for i in range(2)]))
"""


def gone(pid: int) -> bool:
    """Whether a process has ended; one that nobody has waited for yet has."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return True
    return state == "Z"


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks processes up in /proc")
def test_workers_end_when_their_parent_is_killed(tmp_path: Path) -> None:
    (tmp_path / "main.py").write_text(ORPHANS)
    told = tmp_path / "told"
    told.mkdir()
    root = Path(__file__).parent.parent
    parent = subprocess.Popen([sys.executable, str(tmp_path / "main.py"), str(told), str(root)])
    try:
        end = time.monotonic() + 60
        while len([path for path in told.iterdir() if path.read_text()]) < 2:
            assert time.monotonic() < end, "the workers never began"
            time.sleep(0.05)
    finally:
        parent.kill()
        parent.wait()
    pids = [int(path.read_text()) for path in told.iterdir()]
    end = time.monotonic() + 20
    while not all(gone(pid) for pid in pids):
        assert time.monotonic() < end, "the workers outlive their parent"
        time.sleep(0.05)


def test_no_work_needs_no_process() -> None:
    assert list(Processes(2).map(work, [])) == []


@pytest.mark.parametrize(("count", "threads"), [(0, 1), (1, 0)])
def test_refuses_no_processes_and_no_threads(count: int, threads: int) -> None:
    with pytest.raises(ValueError, match=f"got {count} and {threads}"):
        Processes(count, threads)
