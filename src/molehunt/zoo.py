"""Networks of the timm library, and the one guard that its import needs. Extra `zoo`.

The core never imports timm or torchvision; everything that does is here.
"""

import importlib
import sys
from typing import Any

import torch
from torch import Tensor, nn

from molehunt.networks.architectures import Parts
from molehunt.networks.network import Shape

# Keeps the declared operators alive; torch drops them with the library object.
_DECLARED: list[torch.library.Library] = []


def load_timm() -> Any:
    """Import timm, and help a torchvision that was built for another torch through its import.

    The torchvision of the registry is linked against CUDA. Beside a torch for the CPU its compiled operators
    do not load and its import raises. timm needs none of these operators, only the import, so their two schemas
    are declared and the import is tried again. Where torchvision imports by itself nothing is done.

    Returns:
        The module timm.

    Raises:
        ImportError: timm or torchvision is missing or broken; the message says what to install.
    """
    advice = "networks named timm:NAME need the zoo extra: pip install 'molehunt[zoo]'"
    try:
        try:
            importlib.import_module("torchvision")
        except RuntimeError as error:
            if "torchvision::" not in str(error):
                raise
            _declare_operators()
            importlib.import_module("torchvision")
        return importlib.import_module("timm")
    except (ImportError, RuntimeError) as error:
        raise ImportError(f"{advice} ({type(error).__name__}: {error})") from error


def _declare_operators() -> None:
    """Forget the half-imported torchvision, and declare the operators that its import asks for."""
    for name in [name for name in sys.modules if name == "torchvision" or name.startswith("torchvision.")]:
        del sys.modules[name]
    library: Any = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _DECLARED.append(library)


class _Trunk(nn.Module):
    """The features of a timm model; holds all of its weights."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.model.forward_features(x)
        return out


class _Neck(nn.Module):
    """What a timm model does between its features and its classifier, with the weights that the trunk holds."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        # In a tuple, so that the weights are not registered a second time; deepcopy keeps the two parts together.
        self._model = (model,)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self._model[0].forward_head(x, pre_logits=True)
        return out


def parts(name: str, shape: Shape, classes: int, rng: torch.Generator | None) -> Parts:
    """Build a timm model, without pretrained weights, as the parts of a `Network`.

    Args:
        name: a name that timm knows.
        shape: (C, H, W) of one image.
        classes: number of classes.
        rng: draws the weights; None draws them from a fixed seed, for a state dict to be loaded.

    Returns:
        Trunk, neck and head. The trunk puts out what the model calls its features: a map (B, D, h, w), and tokens
        (B, N, D) for most transformers.

    Raises:
        ImportError: the zoo extra is missing or broken.
        ValueError: timm does not know the name, or the model cannot take the shape.
    """
    timm = load_timm()
    if not timm.is_model(name):
        close = ", ".join(timm.list_models(f"*{name}*")[:5]) or "none that contain it"
        raise ValueError(f"timm knows no model {name!r}; similar names: {close}")
    rng = rng or torch.Generator()
    # timm draws its weights from the global generator; it is seeded from ours and put back afterwards.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(torch.randint(2**62, (), generator=rng)))
        try:
            model = _create(timm, name, shape)
            trunk, neck = _Trunk(model), _Neck(model)
            model.eval()
            with torch.no_grad():
                width = neck(trunk(torch.zeros(1, *shape))).shape
        except (RuntimeError, AssertionError, TypeError, AttributeError) as error:
            raise ValueError(f"timm model {name!r} cannot be built for images of shape {shape}: {error}") from error
        if len(width) != 2:
            raise ValueError(f"timm model {name!r} hands its classifier a tensor {tuple(width)}, not (B, D)")
        model.train()
        return Parts(trunk, neck, nn.Linear(width[1], classes))


def classifier(name: str) -> str:
    """Return the module path of a timm model's last layer in its own state dict, such as ``fc`` or ``head.fc``.

    Raises:
        ImportError: the zoo extra is missing or broken.
        ValueError: timm does not say.
    """
    configuration = load_timm().get_pretrained_cfg(name, allow_unregistered=True)
    path = getattr(configuration, "classifier", None)
    if not isinstance(path, str):
        raise ValueError(f"timm does not say where the classifier of {name!r} is; give its class in a file of your own")
    return path


def _create(timm: Any, name: str, shape: Shape) -> Any:
    """Create a model without a classifier, for images of the wanted size if the model has such a setting."""
    settings: dict[str, Any] = {"pretrained": False, "num_classes": 0, "in_chans": shape[0]}
    try:
        return timm.create_model(name, **settings, img_size=shape[1:])
    except TypeError:  # convolutional models take any size and know no img_size
        return timm.create_model(name, **settings)
