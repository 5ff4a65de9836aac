"""FFNet that segments: a head of FFNet's own blocks on the last three maps of a network (arXiv 2406.02021).

The maps are enlarged bicubically to the largest, joined, brought to one width, mixed by three blocks at stride 8, and
classified. The head, ``FFNetHead``, works on the maps of any network of timm's ``features_only``. Published is the head
on maps of 64, 160 and 256 channels, whose network is not: here an FFNet of ``lissom.models.metamixer`` stands before
it. Sizes of kernels that are not stated (1 x 1 of the joining layers, 7 x 7 of the blocks') are this library's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn
from torch.nn import functional as F

from lissom.layers.conv_norm import ConvNorm
from lissom.models.metamixer import FFNet, _Block, _init

__all__ = ["FFNetHead", "FFNetSegmenter", "ffnet_segmenter"]


class FFNetHead(nn.Module):
    """Maps of falling size, [(B, in_channels[i], H_i, W_i)], to logits (B, num_classes, H_0, W_0).

    Coarser maps enlarged bicubically and joined; BN(1 x 1) -> GELU -> BN(1 x 1) to ``dim``; ``depth`` blocks of FFNet,
    with GELU behind each of their residual sums; BN(1 x 1) to 4 ``dim`` -> GELU; ``classifier``. Raises ValueError
    where the maps' channels are others.
    """

    def __init__(self, in_channels: Sequence[int], num_classes: int, dim: int = 256, depth: int = 3) -> None:
        super().__init__()
        self.in_channels, self.dim = tuple(in_channels), dim
        self.squeeze = nn.Sequential(ConvNorm(sum(in_channels), dim), nn.GELU(), ConvNorm(dim, dim))
        self.blocks = nn.Sequential(*(_GatedBlock(dim, 7, 7, 3.0, 0.0, None, False) for _ in range(depth)))
        self.widen = nn.Sequential(ConvNorm(dim, 4 * dim), nn.GELU())
        self.classifier = nn.Conv2d(4 * dim, num_classes, 1)

    def forward_features(self, maps: Sequence[torch.Tensor]) -> torch.Tensor:
        """What the classifier reads, (B, 4 dim, H_0, W_0)."""
        found = tuple(x.shape[1] for x in maps)
        if found != self.in_channels:
            raise ValueError(f"maps of {self.in_channels} channels are wanted, not of {found}")
        size = maps[0].shape[2:]
        every = [x if x.shape[2:] == size else F.interpolate(x, size=size, mode="bicubic") for x in maps]
        return self.widen(self.blocks(self.squeeze(torch.cat(every, 1))))

    def forward(self, maps: Sequence[torch.Tensor]) -> torch.Tensor:
        return self.classifier(self.forward_features(maps))


class _GatedBlock(_Block):
    """FFNet's block with GELU behind each residual sum."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.gelu(self.channel_mixer(F.gelu(self.token_mixer(x))))


class FFNetSegmenter(nn.Module):
    """Images (B, in_chans, H, W) of any size to logits (B, num_classes, H, W).

    An FFNet (whose sizes are the other arguments), ``FFNetHead`` of ``head_dim`` and ``head_depth`` on its maps of
    strides 8, 16 and 32, and a bilinear enlargement of the logits.
    """

    def __init__(
        self,
        num_classes: int = 150,
        in_chans: int = 3,
        head_dim: int = 256,
        head_depth: int = 3,
        drop_rate: float = 0.0,
        **network: Any,
    ) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"{num_classes} classes cannot be told apart; one or more are wanted")
        self.num_classes, self.drop_rate = num_classes, drop_rate
        self.network = FFNet(in_chans, num_classes=0, global_pool="", **network)
        self.network.norm = nn.Identity()  # of the last map alone, before the mean
        channels = [info["num_chs"] for info in self.network.feature_info[-3:]]
        self.head = FFNetHead(channels, num_classes, head_dim, head_depth)
        self.num_features = self.head_hidden_size = 4 * head_dim
        self.head.apply(_init)

    def get_classifier(self) -> nn.Module:
        """The last convolution."""
        return self.head.classifier

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new last convolution of ``num_classes`` outputs. Raises ValueError for none: the answer is a map of them.

        There is no pooling either.
        """
        if num_classes < 1 or global_pool:
            raise ValueError("the answer is a map of classes: one or more of them, and no pooling")
        self.num_classes = num_classes
        old = self.head.classifier
        self.head.classifier = nn.Conv2d(self.num_features, num_classes, 1).to(old.weight)
        _init(self.head.classifier)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute the network's blocks anew in the backward pass instead of keeping their intermediate maps."""
        self.network.set_grad_checkpointing(enable)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        maps = self.network.forward_intermediates(x, indices=3, intermediates_only=True)
        y = F.dropout(self.head.forward_features(maps), self.drop_rate, self.training)  # type: ignore[arg-type]
        return F.interpolate(self.head.classifier(y), size=x.shape[2:], mode="bilinear", align_corners=False)


default_cfgs = generate_default_cfgs(
    {
        "ffnet_segmenter": {
            "url": "",
            "num_classes": 150,
            "input_size": (3, 512, 512),
            "pool_size": None,
            "crop_pct": 1.0,
            "crop_mode": "squash",
            "interpolation": "bicubic",
            "mean": (0.485, 0.456, 0.406),
            "std": (0.229, 0.224, 0.225),
            "first_conv": "network.patch_embed.0.c",
            "classifier": "head.classifier",
            "license": "apache-2.0",
        }
    }
)


@register_model
def ffnet_segmenter(pretrained: bool = False, **kwargs: Any) -> FFNetSegmenter:
    """An ``ffnet_1`` with FFNet's head, 150 classes (those of ADE20K). Input (B, 3, H, W), output (B, 150, H, W)."""
    sizes = {"depths": (2, 2, 8, 2), "dims": (80, 160, 320, 640), "kernel_size": 3}
    return build_model_with_cfg(FFNetSegmenter, "ffnet_segmenter", pretrained, **{**sizes, **kwargs})
