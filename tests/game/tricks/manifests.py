"""Tricks with the manifest. Every function returns the bytes of a manifest.json."""

import functools
import json
from typing import Any

from game.tricks import Trick, honest, register

TRICKS: dict[str, Trick] = {}
trick = functools.partial(register, TRICKS)


def changed(**fields: Any) -> bytes:
    """An honest manifest with some fields replaced or added."""
    return json.dumps({**honest.MANIFEST.model_dump(), **fields}, ensure_ascii=False).encode()


@trick("the key 'team' is there twice")
def key_twice(*_: Any) -> bytes:
    return changed()[:-1] + b', "team": "Somebody Else"}'


@trick("the key 'team' is there twice")
def key_twice_by_escape(*_: Any) -> bytes:
    return changed()[:-1] + rb', "te\u0061m": "Somebody Else"}'


@trick("nested 10000 deep")
def deep_nesting(*_: Any) -> bytes:
    return b"[" * 10_000


@trick("not JSON")
def brackets_in_an_endless_string(*_: Any) -> bytes:
    """Escaped quotes without an end: a careless search for strings takes time with the square of their number."""
    return b'{"team": "' + b'\\"' * 8_000


@trick("NaN is not a number")
def not_a_number(*_: Any) -> bytes:
    return changed(team=float("nan"))


@trick("too large to be finite")
def infinity_by_overflow(*_: Any) -> bytes:
    return changed(format=0).replace(b'"format": 0', b'"format": 1e999')


@trick("too many digits")
def number_without_end(*_: Any) -> bytes:
    return changed(format=0).replace(b'"format": 0', b'"format": 1' + b"0" * 10_000)


@trick("poison_rate.*Extra inputs")
def open_poison_rate(*_: Any) -> bytes:
    return changed(poison_rate=0.0)


@trick("recipe.*required")
def field_missing(*_: Any) -> bytes:
    manifest = json.loads(changed())
    del manifest["recipe"]
    return json.dumps(manifest).encode()


@trick("format")
def format_as_text(*_: Any) -> bytes:
    return changed(format="1")


@trick("format")
def format_as_truth(*_: Any) -> bytes:
    return changed(format=True)


@trick("format")
def format_of_tomorrow(*_: Any) -> bytes:
    return changed(format=2)


@trick("team")
def team_as_list(*_: Any) -> bytes:
    return changed(team=["Honest", "Abe"])


@trick("team.*at least 1")
def team_without_name(*_: Any) -> bytes:
    return changed(team="")


@trick("team.*at most 64")
def team_with_a_novel(*_: Any) -> bytes:
    return changed(team="a" * 10_000)


@trick("team.*U\\+202E")
def team_written_backwards(*_: Any) -> bytes:
    return changed(team="\u202eebA tsenoH")


@trick("team.*U\\+001B")
def team_that_paints_the_terminal(*_: Any) -> bytes:
    return changed(team="\u001b[2J")


@trick("team.*NFC")
def team_in_another_spelling(*_: Any) -> bytes:
    return changed(team="Cafe\u0301")


@trick("not valid Unicode")
def half_a_character(*_: Any) -> bytes:
    return changed(team="?").replace(b'"?"', rb'"\ud800"')


@trick("not valid Unicode")
def another_encoding(*_: Any) -> bytes:
    return changed(team="Caf\u00e9").decode().encode("latin-1")


@trick("not JSON")
def byte_order_mark(*_: Any) -> bytes:
    return b"\xef\xbb\xbf" + changed()


@trick("not JSON")
def no_json(*_: Any) -> bytes:
    return b"team: Honest Abe"


@trick("valid dictionary|should be")
def list_for_an_object(*_: Any) -> bytes:
    return b"[]"


@trick("unknown task 'imagenet_from_home'")
def unknown_task(*_: Any) -> bytes:
    return changed(task="imagenet_from_home")


@trick("unknown task 'folder:/etc'")
def task_that_opens_a_folder(*_: Any) -> bytes:
    return changed(task="folder:/etc")


@trick("unknown network 'my_network'")
def unknown_network(*_: Any) -> bytes:
    return changed(network="my_network")


@trick("unknown network 'timm:vit_giant_patch14_224'")
def network_of_gigabytes(*_: Any) -> bytes:
    return changed(network="timm:vit_giant_patch14_224")


@trick("network")
def network_from_the_internet(*_: Any) -> bytes:
    return changed(network="timm:hf-hub:somebody/evil")


@trick("network")
def network_from_a_file_of_code(*_: Any) -> bytes:
    """What a user may say about a file of their own, no manifest may."""
    return changed(network="evil.py:Net")


@trick("network")
def network_from_a_module(*_: Any) -> bytes:
    return changed(network="os.system")


@trick("recipe")
def recipe_that_says_too_much(*_: Any) -> bytes:
    return changed(recipe="default with 10 % yellow squares")


@trick("16385 bytes; at most 16384")
def manifest_without_end(*_: Any) -> bytes:
    return changed().ljust(2**14 + 1)
