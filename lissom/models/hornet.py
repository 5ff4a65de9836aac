"""HorNet: high-order spatial interactions by recursive gated convolutions (NeurIPS 2022, arXiv 2207.14284).

Four stages at strides 4 to 32, orders 2 to 5, operator ``lissom.ops.gnconv.GnConv``. The ``7x7`` networks mix positions
by depthwise convolutions; the ``gf`` ones in the last two stages by ``GlobalLocalFilter``, whose filters are resized
for maps of other sizes than their own. Names are the publisher's own, whose checkpoints load as they are. Sides are
rounded down; any input size of at least 32 works.

The neck for dense tasks, which works behind any network, is ``lissom.layers.horfpn.HorFPN``.

Published training clips gradients by norm (100 for ``hornet_tiny_7x7``, 5 for the other 7x7, 1 for the ``gf``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from timm.layers import DropPath, LayerNorm2d, calculate_drop_path_rates
from timm.models import build_model_with_cfg, checkpoint_seq, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import nn
from torch.nn import functional as F

from lissom.ops.global_filter import GlobalLocalFilter, resized_filter
from lissom.ops.gnconv import GnConv

__all__ = [
    "HorNet",
    "HorNetBlock",
    "checkpoint_filter_fn",
    "hornet_base_7x7",
    "hornet_base_gf",
    "hornet_base_gf_img384",
    "hornet_large_7x7",
    "hornet_large_gf",
    "hornet_large_gf_img384",
    "hornet_small_7x7",
    "hornet_small_gf",
    "hornet_tiny_7x7",
    "hornet_tiny_gf",
]

EPS = 1e-6
FilterSize = tuple[int, int] | None


class HorNetBlock(nn.Module):
    """x + gamma1 gnconv(norm1(x)), then x + gamma2 mlp(norm2(x)), on (B, dim, H, W).

    ``order`` and ``scale`` are those of ``GnConv``; ``filter_size`` is that of a ``GlobalLocalFilter``, None a
    depthwise 7 x 7 convolution; ``layer_scale`` what the gammas start at, 0 for none.
    """

    def __init__(
        self,
        dim: int,
        order: int,
        filter_size: FilterSize = None,
        scale: float = 1 / 3,
        layer_scale: float = 1e-6,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        spatial = None if filter_size is None else partial(GlobalLocalFilter, h=filter_size[0], w=filter_size[1])
        self.norm1 = LayerNorm2d(dim, eps=EPS)
        self.gnconv = GnConv(dim, order, scale, spatial)
        self.norm2 = nn.LayerNorm(dim, eps=EPS)
        self.pwconv1 = nn.Linear(dim, 4 * dim)
        self.act = nn.GELU()
        self.pwconv2 = nn.Linear(4 * dim, dim)
        self.gamma1 = nn.Parameter(layer_scale * torch.ones(dim)) if layer_scale else None
        self.gamma2 = nn.Parameter(layer_scale * torch.ones(dim)) if layer_scale else None
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.gnconv(self.norm1(x))
        if self.gamma1 is not None:
            y = self.gamma1[:, None, None] * y
        x = x + self.drop_path(y)
        y = self.pwconv2(self.act(self.pwconv1(self.norm2(x.permute(0, 2, 3, 1)))))
        if self.gamma2 is not None:
            y = self.gamma2 * y
        return x + self.drop_path(y.permute(0, 3, 1, 2))

    @torch.no_grad()
    def fuse(self) -> HorNetBlock:
        """The same block, its gammas in the weights of the layers before them."""
        for gamma, layer in ((self.gamma1, self.gnconv.proj_out), (self.gamma2, self.pwconv2)):
            if gamma is not None:
                layer.weight.mul_(gamma.view(-1, *[1] * (layer.weight.ndim - 1)))
                assert layer.bias is not None
                layer.bias.mul_(gamma)
        self.gamma1 = self.gamma2 = None
        return self


class HorNet(nn.Module):
    """Images (B, in_chans, H, W) to logits (B, num_classes).

    Stage i is ``dim`` 2^i wide, of order i + 2, and has ``depths[i]`` blocks; ``filter_sizes[i]`` is that of its
    filters, None for 7 x 7 convolutions. ``global_pool`` is "avg", or "" for maps in place of logits, else ValueError
    is raised. ``uniform_init`` draws weights by Glorot's uniform rule in place of the truncated normal one; the
    classifier's are multiplied with ``head_init_scale``.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        dim: int = 64,
        depths: Sequence[int] = (2, 3, 18, 2),
        filter_sizes: Sequence[FilterSize] = (None, None, None, None),
        scale: float = 1 / 3,
        layer_scale: float = 1e-6,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        uniform_init: bool = False,
        head_init_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.num_classes, self.in_chans, self.drop_rate = num_classes, in_chans, drop_rate
        self.grad_checkpointing = False
        self._pool(global_pool)
        dims = [dim << stage for stage in range(len(depths))]
        self.downsample_layers = nn.ModuleList(
            [nn.Sequential(nn.Conv2d(in_chans, dim, 4, 4), LayerNorm2d(dim, eps=EPS))]
        )
        for narrow, wide in pairwise(dims):
            self.downsample_layers.append(
                nn.Sequential(LayerNorm2d(narrow, eps=EPS), nn.Conv2d(narrow, wide, 2, 2))
            )  # fmt: skip
        rates = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        self.stages = nn.ModuleList(
            nn.Sequential(
                *(HorNetBlock(dims[i], i + 2, filter_sizes[i], scale, layer_scale, rate) for rate in rates[i])
            )
            for i in range(len(depths))
        )
        self.feature_info = [
            {"num_chs": width, "reduction": 4 << i, "module": f"stages.{i}"} for i, width in enumerate(dims)
        ]
        self.num_features = self.head_hidden_size = dims[-1]
        self.norm: nn.Module = nn.LayerNorm(dims[-1], eps=EPS)
        self.head = nn.Linear(dims[-1], num_classes) if num_classes > 0 else nn.Identity()
        self.apply(_start_evenly if uniform_init else _start)
        if isinstance(self.head, nn.Linear) and head_init_scale != 1:
            with torch.no_grad():
                self.head.weight.mul_(head_init_scale)

    def _pool(self, kind: str) -> None:
        if kind not in ("avg", ""):
            raise ValueError(f"maps are averaged ('avg') or left as they are (''), not {kind!r}")
        self.global_pool = kind

    def no_weight_decay(self) -> set[str]:
        """None by name, as published; vectors are timm's to leave out."""
        return set()

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """How timm groups layers for a rate of learning by depth."""
        blocks: Any = r"^stages\.(\d+)"
        if not coarse:
            blocks = [
                (r"^downsample_layers\.(\d+)", (0,)),
                (r"^stages\.(\d+)\.(\d+)", None),
                (r"^norm", (99999,)),
            ]
        return {"stem": r"^downsample_layers\.0", "blocks": blocks}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether the blocks' insides are computed anew for the backward pass, instead of kept."""
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """The last layer."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new, untrained last layer of ``num_classes`` outputs; none for 0."""
        self.num_classes = num_classes
        if global_pool is not None:
            self._pool(global_pool)
        head = nn.Linear(self.num_features, num_classes) if num_classes > 0 else nn.Identity()
        self.head = head.apply(_start).to(next(self.parameters())).train(self.training)

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """timm's: the last maps and those of the stages ``indices``, or these alone."""
        if output_fmt != "NCHW":
            raise ValueError(f"maps come as NCHW, not {output_fmt}")
        taken, last = feature_take_indices(len(self.stages), indices)
        found = []
        for number in range(last + 1 if stop_early else len(self.stages)):
            x = self._run(number, x)
            if number in taken:
                found.append(x)
        return found if intermediates_only else (x, found)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """timm's: drop the stages behind the last of ``indices``, and the head."""
        taken, last = feature_take_indices(len(self.stages), indices)
        self.stages = self.stages[: last + 1]
        self.downsample_layers = self.downsample_layers[: last + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return taken

    def _run(self, number: int, x: torch.Tensor) -> torch.Tensor:
        x, stage = self.downsample_layers[number](x), self.stages[number]
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq(stage, x)
        return stage(x)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Images to the last maps (B, 8 dim, H / 32, W / 32), rounded down."""
        for number in range(len(self.stages)):
            x = self._run(number, x)
        return x

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Maps to logits (B, num_classes), or where ``pre_logits`` to their normalised mean (B, C)."""
        if not self.global_pool:
            return x
        x = F.dropout(self.norm(x.mean((2, 3))), self.drop_rate, self.training)
        return x if pre_logits else self.head(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))


def _start(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _start_evenly(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def checkpoint_filter_fn(state_dict: Mapping[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """A published checkpoint for this model: filters resized to its own, as fine-tuning on larger images does it."""
    own = model.state_dict()
    state = dict(state_dict)
    for key, weight in state.items():
        if key.endswith("complex_weight") and key in own and weight.shape[::3] == own[key].shape[::3]:
            state[key] = resized_filter(weight, *own[key].shape[1:3])
    return state


def _cfg(side: int = 224) -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, side, side),
        "pool_size": (side // 32, side // 32),
        "crop_pct": 0.875 if side == 224 else 1.0,
        "interpolation": "bicubic",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": "downsample_layers.0.0",
        "classifier": "head",
        "license": "mit",
    }


WIDTHS = {"tiny": 64, "small": 96, "base": 128, "large": 192}
FILTERS: dict[str, tuple[FilterSize, ...]] = {
    "7x7": (None, None, None, None),
    "gf": (None, None, (14, 8), (7, 4)),
    "gf_img384": (None, None, (24, 13), (12, 7)),
}
default_cfgs = generate_default_cfgs(
    {
        **{f"hornet_{size}_{kind}": _cfg() for size in WIDTHS for kind in ("7x7", "gf")},
        **{f"hornet_{size}_gf_img384": _cfg(384) for size in ("base", "large")},
    }
)


@register_model
def hornet_tiny_7x7(pretrained: bool = False, **kwargs: Any) -> HorNet:
    """HorNet-T, 22 409 512 parameters. Input (B, 3, 224, 224), output (B, 1000)."""
    return _built("hornet_tiny_7x7", pretrained, kwargs)


@register_model
def hornet_tiny_gf(pretrained: bool = False, **kwargs: Any) -> HorNet:
    """HorNet-T with global filters, 22 991 848 parameters. Input (B, 3, 224, 224), output (B, 1000)."""
    return _built("hornet_tiny_gf", pretrained, kwargs)


@register_model
def hornet_small_7x7(pretrained: bool = False, **kwargs: Any) -> HorNet:
    """HorNet-S, 49 528 264 parameters. Input (B, 3, 224, 224), output (B, 1000)."""
    return _built("hornet_small_7x7", pretrained, kwargs)


@register_model
def hornet_small_gf(pretrained: bool = False, **kwargs: Any) -> HorNet:
    """HorNet-S with global filters, 50 401 768 parameters. Input (B, 3, 224, 224), output (B, 1000)."""
    return _built("hornet_small_gf", pretrained, kwargs)


@register_model
def hornet_base_7x7(pretrained: bool = False, **kwargs: Any) -> HorNet:
    """HorNet-B, 87 256 680 parameters. Input (B, 3, 224, 224), output (B, 1000)."""
    return _built("hornet_base_7x7", pretrained, kwargs)


@register_model
def hornet_base_gf(pretrained: bool = False, **kwargs: Any) -> HorNet:
    """HorNet-B with global filters, 88 421 352 parameters. Input (B, 3, 224, 224), output (B, 1000)."""
    return _built("hornet_base_gf", pretrained, kwargs)


@register_model
def hornet_base_gf_img384(pretrained: bool = False, **kwargs: Any) -> HorNet:
    """HorNet-B with filters of larger maps, 92 099 560 parameters. Input (B, 3, 384, 384), output (B, 1000)."""
    return _built("hornet_base_gf_img384", pretrained, kwargs)


@register_model
def hornet_large_7x7(pretrained: bool = False, **kwargs: Any) -> HorNet:
    """HorNet-L, 194 542 504 parameters at 1000 classes; its checkpoints have some 10 500. Input (B, 3, 224, 224)."""
    return _built("hornet_large_7x7", pretrained, kwargs)


@register_model
def hornet_large_gf(pretrained: bool = False, **kwargs: Any) -> HorNet:
    """HorNet-L with global filters, 196 289 512 parameters at 1000 classes; its checkpoints have some 10 500."""
    return _built("hornet_large_gf", pretrained, kwargs)


@register_model
def hornet_large_gf_img384(pretrained: bool = False, **kwargs: Any) -> HorNet:
    """HorNet-L with filters of larger maps, 201 806 824 parameters. Input (B, 3, 384, 384), output (B, 1000)."""
    return _built("hornet_large_gf_img384", pretrained, kwargs)


def _built(name: str, pretrained: bool, kwargs: dict[str, Any]) -> HorNet:
    _, size, kind = name.split("_", 2)
    return build_model_with_cfg(
        HorNet,
        name,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": (0, 1, 2, 3), "feature_cls": "getter"},
        **{"dim": WIDTHS[size], "filter_sizes": FILTERS[kind], **kwargs},
    )
