"""The contract of an attack on the training set, as checks that anybody can run over anybody's class."""

import dataclasses
from collections.abc import Callable

import torch

from molehunt import triggers
from molehunt.attacks.poisoning import Attack, Poisoned
from molehunt.tasks import Images, Task
from molehunt.testing.declaration import check_dataclass, check_docstring, global_generators_at_rest, require
from molehunt.testing.planted import planted

ROWS = 400


def poison(attack: Attack, seed: int = 0) -> tuple[Images, Task, Poisoned]:
    """Poison a small clean training set: the set, its task, and what the attack made of it."""
    case = planted(images=ROWS)
    task, clean = case.suspect.task, case.hidden
    return copied(clean), task, attack(copied(clean), task, torch.Generator().manual_seed(seed))


def copied(images: Images) -> Images:
    """Pictures that an attack may spoil without harm to the next check."""
    return Images(images.x.clone(), images.y.clone())


def is_a_frozen_dataclass(attack: Attack) -> None:
    """The dataclass is the configuration: frozen, with defaults, made again by its repr."""
    check_dataclass(attack)


def documents_itself(attack: Attack) -> None:
    """The docstring says where the attack comes from and where it departs from that."""
    check_docstring(attack, ("Reference", "Departures"))


def poisons_what_it_says(attack: Attack) -> None:
    """Pixels are handed over unstamped, labels change on altered rows only, and some do."""
    clean, task, made = poison(attack)
    require(torch.equal(made.images.x, clean.x), "the images come unstamped; the trainer stamps them")
    require(made.altered.dtype == torch.bool and made.altered.shape == clean.y.shape, "altered must be bool (N,)")
    moved = made.images.y != clean.y
    require(bool(moved.any()), "not one label changed and nothing is poisoned" if not made.altered.any() else
            "no label changed, so nothing ties the trigger to its class")  # fmt: skip
    require(not bool((moved & ~made.altered).any()), "the label of a row changed that carries no trigger")
    made.target.check(task.num_classes)
    goal = made.target.goal(clean.y)
    require(torch.equal(made.images.y[moved], goal[moved]), "a changed label is not where the target sends its class")
    require(bool(made.target.counts(clean.y)[moved].all()), "a label changed outside the source classes")


def poisons_the_share_it_names(attack: Attack) -> None:
    """Where there is a `poison_rate`, exactly that share of all rows gets a changed label; it must lie in (0, 1]."""
    if not hasattr(attack, "poison_rate"):
        return
    clean, task, made = poison(attack)
    moved = int((made.images.y != clean.y).sum())
    wanted = round(attack.poison_rate * len(clean.y))
    require(moved == wanted, f"poison_rate {attack.poison_rate} of {len(clean.y)} rows is {wanted}, {moved} changed")
    for rate in (0.0, -0.1, 1.5):
        try:
            dataclasses.replace(attack, poison_rate=rate)(clean, task, torch.Generator())  # type: ignore[type-var]
        except ValueError:
            continue
        raise AssertionError(f"a poison rate of {rate} should be refused with a ValueError")


def stamps_altered_rows_only(attack: Attack) -> None:
    """`stamped` changes the altered rows, all of them in the way of the trigger, and stays within [0, 1]."""
    clean, _, made = poison(attack)
    x = made.stamped().x
    require(torch.equal(x[~made.altered], clean.x[~made.altered]), "a row without the trigger changed")
    require(torch.equal(x[made.altered], made.trigger(clean.x[made.altered])), "an altered row is not x with trigger")
    require(not torch.equal(x[made.altered], clean.x[made.altered]), "the trigger changes nothing")
    require(float(x.min()) >= 0.0 and float(x.max()) <= 1.0, "stamped pixels leave [0, 1]")


def seals_its_trigger(attack: Attack) -> None:
    """Trigger and target go to JSON and tensors and come back the same, and the trigger fits the pictures."""
    clean, task, made = poison(attack)
    require(triggers.fits(made.trigger, task.shape), f"the trigger does not fit pictures of {task.shape}")
    again = triggers.from_json(made.trigger.to_json(), made.trigger.tensors())
    require(torch.equal(again(clean.x), made.trigger(clean.x)), "the trigger is another one after JSON")
    require(triggers.Target.from_json(made.target.to_json()) == made.target, "the target is another one after JSON")


def repeats_itself(attack: Attack) -> None:
    """The same seed gives the same poison, another seed other rows; no global generator moves; inputs stay."""
    clean, task, first = poison(attack)
    given = copied(clean)
    with global_generators_at_rest():
        second = attack(given, task, torch.Generator().manual_seed(0))
    require(torch.equal(given.x, clean.x) and torch.equal(given.y, clean.y), "it wrote into the clean set")
    same = torch.equal(first.altered, second.altered) and torch.equal(first.images.y, second.images.y)
    stamped = torch.equal(first.stamped().x, second.stamped().x)
    require(same and stamped, "two calls with one seed differ")
    other = attack(given, task, torch.Generator().manual_seed(1))
    require(not torch.equal(first.altered, other.altered), "another seed chose the same rows: does it use rng at all?")


ATTACK_CHECKS: dict[str, Callable[[Attack], None]] = {
    check.__name__: check
    for check in (
        is_a_frozen_dataclass,
        documents_itself,
        poisons_what_it_says,
        poisons_the_share_it_names,
        stamps_altered_rows_only,
        seals_its_trigger,
        repeats_itself,
    )
}


def check_attack(attack: Attack) -> None:
    """Run every check of `ATTACK_CHECKS` on an attack that changes labels.

    Raises:
        AssertionError: a promise is broken; the message says which.
    """
    for name, check in ATTACK_CHECKS.items():
        try:
            check(attack)
        except AssertionError as error:
            raise AssertionError(f"{type(attack).__name__}: {name}: {error}") from error
