"""Ctrl-C: noted, so that what is under way can stop in order and is not mistaken for a failure."""

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Self

from rich.console import Console

RESUMES = "stopped; the same command goes on where it stopped"
ASKED = b"\nstopping at the next safe point; Ctrl-C again stops at once\n"


class Interrupt:
    """Notes that the user wants to stop; a context manager.

    Args:
        console: where to say goodbye.
        farewell: what to say when the work was stopped.
        gentle: the first Ctrl-C only sets a flag, for which the work looks often (`check`), so that nothing is lost
            that was done since the last save; the second one stops at once, as the first one does otherwise.
    """

    def __init__(self, console: Console, farewell: str, *, gentle: bool = False) -> None:
        self.asked = False
        self._gentle = gentle
        self._console, self._farewell = console, farewell
        self._before: signal._HANDLER = None
        self._installed = False

    def __enter__(self) -> Self:
        # Only the main thread may set handlers. A shell that starts a job in the background has it ignore Ctrl-C, which
        # is then meant for something else.
        self._before = signal.getsignal(signal.SIGINT)
        if threading.current_thread() is threading.main_thread() and self._before != signal.SIG_IGN:
            signal.signal(signal.SIGINT, self._ask)
            self._installed = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._installed:
            signal.signal(signal.SIGINT, self._before)
            self._installed = False
        if isinstance(error, KeyboardInterrupt):
            self._console.print(self._farewell)

    def check(self) -> None:
        """Stop here if the user asked to.

        Raises:
            KeyboardInterrupt: as said.
        """
        if self.asked:
            raise KeyboardInterrupt

    def cancelled(self) -> bool:
        """Whether the user asked to stop."""
        return self.asked

    def _ask(self, number: int, frame: FrameType | None) -> None:
        first, self.asked = not self.asked, True
        if not (self._gentle and first):
            raise KeyboardInterrupt
        os.write(2, ASKED)  # not through a console: the signal may have come in the middle of its own writing
