"""EfficientNets of explicit stages, and the publisher's names of parameters (arXiv 1905.11946, 2103.06877).

timm's EfficientNets come in the sizes of the paper, or by one factor for all widths and one for all depths. Here one is
built of a depth and a width for every stage, the widths of stem and head beside them, and everything else (kernels,
strides, expansions, squeeze-and-excitation) as a given network has it: that is what fast compound scaling changes.

``checkpoint_filter_fn`` reads checkpoints of pycls into timm's EfficientNets. Published weights of pycls expect the
colours in the order blue, green, red; they are loaded as they are.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from timm.layers import Conv2dSame, make_divisible
from timm.models import _efficientnet_blocks as blocks
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._efficientnet_builder import decode_arch_def
from timm.models.efficientnet import EfficientNet
from torch import nn

from lissom.errors import NotApplicable

__all__ = ["checkpoint_filter_fn", "effnet_b0", "effnet_b0_dWr4"]

FEATURES = {"feature_cls": "getter"}


def read_numbers(model: nn.Module) -> tuple[tuple[int, ...], tuple[int, ...], int, int]:
    """Depths, widths, the stem's channels and the head's (0: none) of one of timm's EfficientNets."""
    stages = [list(stage.children()) for stage in model.blocks]  # type: ignore[union-attr]
    head = model.conv_head.out_channels if isinstance(model.conv_head, nn.Conv2d) else 0
    widths = tuple(int(_last(stage[0]).out_channels) for stage in stages)
    return tuple(map(len, stages)), widths, int(model.conv_stem.out_channels), int(head)  # type: ignore[union-attr,arg-type]


def _last(block: Any) -> Any:
    """The convolution that a block ends with."""
    for kind, name in (
        (blocks.InvertedResidual, "conv_pwl"),
        (blocks.EdgeResidual, "conv_pwl"),
        (blocks.DepthwiseSeparableConv, "conv_pw"),
        (blocks.ConvBnAct, "conv"),
    ):
        if type(block) is kind:
            return getattr(block, name)
    raise NotApplicable(f"stages of {type(block).__name__} are not known; those of EfficientNets' own blocks are")


def of_numbers(
    model: Any, name: str, depths: tuple[int, ...], widths: tuple[int, ...], stem: int, head: int, **kwargs: Any
) -> EfficientNet:
    """A network like ``model``, which timm built as ``name``, of other numbers; stages keep their kinds of blocks."""
    settings = []
    for stage, depth, width in zip(model.blocks, depths, widths, strict=True):
        kinds = list(stage.children())
        first, rest = _settings(kinds[0], width), _settings(kinds[-1], width)
        # Each block its own: the builder writes into them.
        settings.append([dict(first), *({**rest, "stride": 1} for _ in range(depth - 1))])
    norm = model.bn1
    return _built(
        name,
        settings,
        stem,
        head,
        pad_type="same" if isinstance(model.conv_stem, Conv2dSame) else "",
        act_layer=type(norm.act),
        norm_layer=partial(nn.BatchNorm2d, eps=norm.eps, momentum=norm.momentum),
        **kwargs,
    )


def _settings(block: Any, width: int) -> dict[str, Any]:
    """A block in the terms of timm's builder, ``width`` channels leaving it."""
    last = _last(block)
    given: dict[str, Any] = {"out_chs": width, "act_layer": None}
    squeezed = getattr(block, "se", None)
    squeezed = squeezed.conv_reduce.out_channels if isinstance(squeezed, blocks.SqueezeExcite) else 0
    if isinstance(block, blocks.ConvBnAct):
        return {
            **given, "block_type": "cn", "kernel_size": last.kernel_size[0], "stride": last.stride[0],
            "skip": block.has_skip,
        }  # fmt: skip
    if isinstance(block, blocks.DepthwiseSeparableConv):
        into, middle = block.conv_dw.in_channels, block.conv_dw
        given |= {"block_type": "ds", "dw_kernel_size": middle.kernel_size[0], "pw_act": block.has_pw_act}
    elif isinstance(block, blocks.EdgeResidual):
        into, middle = block.conv_exp.in_channels, block.conv_exp
        given |= {"block_type": "er", "exp_kernel_size": middle.kernel_size[0]}
        given["exp_ratio"] = _expansion(into, middle.out_channels)
    else:
        into, middle = block.conv_pw.in_channels, block.conv_dw
        given |= {"block_type": "ir", "dw_kernel_size": middle.kernel_size[0]}
        given["exp_ratio"] = _expansion(into, middle.out_channels)
    if squeezed:
        given["se_ratio"] = squeezed / into
    plain = middle.stride[0] == 1 and into == last.out_channels
    return {**given, "stride": middle.stride[0], "noskip": plain and not block.has_skip}


def _expansion(into: int, inside: int) -> float:
    """The factor whose rounded product ``inside`` is: a whole one where that does."""
    whole = round(inside / into)
    return float(whole) if make_divisible(into * whole) == inside else inside / into


def _built(name: str, settings: list[list[dict[str, Any]]], stem: int, head: int, **kwargs: Any) -> EfficientNet:
    return build_model_with_cfg(
        EfficientNet,
        name,
        kwargs.pop("pretrained", False),
        feature_cfg=FEATURES,
        pretrained_filter_fn=checkpoint_filter_fn,
        **{
            "block_args": settings, "stem_size": stem, "fix_stem": True, "num_features": head,
            "round_chs_fn": _as_given, **kwargs,
        },
    )  # fmt: skip


def _as_given(channels: int) -> int:
    return channels


# pycls: stem, s1.b1 (exp, dwise, se, lin_proj, each with its norm), head.
_TOP = {
    "stem.conv.": "conv_stem.", "stem.bn.": "bn1.", "head.conv.": "conv_head.", "head.conv_bn.": "bn2.",
    "head.fc.": "classifier.",
}  # fmt: skip
_SQUEEZE = {"se.f_ex.0.": "se.conv_reduce.", "se.f_ex.2.": "se.conv_expand."}
_EXPANDED = {
    "exp.": "conv_pw.", "exp_bn.": "bn1.", "dwise.": "conv_dw.", "dwise_bn.": "bn2.", "lin_proj.": "conv_pwl.",
    "lin_proj_bn.": "bn3.", **_SQUEEZE,
}  # fmt: skip
_PLAIN = {
    "dwise.": "conv_dw.", "dwise_bn.": "bn1.", "lin_proj.": "conv_pw.", "lin_proj_bn.": "bn2.", **_SQUEEZE
}  # fmt: skip
_BLOCK = re.compile(r"^s(\d+)\.b(\d+)\.")


def checkpoint_filter_fn(state_dict: Mapping[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """A checkpoint of pycls in timm's names; other checkpoints as they are."""
    state = dict(state_dict)
    if "stem.conv.weight" not in state:
        return state
    expanded = {_BLOCK.match(key)[0] for key in state if _BLOCK.match(key) and ".exp." in key}  # type: ignore[index]
    return {_renamed(key, expanded): value for key, value in state.items()}


def _renamed(key: str, expanded: set[str]) -> str:
    block = _BLOCK.match(key)
    place, rest, names = "", key, _TOP
    if block:
        place, rest = f"blocks.{int(block[1]) - 1}.{int(block[2]) - 1}.", key[block.end() :]
        names = _EXPANDED if block[0] in expanded else _PLAIN
    for theirs, ours in names.items():
        if rest.startswith(theirs):
            return place + ours + rest[len(theirs) :]
    return key


def _cfg(size: int = 224, test: int = 256) -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, size, size),
        "pool_size": None,
        "crop_pct": size / test,
        "interpolation": "bicubic",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": "conv_stem",
        "classifier": "classifier",
        "license": "mit",
    }


default_cfgs = generate_default_cfgs({"effnet_b0": _cfg(), "effnet_b0_dWr4": _cfg(240, 276)})

B0 = ("ds_k3_s1_e1", "ir_k3_s2_e6", "ir_k5_s2_e6", "ir_k3_s2_e6", "ir_k5_s1_e6", "ir_k5_s2_e6", "ir_k3_s1_e6")


@register_model
def effnet_b0(pretrained: bool = False, **kwargs: Any) -> EfficientNet:
    """EfficientNet-B0 as pycls trains it, 5 288 548 parameters. Input (B, 3, 224, 224), output (B, 1000)."""
    return _b0("effnet_b0", pretrained, (1, 2, 2, 3, 3, 4, 1), (16, 24, 40, 80, 112, 192, 320), 32, 1280, kwargs)


@register_model
def effnet_b0_dWr4(pretrained: bool = False, **kwargs: Any) -> EfficientNet:  # noqa: N802 - the published name
    """EfficientNet-B0 scaled by dWr to four times its multiply-adds, 15 824 374 parameters. Input (B, 3, 240, 240)."""
    return _b0("effnet_b0_dWr4", pretrained, (1, 2, 2, 3, 3, 5, 1), (24, 40, 72, 136, 192, 336, 560), 56, 2232, kwargs)


def _b0(
    name: str,
    pretrained: bool,
    depths: tuple[int, ...],
    widths: tuple[int, ...],
    stem: int,
    head: int,
    kwargs: dict[str, Any],
) -> EfficientNet:
    """B0's blocks; ``depths``, ``widths``, ``stem`` and ``head`` may be among the keyword arguments."""
    depths, widths = kwargs.pop("depths", depths), kwargs.pop("widths", widths)
    stem, head = kwargs.pop("stem", stem), kwargs.pop("head", head)
    words = [
        [f"{kind.replace('_', f'_r{depth}_', 1)}_c{width}_se0.25"]
        for kind, depth, width in zip(B0, depths, widths, strict=True)
    ]
    return _built(
        name, decode_arch_def(words), stem, head, **{"act_layer": nn.SiLU, "pretrained": pretrained, **kwargs}
    )
