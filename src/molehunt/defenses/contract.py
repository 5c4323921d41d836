"""What a defense is: a frozen dataclass that is called with a suspect and answers with a finding."""

from typing import ClassVar, Protocol

from molehunt.engine import Run
from molehunt.findings import Finding
from molehunt.suspect import Access, Suspect


class Defense(Protocol):
    """The dataclass is the configuration, calling it is the method.

    Attributes:
        needs: sets of evidence, any one of which suffices; where the suspect grants none of them the runner answers
            with an `Abstention` and never calls. `(frozenset(),)` needs the weights alone.
    """

    needs: ClassVar[tuple[frozenset[Access], ...]]

    def __call__(self, suspect: Suspect, run: Run) -> Finding:
        """Look at the suspect without changing it; randomness from `run.rng` alone; call `run.check()` often."""
        ...
