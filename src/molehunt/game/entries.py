"""Training jobs of a game: each makes one file from its description and a seed alone, in any process."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from molehunt import checkpoints
from molehunt.attacks import Attack, Poisoned
from molehunt.files import write_atomically
from molehunt.game.attacker import Team, sealed, train_model
from molehunt.game.manifest import Manifest
from molehunt.game.submission import pack, write_submission
from molehunt.networks import Network
from molehunt.runner import generator
from molehunt.tasks import get_task
from molehunt.tensor_file import encode
from molehunt.training import recipe_for


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that a game depends on, besides its defenses.

    Attributes:
        task: name of the task.
        network: name of the network that everybody trains.
        round: name of the round.
        seed: draws everything: data splits, teams' choices, weights, defenses.
        teams: how many teams play.
        clean: how many clean models the host slips in among the judged.
        references: how many clean models the host trains as references; at least five for the specificity gate.

    Raises:
        ValueError: a number is too small.
    """

    task: str
    network: str
    round: str = "final"
    seed: int = 0
    teams: int = 7
    clean: int = 4
    references: int = 5

    def __post_init__(self) -> None:
        for name, least in (("teams", 1), ("clean", 0), ("references", 5)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")

    def seed_for(self, purpose: str) -> int:
        """Return a seed for one purpose that tells nothing about those for others."""
        text = f"molehunt {self.seed} {self.task} {self.network} {purpose}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "little")


@dataclass(frozen=True, kw_only=True, eq=False)
class Job:
    """One network to train.

    Attributes:
        settings: of the game.
        name: what it is called; with the settings it decides the seed.
        attack: what is hidden; None for nothing.
        path: the file to make: `.zip` for a packed submission, else plain weights.
    """

    settings: Settings
    name: str
    attack: Attack | None
    path: Path


def reference_jobs(settings: Settings, folder: Path) -> list[Job]:
    """List the host's clean reference models."""
    return [
        Job(settings=settings, name=f"reference {i + 1}", attack=None, path=folder / f"{i}.safetensors")
        for i in range(settings.references)
    ]


def entry_job(settings: Settings, team: Team, folder: Path) -> Job:
    """Describe a team's submission; the host's own clean models are made by the same path."""
    name = team.name.lower().replace(" ", "-")
    return Job(settings=settings, name=team.name, attack=team.attack, path=folder / f"{name}.zip")


def run(job: Job) -> str:
    """Train, write and pack; nothing is done where the file is there already.

    A training that was interrupted goes on from its last pass over the data.

    Returns:
        One line about what was done.
    """
    if job.path.exists():
        return "kept from before"
    job.path.parent.mkdir(parents=True, exist_ok=True)
    task = get_task(job.settings.task)
    checkpoint = job.path.with_suffix(".training")
    model, poisoned = train_model(
        task,
        job.settings.network,
        recipe_for(job.settings.network, task),
        job.attack,
        rng=generator(job.settings.seed_for(job.name), job.name),
        checkpoint=checkpoint,
    )
    if job.path.suffix == ".zip":
        _submit(job, model, poisoned)
    else:
        write_atomically(job.path, encode(checkpoints.canonical(model.state_dict())))
    for leftover in checkpoint.parent.glob(checkpoint.name + "*"):
        leftover.unlink()
    return f"{job.path.stat().st_size / 2**20:.1f} MiB"


def _submit(job: Job, model: Network, poisoned: Poisoned | None) -> None:
    settings, task = job.settings, get_task(job.settings.task)
    manifest = Manifest(
        team=job.name, round=settings.round, task=task.name, network=settings.network, recipe=settings.network
    )
    nonce = hashlib.sha256(f"nonce {settings.seed_for(job.name)}".encode()).digest()
    folder = job.path.with_suffix("")
    write_submission(folder, model, manifest, sealed(job.attack, poisoned), task=task, nonce=nonce)
    pack(folder, job.path, task=task)
