"""Ctrl-C: at once or at the next safe point, and the handler of before is back afterwards."""

import io
import signal
import threading
from collections.abc import Iterator

import pytest
from rich.console import Console

from molehunt.commands.interrupt import Interrupt


@pytest.fixture(autouse=True)
def _handler() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.signal(signal.SIGINT, before) is signal.default_int_handler


def press(times: int = 1) -> None:
    for _ in range(times):
        signal.raise_signal(signal.SIGINT)


def made(*, gentle: bool = False) -> tuple[Interrupt, io.StringIO]:
    told = io.StringIO()
    return Interrupt(Console(file=told), "stopped; goes on", gentle=gentle), told


def test_stops_at_once_and_says_so() -> None:
    interrupt, told = made()
    assert not interrupt.cancelled()
    with pytest.raises(KeyboardInterrupt), interrupt:
        press()
    assert interrupt.cancelled()
    assert told.getvalue() == "stopped; goes on\n"


def test_gently_it_waits_for_a_safe_point() -> None:
    interrupt, told = made(gentle=True)
    with interrupt:
        interrupt.check()
        press()
        assert interrupt.cancelled()
    assert told.getvalue() == ""
    with pytest.raises(KeyboardInterrupt), interrupt:
        interrupt.check()
    assert told.getvalue() == "stopped; goes on\n"


def test_the_second_one_does_not_wait() -> None:
    interrupt, _ = made(gentle=True)
    with pytest.raises(KeyboardInterrupt), interrupt:
        press(2)


def test_other_errors_pass_without_a_farewell() -> None:
    interrupt, told = made()
    with pytest.raises(ValueError, match="other"), interrupt:
        raise ValueError("other")
    assert told.getvalue() == ""


def test_a_background_job_goes_on_ignoring_it() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    interrupt, _ = made()
    with interrupt:
        press()
    assert not interrupt.cancelled()
    assert signal.signal(signal.SIGINT, before) is signal.SIG_IGN


def test_elsewhere_than_in_the_main_thread_nothing_is_set() -> None:
    seen = []

    def enter() -> None:
        with made()[0]:
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [signal.default_int_handler]
