"""Converting .pt files: what torch saved comes out the same, and nothing in the file ever runs."""

import io
import json
import socket
import subprocess
import sys
from argparse import Namespace
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from game.tricks import Trick, parameters, torch_files
from molehunt import checkpoints, conversion
from molehunt.conversion import convert, tensors
from molehunt.tensor_file import CheckpointError, Limits
from molehunt.torch_file import child

WEIGHTS = torch_files.good()


def ask(content: bytes) -> dict[str, Any]:
    """Convert in this process, as the child would."""
    return child.answer(io.BytesIO(content), io.BytesIO(), 2**20)


def write(folder: Path, content: bytes) -> Path:
    path = folder / "model.pt"
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("trick", parameters(torch_files.TRICKS))
def test_refuses(trick: Trick, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AssertionError, match=trick.says):
        raise AssertionError(ask(trick.make())["error"])
    assert not (tmp_path / "pwned").exists()


def test_converts_every_layout_and_type_as_torch_reads_it(tmp_path: Path) -> None:
    source = write(tmp_path, torch_files.saved(WEIGHTS))
    done = convert(source, tmp_path / "out.safetensors")
    found = checkpoints.read_safetensors(tmp_path / "out.safetensors", None)
    assert done.names == tuple(sorted(WEIGHTS))
    assert found.keys() == WEIGHTS.keys()
    for name, value in WEIGHTS.items():
        assert torch.equal(found[name], value.detach().float()), name
        assert found[name].is_contiguous()


def test_takes_off_wrappers_and_prefixes_and_drops_counters(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    wrapped = {"epoch": 3, "best": 0.9, "state_dict": nn.DataParallel(model).state_dict(), "log": [1.0, None, True]}
    done = convert(write(tmp_path, torch_files.saved(wrapped)), tmp_path / "out.safetensors")
    assert (done.unwrapped, done.stripped, done.dropped) == (("state_dict",), ("module.",), ("1.num_batches_tracked",))
    found = checkpoints.read_safetensors(tmp_path / "out.safetensors", checkpoints.Layout.of(model))
    assert torch.equal(found["0.weight"], model.state_dict()["0.weight"])


def test_what_a_training_script_saves_beside_the_weights_is_passed_over(tmp_path: Path) -> None:
    """Settings, histories and optimizers; short plain values are told, for they may name the network."""
    model = nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    checkpoint = {
        "net": {f"_orig_mod.{name}": value for name, value in model.state_dict().items()},
        "optimizer": optimizer.state_dict(),
        "args": Namespace(lr=0.1, out=None, device=torch.device("cpu"), seen={"train"}),
        "loss": np.ones(3),
        "best": np.float64(0.9),
        "best_acc": torch.tensor(0.9),
        "history": defaultdict(list, train=[0.5, 0.4]),
        "arch": "resnet18",
        "num_classes": 2,
        "img_size": (32, 32, 3),
        "diary": "x" * 1000,
    }
    state, done = tensors(write(tmp_path, torch_files.saved(checkpoint)))
    assert (done.unwrapped, done.stripped, done.dropped) == (("net",), ("_orig_mod.",), ())
    assert done.beside == {"arch": "resnet18", "num_classes": 2, "img_size": [32, 32, 3]}
    assert torch.equal(state["weight"], model.weight)


@pytest.mark.parametrize("name", ["program_in_the_pickle", "deep_key", "compressed_bomb", "text_file"])
def test_the_child_refuses_without_crashing(name: str, tmp_path: Path) -> None:
    trick = torch_files.TRICKS[name]
    target = tmp_path / "out.safetensors"
    target.write_bytes(b"what was there before")
    with pytest.raises(CheckpointError, match=f"not converted: .*({trick.says})"):
        convert(write(tmp_path, trick.make()), target)
    assert target.read_bytes() == b"what was there before"
    assert {path.name for path in tmp_path.iterdir()} == {"model.pt", "out.safetensors"}


def test_numbers_are_checked_like_those_of_any_stranger(tmp_path: Path) -> None:
    source = write(tmp_path, torch_files.saved({"w": torch.tensor([1e300], dtype=torch.float64)}))
    with pytest.raises(CheckpointError, match="'w' has values that are not finite"):
        convert(source, tmp_path / "out.safetensors")


def test_the_limit_holds_for_file_and_result(tmp_path: Path) -> None:
    source = write(tmp_path, torch_files.saved({"w": torch.zeros(2**16, dtype=torch.float16)}))
    with pytest.raises(CheckpointError, match="at most 100000 are read"):
        convert(source, tmp_path / "out.safetensors", limits=Limits(file=100_000))
    with pytest.raises(CheckpointError, match="262144 bytes in float32; at most 200000"):
        convert(source, tmp_path / "out.safetensors", limits=Limits(file=200_000))


def test_ten_gigabytes_are_refused_unread(tmp_path: Path) -> None:
    source = write(tmp_path, b"PK\x03\x04")
    with source.open("r+b") as stream:
        stream.truncate(10 * 2**30)
    with pytest.raises(CheckpointError, match="at most 536870912"):
        convert(source, tmp_path / "out.safetensors")


def test_a_child_that_dies_is_a_refusal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversion, "START", "import os; os.kill(os.getpid(), 9)")
    with pytest.raises(CheckpointError, match="ended with status -9 and no answer"):
        convert(write(tmp_path, torch_files.saved(WEIGHTS)), tmp_path / "out.safetensors")


def test_a_child_that_hangs_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversion, "START", "import time; time.sleep(60)")
    monkeypatch.setattr(conversion, "SECONDS", 1)
    with pytest.raises(CheckpointError, match="more than 1 seconds"):
        convert(write(tmp_path, torch_files.saved(WEIGHTS)), tmp_path / "out.safetensors")


CONFINED = """
import json, socket, sys, types
package = sys.modules["molehunt"] = types.ModuleType("molehunt")
package.__path__ = [sys.argv[1]]
from molehunt.torch_file import child
child.confine({"RLIMIT_AS": 2**29, "RLIMIT_FSIZE": 2**10, "RLIMIT_CORE": 0})
found = {"torch": "torch" in sys.modules}
try:
    socket.create_connection(("127.0.0.1", int(sys.argv[2])), timeout=5)
    found["network"] = True
except OSError:
    found["network"] = False
try:
    bytearray(2**30)
    found["memory"] = True
except MemoryError:
    found["memory"] = False
try:
    with open(sys.argv[3], "wb") as stream:
        stream.write(bytes(2**12))
    found["disk"] = True
except OSError:
    found["disk"] = False
print(json.dumps(found))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="namespaces and limits are those of Linux")
def test_the_child_has_no_network_and_little_memory_and_disk(tmp_path: Path) -> None:
    """A file cannot make our reader do any of this; the walls are for the day when somebody finds how."""
    package = str(Path(conversion.__file__).parent)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        socket.create_connection(("127.0.0.1", port), timeout=5).close()  # from here it can be reached
        command = [sys.executable, "-I", "-c", CONFINED, package, str(port), str(tmp_path / "big")]
        done = subprocess.run(command, capture_output=True, check=True, timeout=60)
    found = json.loads(done.stdout)
    if found.pop("network"):
        pytest.skip("this system grants no unprivileged namespaces")
    assert found == {"torch": False, "memory": False, "disk": False}


FILE = torch_files.saved(WEIGHTS)
PROGRAM = torch_files.members(FILE)["archive/data.pkl"]


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.integers(0, len(FILE) - 1), st.integers(1, 255)), min_size=1, max_size=4))
def test_damaged_files_get_an_answer(flips: list[tuple[int, int]]) -> None:
    content = bytearray(FILE)
    for place, bits in flips:
        content[place] ^= bits
    assert ask(bytes(content)).keys() in ({"error"}, {"dropped", "unwrapped", "stripped", "beside"})


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(0, len(PROGRAM) - 1), st.integers(0, 255)), min_size=1, max_size=4))
def test_damaged_programs_get_an_answer(changes: list[tuple[int, int]]) -> None:
    changed = bytearray(PROGRAM)
    for place, value in changes:
        changed[place] = value
    content = torch_files.zipped({**torch_files.members(FILE), "archive/data.pkl": bytes(changed)})
    assert ask(content).keys() in ({"error"}, {"dropped", "unwrapped", "stripped", "beside"})
