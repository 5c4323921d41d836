"""Networks that a game allows, and how any network is taken apart.

`build` makes a network by name, `NETWORKS` lists the names. `anatomy`, `capture`, `features`, `tail` and
`fold_batch_norm` take a model apart by module path, so that a defense needs no code per architecture.
"""

from molehunt.networks.adapted import Adapted
from molehunt.networks.anatomy import Anatomy, MissingPart, anatomy, capture, evaluating, features, tail
from molehunt.networks.architectures import NETWORKS, build
from molehunt.networks.folding import fold_batch_norm
from molehunt.networks.network import Dropout, Network, Normalize, Whitening, dropout_rng
from molehunt.networks.precision import default_device, fast_dtype

__all__ = [
    "NETWORKS",
    "Adapted",
    "Anatomy",
    "Dropout",
    "MissingPart",
    "Network",
    "Normalize",
    "Whitening",
    "anatomy",
    "build",
    "capture",
    "default_device",
    "dropout_rng",
    "evaluating",
    "fast_dtype",
    "features",
    "fold_batch_norm",
    "tail",
]
