"""The sealed part: the same size whatever it says, bound by its commitment, checked when it is opened."""

import hashlib
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from game.tricks import Trick, honest, parameters, seals
from molehunt.game import seal
from molehunt.game.manifest import Manifest
from molehunt.game.seal import Sealed, SealError, commit, envelope_size, opening, unseal, verify
from molehunt.tasks import TASKS, Task
from molehunt.triggers import (
    ENCODERS,
    TRIGGERS,
    Additive,
    Blend,
    Encoded,
    Frequency,
    Patch,
    Quantize,
    Reflection,
    Several,
    Sinusoid,
    Sticker,
    Target,
    Trigger,
    Warp,
)

TASK = honest.TASK
COLOR = TASKS["cifar10"]


HUGE = Blend(pattern=torch.rand(3, 512, 512, generator=torch.Generator().manual_seed(0)))


def triggers(task: Task) -> list[Trigger]:
    """One trigger of every kind."""
    _, height, width = task.shape
    rng = torch.Generator().manual_seed(0)
    pattern = torch.rand(task.shape, generator=rng)
    return [
        Patch.square(task.shape, color="white"),
        Patch(mask=torch.rand(1, height, width, generator=rng), pattern=pattern, opacity=0.1),
        Blend(pattern=pattern, opacity=0.2),
        Additive(delta=(pattern - 0.5) / 8),
        Warp(flow=torch.randn(2, height, width, generator=rng)),
        Sinusoid(task.shape, amplitude=0.07, frequency=6.0),
        Sticker(pattern[:, :5, :5], task.shape),
        Several(tuple(Patch(mask=pattern[:1], pattern=pattern, opacity=k / 10) for k in range(10))),
        Frequency(task.shape, magnitude=0.2, window=28, cells=(13, 13, 27, 27)),
        Quantize(task.shape, levels=8, dither=True),
        Reflection(picture=pattern, opacity=0.2, ghost=0.6, shift=(3, -2), blur=1.5),
        *(
            Encoded(
                network=name,
                shape=task.shape,
                linf=0.1,
                area=0.05 if encoder.masked else 1.0,
                weights=encoder.initial(task.shape, rng),
            )
            for name, encoder in ENCODERS.items()
        ),
    ]


def test_there_is_one_of_every_kind() -> None:
    assert {trigger.footprint().kind for trigger in triggers(TASK)} == TRIGGERS.keys()


@pytest.mark.parametrize("task", [TASK, COLOR], ids=lambda t: t.name)
@pytest.mark.parametrize("target", [Target(3), Target(tuple((k + 1) % 10 for k in range(10))), Target(0, (1, 2))])
def test_opens_to_what_was_sealed(task: Task, target: Target) -> None:
    details = {"poison_rate": 0.05, "seed": 2**63, "config": {"a": [1, None, "x"]}, "declared": {"asr": 0.993}}
    x = torch.rand(4, *task.shape, generator=torch.Generator().manual_seed(1))
    for trigger in triggers(task):
        envelope = seal.seal(Sealed(attack="badnets", target=target, trigger=trigger, details=details), task)
        found = unseal(envelope, task)
        assert found.backdoored
        assert (found.attack, found.target, found.details) == ("badnets", target, details)
        assert found.trigger is not None
        assert torch.equal(found.trigger(x), trigger(x))
        assert found.trigger.to_json() == trigger.to_json()


def test_honest_models_seal_that_there_is_nothing() -> None:
    found = unseal(seal.seal(Sealed(details={"seed": 3}), TASK), TASK)
    assert not found.backdoored
    assert (found.attack, found.target, found.trigger, found.details) == (None, None, None, {"seed": 3})


def test_every_sealed_part_of_a_task_has_the_same_size() -> None:
    parts = [Sealed(), Sealed(details={"config": {"note": "x" * 10_000}})]
    parts += [Sealed(attack="a", target=Target(1), trigger=trigger) for trigger in triggers(TASK)]
    assert {len(seal.seal(part, TASK)) for part in parts} == {envelope_size(TASK.shape)}


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ((1, 28, 28), 2**20),
        ((3, 32, 32), 2**20),
        ((3, 224, 224), 2**20),
        ((3, 256, 256), 2**21),
        ((3, 512, 512), 2**23),
    ],
)
def test_the_size_follows_from_the_images(shape: tuple[int, int, int], size: int) -> None:
    assert envelope_size(shape) == size


def test_the_largest_trigger_fits_with_the_largest_document() -> None:
    for side in (224, 256, 299, 512):
        shape = (3, side, side)
        tensors = 4 * 4 * side * side + 8 + 2**12
        assert seal.PREFIX + 4 + seal.DOCUMENT + tensors <= envelope_size(shape)


def test_the_commitment_is_the_hash_of_nonce_and_content() -> None:
    envelope = seal.seal(honest.backdoor(), TASK, honest.NONCE)
    nonce, content = opening(envelope, TASK)
    assert nonce == honest.NONCE
    assert content == seal.canonical(honest.backdoor())
    assert commit(nonce, content) == hashlib.sha256(nonce + content).hexdigest()
    assert seal.commitment_of(envelope, TASK) == commit(nonce, content)
    assert verify(commit(nonce, content), nonce, content)
    assert unseal(envelope, TASK, commit(nonce, content)).attack == "badnets"


ENVELOPE = seal.seal(honest.backdoor(), TASK, honest.NONCE)
NONCE, CONTENT = opening(ENVELOPE, TASK)
COMMITMENT = commit(NONCE, CONTENT)


@settings(max_examples=200)
@given(st.integers(0, 8 * (len(NONCE) + len(CONTENT)) - 1))
def test_any_flipped_bit_breaks_the_commitment(bit: int) -> None:
    both = bytearray(NONCE + CONTENT)
    both[bit // 8] ^= 1 << bit % 8
    assert not verify(COMMITMENT, bytes(both[:32]), bytes(both[32:]))


def test_bytes_cannot_move_between_nonce_and_content() -> None:
    both = NONCE + CONTENT
    assert not verify(COMMITMENT, both[:31], both[31:])
    assert not verify(COMMITMENT, both[:33], both[33:])
    assert not verify("", NONCE, CONTENT)
    with pytest.raises(SealError, match="nonce of 32 bytes, got 31"):
        commit(both[:31], both[31:])


def test_another_seal_than_the_one_committed_to_is_refused() -> None:
    other = seal.seal(Sealed(), TASK, honest.NONCE)
    with pytest.raises(SealError, match="not the one that was committed to"):
        unseal(other, TASK, COMMITMENT)


def test_the_same_content_under_two_nonces_has_unlike_commitments() -> None:
    one, other = (seal.commitment_of(seal.seal(Sealed(), TASK), TASK) for _ in range(2))
    assert one != other


@pytest.mark.parametrize("trick", parameters(seals.TRICKS))
def test_refuses(trick: Trick) -> None:
    with pytest.raises(SealError, match=trick.says):
        unseal(trick.make(), TASK)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 700) | st.integers(0, len(ENVELOPE) - 1), st.integers(1, 255)), min_size=1, max_size=4
    )
)
def test_damaged_seals_are_refused_or_open(flips: list[tuple[int, int]]) -> None:
    """They may open to something else (another nonce, another seed), but never under the same commitment."""
    envelope = bytearray(ENVELOPE)
    for place, bits in flips:
        envelope[place] ^= bits
    if bytes(envelope) == ENVELOPE:  # two flips of one place
        return
    try:
        unseal(bytes(envelope), TASK)
    except SealError:
        return
    with pytest.raises(SealError, match="committed to"):
        unseal(bytes(envelope), TASK, COMMITMENT)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Sealed(attack="badnets"), "got only \\['attack'\\]"),
        (lambda: Sealed(details={"poison_rate": -0.1}), "poison_rate"),
        (lambda: Sealed(details={"hello": 1}), "hello"),
        (lambda: seal.seal(Sealed(), TASK, b"short"), "nonce of 32 bytes, got 5"),
        (lambda: seal.seal(Sealed(details={"config": {"x": "y" * 70_000}}), TASK), "at most 65536 are sealed"),
        (lambda: seal.seal(Sealed(attack="a", target=Target(1), trigger=HUGE), TASK), "for this task at most 1048576"),
        (lambda: seal.seal(Sealed(attack="a", target=Target(10), trigger=triggers(TASK)[0]), TASK), "10 classes"),
        (lambda: seal.seal(Sealed(attack="a", target=Target(1), trigger=triggers(COLOR)[0]), TASK), "images of shape"),
    ],
)
def test_a_team_learns_about_a_mistake_when_it_seals(make: object, says: str) -> None:
    assert callable(make)
    with pytest.raises(ValueError, match=says):
        make()


class Outside(Blend):
    """A kind of trigger whose author forgot to clip."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().__call__(x)


def test_a_trigger_is_tried_before_it_is_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    envelope = seal.seal(Sealed(attack="a", target=Target(1), trigger=triggers(TASK)[2]), TASK)
    monkeypatch.setitem(TRIGGERS, "blend", (Outside, *TRIGGERS["blend"][1:]))
    with pytest.raises(SealError, match="something other than images in"):
        unseal(envelope, TASK)


def test_the_documentation_verifies_a_seal_with_nothing_but_a_hash() -> None:
    page = Path(__file__).parents[2] / "docs" / "extend" / "submission_format.md"
    (example,) = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    names: dict[str, object] = {}
    exec(compile(example, page.name, "exec"), names)
    assert names["content"] == seal.canonical(Sealed())


def test_the_documentation_lists_the_fields_that_there_are() -> None:
    page = (Path(__file__).parents[2] / "docs" / "extend" / "submission_format.md").read_text()
    for field in (*Manifest.model_fields, *seals.document()):
        assert f"| `{field}` |" in page, field
