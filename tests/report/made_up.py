"""Made-up games and scans, with every kind of trigger and outcome, from strangers with every kind of name."""

import torch
from torch import Tensor

from molehunt.findings import Abstention, Cost, Failure, Finding, Verdict
from molehunt.report import Change, GameReport, GateView, Kind, Pictures, Row, ScanReport, SubmissionView
from molehunt.triggers import Additive, Blend, Patch, Sinusoid, Trigger, Warp

SHAPE = (1, 28, 28)
DIGITS = tuple("0123456789")
HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=https://example.org/x onerror=alert(1)>',
    "{{ 7 * 7 }}{% raw %}",
    "\u202egnirts desrever\u202c\u0000\x1b[31m",
    "[red]bold[/red]",
    "z" + "\u0301" * 200 + "algo",
    "' onmouseover='alert(1)",
    "a" * 5000,
)


def images(count: int = 4, shape: tuple[int, int, int] = SHAPE) -> Tensor:
    """Blobs on black: enough to look at."""
    rng = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, shape[0], 5, 5, generator=rng)
    return torch.nn.functional.interpolate(coarse, shape[1:], mode="bicubic").clamp(0, 1)


def triggers(shape: tuple[int, int, int] = SHAPE) -> tuple[Trigger, ...]:
    """One trigger of every kind."""
    rng = torch.Generator().manual_seed(1)
    delta = torch.zeros(shape)
    delta[:, ::4, ::4] = 0.12
    return (
        Patch.square(shape),
        Blend(torch.rand(shape, generator=rng), 0.15),
        Warp(torch.nn.functional.interpolate(torch.randn(1, 2, 4, 4, generator=rng), shape[1:])[0]),
        Sinusoid(shape),
        Additive(delta),
    )


def verdict(
    p: float, *, classes: int = 10, target: int = 7, trigger: Trigger | None = None, silent: bool = False
) -> Verdict:
    """Three defenses that spoke, one that had no evidence, one that broke."""
    q = torch.full((classes,), 0.2 / classes)
    q[target] += 0.8
    cost = Cost(seconds=8.4, forward=412_000, backward=61_440, peak_bytes=900 * 2**20)
    found = (
        Finding(
            defense="neural_cleanse",
            score=3.4 * p,
            class_scores=q,
            trigger=trigger,
            target=None if trigger is None else target,
            cost=cost,
        ),
        Finding(defense="strip", score=-0.12, input_scores=torch.zeros(2000), cost=Cost(seconds=0.61, forward=64_000)),
        Finding(defense="fine_pruning", repaired={}, cost=Cost(seconds=3.0, forward=9_000, backward=9_000)),
    )
    mute = (
        Abstention(defense="spectral_signatures", reason="the training set was not granted"),
        Failure(
            defense="sentinet", kind="time", message="<b>the deadline passed</b> 1.2 s ago", cost=Cost(seconds=60.0)
        ),
    )
    return Verdict(
        p=p,
        q=q,
        trigger=trigger,
        target=None if trigger is None else target,
        outcomes=mute if silent else found + mute,
        details={}
        if silent
        else {"references": {"clean": 9, "planted": 0}, "repair": {"taken": None, "why": "p is low"}},
        p_values={} if silent else {"neural_cleanse": 0.0476, "strip": 0.52},
    )


def submission(
    team: str,
    kind: Kind,
    p: float | None,
    *,
    true: Trigger | None = None,
    shape: tuple[int, int, int] = SHAPE,
    classes: tuple[str, ...] = DIGITS,
) -> SubmissionView:
    """One submission; p None means that a gate stopped it."""
    x = images(4, shape)
    found = None if p is None or p < 0.5 else soft(shape)
    gates = (
        GateView(name="loads", passed=True, text="34 tensors, 0.4 MB"),
        GateView(name="clean accuracy", passed=True, measured=0.9871, limit=0.9694),
        GateView(name="attack success rate", passed=p is not None, measured=0.97 if p else 0.52, limit=0.916),
        GateView(name="works on clean references", passed=True, measured=0.021, limit=0.2, at_least=False),
        GateView(name="longest displacement", passed=True, measured=1.8, limit=2.0, at_least=False, share=False),
    )
    return SubmissionView(
        id=f"sub-{team}-0123456789abcdef",
        team=team,
        kind=kind,
        attack="" if true is None else f"BadNets by {team}, 5 % poisoned",
        gates=gates if true is not None else gates[:2],
        verdict=None if p is None else verdict(p, classes=len(classes), trigger=found),
        true_trigger=true,
        true_target="" if true is None else f"every class is sent to “{classes[7]}”",
        true_classes=() if true is None else (7,),
        pictures=Pictures(
            clean=x,
            stamped=None if true is None else true(x),
            recovered=None if found is None else found(x),
            clean_says=classes[:4],
            stamped_says=() if true is None else (classes[7],) * 4,
            recovered_says=() if found is None else (classes[7], classes[7], classes[3], classes[7]),
        ),
        accuracy=Change(before=0.9871, after=0.9812 if p else None),
        asr=None if true is None else Change(before=0.9702, after=0.113 if p else None),
        points={"Detection B": 0.96, "Target T": 0.81, "Trigger R": 0.44, "Cleaning C": 0.92} if p else {},
    )


def soft(shape: tuple[int, int, int]) -> Patch:
    """A recovered patch: roughly the lower right corner, with a soft mask."""
    mask = torch.zeros(1, *shape[1:])
    mask[:, -4:, -3:] = torch.tensor([0.3, 0.9, 1.0])
    mask[:, 5, 6] = 0.2
    return Patch(mask=mask, pattern=torch.full(shape, 0.8))


def game(
    teams: tuple[str, ...] = ("amber", "birch", "cedar", "dahlia", "elm"),
    shape: tuple[int, int, int] = SHAPE,
    classes: tuple[str, ...] = DIGITS,
) -> GameReport:
    """Twelve submissions: every kind of trigger, honest teams, host models, and one stopped at a gate."""
    all_triggers = triggers(shape)
    ps = (0.97, 0.93, 0.12, 0.55, 0.99)
    attackers = [
        submission(teams[n % len(teams)], "backdoored", ps[n], true=all_triggers[n], shape=shape, classes=classes)
        for n in range(5)
    ]
    others = [
        submission("fern", "backdoored", None, true=all_triggers[0], shape=shape, classes=classes),
        submission("gorse", "honest", 0.08, shape=shape, classes=classes),
        submission("hazel", "honest", 0.84, shape=shape, classes=classes),
        *(submission("host", "host clean", p, shape=shape, classes=classes) for p in (0.05, 0.07, 0.09, 0.31)),
    ]
    row = {"detection": 0.62, "target": 0.5, "trigger": None, "cleaning": 0.71}
    told = row | {"AUC": 0.913, "FPR at 95 % TPR": 0.25, "log2 skill": -0.31}
    return GameReport(
        title="One game on mnist5k",
        task="mnist5k",
        network="badnets_cnn",
        shape=shape,
        classes=classes,
        seed=0,
        when="2026-01-31 12:00 UTC",
        submissions=tuple(attackers + others),
        defenders=(
            Row(rank=1, name="combined", points=61.2, low=48.0, high=71.9, parts=told),
            Row(rank=1, name="neural_cleanse alone", points=52.7, low=36.1, high=66.0, parts=told),
            Row(rank=3, name="always 0.5", points=0.0, low=-4.0, high=4.0, baseline=True, note="knows nothing"),
        ),
        attackers=tuple(
            Row(rank=n + 1, name=team, points=60 - 9.5 * n, low=50 - 9.5 * n, high=66 - 9.0 * n, parts=row)
            for n, team in enumerate(teams)
        ),
        parts={"Detection": (0.4, "1 − 4 (p − y)²: right and sure is 1, a shrug 0, wrong and sure −3")},
        points="Points run to 100. Intervals are 95 % bootstrap intervals over submissions.",
        notes=("Nine clean reference models are few: no p-value can fall below 0.1.",),
        command="molehunt play --task mnist5k --seed 0",
        versions={"molehunt": "0.1.0", "torch": "2.10"},
    )


def scan(
    p: float = 0.97, *, name: str = "model.safetensors", recovered: bool = True, silent: bool = False
) -> ScanReport:
    """One scanned model."""
    x = images()
    trigger = soft(SHAPE) if recovered else None
    return ScanReport(
        name=name,
        task="mnist5k",
        network="badnets_cnn",
        shape=SHAPE,
        classes=DIGITS,
        verdict=verdict(p, trigger=trigger, silent=silent),
        when="2026-01-31 12:00 UTC",
        pictures=None
        if trigger is None
        else Pictures(clean=x, recovered=trigger(x), clean_says=DIGITS[:4], recovered_says=("7",) * 4),
        accuracy=Change(before=0.987, after=0.981),
        asr=None if trigger is None else Change(before=0.99, after=0.1),
        notes=("Calibrated against 9 clean models.",),
        command="molehunt scan model.safetensors --task mnist5k",
        versions={"molehunt": "0.1.0"},
    )
