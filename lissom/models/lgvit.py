"""LGViT's published networks: ViT, DeiT and Swin with eight early exits each (arXiv 2308.00255).

The backbones are timm's, the exits those of ``lissom.layers.exit_heads``, attached by hooks. A network's answer is a
tuple: the logits (B, classes) of each exit in order of depth, then its own. ViT and DeiT have exits behind blocks 4 to
11 of 12, Swin behind 4, 7, 10, 13, 16, 19, 22 and 23 of 24, before its maps are merged. For exits on a model of your
own see the technique ``early_exit``; ``lissom slim`` leaves through these as they were trained.

``checkpoint_filter_fn`` reads the published checkpoints, whose names are those of the transformers package.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.deit import VisionTransformerDistilled
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from lissom.layers.exit_heads import MapExit, TokenExit, build_head, head_kinds
from lissom.layers.exits import Exits, attach_exits, exits_of, exits_put_away

__all__ = ["LGDeiT", "LGSwin", "LGViT", "checkpoint_filter_fn"]

VIT_EXITS = (4, 5, 6, 7, 8, 9, 10, 11)
SWIN_EXITS = (4, 7, 10, 13, 16, 19, 22, 23)


def _with_exits(model: nn.Module, exits: Sequence[int], classes: int, distilled: bool = False) -> None:
    """Attach exits behind the blocks whose numbers, from 1 through all stages, ``exits`` names."""
    stages = [("blocks", model.blocks)] if hasattr(model, "blocks") else [
        (f"layers.{s}.blocks", stage.blocks) for s, stage in enumerate(model.layers)
    ]  # fmt: skip
    blocks = [(f"{path}.{i}", block) for path, inside in stages for i, block in enumerate(inside)]
    if not exits or list(exits) != sorted(set(exits)) or not exits[0] >= 1 or exits[-1] >= len(blocks):
        raise ValueError(f"exits {tuple(exits)} are no rising numbers of blocks between 1 and {len(blocks) - 1}")
    chosen = [blocks[n - 1] for n in exits]
    maps = len(stages) > 1
    heads = []
    for (_, block), kind in zip(chosen, head_kinds(len(exits), maps), strict=True):
        if maps:
            sample = torch.empty(1, *block.input_resolution, block.dim, device="meta")
            heads.append(build_head(sample, classes, kind, channels_last=True))
        else:
            grid, prefix = model.patch_embed.grid_size, model.num_prefix_tokens
            sample = torch.empty(1, prefix + grid[0] * grid[1], model.embed_dim, device="meta")
            heads.append(build_head(sample, classes, kind, prefix=prefix, grid=grid, distilled=distilled))
    attach_exits(model, Exits([path for path, _ in chosen], heads))


class _Reset:
    """Networks whose exits get new classifiers with their own, and another size of the images."""

    exits: Exits

    def reset_classifier(self, num_classes: int, *arguments: Any, **more: Any) -> None:
        super().reset_classifier(num_classes, *arguments, **more)  # type: ignore[misc]
        for head in self._heads():
            assert isinstance(head, TokenExit | MapExit)
            head.reset_classifier(num_classes)

    def set_input_size(self, *arguments: Any, **more: Any) -> None:
        super().set_input_size(*arguments, **more)  # type: ignore[misc]
        own: Any = self
        for head in self._heads():
            if isinstance(head, TokenExit):  # others take the grid from their map
                head.grid = own.patch_embed.grid_size

    def _heads(self) -> list[nn.Module]:
        own: Any = self
        exits = exits_of(own) or exits_put_away(own)
        return [] if exits is None else list(exits.heads)


class LGViT(_Reset, VisionTransformer):
    """timm's vision transformer with exits behind the blocks ``exits`` (from 1). (B, 3, 224, 224) -> logits, a tuple.

    ``pooler`` takes no part in any answer: the published network has it, and so its checkpoints and its count of
    parameters.
    """

    def __init__(self, *arguments: Any, exits: Sequence[int] = VIT_EXITS, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self.pooler = nn.Linear(self.embed_dim, self.embed_dim)
        _with_exits(self, exits, self.num_classes)


class LGDeiT(_Reset, VisionTransformerDistilled):
    """The same of timm's distilled transformer: every exit averages the answers of two classifiers."""

    def __init__(self, *arguments: Any, exits: Sequence[int] = VIT_EXITS, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self.pooler = nn.Linear(self.embed_dim, self.embed_dim)
        _with_exits(self, exits, self.num_classes, distilled=True)


class LGSwin(_Reset, SwinTransformer):
    """timm's Swin transformer with exits behind the blocks ``exits``, numbered from 1 through all stages."""

    def __init__(self, *arguments: Any, exits: Sequence[int] = SWIN_EXITS, **more: Any) -> None:
        super().__init__(*arguments, **more)
        _with_exits(self, exits, self.num_classes)


_TOKENS = (
    (r"^deit\.embeddings\.cls_token$", "cls_token"),
    (r"^deit\.embeddings\.distillation_token$", "dist_token"),
    (r"^deit\.embeddings\.position_embeddings$", "pos_embed"),
    (r"^deit\.embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^deit\.encoder\.layer\.", "blocks."),
    (r"^deit\.layernorm\.", "norm."),
    (r"^deit\.pooler\.dense\.", "pooler."),
    (r"^(?:cls_)?classifier\.", "head."),
    (r"^distillation_classifier\.", "head_dist."),
)
_MAPS = (
    (r"^swin\.embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^swin\.embeddings\.norm\.", "patch_embed.norm."),
    (r"^swin\.encoder\.layers\.(\d+)\.blocks\.", r"layers.\1.blocks."),
    (r"^swin\.layernorm\.", "norm."),
    (r"^classifier\.", "head.fc."),
)
_BLOCKS = (
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.attention\.(?:attention|self)\.", ".attn."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
)
_HEADS = (
    (r"\.mlp\.", ".mixer."),
    (r"\.classifier\.layernorm\.", ".norm."),
    (r"\.classifier\.classifier\.", ".classifier."),
    (r"\.cls_classifier\.", ".classifier."),
)
_HIGHWAY = re.compile(r"^(?:deit|swin)\.encoder\.(?:layers\.(\d+)\.)?highway\.(\d+)\.")


def _cfg(*classifiers: str) -> dict[str, Any]:
    """The publisher's examples scale the shorter side to 224, cut out the centre and use ImageNet's statistics."""
    kinds = ("classifier", "distillation_classifier")[: len(classifiers)]
    exits = (f"exits.heads.{i}.{kind}" for i in range(len(VIT_EXITS)) for kind in kinds)
    return {
        "url": "",
        "num_classes": 100,
        "input_size": (3, 224, 224),
        "pool_size": None,
        "crop_pct": 1.0,
        "interpolation": "bilinear",
        "fixed_input_size": True,
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": "patch_embed.proj",
        "classifier": (*classifiers, *exits),
        "license": "apache-2.0",
    }


default_cfgs = generate_default_cfgs(
    {
        "lgvit_vit_base": _cfg("head"),
        "lgvit_deit_base": _cfg("head", "head_dist"),
        "lgvit_deit_small": _cfg("head", "head_dist"),
        "lgvit_swin_base": _cfg("head.fc"),
    }
)


@register_model
def lgvit_vit_base(pretrained: bool = False, **kwargs: Any) -> LGViT:
    """ViT-B/16 with eight exits, 101 277 060 parameters at 100 classes. Input (B, 3, 224, 224), nine (B, 100)."""
    return _built(LGViT, "lgvit_vit_base", pretrained, {**_TOKEN_SIZES, "embed_dim": 768, "num_heads": 12, **kwargs})


@register_model
def lgvit_deit_base(pretrained: bool = False, **kwargs: Any) -> LGDeiT:
    """DeiT-B/16 with eight exits, 101 970 696 parameters at 100 classes. Input (B, 3, 224, 224), nine (B, 100)."""
    return _built(LGDeiT, "lgvit_deit_base", pretrained, {**_TOKEN_SIZES, "embed_dim": 768, "num_heads": 12, **kwargs})


@register_model
def lgvit_deit_small(pretrained: bool = False, **kwargs: Any) -> LGDeiT:
    """DeiT-S/16 with eight exits, 25 442 484 parameters at 10 classes. Input (B, 3, 224, 224), nine (B, 100)."""
    return _built(LGDeiT, "lgvit_deit_small", pretrained, {**_TOKEN_SIZES, "embed_dim": 384, "num_heads": 6, **kwargs})


@register_model
def lgvit_swin_base(pretrained: bool = False, **kwargs: Any) -> LGSwin:
    """Swin-B with eight exits, 96 356 924 parameters at 100 classes. Input (B, 3, 224, 224), nine (B, 100)."""
    sizes = {"patch_size": 4, "window_size": 7, "embed_dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32)}
    return _built(LGSwin, "lgvit_swin_base", pretrained, {**sizes, "num_classes": 100, **kwargs})


# The norms' epsilon is transformers' for these two families; timm's own is 1e-6.
_TOKEN_SIZES = {"patch_size": 16, "depth": 12, "num_classes": 100, "norm_layer": partial(nn.LayerNorm, eps=1e-12)}


def _built(kind: type[nn.Module], name: str, pretrained: bool, arguments: dict[str, Any]) -> Any:
    return build_model_with_cfg(kind, name, pretrained, pretrained_filter_fn=checkpoint_filter_fn, **arguments)


def checkpoint_filter_fn(state_dict: Mapping[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """A published checkpoint in the names of ``LGViT``, ``LGDeiT`` and ``LGSwin``; other checkpoints as they are.

    Queries, keys and values become one matrix. timm merges Swin's maps at a stage's beginning, the publisher at the
    end of the stage before. Tables of relative positions are left out: the network makes its own.
    """
    if not any(key.startswith(("deit.", "swin.")) for key in state_dict):
        return dict(state_dict)
    rules = (*(_MAPS if any(key.startswith("swin.") for key in state_dict) else _TOKENS), *_BLOCKS)
    exits = sorted({place for key in state_dict if (place := _place(key)) is not None})
    state: dict[str, torch.Tensor] = {}
    parts: dict[str, dict[str, torch.Tensor]] = {}  # qkv key -> its thirds
    for key, value in state_dict.items():
        if key.endswith("relative_position_index"):
            continue
        place = _place(key)
        if place is not None:
            rest = _HIGHWAY.sub("", key)
            state[_renamed(f"exits.heads.{exits.index(place)}.{rest}", _HEADS)] = value
            continue
        merging = re.fullmatch(r"swin\.encoder\.layers\.(\d+)\.downsample\.(.+)", key)
        if merging:
            state[f"layers.{int(merging[1]) + 1}.downsample.{merging[2]}"] = value
            continue
        name = _renamed(key, rules)
        third = re.fullmatch(r"(.+\.attn\.)(query|key|value)\.(weight|bias)", name)
        if third:
            parts.setdefault(f"{third[1]}qkv.{third[3]}", {})[third[2]] = value
        else:
            state[name] = value
    if exits:
        state["exits.steps"] = torch.zeros((), dtype=torch.long)  # of training by turns, which is over
    for name, thirds in parts.items():
        if len(thirds) == 3:
            state[name] = torch.cat([thirds[third] for third in ("query", "key", "value")])
        else:  # not the whole of it: whoever loads it says what is missing
            state |= {name.replace(".qkv.", f".{third}."): value for third, value in thirds.items()}
    return state


def _place(key: str) -> tuple[int, int] | None:
    """(stage, number within the stage) of the exit that a key belongs to."""
    found = _HIGHWAY.match(key)
    return (int(found[1] or 0), int(found[2])) if found else None


def _renamed(key: str, rules: Sequence[tuple[str, str]]) -> str:
    for pattern, name in rules:
        key = re.sub(pattern, name, key)
    return key
