"""Terminator: five wide blocks without residual paths, on kernels that slow networks generate (arXiv 2401.17948).

Every block (``lissom.layers.slow_fast.SFNEBlock``) joins about ten branches, global and local, at full resolution, and
narrows them; maps of earlier blocks are further branches. There is no downsampling: the first block sees pixels, the
classifier the mean of the last map. Names are the publisher's own.

The published network answers by the whole batch: its local kernels are averages over it, and its statistics are the
batch's own, also at test time. Here each image has its own kernels, and statistics run. A checkpoint in the published
names turns the network into the published one (``use_published_``), for it was trained as that. Square images of one
size, ``img_size``; weights of another size load with their maps resized.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.layers import SelectAdaptivePool2d
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lissom.layers.slow_fast import SFNEBlock, SlowWidths, Switches, tiled, use_published_

__all__ = ["Terminator", "checkpoint_filter_fn", "terminator_16", "terminator_cifar", "terminator_cifar100"]

MAPS = ("bias_p", "fast_bias_p")  # as large as the image; bias_pk is as large as a local kernel


class Terminator(nn.Module):
    """Images (B, in_chans, img_size, img_size) to logits (B, num_classes).

    ``widths`` are those of the blocks' outputs, each a multiple of ``groups``; ``global_layers`` the layers of their
    global slow networks; ``local_kernels`` the sizes of the four local ones; ``slow_widths`` their widths
    (``SlowWidths``). Block i has the output of block i - 2 for a further branch, from the fifth on that of i - 3 too.
    ``block_drop_rate`` drops whole channels of the third block and later ones (0.05 in the published recipe),
    ``drop_rate`` features before the classifier. ``global_pool`` "" leaves the maps.

    ``kernels``, ``statistics``, ``trainable_extras``, ``rescale`` and ``omega`` are those of ``Switches``. Where extras
    train, every block has one more parameter: a scalar added to its output, which as published is a constant 0.

    Raises ValueError for images that are not square, and sizes that do not fit together.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 10,
        global_pool: str = "avg",
        img_size: int | tuple[int, int] = 32,
        widths: Sequence[int] = (12, 36, 72, 144, 288),
        global_layers: Sequence[int] = (3, 2, 2, 2, 2),
        local_kernels: Sequence[int] = (3, 9, 5, 7),
        slow_widths: SlowWidths | None = None,
        groups: int = 12,
        drop_rate: float = 0.0,
        block_drop_rate: float = 0.0,
        kernels: str = "image",
        statistics: str = "running",
        trainable_extras: bool = True,
        rescale: str = "constructor",
        omega: float = 1.0,
    ) -> None:
        super().__init__()
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        if height != width:
            raise ValueError(f"images of {height} x {width} are not square, and they are multiplied as matrices")
        if len(global_layers) != len(widths):
            raise ValueError(f"{len(widths)} blocks have {len(global_layers)} numbers of layers; one each is wanted")
        self.img_size, self.num_classes, self.in_chans, self.drop_rate = height, num_classes, in_chans, drop_rate
        self.grad_checkpointing = False
        switches = Switches(kernels, statistics, trainable_extras, rescale, omega)
        blocks: list[nn.Module] = []
        self.feature_info: list[dict[str, Any]] = []
        channels = in_chans
        for number, (out, layers) in enumerate(zip(widths, global_layers, strict=True)):
            blocks.append(
                SFNEBlock(
                    channels, out, height, len(self.earlier(number)), groups, block_drop_rate if number > 1 else 0.0,
                    switches, global_layers=layers, local_kernels=local_kernels, widths=slow_widths or SlowWidths(),
                )
            )  # fmt: skip
            self.feature_info.append({"num_chs": out, "reduction": 1, "module": f"blocks.{number}"})
            channels = out
        self.blocks = nn.ModuleList(blocks)
        self.block_biases: nn.Parameter | None
        self.register_parameter("block_biases", nn.Parameter(torch.zeros(len(blocks))) if trainable_extras else None)
        self.num_features = self.head_hidden_size = channels
        self._pool(global_pool)
        self.out_layer: nn.Module = nn.Linear(channels, num_classes) if num_classes > 0 else nn.Identity()

    @staticmethod
    def earlier(number: int) -> tuple[int, ...]:
        """The blocks, besides the one before, whose outputs block ``number`` reads."""
        return tuple(source for source, first in ((number - 2, 2), (number - 3, 4)) if number >= first)

    def _pool(self, kind: str) -> None:
        self.global_pool = SelectAdaptivePool2d(pool_type=kind, flatten=bool(kind)).train(self.training)

    def use_published_(self) -> None:
        """Kernels and statistics of the batch, and constants that do not train, in place."""
        use_published_(self)
        self.block_biases = None

    def slow_loss(self) -> torch.Tensor:
        """The slow neural loss: a scalar that draws the global kernels of all blocks together.

        The sum over pairs of blocks i > j of mean((K_i - K_j tiled to the channels of K_i)^2). It is 0 where every
        kernel is the tiled one of the block before. Computed anew from the slow networks; nothing is kept.
        """
        kernels = [block.fast_multi_branch.slow_net_g() for block in self.blocks]
        terms = [
            (tiled(shallow, deep.shape[1]) - deep).square().mean()
            for number, deep in enumerate(kernels)
            for shallow in kernels[:number]
        ]
        return torch.stack(terms).sum() if terms else kernels[0].new_zeros(())

    def set_input_size(self, img_size: int) -> None:
        """Take images of another size: learned maps are resized bicubically, kernels sampled on a finer or coarser
        grid of the same coordinates."""
        for key, value in list(self.named_parameters()):
            parent, _, name = key.rpartition(".")
            if name in MAPS and value.ndim == 4:  # others are as long as the channels
                owner = self.get_submodule(parent)
                setattr(owner, name, nn.Parameter(resized_map(value.detach(), img_size), value.requires_grad))
                if hasattr(owner, "positions"):
                    owner.positions = resized_positions(owner.positions, img_size)
                    owner.size = img_size
        self.img_size = img_size

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """How timm groups layers for a rate of learning by depth: there is no stem."""
        return {"stem": r"^$", "blocks": r"^blocks\.(\d+)"}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether the blocks' insides are computed anew for the backward pass, instead of kept."""
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """The last layer."""
        return self.out_layer

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new, untrained classifier of ``num_classes`` outputs; none for 0."""
        self.num_classes = num_classes
        if global_pool is not None:
            self._pool(global_pool)
        head = nn.Linear(self.num_features, num_classes) if num_classes > 0 else nn.Identity()
        self.out_layer = head.to(next(self.parameters())).train(self.training)

    def _maps(self, x: torch.Tensor, blocks: int) -> list[torch.Tensor]:
        """The outputs of the first ``blocks`` blocks."""
        found: list[torch.Tensor] = []
        for number, block in enumerate(list(self.blocks)[:blocks]):
            arguments = (x, *(found[source] for source in self.earlier(number)))
            if self.grad_checkpointing and self.training and not torch.jit.is_scripting():
                x = checkpoint(block, *arguments, use_reentrant=False)
            else:
                x = block(*arguments)
            if self.block_biases is not None:
                x = x + self.block_biases[number]
            found.append(x)
        return found

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """timm's: the last map and those of the blocks ``indices``, or these alone."""
        if output_fmt != "NCHW":
            raise ValueError(f"maps come as NCHW, not {output_fmt}")
        taken, last = feature_take_indices(len(self.blocks), indices)
        maps = self._maps(x, last + 1 if stop_early else len(self.blocks))
        found = [maps[number] for number in taken]
        return found if intermediates_only else (maps[-1], found)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Leave out the blocks behind the last of ``indices``, and the classifier; returns the indices as numbers."""
        taken, last = feature_take_indices(len(self.blocks), indices)
        self.blocks = self.blocks[: last + 1]
        if prune_head:
            self.reset_classifier(0, "")
        return taken

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Images to the last map (B, C, img_size, img_size)."""
        return self._maps(x, len(self.blocks))[-1]

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Maps to logits (B, num_classes), or where ``pre_logits`` to their mean (B, C)."""
        x = F.dropout(self.global_pool(x), self.drop_rate, self.training)
        return x if pre_logits else self.out_layer(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))


def resized_map(value: torch.Tensor, size: int) -> torch.Tensor:
    """A learned map (1, 1, s, s) for images of another size, bicubically."""
    if value.shape[-1] == size:
        return value
    return F.interpolate(value, size=(size, size), mode="bicubic", align_corners=True)


def resized_positions(positions: torch.Tensor, size: int) -> torch.Tensor:
    """Coordinates (1, 2, size, size) from -1 to 1, rows first, like those given."""
    axis = torch.linspace(-1, 1, size, dtype=positions.dtype, device=positions.device)
    return torch.stack(torch.meshgrid(axis, axis, indexing="ij")).unsqueeze(0)


def checkpoint_filter_fn(state_dict: Mapping[str, torch.Tensor], model: Terminator) -> dict[str, torch.Tensor]:
    """A published checkpoint for this model; ``model`` becomes the published one where the checkpoint is of that.

    That is where it holds neither running statistics nor scalars between blocks, which only ours have. Flags of the
    training length are left out, and learned maps resized to the model's images.
    """
    state = {key: value for key, value in state_dict.items() if not key.endswith("train_length")}
    if not any(key == "block_biases" or key.endswith("running_mean") for key in state):
        model.use_published_()
    for key, value in state.items():
        if key.rpartition(".")[2] in MAPS and value.ndim == 4:
            state[key] = resized_map(value, model.img_size)
    return state


def _cfg(num_classes: int, size: int) -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": num_classes,
        "input_size": (3, size, size),
        "fixed_input_size": True,
        "pool_size": (size, size),
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "mean": (0.4914, 0.4822, 0.4465),
        "std": (0.247, 0.2435, 0.2616),
        "first_conv": "blocks.0.fast_multi_branch.slow_net_l1.Kernel.fast_reduce",
        "classifier": "out_layer",
    }


default_cfgs = generate_default_cfgs(
    {
        "terminator_16": _cfg(7, 16),
        "terminator_cifar": _cfg(10, 32),
        "terminator_cifar100": _cfg(100, 32),
    }
)


@register_model
def terminator_cifar(pretrained: bool = False, **kwargs: Any) -> Terminator:
    """The network of CIFAR-10, 1 336 855 parameters as published and 85 more where extras train. Input (B, 3, 32, 32),
    output (B, 10)."""
    return _built("terminator_cifar", pretrained, kwargs)


@register_model
def terminator_cifar100(pretrained: bool = False, **kwargs: Any) -> Terminator:
    """The network of CIFAR-100, 1 362 865 parameters as published. Input (B, 3, 32, 32), output (B, 100)."""
    return _built("terminator_cifar100", pretrained, kwargs)


@register_model
def terminator_16(pretrained: bool = False, **kwargs: Any) -> Terminator:
    """For images of 16 x 16 and seven classes, with smaller local kernels. Input (B, 3, 16, 16), output (B, 7)."""
    sizes = {"img_size": 16, "global_layers": (2, 2, 2, 2, 2), "local_kernels": (3, 7, 5, 5)}
    return _built("terminator_16", pretrained, {**sizes, **kwargs})


def _built(name: str, pretrained: bool, kwargs: dict[str, Any]) -> Terminator:
    return build_model_with_cfg(  # type: ignore[no-any-return]
        Terminator,
        name,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": (0, 1, 2, 3, 4), "feature_cls": "getter"},
        **kwargs,
    )
