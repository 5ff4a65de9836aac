"""ConvFirst networks: residual blocks whose spatial convolution stands before the expansion (arXiv 2404.03617).

The paper's table of its network is not at hand. ``convfirst_t`` and ``convfirst_s`` are this library's own: a stem,
four stages of ConvFirst blocks, a 1 x 1 convolution before the mean. ``BlockStack`` is the stage that the author
published with his kernels: blocks of one size between MLP blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import SelectAdaptivePool2d
from timm.models import build_model_with_cfg, checkpoint_seq, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import nn

from lissom.layers.convfirst import ConvFirst, FusedConvFirst, MBConv, MLPBlock

__all__ = ["BlockStack", "ConvFirstNet", "fuse_blocks_"]


class BlockStack(nn.Module):
    """MLP blocks, ``depth`` blocks of a kind, MLP blocks, mean: (B, channels, H, W) -> (B, channels, 1, 1).

    ``extra`` MLP blocks in all, the greater half of them before. ``block`` is ConvFirst or MBConv.
    """

    def __init__(
        self, channels: int = 64, kernel_size: int = 3, group_width: int = 8, expansion: int = 4, depth: int = 16,
        block: type[ConvFirst] | type[MBConv] = ConvFirst, extra: int = 1,
    ) -> None:  # fmt: skip
        super().__init__()

        def mlps(count: int) -> nn.Sequential:
            return nn.Sequential(*(MLPBlock(channels, channels, expansion) for _ in range(count)))

        self.pre = mlps(extra - extra // 2)
        self.blocks = nn.Sequential(
            *(block(channels, channels, kernel_size, 1, group_width, expansion) for _ in range(depth))
        )
        self.post = mlps(extra // 2)
        self.pool = nn.AdaptiveAvgPool2d(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.pool(self.post(self.blocks(self.pre(x))))  # type: ignore[no-any-return]


class ConvFirstNet(nn.Module):
    """(B, in_chans, H, W) -> logits (B, num_classes); the sides shrink to 1/32, halved in the stem and by every stage.

    ``widths``, ``depths`` and ``expansions`` of the four stages; the first block of each has stride 2.
    """

    def __init__(
        self, widths: Sequence[int] = (64, 96, 192, 320), depths: Sequence[int] = (2, 3, 6, 2),
        expansions: Sequence[int] = (4, 4, 4, 6), stem: int = 32, head: int = 1280, group_width: int = 8,
        num_classes: int = 1000, in_chans: int = 3, global_pool: str = "avg", drop_rate: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.num_classes, self.in_chans, self.drop_rate = num_classes, in_chans, drop_rate
        self.grad_checkpointing = False
        self.stem = nn.Sequential(nn.Conv2d(in_chans, stem, 3, 2, 1, bias=False), nn.BatchNorm2d(stem), nn.SiLU())
        self.feature_info = [{"num_chs": stem, "reduction": 2, "module": "stem.2"}]
        stages, channels = [], stem
        for number, (width, depth, expansion) in enumerate(zip(widths, depths, expansions, strict=True)):
            blocks = []
            for block in range(depth):
                stride = 2 if block == 0 else 1
                blocks.append(ConvFirst(channels, width, 3, stride, group_width, expansion))
                channels = width
            stages.append(nn.Sequential(*blocks))
            self.feature_info.append({"num_chs": width, "reduction": 4 << number, "module": f"stages.{number}"})
        self.stages = nn.Sequential(*stages)
        self.conv_head = nn.Sequential(nn.Conv2d(channels, head, 1, bias=False), nn.BatchNorm2d(head), nn.SiLU())
        self.num_features = self.head_hidden_size = head
        self.global_pool = SelectAdaptivePool2d(pool_type=global_pool, flatten=True)
        self.drop = nn.Dropout(drop_rate)
        self.classifier: nn.Module = nn.Linear(head, num_classes) if num_classes else nn.Identity()

    def get_classifier(self) -> nn.Module:
        return self.classifier

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new, untrained classifier; none for 0 classes."""
        if global_pool is not None:
            self.global_pool = SelectAdaptivePool2d(pool_type=global_pool, flatten=True)
        self.num_classes = num_classes
        weight = next(self.parameters())
        self.classifier = nn.Linear(self.num_features, num_classes).to(weight) if num_classes else nn.Identity()

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's groups of layers, for learning rates that decay with depth."""
        blocks = r"^stages\.(\d+)" if coarse else [(r"^stages\.(\d+)\.(\d+)", None), (r"^conv_head", (99999,))]
        return {"stem": r"^stem", "blocks": blocks}

    def _stage(self, number: int, x: torch.Tensor) -> torch.Tensor:
        stage = self.stages[number]
        if self.grad_checkpointing and self.training:
            return checkpoint_seq(stage, x)  # type: ignore[no-any-return]
        return stage(x)  # type: ignore[no-any-return]

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """(B, num_features, H', W'): the map before the mean."""
        x = self.stem(x)
        for number in range(len(self.stages)):
            x = self._stage(number, x)
        return self.conv_head(x)  # type: ignore[no-any-return]

    def forward_intermediates(
        self, x: torch.Tensor, indices: int | list[int] | None = None, norm: bool = False, stop_early: bool = False,
        output_fmt: str = "NCHW", intermediates_only: bool = False,
    ) -> Any:  # fmt: skip
        """The last map and those of ``feature_info`` that ``indices`` name (None: all), as timm's networks give them.

        Raises ValueError for another ``output_fmt`` than NCHW.
        """
        if output_fmt != "NCHW":
            raise ValueError("the maps come as NCHW only")
        taken, last = feature_take_indices(len(self.feature_info), indices)
        x = self.stem(x)
        kept = [x] if 0 in taken else []
        for number in range(last if stop_early else len(self.stages)):
            x = self._stage(number, x)
            if number + 1 in taken:
                kept.append(x)
        return kept if intermediates_only else (self.conv_head(x), kept)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        x = self.drop(self.global_pool(x))
        return x if pre_logits else self.classifier(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))


def fuse_blocks_(model: nn.Module, tile: int = 8, chunk: int = 128) -> nn.Module:
    """Replace every ConvFirst block of a trained model by its ``FusedConvFirst``, in place; returns the model."""
    for path, module in list(model.named_modules()):
        if isinstance(module, ConvFirst) and path:
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, FusedConvFirst.from_block(module, tile, chunk))
    return model


def _cfg() -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": "stem.0",
        "classifier": "classifier",
        "license": "apache-2.0",
    }


default_cfgs = generate_default_cfgs({"convfirst_t": _cfg(), "convfirst_s": _cfg()})


@register_model
def convfirst_t(pretrained: bool = False, **kwargs: Any) -> ConvFirstNet:
    """Of EfficientNet-B0's size: widths 64, 96, 192, 320."""
    return _built("convfirst_t", pretrained, kwargs)


@register_model
def convfirst_s(pretrained: bool = False, **kwargs: Any) -> ConvFirstNet:
    """Of ConvNeXt-T's size: widths 96, 192, 384, 768."""
    arguments = {
        "widths": (96, 192, 384, 768),
        "depths": (3, 3, 9, 3),
        "expansions": (4, 4, 4, 4),
        "stem": 48,
        **kwargs,
    }
    return _built("convfirst_s", pretrained, arguments)


def _built(name: str, pretrained: bool, arguments: dict[str, Any]) -> ConvFirstNet:
    return build_model_with_cfg(  # type: ignore[no-any-return]
        ConvFirstNet, name, pretrained, feature_cfg={"flatten_sequential": True}, **arguments
    )
