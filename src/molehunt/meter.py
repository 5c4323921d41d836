"""What a call costs, measured from outside: seconds, images forward and backward, memory. Methods count nothing."""

import resource
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch._C import _functorch
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils.hooks import RemovableHandle

from molehunt.findings import Cost

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Meter:
    """Measures everything between `with meter:` and its end; `cost()` may be asked at any time.

    An image counts as forward when a module that no other module called takes pictures of the task's height and width
    and puts out K logits: a whole network, whoever owns it, also a copy that a repair trains and a model that is run
    through `torch.func`. It counts as backward whenever a gradient arrives at those logits. Parts of a network (a head
    on kept features) count nothing; a network that is stopped half-way by an exception counts whole. What runs on
    other threads, in other processes, or without modules is not seen.

    The hooks cost about 2 microseconds per module call and are gone when the `with` ends, however it ends.

    Args:
        shape: (C, H, W) of the task's pictures.
        classes: K.
        device: a GPU is waited for before the clock is read.
    """

    def __init__(self, shape: tuple[int, int, int], classes: int, device: torch.device | None = None) -> None:
        self.shape = shape
        self.classes = classes
        self.device = device
        self.forward = 0
        self.backward = 0
        self._depth = 0
        self._thread = 0
        self._began = 0.0
        self._seconds: float | None = None
        self._peak = 0
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Self:
        self._thread = threading.get_ident()
        reset_peak()
        self._handles = [
            register_module_forward_pre_hook(self._enter),
            # always_call, or a forward pass that raises would leave the depth wrong for all that follow.
            register_module_forward_hook(self._leave, always_call=True),
        ]
        self._began = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        if self.device is not None and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self._seconds = time.perf_counter() - self._began
        self._peak = peak_bytes()

    def cost(self) -> Cost:
        """The cost so far, or of the whole block once it has ended."""
        ended = self._seconds is not None
        return Cost(
            seconds=self._seconds if self._seconds is not None else time.perf_counter() - self._began,
            forward=self.forward,
            backward=self.backward,
            peak_bytes=self._peak if ended else peak_bytes(),
        )

    def _enter(self, _module: nn.Module, _inputs: Any) -> None:
        if threading.get_ident() == self._thread:
            self._depth += 1

    def _leave(self, _module: nn.Module, inputs: Any, output: Any) -> None:
        if threading.get_ident() != self._thread:
            return
        self._depth -= 1
        if self._depth or not inputs or not isinstance(inputs[0], Tensor):
            return
        if inputs[0].ndim < 3 or tuple(inputs[0].shape[-2:]) != self.shape[1:]:
            return
        if output is None:  # an exception stopped the pass; how far it came is unknown
            self.forward += _values(inputs[0]) // (self.shape[0] * self.shape[1] * self.shape[2])
        elif (
            isinstance(output, Tensor)
            and 1 <= output.ndim <= inputs[0].ndim - 2  # (N, K) of (N, C, H, W): a feature map is no answer
            and output.shape[-1] == self.classes
        ):
            # The logits are counted, not the pictures: many networks side by side may share one batch of pictures.
            self.forward += _values(output) // self.classes
            if output.requires_grad:
                output.register_hook(self._arrived())  # type: ignore[no-untyped-call]

    def _arrived(self) -> Callable[[Tensor], None]:
        def hook(gradient: Tensor) -> None:
            self.backward += _values(gradient) // self.classes

        return hook


def _values(tensor: Tensor) -> int:
    """Number of values, also of a tensor whose batch `torch.func.vmap` hides."""
    while _functorch.is_functorch_wrapped_tensor(tensor):
        tensor = _functorch.get_unwrapped(tensor)
    return tensor.numel()


def reset_peak() -> None:
    """Let `peak_bytes` start anew from the memory of this moment, where the system can."""
    try:
        _CLEAR.write_text("5")
    except OSError:
        return  # not Linux, or a sandbox: the peak then counts from the start of the process


def peak_bytes() -> int:
    """Largest resident memory of this process since `reset_peak`, in bytes."""
    try:
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    # Since the start of the process, so an upper bound; macOS counts bytes, the others kibibytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
