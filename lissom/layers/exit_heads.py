"""Heads of early exits: convolution at shallow exits, attention over few tokens at deep ones; LGViT (arXiv 2308.00255).

The outputs of a transformer's early blocks lack locality, those of late ones lack nothing but depth. So a shallow exit
mixes its tokens by convolutions (local perception head), a deep one by attention among every s-th row and column
(global aggregation head); the mean of the mixed tokens, added to the class token, is classified. Transformers of
several stages (Swin, PVT) classify the mean alone; convolutional networks get a plain convolutional head, which is not
the paper's.

Shapes: B batch, N = h w patch tokens in row order, C channels, K classes. All heads have static shapes and standard
operators, so that they export with the network they stand on.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional

from lissom.errors import NotApplicable

__all__ = [
    "ConvExit",
    "GlobalAggregationHead",
    "LinearExit",
    "LocalPerceptionHead",
    "MapExit",
    "TokenExit",
    "build_head",
    "channels_come_last",
    "head_kinds",
]

HEADS = 8  # of the global aggregation head's attention
EIGHT = ("lph_a", "lph_a", "lph_b", "lph_b", "gah2", "gah2", "gah3", "gah3")
SIX = ("lph_a", "lph_b", "gah2", "gah2", "gah3", "gah3")


class LocalPerceptionHead(nn.Module):
    """Patch tokens (B, N, C) of a ``grid`` (h, w), mixed by convolutions, added to themselves: (B, N, C).

    1 x 1 convolution, GELU, BatchNorm; then, with ``depthwise`` (LPH-a; without: LPH-b), 3 x 3 depthwise convolution,
    GELU, BatchNorm; then 1 x 1 convolution, BatchNorm. Each activation stands before its norm, as published.
    Parameters: 2 C^2 + 18 C, or 2 C^2 + 6 C without the depthwise part.
    """

    def __init__(self, dim: int, depthwise: bool = True) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(nn.Conv2d(dim, dim, 1), nn.GELU(), nn.BatchNorm2d(dim))
        self.depthwise = depthwise
        if depthwise:
            self.proj = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
            self.proj_act = nn.GELU()
            self.proj_bn = nn.BatchNorm2d(dim)
        self.conv2 = nn.Sequential(nn.Conv2d(dim, dim, 1), nn.BatchNorm2d(dim))

    def forward(self, x: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        y = self.conv1(x.transpose(1, 2).unflatten(2, grid))  # (B, C, h, w)
        if self.depthwise:
            y = self.proj_bn(self.proj_act(self.proj(y)))
        return x + self.conv2(y).flatten(2).transpose(1, 2)


class GlobalAggregationHead(nn.Module):
    """Self-attention among every ``stride``-th row and column of the patch tokens: (B, N, C) -> (B, n, C).

    n = ((h - 1) // stride + 1) ((w - 1) // stride + 1), beginning with the first row and column; nothing is averaged.
    Queries, keys and values have no bias; there is no residual and no norm. ``stride`` 1 is plain attention.
    Parameters: 4 C^2 + C. Raises ValueError where ``heads`` does not divide ``dim``.
    """

    def __init__(self, dim: int, stride: int, heads: int = HEADS) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"{heads} heads do not divide {dim} channels")
        self.stride = stride
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        x = x.unflatten(1, grid)[:, :: self.stride, :: self.stride].flatten(1, 2)  # (B, n, C)
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        y = functional.scaled_dot_product_attention(q, k, v)  # (B, heads, n, C / heads)
        return self.proj(y.transpose(1, 2).flatten(2))


class _Classifying(nn.Module):
    """A head with ``classifier`` (C -> K) and, for DeiT, ``distillation_classifier`` beside it."""

    def reset_classifier(self, classes: int) -> None:
        """New, untrained classifiers for another number of classes."""
        for name in ("classifier", "distillation_classifier"):
            old = getattr(self, name, None)
            if old is not None:
                setattr(self, name, nn.Linear(old.in_features, classes).to(old.weight))


class TokenExit(_Classifying):
    """Classifies a block's output (B, prefix + N, C), special tokens first, behind a ``mixer`` of its patch tokens.

    With m the mean of the mixer's tokens (equation of the paper's exits, in the published form):

    - ``prefix`` at least 1: classifier(m + class token), the class token being the first;
    - ``distilled`` (DeiT), ``prefix`` at least 2: the mean of classifier(m + class token) and
      distillation_classifier(m + distillation token);
    - ``prefix`` 0, or special tokens without a class token among them (``class_token`` False): classifier(m).

    Special tokens are taken as the block gives them. ``grid`` (h, w) is fixed: h w = N. The mixer is a submodule of
    its own (``mixer``), so that a loss can read its tokens (B, n, C) by a hook.
    """

    def __init__(
        self,
        dim: int,
        classes: int,
        mixer: nn.Module,
        grid: tuple[int, int],
        prefix: int = 1,
        distilled: bool = False,
        class_token: bool = True,
    ) -> None:
        super().__init__()
        if distilled and prefix < 2:
            raise ValueError(f"a distilled exit reads two special tokens, and there are {prefix}")
        self.class_token = class_token and prefix > 0
        self.grid = (int(grid[0]), int(grid[1]))
        self.prefix = prefix
        self.mixer = mixer
        self.classifier = nn.Linear(dim, classes)
        self.distillation_classifier = nn.Linear(dim, classes) if distilled else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean = self.mixer(x[:, self.prefix :], self.grid).mean(1)
        if not self.class_token:
            return self.classifier(mean)
        logits = self.classifier(mean + x[:, 0])
        if self.distillation_classifier is None:
            return logits
        return (logits + self.distillation_classifier(mean + x[:, 1])) / 2


class MapExit(_Classifying):
    """Classifies the patches of a transformer of several stages, which has no special tokens, behind a ``mixer``.

    They are a map (B, h, w, C) as Swin's blocks give it, one with its channels first (B, C, h, w) where
    ``channels_first``, or tokens (B, h w, C) of a ``grid`` (h, w) as PVT's blocks give them. The answer is
    classifier(mean over the patches of LayerNorm(mixer's tokens)).
    """

    def __init__(
        self,
        dim: int,
        classes: int,
        mixer: nn.Module,
        grid: tuple[int, int] | None = None,
        channels_first: bool = False,
    ) -> None:
        super().__init__()
        self.grid = None if grid is None else (int(grid[0]), int(grid[1]))
        self.channels_first = channels_first
        self.mixer = mixer
        self.norm = nn.LayerNorm(dim)
        self.classifier = nn.Linear(dim, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        grid = self.grid
        if x.ndim == 4:
            x = x.permute(0, 2, 3, 1) if self.channels_first else x
            grid, x = (int(x.shape[1]), int(x.shape[2])), x.flatten(1, 2)
        assert grid is not None
        return self.classifier(self.norm(self.mixer(x, grid)).mean(1))


class LinearExit(_Classifying):
    """One linear layer on the class token (B, 1 + N, C), as earlier systems (SDN, PABEE) exit; LGViT's baseline.

    Where there is none (``prefix`` 0, or ``class_token`` False), and for maps (B, h, w, C), or (B, C, h, w) where
    ``channels_first``, on the mean of the patches.
    """

    def __init__(
        self, dim: int, classes: int, prefix: int = 1, class_token: bool = True, channels_first: bool = False
    ) -> None:
        super().__init__()
        self.prefix = prefix
        self.class_token = class_token and prefix > 0
        self.channels_first = channels_first
        self.classifier = nn.Linear(dim, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.ndim == 4:
            return self.classifier(x.mean((2, 3) if self.channels_first else (1, 2)))
        return self.classifier(x[:, 0] if self.class_token else x[:, self.prefix :].mean(1))


class ConvExit(_Classifying):
    """Classifies a feature map (B, C, H, W) of a convolutional network.

    3 x 3 convolution of stride 2 to ``width`` channels, BatchNorm, ReLU, global mean, linear. ``width`` is by default
    min(2 C, 128); 9 C width H W / 4 multiply-accumulates are then 1 to 6.5 % of the network's, behind any stage but the
    last of ResNet-18 and -50, MobileNet v2 and v3-small, EfficientNet-B0 and ConvNeXt-Atto at 224 pixels.
    """

    def __init__(self, channels: int, classes: int, width: int | None = None) -> None:
        super().__init__()
        width = min(2 * channels, 128) if width is None else width
        self.conv = nn.Conv2d(channels, width, 3, 2, 1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.act = nn.ReLU()
        self.classifier = nn.Linear(width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.act(self.norm(self.conv(x))).mean((2, 3)))


def head_kinds(count: int, maps: bool = False) -> list[str]:
    """The kinds of ``count`` heads in order of depth, for ``build_head``.

    "lph_a" and "lph_b" are local perception heads with and without the depthwise part, "gah<s>" is a global
    aggregation head of stride s. Published are 8 exits (lph_a twice, lph_b twice, gah2 twice, gah3 twice), 6 (lph_a,
    lph_b, gah2 twice, gah3 twice), 4 (lph_a, lph_b, gah2, gah3) and 2 (lph_a, gah2). For every number but 6, those
    included, exit i of n (from 0) is of the kind of exit floor(8 i / n) of eight. With ``maps`` (Swin's stages, whose
    maps shrink with depth), strides are one less. Raises ValueError for a count below 1.
    """
    if count < 1:
        raise ValueError(f"{count} exits; there is at least one")
    kinds = list(SIX) if count == 6 else [EIGHT[8 * i // count] for i in range(count)]
    return [{"gah2": "gah1", "gah3": "gah2"}.get(kind, kind) for kind in kinds] if maps else kinds


def channels_come_last(sizes: Sequence[int], aspect: float = 1.0) -> bool:
    """Whether a map of three ``sizes``, the batch left out, is (h, w, C) and not (C, h, w), as torch has it.

    ``aspect`` is the image's height over its width: a map has it too, but for its sides' rounding, up or down. It is
    (h, w, C) where the first two sizes have these proportions and the last two have not.
    """

    def fits(rows: int, columns: int) -> bool:
        return abs(rows - aspect * columns) < max(1.0, aspect)  # less than one row or one column off

    return fits(sizes[0], sizes[1]) and not fits(sizes[1], sizes[2])


def build_head(
    sample: torch.Tensor,
    classes: int,
    kind: str,
    *,
    prefix: int = 1,
    grid: tuple[int, int] | None = None,
    distilled: bool = False,
    channels_last: bool | None = None,
    class_token: bool = True,
    stages: bool = False,
) -> nn.Module:
    """A head for a module that answers with tensors like ``sample``; untrained, it returns logits (B, classes).

    - (B, prefix + N, C): ``TokenExit``; ``grid`` (h, w) with h w = N, by default the square one. ``class_token`` says
      whether the first special token is one. Tokens of a transformer of several ``stages``: ``MapExit``;
    - (B, h, w, C): ``MapExit``;
    - (B, C, H, W): ``MapExit`` in a transformer of several ``stages``, else ``ConvExit``, whatever the ``kind``;
    - any of these and the ``kind`` "linear": ``LinearExit``.

    A map's channels are the last of its sizes where ``channels_last`` says so, or where it says nothing and
    ``channels_come_last`` does for a square image; else the first, as torch has it. ``kind`` is one of ``head_kinds``,
    or "linear". Where the channels are no multiple of 8, a global aggregation head has as many attention heads as the
    largest divisor below 8. Raises NotApplicable for another shape, and for a kind or grid that does not
    fit it.
    """
    if kind not in ("linear", "lph_a", "lph_b") and not re.fullmatch(r"gah[1-9]\d*", kind):
        raise NotApplicable(f"no exit head is of the kind {kind!r}; there are lph_a, lph_b, gah<stride> and linear")
    shape = tuple(sample.shape)
    if sample.ndim == 4:
        if channels_last is None:
            channels_last = channels_come_last(shape[1:])
        dim = shape[3] if channels_last else shape[1]
        if kind == "linear":
            return LinearExit(dim, classes, 0, channels_first=not channels_last)
        if channels_last or stages:
            return MapExit(dim, classes, _mixer(kind, dim), channels_first=not channels_last)
        return ConvExit(dim, classes)
    if sample.ndim != 3:
        raise NotApplicable(
            f"an exit reads tokens (B, N, C) or maps (B, C, H, W), and the module answers with shape {shape}; "
            "take a module further inside"
        )
    tokens, dim = shape[1] - prefix, shape[2]
    if kind == "linear":
        return LinearExit(dim, classes, prefix, class_token)
    if grid is None:
        grid = (round(max(tokens, 0) ** 0.5),) * 2
    if tokens < 1 or grid[0] * grid[1] != tokens:
        raise NotApplicable(
            f"{shape[1]} tokens, {prefix} of them special, are no grid of {grid[0]} x {grid[1]} patches; "
            "say how many rows and columns there are, and how many special tokens"
        )
    if distilled and prefix < 2:
        raise NotApplicable(f"a distilled transformer has two special tokens, and this one has {prefix}")
    if stages and not prefix:
        return MapExit(dim, classes, _mixer(kind, dim), grid)
    return TokenExit(dim, classes, _mixer(kind, dim), grid, prefix, distilled, class_token)


def _mixer(kind: str, dim: int) -> nn.Module:
    if kind.startswith("lph"):
        return LocalPerceptionHead(dim, depthwise=kind == "lph_a")
    return GlobalAggregationHead(dim, int(kind[3:]), next(n for n in range(HEADS, 0, -1) if dim % n == 0))
