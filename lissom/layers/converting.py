"""The converting autoencoder: an image becomes an easy image of the same class; CBNet (arXiv 2403.07036).

Encoder and decoder are fully connected and work on the flattened image. What comes out is an image again, normalised as
the one that went in, so that a classifier of such images may stand behind it. Inside, pixels lie between 0 and 1, which
is what the sigmoid at the end can make: an input normalised by mean and standard deviation is undone first.

The paper's sizes and activations differ by data set and could not be read; the defaults are this library's own.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import nn

from lissom.errors import LissomError

__all__ = ["ConvertingAutoencoder"]

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "linear": nn.Identity,
    "relu": nn.ReLU,
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
}


class _Pixels(nn.Module):
    """Normalised images (B, C, H, W) to pixels from 0 to 1: x std + mean."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels, 1, 1))
        self.register_buffer("std", torch.ones(channels, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.std + self.mean


class ConvertingAutoencoder(nn.Module):
    """Images (B, C, H, W) of one ``shape`` (C, H, W) to images of that shape, normalised alike.

    ``pixels``, ``encoder`` (B, C H W) -> (B, code) and ``decoder`` (B, code) -> (B, C H W), from 0 to 1, are modules,
    so that a loss can read what they answer. ``hidden`` and ``decoder_hidden`` are the widths of the layers on either
    side of the code, with the ``activation`` behind each; ``code_activation`` stands behind the code. Activations are
    "linear", "relu", "sigmoid" and "tanh". ``mean`` and ``std``, one number or one a channel, are how the images were
    normalised: x = (pixel - mean) / std.

    With the default sizes and 28 x 28 pixels: 784 - 384 - 384 - 32 - 784, 485,888 multiply-accumulates an image.
    Raises LissomError for sizes below 1, for an unknown activation and for a ``std`` that is not above 0.
    """

    def __init__(
        self,
        shape: Sequence[int],
        hidden: Sequence[int] = (384, 384),
        code: int = 32,
        decoder_hidden: Sequence[int] = (),
        *,
        activation: str = "relu",
        code_activation: str = "linear",
        mean: float | Sequence[float] = 0.0,
        std: float | Sequence[float] = 1.0,
    ) -> None:
        super().__init__()
        if len(shape) != 3 or min(*shape, *hidden, code, *decoder_hidden) < 1:
            raise LissomError(
                f"an autoencoder of images {tuple(shape)} with layers of {(*hidden, code, *decoder_hidden)}: the shape "
                "is (C, H, W), and all sizes are at least 1"
            )
        for name in (activation, code_activation):
            if name not in ACTIVATIONS:
                raise LissomError(f"there is no activation {name!r}; known: {', '.join(ACTIVATIONS)}")
        self.shape = tuple(shape)
        size = math.prod(shape)
        inner = ACTIVATIONS[activation]
        self.pixels = _Pixels(shape[0])
        self.encoder = _layers((size, *hidden, code), inner, ACTIVATIONS[code_activation])
        self.decoder = _layers((code, *decoder_hidden, size), inner, nn.Sigmoid)
        self.set_normalisation(mean, std)

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one image."""
        return sum(m.in_features * m.out_features for m in self.modules() if isinstance(m, nn.Linear))

    @torch.no_grad()
    def set_normalisation(self, mean: float | Sequence[float], std: float | Sequence[float]) -> None:
        """Say how images are normalised; it is kept in the state dict."""
        for buffer, value in ((self.pixels.mean, mean), (self.pixels.std, std)):
            numbers = torch.as_tensor(value, dtype=torch.float32).reshape(-1, 1, 1)
            if len(numbers) not in (1, len(buffer)):
                raise LissomError(
                    f"{len(numbers)} numbers normalise {len(buffer)} channels; give one, or one a channel"
                )
            buffer.copy_(numbers.expand_as(buffer))
        if not bool((self.pixels.std > 0).all()):
            raise LissomError(f"std is {std}; images are divided by it, so it is above 0")

    def normalise(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels (B, C, H, W) from 0 to 1 as a classifier behind the autoencoder takes them."""
        return (pixels - self.pixels.mean) / self.pixels.std

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        code = self.encoder(self.pixels(x).flatten(1))
        return self.normalise(self.decoder(code).unflatten(1, self.shape))


def _layers(widths: Sequence[int], inner: Callable[[], nn.Module], last: Callable[[], nn.Module]) -> nn.Sequential:
    """Linear layers with ``inner`` between them and ``last`` behind."""
    layers: list[nn.Module] = []
    for own, following in itertools.pairwise(widths):
        layers += [nn.Linear(own, following), inner()]
    return nn.Sequential(*layers[:-1], last())
