"""CvT: vision transformers with convolutional embeddings and projections (ICCV 2021, arXiv 2103.15808).

Three stages at strides 4, 8 and 16, without position embeddings: any input size of at least 16 works. The last stage
has a class token, which is classified. The operator is ``lissom.ops.conv_attention.ConvAttention``. Names are the
publisher's own; ``checkpoint_filter_fn`` also reads checkpoints of the transformers package, whose own network
computes GELU in place of the published approximation: ``act="gelu"`` answers as it does.

Published training drops paths in the last stage alone: ``drop_path_rate`` 0.1, in the widest network 0.3.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.layers import DropPath, Mlp, QuickGELU
from timm.models import build_model_with_cfg, checkpoint, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import nn

from lissom.ops.conv_attention import ConvAttention

__all__ = [
    "CvT",
    "CvTStage",
    "checkpoint_filter_fn",
    "cvt_13_224",
    "cvt_13_384",
    "cvt_21_224",
    "cvt_21_384",
    "cvt_w24_384",
]

ACTS: dict[str, type[nn.Module]] = {"quick_gelu": QuickGELU, "gelu": nn.GELU}


class ConvEmbed(nn.Module):
    """A strided convolution and a LayerNorm over the channels: (B, in, H, W) -> tokens (B, h w, out), and (h, w)."""

    def __init__(self, in_chans: int, dim: int, kernel_size: int, stride: int, padding: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, kernel_size, stride, padding)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
        x = self.proj(x)
        return self.norm(x.flatten(2).transpose(1, 2)), (x.shape[2], x.shape[3])


class Block(nn.Module):
    """x + attn(norm1(x)), then x + mlp(norm2(x)): tokens (B, N, dim) of a map (height, width), the same shape."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        method: str,
        cls_token: bool,
        act: type[nn.Module],
        drop: float,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = ConvAttention(dim, num_heads, method=method, cls_token=cls_token)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, 4 * dim, act_layer=act, drop=drop)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: torch.Tensor, height: int, width: int) -> torch.Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x), height, width))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class CvTStage(nn.Module):
    """Maps (B, in, H, W) to tokens (B, [1 +] h w, dim), the class token, if any, first; and (h, w)."""

    def __init__(
        self,
        in_chans: int,
        dim: int,
        depth: int,
        num_heads: int,
        embedding: tuple[int, int, int],
        method: str = "dw_bn",
        cls_token: bool = False,
        act: type[nn.Module] = QuickGELU,
        drop: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.patch_embed = ConvEmbed(in_chans, dim, *embedding)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim)) if cls_token else None
        self.pos_drop = nn.Dropout(drop)
        rates = torch.linspace(0, drop_path, depth, device="cpu").tolist()
        self.blocks = nn.ModuleList(Block(dim, num_heads, method, cls_token, act, drop, rate) for rate in rates)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
        x, size = self.patch_embed(x)
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)
        x = self.pos_drop(x)
        for block in self.blocks:
            x = checkpoint(block, x, *size) if self.grad_checkpointing else block(x, *size)
        return x, size

    def maps(self, x: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """The stage's tokens as maps (B, dim, h, w), without the class token."""
        tokens = x if self.cls_token is None else x[:, 1:]
        return tokens.transpose(1, 2).unflatten(2, size)


class CvT(nn.Module):
    """Images (B, in_chans, H, W) to logits (B, num_classes).

    ``dims``, ``heads`` and ``depths`` are those of the stages; ``cls_token`` gives the last one a class token, and
    ``global_pool`` says what is classified: "token" (the default with one), "avg" (else), or "" for the tokens as they
    are. ``method`` is that of ``ConvAttention``, ``act`` "quick_gelu" or "gelu". Raises ValueError for others.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str | None = None,
        dims: Sequence[int] = (64, 192, 384),
        heads: Sequence[int] = (1, 3, 6),
        depths: Sequence[int] = (1, 2, 10),
        method: str = "dw_bn",
        act: str = "quick_gelu",
        cls_token: bool = True,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if act not in ACTS:
            raise ValueError(f"{act!r} is no activation of CvT; known: {', '.join(ACTS)}")
        self.num_classes, self.in_chans = num_classes, in_chans
        last = len(dims) - 1
        self.num_stages = len(dims)
        self.cls_token = cls_token
        self.feature_info: list[dict[str, Any]] = []
        before = in_chans
        for i, (dim, count, depth) in enumerate(zip(dims, heads, depths, strict=True)):
            stage = CvTStage(
                before, dim, depth, count, (3, 2, 1) if i else (7, 4, 2), method, cls_token and i == last, ACTS[act],
                drop_rate, drop_path_rate if i == last else 0.0,
            )  # fmt: skip
            self.add_module(f"stage{i}", stage)
            self.feature_info.append({"num_chs": dim, "reduction": 4 << i, "module": f"stage{i}"})
            before = dim
        self.num_features = self.head_hidden_size = before
        self.norm: nn.Module = nn.LayerNorm(before)
        self._pool(("token" if cls_token else "avg") if global_pool is None else global_pool)
        self.head = nn.Linear(before, num_classes) if num_classes > 0 else nn.Identity()
        self.apply(_start)
        if cls_token:
            nn.init.trunc_normal_(self._stages()[-1].cls_token, std=0.02)

    def _pool(self, kind: str) -> None:
        known = ("token", "avg", "") if self.cls_token else ("avg", "")
        if kind not in known:
            raise ValueError(f"{kind!r} is nothing that this network classifies; known: {known}")
        self.global_pool = kind

    def _stages(self) -> list[CvTStage]:
        return [getattr(self, f"stage{i}") for i in range(self.num_stages)]

    def no_weight_decay(self) -> set[str]:
        """The class token, as published."""
        return {name for name, _ in self.named_parameters() if name.endswith("cls_token")}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """How timm groups layers for a rate of learning by depth."""
        blocks: Any = r"^stage(\d+)"
        if not coarse:
            blocks = [
                (r"^stage(\d+)\.(?:patch_embed|cls_token)", (0,)),
                (r"^stage(\d+)\.blocks\.(\d+)", None),
                (r"^norm", (99999,)),
            ]
        return {"stem": r"^stage0\.patch_embed", "blocks": blocks}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether the blocks' insides are computed anew for the backward pass, instead of kept."""
        for stage in self._stages():
            stage.grad_checkpointing = enable

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
        """timm's: what ``forward_features`` gives, and the maps of the stages ``indices``; or these alone."""
        if output_fmt != "NCHW":
            raise ValueError(f"maps come as NCHW, not {output_fmt}")
        taken, last = feature_take_indices(self.num_stages, indices)
        found = []
        tokens = x
        for number, stage in enumerate(self._stages()):
            if stop_early and number > last:
                break
            tokens, size = stage(x)
            x = stage.maps(tokens, size)
            if number in taken:
                found.append(stage.maps(self.norm(tokens), size) if norm and number == self.num_stages - 1 else x)
        if intermediates_only:
            return found
        whole = not stop_early or last == self.num_stages - 1
        return (self.norm(tokens) if whole else tokens), found

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """timm's: drop the stages behind the last of ``indices``, and the head."""
        taken, last = feature_take_indices(self.num_stages, indices)
        for number in range(last + 1, self.num_stages):
            delattr(self, f"stage{number}")
        self.num_stages = last + 1
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return taken

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Images to the last stage's normalised tokens (B, [1 +] h w, C), the class token, if any, first."""
        tokens = x
        for stage in self._stages():
            tokens, size = stage(x)
            x = stage.maps(tokens, size)
        return self.norm(tokens)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Tokens to logits (B, num_classes), or where ``pre_logits`` to what is classified (B, C)."""
        if self.global_pool == "token":
            x = x[:, 0]
        elif self.global_pool == "avg":
            x = x[:, int(self.cls_token) :].mean(1)
        return x if pre_logits else self.head(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))


def _start(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


# The names of transformers' CvtForImageClassification, in this order.
_NAMES = (
    (r"^cvt\.", ""),
    (r"^encoder\.stages\.(\d+)\.", r"stage\1."),
    (r"\.embedding\.convolution_embeddings\.projection\.", ".patch_embed.proj."),
    (r"\.embedding\.convolution_embeddings\.normalization\.", ".patch_embed.norm."),
    (r"\.layers\.(\d+)\.", r".blocks.\1."),
    (
        r"\.attention\.attention\.convolution_projection_([qkv])[a-z]+\.convolution_projection\.convolution\.",
        r".attn.conv_proj_\1.conv.",
    ),
    (
        r"\.attention\.attention\.convolution_projection_([qkv])[a-z]+\.convolution_projection\.normalization\.",
        r".attn.conv_proj_\1.bn.",
    ),
    (r"\.attention\.attention\.projection_([qkv])[a-z]+\.", r".attn.proj_\1."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"^layernorm\.", "norm."),
    (r"^classifier\.", "head."),
)


def checkpoint_filter_fn(state_dict: Mapping[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """A checkpoint of the transformers package in the publisher's names, the network's own; others as they are."""
    if not any(key.startswith("cvt.encoder.") for key in state_dict):
        return dict(state_dict)
    state = {}
    for key, value in state_dict.items():
        for pattern, name in _NAMES:
            key = re.sub(pattern, name, key)
        state[key] = value
    return state


def _cfg(repository: str, side: int) -> dict[str, Any]:
    return {
        "hf_hub_id": f"microsoft/{repository}",  # the publisher's, in the names of the transformers package
        "num_classes": 1000,
        "input_size": (3, side, side),
        "pool_size": None,
        "crop_pct": 0.875 if side == 224 else 1.0,  # the larger ones are tested without a crop
        "interpolation": "bicubic",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": "stage0.patch_embed.proj",
        "classifier": "head",
        "license": "mit",
    }


default_cfgs = generate_default_cfgs(
    {
        "cvt_13_224.in1k": _cfg("cvt-13", 224),
        "cvt_13_384.in1k": _cfg("cvt-13-384", 384),
        "cvt_13_384.in22k_ft_in1k": _cfg("cvt-13-384-22k", 384),
        "cvt_21_224.in1k": _cfg("cvt-21", 224),
        "cvt_21_384.in1k": _cfg("cvt-21-384", 384),
        "cvt_21_384.in22k_ft_in1k": _cfg("cvt-21-384-22k", 384),
        "cvt_w24_384.in22k_ft_in1k": _cfg("cvt-w24-384-22k", 384),
    }
)
SIZES: dict[str, dict[str, Any]] = {
    "13": {"dims": (64, 192, 384), "heads": (1, 3, 6), "depths": (1, 2, 10)},
    "21": {"dims": (64, 192, 384), "heads": (1, 3, 6), "depths": (1, 4, 16)},
    "w24": {"dims": (192, 768, 1024), "heads": (3, 12, 16), "depths": (2, 2, 20)},
}


@register_model
def cvt_13_224(pretrained: bool = False, **kwargs: Any) -> CvT:
    """CvT-13, 19 997 480 parameters. Input (B, 3, 224, 224), output (B, 1000)."""
    return _built("cvt_13_224", pretrained, kwargs)


@register_model
def cvt_13_384(pretrained: bool = False, **kwargs: Any) -> CvT:
    """The same network for images of 384 x 384."""
    return _built("cvt_13_384", pretrained, kwargs)


@register_model
def cvt_21_224(pretrained: bool = False, **kwargs: Any) -> CvT:
    """CvT-21, 31 622 696 parameters. Input (B, 3, 224, 224), output (B, 1000)."""
    return _built("cvt_21_224", pretrained, kwargs)


@register_model
def cvt_21_384(pretrained: bool = False, **kwargs: Any) -> CvT:
    """The same network for images of 384 x 384."""
    return _built("cvt_21_384", pretrained, kwargs)


@register_model
def cvt_w24_384(pretrained: bool = False, **kwargs: Any) -> CvT:
    """CvT-W24, 277 196 392 parameters. Input (B, 3, 384, 384), output (B, 1000)."""
    return _built("cvt_w24_384", pretrained, kwargs)


def _built(name: str, pretrained: bool, kwargs: dict[str, Any]) -> CvT:
    return build_model_with_cfg(
        CvT,
        name,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": (0, 1, 2), "feature_cls": "getter"},
        **{**SIZES[name.split("_")[1]], **kwargs},
    )
