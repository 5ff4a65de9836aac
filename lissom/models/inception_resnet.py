"""Inception-ResNet-v1 and -v2: Inception blocks whose expanded, scaled output is added to their input (1602.07261).

timm keeps Inception-v4 and the Inception-ResNet-v2 of TensorFlow-Slim, which differs from the paper's. Here are the
forms of the paper (section 3.2, figures 10 to 19), and Inception-ResNet-v1 as the community trained it for faces, which
has published weights: one more block without ReLU, and a 512-wide embedding with a BatchNorm before the classifier.
The paper's figures print 1154 and 2048 channels for two expansions of v2; additions allow 1152 and 2144 only.

``residual=False`` leaves the additions out, at the same number of parameters: the paper's own comparison. Residuals are
multiplied by ``scales`` first (0.1 to 0.3 keep wide networks from dying, section 3.3); ``fold_scale_`` moves the
factors into the expansions for good.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import ConvNormAct, SelectAdaptivePool2d
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import nn
from torch.utils.checkpoint import checkpoint

__all__ = ["Branches", "InceptionResNet", "ResidualInception"]

SCALES = (0.17, 0.10, 0.20)
# A convolution: channels, kernel, stride, and "V" where nothing is padded. Pools stand as "max" (3 x 3, stride 2).
Spec = tuple[Any, ...] | str
STEM_V1: tuple[tuple[str, Spec], ...] = (
    ("conv2d_1a", (32, 3, 2, "V")),
    ("conv2d_2a", (32, 3, 1, "V")),
    ("conv2d_2b", (64, 3)),
    ("maxpool_3a", "max"),
    ("conv2d_3b", (80, 1)),
    ("conv2d_4a", (192, 3, 1, "V")),
    ("conv2d_4b", (256, 3, 2, "V")),
)


def _conv(in_channels: int, out: int, kernel: int | tuple[int, int], stride: int = 1, valid: str = "") -> nn.Module:
    """Convolution without bias, BatchNorm of eps 1e-3, ReLU."""
    sides = (kernel, kernel) if isinstance(kernel, int) else kernel
    padding = 0 if valid else (sides[0] // 2, sides[1] // 2)
    return ConvNormAct(in_channels, out, sides, stride, padding, norm_kwargs={"eps": 1e-3}, act_layer=nn.ReLU)


def _layer(in_channels: int, spec: Spec) -> tuple[nn.Module, int]:
    """The layer that a spec names, and how many channels it answers with."""
    if spec == "max":
        return nn.MaxPool2d(3, stride=2), in_channels
    return _conv(in_channels, *spec), int(spec[0])


class Branches(nn.Module):
    """Several chains of convolutions beside each other, their answers concatenated: ``branch0``, ``branch1``, ...

    (B, in_channels, H, W) -> (B, out_channels, H', W'). A chain of one layer is that layer itself.
    """

    def __init__(self, in_channels: int, branches: Sequence[Sequence[Spec]]) -> None:
        super().__init__()
        self.count, self.out_channels = len(branches), 0
        for number, branch in enumerate(branches):
            layers, width = [], in_channels
            for spec in branch:
                layer, width = _layer(width, spec)
                layers.append(layer)
            self.add_module(f"branch{number}", layers[0] if len(layers) == 1 else nn.Sequential(*layers))
            self.out_channels += width

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.get_submodule(f"branch{number}")(x) for number in range(self.count)], 1)


class ResidualInception(Branches):
    """y = act(x + scale * (expansion of the branches)); with ``residual`` False y = act(expansion of the branches).

    (B, C, H, W) -> (B, C, H, W). The expansion is a 1 x 1 convolution with a bias, without norm and activation
    (section 3.2). ``act`` False leaves the ReLU out.
    """

    def __init__(
        self, channels: int, branches: Sequence[Sequence[Spec]], scale: float = 1.0, act: bool = True,
        residual: bool = True,
    ) -> None:  # fmt: skip
        super().__init__(channels, branches)
        self.scale, self.residual = scale, residual
        self.conv2d = nn.Conv2d(self.out_channels, channels, 1)
        self.act = nn.ReLU() if act else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv2d(super().forward(x))
        return self.act(x + self.scale * y if self.residual else y)

    @torch.no_grad()
    def fold_scale_(self) -> None:
        """Multiply the expansion by ``scale``, which becomes 1: the same answers, one operation fewer."""
        if self.residual:
            self.conv2d.weight.mul_(self.scale)
            if self.conv2d.bias is not None:
                self.conv2d.bias.mul_(self.scale)
            self.scale = 1.0


class InceptionResNet(nn.Module):
    """(B, in_chans, H, W) -> logits (B, num_classes); 75 pixels a side are the least, 299 the paper's, 160 for faces.

    ``version`` 1 or 2. ``embedding``: width of the embedding behind the pool (BatchNorm of eps 1e-3 behind it; 0:
    none). ``last_block`` adds a block of the third kind with scale 1 and without ReLU. ``depths`` and ``scales`` are
    those of the three kinds of blocks. ``width`` multiplies every number of channels (rounded up to a multiple of 4).
    """

    def __init__(
        self, version: int = 1, num_classes: int = 1000, in_chans: int = 3, global_pool: str = "avg",
        drop_rate: float = 0.2, embedding: int = 0, last_block: bool = False, depths: Sequence[int] = (5, 10, 5),
        scales: Sequence[float] = SCALES, residual: bool = True, width: float = 1.0,
    ) -> None:  # fmt: skip
        super().__init__()
        if version not in _BLOCKS:
            raise ValueError(f"there are versions 1 and 2 of Inception-ResNet, not {version!r}")
        self.num_classes, self.in_chans, self.drop_rate = num_classes, in_chans, drop_rate
        self.grad_checkpointing = False
        stem, first, to_second, second, to_third, third = (_widened(part, width) for part in _BLOCKS[version])
        channels = in_chans
        self.layer_names: list[str] = []
        widths: dict[str, int] = {}

        def add(name: str, module: nn.Module) -> None:
            self.add_module(name, module)
            self.layer_names.append(name)

        for name, spec in stem:
            if isinstance(spec, list):
                mixed = Branches(channels, spec)
                add(name, mixed)
                channels = mixed.out_channels
            else:
                layer, channels = _layer(channels, spec)
                add(name, layer)
            widths[name] = channels

        def repeated(branches: Sequence[Sequence[Spec]], number: int) -> nn.Module:
            block = partial(ResidualInception, channels, branches, scales[number], residual=residual)
            return nn.Sequential(*(block() for _ in range(depths[number])))

        self.feature_info: list[dict[str, Any]] = [
            {"num_chs": widths[name], "reduction": reduction, "module": name}
            for name, reduction in (("conv2d_2b", 2), ("conv2d_4a" if version == 1 else "mixed_4a", 4))
        ]
        for number, (branches, reduce) in enumerate(((first, to_second), (second, to_third), (third, None)), 1):
            add(f"repeat_{number}", repeated(branches, number - 1))
            name = f"repeat_{number}"
            if reduce is None and last_block:
                add("block8", ResidualInception(channels, branches, 1.0, act=False, residual=residual))
                name = "block8"
            self.feature_info.append({"num_chs": channels, "reduction": 4 << number, "module": name})
            if reduce is not None:
                reduction = Branches(channels, reduce)
                channels = reduction.out_channels
                add(f"mixed_{number + 5}a", reduction)
        self.feature_ends = [self.layer_names.index(info["module"]) for info in self.feature_info]
        self.num_features = channels
        self.head_hidden_size = embedding or channels
        self.global_pool = SelectAdaptivePool2d(pool_type=global_pool, flatten=True)
        self.drop = nn.Dropout(drop_rate)
        if embedding:
            self.last_linear = nn.Linear(channels, embedding, bias=False)
            self.last_bn = nn.BatchNorm1d(embedding, eps=1e-3)
        self.embedding = embedding
        self.logits = nn.Linear(self.head_hidden_size, num_classes) if num_classes else nn.Identity()

    def get_classifier(self) -> nn.Module:
        return self.logits

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new, untrained classifier; none for 0 classes: the embedding, or the pooled features, are the answer."""
        if global_pool is not None:
            self.global_pool = SelectAdaptivePool2d(pool_type=global_pool, flatten=True)
        self.num_classes = num_classes
        weight = next(self.parameters())
        self.logits = nn.Linear(self.head_hidden_size, num_classes).to(weight) if num_classes else nn.Identity()

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's groups of layers, for learning rates that decay with depth."""
        inner = [(r"^repeat_(\d)\.(\d+)", None), (r"^(?:mixed_[67]|block8)", (99999,))]
        return {"stem": r"^(?:conv2d|mixed_[345])", "blocks": r"^repeat_(\d)" if coarse else inner}

    def _run(self, name: str, x: torch.Tensor) -> torch.Tensor:
        layer = self.get_submodule(name)
        if self.grad_checkpointing and self.training and name.startswith("repeat"):
            return checkpoint(layer, x, use_reentrant=False)  # type: ignore[no-any-return]
        return layer(x)  # type: ignore[no-any-return]

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """(B, num_features, H', W'): the map behind the last block."""
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
        taken, last = feature_take_indices(len(self.feature_ends), indices)
        ends = {self.feature_ends[i] for i in taken}
        kept = []
        names = self.layer_names[: self.feature_ends[last] + 1] if stop_early else self.layer_names
        for number, name in enumerate(names):
            x = self._run(name, x)
            if number in ends:
                kept.append(x)
        return kept if intermediates_only else (x, kept)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """The map behind the last block -> logits, or with ``pre_logits`` what the classifier reads."""
        x = self.drop(self.global_pool(x))
        if self.embedding:
            x = self.last_bn(self.last_linear(x))
        return x if pre_logits else self.logits(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))

    def fold_scale_(self) -> InceptionResNet:
        """``ResidualInception.fold_scale_`` of every block; returns the network."""
        for module in self.modules():
            if isinstance(module, ResidualInception):
                module.fold_scale_()
        return self


def _b(*branches: Sequence[Spec]) -> list[Sequence[Spec]]:
    return list(branches)


_ROW, _COLUMN = (1, 7), (7, 1)
_HALF = (3, 2, "V")  # kernel, stride, padding of what halves the sides
# Stem, blocks and reductions, in the order of execution (figures 14 to 19 and 16 for v1, 17 to 19 for v2).
_BLOCKS: dict[int, tuple[Any, ...]] = {
    1: (
        STEM_V1,
        _b([(32, 1)], [(32, 1), (32, 3)], [(32, 1), (32, 3), (32, 3)]),
        _b([(384, *_HALF)], [(192, 1), (192, 3), (256, *_HALF)], ["max"]),
        _b([(128, 1)], [(128, 1), (128, _ROW), (128, _COLUMN)]),
        _b([(256, 1), (384, *_HALF)], [(256, 1), (256, *_HALF)], [(256, 1), (256, 3), (256, *_HALF)], ["max"]),
        _b([(192, 1)], [(192, 1), (192, (1, 3)), (192, (3, 1))]),
    ),
    2: (
        (
            ("conv2d_1a", (32, *_HALF)),
            ("conv2d_2a", (32, 3, 1, "V")),
            ("conv2d_2b", (64, 3)),
            ("mixed_3a", _b(["max"], [(96, *_HALF)])),
            (
                "mixed_4a",
                _b([(64, 1), (96, 3, 1, "V")], [(64, 1), (64, _ROW), (64, _COLUMN), (96, 3, 1, "V")]),
            ),
            ("mixed_5a", _b([(192, *_HALF)], ["max"])),
        ),
        _b([(32, 1)], [(32, 1), (32, 3)], [(32, 1), (48, 3), (64, 3)]),
        _b([(384, *_HALF)], [(256, 1), (256, 3), (384, *_HALF)], ["max"]),
        _b([(192, 1)], [(128, 1), (160, _ROW), (192, _COLUMN)]),
        _b([(256, 1), (384, *_HALF)], [(256, 1), (288, *_HALF)], [(256, 1), (288, 3), (320, *_HALF)], ["max"]),
        _b([(192, 1)], [(192, 1), (224, (1, 3)), (256, (3, 1))]),
    ),
}


def _widened(part: Any, width: float) -> Any:
    """The same specs with every number of channels times ``width``."""
    if isinstance(part, str):
        return part
    if isinstance(part, list):
        return [_widened(item, width) for item in part]
    if isinstance(part[0], int):
        channels = part[0] if width == 1 else max(4, 4 * round(part[0] * width / 4 + 0.499))
        return (channels, *part[1:])
    if isinstance(part[0], str):  # a named layer of a stem
        return (part[0], _widened(part[1], width))
    return tuple(_widened(item, width) for item in part)


FACES = "https://github.com/timesler/facenet-pytorch/releases/download/v2.2.9/"  # facenet's weights in PyTorch


def _cfg(
    size: int, pool: tuple[int, int], mean: float, std: float, url: str = "", num_classes: int = 1000
) -> dict[str, Any]:
    return {
        "url": url,
        "num_classes": num_classes,
        "input_size": (3, size, size),
        "pool_size": pool,
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": (mean,) * 3,
        "std": (std,) * 3,
        "first_conv": "conv2d_1a.conv",
        "classifier": "logits",
        "license": "mit",
    }


def _face_cfg(file: str, people: int) -> dict[str, Any]:
    return _cfg(160, (3, 3), 127.5 / 255, 128 / 255, FACES + file, people)


default_cfgs = generate_default_cfgs(
    {
        "inception_resnet_v1": _cfg(299, (8, 8), 0.5, 0.5),
        "inception_resnet_v1_facenet.vggface2": _face_cfg("20180402-114759-vggface2.pt", 8631),
        "inception_resnet_v1_facenet.casia_webface": _face_cfg("20180408-102900-casia-webface.pt", 10575),
        "inception_resnet_v2_paper": _cfg(299, (8, 8), 0.5, 0.5),
    }
)


@register_model
def inception_resnet_v1(pretrained: bool = False, **kwargs: Any) -> InceptionResNet:
    """The paper's Inception-ResNet-v1: 22,756,328 parameters."""
    return _built("inception_resnet_v1", pretrained, {"version": 1, **kwargs})


@register_model
def inception_resnet_v1_facenet(pretrained: bool = False, **kwargs: Any) -> InceptionResNet:
    """Inception-ResNet-v1 as facenet has it, with a 512-wide embedding: 23,995,624 parameters.

    With ``num_classes=0`` it answers with the embedding, which is compared after division by its length. The published
    weights tell apart the 8,631 people of VGGFace2, or the 10,575 of CASIA-WebFace.
    """
    arguments = {"version": 1, "embedding": 512, "last_block": True, "drop_rate": 0.6, **kwargs}
    if not pretrained:
        arguments.setdefault("num_classes", 1000)
    return _built("inception_resnet_v1_facenet", pretrained, arguments)


@register_model
def inception_resnet_v2_paper(pretrained: bool = False, **kwargs: Any) -> InceptionResNet:
    """The paper's Inception-ResNet-v2, on Inception-v4's stem; timm's ``inception_resnet_v2`` is TensorFlow-Slim's."""
    return _built("inception_resnet_v2_paper", pretrained, {"version": 2, **kwargs})


def _built(name: str, pretrained: bool, arguments: dict[str, Any]) -> InceptionResNet:
    return build_model_with_cfg(InceptionResNet, name, pretrained, **arguments)  # type: ignore[no-any-return]
