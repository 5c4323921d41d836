"""A network of the user's own: FILE.py:CALLABLE. Their code, run in this process, because they said so."""

import ast
import importlib.util
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from molehunt.foreign.errors import ForeignError

SPEC = re.compile(r"(?P<file>.+\.py):(?P<call>[A-Za-z_]\w*)(?P<arguments>\(.*\))?", re.DOTALL)
WHERE = "molehunt_network_of_the_user"


def is_code(network: str | None) -> bool:
    """Whether the name of a network is FILE.py:CALLABLE, perhaps with arguments."""
    return network is not None and SPEC.fullmatch(network) is not None


def build(network: str) -> nn.Module:
    """Run a file and call what it defines.

    Args:
        network: "FILE.py:CALLABLE", or "FILE.py:CALLABLE(10, width=2)" with plain values as arguments. The file may
            import what lies beside it.

    Returns:
        What the call returned.

    Raises:
        ForeignError: there is no such file or name, it raises, or it does not return a module.
    """
    found = SPEC.fullmatch(network)
    assert found is not None, "ask is_code first"
    path, name = Path(found["file"]).expanduser(), found["call"]
    if not path.is_file():
        raise ForeignError(f"no file {path}: expected --network FILE.py:CALLABLE")
    arguments, named = _arguments(found["arguments"] or "()", network)
    with _beside(path):
        module = _run(path)
        made = getattr(module, name, None)
        if not callable(made):
            known = sorted(key for key, value in vars(module).items() if callable(value) and not key.startswith("_"))
            raise ForeignError(
                f"{path} defines no {name}; it has {', '.join(known[:10]) or 'nothing that can be called'}"
            )
        try:
            answer = made(*arguments, **named)
        except Exception as error:  # their code
            raise ForeignError(
                f"{name}{found['arguments'] or '()'} of {path} raised {type(error).__name__}: {error}; give arguments "
                f"as in {path.name}:{name}(10), or write a function without any"
            ) from error
    if not isinstance(answer, nn.Module):
        raise ForeignError(f"{name} of {path} returned a {type(answer).__name__}, expected a torch.nn.Module")
    return answer


def short_name(network: str) -> str:
    """What the report calls it: the file without its folder."""
    found = SPEC.fullmatch(network)
    assert found is not None
    return f"{Path(found['file']).name}:{found['call']}"


def _arguments(text: str, network: str) -> tuple[list[Any], dict[str, Any]]:
    try:
        call = ast.parse(f"f{text}", mode="eval").body
        assert isinstance(call, ast.Call)
        return (
            [ast.literal_eval(value) for value in call.args],
            {str(word.arg): ast.literal_eval(word.value) for word in call.keywords if word.arg is not None},
        )
    except (SyntaxError, ValueError, AssertionError):
        raise ForeignError(f"expected plain values as arguments, such as (10, width=2), got {network!r}") from None


def _run(path: Path) -> Any:
    specification = importlib.util.spec_from_file_location(WHERE, path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[WHERE] = module  # dataclasses look their module up
    try:
        specification.loader.exec_module(module)
    except Exception as error:  # their code
        raise ForeignError(f"{path} cannot be imported: {type(error).__name__}: {error}") from error
    return module


@contextmanager
def _beside(path: Path) -> Iterator[None]:
    """Let a file import what lies beside it."""
    folder = str(path.resolve().parent)
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)
