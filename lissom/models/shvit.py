"""SHViT: single-head vision transformers behind a stem of stride 16 (CVPR 2024, arXiv 2401.16456).

The networks ``shvit_s1`` to ``shvit_s4`` are timm's. This file adds what timm lacks: ``checkpoint_filter_fn`` reads the
publisher's checkpoints into them, and the ``_distilled`` networks have the publisher's second head. The mixer alone is
``lissom.layers.shsa.SHSA``; the deploy form comes with ``lissom.techniques.fuse``.

Maps have strides 16, 32 and 64, sides rounded up; any input size works.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.shvit import SHViT
from torch import nn

from lissom.layers.distilled import DistilledHead

__all__ = [
    "SHViTDistilled",
    "checkpoint_filter_fn",
    "shvit_s1_distilled",
    "shvit_s2_distilled",
    "shvit_s3_distilled",
    "shvit_s4_distilled",
]


class SHViTDistilled(DistilledHead, SHViT):
    """timm's SHViT with a second classifier, taught by another network's labels: (B, 3, H, W) -> (B, classes).

    The answer is the mean of both heads; see ``DistilledHead``. Arguments are timm's; ``act_layer`` reaches every
    activation (in timm's class the blocks' own stay ReLU).
    """

    def __init__(self, *arguments: Any, act_layer: type[nn.Module] = nn.ReLU, **more: Any) -> None:
        super().__init__(*arguments, act_layer=act_layer, **more)
        for stage in self.stages:
            for block in stage.blocks:
                block.ffn.m.act = act_layer()
        self.head_dist = self._new_head()


# The publisher's block 0 of stages 2 and 3 is the pair before the merging, 1 the merging, 2 the pair behind it.
_NAMES = (
    (re.compile(r"^blocks1\.(\d+)\."), lambda m: f"stages.0.blocks.{m[1]}."),
    (re.compile(r"^blocks([23])\.0\.(\d+)\."), lambda m: f"stages.{int(m[1]) - 1}.downsample.{m[2]}."),
    (re.compile(r"^blocks([23])\.1\."), lambda m: f"stages.{int(m[1]) - 1}.downsample.2."),
    (re.compile(r"^blocks([23])\.2\.(\d+)\."), lambda m: f"stages.{int(m[1]) - 1}.downsample.{3 + int(m[2])}."),
    (re.compile(r"^blocks([23])\.(\d+)\."), lambda m: f"stages.{int(m[1]) - 1}.blocks.{int(m[2]) - 3}."),
)


def checkpoint_filter_fn(state_dict: Mapping[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """A published checkpoint (``blocks1`` to ``blocks3``) in timm's names; other checkpoints as they are."""
    return {_renamed(key): value for key, value in state_dict.items()}


def _renamed(key: str) -> str:
    for pattern, name in _NAMES:
        if found := pattern.match(key):
            return name(found) + key[found.end() :]
    return key


def _cfg(**fields: Any) -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (4, 4),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": "patch_embed.0.c",
        "classifier": ("head.l", "head_dist.l"),
        "license": "mit",
        **fields,
    }


default_cfgs = generate_default_cfgs(
    {
        "shvit_s1_distilled": _cfg(),
        "shvit_s2_distilled": _cfg(),
        "shvit_s3_distilled": _cfg(),
        "shvit_s4_distilled": _cfg(input_size=(3, 256, 256)),
    }
)


@register_model
def shvit_s1_distilled(pretrained: bool = False, **kwargs: Any) -> SHViTDistilled:
    """SHViT-S1 with two heads, 6 652 448 parameters. Input (B, 3, 224, 224), output (B, 1000)."""
    return _built("shvit_s1_distilled", pretrained, (128, 224, 320), (2, 4, 5), (32, 48, 68), kwargs)


@register_model
def shvit_s2_distilled(pretrained: bool = False, **kwargs: Any) -> SHViTDistilled:
    """SHViT-S2 with two heads, 11 932 968 parameters. Input (B, 3, 224, 224), output (B, 1000)."""
    return _built("shvit_s2_distilled", pretrained, (128, 308, 448), (2, 4, 5), (32, 66, 96), kwargs)


@register_model
def shvit_s3_distilled(pretrained: bool = False, **kwargs: Any) -> SHViTDistilled:
    """SHViT-S3 with two heads, 14 695 169 parameters. Input (B, 3, 224, 224), output (B, 1000)."""
    return _built("shvit_s3_distilled", pretrained, (192, 352, 448), (3, 5, 5), (48, 75, 96), kwargs)


@register_model
def shvit_s4_distilled(pretrained: bool = False, **kwargs: Any) -> SHViTDistilled:
    """SHViT-S4 with two heads, 17 038 380 parameters. Input (B, 3, 256, 256), output (B, 1000)."""
    return _built("shvit_s4_distilled", pretrained, (224, 336, 448), (4, 7, 6), (48, 72, 96), kwargs)


def _built(
    name: str,
    pretrained: bool,
    dims: tuple[int, int, int],
    depths: tuple[int, int, int],
    partial: tuple[int, int, int],
    kwargs: dict[str, Any],
) -> SHViTDistilled:
    """``partial`` are the channels that attend; the first stage has no attention."""
    sizes = {"embed_dim": dims, "depth": depths, "partial_dim": partial, "types": ("i", "s", "s")}
    return build_model_with_cfg(
        SHViTDistilled,
        name,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": (0, 1, 2), "flatten_sequential": True},
        **{**sizes, **kwargs},
    )
