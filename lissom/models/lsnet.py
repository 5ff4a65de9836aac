"""LSNet: light networks that see large and focus small, by LS convolutions (CVPR 2025, arXiv 2503.23135).

Four stages at strides 8 to 64. Blocks of even number (from 0) mix by a depthwise convolution with three branches
(``RepVGGDW``) and squeeze-and-excitation; those of odd number by ``lissom.layers.lsconv.LSConv``, in the last stage by
attention with learned position biases. Names are the publisher's own, whose checkpoints load as they are.

Any input size works: the biases of the last stage belong to maps of ``img_size`` / 64, rounded up (193 to 256 pixels
are all 4 x 4), and are resized bicubically for others. They are looked up in every forward pass; the published code
keeps those of the moment when ``eval()`` was called, and so answers with stale ones where weights are loaded later:
``stale_biases=True`` does as it does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.layers import SelectAdaptivePool2d, SqueezeExcite
from timm.models import build_model_with_cfg, checkpoint_seq, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import nn
from torch.nn import functional as F

from lissom.layers.conv_norm import ConvNorm, NormLinear
from lissom.layers.distilled import DistilledHead
from lissom.layers.lsconv import LSConv
from lissom.models.weights import inner_state

__all__ = [
    "BiasedAttention",
    "LSNet",
    "LSNetDistilled",
    "RepVGGDW",
    "checkpoint_filter_fn",
    "lsnet_b",
    "lsnet_b_distill",
    "lsnet_s",
    "lsnet_s_distill",
    "lsnet_t",
    "lsnet_t_distill",
]


class RepVGGDW(nn.Module):
    """x + norm(3 x 3) + norm(1 x 1), both depthwise, on (B, dim, H, W): one 3 x 3 convolution for inference."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = ConvNorm(dim, dim, 3, groups=dim)
        self.conv1 = ConvNorm(dim, dim, groups=dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x) + self.conv1(x) + x

    @torch.no_grad()
    def fuse(self) -> nn.Conv2d:
        """The one convolution, of the same answers in eval mode."""
        fused, point = self.conv.fuse(), self.conv1.fuse()
        assert fused.bias is not None
        assert point.bias is not None
        fused.weight[:, 0, 1, 1] += point.weight[:, 0, 0, 0] + 1
        fused.bias += point.bias
        return fused


class FFN(nn.Sequential):
    """Two 1 x 1 convolutions, the first twice as wide: (B, dim, H, W) -> (B, dim, H, W). It starts silent."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.add_module("pw1", ConvNorm(dim, 2 * dim))
        self.add_module("act", nn.ReLU())
        self.add_module("pw2", ConvNorm(2 * dim, dim, scale=0.0))


class Residual(nn.Module):
    """x + m(x)."""

    def __init__(self, m: nn.Module) -> None:
        super().__init__()
        self.m = m

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.m(x)


class BiasedAttention(nn.Module):
    """Attention between all positions of a map (B, dim, H, W), with learned biases of their distance; same shape.

    A bias for each head and each (|row difference|, |column difference|) is added to the logits. Queries pass a
    depthwise 3 x 3 convolution first; keys and queries have ``key_dim`` channels a head, values dim / ``num_heads``.
    ``resolution`` (H, W) is the map that the table of biases, (heads, H W), belongs to; for other maps it is resized
    bicubically. ``stale_biases``: those of maps of ``resolution`` are kept when eval mode begins, and answered with
    until training mode begins, as published, whatever is loaded meanwhile. Raises ValueError where ``num_heads`` does
    not divide ``dim``.
    """

    attention_bias_idxs: torch.Tensor
    kept_biases: torch.Tensor | None

    def __init__(
        self,
        dim: int,
        key_dim: int = 16,
        num_heads: int = 4,
        resolution: tuple[int, int] = (4, 4),
        stale_biases: bool = False,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"{num_heads} heads do not divide {dim} channels")
        self.key_dim, self.num_heads, self.resolution = key_dim, num_heads, tuple(resolution)
        self.scale = key_dim**-0.5
        keys = key_dim * num_heads
        self.widths = [keys, keys, dim]
        self.qkv = ConvNorm(dim, 2 * keys + dim)
        self.proj = nn.Sequential(nn.ReLU(), ConvNorm(dim, dim, scale=0.0))
        self.dw = ConvNorm(keys, keys, 3, groups=keys)
        self.attention_biases = nn.Parameter(torch.zeros(num_heads, math.prod(self.resolution)))
        self.register_buffer("attention_bias_idxs", _distances(*self.resolution), persistent=False)
        self.stale_biases = stale_biases
        self.register_buffer("kept_biases", None, persistent=False)

    def train(self, mode: bool = True) -> BiasedAttention:
        """As ever; with ``stale_biases`` this is when they are kept, or forgotten."""
        super().train(mode)
        if self.stale_biases:
            self.kept_biases = None
            self.kept_biases = None if mode else self.biases(*self.resolution).detach()
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).split(self.widths, 1)
        q, k, v = (part.flatten(2).unflatten(1, (self.num_heads, -1)) for part in (self.dw(q), k, v))
        weights = (self.scale * q.transpose(2, 3) @ k + self.biases(*x.shape[2:])).softmax(-1)
        return self.proj((v @ weights.transpose(2, 3)).reshape(x.shape))

    def biases(self, height: int, width: int) -> torch.Tensor:
        """What is added to the logits of a map of this size: (heads, H W, H W)."""
        if (height, width) == self.resolution:
            if self.kept_biases is not None:
                return self.kept_biases
            return self.attention_biases[:, self.attention_bias_idxs]
        table = resized_biases(self.attention_biases, self.resolution, (height, width))
        return table[:, _distances(height, width).to(table.device)]


def _distances(height: int, width: int) -> torch.Tensor:
    """(H W, H W): for every pair of positions the place of their distance in a table (H, W), flat."""
    rows = torch.arange(height).repeat_interleave(width)
    columns = torch.arange(width).repeat(height)
    return (rows[:, None] - rows).abs() * width + (columns[:, None] - columns).abs()


def resized_biases(table: torch.Tensor, old: tuple[int, ...], new: tuple[int, ...]) -> torch.Tensor:
    """Biases (heads, H W) of maps of size ``old`` for those of size ``new``, bicubically."""
    maps = table.unflatten(1, old).unsqueeze(0)
    return F.interpolate(maps, size=new, mode="bicubic", align_corners=False)[0].flatten(1)


class Block(nn.Module):
    """A mixer, squeeze-and-excitation behind the depthwise one, and an FFN: (B, dim, H, W) -> (B, dim, H, W)."""

    def __init__(self, dim: int, mixer: nn.Module) -> None:
        super().__init__()
        self.mixer = mixer
        self.se = SqueezeExcite(dim, 0.25) if isinstance(mixer, RepVGGDW) else nn.Identity()
        self.ffn = Residual(FFN(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.ffn(self.se(self.mixer(x)))


class LSNet(nn.Module):
    """Images (B, in_chans, H, W) to logits (B, num_classes).

    ``embed_dim`` and ``depth`` are those of the four stages; ``num_heads`` and ``key_dim`` those of the last one's
    attention. ``img_size`` is the size of image that its position biases belong to. ``global_pool`` "" leaves the maps.
    ``stale_biases``: see ``BiasedAttention``.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        img_size: int | tuple[int, int] = 224,
        embed_dim: Sequence[int] = (64, 128, 256, 384),
        depth: Sequence[int] = (0, 2, 8, 10),
        num_heads: int = 4,
        key_dim: int = 16,
        drop_rate: float = 0.0,
        stale_biases: bool = False,
    ) -> None:
        super().__init__()
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        resolution = -(-height // 64), -(-width // 64)
        self.num_classes, self.in_chans, self.drop_rate = num_classes, in_chans, drop_rate
        self.grad_checkpointing = False
        first = embed_dim[0]
        self.patch_embed = nn.Sequential(
            ConvNorm(in_chans, first // 4, 3, 2),
            nn.ReLU(),
            ConvNorm(first // 4, first // 2, 3, 2),
            nn.ReLU(),
            ConvNorm(first // 2, first, 3, 2),
        )
        self.feature_info: list[dict[str, Any]] = []
        before = first
        for stage, (dim, blocks) in enumerate(zip(embed_dim, depth, strict=True)):
            layers: list[nn.Module] = []
            if stage:
                layers += [ConvNorm(before, before, 3, 2, groups=before), ConvNorm(before, dim)]
            for number in range(blocks):
                if number % 2 == 0:
                    mixer: nn.Module = RepVGGDW(dim)
                elif stage == len(embed_dim) - 1:
                    mixer = Residual(BiasedAttention(dim, key_dim, num_heads, resolution, stale_biases))
                else:
                    mixer = LSConv(dim)
                layers.append(Block(dim, mixer))
            self.add_module(f"blocks{stage + 1}", nn.Sequential(*layers))
            self.feature_info.append({"num_chs": dim, "reduction": 8 << stage, "module": f"blocks{stage + 1}"})
            before = dim
        self.num_features = self.head_hidden_size = before
        self._pool(global_pool)
        self.head = NormLinear(before, num_classes) if num_classes > 0 else nn.Identity()

    def _pool(self, kind: str) -> None:
        self.global_pool = SelectAdaptivePool2d(pool_type=kind, flatten=bool(kind)).train(self.training)

    def _stages(self) -> list[nn.Sequential]:
        return [getattr(self, f"blocks{number + 1}") for number in range(len(self.feature_info))]

    def no_weight_decay(self) -> set[str]:
        """The attention's biases, as published."""
        return {name for name, _ in self.named_parameters() if name.endswith("attention_biases")}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """How timm groups layers for a rate of learning by depth."""
        return {"stem": r"^patch_embed", "blocks": r"^blocks(\d+)" if coarse else r"^blocks(\d+)\.(\d+)"}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether the blocks' insides are computed anew for the backward pass, instead of kept."""
        self.grad_checkpointing = enable

    def get_classifier(self) -> Any:
        """The last layer."""
        return getattr(self.head, "l", self.head)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new, untrained head of ``num_classes`` outputs; none for 0."""
        self.num_classes = num_classes
        if global_pool is not None:
            self._pool(global_pool)
        head = NormLinear(self.num_features, num_classes) if num_classes > 0 else nn.Identity()
        self.head = head.to(next(self.parameters())).train(self.training)

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
        taken, last = feature_take_indices(len(self.feature_info), indices)
        found = []
        x = self.patch_embed(x)
        for number, stage in enumerate(self._stages()):
            if stop_early and number > last:
                break
            x = self._run(stage, x)
            if number in taken:
                found.append(x)
        return found if intermediates_only else (x, found)

    def _run(self, stage: nn.Sequential, x: torch.Tensor) -> torch.Tensor:
        if self.grad_checkpointing and len(stage) and not torch.jit.is_scripting():
            return checkpoint_seq(stage, x)
        return stage(x)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Images to the last maps (B, C, H / 64, W / 64), rounded up."""
        x = self.patch_embed(x)
        for stage in self._stages():
            x = self._run(stage, x)
        return x

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Maps to logits (B, num_classes), or where ``pre_logits`` to their mean (B, C)."""
        x = F.dropout(self.global_pool(x), self.drop_rate, self.training)
        return x if pre_logits else self.head(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))


class LSNetDistilled(DistilledHead, LSNet):
    """The same with a second classifier, ``head_dist``; see ``DistilledHead``."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.head_dist = self._new_head()


def checkpoint_filter_fn(state_dict: Mapping[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """A published checkpoint for this model: position biases resized to its maps, tables of indices left out.

    A checkpoint without any 1 x 1 branch (the publisher's log of the distilled B counts none) gets silent ones.
    """
    published = inner_state(state_dict)
    state = {key: value for key, value in published.items() if not key.endswith("attention_bias_idxs")}
    own = model.state_dict()
    for key, table in state.items():
        if key.endswith("attention_biases") and key in own and table.ndim == 2:
            attention = model.get_submodule(key.rpartition(".")[0])
            side = math.isqrt(table.shape[1])
            if isinstance(attention, BiasedAttention) and table.shape != own[key].shape and side**2 == table.shape[1]:
                state[key] = resized_biases(table, (side, side), attention.resolution)
    if not any(".mixer.conv1." in key for key in state):
        for key, value in own.items():
            if ".mixer.conv1." in key:
                # A norm of weight 0 and bias 0 gives 0, whatever its statistics.
                state[key] = torch.ones_like(value) if key.endswith("running_var") else torch.zeros_like(value)
    return state


def _cfg(name: str) -> dict[str, Any]:
    return {
        "hf_hub_id": "jameslahm/lsnet",  # the publisher's
        "hf_hub_filename": f"{name}.pth",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (4, 4),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": "patch_embed.0.c",
        "classifier": ("head.l", "head_dist.l") if name.endswith("distill") else "head.l",
    }


default_cfgs = generate_default_cfgs(
    {name: _cfg(name) for name in (f"lsnet_{size}{form}" for size in "tsb" for form in ("", "_distill"))}
)
SIZES: dict[str, dict[str, Any]] = {
    "t": {"embed_dim": (64, 128, 256, 384), "depth": (0, 2, 8, 10)},
    "s": {"embed_dim": (96, 192, 320, 448), "depth": (1, 2, 8, 10)},
    "b": {"embed_dim": (128, 256, 384, 512), "depth": (4, 6, 8, 10)},
}


@register_model
def lsnet_t(pretrained: bool = False, **kwargs: Any) -> LSNet:
    """LSNet-T, 11 409 832 parameters. Input (B, 3, 224, 224), output (B, 1000)."""
    return _built("lsnet_t", pretrained, kwargs)


@register_model
def lsnet_s(pretrained: bool = False, **kwargs: Any) -> LSNet:
    """LSNet-S, 16 146 304 parameters. Input (B, 3, 224, 224), output (B, 1000)."""
    return _built("lsnet_s", pretrained, kwargs)


@register_model
def lsnet_b(pretrained: bool = False, **kwargs: Any) -> LSNet:
    """LSNet-B, 23 313 608 parameters. Input (B, 3, 224, 224), output (B, 1000)."""
    return _built("lsnet_b", pretrained, kwargs)


@register_model
def lsnet_t_distill(pretrained: bool = False, **kwargs: Any) -> LSNetDistilled:
    """LSNet-T with two heads, 11 795 600 parameters. Input (B, 3, 224, 224), output (B, 1000)."""
    return _built("lsnet_t_distill", pretrained, kwargs)


@register_model
def lsnet_s_distill(pretrained: bool = False, **kwargs: Any) -> LSNetDistilled:
    """LSNet-S with two heads, 16 596 200 parameters. Input (B, 3, 224, 224), output (B, 1000)."""
    return _built("lsnet_s_distill", pretrained, kwargs)


@register_model
def lsnet_b_distill(pretrained: bool = False, **kwargs: Any) -> LSNetDistilled:
    """LSNet-B with two heads, 23 827 632 parameters. Input (B, 3, 224, 224), output (B, 1000)."""
    return _built("lsnet_b_distill", pretrained, kwargs)


def _built(name: str, pretrained: bool, kwargs: dict[str, Any]) -> Any:
    return build_model_with_cfg(
        LSNetDistilled if name.endswith("distill") else LSNet,
        name,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": (0, 1, 2, 3)},
        **{**SIZES[name.split("_")[1]], **kwargs},
    )
