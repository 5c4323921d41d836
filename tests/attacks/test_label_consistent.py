import pytest
import torch
import torch.nn.functional as F

from molehunt.attacks import LabelConsistent, Poisoned, label_consistent
from molehunt.networks import Network
from molehunt.tasks import Images, Task, get_task
from molehunt.testing import planted
from molehunt.training import Recipe
from molehunt.triggers import Patch

CASE = planted(images=400)
TASK: Task = CASE.suspect.task
CLEAN: Images = CASE.hidden
MODEL = planted(backdoored=False).suspect.model


def poison(attack: LabelConsistent, seed: int = 0) -> Poisoned:
    return attack(CLEAN, TASK, torch.Generator().manual_seed(seed))


def network() -> Network:
    assert isinstance(MODEL, Network)
    return MODEL


@pytest.fixture(scope="module")
def made() -> Poisoned:
    return poison(LabelConsistent(target=6, poison_rate=0.05, cover_rate=0.03, epsilon=0.1))


def test_images_of_the_target_class_and_covers_are_altered_and_no_label_is(made: Poisoned) -> None:
    assert int(made.altered.sum()) == 20 + 12
    assert int((CLEAN.y[made.altered] == 6).sum()) == 20
    assert torch.equal(made.images.y, CLEAN.y)


def test_without_covers_the_target_class_alone_is_altered() -> None:
    made = poison(LabelConsistent(target=6, poison_rate=0.05, cover_rate=0.0, model=network()))
    assert int(made.altered.sum()) == 20
    assert (CLEAN.y[made.altered] == 6).all()


def test_the_perturbation_stays_within_epsilon_and_the_pixels_in_range(made: Poisoned) -> None:
    change = (made.images.x - CLEAN.x).abs()
    assert 0.05 < float(change.max()) <= 0.1 + 1e-6
    assert not bool(change[~made.altered].any())
    assert float(made.images.x.min()) >= 0.0
    assert float(made.images.x.max()) <= 1.0


def test_the_patches_are_put_over_the_perturbed_images(made: Poisoned) -> None:
    assert isinstance(made.trigger, Patch)
    assert torch.equal(made.trigger.mask, Patch.corners(TASK.shape, size=3).mask)
    own = made.altered & (CLEAN.y == 6)
    stamped = made.stamped().x
    assert torch.equal(stamped[own], made.trigger(made.images.x[own]))


def test_covers_are_perturbed_as_the_others_and_carry_no_patch(made: Poisoned) -> None:
    covers = made.altered & (CLEAN.y != 6)
    assert torch.equal(made.stamped().x[covers], made.images.x[covers])
    change = (made.images.x - CLEAN.x).abs().flatten(1).amax(1)
    assert (change[covers] > 0.05).all()


@pytest.mark.parametrize("steps", [1, 20])
def test_a_given_network_recognizes_the_images_less_than_with_a_random_perturbation(steps: int) -> None:
    attack = LabelConsistent(target=6, epsilon=0.05, steps=steps, model=network())
    before = {name: tensor.clone() for name, tensor in network().state_dict().items()}
    made = poison(attack)
    own = made.altered & (CLEAN.y == 6)
    after = network().state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(parameter.grad is None for parameter in network().parameters())

    def loss(x: torch.Tensor) -> float:
        with torch.no_grad():
            return float(F.cross_entropy(network()(x), torch.full((len(x),), 6)))

    x = CLEAN.x[own]
    noise = 0.05 * torch.randn(x.shape, generator=torch.Generator()).sign()
    assert loss(made.images.x[own]) > 4 * loss((x + noise).clamp(0.0, 1.0))


def test_without_epsilon_no_pixel_is_prepared_and_nothing_is_trained(refuse_training: None) -> None:
    made = poison(LabelConsistent(target=6, epsilon=0.0))
    assert torch.equal(made.images.x, CLEAN.x)
    assert (CLEAN.y[made.altered] == 6).all(), "covers without a perturbation would be as they were"


@pytest.fixture
def refuse_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> None:
        pytest.fail("something was trained")

    monkeypatch.setattr("molehunt.attacks.label_consistent.train", refused)


def test_a_given_network_is_used_and_none_is_trained(refuse_training: None) -> None:
    assert not torch.equal(poison(LabelConsistent(model=network())).images.x, CLEAN.x)


@pytest.mark.parametrize(
    ("attack", "message"),
    [
        (LabelConsistent(target=10), "there are 10 classes, got target 10"),
        (LabelConsistent(poison_rate=0.11), "only 40 images can be poisoned, 44 were asked for"),
        (LabelConsistent(epsilon=1.5), "epsilon must lie in"),
        (LabelConsistent(cover_rate=-0.1, epsilon=0.0), "cover_rate must lie in"),
        (LabelConsistent(steps=0), "steps be 1 or more, got 0.06.* and 0"),
        (LabelConsistent(size=7), "four squares of 7 do not fit into 12x12"),
        (LabelConsistent(opacity=2.0), "opacity must lie in"),
    ],
    ids=lambda value: repr(value)[:60],
)
def test_what_does_not_fit_the_data_is_refused(attack: LabelConsistent, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        poison(attack)


def test_a_network_in_training_mode_is_refused() -> None:
    model = planted().suspect.model
    assert isinstance(model, Network)
    with pytest.raises(ValueError, match=r"the model is in training mode; call its eval\(\) first"):
        poison(LabelConsistent(model=model.train()))


def test_the_network_for_crafting_is_trained_against_perturbations_of_that_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipes: list[Recipe] = []

    def untrained(model: Network, images: Images, recipe: Recipe, *, rng: torch.Generator) -> None:
        recipes.append(recipe)
        model.eval()

    monkeypatch.setattr(label_consistent, "train", untrained)
    poison(LabelConsistent(target=6, poison_rate=0.05, epsilon=0.07, steps=1))
    assert [recipe.adversarial for recipe in recipes] == [0.07]
    # A short training of a network for color photos learns nothing against more than 8/255.
    photos = Images(torch.rand(40, 3, 32, 32), torch.arange(40) % 10)
    for epsilon in (0.07, 0.01):
        attack = LabelConsistent(poison_rate=0.05, epsilon=epsilon, steps=1)
        attack(photos, get_task("cifar10"), torch.Generator().manual_seed(0))
    assert [recipe.adversarial for recipe in recipes[1:]] == [8 / 255, 0.01]
