"""RegNets of explicit stages (AnyNet), and the publisher's names of parameters (arXiv 2003.13678, 2103.06877).

timm builds RegNets from four numbers that decide the width of every block. What fast compound scaling makes of them is
no RegNet any more: depth, width and group width are given stage by stage. ``AnyNet`` is timm's network built so. Its
blocks, and the names of its parameters, are timm's.

``checkpoint_filter_fn`` reads the publisher's checkpoints (pycls) into timm's RegNets as well. Published weights of
pycls expect the colours in the order blue, green, red; they are loaded as they are.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models import regnet as timms
from torch import nn

__all__ = ["AnyNet", "AnyNetCfg", "checkpoint_filter_fn", "regnety_800mf_dWr4"]


@dataclass
class AnyNetCfg(timms.RegNetCfg):
    """timm's settings of a RegNet, and one number a stage for what they would decide.

    ``depths``: blocks; ``widths``: channels that leave a stage; ``bottlenecks``: channels inside a block over
    ``widths``; ``group_widths``: channels of one group of the 3 x 3 convolution.
    """

    depths: tuple[int, ...] = ()
    widths: tuple[int, ...] = ()
    bottlenecks: tuple[float, ...] = ()
    group_widths: tuple[int, ...] = ()

    @classmethod
    def of(cls, base: timms.RegNetCfg, **numbers: Any) -> AnyNetCfg:
        """``base`` (activation, norm, shortcut, squeeze-and-excitation, ...) with the numbers given."""
        kept = {field.name: getattr(base, field.name) for field in fields(timms.RegNetCfg)}
        return cls(**{**kept, **numbers})


class AnyNet(timms.RegNet):
    """timm's RegNet of four stages that ``cfg`` gives one by one: (B, in_chans, H, W) -> (B, num_classes).

    Raises ValueError where the numbers do not fit each other: lists of other lengths than four, or groups that do not
    divide a block's inside.
    """

    def __init__(self, cfg: AnyNetCfg, **more: Any) -> None:
        names = {field.name for field in fields(cfg)}
        cfg = AnyNetCfg.of(cfg, **{name: more.pop(name, getattr(cfg, name)) for name in names})
        lists = (cfg.depths, cfg.widths, cfg.bottlenecks, cfg.group_widths)
        if any(len(numbers) != 4 for numbers in lists):
            raise ValueError("depths, widths, bottlenecks and group_widths are four numbers each")
        for width, share, group in zip(*lists[1:], strict=True):
            if round(width * share) % group:
                raise ValueError(f"groups of {group} do not divide the {round(width * share)} channels inside a block")
        super().__init__(cfg, **more)
        self.cfg = cfg

    def _get_stage_args(
        self, cfg: Any, default_stride: int = 2, output_stride: int = 32, drop_path_rate: float = 0.0
    ) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        stages, net_stride, dilation, done = [], 2, 1, 0
        for depth, width, share, group in zip(cfg.depths, cfg.widths, cfg.bottlenecks, cfg.group_widths, strict=True):
            stride = default_stride
            if net_stride >= output_stride:
                dilation, stride = dilation * default_stride, 1
            net_stride *= stride
            # Drop paths grow from block to block, from none to the last one's rate.
            rates = [drop_path_rate * i / max(1, sum(cfg.depths) - 1) for i in range(done, done + depth)]
            stages.append({
                "out_chs": width, "stride": stride, "dilation": dilation, "depth": depth, "bottle_ratio": share,
                "group_size": group, "drop_path_rates": rates,
            })  # fmt: skip
            done += depth
        common = ("downsample", "se_ratio", "linear_out", "act_layer", "norm_layer")
        return stages, {name: getattr(cfg, name) for name in common}


def read_numbers(model: nn.Module) -> tuple[tuple[int, ...], tuple[int, ...], tuple[float, ...], tuple[int, ...]]:
    """Depths, widths, bottlenecks and group widths of one of timm's RegNets, read from its blocks."""
    depths, widths, bottlenecks, groups = [], [], [], []
    for number in range(1, 5):
        blocks = list(model.get_submodule(f"s{number}").children())
        middle, last = _conv(blocks[0].conv2), _conv(blocks[0].conv3)
        depths.append(len(blocks))
        widths.append(last.out_channels)
        bottlenecks.append(middle.out_channels / last.out_channels)
        groups.append(middle.out_channels // middle.groups)
    return tuple(depths), tuple(widths), tuple(bottlenecks), tuple(groups)


def stem_width(model: nn.Module) -> int:
    """Channels before the first stage of one of timm's RegNets."""
    return int(_conv(model.stem).out_channels)


def _conv(layer: Any) -> Any:
    """A convolution alone, or with its norm."""
    return layer if isinstance(layer, nn.Conv2d) else layer.conv


def of_numbers(
    model: nn.Module,
    name: str,
    depths: tuple[int, ...],
    widths: tuple[int, ...],
    bottlenecks: tuple[float, ...],
    group_widths: tuple[int, ...],
    stem: int,
    **kwargs: Any,
) -> AnyNet:
    """A network like ``model``, which timm built as ``name``, of other numbers; raises ValueError as ``AnyNet``."""
    base = model.cfg if isinstance(model, AnyNet) else timms.model_cfgs[name]
    cfg = AnyNetCfg.of(
        base, depths=depths, widths=widths, bottlenecks=bottlenecks, group_widths=group_widths, stem_width=stem
    )
    return build_model_with_cfg(AnyNet, name, False, model_cfg=cfg, pretrained_filter_fn=checkpoint_filter_fn, **kwargs)


# pycls: blocks s1.b1 with a projection, and f.a, f.b, f.c (1 x 1, 3 x 3, 1 x 1) inside.
_NAMES = (
    (re.compile(r"^(s\d+\.b\d+)\.proj\."), r"\1.downsample.conv."),
    (re.compile(r"^(s\d+\.b\d+)\.bn\."), r"\1.downsample.bn."),
    (re.compile(r"^(s\d+\.b\d+)\.f\.se\.f_ex\.0\."), r"\1.se.fc1."),
    (re.compile(r"^(s\d+\.b\d+)\.f\.se\.f_ex\.2\."), r"\1.se.fc2."),
    (re.compile(r"^(s\d+\.b\d+)\.f\.a\."), r"\1.conv1.conv."),
    (re.compile(r"^(s\d+\.b\d+)\.f\.a_bn\."), r"\1.conv1.bn."),
    (re.compile(r"^(s\d+\.b\d+)\.f\.b\."), r"\1.conv2.conv."),
    (re.compile(r"^(s\d+\.b\d+)\.f\.b_bn\."), r"\1.conv2.bn."),
    (re.compile(r"^(s\d+\.b\d+)\.f\.c\."), r"\1.conv3.conv."),
    (re.compile(r"^(s\d+\.b\d+)\.f\.c_bn\."), r"\1.conv3.bn."),
)


def checkpoint_filter_fn(state_dict: Mapping[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """A checkpoint of pycls in timm's names; other checkpoints as they are."""
    state = dict(state_dict)
    if not any(re.match(r"s\d+\.b\d+\.f\.a\.", key) for key in state):
        return state
    return {_renamed(key): value for key, value in state.items()}


def _renamed(key: str) -> str:
    for pattern, name in _NAMES:
        if pattern.match(key):
            return pattern.sub(name, key)
    return key


default_cfgs = generate_default_cfgs(
    {
        "regnety_800mf_dWr4": {
            "url": "",
            "num_classes": 1000,
            "input_size": (3, 240, 240),
            "pool_size": (8, 8),
            "crop_pct": 240 / 276,
            "interpolation": "bicubic",
            "mean": (0.485, 0.456, 0.406),
            "std": (0.229, 0.224, 0.225),
            "first_conv": "stem.conv",
            "classifier": "head.fc",
            "license": "mit",
        }
    }
)


@register_model
def regnety_800mf_dWr4(pretrained: bool = False, **kwargs: Any) -> AnyNet:  # noqa: N802 - the published name
    """RegNetY-800MF scaled by dWr to four times its multiply-adds, 19 857 304 parameters. Input (B, 3, 240, 240)."""
    cfg = AnyNetCfg.of(
        timms.model_cfgs["regnety_008"], depths=(1, 3, 9, 2), widths=(128, 224, 576, 1344),
        bottlenecks=(1.0, 1.0, 1.0, 1.0), group_widths=(32, 32, 32, 32),
    )  # fmt: skip
    return build_model_with_cfg(
        AnyNet, "regnety_800mf_dWr4", pretrained, model_cfg=cfg, pretrained_filter_fn=checkpoint_filter_fn, **kwargs
    )
