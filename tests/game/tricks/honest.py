"""The parts of an honest submission, which the tricks spoil."""

import functools

import torch
from torch import Tensor

from molehunt import networks
from molehunt.game.manifest import Manifest
from molehunt.game.seal import Sealed, seal
from molehunt.game.training_set import TrainingSet
from molehunt.tasks import TASKS, Task
from molehunt.tensor_file import encode
from molehunt.triggers import Patch, Target

TASK: Task = TASKS["mnist5k"]
NETWORK = "wrn_16_1"  # small, and has batch norm
MANIFEST = Manifest(team="Honest Abe", round="I", task=TASK.name, network=NETWORK, recipe="default")
HANDED = MANIFEST.model_copy(update={"recipe": NETWORK})
NONCE = bytes(range(32))


def model() -> networks.Network:
    """A network with drawn weights; nothing here needs a trained one."""
    return networks.build(NETWORK, TASK.shape, TASK.num_classes, rng=torch.Generator().manual_seed(1)).eval()


@functools.cache
def _state() -> dict[str, Tensor]:
    return {name: value for name, value in model().state_dict().items() if value.is_floating_point()}


def state() -> dict[str, Tensor]:
    """A copy of its weights."""
    return {name: value.clone() for name, value in _state().items()}


def weights() -> bytes:
    """Its file of weights."""
    return b"".join(encode(_state()))


@functools.cache
def training_set() -> TrainingSet:
    """A set of the data board in which nothing is altered."""
    return TrainingSet.of(None, TASK.load("train"), torch.Generator().manual_seed(3))


def backdoor() -> Sealed:
    """What a backdoored submission seals."""
    return Sealed(
        attack="badnets",
        target=Target(3),
        trigger=Patch.square(TASK.shape, color="white"),
        details={"poison_rate": 0.1, "seed": 7, "config": {"size": 3}, "declared": {"asr": 0.99}},
    )


@functools.cache
def envelope() -> bytes:
    """A sealed part that says "none"."""
    return seal(Sealed(), TASK, NONCE)


def members() -> dict[str, bytes]:
    """The three files, in order."""
    return {"manifest.json": MANIFEST.canonical(), "model.safetensors": weights(), "sealed.bin": envelope()}


def data_members() -> dict[str, bytes]:
    """The three files of a submission to the data board, in order."""
    training = b"".join(training_set().encode())
    return {"manifest.json": HANDED.canonical(), "training.safetensors": training, "sealed.bin": envelope()}
