"""InceptionNeXt: ConvNeXt's blocks with Inception depthwise convolutions (CVPR 2024, arXiv 2303.16900).

The networks are timm's ``inception_next_*`` under the publisher's names, with lissom's mixer
(``lissom.ops.inception_dwconv``) and with a deploy form: norms and layer scales fold into the convolutions beside them.
The publisher's checkpoints have the same names throughout and load as they are. Maps have strides 4 to 32, sides
rounded down; any input size of at least 32 works.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.inception_next import MetaNeXt
from timm.models.inception_next import MetaNeXtBlock as TimmBlock
from torch import nn

from lissom.layers.conv_norm import _affine
from lissom.ops.inception_dwconv import InceptionDWConv2d

__all__ = [
    "InceptionNeXt",
    "MetaNeXtBlock",
    "inceptionnext_atto",
    "inceptionnext_base",
    "inceptionnext_base_384",
    "inceptionnext_small",
    "inceptionnext_tiny",
]


class MetaNeXtBlock(TimmBlock):
    """x + gamma mlp(norm(token_mixer(x))), on (B, dim, H, W), any ``token_mixer`` that keeps the shape.

    ``token_mixer`` is called with ``dim`` and keywords ``dilation``, ``device`` and ``dtype``. The other arguments are
    timm's (``mlp_ratio``, ``ls_init_value``, ``drop_path``, ...). A layer scale that starts at 1e-6, as published,
    makes short trainings slow.
    """

    norm: nn.Module
    mlp: Any
    gamma: nn.Parameter | None

    def __init__(self, dim: int, token_mixer: Any = InceptionDWConv2d, **more: Any) -> None:
        super().__init__(dim, token_mixer=token_mixer, **more)

    @torch.no_grad()
    def fuse(self) -> MetaNeXtBlock:
        """The same block, its BatchNorm folded into the first 1 x 1 convolution and gamma into the second."""
        if type(self.norm) is nn.BatchNorm2d:
            _fold_before(self.mlp.fc1, self.norm)
            self.norm = nn.Identity()
        if self.gamma is not None:
            self.mlp.fc2.weight.mul_(self.gamma[:, None, None, None])
            self.mlp.fc2.bias.mul_(self.gamma)
            self.gamma = None
        return self


class ConvThenNorm(nn.Sequential):
    """A convolution and its BatchNorm, by number; one convolution for inference."""

    @torch.no_grad()
    def fuse(self) -> nn.Module:
        if len(self) != 2 or type(self[1]) is not nn.BatchNorm2d:
            return self
        convolution, (scale, shift) = self[0], _affine(self[1])
        bias = 0 if convolution.bias is None else convolution.bias.double() * scale
        convolution.weight.copy_(convolution.weight.double() * scale[:, None, None, None])
        convolution.bias = nn.Parameter((bias + shift).to(convolution.weight))
        return convolution


class NormThenConv(nn.Sequential):
    """A BatchNorm and a convolution behind it, by number; one convolution for inference where nothing is padded."""

    @torch.no_grad()
    def fuse(self) -> nn.Module:
        # Padding puts zeros behind the norm; with the norm folded they would stand before it.
        if len(self) != 2 or type(self[0]) is not nn.BatchNorm2d or type(self[1]) is not nn.Conv2d:
            return self
        if self[1].padding not in (0, (0, 0)):
            return self
        return _fold_before(self[1], self[0])


def _fold_before(convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> nn.Conv2d:
    """The convolution, in place, with what the BatchNorm before it does."""
    scale, shift = _affine(norm)
    weight = convolution.weight.double()
    assert convolution.bias is not None
    convolution.bias.add_((weight.sum((2, 3)) @ shift).to(convolution.bias))
    convolution.weight.copy_(weight * scale[:, None, None])
    return convolution


class InceptionNeXt(MetaNeXt):
    """timm's MetaNeXt with a deploy form: images (B, in_chans, H, W) to logits (B, num_classes). Arguments are timm's.

    ``reset_classifier(0)`` leaves the head's hidden layer, 3 times as wide as the last maps.
    """

    stem: nn.Sequential
    stages: Any

    def __init__(self, *arguments: Any, token_mixers: Any = InceptionDWConv2d, **more: Any) -> None:
        super().__init__(*arguments, token_mixers=token_mixers, **more)
        self.stem = ConvThenNorm(*self.stem)
        for stage in self.stages:
            if isinstance(stage.downsample, nn.Sequential):
                stage.downsample = NormThenConv(*stage.downsample)
            for block in stage.blocks:
                block.__class__ = MetaNeXtBlock  # timm's stage names its class itself; ours adds a method to it


def _cfg(name: str, **fields: Any) -> dict[str, Any]:
    return {
        "hf_hub_id": f"timm/{name}",  # the publisher's weights, unchanged
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": "stem.0",
        "classifier": "head.fc2",
        "license": "apache-2.0",
        **fields,
    }


default_cfgs = generate_default_cfgs(
    {
        "inceptionnext_atto": _cfg("inception_next_atto.sail_in1k"),
        "inceptionnext_tiny": _cfg("inception_next_tiny.sail_in1k"),
        "inceptionnext_small": _cfg("inception_next_small.sail_in1k"),
        "inceptionnext_base": _cfg("inception_next_base.sail_in1k", crop_pct=0.95),
        "inceptionnext_base_384": _cfg(
            "inception_next_base.sail_in1k_384", input_size=(3, 384, 384), pool_size=(12, 12), crop_pct=1.0
        ),
    }
)


@register_model
def inceptionnext_atto(pretrained: bool = False, **kwargs: Any) -> InceptionNeXt:
    """InceptionNeXt-A, 4 156 520 parameters; a quarter of the channels a branch, bands of 9."""
    mixer = partial(InceptionDWConv2d, band_kernel=9, ratio=0.25)
    sizes = {"depths": (2, 2, 6, 2), "dims": (40, 80, 160, 320), "token_mixers": mixer}
    return _built("inceptionnext_atto", pretrained, {**sizes, **kwargs})


@register_model
def inceptionnext_tiny(pretrained: bool = False, **kwargs: Any) -> InceptionNeXt:
    """InceptionNeXt-T, 28 055 680 parameters. Input (B, 3, 224, 224), output (B, 1000)."""
    sizes = {"depths": (3, 3, 9, 3), "dims": (96, 192, 384, 768)}
    return _built("inceptionnext_tiny", pretrained, {**sizes, **kwargs})


@register_model
def inceptionnext_small(pretrained: bool = False, **kwargs: Any) -> InceptionNeXt:
    """InceptionNeXt-S, 49 374 016 parameters. Input (B, 3, 224, 224), output (B, 1000)."""
    sizes = {"depths": (3, 3, 27, 3), "dims": (96, 192, 384, 768)}
    return _built("inceptionnext_small", pretrained, {**sizes, **kwargs})


@register_model
def inceptionnext_base(pretrained: bool = False, **kwargs: Any) -> InceptionNeXt:
    """InceptionNeXt-B, 86 672 136 parameters. Input (B, 3, 224, 224), output (B, 1000)."""
    sizes = {"depths": (3, 3, 27, 3), "dims": (128, 256, 512, 1024)}
    return _built("inceptionnext_base", pretrained, {**sizes, **kwargs})


@register_model
def inceptionnext_base_384(pretrained: bool = False, **kwargs: Any) -> InceptionNeXt:
    """The same network for images of 384 x 384."""
    sizes = {"depths": (3, 3, 27, 3), "dims": (128, 256, 512, 1024)}
    return _built("inceptionnext_base_384", pretrained, {**sizes, **kwargs})


def _built(name: str, pretrained: bool, arguments: dict[str, Any]) -> InceptionNeXt:
    return build_model_with_cfg(
        InceptionNeXt,
        name,
        pretrained,
        feature_cfg={"out_indices": (0, 1, 2, 3), "flatten_sequential": True},
        **arguments,
    )
