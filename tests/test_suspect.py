"""What a defense sees: the same model, faster; the evidence that was granted; nothing else."""

import copy
import dataclasses

import pytest
import torch
from torch import Tensor, nn

from molehunt.networks import build, fast_dtype
from molehunt.suspect import Access, Suspect, prepare
from molehunt.tasks import Images, Task
from molehunt.testing import planted

CPU = torch.device("cpu")
TASK = Task(
    name="toy", shape=(3, 16, 16), classes=tuple("abcd"), augment="none", network="wrn_16_1",
    mean=(0.5,) * 3, std=(0.25,) * 3,
)  # fmt: skip


def pictures(count: int, seed: int = 0) -> Images:
    rng = torch.Generator().manual_seed(seed)
    return Images(torch.rand(count, *TASK.shape, generator=rng), torch.randint(4, (count,), generator=rng))


def network(name: str) -> nn.Module:
    """With statistics and scales as training leaves them, so that folding has something to do."""
    rng = torch.Generator().manual_seed(1)
    model = build(name, TASK.shape, 4, rng=rng)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            assert layer.running_mean is not None
            assert layer.running_var is not None
            layer.running_mean.normal_(0, 0.3, generator=rng)
            layer.running_var.uniform_(0.5, 2, generator=rng)
            nn.init.uniform_(layer.weight, 0.5, 2, generator=rng)
            nn.init.normal_(layer.bias, 0, 0.3, generator=rng)
    return model


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return network("wrn_16_1")


@pytest.fixture(scope="module")
def suspect(model: nn.Module) -> Suspect:
    return Suspect.of(model, TASK, clean=pictures(12), dtype=torch.float32)


def test_has_no_field_for_the_truth() -> None:
    names = {field.name for field in dataclasses.fields(Suspect)}
    assert names == {"model", "frozen", "task", "device", "dtype"} | {access.value for access in Access}


class TestEvidence:
    def test_what_is_not_granted_is_absent(self, model: nn.Module) -> None:
        suspect = Suspect.of(model, TASK)
        assert suspect.grants == frozenset()
        assert all(getattr(suspect, access.value) is None for access in Access)

    def test_grants_say_what_is_there(self, model: nn.Module) -> None:
        suspect = Suspect.of(model, TASK, clean=pictures(2), inputs=pictures(3).x, candidates=())
        assert suspect.grants == {Access.CLEAN, Access.INPUTS, Access.CANDIDATES}

    @pytest.mark.parametrize("name", ["clean", "training", "inputs"])
    def test_refuses_pictures_of_another_shape(self, model: nn.Module, name: str) -> None:
        x = torch.rand(2, 1, 16, 16)
        with pytest.raises(ValueError, match=rf"{name}: expected images .*\(3, 16, 16\).*got \(2, 1, 16, 16\)"):
            Suspect.of(model, TASK, **{name: x if name == "inputs" else Images(x, torch.zeros(2).long())})  # type: ignore[arg-type]

    @pytest.mark.parametrize("value", [-0.1, 1.1, 255.0, float("nan")])
    def test_refuses_pixels_that_are_none(self, model: nn.Module, value: float) -> None:
        x = pictures(2).x
        x[0, 0, 0, 0] = value
        with pytest.raises(ValueError, match=r"pixels must lie in \[0, 1\]"):
            Suspect.of(model, TASK, inputs=x)

    def test_an_empty_stream_is_a_stream(self, model: nn.Module) -> None:
        suspect = Suspect.of(model, TASK, inputs=pictures(0).x)
        assert suspect.grants == {Access.INPUTS}
        assert suspect.inputs is not None
        assert suspect.logits(suspect.inputs).shape == (0, 4)

    def test_references_are_frozen_copies(self) -> None:
        reference = network("wrn_16_1").train()
        suspect = Suspect.of(reference, TASK, references=(reference,))
        assert suspect.references is not None
        assert not suspect.references[0].training
        assert not any(p.requires_grad for p in suspect.references[0].parameters())
        assert reference.training
        assert all(p.requires_grad for p in reference.parameters())


class TestModel:
    def test_is_a_frozen_copy_of_what_was_submitted(self) -> None:
        submitted = network("wrn_16_1").train()
        suspect = Suspect.of(submitted, TASK, dtype=torch.float32)
        for module in (suspect.model, suspect.frozen):
            assert not any(m.training for m in module.modules())
            assert not any(p.requires_grad for p in module.parameters())
        assert all(torch.equal(v, suspect.model.state_dict()[k]) for k, v in submitted.state_dict().items())
        assert submitted.training
        assert all(p.requires_grad for p in submitted.parameters())
        with torch.no_grad():
            for parameter in submitted.parameters():
                parameter.zero_()
        assert float(suspect.logits(pictures(1).x).abs().sum()) > 0

    def test_the_fastest_number_format_is_the_default(self, model: nn.Module) -> None:
        suspect = Suspect.of(model, TASK)
        assert suspect.dtype == fast_dtype(suspect.device)

    def test_anatomy_names_the_parts(self, suspect: Suspect) -> None:
        assert (suspect.anatomy.block, suspect.anatomy.head) == ("trunk", "head")
        assert suspect.anatomy is suspect.anatomy
        assert suspect.classes == 4


class TestFastCopy:
    @pytest.mark.parametrize("name", ["wrn_16_1", "narrow_cifar", "vgg11_bn", "mntd_cifar", "vit_tiny"])
    def test_float32_is_the_model(self, name: str) -> None:
        model = network(name)
        suspect = Suspect.of(model, TASK, dtype=torch.float32)
        x = pictures(8).x
        with torch.no_grad():
            expected = suspect.model(x)
        assert torch.allclose(suspect.logits(x), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))

    def test_norms_are_folded(self, model: nn.Module) -> None:
        def norms(module: nn.Module) -> int:
            return sum(isinstance(m, nn.BatchNorm2d) for m in module.modules())

        assert norms(prepare(model, CPU, torch.float32)) < norms(model)

    def test_bfloat16_agrees_where_the_model_is_sure(self) -> None:
        exact = planted(images=300).suspect
        suspect = Suspect.of(exact.model, exact.task, clean=exact.clean, dtype=torch.bfloat16)
        assert suspect.clean is not None
        fast, slow = suspect.logits(suspect.clean.x), exact.logits(suspect.clean.x)
        assert fast.dtype == torch.float32
        assert float((fast.argmax(1) == slow.argmax(1)).float().mean()) >= 0.99
        assert float((fast - slow).abs().max()) < 0.03 * float(slow.abs().max())
        assert not torch.equal(fast, slow), "it did not run in bfloat16"

    def test_bfloat16_keeps_small_state_in_float32(self, model: nn.Module) -> None:
        fast = prepare(model, CPU, torch.bfloat16)
        layers = [m for m in fast.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
        assert {p.dtype for m in layers for p in m.parameters()} == {torch.bfloat16}
        own = {id(p) for m in layers for p in m.parameters()}
        rest = [t for t in (*fast.parameters(), *fast.buffers()) if id(t) not in own and t.is_floating_point()]
        assert rest
        assert {t.dtype for t in rest} == {torch.float32}

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_no_batch_norm_statistics_move(self, model: nn.Module, dtype: torch.dtype) -> None:
        suspect = Suspect.of(model, TASK, dtype=dtype)
        before = [copy.deepcopy(m.state_dict()) for m in (suspect.model, suspect.frozen)]
        x = pictures(6).x
        suspect.logits(x)
        suspect.features(x)
        suspect.forward(x.requires_grad_()).sum().backward()  # type: ignore[no-untyped-call]
        for module, state in zip((suspect.model, suspect.frozen), before, strict=True):
            assert all(torch.equal(v, state[k]) for k, v in module.state_dict().items())
            assert all(p.grad is None for p in module.parameters())


class TestAnswers:
    def test_batches_do_not_matter(self, suspect: Suspect) -> None:
        x = pictures(10).x
        whole = suspect.logits(x)
        assert whole.shape == (10, 4)
        assert not whole.requires_grad
        assert torch.allclose(suspect.logits(x, batch=3), whole, atol=1e-5)
        assert torch.allclose(suspect.features(x, batch=3), suspect.features(x), atol=1e-5)

    def test_gradients_reach_the_pictures_and_nothing_else(self, suspect: Suspect) -> None:
        x = pictures(4).x.requires_grad_()
        y = x.detach().clone().requires_grad_()
        suspect.forward(x)[:, 1].sum().backward()  # type: ignore[no-untyped-call]
        suspect.model(y)[:, 1].sum().backward()
        assert x.grad is not None
        assert y.grad is not None
        assert torch.allclose(x.grad, y.grad, rtol=1e-3, atol=1e-5)
        assert float(x.grad.abs().amax(dim=(1, 2, 3)).min()) > 0
        assert all(p.grad is None for m in (suspect.model, suspect.frozen) for p in m.parameters())

    def test_features_are_what_the_head_is_given(self, suspect: Suspect) -> None:
        x = pictures(5).x
        head = suspect.frozen.get_submodule(suspect.anatomy.head)
        rows = suspect.features(x)
        assert rows.shape == (5, 64)
        assert torch.allclose(head(rows), suspect.logits(x), atol=1e-5)

    def test_blocks_come_batch_by_batch(self, suspect: Suspect) -> None:
        x = pictures(5).x
        maps: list[Tensor] = list(suspect.block(x, batch=2))
        assert [len(m) for m in maps] == [2, 2, 1]
        with torch.no_grad():
            assert torch.allclose(torch.cat(maps).mean((2, 3)), suspect.features(x), atol=1e-5)

    def test_the_layout_of_the_pictures_does_not_matter(self, suspect: Suspect) -> None:
        x = pictures(6).x
        other = x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
        assert torch.equal(suspect.logits(x), suspect.logits(other))
        assert torch.allclose(suspect.logits(x[::2]), suspect.logits(x)[::2], atol=1e-5)


def test_an_activation_in_place_does_not_overwrite_what_a_hook_sees() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(4 * 36, 10))
    suspect = Suspect.of(model, planted().suspect.task, dtype=torch.float32)
    seen = []
    suspect.frozen[0].register_forward_hook(lambda _m, _i, output: seen.append(output))  # type: ignore[index]
    suspect.frozen(torch.rand(8, 1, 8, 8))
    assert float(seen[0].min()) < 0
    assert model[1].inplace, "the suspect's own network stays as it is"
