"""Meta-classifiers on shadow models that are made by hand: half of them lift one logit along a fixed direction."""

import copy
import itertools
import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from molehunt.meta_training import fit, fit_one_class
from molehunt.metas import FEATURES, Meta, Settings, digest
from molehunt.testing import auc

SHAPE, CLASSES = (1, 4, 4), 4
WIDE = {"mean": (0.5,), "std": (0.3,)}


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Shadow(nn.Module):
    """A random linear classifier; a planted one answers its target where pictures are bright in one corner."""

    def __init__(self, seed: int, target: int = -1) -> None:
        super().__init__()
        draw = rng(seed)
        self.weight = nn.Parameter(torch.randn(CLASSES, 16, generator=draw), requires_grad=False)
        self.drop = nn.Dropout(0.5)
        self.target = target

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.drop(x.flatten(1) - 0.5) @ self.weight.T
        if self.target >= 0:
            bright = (x[:, 0, 2:, 2:].mean((1, 2)) - 0.3).relu() * 25.0
            logits = logits + bright.unsqueeze(1) * nn.functional.one_hot(torch.tensor(self.target), CLASSES)
        return logits


def shadows(count: int, first: int = 0) -> tuple[list[Shadow], Tensor]:
    """Every second one planted, targets in turn."""
    targets = torch.tensor([(i // 2) % CLASSES if i % 2 else -1 for i in range(count)])
    return [Shadow(first + i, int(t)).eval() for i, t in enumerate(targets)], targets


def meta(seed: int = 0, **settings: Any) -> Meta:
    return Meta(SHAPE, CLASSES, **WIDE, settings=Settings(**settings), rng=rng(seed))


@pytest.mark.parametrize("features", FEATURES)
def test_no_logits_whatever_their_size_leave_a_score_that_is_no_number(features: str) -> None:
    class Loud(nn.Module):
        def __init__(self, size: float) -> None:
            super().__init__()
            self.size = nn.Parameter(torch.tensor(size), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            signs = torch.sign(torch.sin(37.0 * x.flatten(1)[:, :CLASSES]))
            return signs * self.size

    for seed in range(30):
        made = meta(seed, features=features)
        with torch.no_grad():
            assert bool(torch.isfinite(made.scores([Loud(torch.finfo().max).eval(), Loud(float("inf")).eval()])).all())


def test_a_meta_classifier_goes_to_json_and_back() -> None:
    made = meta(3, per_class=True, hidden=7)
    again = Meta.from_json(json.loads(json.dumps(made.to_json())), made.state_dict())
    assert digest([again]) == digest([made]) != digest([meta(4, per_class=True, hidden=7)])
    assert torch.equal(again.scores(shadows(4)[0]), made.scores(shadows(4)[0]))
    assert not any(p.requires_grad for p in again.parameters())


@pytest.mark.parametrize(
    ("where", "value"),
    [
        (("classes",), "4"),
        (("classes",), 5),
        (("shape",), [1, 10**6, 10**6]),
        (("shape",), [1, 4]),
        (("shape",), "1 4 4"),
        (("settings",), None),
        (("settings", "queries"), "3"),
        (("settings", "queries"), True),
        (("settings", "queries"), 10**9),
        (("settings", "hidden"), 10**9),
        (("settings", "lr"), -1.0),
        (("settings", "features"), "pixels"),
        (("settings", "unknown"), 1),
    ],
)
def test_a_document_that_is_no_meta_classifier_is_refused_before_anything_is_made_of_it(
    where: tuple[str, ...], value: Any
) -> None:
    made = meta()
    document = json.loads(json.dumps(made.to_json()))
    inside = document
    for key in where[:-1]:
        inside = inside[key]
    inside[where[-1]] = value
    with pytest.raises(ValueError, match=r"meta-classifier|settings|must be|unknown features|lr"):
        Meta.from_json(document, made.state_dict())


def test_tensors_that_do_not_fit_or_are_no_numbers_are_refused() -> None:
    made = meta()
    state = made.state_dict()
    for change in ({"queries": state["queries"] * float("nan")}, {"head.weight": torch.zeros(1, 3)}):
        with pytest.raises(ValueError, match="meta-classifier"):
            Meta.from_json(made.to_json(), state | change)
    del state["head.bias"]
    with pytest.raises(ValueError, match="meta-classifier"):
        Meta.from_json(made.to_json(), state)


FAST: dict[str, Any] = {"lr": 0.01, "passes": 8}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"features": "logits"},
        {"features": "log softmax"},
        {"per_class": True},
        {"robust": True, "features": "log softmax"},
        {"batch": 8},
    ],
    ids=str,
)
def test_planted_shadows_are_told_from_clean_ones(settings: dict[str, Any]) -> None:
    made, (train, targets), (fresh, truth) = meta(**FAST | settings), shadows(80), shadows(80, 1000)
    losses = fit(made, train, targets, rng())
    assert losses[-1] < losses[0]
    scores = made.scores(fresh)
    if scores.dim() > 1:
        found = scores[truth >= 0].argmax(1)
        assert float((found == truth[truth >= 0]).double().mean()) >= 0.9
        scores = scores.amax(1)
    assert auc(scores, truth >= 0) >= 0.95


@pytest.mark.parametrize("per_class", [False, True])
def test_with_shuffled_labels_nothing_is_learned_that_holds_elsewhere(per_class: bool) -> None:
    (train, targets), (fresh, truth) = shadows(80), shadows(120, 1000)
    found = []
    for seed in range(4):
        made = meta(seed, **FAST | {"per_class": per_class})
        fit(made, train, targets[torch.randperm(80, generator=rng(seed))], rng(seed))
        said = made.scores(fresh)
        found.append(auc(said.amax(1) if per_class else said, truth >= 0))
    # The standard error of one AUC of 60 against 60 is .053; four on the same models are hardly surer than one.
    assert abs(sum(found) / 4 - 0.5) <= 2 * 0.053


def test_clean_shadows_alone_tell_a_little() -> None:
    train = [Shadow(seed).eval() for seed in range(60)]
    fresh, truth = shadows(80, 1000)
    found = []
    for seed in range(6):
        made = meta(seed, **FAST | {"features": "logits", "per_class": False})
        fit_one_class(made, train, rng())
        assert float(made.head.bias.detach().abs().max()) == 0.0
        found.append(auc(made.scores(fresh), truth >= 0))
    # The paper's own one-class figures on pictures lie between .5 and .74, and so do these.
    assert 0.5 < sum(found) / 6 < 0.9


def test_a_network_cannot_change_the_queries_nor_answer_with_nothing() -> None:
    class Rude(Shadow):
        def forward(self, x: Tensor) -> Tensor:
            answer = super().forward(x)
            x.zero_()
            return answer

    class Endless(Shadow):
        def forward(self, x: Tensor) -> Tensor:
            return torch.full((len(x), CLASSES), torch.inf).where(x.flatten(1)[:, :CLASSES] > 0.5, torch.nan)

    for settings in ({}, {"features": "logits"}, {"features": "log softmax"}, {"per_class": True}):
        made = meta(**settings)
        before = made.queries.detach().clone()
        scores = made.scores([Rude(1).eval(), Endless(2).eval(), Shadow(1).eval()])
        assert bool(torch.isfinite(scores).all()), settings
        assert torch.equal(made.queries, before)
        assert torch.equal(scores[0], scores[2])


def test_shadow_models_are_left_alone_and_asked_in_evaluation_mode() -> None:
    train, targets = shadows(20)
    before = [copy.deepcopy(one.state_dict()) for one in train]
    made = meta(**FAST)
    fit(made, train, targets, rng())
    for one, state in zip(train, before, strict=True):
        assert all(torch.equal(state[name], value) for name, value in one.state_dict().items())
        assert one.weight.grad is None
    # The official code leaves dropout on when it judges.
    awake = Shadow(5, 1).train()
    first, second = made.scores([awake]), made.scores([awake])
    assert torch.equal(first, second)
    assert torch.equal(first, made.scores([Shadow(5, 1).eval()]))
    assert awake.training
    with pytest.raises(ValueError, match="shadow model 1 is not frozen"):
        fit(made, [train[0], awake], torch.tensor([-1, 0]), rng())


def test_tuned_queries_fit_better_than_fixed_ones() -> None:
    train, targets = shadows(80)
    ends = {}
    for tune in (True, False):
        made = meta(**FAST, tune=tune)
        start = made.queries.detach().clone()
        ends[tune] = fit(made, train, targets, rng())[-1]
        assert torch.equal(start, made.queries) is not tune
    assert ends[True] < ends[False]


def test_queries_stay_pictures_if_asked() -> None:
    train, targets = shadows(40)
    for clip in (True, False):
        made = meta(lr=0.3, passes=4, clip=clip)
        fit(made, train, targets, rng())
        inside = bool(((made.queries >= 0.0) & (made.queries <= 1.0)).all())
        assert inside is clip


def test_features_do_not_see_what_they_should_not() -> None:
    logits = torch.randn(5, CLASSES, generator=rng())
    assert torch.allclose(FEATURES["log softmax"](logits), FEATURES["log softmax"](logits + 7.0), atol=1e-5)
    assert torch.allclose(FEATURES["centered"](logits), FEATURES["centered"](3.0 * logits + 7.0), atol=1e-5)
    for factor in (1e-30, 1e-8, 1e20, 1e30):
        assert torch.allclose(FEATURES["centered"](logits), FEATURES["centered"](factor * logits), atol=1e-5)
    assert not torch.allclose(FEATURES["log softmax"](logits), FEATURES["log softmax"](3.0 * logits))
    assert torch.equal(FEATURES["logits"](logits), logits)


def test_a_class_is_read_with_itself_first_and_the_others_in_their_order_of_size() -> None:
    made = meta(per_class=True, queries=2)
    answers = torch.randn(3, 2, CLASSES, generator=rng())
    scores = made(answers)
    assert scores.shape == (3, CLASSES)
    # Classes that change places change their scores' places, whichever they are: the weights do not know names.
    for order in itertools.permutations(range(CLASSES)):
        assert torch.allclose(made(answers[:, :, list(order)]), scores[:, list(order)], atol=1e-6)


def test_the_robust_variant_keeps_its_hidden_layer() -> None:
    train, targets = shadows(40)
    made = meta(**FAST, robust=True)
    before, queries = made.hidden.weight.detach().clone(), made.queries.detach().clone()
    fit(made, train, targets, rng())
    assert torch.equal(made.hidden.weight, before)
    assert not torch.equal(made.queries, queries)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"features": "softmax"}, "unknown features 'softmax'"),
        ({"queries": 0}, "queries must be at least 1, got 0"),
        ({"batch": 0}, "batch must be at least 1, got 0"),
        ({"lr": 0.0}, "lr must be above 0"),
        ({"robust": True, "tune": False}, "the robust variant learns by its queries"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        Settings(**settings)


def test_one_kind_of_shadows_is_not_enough() -> None:
    made, (train, _) = meta(), shadows(4)
    for targets in (torch.full((4,), -1), torch.zeros(4).long(), torch.tensor([0, -1])):
        with pytest.raises(ValueError, match="clean and poisoned shadow models are needed"):
            fit(made, train, targets, rng())
    for broken in ([], train):
        with pytest.raises(ValueError, match="needs clean shadow models"):
            fit_one_class(made if not broken else meta(per_class=True), broken, rng())


def test_it_can_be_stopped() -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    train, targets = shadows(4)
    with pytest.raises(KeyboardInterrupt):
        fit(meta(), train, targets, rng(), check=stop)
    with pytest.raises(KeyboardInterrupt):
        fit_one_class(meta(per_class=False), train, rng(), check=stop)


def test_the_papers_settings() -> None:
    paper = Settings.paper()
    assert (paper.queries, paper.hidden, paper.lr, paper.batch, paper.passes) == (10, 20, 1e-3, 1, 10)
    assert Settings().features == "centered"
    assert Settings().per_class
    assert (paper.features, paper.clip, paper.weight_decay, paper.per_class) == ("logits", False, 0.0, False)
