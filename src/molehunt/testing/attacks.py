"""The contract of an attack, as checks that anybody can run over anybody's class: it alters a set or makes a model."""

import dataclasses
import functools
import itertools
import tempfile
from collections.abc import Callable, Hashable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from molehunt import triggers
from molehunt.attacks.crafting import AnyAttack, Bench, Crafted, Crafter
from molehunt.attacks.poisoning import Attack, Poisoned, poison_count
from molehunt.networks import Network, build
from molehunt.tasks import Images, Task
from molehunt.testing.declaration import check_dataclass, check_docstring, global_generators_at_rest, require
from molehunt.testing.planted import SHAPE, planted
from molehunt.training import Recipe

ROWS = 400
CLOSE = 1e-5  # networks and warps may differ by rounding between batch sizes
SMALL = "lenet5"
"""The network that is made while an attack that makes models is checked."""
BRIEF = Recipe(epochs=3, batch=50, optimizer="adamw", lr=4e-3, precision="float32")


def poison(attack: Attack, seed: int = 0, task: Task | None = None) -> tuple[Images, Task, Poisoned]:
    """Poison a small clean training set: the set, its task, and what the attack made of it."""
    on, clean = _small() if task is None else _some(task)
    return copied(clean), on, attack(copied(clean), on, torch.Generator().manual_seed(seed))


def copied(images: Images) -> Images:
    """Pictures that an attack may spoil without harm to the next check."""
    return Images(images.x.clone(), images.y.clone())


def keeps_labels(attack: Attack) -> bool:
    """Whether the attack says that it is clean-label: `clean_label`, a setting or a constant of the class."""
    return bool(getattr(attack, "clean_label", False))


def is_a_frozen_dataclass(attack: AnyAttack, task: Task | None = None) -> None:
    """The dataclass is the configuration: frozen, with defaults, made again by its repr."""
    check_dataclass(attack)


def documents_itself(attack: AnyAttack, task: Task | None = None) -> None:
    """The docstring says where the attack comes from and where it departs from that."""
    check_docstring(attack, ("Reference", "Departures"))


def poisons_what_it_says(attack: Attack, task: Task | None = None) -> None:
    """Only altered rows are touched; labels go where a declared target sends them, or, clean-label, nowhere."""
    clean, on, made = poison(attack, task=task)
    x, y = made.images
    require(y.shape == clean.y.shape and y.dtype == clean.y.dtype, "labels must be int64 (N,), as they were")
    require(x.shape == clean.x.shape and x.dtype == clean.x.dtype, "pictures changed their shape or dtype")
    require(made.altered.dtype == torch.bool and made.altered.shape == clean.y.shape, "altered must be bool (N,)")
    moved = y != clean.y
    backdoors = ((made.trigger, made.target), *made.further)
    for _, target in backdoors:
        target.check(on.num_classes)
    require(bool(made.altered.any()), "nothing is poisoned: no row is altered")
    if keeps_labels(attack):
        require(not bool(moved.any()), "a label changed although the attack says that it is clean-label")
        tied = made.altered & (y == made.target.goal(clean.y))
        require(bool(tied.any()), "no altered row is of the target class, so nothing ties the trigger to it")
    else:
        require(bool(moved.any()), "no label changed, so nothing ties the trigger to its class")
    require(not bool((moved & ~made.altered).any()), "the label of a row changed that carries no trigger")
    same = (x == clean.x).flatten(1).all(1)
    require(bool(same[moved].all()), "the images come unstamped; the trainer stamps them")
    require(bool(same[~made.altered].all()), "the pixels of a row changed that is not altered")
    sent = torch.stack([y == target.goal(clean.y) for _, target in backdoors])
    require(bool(sent.any(0)[moved].all()), "a changed label is not where the target sends its class")
    counted = torch.stack([target.counts(clean.y) for _, target in backdoors])
    require(bool((sent & counted).any(0)[moved].all()), "a label changed outside the source classes")


def poisons_the_share_it_names(attack: Attack, task: Task | None = None) -> None:
    """Where there is a `poison_rate`, exactly that share of all rows is poisoned; it must lie in (0, 1].

    Poisoned are the rows whose label changed; of a clean-label attack, the altered rows that have the target's label.
    """
    if not hasattr(attack, "poison_rate"):
        return
    clean, on, made = poison(attack, task=task)
    own = made.images.y == made.target.goal(clean.y)
    hit = int((made.altered & own if keeps_labels(attack) else made.images.y != clean.y).sum())
    wanted = poison_count(attack.poison_rate, len(clean.y))
    require(hit == wanted, f"poison_rate {attack.poison_rate} of {len(clean.y)} rows is {wanted}, {hit} changed")
    for rate in (0.0, -0.1, 1.5):
        try:
            dataclasses.replace(attack, poison_rate=rate)(clean, on, torch.Generator())  # type: ignore[type-var]
        except ValueError:
            continue
        raise AssertionError(f"a poison rate of {rate} should be refused with a ValueError")


def stamps_altered_rows_only(attack: Attack, task: Task | None = None) -> None:
    """`stamped` changes the altered rows, every one of them, by its marks or by the trigger, and stays in [0, 1]."""
    clean, _, made = poison(attack, task=task)
    for mark in made.marks:
        require(mark.rows.dtype == torch.bool and mark.rows.shape == clean.y.shape, "a mark's rows must be bool (N,)")
        require(not bool((mark.rows & ~made.altered).any()), "a mark lies on a row that is not altered")
    before = made.images.x.clone()
    x = made.stamped().x
    require(torch.equal(made.images.x, before), "stamping wrote into the pictures; it must make a copy")
    require(x.dtype == clean.x.dtype and x.shape == clean.x.shape, "stamping changed the shape or dtype")
    require(torch.equal(x[~made.altered], clean.x[~made.altered]), "a row without the trigger changed")
    if not made.marks:
        wanted = made.trigger(before[made.altered])
        require(_close(x[made.altered], wanted), "an altered row is not x with trigger")
    changed = (x != clean.x).flatten(1).any(1)
    require(bool(changed[made.altered].any()), "the trigger changes nothing")
    idle = made.altered & ~changed & (made.images.y == clean.y)
    require(not bool(idle.any()), f"{int(idle.sum())} altered rows differ from the clean set in nothing")
    _within(x, "stamped pixels leave [0, 1]")


def stamps_a_batch_as_the_whole(attack: Attack, task: Task | None = None) -> None:
    """A row looks the same alone, in any batch and in the set that is handed over; the batch itself stays as it is."""
    _, _, made = poison(attack, task=task)
    whole = made.stamped().x
    altered = made.altered.nonzero().squeeze(1)
    rest = (~made.altered).nonzero().squeeze(1)
    mixed = torch.cat((altered, rest[:20], altered[:3]))
    mixed = mixed[torch.randperm(len(mixed), generator=torch.Generator().manual_seed(0))]
    for rows in (mixed, *torch.split(altered[:3], 1), *torch.split(mixed, 7)[:2]):
        x = made.images.x[rows]
        before = x.clone()
        stamped = made.stamp(x, rows)
        require(torch.equal(x, before), "stamp wrote into the batch; it must make a copy")
        require(_close(stamped, whole[rows]), "a row is stamped differently in another batch")


def keeps_its_budget(attack: Attack, task: Task | None = None) -> None:
    """The trigger is a pure function of the picture, and changes no more than its footprint says."""
    clean, _, made = poison(attack, task=task)
    _keeps_budget(made, clean)


def _keeps_budget(made: Poisoned, clean: Images) -> None:
    for trigger, _ in ((made.trigger, made.target), *made.further):
        x = clean.x[:100].clone()
        stamped = trigger(x)
        require(torch.equal(x, clean.x[:100]), "the trigger wrote into the pictures; it must make a copy")
        _within(stamped, "the trigger leaves [0, 1]")
        backwards = torch.cat([trigger(one) for one in torch.split(x.flip(0), 1)]).flip(0)
        require(_close(backwards, stamped), "the trigger depends on the batch; it must look at each picture alone")
        print_ = trigger.footprint()
        require(print_.kind in triggers.TRIGGERS, f"{print_.kind!r} is no kind of trigger that can be sealed")
        change = (stamped - x).abs()
        require(bool((change > CLOSE).any()), "the trigger changes nothing")
        most = float(change.max())
        require(most <= print_.linf + CLOSE, f"a value changed by {most:.4f}, the footprint says {print_.linf:.4f}")
        area = float((change > CLOSE).any(1).double().flatten(1).mean(1).max())
        require(area <= print_.area + CLOSE, f"{area:.4f} of a picture changed, the footprint says {print_.area:.4f}")


def seals_its_trigger(attack: Attack, task: Task | None = None) -> None:
    """Trigger and target go to JSON and tensors and come back the same, and the trigger fits the pictures."""
    clean, on, made = poison(attack, task=task)
    _seals(made, clean, on)


def _seals(made: Poisoned, clean: Images, on: Task) -> None:
    for trigger, target in ((made.trigger, made.target), *made.further):
        require(triggers.fits(trigger, on.shape), f"the trigger does not fit pictures of {on.shape}")
        again = triggers.from_json(trigger.to_json(), trigger.tensors())
        require(torch.equal(again(clean.x), trigger(clean.x)), "the trigger is another one after JSON")
        require(triggers.Target.from_json(target.to_json()) == target, "the target is another one after JSON")


def repeats_itself(attack: Attack, task: Task | None = None) -> None:
    """The same seed gives the same poison, another seed another; no global generator moves; inputs stay."""
    clean, on, first = poison(attack, task=task)
    given = copied(clean)
    with global_generators_at_rest():
        second = attack(given, on, torch.Generator().manual_seed(0))
        stamped = second.stamped().x
    require(torch.equal(given.x, clean.x) and torch.equal(given.y, clean.y), "it wrote into the clean set")
    same = torch.equal(first.altered, second.altered) and torch.equal(first.images.y, second.images.y)
    same = same and torch.equal(first.images.x, second.images.x)
    require(same and torch.equal(first.stamped().x, stamped), "two calls with one seed differ")
    require(torch.equal(second.stamped().x, stamped), "stamping twice gives two results")
    other = attack(given, on, torch.Generator().manual_seed(1))
    own = first.images.y == first.target.goal(clean.y)
    if keeps_labels(attack) and torch.equal(first.altered, own):
        return  # it takes the whole target class, so there is nothing to draw
    require(not torch.equal(first.altered, other.altered), "another seed chose the same rows: does it use rng at all?")


ATTACK_CHECKS: dict[str, Callable[[Attack, Task | None], None]] = {
    check.__name__: check
    for check in (
        is_a_frozen_dataclass,
        documents_itself,
        poisons_what_it_says,
        poisons_the_share_it_names,
        stamps_altered_rows_only,
        stamps_a_batch_as_the_whole,
        keeps_its_budget,
        seals_its_trigger,
        repeats_itself,
    )
}


class _Stopped(Exception):
    pass


def bench_for(
    task: Task | None = None, seed: int = 0, *, checkpoint: Path | None = None, check: Callable[[], None] | None = None
) -> Bench:
    """A bench with a small clean training set, a small network and a brief recipe."""
    on, clean = _small() if task is None else _some(task)
    return Bench(
        clean=copied(clean),
        task=on,
        network=SMALL,
        recipe=BRIEF,
        rng=torch.Generator().manual_seed(seed),
        checkpoint=checkpoint,
        check=check,
    )


def _made(attack: Crafter, task: Task | None) -> tuple[Bench, Crafted, int]:
    return _crafted(cast("Hashable", attack), task)


@functools.lru_cache(maxsize=4)
def _crafted(attack: Any, task: Task | None) -> tuple[Bench, Crafted, int]:
    """What an attack makes, and how often it asked whether to stop; once for all checks, as each making is a training.

    An attack is known by itself, not by its settings: tensors among them cannot be compared.
    """
    asked: list[None] = []
    bench = bench_for(task, check=lambda: asked.append(None))
    return bench, attack.craft(bench), len(asked)


def makes_the_network_that_was_asked_for(attack: Crafter, task: Task | None = None) -> None:
    """The model is a network of the bench's kind, in eval mode, on the CPU, with finite weights of the same names."""
    bench, made, _ = _made(attack, task)
    require(isinstance(made, Crafted), f"craft returned a {type(made).__name__}, expected molehunt.attacks.Crafted")
    model = made.model
    require(isinstance(model, Network), f"the model is a {type(model).__name__}, expected what `Bench.fresh` makes")
    wanted = build(bench.network, bench.task.shape, bench.task.num_classes).state_dict()
    state = model.state_dict()
    require(list(state) == list(wanted), "the model's weights have other names than the network's")
    for name, value in state.items():
        require(value.shape == wanted[name].shape, f"{name} has another shape than in the network")
        require(bool(torch.isfinite(value).all()), f"{name} holds numbers that are none")
        require(value.device.type == "cpu", f"{name} lies on {value.device}; hand the model back on the CPU")
    require(not any(module.training for module in model.modules()), "the model is in training mode")
    hooks = [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]
    require(not hooks, "the model still has hooks: what a file cannot hold is no part of a submission")


def says_what_it_hid(attack: Crafter, task: Task | None = None) -> None:
    """Trigger and target keep budget and seal, and the training set is the clean one but for altered rows."""
    bench, made, _ = _made(attack, task)
    poisoned, clean = made.poisoned, bench.clean
    poisoned.target.check(bench.task.num_classes)
    _keeps_budget(poisoned, clean)
    _seals(poisoned, clean, bench.task)
    x, y = poisoned.images
    require(x.shape == clean.x.shape and y.shape == clean.y.shape, "the training set has another size")
    same = (x == clean.x).flatten(1).all(1) & (y == clean.y)
    require(bool(same[~poisoned.altered].all()), "a row differs from the clean set that is not altered")
    stamped = poisoned.stamped().x
    require(torch.equal(stamped[~poisoned.altered], clean.x[~poisoned.altered]), "a row without the trigger changed")


def repeats_its_model(attack: Crafter, task: Task | None = None) -> None:
    """The same bench gives the same weights, another seed others; no global generator moves; the data stay."""
    _, made, _ = _made(attack, task)
    again = bench_for(task)
    given = copied(again.clean)
    with global_generators_at_rest():
        second = attack.craft(again)
    kept = torch.equal(given.x, again.clean.x) and torch.equal(given.y, again.clean.y)
    require(kept, "it wrote into the clean set")
    require(_equal(made.model, second.model), "two makings with one seed differ")
    require(not _equal(made.model, attack.craft(bench_for(task, 1)).model), "another seed made the same model")


def goes_on_where_it_stopped(attack: Crafter, task: Task | None = None) -> None:
    """A making that was interrupted, and is done again with its checkpoints, ends with the same weights."""
    _, made, asked = _made(attack, task)
    require(asked > 0, "it never asks whether to stop: train with Bench.train, and call Bench.check in long loops")
    for share in (0.3, 0.8):
        left = itertools.count(int(share * asked), -1)

        def check(left: Iterator[int] = left) -> None:
            if next(left) == 0:
                raise _Stopped

        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "training"
            with suppress(_Stopped):
                attack.craft(bench_for(task, checkpoint=path, check=check))
                raise AssertionError("it asks less often with the same seed, or goes on when it is told to stop")
            second = attack.craft(bench_for(task, checkpoint=path))
        require(_equal(made.model, second.model), "an interrupted making that goes on ends with other weights")


CRAFT_CHECKS: dict[str, Callable[[Crafter, Task | None], None]] = {
    check.__name__: check
    for check in (
        is_a_frozen_dataclass,
        documents_itself,
        makes_the_network_that_was_asked_for,
        says_what_it_hid,
        repeats_its_model,
        goes_on_where_it_stopped,
    )
}


def check_attack(attack: AnyAttack, task: Task | None = None) -> None:
    """Run the checks of an attack: `ATTACK_CHECKS` where it poisons a set, `CRAFT_CHECKS` where it makes a model.

    An attack that says `clean_label` (a setting, or a constant of the class) may change no label; any other has to
    change some. What a game asks besides is not asked here: that the trigger is small enough (`molehunt.game.budget`),
    and that a network learns it (`molehunt check`).

    Args:
        attack: the attack.
        task: whose pictures to poison, 400 of its training split; None for synthetic color pictures of 12 x 12. An
            attack that is made for pictures of one size needs its task.

    Raises:
        AssertionError: a promise is broken, or the attack raises; the message says which.
    """
    checks: dict[str, Callable[[Any, Task | None], None]] = ATTACK_CHECKS
    if isinstance(attack, Crafter):
        checks = CRAFT_CHECKS
    for name, check in checks.items():
        try:
            check(attack, task)
        except AssertionError as error:
            raise AssertionError(f"{type(attack).__name__}: {name}: {error}") from error
        except Exception as error:
            on = f"pictures of shape {SHAPE}; give the task that it is made for" if task is None else task.name
            raise AssertionError(f"{type(attack).__name__}: {name}: raised {error!r} on {on}") from error


@functools.cache
def _small() -> tuple[Task, Images]:
    """The task and pictures on which attacks are checked."""
    case = planted(images=ROWS)
    return case.suspect.task, case.hidden


def _some(task: Task) -> tuple[Task, Images]:
    """As many pictures of a task, drawn so that every class has its share."""
    whole = task.load("train")
    rng = torch.Generator().manual_seed(0)
    rows = torch.randperm(len(whole.y), generator=rng)
    # Class after class, and then every n-th: so no class is short by more than one row of its share.
    rows = rows[whole.y[rows].argsort(stable=True)]
    rows = rows[torch.linspace(0, len(rows) - 1, min(ROWS, len(rows))).round().long()]
    rows = rows[torch.randperm(len(rows), generator=rng)]
    return task, Images(whole.x[rows], whole.y[rows])


def _equal(one: Network, other: Network) -> bool:
    state, twin = one.state_dict(), other.state_dict()
    return all(torch.equal(value, twin[name]) for name, value in state.items())


def _close(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one, other, rtol=0.0, atol=CLOSE)


def _within(x: Tensor, broken: str) -> None:
    # NaN fails every comparison.
    require(bool(((x >= 0.0) & (x <= 1.0)).all()), broken)
