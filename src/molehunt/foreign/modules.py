"""A module that somebody hands us, as a module from pictures in [0, 1] to logits."""

import copy

import torch
from torch import Tensor, nn

from molehunt import networks
from molehunt.foreign.errors import ForeignError
from molehunt.foreign.pixels import Pixels
from molehunt.networks import Adapted, Network
from molehunt.tasks import Task


def adapted(
    module: nn.Module,
    task: Task,
    *,
    name: str,
    pixels: Pixels | None = None,
    size: tuple[int, int] | None = None,
    channels: int | None = None,
) -> tuple[Network | Adapted, tuple[str, ...]]:
    """Copy a module into one that takes the task's pictures, and try it.

    Args:
        module: any classifier of pictures, in any mode, on any device; it is not changed.
        task: what it was trained for; its pictures come in.
        name: what the report calls the network.
        pixels: how the module wants its pixels. None: a `Network` of ours normalizes itself, any other module is given
            them as they are, in [0, 1].
        size: height and width that the module takes, where they are not the task's.
        channels: channels that the module takes, where they are not the task's.

    Returns:
        A float32 copy on the CPU in eval mode (a `Network` stays one where nothing but the normalization is added), and
        what the report should say about it.

    Raises:
        ForeignError: a module that cannot be looked into or differentiated, or that does not answer the task's pictures
            with one finite number per class.
    """
    inner = _plain(module)
    notes = []
    given = channels or task.shape[0]
    if isinstance(inner, Network) and pixels is not None:
        inner.normalize = pixels.layer(given)
        pixels = None
    if isinstance(inner, Network) and given == task.shape[0] and size in (None, tuple(task.shape[1:])):
        _try(inner, task)
        return inner, ()
    layer = Pixels(name="none", mean=(0.0,), std=(1.0,)).layer(given) if pixels is None else pixels.layer(given)
    whole = Adapted(
        inner,
        name=name,
        shape=task.shape,
        classes=task.num_classes,
        normalize=layer,
        size=size,
        channels=channels,
    ).eval()
    answers = _try(whole, task)
    if _are_probabilities(answers):
        whole.probabilities = True
        notes.append("The network answers with probabilities; their logarithms are taken for logits.")
    if whole.size is not None:
        notes.append(f"Pictures of {_sides(task.shape[1:])} are resized to {_sides(whole.size)} for the network.")
    if whole.channels != task.shape[0]:
        notes.append("Gray pictures are repeated in three channels." if given == 3 else "Pictures are turned to gray.")
    return whole, tuple(notes)


def _plain(module: nn.Module) -> nn.Module:
    """A float32 copy on the CPU, without what torch wraps around a module."""
    if isinstance(module, torch.jit.ScriptModule):
        raise ForeignError("a TorchScript module cannot be taken apart; pass the Python module that it was made from")
    while True:
        original = getattr(module, "_orig_mod", None)  # torch.compile
        if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
            original = module.module
        if not isinstance(original, nn.Module):
            break
        module = original
    try:
        inner = copy.deepcopy(module).cpu().float().eval()
    except Exception as error:  # whatever a foreign class does when it is copied
        raise ForeignError(f"the module cannot be copied, which every defense has to do: {_words(error)}") from error
    if any(value.is_quantized for value in inner.state_dict().values() if isinstance(value, Tensor)):
        raise ForeignError("the module is quantized, which leaves no gradients; pass the one before quantization")
    for parameter in inner.parameters():
        parameter.requires_grad_(False)
        parameter.grad = None
    return inner


def _try(model: nn.Module, task: Task) -> Tensor:
    """Send four pictures through and see that logits come out and gradients come back; returns the answers."""
    fixed = torch.rand(4, *task.shape, generator=torch.Generator().manual_seed(0))
    fixed[0], fixed[1] = 0.0, 1.0
    x = fixed.requires_grad_()
    try:
        answers = model(x)
    except Exception as error:  # whatever a foreign forward raises
        raise ForeignError(
            f"the network does not take pictures of shape {task.shape}: {_words(error)}; if it was trained on another "
            "size or number of channels, name them with --size HEIGHTxWIDTH and --channels"
        ) from error
    if not isinstance(answers, Tensor):
        raise ForeignError(
            f"the network answers with a {type(answers).__name__}, expected a tensor of logits; wrap it in a module "
            "whose forward returns them alone"
        )
    if tuple(answers.shape) != (4, task.num_classes):
        raise ForeignError(
            f"the network answers 4 pictures with shape {tuple(answers.shape)}, expected (4, {task.num_classes}): "
            f"name the task that it was trained for, or clean pictures of as many classes"
        )
    if not bool(torch.isfinite(answers).all()):
        raise ForeignError("the network answers plain pictures with values that are not finite")
    if not answers.requires_grad or torch.autograd.grad(answers.float().sum(), x, allow_unused=True)[0] is None:
        raise ForeignError(
            "no gradient comes back from the answers to the pixels, which most defenses need; look for "
            "torch.no_grad(), .detach() or numpy in its forward"
        )
    with torch.no_grad():
        if not torch.allclose(model(x), model(x), rtol=1e-3, atol=1e-4):
            raise ForeignError(
                "the network answers the same pictures differently each time, in eval mode too; look for dropout or "
                "noise that does not ask self.training"
            )
    return answers.detach()


def _are_probabilities(answers: Tensor) -> bool:
    ones = torch.ones(len(answers))
    return bool((answers >= 0).all()) and torch.allclose(answers.float().sum(1), ones, atol=1e-4)


def first_layer(model: nn.Module) -> networks.Normalize:
    """The layer that normalizes the pixels: that of the `Network` which normalizes itself, else that in front."""
    if isinstance(model, Adapted) and isinstance(model.model, Network):
        return model.model.normalize
    assert isinstance(model, Network | Adapted)
    return model.normalize


def _sides(size: tuple[int, ...]) -> str:
    return f"{size[0]} x {size[1]}"


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:300]
