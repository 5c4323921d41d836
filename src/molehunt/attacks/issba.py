"""ISSBA: a hidden message is the trigger, written into each picture in its own way by a small network."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from molehunt.attacks.poisoning import Poisoned, choose, poison_count, relabel
from molehunt.attacks.surrogate import batches, small_network
from molehunt.tasks import Images, Task
from molehunt.triggers import ENCODERS, Encoded, Shape, Target, Trigger
from molehunt.triggers.encoders import LARGEST, drawn


@dataclass(frozen=True, kw_only=True, eq=False)
class ISSBA:
    """Write one secret bit string into a share of the images, as steganography does, and relabel them.

    An encoder and a decoder are trained together: the encoder changes a picture so that the decoder can read any bits
    from it, and as little as possible. Then the bits are fixed, and the encoder is the trigger. Its layers are those of
    the listed encoder "residual"; only its weights are the attacker's.

    Attributes:
        target: the target class.
        poison_rate: share of all training images that are poisoned.
        linf: largest change of a value, in [0, 1].
        bits: length of the bit string, from 1 to 256.
        fidelity: weight of the mean squared change, in units of linf squared, against the cross-entropy of the bits.
        steps: of the optimizer, at most; a small set gets fewer.
        trigger: an encoder made elsewhere; None makes one.

    Raises:
        ValueError: rates, classes or shapes do not fit the data, or a setting is out of range.

    Reference:
        Li, Li, Wu, Li, He, Lyu, "Invisible Backdoor Attack with Sample-Specific Triggers", ICCV 2021.

    Departures from the paper:
        A far smaller encoder, whose change is bounded by construction; the paper's is bounded by its loss alone. The
        image loss is the squared change alone, without a perceptual term or a critic. The bits are folded into the
        encoder's weights.
    """

    target: int = 0
    poison_rate: float = 0.1
    linf: float = 0.1
    bits: int = 16
    fidelity: float = 0.5
    steps: int = 400
    trigger: Trigger | None = None

    def __call__(self, clean: Images, task: Task, rng: torch.Generator) -> Poisoned:
        """Poison a clean training set; see the class."""
        goal = Target(classes=self.target)
        goal.check(task.num_classes)
        altered = choose(goal.counts(clean.y), poison_count(self.poison_rate, len(clean.y)), rng)
        trigger = self.trigger or self.encoder(clean, task.shape, rng)[0]
        return relabel(clean, altered, trigger, goal)

    def encoder(self, images: Images, shape: Shape, rng: torch.Generator) -> tuple[Encoded, float]:
        """Train an encoder with its decoder.

        Args:
            images: what to train on.
            shape: (C, H, W) of an image.
            rng: draws weights, bits and the order of the images.

        Returns:
            The encoder with its bits fixed, and the share of random bits that the decoder read rightly in the last
            tenth of the steps.
        """
        if not 1 <= self.bits <= 256 or not 0.0 <= self.linf <= 1.0 or not self.fidelity >= 0.0:
            raise ValueError(
                f"bits must lie in [1, 256], linf in [0, 1] and fidelity be 0 or more, got {self.bits}, {self.linf} "
                f"and {self.fidelity}"
            )
        network = ENCODERS["residual"]
        flat = network.initial(shape, rng).requires_grad_()
        size = network.layout(shape)["message"]
        # The bits become the message of the encoder by one linear layer, which is not needed any more afterwards.
        spread = torch.randn(self.bits, *size, generator=rng).div(self.bits**0.5).requires_grad_()
        decoder = small_network(shape[0], self.bits, shape[1:], rng, width=16)
        optimizer = torch.optim.Adam([flat, spread, *decoder.parameters()], lr=3e-3)

        def messages(bits: Tensor) -> Tensor:
            return torch.einsum("nb,bchw->nchw", 2.0 * bits - 1.0, spread)

        read: list[Tensor] = []
        for rows in batches(images, self.steps, 64, rng):
            x = images.x[rows]
            bits = torch.randint(0, 2, (len(x), self.bits), generator=rng).float()
            weights = network.unpack(flat, shape) | {"message": messages(bits)}
            change = drawn(weights, "pattern", x).tanh()
            logits = decoder((x + self.linf * change).clamp(0.0, 1.0))
            read.append(((logits.detach() > 0) == (bits > 0.5)).float().mean())
            # The image loss counts as far as bits are read: before that, it would teach the encoder to change nothing.
            known = (2.0 * torch.stack(read[-10:]).mean() - 1.0).clamp_min(0.0)
            loss = F.binary_cross_entropy_with_logits(logits, bits) + self.fidelity * known * change.square().mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        secret = torch.randint(0, 2, (1, self.bits), generator=rng).float()
        weights = network.unpack(flat.detach(), shape) | {"message": messages(secret).detach()[0]}
        vector = torch.cat([weights[name].flatten() for name in network.layout(shape)]).clamp(-LARGEST, LARGEST)
        made = Encoded(network="residual", shape=shape, linf=self.linf, area=1.0, weights=vector)
        return made, float(torch.stack(read[-max(1, len(read) // 10) :]).mean())
