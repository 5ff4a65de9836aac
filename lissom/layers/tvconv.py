"""TVConv: a depthwise convolution with another kernel at every place (CVPR 2022, arXiv 2203.10489).

The kernels are the same for all images: a small network makes them from a few learnt maps of the layer's own size. For
inference they are stored (``fold``), and the layer costs the multiplications of a depthwise convolution and k^2 C h w
numbers of memory. It fits images with a fixed layout (aligned faces, fixed cameras), and their size is part of it.
"""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn import functional

from lissom.errors import LissomError

__all__ = ["SpatiallyVariantDepthwise", "TVConv2d", "fold_tvconv_", "spatially_variant_depthwise", "to_tvconv"]


def spatially_variant_depthwise(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, stride: int = 1
) -> torch.Tensor:
    """out[b, c, y, x] = sum over taps of weight[c, tap, y, x] input[b, c, stride y + dy, stride x + dx], plus bias.

    ``x`` (B, C, H, W), zero outside; ``weight`` (C, k, k, h, w), k odd; ``bias`` (C, h, w). Returns (B, C, h, w). The
    taps are added one after another: nothing of k^2 times the input's size is made. Raises ValueError where (H, W) with
    this stride does not give (h, w).
    """
    k, (height, width) = weight.shape[1], weight.shape[-2:]
    given = tuple((side - 1) // stride + 1 for side in x.shape[-2:])
    if given != (height, width):
        raise ValueError(
            f"kernels for an output of {height} x {width} do not fit an input of {x.shape[-2]} x {x.shape[-1]}, whose "
            f"output at stride {stride} is {given[0]} x {given[1]}"
        )
    reach = k // 2
    x = functional.pad(x, (reach,) * 4)
    out = bias
    for row in range(k):
        for column in range(k):
            seen = x[
                ..., row : row + stride * (height - 1) + 1 : stride, column : column + stride * (width - 1) + 1 : stride
            ]
            part = weight[:, row, column] * seen
            out = part if out is None else out + part
    assert out is not None
    return out


class SpatiallyVariantDepthwise(nn.Module):
    """``spatially_variant_depthwise`` with stored kernels (C, k, k, h, w), bias (C, h, w) or None: the folded form."""

    weight: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None, stride: int = 1) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)
        self.stride = stride

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return spatially_variant_depthwise(x, self.weight, self.bias, self.stride)


class TVConv2d(nn.Module):
    """(B, channels, H, W) -> (B, channels, h, w), zero padding, one kernel a place and channel.

    ``size`` (h, w) is the output's. ``affinity`` maps of that size, ones at first, go through 1 + ``layers`` times
    (3 x 3 convolution to ``hidden`` channels, LayerNorm over channels and places with an affine map of each, ReLU) and
    a last convolution to kernel_size^2 channels maps. ``bias`` adds a value a place and channel, made likewise.
    Raises ValueError for an even kernel.
    """

    def __init__(
        self, channels: int, size: tuple[int, int], kernel_size: int = 3, stride: int = 1, affinity: int = 4,
        hidden: int = 64, layers: int = 3, bias: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        if kernel_size % 2 == 0:
            raise ValueError(f"the kernel is {kernel_size} wide; it is odd")
        self.channels, self.size, self.kernel_size, self.stride = channels, tuple(size), kernel_size, stride
        self.posi_map = nn.Parameter(torch.ones(1, affinity, *size))
        self.weight_layers = _generator(affinity, hidden, layers, kernel_size**2 * channels, size)
        self.bias_layers = _generator(affinity, hidden, layers, channels, size) if bias else None

    def kernels(self) -> torch.Tensor:
        """What the maps give: (channels, k, k, h, w)."""
        k = self.kernel_size
        return self.weight_layers(self.posi_map).reshape(self.channels, k, k, *self.size)

    def biases(self) -> torch.Tensor | None:
        """(channels, h, w), or None."""
        return None if self.bias_layers is None else self.bias_layers(self.posi_map)[0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return spatially_variant_depthwise(x, self.kernels(), self.biases(), self.stride)

    @torch.no_grad()
    def fold(self) -> SpatiallyVariantDepthwise:
        """The form for inference. Fold again after any change of weights."""
        bias = self.biases()
        stored = SpatiallyVariantDepthwise(
            self.kernels().detach().clone(), None if bias is None else bias.detach().clone(), self.stride
        )
        return stored.train(self.training)

    def fuse(self) -> SpatiallyVariantDepthwise:
        """``fold``, under the name that ``lissom.techniques.fuse`` and timm call."""
        return self.fold()


def _generator(affinity: int, hidden: int, layers: int, out: int, size: tuple[int, int]) -> nn.Sequential:
    parts: list[nn.Module] = []
    width = affinity
    for _ in range(layers + 1):
        parts.append(
            nn.Sequential(nn.Conv2d(width, hidden, 3, padding=1, bias=False), nn.LayerNorm([hidden, *size]), nn.ReLU())
        )
        width = hidden
    return nn.Sequential(*parts, nn.Conv2d(width, out, 3, padding=1, bias=False))


@torch.no_grad()
def to_tvconv(
    model: nn.Module, example: torch.Tensor, *, affinity: int = 4, hidden: int = 64, layers: int = 3
) -> nn.Module:
    """A copy of ``model`` whose depthwise convolutions are untrained ``TVConv2d`` layers of the same shapes.

    ``example`` (B, C, H, W) is run once, and tells their sizes: the model then takes inputs of that size only. A
    convolution counts where it has one group a channel, an odd square kernel, no dilation and half the kernel as zero
    padding; one with a bias gets bias maps. Raises LissomError where there is none, and where one runs at several
    sizes.
    """
    model = copy.deepcopy(model)
    found: dict[str, set[tuple[int, int]]] = {}
    handles = [
        module.register_forward_hook(
            lambda m, inputs, output, path=path: found.setdefault(path, set()).add(tuple(output.shape[-2:]))  # type: ignore[misc]
        )
        for path, module in model.named_modules()
        if _depthwise(module)
    ]
    training = {name: module.training for name, module in model.named_modules()}
    try:
        model.eval()(example)
    finally:
        for handle in handles:
            handle.remove()
        for name, module in model.named_modules():
            module.training = training[name]
    if not found:
        raise LissomError(f"{type(model).__name__} has no depthwise convolution that TVConv could replace")
    for path, sizes in found.items():
        if len(sizes) > 1:
            raise LissomError(f"{path} runs at several sizes, and TVConv has one")
        old = model.get_submodule(path)
        assert isinstance(old, nn.Conv2d)
        parent, _, child = path.rpartition(".")
        new = TVConv2d(
            old.out_channels, next(iter(sizes)), old.kernel_size[0], old.stride[0], affinity, hidden, layers,
            bias=old.bias is not None,
        )  # fmt: skip
        setattr(model.get_submodule(parent), child, new.to(old.weight).train(old.training))
    return model


def _depthwise(module: nn.Module) -> bool:
    if (
        type(module) is not nn.Conv2d
        or module.groups != module.in_channels
        or module.in_channels != module.out_channels
    ):
        return False
    k = module.kernel_size
    return (
        module.groups > 1
        and k[0] == k[1]
        and k[0] % 2 == 1
        and module.stride[0] == module.stride[1]
        and module.dilation == (1, 1)
        and module.padding == (k[0] // 2, k[0] // 2)
        and module.padding_mode == "zeros"
    )


def fold_tvconv_(model: nn.Module) -> nn.Module:
    """Fold every ``TVConv2d`` of the model, in place; returns the model."""
    for path, module in list(model.named_modules()):
        if isinstance(module, TVConv2d):
            parent, _, child = path.rpartition(".")
            if not path:
                return module.fold()
            setattr(model.get_submodule(parent), child, module.fold())
    return model
