"""MobileNetV2 and ShuffleNetV2 for aligned faces, with TVConv or depthwise convolutions (CVPR 2022, 2203.10489).

Inputs are 96 x 96 faces; the first convolution keeps the size. The answer is a 512-wide embedding, which faces are
compared by; ``num_classes`` adds a linear classifier behind it. With TVConv the input's size is part of the network
(``img_size``). ``fuse`` or ``fold_tvconv_`` stores the kernels for inference: then both kinds cost the same. Parameters
of the TVConv forms are those in training; x0_1 keeps 315,096 of them and 4,084,992 stored kernel values.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

import torch
from timm.layers import to_2tuple
from timm.models import build_model_with_cfg, checkpoint, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import nn

from lissom.layers.tvconv import TVConv2d

__all__ = ["FaceMobileNetV2", "FaceShuffleNetV2", "checkpoint_filter_fn"]

EMBEDDING = 512
# expansion, channels, blocks, stride of the first of them
MOBILE = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
BUFFERS = ("TVConv_k", "TVConv_k_square", "stride", "channels", "h", "w")  # numbers in the published state dicts


def _depthwise(channels: int, size: tuple[int, int], stride: int, atom: str, **knobs: Any) -> nn.Module:
    """The 3 x 3 layer that the two kinds of network differ in; ``size`` is its output's."""
    if atom == "tvconv":
        return TVConv2d(channels, size, 3, stride, **knobs)
    if atom == "base":
        return nn.Conv2d(channels, channels, 3, stride, 1, groups=channels, bias=False)
    raise ValueError(f"atom is 'base' or 'tvconv', not {atom!r}")


def _halved(size: tuple[int, int], stride: int) -> tuple[int, int]:
    return ((size[0] - 1) // stride + 1, (size[1] - 1) // stride + 1)


def _rounded(channels: float) -> int:
    """The nearest multiple of 8, but not below nine tenths of ``channels``."""
    nearest = max(8, int(channels + 4) // 8 * 8)
    return nearest + 8 if nearest < 0.9 * channels else nearest


def _conv(in_channels: int, out: int, kernel: int, layer: nn.Module | None = None) -> nn.Sequential:
    """A convolution (or ``layer``), BatchNorm, ReLU6."""
    convolution = layer or nn.Conv2d(in_channels, out, kernel, 1, kernel // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(out), nn.ReLU6())


class _Embedding(nn.Module):
    """BatchNorm, dropout, mean over the places, linear layer, BatchNorm: (B, C, h, w) -> (B, features)."""

    def __init__(self, channels: int, features: int, drop_rate: float) -> None:
        super().__init__()
        self.layer1 = nn.BatchNorm2d(channels)
        self.drop = nn.Dropout(drop_rate)
        self.layer2 = nn.Sequential(nn.Linear(channels, features), nn.BatchNorm1d(features))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer2(self.drop(self.layer1(x)).mean((2, 3)))  # type: ignore[no-any-return]


class _Face(nn.Module):
    """What the two networks share: an embedding behind the last map, and a classifier where one is wanted."""

    feature_info: list[dict[str, Any]]
    layer_names: tuple[str, ...]
    grad_checkpointing = False

    def _finish(self, channels: int, num_classes: int, drop_rate: float, embedding: int) -> None:
        self.output_layer = _Embedding(channels, embedding, drop_rate)
        self.num_classes, self.num_features, self.head_hidden_size = num_classes, embedding, embedding
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.01)
                nn.init.zeros_(module.bias)
        self.classifier: nn.Module = nn.Linear(embedding, num_classes) if num_classes else nn.Identity()

    def get_classifier(self) -> nn.Module:
        return self.classifier

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute layers anew in the backward pass instead of keeping what is inside them."""
        self.grad_checkpointing = enable

    def _run(self, name: str, x: torch.Tensor) -> torch.Tensor:
        layer = self.get_submodule(name)
        if self.grad_checkpointing and self.training and not torch.jit.is_scripting():
            return checkpoint(layer, x)
        return layer(x)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new, untrained classifier; none for 0 classes. The pool is always the mean."""
        self.num_classes = num_classes
        weight = next(self.output_layer.parameters())
        self.classifier = nn.Linear(self.num_features, num_classes).to(weight) if num_classes else nn.Identity()

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, h, w): the map before the embedding."""
        for name in self.layer_names:
            x = self._run(name, x)
        return x

    def forward_intermediates(
        self, x: torch.Tensor, indices: int | list[int] | None = None, norm: bool = False, stop_early: bool = False,
        output_fmt: str = "NCHW", intermediates_only: bool = False,
    ) -> Any:  # fmt: skip
        """The last map and those of ``feature_info`` that ``indices`` name (None: all), as timm's networks give them.

        Raises ValueError for another ``output_fmt`` than NCHW.
        """
        if output_fmt != "NCHW":
            raise ValueError("the maps come as NCHW only")
        taken, last = feature_take_indices(len(self.feature_info), indices)
        names = [info["module"] for info in self.feature_info]
        wanted = {names[i] for i in taken}
        kept = []
        for name in self.layer_names:
            x = self._run(name, x)
            if name in wanted:
                kept.append(x)
            if stop_early and name == names[last]:
                break
        return kept if intermediates_only else (x, kept)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        x = self.output_layer(x)
        return x if pre_logits else self.classifier(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))


class _InvertedResidual(nn.Module):
    """MobileNetV2's block: 1 x 1 expansion, 3 x 3 layer, 1 x 1 projection; the input added where shapes agree."""

    def __init__(self, in_channels: int, out: int, expansion: int, stride: int, layer: nn.Module) -> None:
        super().__init__()
        hidden = in_channels * expansion
        expand = [_conv(in_channels, hidden, 1)] if expansion != 1 else []
        project = [nn.Conv2d(hidden, out, 1, bias=False), nn.BatchNorm2d(out)]
        self.conv = nn.Sequential(*expand, _conv(hidden, hidden, 3, layer), *project)
        self.shortcut = stride == 1 and in_channels == out

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv(x) if self.shortcut else self.conv(x)


class FaceMobileNetV2(_Face):
    """(B, in_chans, img_size, img_size) -> embedding (B, 512), or logits (B, num_classes).

    ``atom`` "tvconv" or "base"; ``width`` multiplies the channels; ``affinity``, ``hidden`` and ``layers`` are those of
    ``TVConv2d``; a row has ``most`` blocks at most (None: its own number). Raises ValueError for another atom.
    """

    def __init__(
        self, width: float = 1.0, atom: str = "base", num_classes: int = 0, in_chans: int = 3,
        img_size: int | tuple[int, int] = 96, drop_rate: float = 0.0, affinity: int = 4, hidden: int = 64,
        layers: int = 3, embedding: int = EMBEDDING, most: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.in_chans = in_chans
        knobs = {"affinity": affinity, "hidden": hidden, "layers": layers} if atom == "tvconv" else {}
        size, reduction = to_2tuple(img_size), 1
        channels = _rounded(32 * width)
        features: list[nn.Module] = [_conv(in_chans, channels, 3)]
        ends: dict[int, dict[str, Any]] = {}  # reduction -> its last layer
        for expansion, wide, count, first in MOBILE:
            out = _rounded(wide * width)
            for number in range(min(count, most or count)):
                stride = first if number == 0 else 1
                size, reduction = _halved(size, stride), reduction * stride
                layer = _depthwise(channels * expansion, size, stride, atom, **knobs)
                features.append(_InvertedResidual(channels, out, expansion, stride, layer))
                channels = out
                ends[reduction] = {"num_chs": out, "reduction": reduction, "module": f"features.{len(features) - 1}"}
        last = _rounded(512 * max(1.0, width))
        features.append(_conv(channels, last, 1))
        self.features = nn.Sequential(*features)
        self.feature_info = list(ends.values())
        self.layer_names = tuple(f"features.{n}" for n in range(len(features)))
        self._finish(last, num_classes, drop_rate, embedding)


class _Shuffled(nn.Module):
    """ShuffleNetV2's unit: one half of the channels through, or at stride 2 two branches, then the halves mixed."""

    def __init__(self, in_channels: int, out: int, stride: int, layer: Any) -> None:
        super().__init__()
        half = out // 2
        self.split = stride == 1

        def end() -> list[nn.Module]:
            return [nn.BatchNorm2d(half), nn.ReLU()]

        if not self.split:
            point = nn.Conv2d(in_channels, half, 1, bias=False)
            self.branch1 = nn.Sequential(layer(in_channels), nn.BatchNorm2d(in_channels), point, *end())
        enter = nn.Conv2d(half if self.split else in_channels, half, 1, bias=False)
        leave = nn.Conv2d(half, half, 1, bias=False)
        self.branch2 = nn.Sequential(enter, *end(), layer(half), nn.BatchNorm2d(half), leave, *end())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.split:
            first, second = x.chunk(2, 1)
            second = self.branch2(second)
        else:
            first, second = self.branch1(x), self.branch2(x)
        return torch.stack([first, second], 2).flatten(1, 2)  # channels of both in turn


class FaceShuffleNetV2(_Face):
    """(B, in_chans, img_size, img_size) -> embedding (B, 512), or logits. ``width`` is "x0_5" or "x1_0".

    Other arguments and errors as ``FaceMobileNetV2``'s.
    """

    WIDTHS: ClassVar = {"x0_5": (48, 96, 192), "x1_0": (116, 232, 464)}

    def __init__(
        self, width: str = "x1_0", atom: str = "base", num_classes: int = 0, in_chans: int = 3,
        img_size: int | tuple[int, int] = 96, drop_rate: float = 0.0, affinity: int = 4, hidden: int = 64,
        layers: int = 3, embedding: int = EMBEDDING, most: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if width not in self.WIDTHS:
            raise ValueError(f"width is one of {', '.join(self.WIDTHS)}, not {width!r}")
        self.in_chans = in_chans
        knobs = {"affinity": affinity, "hidden": hidden, "layers": layers} if atom == "tvconv" else {}
        channels = 24
        self.conv1 = nn.Sequential(
            nn.Conv2d(in_chans, channels, 3, 1, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()
        )
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        size = _halved(to_2tuple(img_size), 2)
        self.feature_info = [{"num_chs": channels, "reduction": 1, "module": "conv1"}]
        for stage, (out, count) in enumerate(zip(self.WIDTHS[width], (4, 8, 4), strict=True), 2):
            size = _halved(size, 2)
            units = []
            for number in range(min(count, most or count)):
                stride = 2 if number == 0 else 1
                layer = partial(_depthwise, size=size, stride=stride, atom=atom, **knobs)
                units.append(_Shuffled(channels, out, stride, layer))
                channels = out
            self.add_module(f"stage{stage}", nn.Sequential(*units))
            self.feature_info.append({"num_chs": out, "reduction": 1 << stage, "module": f"stage{stage}"})
        self.conv5 = nn.Sequential(nn.Conv2d(channels, 1024, 1, bias=False), nn.BatchNorm2d(1024), nn.ReLU())
        self.layer_names = ("conv1", "maxpool", "stage2", "stage3", "stage4", "conv5")
        self._finish(1024, num_classes, drop_rate, embedding)


def checkpoint_filter_fn(state_dict: Mapping[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """A published checkpoint without the numbers that it stores for every layer, as the embedding's names want it.

    With dropout the publisher's first BatchNorm stands one name deeper.
    """
    layers = {path for path, module in model.named_modules() if isinstance(module, TVConv2d)}
    state = {}
    for key, value in state_dict.items():
        parent, _, name = key.rpartition(".")
        if parent in layers and name in BUFFERS:
            continue
        state[key.replace("output_layer.layer1.0.", "output_layer.layer1.")] = value
    return state


def _cfg(first: str) -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": 0,
        "input_size": (3, 96, 96),
        "pool_size": (6, 6),
        "crop_pct": 1.0,
        "interpolation": "bilinear",
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
        "fixed_input_size": True,
        "first_conv": first,
        "classifier": "classifier",
        "license": "mit",
    }


default_cfgs = generate_default_cfgs(
    {
        **{
            f"mobilenet_v2_{width}_{atom}": _cfg("features.0.0")
            for width in ("x0_1", "x0_2", "x0_5", "x1_0")
            for atom in ("base", "tvconv")
        },
        **{
            f"shufflenet_v2_{width}_{atom}": _cfg("conv1.0")
            for width in ("x0_5", "x1_0")
            for atom in ("base", "tvconv")
        },
    }
)


def _mobile(name: str, width: float, atom: str, pretrained: bool, kwargs: dict[str, Any]) -> FaceMobileNetV2:
    return build_model_with_cfg(  # type: ignore[no-any-return]
        FaceMobileNetV2, name, pretrained, pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"flatten_sequential": True}, **{"width": width, "atom": atom, **kwargs},
    )  # fmt: skip


def _shuffle(name: str, width: str, atom: str, pretrained: bool, kwargs: dict[str, Any]) -> FaceShuffleNetV2:
    return build_model_with_cfg(  # type: ignore[no-any-return]
        FaceShuffleNetV2, name, pretrained, pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": (0, 1, 2, 3)}, **{"width": width, "atom": atom, **kwargs},
    )  # fmt: skip


@register_model
def mobilenet_v2_x0_1_base(pretrained: bool = False, **kwargs: Any) -> FaceMobileNetV2:
    """Depthwise convolutions: 324,672 parameters."""
    return _mobile("mobilenet_v2_x0_1_base", 0.1, "base", pretrained, kwargs)


@register_model
def mobilenet_v2_x0_1_tvconv(pretrained: bool = False, **kwargs: Any) -> FaceMobileNetV2:
    """TVConv: 16,369,368 parameters in training."""
    return _mobile("mobilenet_v2_x0_1_tvconv", 0.1, "tvconv", pretrained, kwargs)


@register_model
def mobilenet_v2_x0_2_base(pretrained: bool = False, **kwargs: Any) -> FaceMobileNetV2:
    """Depthwise convolutions: 404,352 parameters."""
    return _mobile("mobilenet_v2_x0_2_base", 0.2, "base", pretrained, kwargs)


@register_model
def mobilenet_v2_x0_2_tvconv(pretrained: bool = False, **kwargs: Any) -> FaceMobileNetV2:
    """TVConv: 19,678,248 parameters in training."""
    return _mobile("mobilenet_v2_x0_2_tvconv", 0.2, "tvconv", pretrained, kwargs)


@register_model
def mobilenet_v2_x0_5_base(pretrained: bool = False, **kwargs: Any) -> FaceMobileNetV2:
    """Depthwise convolutions: 827,968 parameters."""
    return _mobile("mobilenet_v2_x0_5_base", 0.5, "base", pretrained, kwargs)


@register_model
def mobilenet_v2_x0_5_tvconv(pretrained: bool = False, **kwargs: Any) -> FaceMobileNetV2:
    """TVConv: 30,079,264 parameters in training."""
    return _mobile("mobilenet_v2_x0_5_tvconv", 0.5, "tvconv", pretrained, kwargs)


@register_model
def mobilenet_v2_x1_0_base(pretrained: bool = False, **kwargs: Any) -> FaceMobileNetV2:
    """Depthwise convolutions: 2,241,280 parameters."""
    return _mobile("mobilenet_v2_x1_0_base", 1.0, "base", pretrained, kwargs)


@register_model
def mobilenet_v2_x1_0_tvconv(pretrained: bool = False, **kwargs: Any) -> FaceMobileNetV2:
    """TVConv: 49,708,576 parameters in training."""
    return _mobile("mobilenet_v2_x1_0_tvconv", 1.0, "tvconv", pretrained, kwargs)


@register_model
def shufflenet_v2_x0_5_base(pretrained: bool = False, **kwargs: Any) -> FaceShuffleNetV2:
    """Depthwise convolutions: 869,664 parameters."""
    return _shuffle("shufflenet_v2_x0_5_base", "x0_5", "base", pretrained, kwargs)


@register_model
def shufflenet_v2_x0_5_tvconv(pretrained: bool = False, **kwargs: Any) -> FaceShuffleNetV2:
    """TVConv: 10,602,984 parameters in training."""
    return _shuffle("shufflenet_v2_x0_5_tvconv", "x0_5", "tvconv", pretrained, kwargs)


@register_model
def shufflenet_v2_x1_0_base(pretrained: bool = False, **kwargs: Any) -> FaceShuffleNetV2:
    """Depthwise convolutions: 1,781,476 parameters."""
    return _shuffle("shufflenet_v2_x1_0_base", "x1_0", "base", pretrained, kwargs)


@register_model
def shufflenet_v2_x1_0_tvconv(pretrained: bool = False, **kwargs: Any) -> FaceShuffleNetV2:
    """TVConv: 18,904,696 parameters in training."""
    return _shuffle("shufflenet_v2_x1_0_tvconv", "x1_0", "tvconv", pretrained, kwargs)
