"""JSON from strangers, read without the liberties that ordinary readers take.

Two readers that disagree about one document are a way around every check between them: the first sees
``{"team": "a"}``, the second the other ``"team"`` of the same object. So whatever readers are free to
interpret is refused here, and what we write ourselves has exactly one spelling.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any, NoReturn

# The last alternative lets an unterminated string match to the end of the document. Without it every escaped
# quote inside one would be tried as a start of its own, and a megabyte of them takes hours.
STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+(?:"|\\?\Z)', re.DOTALL)


class JSONError(ValueError):
    """A document is not the JSON that this project exchanges; the message says what is wrong with it."""


def loads(data: bytes, *, limit: int = 2**20, depth: int = 12) -> Any:
    """Read one JSON document, strictly.

    Args:
        data: the document, UTF-8 without byte-order mark.
        limit: largest accepted length in bytes.
        depth: deepest accepted nesting of lists and objects.

    Returns:
        The value: dict, list, str, int, float, bool or None.

    Raises:
        JSONError: too long, too deep, not UTF-8, not JSON, a key twice in one object, ``NaN`` or an infinity
            (also by overflow, such as ``1e999``), an absurdly long integer, or text that is not valid Unicode.
    """
    if len(data) > limit:
        raise JSONError(f"JSON of {len(data)} bytes; at most {limit} are read")
    # Before parsing, because a parser finds out about a million brackets by running out of stack.
    level = deepest = 0
    for bracket in re.findall(rb"[\[\]{}]", STRING.sub(b"", data)):
        level += 1 if bracket in b"[{" else -1
        deepest = max(deepest, level)
    if deepest > depth:
        raise JSONError(f"JSON nested {deepest} deep; at most {depth} levels are read")
    try:
        value = json.loads(
            data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_constant, parse_float=_finite
        )
        _check_text(value)
    except JSONError:
        raise
    except UnicodeError as error:
        raise JSONError(f"text is not valid Unicode: {error}") from None
    except json.JSONDecodeError as error:
        raise JSONError(f"not JSON: {error.msg} at position {error.pos}") from None
    except ValueError:  # the interpreter's own limit on the digits of an integer
        raise JSONError("an integer has too many digits") from None
    except RecursionError:
        raise JSONError(f"JSON nested too deep; at most {depth} levels are read") from None
    return value


def dumps(value: Any) -> bytes:
    """Write a JSON document in its only spelling: sorted keys, no spaces, ASCII, no ``NaN``.

    Raises:
        ValueError: a number is not finite.
        TypeError: a value has no JSON form.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode("ascii")


def show(value: object, length: int = 60) -> str:
    """A stranger's value as it may appear in an error message: ASCII without control characters, and short."""
    text = ascii(value)
    return text if len(text) <= length else text[: length - 3] + "..."


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise JSONError(f"the key {show(key)} is there twice; keep one")
        found[key] = value
    return found


def _constant(name: str) -> NoReturn:
    raise JSONError(f"{name} is not a number that JSON knows; only finite numbers are accepted")


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise JSONError(f"the number {show(digits, 20)} is too large to be finite")
    return value


def _check_text(value: Any) -> None:
    """Refuse lone surrogates, which JSON escapes can spell and which no file name, log or page can print."""
    if isinstance(value, str):
        value.encode("utf-8")
    elif isinstance(value, dict):
        for key, item in value.items():
            key.encode("utf-8")
            _check_text(item)
    elif isinstance(value, list):
        for item in value:
            _check_text(item)
