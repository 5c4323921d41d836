"""Training jobs of a game: each makes one file from its description and a seed alone, in any process."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from molehunt import checkpoints
from molehunt.attacks import AnyAttack, Poisoned, poison
from molehunt.files import write_atomically
from molehunt.game.attacker import Team, sealed, train_model
from molehunt.game.manifest import Manifest
from molehunt.game.rules import BOARDS, Board
from molehunt.game.submission import open_stored_set, pack, weights_path, write_submission, write_training_set
from molehunt.game.training_set import TrainingSet
from molehunt.networks import Network
from molehunt.runner import generator
from molehunt.tasks import Images, Task, get_task
from molehunt.tensor_file import encode
from molehunt.training import recipe_for


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that a game depends on, besides its defenses.

    Attributes:
        task: name of the task.
        network: name of the network that everybody trains.
        round: name of the round.
        board: "weights": teams hand in models; "data": they hand in training sets, and the host trains every model
            that is judged, also its own clean ones.
        seed: draws everything: data splits, teams' choices, weights, defenses.
        teams: how many teams play.
        clean: how many clean models the host slips in among the judged.
        references: how many clean models the host trains as references; at least five for the specificity gate.

    Raises:
        ValueError: a number is too small, or an unknown board.
    """

    task: str
    network: str
    round: str = "final"
    board: Board = "weights"
    seed: int = 0
    teams: int = 7
    clean: int = 4
    references: int = 5

    def __post_init__(self) -> None:
        for name, least in (("teams", 1), ("clean", 0), ("references", 5)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")

        if self.board not in BOARDS:
            raise ValueError(f"unknown board {self.board!r}; known: {', '.join(BOARDS)}")

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
    attack: AnyAttack | None
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
    if job.settings.board == "data" and job.path.suffix == ".zip":
        return _hand_over(job, task)
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


@dataclass(frozen=True, kw_only=True, eq=False)
class Handed:
    """A training set from which the host trains the model that is judged.

    Attributes:
        settings: of the game.
        folder: of the game.
        id: of the submission; with the settings it decides the order of the images, and the weights.
        training: name of the set in the store of training sets.
    """

    settings: Settings
    folder: Path
    id: str
    training: str

    def images(self) -> Images:
        """The public training split with the set merged into it, shuffled by the game's secret seed.

        It is what the judged model is trained on, and all that a defense gets to see of the set.
        """
        task = get_task(self.settings.task)
        rng = generator(self.settings.seed_for(f"shuffle {self.id}"), "shuffle")
        return open_stored_set(self.folder / "sets", self.training, task).delivered(task.load("train"), rng)


def train_handed(handed: Handed) -> str:
    """Train the judged model of a handed-over set into the store of weights, unless it is there.

    Returns:
        The SHA-256 of the weights, their name in the store.
    """
    note = handed.folder / "judged" / f"{handed.id}.txt"
    if note.exists():
        return note.read_text()
    note.parent.mkdir(parents=True, exist_ok=True)
    task, network = get_task(handed.settings.task), handed.settings.network
    checkpoint = note.with_suffix(".training")
    rng = generator(handed.settings.seed_for(f"judged {handed.id}"), "judged")
    recipe = recipe_for(network, task)
    model, _ = train_model(task, network, recipe, None, rng=rng, images=handed.images(), checkpoint=checkpoint)
    state = checkpoints.canonical(model.state_dict())
    digest = checkpoints.digest(state)
    store = handed.folder / "weights"
    store.mkdir(parents=True, exist_ok=True)
    write_atomically(weights_path(store, digest), encode(state))
    write_atomically(note, [digest.encode()])
    checkpoint.unlink(missing_ok=True)
    return digest


def _hand_over(job: Job, task: Task) -> str:
    clean = task.load("train")
    rng = generator(job.settings.seed_for(job.name), job.name)
    poisoned = None if job.attack is None else poison(job.attack, clean, task, rng)
    training = TrainingSet.of(poisoned, clean, rng)
    folder = job.path.with_suffix("")
    manifest, nonce = _manifest(job)
    write_training_set(folder, training, manifest, sealed(job.attack, poisoned), task=task, nonce=nonce)
    pack(folder, job.path, task=task)
    return "handed over"


def _submit(job: Job, model: Network, poisoned: Poisoned | None) -> None:
    task = get_task(job.settings.task)
    folder = job.path.with_suffix("")
    manifest, nonce = _manifest(job)
    write_submission(folder, model, manifest, sealed(job.attack, poisoned), task=task, nonce=nonce)
    pack(folder, job.path, task=task)


def _manifest(job: Job) -> tuple[Manifest, bytes]:
    """Return what everybody may know, and the secret that opens the seal."""
    settings = job.settings
    manifest = Manifest(
        team=job.name, round=settings.round, task=settings.task, network=settings.network, recipe=settings.network
    )
    return manifest, hashlib.sha256(f"nonce {settings.seed_for(job.name)}".encode()).digest()
