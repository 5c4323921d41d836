"""One gate, and how a submission fared at it."""

from dataclasses import dataclass
from typing import Literal

Unit = Literal["share", "pixels"]
# Masks and patterns are float32: a square of exactly the allowed size must not fail by its last bit.
ROUNDING = 1e-6


@dataclass(frozen=True, kw_only=True)
class Gate:
    """One gate and how a submission fared at it.

    Attributes:
        name: what is measured.
        passed: whether the submission passed.
        measured: the measured value.
        limit: the value that it has to reach, or not to exceed.
        at_least: true if it has to reach the limit, false if it must not exceed it.
        unit: "share" for values in [0, 1], "pixels" for lengths.
        message: numbers behind the value and, where it failed, what to do.
    """

    name: str
    passed: bool
    measured: float
    limit: float
    at_least: bool
    unit: Unit = "share"
    message: str = ""

    @property
    def margin(self) -> float:
        """Room to spare, in the unit of the value; negative if the gate was missed."""
        return self.measured - self.limit if self.at_least else self.limit - self.measured
