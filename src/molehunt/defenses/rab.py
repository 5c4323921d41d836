"""RAB: networks trained on noisy copies of the training set vote, and the vote is certified against small changes."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from molehunt.defenses._certificates import certified, clopper_pearson, gaussian_radius, partition_flips
from molehunt.defenses._ensemble import answers, member, noise, parts, seed_of
from molehunt.engine import Run
from molehunt.findings import Finding
from molehunt.suspect import Access, Suspect
from molehunt.tasks import Images

Kind = Literal["gaussian", "uniform", "partition"]
RADII = (0.0, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)
"""Total l2 norms at which the curves are told, in units of pixels in [0, 1]."""
SETTLING = 0.2
"""Share of the votes that choose the class; the others, which had no say in it, bound its probability."""


@dataclass(frozen=True, kw_only=True)
class RAB:
    """Train many networks on noisy copies of the submitted training set, and compare their vote with the judged model.

    Score: in [0, 1], higher is more suspicious, small for an honest set. A sample counts where the judged model gives
    the label that it came with, and the vote another: the score is the largest share of such samples among those of one
    label, less the median of that share over labels. `class_scores` (K,) are these differences. `sample_scores` (N,)
    are shares of the votes against the sample's label, 0 to 1, higher is likelier to be poisoned.

    `repaired` is a network of the suspect's architecture, trained on the set's pictures with the vote's labels. It has
    no certificate.

    `radius` is the median over clean images (of the training set where none are granted) of the certified radius of
    those on which the vote is right, 0 for the others. What is certified of an image is the class that most networks
    would give it, over all draws of the noise: it would be the same, had the training pictures been changed by a
    smaller total l2 norm. The image itself, the number of samples, **their labels**, the network and the recipe are the
    same then; samples that were relabeled, added or removed are not covered. Each image's statement is wrong with a
    chance of at most `alpha`, over the noise, and not all of them together. It holds for a seed that whoever made the
    set did not know. Visible patches are far out of reach: a thousand unanimous votes at a size of 1 certify
    a norm of .069 on 1 266 pictures, a tenth of two classes of digits, and a white 4x4 square has a norm of 4.

    Kind "partition" has no radius: `details["flips"]` counts how many samples may be added, removed or relabeled
    without changing the vote on an image. It is exact where training repeats itself to the bit, as on a CPU.
    `details["certificate"]` holds a table and, in words, what it says.

    Attributes:
        kind: "gaussian" or "uniform" noise on the training pictures, or "partition": no noise, and every network is
            trained on a part of the set. Only Gaussian noise gives a radius.
        members: N, networks.
        size: standard deviation of the noise, or half the width of the uniform one, above 0.
        steps: of training each network.
        batch: pictures per step.
        alpha: chance in (0, 1) that the bound of one image's vote is wrong. With fewer than 12 members nothing is
            certified at the default.
        certified: clean images that radii are told of, at most.
        distill: whether a network is trained on the vote's labels.

    Raises:
        ValueError: a setting out of range, or a network whose weights cannot be drawn afresh.

    Reference:
        Weber, Xu, Karlaš, Zhang, Li, "RAB: Provable Robustness Against Backdoor Attacks", IEEE S&P 2023; for
        "partition" Levine, Feizi, "Deep Partition Aggregation: Provable Defenses against General Poisoning Attacks",
        ICLR 2021.

    Departures from the paper:
        Hard votes with exact binomial bounds, not means of soft scores; some votes choose the class and the others
        bound it. Any number of classes. The noise at test time is drawn from a hash of the weights' numbers, as the
        paper asks and its code for MNIST and CIFAR does not. The comparison with a judged model, its score and the
        repair are ours.
    """

    needs: ClassVar[tuple[frozenset[Access], ...]] = (frozenset({Access.TRAINING}),)
    kind: Kind = "gaussian"
    members: int = 20
    size: float = 0.25
    steps: int = 150
    batch: int = 64
    alpha: float = 0.001
    certified: int = 500
    distill: bool = True

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"kind must be one of {', '.join(get_args(Kind))}, got {self.kind!r}")
        for name in ("members", "steps", "batch", "certified"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.members < 2:
            raise ValueError(f"a vote needs 2 members or more, got {self.members}")
        if not self.size > 0:
            raise ValueError(f"size must be above 0, got {self.size}")
        if not 0.0 < self.alpha < 1.0:
            raise ValueError(f"alpha must lie in (0, 1), got {self.alpha}")

    def __call__(self, suspect: Suspect, run: Run) -> Finding:
        """Train, vote, certify and compare; see the class."""
        if suspect.training is None or not len(suspect.training.y):
            raise ValueError("RAB needs the training set, with at least one sample")
        x, y = suspect.training.x, suspect.training.y.cpu()
        granted = suspect.clean is not None and len(suspect.clean.y) > 0
        judged = suspect.clean if granted and suspect.clean is not None else suspect.training
        judged = Images(judged.x[: self.certified], judged.y[: self.certified].cpu())
        ballots, certifying, taught = self.ballots(suspect, judged.x, run)
        votes = _counts(ballots, suspect.classes)
        wrong = 1.0 - votes.gather(1, y.unsqueeze(1)).squeeze(1).double() / self.members
        follows = suspect.logits(x).argmax(1).cpu() == y
        astray = (follows & (votes.argmax(1) != y)).double()
        shares = torch.stack([astray[y == k].mean() if bool((y == k).any()) else astray.new_zeros(()) for k in
                              range(suspect.classes)])  # fmt: skip
        class_scores = shares - shares.quantile(0.5)
        certificate = self.certificate(certifying, judged.y, suspect.classes, taught)
        details: dict[str, Any] = {
            "members": self.members,
            "taught": taught,
            "certified_on": "clean images" if granted else "the training set itself",
            "votes": votes,
            "disagreement": shares,
            **certificate,
        }
        repaired = None
        if self.distill:
            labeled = Images(x, votes.argmax(1).to(suspect.training.y))
            student = member(suspect, labeled, self.steps, self.batch, run)
            repaired = {key: value.detach().cpu() for key, value in student.state_dict().items()}
        return Finding(
            defense="rab",
            score=float(class_scores.max()),
            class_scores=class_scores,
            sample_scores=wrong,
            repaired=repaired,
            radius=certificate.get("radius"),
            details=details,
        )

    def ballots(self, suspect: Suspect, judged: Tensor, run: Run) -> tuple[Tensor, Tensor, int]:
        """What each network says to the training pictures (members, N), to those that are certified, how many learned.

        A network that cannot be trained votes for class 0, always: its vote must not depend on the others, nor may one
        of them end the vote.
        """
        assert suspect.training is not None, "else the call would have ended"
        training = suspect.training
        secret = int(torch.randint(2**62, (), generator=run.rng))
        rows = parts(training, self.members, secret.to_bytes(8, "big")) if self.kind == "partition" else None
        total = self.members + (1 if self.distill else 0)
        own, other, taught = [], [], 0
        for number in range(self.members):
            run.check()
            run.report(number, total)
            # A generator for each: what one network draws must not depend on how much the others drew.
            rng = torch.Generator().manual_seed((secret + 0x9E3779B97F4A7C15 * (number + 1)) % 2**63)
            images = self.share(training, None if rows is None else rows[number], rng)
            try:
                model = member(suspect, images, self.steps, self.batch, run, rng) if len(images.y) > 1 else None
            except FloatingPointError:
                model = None
            if model is None:
                own.append(torch.zeros(len(training.y), dtype=torch.int64))
                other.append(torch.zeros(len(judged), dtype=torch.int64))
                continue
            taught += 1
            shift = None
            if rows is None:
                known = torch.Generator().manual_seed(seed_of(model.state_dict()))
                shift = noise(suspect.task.shape, self.kind, self.size, known)
            own.append(answers(model, suspect, training.x, shift))
            other.append(answers(model, suspect, judged, shift))
        run.report(self.members, total)
        return torch.stack(own), torch.stack(other), taught

    def share(self, training: Images, rows: Tensor | None, rng: torch.Generator) -> Images:
        """What one network is trained on: a part, or all pictures with one draw of noise, the same in every pass."""
        x, y = training
        if rows is not None:
            return Images(x[rows.to(x.device)], y[rows.to(y.device)])
        return Images(x + noise(tuple(x.shape), self.kind, self.size, rng).to(x), y)

    def certificate(self, ballots: Tensor, y: Tensor, classes: int, taught: int) -> dict[str, Any]:
        """What is certified of the vote (members, n) on images with these labels (n,), as `details` hold it."""
        votes = _counts(ballots, classes)
        if self.kind == "partition":
            return self._flips(votes, y, taught)
        settling = max(1, round(SETTLING * self.members))
        winner = _counts(ballots[:settling], classes).argmax(1)
        rest = ballots[settling:]
        right = winner == y
        bounds = torch.tensor(
            [
                clopper_pearson(int((rest[:, i] == k).sum()), len(rest), self.alpha)
                for i, k in enumerate(winner.tolist())
            ],
            dtype=torch.float64,
        )
        share = float((votes.argmax(1) == y).double().mean())
        found: dict[str, Any] = {"lower_bounds": bounds, "accuracy": share}
        if self.kind == "uniform":
            words = (
                f"Noise in [-{self.size:g}, {self.size:g}]: a change of the training pictures, at their labels, is "
                f"certified where one minus the winner's share beyond a half is less than the product over all changed "
                f"values of 1 - |change| / {2 * self.size:g}. There is no radius."
            )
            return {**found, "certificate": {"words": words}}
        # Against all other classes together: what is not the winner's may all be one rival's.
        radii = torch.tensor([gaussian_radius(low, 1.0 - low, self.size) for low in bounds.tolist()]).double()
        counted = torch.where(right, radii, 0.0)
        rate, accuracy = certified(radii, right, torch.tensor(RADII, dtype=torch.float64))
        unanimous = clopper_pearson(len(rest), len(rest), self.alpha)
        most, radius = gaussian_radius(unanimous, 1.0 - unanimous, self.size), float(counted.median())
        table = [
            {"radius": rho, "rate": float(a), "accuracy": float(b)}
            for rho, a, b in zip(RADII, rate, accuracy, strict=True)
        ]
        found |= {"radii": radii, "radius": radius, "most": most}
        words = self._words(len(y), share, radius, most, len(rest))
        return {**found, "certificate": {"table": table, "words": words}}

    def _words(self, images: int, accuracy: float, radius: float, most: float, votes: int) -> str:
        """What a radius says, rounded down, and what it does not."""
        if radius <= 0:
            said = f"On half of {images} images or more nothing is certified"
        else:
            said = (
                f"On half of {images} images the vote is right, and the class that most networks would give, over all "
                f"noise, would be the same had the training pictures been changed by a total l2 norm of less than "
                f"{_down(radius)}"
            )
        return (
            f"{said}. {votes} votes can certify {_down(most)} at most; the vote is right on {accuracy:.1%}. A pattern "
            "of norm d on r pictures has a total of d times the root of r, so a visible patch is far out of reach. "
            "Labels are not covered: nothing is said about samples that were relabeled, added or removed. Each image's "
            f"statement is wrong with a chance of at most {self.alpha:g}, not all of them together."
        )

    def _flips(self, votes: Tensor, y: Tensor, taught: int) -> dict[str, Any]:
        """What a vote of parts certifies: how many samples may be added, removed or relabeled."""
        flips = torch.tensor([partition_flips(row) for row in votes])
        right = votes.argmax(1) == y
        counted = torch.where(right, flips, -1)
        table = [
            {"flips": k, "rate": float((flips >= k).double().mean()), "accuracy": float((counted >= k).double().mean())}
            for k in range(int(flips.max()) + 1)
        ]
        middle, share = int(counted.median()), float(right.double().mean())
        words = (
            f"{taught} of {self.members} parts of the training set taught a network; the others vote for class 0, "
            f"always. The vote is right on {share:.1%} of {len(y)} images"
        )
        if middle >= 0:
            words += (
                f", and on half of all it would be the same had up to {middle} samples been added, removed or "
                "relabeled (a picture whose pixels change counts as two)."
            )
        else:
            words += "; on half of all nothing is certified."
        return {"flips": flips, "accuracy": share, "certificate": {"table": table, "words": words}}


def _down(value: float) -> str:
    """Three digits after the point, never more than the value."""
    return f"{math.floor(1000 * value) / 1000:.3f}"


def _counts(ballots: Tensor, classes: int) -> Tensor:
    """Votes int64 (n, K) from ballots (members, n)."""
    return F.one_hot(ballots, classes).sum(0)
