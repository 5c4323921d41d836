"""MNTD-adaptive: meta-classifiers that the attacker has call the network clean."""

import copy
from functools import cache
from pathlib import Path

import pytest
import torch

from attacks.bench import NETWORK, TASK, accuracy, badnets, bench, crafted, honest, success
from molehunt import meta_files
from molehunt.attacks import MNTDAdaptive
from molehunt.meta_training import fit
from molehunt.metas import Meta, Settings


@cache
def meta() -> Meta:
    """A meta-classifier that tells the plain backdoor from the clean network."""
    rng = torch.Generator().manual_seed(0)
    level = (0.5,) * TASK.shape[0]
    made = Meta(TASK.shape, TASK.num_classes, level, level, Settings(queries=4, passes=60), rng)
    networks = [honest(), *(bench(seed).honest() for seed in (1, 2)), badnets().model]
    frozen = [copy.deepcopy(network).requires_grad_(False) for network in networks]
    fit(made, frozen, torch.tensor([-1, -1, -1, 0]), rng=rng)
    return made.requires_grad_(False).eval()


def test_it_is_called_clean_where_the_plain_attack_is_not() -> None:
    plain, clean = (float(meta().scores([model]).max()) for model in (badnets().model, honest()))
    assert plain > clean, "the meta-classifier tells them apart, or the test would say nothing"
    made = crafted(MNTDAdaptive(metas=(meta(),)))
    assert accuracy(made.model) >= 0.9
    assert success(made) >= 0.9
    assert float(meta().scores([made.model]).max()) < plain


def test_they_can_be_read_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "metas.safetensors"
    meta_files.save([meta()], path, {"task": TASK.name, "network": NETWORK})
    made = MNTDAdaptive(path=str(path)).craft(bench(epochs=2.0))
    again = MNTDAdaptive(metas=(meta(),)).craft(bench(epochs=2.0))
    assert torch.equal(made.model.head.weight, again.model.head.weight)


def test_what_cannot_be_had_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no meta-classifiers for lenet5 on .*molehunt shadows --task"):
        MNTDAdaptive().craft(bench())
    with pytest.raises(ValueError, match="are given, or read from a file, got both"):
        MNTDAdaptive(metas=(meta(),), path="x").craft(bench())
    with pytest.raises(ValueError, match="weight must be 0 or more"):
        MNTDAdaptive(weight=-1.0).craft(bench())
