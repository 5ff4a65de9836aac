"""STViT: vision transformers whose attention runs among super tokens of a high-resolution map (arXiv 2211.11167).

A convolutional stem, four stages of blocks (a depthwise convolution as position embedding, super token attention, a
feed-forward layer with a depthwise convolution inside), a projection to 1,024 channels. The first two stages attend
among super tokens of 8 x 8 and 4 x 4 pixels (``lissom.ops.super_token_attention``), the others among all pixels.
``stvit_small``, ``stvit_base`` and ``stvit_large`` take images of any size; parameters bear the published names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.layers import DropPath, calculate_drop_path_rates, trunc_normal_
from timm.models import build_model_with_cfg, checkpoint_seq, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import nn

from lissom.layers.conv_norm import _affine
from lissom.ops.super_token_attention import SuperTokenAttention

__all__ = ["STViT", "SuperTokenBlock", "checkpoint_filter_fn"]


class _ResidualDepthwise(nn.Module):
    """x plus a depthwise 3 x 3 convolution of it; one convolution for inference, the input added to the centre tap."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv(x)

    @torch.no_grad()
    def fuse(self) -> nn.Conv2d:
        c = self.conv
        fused = nn.Conv2d(c.in_channels, c.out_channels, 3, padding=1, groups=c.groups).to(c.weight)
        fused.load_state_dict(c.state_dict())
        fused.weight[:, 0, 1, 1] += 1
        return fused.train(self.training)


class _ConvNorm(nn.Sequential):
    """A convolution with a bias, and its BatchNorm: one convolution for inference."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(nn.Conv2d(in_channels, out_channels, 3, 2, 1), nn.BatchNorm2d(out_channels))

    @torch.no_grad()
    def fuse(self) -> nn.Conv2d:
        conv, norm = self
        assert isinstance(conv, nn.Conv2d)
        assert isinstance(norm, nn.BatchNorm2d)
        assert conv.bias is not None
        scale, shift = _affine(norm)
        fused = nn.Conv2d(conv.in_channels, conv.out_channels, 3, 2, 1).to(conv.weight)
        fused.weight.copy_(conv.weight.double() * scale[:, None, None, None])
        fused.bias.copy_(conv.bias.double() * scale + shift)  # type: ignore[union-attr]
        return fused.train(self.training)


class _ChannelNorm(nn.Module):
    """A layer norm over the channels of a map, (B, dim, H, W)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class _FeedForward(nn.Module):
    def __init__(self, dim: int, hidden: int, drop: float) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(dim, hidden, 1)
        self.act1 = nn.GELU()
        self.conv = _ResidualDepthwise(hidden)
        self.fc2 = nn.Conv2d(hidden, dim, 1)
        self.drop = nn.Dropout(drop)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.drop(self.fc2(self.conv(self.drop(self.act1(self.fc1(x))))))


class SuperTokenBlock(nn.Module):
    """A block of STViT, (B, dim, H, W) to the same shape, of any sides.

    x = x + dw(x); x = x + gamma_1 attention(LN(x)); x = x + gamma_2 ffn(BN(x)), with super tokens of ``cell`` (h, w)
    pixels. The gammas start at ``ls_init_value``; None: there are none. ``reparameterize`` folds the BatchNorm into
    the layer behind it, in place, for inference. Raises ValueError where the heads do not divide the channels.
    """

    norm2: nn.Module

    def __init__(
        self, dim: int, cell: tuple[int, int], num_heads: int, n_iter: int = 1, mlp_ratio: float = 4.0,
        ls_init_value: float | None = None, drop: float = 0.0, drop_path: float = 0.0, qkv_bias: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        self.pos_embed = _ResidualDepthwise(dim)
        self.norm1 = _ChannelNorm(dim)
        self.attn = SuperTokenAttention(dim, cell, n_iter, num_heads, qkv_bias, drop)
        self.norm2 = nn.BatchNorm2d(dim)
        self.mlp2 = _FeedForward(dim, int(dim * mlp_ratio), drop)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        for name in ("gamma_1", "gamma_2"):
            gamma = None if ls_init_value is None else nn.Parameter(ls_init_value * torch.ones(1, dim, 1, 1))
            self.register_parameter(name, gamma)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pos_embed(x)
        y = self.attn(self.norm1(x))
        x = x + self.drop_path(y if self.gamma_1 is None else y * self.gamma_1)
        y = self.mlp2(self.norm2(x))
        return x + self.drop_path(y if self.gamma_2 is None else y * self.gamma_2)

    @torch.no_grad()
    def reparameterize(self) -> None:
        """Fold ``norm2``, with its running statistics, into ``mlp2.fc1``; nothing happens a second time."""
        if not isinstance(self.norm2, nn.BatchNorm2d):
            return
        scale, shift = _affine(self.norm2)
        fc1 = self.mlp2.fc1
        assert fc1.bias is not None
        weight = fc1.weight.double()
        fc1.bias.copy_(fc1.bias.double() + weight.flatten(1) @ shift)
        fc1.weight.copy_(weight * scale[:, None, None])
        self.norm2 = nn.Identity()


class _Stem(nn.Module):
    """Images to maps of a quarter of the sides, rounded up: four convolutions, each with GELU and then BatchNorm."""

    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = in_chans
        for width, stride in ((dim // 2, 2), (dim // 2, 1), (dim, 2), (dim, 1)):
            layers += [nn.Conv2d(before, width, 3, stride, 1), nn.GELU(), nn.BatchNorm2d(width)]
            before = width
        self.proj = nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x)


class _Downsample(nn.Module):
    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.proj = _ConvNorm(in_channels, out_channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x)


class _Stage(nn.Module):
    def __init__(self, blocks: Sequence[nn.Module], downsample: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*blocks)
        self.downsample = downsample
        self.grad_checkpointing = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Without the downsampling behind it, so that the stage's own map can be told."""
        if self.grad_checkpointing and self.training and not torch.jit.is_scripting():
            return checkpoint_seq(self.blocks, x)
        return self.blocks(x)


class STViT(nn.Module):
    """Images (B, in_chans, H, W) to logits (B, num_classes); maps of strides 4, 8, 16 and 32, sides rounded up.

    - ``cells``: sides of a super token in pixels of the stage's map, one number a stage; 1: plain attention;
    - ``n_iter``: rounds of assignment, one number a stage;
    - ``ls_init_values``: what a stage's layer scales start at; None: it has none;
    - ``projection``: channels of the last 1 x 1 convolution, which the classifier reads behind BatchNorm, SiLU and
      the mean;
    - ``drop_rate``: dropout inside the blocks and behind the stem, as published;
    - ``global_pool``: ``"avg"``, or ``""`` for maps as the answer (of ``num_classes=0`` only).

    Raises ValueError where the stages' settings do not fit together.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        dims: Sequence[int] = (64, 128, 320, 512),
        depths: Sequence[int] = (3, 5, 9, 3),
        num_heads: Sequence[int] = (1, 2, 5, 8),
        cells: Sequence[int] = (8, 4, 1, 1),
        n_iter: Sequence[int] = (1, 1, 1, 1),
        ls_init_values: Sequence[float | None] = (None, None, None, None),
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        projection: int = 1024,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        stages = len(depths)
        if not depths or any(len(s) != stages for s in (dims, num_heads, cells, n_iter, ls_init_values)):
            raise ValueError(f"depths are given of {stages} stages; dims, heads, cells, rounds and scales differ")
        self.num_classes, self.in_chans = num_classes, in_chans
        self.patch_embed = _Stem(in_chans, dims[0])
        self.pos_drop = nn.Dropout(drop_rate)
        self.layers = nn.ModuleList()
        self.feature_info: list[dict[str, Any]] = []
        rates = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        for i, dim in enumerate(dims):
            blocks = [
                SuperTokenBlock(
                    dim, (cells[i], cells[i]), num_heads[i], n_iter[i], mlp_ratio, ls_init_values[i], drop_rate,
                    rates[i][j], qkv_bias,
                )
                for j in range(depths[i])
            ]  # fmt: skip
            self.layers.append(_Stage(blocks, _Downsample(dim, dims[i + 1]) if i + 1 < stages else nn.Identity()))
            self.feature_info.append({"num_chs": dim, "reduction": 4 * 2**i, "module": f"layers.{i}"})
        self.proj: nn.Module = nn.Conv2d(dims[-1], projection, 1)
        self.norm: nn.Module = nn.BatchNorm2d(projection)
        self.swish: nn.Module = nn.SiLU()
        self.num_features = self.head_hidden_size = projection
        self.head: nn.Module = nn.Identity()
        self.reset_classifier(num_classes, global_pool)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Names of the parameters by depth, as timm asks for them."""
        return {
            "stem": r"^patch_embed",
            "blocks": r"^layers\.(\d+)"
            if coarse
            else [
                (r"^layers\.(\d+)\.downsample", (0,)),
                (r"^layers\.(\d+)\.blocks\.(\d+)", None),
                (r"^(?:proj|norm)\.", (99999,)),
            ],
        }

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute blocks anew in the backward pass instead of keeping their intermediate maps."""
        for stage in self.layers:
            stage.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """The last linear layer."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new last layer of ``num_classes`` outputs; 0: none. ``global_pool`` None keeps the pooling."""
        pool = getattr(self, "global_pool", "avg") if global_pool is None else global_pool
        if pool not in ("avg", "") or (num_classes and not pool):
            raise ValueError(f"the pooling {pool!r} is not 'avg', nor '' without classes")
        self.num_classes, self.global_pool = num_classes, pool
        self.head = nn.Identity()
        if num_classes:
            self.head = nn.Linear(self.num_features, num_classes).to(next(self.parameters()))
            trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[torch.Tensor] | tuple[torch.Tensor, list[torch.Tensor]]:
        """The answer of ``forward_features``, and the maps (B, C, H', W') of the stages ``indices``, all by default.

        Raises ValueError for ``norm`` (the network has none that fits a stage's map) and an ``output_fmt`` other than
        NCHW.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"maps come as NCHW, not {output_fmt}")
        if norm:
            raise ValueError("the last norm is the projection's; there is none that fits a stage's map")
        taken, last = feature_take_indices(len(self.layers), indices)
        maps = []
        x = self.pos_drop(self.patch_embed(x))
        end = len(self.layers) - 1
        for i, stage in enumerate(self.layers[: last + 1] if stop_early else self.layers):
            x = stage(x)
            if i in taken:
                maps.append(x)
            x = stage.downsample(x)
        if intermediates_only:
            return maps
        return (self.swish(self.norm(self.proj(x))) if i == end else x), maps

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what the maps of the stages ``indices`` do not need; returns these indices."""
        taken, last = feature_take_indices(len(self.layers), indices)
        pruned = last < len(self.layers) - 1
        self.layers = self.layers[: last + 1]
        self.layers[-1].downsample = nn.Identity()
        if prune_norm or pruned:
            self.proj = self.norm = self.swish = nn.Identity()
            self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
        if prune_head or prune_norm or pruned:
            self.reset_classifier(0, "")
        return taken

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Images to the projected map, (B, 1024, H / 32, W / 32)."""
        x = self.pos_drop(self.patch_embed(x))
        for stage in self.layers:
            x = stage.downsample(stage(x))
        return self.swish(self.norm(self.proj(x)))

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """The projected map to logits, or with ``pre_logits`` to what the last layer reads."""
        if not self.global_pool:
            return x
        x = x.mean((2, 3))
        return x if pre_logits else self.head(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))


def checkpoint_filter_fn(state_dict: Mapping[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """A published checkpoint without its constant kernels, which stand for shifts; other names are the network's."""
    constants = (".attn.unfold.weights", ".attn.fold.weights")
    return {key: value for key, value in state_dict.items() if not key.endswith(constants)}


def _cfg() -> dict[str, Any]:
    """Figures are published at 384 pixels too, of the whole shorter side; no setting but the images' size differs."""
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": "patch_embed.proj.0",
        "classifier": "head",
        "license": "mit",
    }


default_cfgs = generate_default_cfgs({f"stvit_{size}": _cfg() for size in ("small", "base", "large")})


@register_model
def stvit_small(pretrained: bool = False, **kwargs: Any) -> STViT:
    """25 495 624 parameters. Input (B, 3, 224, 224), output (B, 1000)."""
    sizes = {"dims": (64, 128, 320, 512), "depths": (3, 5, 9, 3), "num_heads": (1, 2, 5, 8)}
    return _built("stvit_small", pretrained, {**sizes, **kwargs})


@register_model
def stvit_base(pretrained: bool = False, **kwargs: Any) -> STViT:
    """51 691 288 parameters, layer scales in the last two stages. Input (B, 3, 224, 224), output (B, 1000)."""
    sizes = {"dims": (96, 192, 384, 512), "depths": (4, 6, 14, 6), "num_heads": (2, 3, 6, 8)}
    return _built("stvit_base", pretrained, {**sizes, "ls_init_values": (None, None, 1e-6, 1e-6), **kwargs})


@register_model
def stvit_large(pretrained: bool = False, **kwargs: Any) -> STViT:
    """94 971 096 parameters, layer scales in the last two stages. Input (B, 3, 224, 224), output (B, 1000)."""
    sizes = {"dims": (96, 192, 448, 640), "depths": (4, 7, 19, 8), "num_heads": (2, 3, 7, 10)}
    return _built("stvit_large", pretrained, {**sizes, "ls_init_values": (None, None, 1e-6, 1e-6), **kwargs})


def _built(name: str, pretrained: bool, arguments: dict[str, Any]) -> STViT:
    return build_model_with_cfg(
        STViT,
        name,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": (0, 1, 2, 3), "feature_cls": "getter"},
        **arguments,
    )
