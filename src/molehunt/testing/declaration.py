"""What a defense and an attack have in common as objects: a documented frozen dataclass that can be written down."""

import dataclasses
import random
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch


def require(held: bool, broken: str) -> None:
    """Raise an AssertionError that says which promise is broken; unlike `assert` it survives `python -O`."""
    if not held:
        raise AssertionError(broken)


@contextmanager
def global_generators_at_rest() -> Iterator[None]:
    """Check that nothing inside draws from the global generators of torch, numpy and Python."""

    def states() -> dict[str, str]:
        numpy = np.random.get_state(legacy=False)  # noqa: NPY002 - looked at, not used
        return {"torch": str(torch.get_rng_state().tolist()), "numpy": str(numpy), "Python": str(random.getstate())}

    before = states()
    yield
    after = states()
    for name, state in before.items():
        require(state == after[name], f"it used the global generator of {name}; take the one that is handed in")


def check_dataclass(thing: object) -> None:
    """Check that it is a frozen dataclass with a default for every setting, and that its repr makes it again."""
    kind = type(thing)
    require(dataclasses.is_dataclass(thing), f"{kind.__name__} is no dataclass; its fields are its configuration")
    frozen = getattr(kind, "__dataclass_params__").frozen  # noqa: B009 - typed as unknown otherwise
    require(frozen, f"{kind.__name__} is not frozen; a configuration that changes cannot be recorded")
    try:
        kind()
    except TypeError as error:
        raise AssertionError(f"{kind.__name__}() needs arguments: give every setting a default ({error})") from None
    names = {**vars(sys.modules[kind.__module__]), kind.__name__: kind}
    default = kind()
    again = eval(repr(default), names)
    require(repr(again) == repr(default), f"repr does not make the object again: {default!r}")


def check_docstring(thing: object, sections: Sequence[str]) -> None:
    """Check that the class documents every field and has these sections."""
    kind = type(thing)
    text = kind.__doc__ or ""
    for section in sections:
        found = re.search(rf"^\s*{section}\b.*:", text, re.MULTILINE)
        require(found is not None, f"the docstring of {kind.__name__} has no line that begins with {section!r}")
    for field in dataclasses.fields(thing):  # type: ignore[arg-type]
        found = re.search(rf"^\s*(\w+, )*{field.name}(, \w+)*: \S", text, re.MULTILINE)
        require(found is not None, f"the docstring of {kind.__name__} does not describe {field.name!r}")
