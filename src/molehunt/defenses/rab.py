"""RAB: networks trained on noisy copies of the training set vote, and the vote is certified against small changes."""

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

    Score: in [-1, 1], higher is more suspicious, about 0 for an honest set. A sample counts where the judged model
    gives the label that it came with, and the vote another: the score is the largest share of such samples among those
    of one label, less the median of that share over labels. `class_scores` (K,) are these differences. `sample_scores`
    (N,) are shares of the votes against the sample's label, 0 to 1, higher is likelier to be poisoned.

    `repaired` is a network of the suspect's architecture, trained on the set's pictures with the vote's labels. It has
    no certificate; only the vote has.

    `radius` is the median certified radius over clean images (of the training set where none are granted; there it
    says nothing about accuracy): no change of the training pictures of a smaller total l2 norm, at the labels that
    they came with, would have changed the vote on them. **Labels are not covered**, nor samples added or removed; for
    those kind "partition" counts in `details["flips"]` how many may be added, removed or relabeled, and has no radius.
    `details["certificate"]` holds the curves of certified rate and certified accuracy, and in words what they say.

    Attributes:
        kind: "gaussian" or "uniform" noise on the training pictures, or "partition": no noise, and every network is
            trained on a part of the set. Only Gaussian noise gives a radius.
        members: N, networks.
        size: standard deviation of the noise, or half the width of the uniform one, above 0.
        steps: of training each network.
        batch: pictures per step.
        alpha: chance in (0, 1) that the bound of one image's vote is wrong.
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
        ballots, certifying = self.ballots(suspect, judged.x, run)
        votes = _counts(ballots, suspect.classes)
        wrong = 1.0 - votes.gather(1, y.unsqueeze(1)).squeeze(1).double() / self.members
        follows = suspect.logits(x).argmax(1).cpu() == y
        astray = (follows & (votes.argmax(1) != y)).double()
        shares = torch.stack([astray[y == k].mean() if bool((y == k).any()) else astray.new_zeros(()) for k in
                              range(suspect.classes)])  # fmt: skip
        class_scores = shares - shares.quantile(0.5)
        certificate = self.certificate(certifying, judged.y, suspect.classes)
        details: dict[str, Any] = {
            "members": self.members,
            "certified_on": "clean images" if granted else "the training set itself",
            "votes": votes,
            "disagreement": shares,
            **certificate,
        }
        repaired = None
        if self.distill:
            taught = member(suspect, Images(x, votes.argmax(1).to(suspect.training.y)), self.steps, self.batch, run)
            repaired = {key: value.detach().cpu() for key, value in taught.state_dict().items()}
        return Finding(
            defense="rab",
            score=float(class_scores.max()),
            class_scores=class_scores,
            sample_scores=wrong,
            repaired=repaired,
            radius=certificate.get("radius"),
            details=details,
        )

    def ballots(self, suspect: Suspect, judged: Tensor, run: Run) -> tuple[Tensor, Tensor]:
        """What each network says to the training pictures (members, N) and to the images that are certified."""
        assert suspect.training is not None, "else the call would have ended"
        x, y = suspect.training
        part = parts(x, self.members) if self.kind == "partition" else None
        total = self.members + (1 if self.distill else 0)
        own, other = [], []
        for number in range(self.members):
            run.check()
            run.report(number, total)
            if part is not None:
                rows = (part == number).nonzero().squeeze(1).to(x.device)
                if not len(rows):
                    # A part without pictures teaches nothing, and its vote must not depend on the others.
                    own.append(torch.zeros(len(x), dtype=torch.int64))
                    other.append(torch.zeros(len(judged), dtype=torch.int64))
                    continue
                images = Images(x[rows], y[rows])
            else:
                # One draw per network, not per pass: what is certified is a function of one noisy set.
                images = Images(x + noise(tuple(x.shape), self.kind, self.size, run.rng).to(x), y)
            model = member(suspect, images, self.steps, self.batch, run)
            shift = None
            if part is None:
                rng = torch.Generator().manual_seed(seed_of(model.state_dict()))
                shift = noise(suspect.task.shape, self.kind, self.size, rng)
            own.append(answers(model, suspect, x, shift))
            other.append(answers(model, suspect, judged, shift))
        run.report(self.members, total)
        return torch.stack(own), torch.stack(other)

    def certificate(self, ballots: Tensor, y: Tensor, classes: int) -> dict[str, Any]:
        """What is certified of the vote (members, n) on images with these labels (n,), as `details` hold it."""
        votes = _counts(ballots, classes)
        if self.kind == "partition":
            flips = torch.tensor([partition_flips(row) for row in votes])
            right = votes.argmax(1) == y
            said = (
                f"Of {self.members} parts of the training set, each taught one network. On half of {len(y)} images the "
                f"vote would be the same had up to {int(flips.median())} samples been added, removed or relabeled."
            )
            table = [
                {"flips": k, "rate": float((flips >= k).double().mean()),
                 "accuracy": float(((flips >= k) & right).double().mean())}
                for k in range(int(flips.max()) + 1)
            ]  # fmt: skip
            return {"flips": flips, "certificate": {"table": table, "words": said}}
        settling = max(1, round(SETTLING * self.members))
        winner = _counts(ballots[:settling], classes).argmax(1)
        rest = ballots[settling:]
        right = winner == y
        bounds = torch.tensor([
            clopper_pearson(int((rest[:, i] == k).sum()), len(rest), self.alpha)
            for i, k in enumerate(winner.tolist())
        ])  # fmt: skip
        found: dict[str, Any] = {"lower_bounds": bounds, "accuracy": float((votes.argmax(1) == y).double().mean())}
        if self.kind == "uniform":
            words = "Uniform noise certifies single changes by `uniform_holds`; it has no radius."
            return {**found, "certificate": {"words": words}}
        # Against all other classes together: what is not the winner's may all be one rival's.
        radii = torch.tensor([gaussian_radius(low, 1.0 - low, self.size) for low in bounds.tolist()])
        rate, accuracy = certified(radii, right, torch.tensor(RADII))
        most = gaussian_radius(low := clopper_pearson(len(rest), len(rest), self.alpha), 1.0 - low, self.size)
        radius = float(radii.median())
        words = (
            f"On half of {len(y)} images the vote of {len(rest)} networks would be the same had the training pictures "
            f"been changed by a total l2 norm of less than {radius:.3f}; the most that so many votes can certify is "
            f"{most:.3f}. A pattern of norm d on r pictures has a total of d times the root of r. Labels are not "
            "covered: nothing is said about samples that were relabeled, added or removed."
        )
        table = [
            {"radius": rho, "rate": float(a), "accuracy": float(b)}
            for rho, a, b in zip(RADII, rate, accuracy, strict=True)
        ]
        return {
            **found,
            "radii": radii,
            "radius": radius,
            "most": most,
            "certificate": {"table": table, "words": words},
        }


def _counts(ballots: Tensor, classes: int) -> Tensor:
    """Votes int64 (n, K) from ballots (members, n)."""
    return F.one_hot(ballots, classes).sum(0)
