"""Strangers' weights: refused with a reason, or read into one canonical form."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from game.tricks import Trick, honest, parameters, weights
from molehunt import checkpoints, networks
from molehunt.checkpoints import Layout, canonical, digest, layout_of, load, read_safetensors, write
from molehunt.tensor_file import CheckpointError, Limits, encode

SHAPE, CLASSES = honest.TASK.shape, honest.TASK.num_classes


@pytest.mark.parametrize("trick", parameters(weights.TRICKS))
def test_refuses(trick: Trick, tmp_path: Path) -> None:
    content = trick.make()
    (tmp_path / "model.safetensors").write_bytes(content)
    for source in (content, tmp_path / "model.safetensors"):
        with pytest.raises(CheckpointError, match=trick.says):
            load(source, honest.NETWORK, SHAPE, CLASSES)


@pytest.mark.parametrize("name", sorted(networks.NETWORKS))
def test_every_network_comes_back_as_it_was(name: str, tmp_path: Path) -> None:
    shape = (1, 28, 28) if name in {"badnets_cnn", "lenet5", "mntd_mnist"} else (3, 32, 32)
    model = networks.build(name, shape, 10, rng=torch.Generator().manual_seed(0)).eval()
    write(model.state_dict(), tmp_path / "model.safetensors")
    found = load(tmp_path / "model.safetensors", name, shape, 10)
    x = torch.rand(2, *shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(found(x), model(x))
    assert not found.training


def test_what_other_writers_add_is_read_past_and_dropped() -> None:
    """Counters, metadata, key order: what cannot matter to the function but can tell how a model was made."""
    model = honest.model()
    state = model.state_dict()
    for name in state:
        if name.endswith("num_batches_tracked"):
            state[name] = torch.tensor(12345)
    assert any(name.endswith("num_batches_tracked") for name in state)
    content = safetensors.torch.save(state, metadata={"note": "poisoned on Tuesday"})
    found = load(content, honest.NETWORK, SHAPE, CLASSES)
    assert digest(canonical(found.state_dict())) == digest(honest.state())
    assert all(v == 0 for n, v in found.state_dict().items() if n.endswith("num_batches_tracked"))


def test_equal_models_are_equal_bytes() -> None:
    one = {"b": torch.tensor([0.0, 1.0]), "a": torch.rand(3, 4, generator=torch.Generator().manual_seed(0)).t()}
    other = {"a": one["a"].contiguous(), "b": torch.tensor([-0.0, 1.0]), "n": torch.tensor(7)}
    assert b"".join(encode(canonical(one))) == b"".join(encode(canonical(other)))
    assert list(canonical(other)) == ["a", "b"]
    changed = {**one, "b": torch.tensor([0.0, 1.0000001])}
    assert digest(canonical(changed)) != digest(canonical(one))


def test_subnormal_numbers_become_zero_and_normal_ones_stay() -> None:
    tiny = torch.finfo(torch.float32).tiny
    found = canonical({"w": torch.tensor([1e-40, -1e-45, tiny, -tiny, tiny / 2])})["w"]
    assert found.tolist() == [0.0, 0.0, tiny, -tiny, 0.0]


def test_canonical_changes_nothing_that_it_was_given() -> None:
    state = {"w": torch.tensor([1e-40, 1.0])}
    canonical(state)["w"][1] = 5.0
    assert state["w"].tolist() == torch.tensor([1e-40, 1.0]).tolist()


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (torch.ones(2, dtype=torch.float64), "call model.float"),
        (torch.ones(2, dtype=torch.complex64), "plain dense"),
        (torch.eye(2).to_sparse(), "plain dense"),
        (torch.empty(2, device="meta"), "plain dense"),
        (torch.tensor([1.0, float("inf")]), "not finite"),
    ],
)
def test_canonical_refuses(value: torch.Tensor, says: str) -> None:
    with pytest.raises(CheckpointError, match=says):
        canonical({"w": value})


def test_writing_is_atomic_and_refuses_before_it_writes(tmp_path: Path) -> None:
    write({"w": torch.ones(1)}, tmp_path / "a")
    before = (tmp_path / "a").read_bytes()
    with pytest.raises(CheckpointError, match="not finite"):
        write({"w": torch.tensor([float("nan")])}, tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == before


@pytest.mark.parametrize(
    ("name", "says"),
    [("my_network", "unknown network 'my_network'"), ("resnet18\x1b[2J", "unknown network")],
)
def test_an_unknown_network_is_refused_with_the_known_ones(name: str, says: str) -> None:
    with pytest.raises(CheckpointError, match=says) as refusal:
        layout_of(name, SHAPE, CLASSES)
    assert "resnet18" in str(refusal.value)
    assert "\x1b" not in str(refusal.value)


def test_a_network_larger_than_the_limit_is_refused() -> None:
    with pytest.raises(CheckpointError, match="bytes of weights; at most 1000"):
        layout_of("lenet5", SHAPE, CLASSES, limits=Limits(file=1000))


def test_a_counter_of_another_shape_is_refused() -> None:
    layout = Layout.of(nn.BatchNorm2d(2))
    state = {**nn.BatchNorm2d(2).state_dict(), "num_batches_tracked": torch.zeros(1000, dtype=torch.int64)}
    with pytest.raises(CheckpointError, match="'num_batches_tracked' has shape"):
        read_safetensors(safetensors.torch.save(state), layout)


def test_numbers_are_not_read_when_names_do_not_fit() -> None:
    """Headers first: a file whose numbers are missing altogether is refused for its names."""
    header = json.dumps({"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    content = len(header).to_bytes(8, "little") + header + b"\x00\x00\xc0\x7f"  # NaN
    with pytest.raises(CheckpointError, match="missing 'w'"):
        read_safetensors(content, Layout(shapes={"w": (1,)}))


def test_the_first_layer_may_be_anything_that_divides() -> None:
    state = {**honest.state(), "normalize.std": torch.full((1, 1, 1), 0.01)}
    found = load(b"".join(encode(state)), honest.NETWORK, SHAPE, CLASSES)
    assert found.normalize.std.item() == pytest.approx(0.01)


LENET = b"".join(encode(canonical(networks.build("lenet5", SHAPE, CLASSES).state_dict())))
HEADER = 8 + int.from_bytes(LENET[:8], "little")


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, HEADER + 200), st.integers(1, 255)), min_size=1, max_size=4))
def test_damaged_files_are_read_or_refused(flips: list[tuple[int, int]]) -> None:
    content = bytearray(LENET)
    for place, bits in flips:
        content[place] ^= bits
    try:
        state = read_safetensors(bytes(content), layout_of("lenet5", SHAPE, CLASSES))
    except CheckpointError:
        return
    assert all(bool(torch.isfinite(value).all()) for value in state.values())


def test_the_probe_sees_an_answer_of_the_wrong_shape() -> None:
    with pytest.raises(CheckpointError, match="expected \\(4, 3\\)"):
        checkpoints.probe(nn.Flatten(), (1, 2, 2), 3)
