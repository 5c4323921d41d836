"""JSON from strangers: one reading, or none."""

import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from molehunt.strict_json import JSONError, dumps, loads, show

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(values)
def test_reads_what_it_writes(value: object) -> None:
    assert loads(dumps(value), depth=40) == value
    assert dumps(loads(dumps(value), depth=40)) == dumps(value)


@pytest.mark.parametrize(
    ("document", "says"),
    [
        (b'{"a": 1, "a": 2}', "'a' is there twice"),
        (b'{"x": {"a": 1, "\\u0061": 2}}', "'a' is there twice"),
        (b"NaN", "NaN is not a number"),
        (b"[-Infinity]", "-Infinity is not a number"),
        (b"1e999", "too large to be finite"),
        (b"1" + b"0" * 5000, "too many digits"),
        (b"[" * 13 + b"]" * 13, "nested 13 deep"),
        (b'{"a":' * 13 + b"1" + b"}" * 13, "nested 13 deep"),
        (b'"\\ud800"', "not valid Unicode"),
        (b'{"\\udfff": 1}', "not valid Unicode"),
        (b'"\xff"', "not valid Unicode"),
        (b"\xef\xbb\xbf1", "not JSON"),
        (b"", "not JSON"),
        (b"1 2", "not JSON"),
        (b"{'a': 1}", "not JSON"),
    ],
)
def test_refuses(document: bytes, says: str) -> None:
    with pytest.raises(JSONError, match=says):
        loads(document)


def test_the_length_is_limited_before_anything_is_read() -> None:
    assert loads(b'"' + b"a" * 98 + b'"', limit=100) == "a" * 98
    with pytest.raises(JSONError, match="101 bytes; at most 100"):
        loads(b"[" * 101, limit=100)


def test_depth_beyond_the_interpreter_s_own_is_a_refusal() -> None:
    with pytest.raises(JSONError, match="nested too deep"):
        loads(b"[" * 200_000 + b"]" * 200_000, depth=10**6)


def test_brackets_in_strings_are_not_depth() -> None:
    text = '[[["' + "[" * 50 + '\\"' + "{" * 50 + '"]]]'
    assert loads(text.encode(), depth=3) == json.loads(text)


def test_an_endless_string_of_escaped_quotes_takes_no_time() -> None:
    begin = time.perf_counter()
    with pytest.raises(JSONError, match="not JSON"):
        loads(b'"' + b'\\"' * 400_000)
    assert time.perf_counter() - begin < 5  # the careless expression needs an hour


@settings(max_examples=300)
@given(st.binary(max_size=60))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    try:
        loads(data)
    except JSONError:
        return


def test_equal_documents_have_one_spelling() -> None:
    assert dumps({"b": (1, 2.5), "a": "é"}) == dumps({"a": "é", "b": [1, 2.5]}) == b'{"a":"\\u00e9","b":[1,2.5]}'
    with pytest.raises(ValueError, match=r"not JSON compliant|Out of range"):
        dumps(float("nan"))


def test_what_is_shown_paints_no_terminal() -> None:
    assert show("\x1b[2J\u202e") == "'\\x1b[2J\\u202e'"
    assert len(show("a" * 1000)) == 60
