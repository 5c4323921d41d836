"""Is the model given what it expects? Measured on clean pictures, told in plain words, never changed silently.

A wrong scale of the pixels is the commonest mistake, and an expensive one: a clean model that sees pictures as it never
did answers most of them alike, and looks as if it had a target class.
"""

import copy

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from molehunt.foreign.modules import first_layer
from molehunt.foreign.pixels import Pixels, candidates
from molehunt.networks import Adapted, Network, default_device
from molehunt.tasks import Images, Task

PICTURES = 400
"""Clean pictures that each normalization is tried on."""
BETTER = 0.1
"""By so much another normalization has to be more accurate to be spoken of: four standard errors and more."""
PLAUSIBLE = 0.5
"""Below this accuracy the order of the classes is looked at."""
BATCH = 100


def advice(model: Network | Adapted, task: Task, clean: Images, given: Pixels) -> tuple[str, ...]:
    """Say whether another normalization, or another order of the classes, would make the model right.

    Args:
        model: it is not changed.
        task: what it was trained for.
        clean: clean labeled pictures in [0, 1]; the first `PICTURES` are used.
        given: the normalization that the model has now.

    Returns:
        Warnings for the report, with the option that would help; empty where nothing looks wrong.
    """
    x, y = clean.x[:PICTURES], clean.y[:PICTURES]
    if len(y) == 0:
        return ()
    tried = copy.deepcopy(model).eval().to(default_device())
    layer = first_layer(tried)
    channels = layer.mean.numel()
    said = _says(tried, x)
    now = _right(said, y)
    notes = []
    best, most = given, now
    for other in candidates(task, channels):
        again = other.layer(channels)
        layer.load_state_dict(again.state_dict())
        right = _right(_says(tried, x), y)
        if right > most:
            best, most = other, right
    if most >= now + BETTER:
        notes.append(
            f"WRONG PIXELS? As scanned (normalize {given.name}) the model is right about {now:.0%} of the clean "
            f"pictures, with --normalize {best.name} about {most:.0%}. A wrong scale makes clean models look "
            f"backdoored: scan again with --normalize {best.name}."
        )
    elif now < PLAUSIBLE and (matched := _matched(said, y, task.num_classes)) >= now + BETTER and matched >= PLAUSIBLE:
        notes.append(
            f"WRONG ORDER OF CLASSES? The model is right about {now:.0%} of the clean pictures, but with its classes "
            f"in another order it would be about {matched:.0%}. Folders are sorted as text: '10' comes before '2'."
        )
    return tuple(notes)


@torch.inference_mode()
def _says(model: torch.nn.Module, x: Tensor) -> Tensor:
    device = next(iter(model.parameters()), x).device
    return torch.cat([model(part.to(device)).argmax(1).cpu() for part in torch.split(x, BATCH)])


def _right(said: Tensor, y: Tensor) -> float:
    return float((said == y).double().mean())


def _matched(said: Tensor, y: Tensor, classes: int) -> float:
    """Accuracy under the best renaming of the classes."""
    table = torch.zeros(classes, classes, dtype=torch.int64)
    table.index_put_((y, said), torch.ones_like(y), accumulate=True)
    rows, columns = linear_sum_assignment(table.numpy(), maximize=True)
    return float(table.numpy()[rows, columns].sum()) / len(y)
