"""Once-for-All networks: super-networks whose sub-networks work without further training (arXiv 1908.09791).

One set of weights serves 2e19 networks: kernels of 3, 5 and 7, three widths of every block, two to four blocks a stage.
DepS (arXiv 2407.06167) trains the same networks on another schedule (``lissom.training.methods.delayed_shrinking``).
MobileNetV3 (widths 1.0 and 1.2), ProxylessNAS (1.3) and ResNet-50 are as the published code has them. Checkpoints of
super-networks load with ``from_published``, those of single sub-networks with ``subnet_from_published``.

A setting names every choice: ``blocks.5.kernel``, ``blocks.5.expand``, ``stages.1.depth``, for ResNet-50 also
``stem.depth``, ``stem.mid``, ``stem.out`` and ``stages.1.width``. ``network.setting(kernel=3, expand=3, depth=2)``
makes one of the published numbers. Of entries for blocks that the depth leaves out nothing is used.

Before a sub-network is judged its BatchNorms need statistics of its own: ``lissom.training.recalibration``.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, cast

import torch
from timm.layers import SelectAdaptivePool2d
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import nn

from lissom.errors import LissomError
from lissom.layers.elastic import (
    Dimension,
    ElasticBatchNorm2d,
    ElasticConv2d,
    ElasticDepthwiseConv2d,
    ElasticLinear,
    ElasticSqueezeExcite,
    Setting,
    SqueezeExcite,
    check_setting,
    make_divisible,
)

__all__ = [
    "Bottleneck",
    "ConvNormAct",
    "ElasticOFANet",
    "MBConv",
    "OFAMobileNetV3",
    "OFANet",
    "OFAProxyless",
    "OFAResNet50",
    "checkpoint_filter_fn",
    "subnet_from_published",
]

ACTIVATIONS = {"relu": nn.ReLU, "relu6": nn.ReLU6, "h_swish": nn.Hardswish, "none": nn.Identity}


# Blocks, plain ones; elastic ones are the same classes made of elastic layers


class ConvNormAct(nn.Module):
    """A convolution, its BatchNorm (or none) and an activation."""

    def __init__(self, conv: nn.Module, bn: nn.Module, act: str = "none") -> None:
        super().__init__()
        self.conv, self.bn, self.act = conv, bn, ACTIVATIONS[act]()

    @property
    def active_out(self) -> int:
        """How many channels come out."""
        return cast(int, getattr(self.conv, "active_out", None) or self.conv.out_channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.bn(self.conv(x)))  # type: ignore[no-any-return]

    def static(self, inputs: int) -> ConvNormAct:
        """The same of plain layers, for ``inputs`` channels."""
        conv = _static(self.conv, inputs)
        made = ConvNormAct(conv, _static(self.bn, conv.out_channels))
        made.act = type(self.act)()
        return made.train(self.training)


def _static(layer: nn.Module, inputs: int) -> Any:
    """The plain form of an elastic layer, a copy of any other."""
    return cast(Any, layer).static(inputs) if hasattr(layer, "static") else copy.deepcopy(layer)


class MBConv(nn.Module):
    """1 x 1 convolution, depthwise convolution, squeeze and excitation behind its activation, 1 x 1 convolution back.

    (B, in, H, W) -> (B, out, H', W'); ``skip`` adds the input. ``expand`` and ``se`` may be missing.
    """

    expand: ConvNormAct | None
    se: SqueezeExcite | None

    def __init__(
        self, expand: ConvNormAct | None, depthwise: ConvNormAct, se: SqueezeExcite | None, project: ConvNormAct,
        skip: bool,
    ) -> None:  # fmt: skip
        super().__init__()
        self.expand, self.depthwise, self.se, self.project, self.skip = expand, depthwise, se, project, skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x if self.expand is None else self.expand(x)
        y = self.depthwise(y)
        y = y if self.se is None else self.se(y)
        y = self.project(y)
        return x + y if self.skip else y

    def static(self, inputs: int) -> MBConv:
        """The block as it is set, of plain layers, for ``inputs`` channels."""
        hidden = inputs if self.expand is None else self.expand.active_out
        se = None if self.se is None else _static(self.se, hidden)
        expand = None if self.expand is None else self.expand.static(inputs)
        made = MBConv(expand, self.depthwise.static(hidden), se, self.project.static(hidden), self.skip)
        return made.train(self.training)


class Bottleneck(nn.Module):
    """ResNet's block: 1 x 1, 3 x 3 with the stride, 1 x 1, and a shortcut; ReLU behind the sum.

    Where the shape changes, the shortcut is the mean over 2 x 2 pixels (with stride 2; odd sides rounded up) and a
    1 x 1 convolution with BatchNorm.
    """

    downsample: ConvNormAct | None

    def __init__(
        self, conv1: ConvNormAct, conv2: ConvNormAct, conv3: ConvNormAct, downsample: ConvNormAct | None, stride: int
    ) -> None:
        super().__init__()
        self.conv1, self.conv2, self.conv3, self.downsample = conv1, conv2, conv3, downsample
        self.pool = nn.AvgPool2d(stride, stride, 0, ceil_mode=True) if stride > 1 else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = x if self.downsample is None else self.downsample(self.pool(x))
        return torch.relu(self.conv3(self.conv2(self.conv1(x))) + shortcut)

    def static(self, inputs: int) -> Bottleneck:
        """The block as it is set, of plain layers, for ``inputs`` channels."""
        conv1 = self.conv1.static(inputs)
        conv2 = self.conv2.static(conv1.active_out)
        downsample = None if self.downsample is None else self.downsample.static(inputs)
        stride = cast(int, getattr(self.pool, "stride", 1))
        made = Bottleneck(conv1, conv2, self.conv3.static(conv2.active_out), downsample, stride)
        return made.train(self.training)


class Residual(nn.Module):
    """x + inner(x)."""

    def __init__(self, inner: ConvNormAct) -> None:
        super().__init__()
        self.conv, self.bn, self.act = inner.conv, inner.bn, inner.act  # so that names stay short

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.act(self.bn(self.conv(x)))  # type: ignore[no-any-return]

    def static(self, inputs: int) -> Residual:
        inner = ConvNormAct(self.conv, self.bn)
        inner.act = self.act
        return Residual(inner.static(inputs)).train(self.training)


# Networks


class OFANet(nn.Module):
    """A sub-network of plain layers: images (B, in_chans, H, W) to logits (B, num_classes).

    ``stages`` holds the numbers of the blocks of each stage, in order; a fixed block before the first stands in none.
    """

    def __init__(
        self, stem: nn.Module, blocks: Sequence[nn.Module], stages: Sequence[Sequence[int]], neck: nn.Module,
        mix: nn.Module, classifier: nn.Module, num_features: int, drop_rate: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.stem, self.blocks, self.neck, self.mix, self.classifier = (
            stem, nn.ModuleList(blocks), neck, mix, classifier,
        )  # fmt: skip
        self.stages = tuple(tuple(stage) for stage in stages)
        self.num_features = self.head_hidden_size = num_features
        self.num_classes = getattr(classifier, "out_features", 0)
        self.in_chans = next(m.in_channels for m in stem.modules() if isinstance(m, nn.Conv2d))
        self.global_pool = SelectAdaptivePool2d(pool_type="avg")
        self.drop = nn.Dropout(drop_rate)

    def running(self) -> Iterator[tuple[int, nn.Module]]:
        """The blocks that run, with the number of their stage (-1: before the first)."""
        stage_of = {block: number for number, stage in enumerate(self.stages) for block in stage}
        for block, module in enumerate(self.blocks):
            yield stage_of.get(block, -1), module

    def get_classifier(self) -> nn.Module:
        return self.classifier

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new, untrained classifier; none for 0 classes."""
        if global_pool is not None:
            self.global_pool = SelectAdaptivePool2d(pool_type=global_pool)
        self.num_classes = num_classes
        kind = ElasticLinear if isinstance(self, ElasticOFANet) else nn.Linear
        weight = next(self.parameters())
        self.classifier = kind(self.num_features, num_classes).to(weight) if num_classes else nn.Identity()

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's groups of layers, for learning rates that decay with depth."""
        return {"stem": r"^stem", "blocks": [(r"^blocks\.(\d+)", None), (r"^neck|^mix", (99999,))]}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        if enable:
            raise LissomError("these networks have no gradient checkpointing; train with a smaller batch")

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """The map before the mean."""
        x = self.stem(x)
        for _, block in self.running():
            x = block(x)
        return self.neck(x)  # type: ignore[no-any-return]

    def forward_intermediates(
        self, x: torch.Tensor, indices: int | list[int] | None = None, norm: bool = False, stop_early: bool = False,
        output_fmt: str = "NCHW", intermediates_only: bool = False,
    ) -> Any:  # fmt: skip
        """The last map and those behind the stages that ``indices`` name (None: all), as timm's networks give them.

        Raises ValueError for another ``output_fmt`` than NCHW.
        """
        if output_fmt != "NCHW":
            raise ValueError("the maps come as NCHW only")
        taken, last = feature_take_indices(len(self.stages), indices)
        x = self.stem(x)
        maps: dict[int, torch.Tensor] = {}
        for stage, block in self.running():
            if stop_early and stage > last:
                break
            x = block(x)
            maps[stage] = x
        kept = [maps[stage] for stage in range(len(self.stages)) if stage in taken]
        return kept if intermediates_only else (self.neck(x), kept)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        x = self.drop(self.mix(self.global_pool(x)).flatten(1))
        return x if pre_logits else self.classifier(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))


class ElasticOFANet(OFANet):
    """A super-network. ``set_active`` chooses the sub-network that ``forward`` runs, ``extract`` copies it out."""

    active: dict[str, Any]

    def dimensions(self) -> tuple[Dimension, ...]:
        """Every choice, its values from the smallest to the largest."""
        raise NotImplementedError

    def set_active(self, setting: Setting) -> None:
        """Run this sub-network from now on; dimensions that are not named are at their largest.

        Raises LissomError for a name or a value that the network does not have.
        """
        self.active = check_setting(self, setting)
        self._follow()

    def _follow(self) -> None:
        """Tell the layers what is active."""
        raise NotImplementedError

    def _depth(self, stage: int) -> int:
        """How many blocks of a stage run."""
        raise NotImplementedError

    def uniform(self, **shares: float) -> dict[str, Any]:
        """The setting that keeps of every dimension of a kind (expand, depth, width, kernel) the named share of its
        largest value, or the nearest that it has; kinds that are not named stay whole."""
        setting = {}
        for d in self.dimensions():
            wanted = shares.get(d.kind, 1.0) * d.values[-1]
            setting[d.name] = min(d.values, key=lambda value: abs(value - wanted))
        return setting

    def _left_out(self) -> set[int]:
        """Numbers of the blocks that the active depths leave out."""
        return {block for number, stage in enumerate(self.stages) for block in stage[self._depth(number) :]}

    def dead(self, setting: Setting) -> frozenset[str]:
        """The dimensions that change nothing at this setting: those of blocks that its depths leave out.

        Raises LissomError as ``set_active``.
        """
        before, self.active = self.active, check_setting(self, setting)
        try:
            gone = self._left_out()
        finally:
            self.active = before
        return frozenset(d.name for d in self.dimensions() if any(d.name.startswith(f"blocks.{b}.") for b in gone))

    def running(self) -> Iterator[tuple[int, nn.Module]]:
        left_out = self._left_out()
        stage_of = {block: number for number, stage in enumerate(self.stages) for block in stage}
        for block, module in enumerate(self.blocks):
            if block not in left_out:
                yield stage_of.get(block, -1), module

    @torch.no_grad()
    def extract(self, setting: Setting | None = None) -> OFANet:
        """The sub-network of ``setting`` (None: the active one) as a plain network with weights of its own.

        It gives the same answers. BatchNorm statistics are those of the super-network's first channels; recalibrate
        them. Raises LissomError as ``set_active``.
        """
        before = self.active
        try:
            if setting is not None:
                self.set_active(setting)
            channels = self.in_chans
            stem, channels = self._static_stem(channels)
            blocks: list[nn.Module] = []
            stages: list[list[int]] = [[] for _ in self.stages]
            for stage, block in self.running():
                if stage >= 0:
                    stages[stage].append(len(blocks))
                made = cast(Any, block).static(channels)
                channels = (made.conv3 if isinstance(made, Bottleneck) else made.project).active_out
                blocks.append(made)
            neck, channels = self._static_part(self.neck, channels)
            mix, channels = self._static_part(self.mix, channels)
            classifier = _static(self.classifier, channels)
            net = OFANet(stem, blocks, stages, neck, mix, classifier, channels, self.drop.p)
            net.global_pool = SelectAdaptivePool2d(pool_type=self.global_pool.pool_type or "avg")
            for name in ("pretrained_cfg", "default_cfg"):
                if hasattr(self, name):
                    setattr(net, name, getattr(self, name))
            net.feature_info = [  # type: ignore[assignment]
                {**info, "num_chs": (last.conv3 if isinstance(last, Bottleneck) else last.project).active_out}
                for info, last in zip(self.feature_info, [blocks[stage[-1]] for stage in stages], strict=True)
            ]
            return net.train(self.training)
        finally:
            self.set_active(before)

    def _static_stem(self, channels: int) -> tuple[nn.Module, int]:
        return self._static_part(self.stem, channels)

    @staticmethod
    def _static_part(part: nn.Module, channels: int) -> tuple[nn.Module, int]:
        if isinstance(part, nn.Identity):
            return nn.Identity(), channels
        made = cast(ConvNormAct, part).static(channels)
        return made, made.active_out

    def sort_channels(self, opened: int = 0) -> None:
        """Permute the hidden channels of every block so that slices keep the most important; full-width answers stay.

        Once-for-All's order: the importance of a hidden channel is the sum of |weight| of what reads it, over outputs.
        With ``opened`` > 0 that many smaller widths are already trained: channels stay within the width they are in.
        """
        for block in self.blocks:
            cast(Any, block).sort_channels(opened)


# MobileNetV3 and ProxylessNAS


class ElasticMBConv(MBConv):
    """MBConv with elastic kernel and width: hidden width ``make_divisible(round(inputs * expand))``."""

    expand: ConvNormAct

    def __init__(
        self, inputs: int, outputs: int, kernels: Sequence[int], expands: Sequence[float], stride: int, act: str,
        use_se: bool,
    ) -> None:  # fmt: skip
        self.inputs, self.expands = inputs, tuple(sorted(expands))
        hidden = self.hidden(self.expands[-1])
        super().__init__(
            ConvNormAct(ElasticConv2d(inputs, hidden, 1, bias=False), ElasticBatchNorm2d(hidden), act),
            ConvNormAct(ElasticDepthwiseConv2d(hidden, kernels, stride), ElasticBatchNorm2d(hidden), act),
            ElasticSqueezeExcite(hidden) if use_se else None,
            ConvNormAct(ElasticConv2d(hidden, outputs, 1, bias=False), ElasticBatchNorm2d(outputs)),
            stride == 1 and inputs == outputs,
        )

    def hidden(self, expand: float) -> int:
        """The hidden width at an expansion."""
        return make_divisible(round(self.inputs * expand))

    def set_active(self, kernel: int, expand: float) -> None:
        cast(ElasticDepthwiseConv2d, self.depthwise.conv).active_kernel = kernel
        cast(ElasticConv2d, self.expand.conv).active_out = self.hidden(expand)

    @torch.no_grad()
    def sort_channels(self, opened: int = 0) -> None:
        """See ``ElasticOFANet.sort_channels``; hidden channels of the squeeze and excitation are sorted as well."""
        project = cast(nn.Conv2d, self.project.conv).weight
        widths = [self.hidden(expand) for expand in self.expands]
        order = sorted_channels(project.abs().sum((0, 2, 3)), widths, opened)
        project.copy_(project[:, order])
        _permute(self.depthwise.conv, order, 0)
        _permute(self.depthwise.bn, order, 0)
        _permute(self.expand.bn, order, 0)
        _permute(self.expand.conv, order, 0)
        if self.se is not None:
            _permute(self.se.expand, order, 0)
            _permute(self.se.reduce, order, 1)
            inner = sorted_channels(self.se.expand.weight.abs().sum((0, 2, 3)), [], 0)
            _permute(self.se.expand, inner, 1)
            _permute(self.se.reduce, inner, 0)


def sorted_channels(importance: torch.Tensor, widths: Sequence[int], opened: int) -> torch.Tensor:
    """The channels by falling importance; with ``opened`` > 0 in groups that keep their places: those within the
    narrowest of the ``opened`` largest of the smaller ``widths`` first, then what the next width adds, and so on."""
    values = importance.double()
    groups = torch.zeros(len(values))
    if opened:
        descending = sorted(widths, reverse=True)
        for width in descending[1 : opened + 1]:
            groups[width:] += 1
    order = torch.argsort(values, descending=True, stable=True)
    return order[torch.argsort(groups[order], stable=True)]


def _permute(layer: nn.Module, order: torch.Tensor, dim: int) -> None:
    """Reorder outputs (dim 0: all of a layer's vectors with them) or inputs (dim 1) in place."""
    names = ("weight", "bias", "running_mean", "running_var") if dim == 0 else ("weight",)
    for name in names:
        tensor = getattr(layer, name, None)
        if isinstance(tensor, torch.Tensor):
            tensor.copy_(tensor.index_select(dim, order))


class FixedMBConv(MBConv):
    """The block before the first stage: kernel 3, no expansion, of plain layers."""

    def __init__(self, inputs: int, outputs: int, act: str) -> None:
        depthwise = nn.Conv2d(inputs, inputs, 3, 1, 1, groups=inputs, bias=False)
        super().__init__(
            None,
            ConvNormAct(depthwise, nn.BatchNorm2d(inputs), act),
            None,
            ConvNormAct(nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs)),
            inputs == outputs,
        )

    def sort_channels(self, opened: int = 0) -> None:
        pass


class _ElasticMobile(ElasticOFANet):
    """What MobileNetV3 and ProxylessNAS share: stages of inverted bottlenecks, kernel, expansion and depth elastic."""

    def __init__(
        self, stem: ConvNormAct, first: FixedMBConv, widths: Sequence[int], strides: Sequence[int],
        acts: Sequence[str], use_se: Sequence[bool], lengths: Sequence[int], kernels: Sequence[int],
        expands: Sequence[float], depths: Sequence[int], inputs: int, **parts: Any,
    ) -> None:  # fmt: skip
        self_depths = tuple(sorted(depths))
        blocks: list[nn.Module] = [first]
        stages, reduction, info = [], 2, []
        for number, (width, stride, length) in enumerate(zip(widths, strides, lengths, strict=True)):
            stage = []
            for block in range(length):
                stage.append(len(blocks))
                arguments = (kernels, expands, stride if block == 0 else 1, acts[number], use_se[number])
                blocks.append(ElasticMBConv(inputs, width, *arguments))
                inputs = width
            stages.append(stage)
            reduction *= strides[number]
            info.append({"num_chs": width, "reduction": reduction, "module": f"blocks.{stage[-1]}"})
        super().__init__(stem, blocks, stages, **parts)
        self.depths, self.feature_info = self_depths, info
        self._dimensions = self._choices(tuple(sorted(kernels)), tuple(sorted(expands)))
        self.set_active({})

    def _choices(self, kernels: tuple[int, ...], expands: tuple[float, ...]) -> tuple[Dimension, ...]:
        found = []
        for number, stage in enumerate(self.stages):
            if len(stage) == self.depths[-1]:  # the last stage of ProxylessNAS has one block
                found.append(Dimension(f"stages.{number}.depth", "depth", self.depths))
            for block in stage:
                found.append(Dimension(f"blocks.{block}.kernel", "kernel", kernels))
                found.append(Dimension(f"blocks.{block}.expand", "expand", expands))
        return tuple(found)

    def dimensions(self) -> tuple[Dimension, ...]:
        return self._dimensions

    def _depth(self, stage: int) -> int:
        return int(self.active.get(f"stages.{stage}.depth", len(self.stages[stage])))

    def _follow(self) -> None:
        for stage in self.stages:
            for block in stage:
                cast(ElasticMBConv, self.blocks[block]).set_active(
                    self.active[f"blocks.{block}.kernel"], self.active[f"blocks.{block}.expand"]
                )

    def setting(self, kernel: Any = None, expand: Any = None, depth: Any = None) -> dict[str, Any]:
        """A setting from the published numbers: one for all, or one a block (kernel, expand) and a stage (depth).

        None: the largest. Raises LissomError for lists of another length and values that are none of the network's.
        """
        blocks = [block for stage in self.stages for block in stage]
        staged = [number for number in range(len(self.stages)) if len(self.stages[number]) == self.depths[-1]]
        return check_setting(
            self,
            {
                **_spread(kernel, [f"blocks.{block}.kernel" for block in blocks]),
                **_spread(expand, [f"blocks.{block}.expand" for block in blocks]),
                **_spread(depth, [f"stages.{number}.depth" for number in staged]),
            },
        )


def _spread(value: Any, names: Sequence[str]) -> dict[str, Any]:
    """One value for all names, or one each; {} for None."""
    if value is None:
        return {}
    if not isinstance(value, list | tuple):
        return dict.fromkeys(names, value)
    if len(value) != len(names):
        raise LissomError(f"{len(value)} values for {len(names)} places ({names[0]} to {names[-1]}); give one, or all")
    return dict(zip(names, value, strict=True))


class OFAMobileNetV3(_ElasticMobile):
    """The super-network of MobileNetV3's blocks; all widths times ``width``, rounded to multiples of 8.

    ``kernels``, ``expands`` and ``depths`` are the elastic values. Inputs of 128 to 224 pixels a side in steps of 4
    are what the published weights were trained on; others run.
    """

    def __init__(
        self, num_classes: int = 1000, in_chans: int = 3, width: float = 1.0, kernels: Sequence[int] = (3, 5, 7),
        expands: Sequence[float] = (3, 4, 6), depths: Sequence[int] = (2, 3, 4), drop_rate: float = 0.0,
        widths: Sequence[int] = (24, 40, 80, 112, 160), first: int = 16, neck: int = 960, features: int = 1280,
        stem_stride: int = 2,
    ) -> None:  # fmt: skip
        stem, features = make_divisible(first * width), make_divisible(features * width)
        stages, neck = [make_divisible(w * width) for w in widths], make_divisible(neck * width)
        count = len(stages)
        super().__init__(
            ConvNormAct(
                nn.Conv2d(in_chans, stem, 3, stem_stride, 1, bias=False), nn.BatchNorm2d(stem), "h_swish"
            ),
            FixedMBConv(stem, stem, "relu"),
            stages, (2, 2, 2, 1, 2)[:count], ("relu", "relu", "h_swish", "h_swish", "h_swish")[:count],
            (False, True, False, True, True)[:count], [max(depths)] * count, kernels, expands, depths, stem,
            neck=ConvNormAct(nn.Conv2d(stages[-1], neck, 1, bias=False), nn.BatchNorm2d(neck), "h_swish"),
            mix=ConvNormAct(nn.Conv2d(neck, features, 1, bias=False), nn.Identity(), "h_swish"),
            classifier=ElasticLinear(features, num_classes) if num_classes else nn.Identity(),
            num_features=features, drop_rate=drop_rate,
        )  # fmt: skip


class OFAProxyless(_ElasticMobile):
    """The super-network of ProxylessNAS's blocks: ReLU6, no squeeze and excitation, a sixth stage of one block."""

    def __init__(
        self, num_classes: int = 1000, in_chans: int = 3, width: float = 1.3, kernels: Sequence[int] = (3, 5, 7),
        expands: Sequence[float] = (3, 4, 6), depths: Sequence[int] = (2, 3, 4), drop_rate: float = 0.0,
        widths: Sequence[int] = (24, 40, 80, 96, 192, 320), stem: int = 32, first: int = 16, features: int = 1280,
    ) -> None:  # fmt: skip
        stem, first = make_divisible(stem * width), make_divisible(first * width)
        stages = [make_divisible(w * width) for w in widths]
        features = make_divisible(features * width) if width > 1 else features
        super().__init__(
            ConvNormAct(nn.Conv2d(in_chans, stem, 3, 2, 1, bias=False), nn.BatchNorm2d(stem), "relu6"),
            FixedMBConv(stem, first, "relu6"),
            stages, (2, 2, 2, 1, 2, 1), ("relu6",) * 6, (False,) * 6, [max(depths)] * 5 + [1],
            kernels, expands, depths, first,
            neck=ConvNormAct(nn.Conv2d(stages[-1], features, 1, bias=False), nn.BatchNorm2d(features), "relu6"),
            mix=nn.Identity(),
            classifier=ElasticLinear(features, num_classes) if num_classes else nn.Identity(),
            num_features=features, drop_rate=drop_rate,
        )  # fmt: skip


# ResNet-50


class ElasticBottleneck(Bottleneck):
    """ResNet's block with elastic hidden width, ``make_divisible(round(outputs * expand))``, and elastic outputs."""

    def __init__(self, inputs: int, outputs: int, expands: Sequence[float], stride: int, shortcut: bool) -> None:
        hidden = make_divisible(round(outputs * max(expands)))

        def layer(taken: int, given: int, kernel: int, step: int, act: str) -> ConvNormAct:
            conv = ElasticConv2d(taken, given, kernel, step, kernel // 2, bias=False)
            return ConvNormAct(conv, ElasticBatchNorm2d(given), act)

        super().__init__(
            layer(inputs, hidden, 1, 1, "relu"),
            layer(hidden, hidden, 3, stride, "relu"),
            layer(hidden, outputs, 1, 1, "none"),
            layer(inputs, outputs, 1, 1, "none") if shortcut else None,
            stride,
        )
        self.expands = tuple(sorted(expands))

    def set_active(self, outputs: int, expand: float) -> None:
        hidden = make_divisible(round(outputs * expand))
        for part, width in ((self.conv1, hidden), (self.conv2, hidden), (self.conv3, outputs)):
            cast(ElasticConv2d, part.conv).active_out = width
        if self.downsample is not None:
            cast(ElasticConv2d, self.downsample.conv).active_out = outputs

    @torch.no_grad()
    def sort_channels(self, opened: int = 0) -> None:
        """See ``ElasticOFANet.sort_channels``: both hidden layers, the second first."""
        conv1, conv2, conv3 = (cast(nn.Conv2d, part.conv) for part in (self.conv1, self.conv2, self.conv3))
        widths = [make_divisible(round(conv3.out_channels * expand)) for expand in self.expands]
        order = sorted_channels(conv3.weight.abs().sum((0, 2, 3)), widths, opened)
        _permute(conv3, order, 1)
        _permute(self.conv2.bn, order, 0)
        _permute(conv2, order, 0)
        order = sorted_channels(conv2.weight.abs().sum((0, 2, 3)), widths, opened)
        _permute(conv2, order, 1)
        _permute(self.conv1.bn, order, 0)
        _permute(conv1, order, 0)


class OFAResNet50(ElasticOFANet):
    """The super-network of ResNet-50's blocks: depth, hidden width, and the width of every stage.

    ``depths`` are blocks more than 2, 2, 4, 2; ``expands`` hidden over outer width; ``widths`` factors of 256, 512,
    1024, 2048 (and of the stem's 64), one a stage.
    """

    def __init__(
        self, num_classes: int = 1000, in_chans: int = 3, depths: Sequence[int] = (0, 1, 2),
        expands: Sequence[float] = (0.2, 0.25, 0.35), widths: Sequence[float] = (0.65, 0.8, 1.0),
        drop_rate: float = 0.0, base_depths: Sequence[int] = (2, 2, 4, 2), base_width: int = 64,
    ) -> None:  # fmt: skip
        factors = tuple(sorted(widths))
        outer = [make_divisible(base_width * factor) for factor in factors]
        mid = [make_divisible(width // 2) for width in outer]

        def layer(taken: int, given: int, stride: int) -> ConvNormAct:
            conv = ElasticConv2d(taken, given, 3, stride, 1, bias=False)
            return ConvNormAct(conv, ElasticBatchNorm2d(given), "relu")

        stem = nn.Sequential(
            layer(in_chans, mid[-1], 2), Residual(layer(mid[-1], mid[-1], 1)), layer(mid[-1], outer[-1], 1),
            nn.MaxPool2d(3, 2, 1),
        )  # fmt: skip
        blocks: list[nn.Module] = []
        stages, inputs, info, table = [], outer[-1], [], []
        for number, (base, stride) in enumerate(zip(base_depths, (1, 2, 2, 2), strict=True)):
            table.append([make_divisible(4 * base_width * 2**number * factor) for factor in factors])
            stage = []
            for block in range(base + max(depths)):
                stage.append(len(blocks))
                step = stride if block == 0 else 1
                blocks.append(ElasticBottleneck(inputs, table[-1][-1], expands, step, step != 1 or block == 0))
                inputs = table[-1][-1]
            stages.append(stage)
            info.append({"num_chs": inputs, "reduction": 4 * 2**number, "module": f"blocks.{stage[-1]}"})
        classifier = ElasticLinear(inputs, num_classes) if num_classes else nn.Identity()
        super().__init__(stem, blocks, stages, nn.Identity(), nn.Identity(), classifier, inputs, drop_rate)
        self.feature_info, self.base_depths = info, tuple(base_depths)
        self._mid, self._outer, self._table, self._factors = mid, outer, table, factors
        more = tuple(sorted(depths))
        found = [
            Dimension("stem.depth", "stem", (0, 1)),
            Dimension("stem.mid", "width", factors),
            Dimension("stem.out", "width", factors),
        ]
        for number, numbers in enumerate(self.stages):
            found.append(Dimension(f"stages.{number}.depth", "depth", more))
            found.append(Dimension(f"stages.{number}.width", "width", factors))
            found += [Dimension(f"blocks.{block}.expand", "expand", tuple(sorted(expands))) for block in numbers]
        self._dimensions = tuple(found)
        self.set_active({})

    def dimensions(self) -> tuple[Dimension, ...]:
        return self._dimensions

    def _depth(self, stage: int) -> int:
        return self.base_depths[stage] + int(self.active[f"stages.{stage}.depth"])

    def _stem(self) -> list[nn.Module]:
        layers = list(cast(nn.Sequential, self.stem))
        return layers if self.active["stem.depth"] else [layers[0], *layers[2:]]

    def _follow(self) -> None:
        first, second, third, _ = cast(nn.Sequential, self.stem)
        mid = self._mid[self._factors.index(self.active["stem.mid"])]
        for part, width in (
            (first, mid), (second, mid), (third, self._outer[self._factors.index(self.active["stem.out"])]),
        ):  # fmt: skip
            part.conv.active_out = width
        for number, stage in enumerate(self.stages):
            width = self._table[number][self._factors.index(self.active[f"stages.{number}.width"])]
            for block in stage:
                cast(ElasticBottleneck, self.blocks[block]).set_active(width, self.active[f"blocks.{block}.expand"])

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self._stem():
            x = layer(x)
        for _, block in self.running():
            x = block(x)
        return x

    def forward_intermediates(self, x: torch.Tensor, *arguments: Any, **more: Any) -> Any:
        whole = self.stem
        self.stem = nn.Sequential(*self._stem())
        try:
            return super().forward_intermediates(x, *arguments, **more)
        finally:
            self.stem = whole

    def _static_stem(self, channels: int) -> tuple[nn.Module, int]:
        made: list[nn.Module] = []
        for layer in self._stem():
            if isinstance(layer, nn.MaxPool2d):
                made.append(nn.MaxPool2d(3, 2, 1))
                continue
            made.append(cast(Any, layer).static(channels))
            channels = cast(Any, made[-1]).conv.out_channels
        return nn.Sequential(*made), channels

    def setting(self, depth: Any = None, expand: Any = None, width: Any = None) -> dict[str, Any]:
        """A setting from the published numbers: one for all, or ``depth`` of 5 (the stem's first), ``expand`` one a
        block, ``width`` of 6 indices (stem's two first).

        The stem's residual layer runs at the largest depth alone. None: the largest. Raises LissomError for lists of
        another length and values that are none of the network's.
        """
        stages, most = range(len(self.stages)), self._dimensions[3].values[-1]
        found = _spread(depth, ["stem.depth", *(f"stages.{number}.depth" for number in stages)])
        if "stem.depth" in found:
            found["stem.depth"] = int(found["stem.depth"] == most)
        indices = _spread(width, ["stem.mid", "stem.out", *(f"stages.{number}.width" for number in stages)])
        for name, index in indices.items():
            if index not in range(len(self._factors)):
                raise LissomError(f"{name} is the index {index!r}; it is 0 to {len(self._factors) - 1}")
            found[name] = self._factors[index]
        found |= _spread(expand, [f"blocks.{block}.expand" for block in range(len(self.blocks))])
        return check_setting(self, found)


# Published checkpoints


def checkpoint_filter_fn(state: Mapping[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """A checkpoint in the publisher's names, of a super-network or of one sub-network, in ours.

    Super-networks double names (``conv.conv``, ``bn.bn``, ``linear.linear``), sub-networks do not; older files say
    ``mobile_inverted_conv`` where newer ones say ``conv``.
    """
    state = state.get("state_dict", state)  # type: ignore[assignment]
    mixed = "mix" if isinstance(getattr(model, "mix", None), ConvNormAct) else "neck"
    renamed = {}
    for key, value in state.items():
        name = re.sub(r"^module\.", "", key)
        name = re.sub(r"^(blocks\.\d+)\.(?:mobile_inverted_conv|conv)\.", r"\1.", name)
        name = re.sub(r"^(input_stem\.1)\.conv\.(?=conv\.|bn\.)", r"\1.", name)
        for word in ("conv", "bn", "linear"):
            name = name.replace(f".{word}.{word}.", f".{word}.")
        name = re.sub(r"(\d+)to(\d+)_matrix", r"matrix_\2", name)
        for theirs, ours in (
            ("first_conv.", "stem."), ("input_stem.", "stem."), (".inverted_bottleneck.", ".expand."),
            (".depth_conv.se.fc.", ".se."), (".depth_conv.", ".depthwise."), (".point_linear.", ".project."),
            ("final_expand_layer.", "neck."), ("feature_mix_layer.", f"{mixed}."),
            ("classifier.linear.", "classifier."),
        ):  # fmt: skip
            name = name.replace(theirs, ours)
        renamed[name] = value
    return renamed


def subnet_from_published(network: ElasticOFANet, state: Mapping[str, torch.Tensor]) -> OFANet:
    """A published specialised sub-network of the space that ``network`` spans, with its weights, as a plain network.

    The setting is read from the shapes of the weights. Raises LissomError where they are those of no sub-network.
    """
    own = checkpoint_filter_fn(state, network)
    setting = setting_of(network, own)
    found = network.extract(setting)
    classes = len(own["classifier.weight"]) if "classifier.weight" in own else 0
    if classes != found.num_classes:
        found.reset_classifier(classes)
    wanted = found.state_dict()
    wrong = [
        key
        for key in {**wanted, **own}
        if (key not in own or key not in wanted or own[key].shape != wanted[key].shape)
        and not key.endswith("num_batches_tracked")
    ]
    if wrong:
        name = type(network).__name__
        raise LissomError(f"these weights are of no sub-network of {name}: {wrong[0]} does not fit")
    found.load_state_dict(own, strict=False)
    return found


def setting_of(network: ElasticOFANet, state: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """The setting of the sub-network whose weights, in our names and its own block numbers, ``state`` holds.

    Raises LissomError where a shape is that of no sub-network.
    """
    if isinstance(network, OFAResNet50):
        return _resnet_setting(network, state)
    assert isinstance(network, _ElasticMobile)
    count = 1 + max((int(m[1]) for key in state if (m := re.match(r"blocks\.(\d+)\.", key))), default=-1)
    outputs = [len(state[f"blocks.{block}.project.conv.weight"]) for block in range(count)]
    setting: dict[str, Any] = {}
    block = 1
    for number, stage in enumerate(network.stages):
        width = cast(ElasticMBConv, network.blocks[stage[0]]).project.active_out
        depth = 0
        while block < count and outputs[block] == width and depth < len(stage):
            kernel = state[f"blocks.{block}.depthwise.conv.weight"].shape[-1]
            elastic = cast(ElasticMBConv, network.blocks[stage[depth]])
            hidden = len(state[f"blocks.{block}.depthwise.conv.weight"])
            fits = [expand for expand in elastic.expands if elastic.hidden(expand) == hidden]
            if not fits:
                raise LissomError(f"block {block} has {hidden} hidden channels, which no expansion of the space gives")
            setting[f"blocks.{stage[depth]}.kernel"] = kernel
            setting[f"blocks.{stage[depth]}.expand"] = fits[0]
            block, depth = block + 1, depth + 1
        if len(stage) > 1:
            setting[f"stages.{number}.depth"] = depth
    if block != count:
        raise LissomError(f"block {block} has {outputs[block]} outputs, which is no width of the space there")
    return check_setting(network, setting)


def _resnet_setting(network: OFAResNet50, state: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    def index(table: Sequence[int], width: int, what: str) -> float:
        if width not in table:
            raise LissomError(f"{what} has {width} channels, which is no width of the space")
        return network._factors[list(table).index(width)]

    stem = len([key for key in state if re.fullmatch(r"stem\.\d+\.conv\.weight", key)])
    setting: dict[str, Any] = {"stem.depth": int(stem == 3)}
    setting["stem.mid"] = index(network._mid, len(state["stem.0.conv.weight"]), "the stem")
    setting["stem.out"] = index(network._outer, len(state[f"stem.{stem - 1}.conv.weight"]), "the stem")
    count = 1 + max(int(m[1]) for key in state if (m := re.match(r"blocks\.(\d+)\.", key)))
    starts = [block for block in range(count) if f"blocks.{block}.downsample.conv.weight" in state] + [count]
    if len(starts) != len(network.stages) + 1:
        raise LissomError(f"the weights have {len(starts) - 1} stages, the network {len(network.stages)}")
    for number, (first, last) in enumerate(pairwise(starts)):
        width = len(state[f"blocks.{first}.conv3.conv.weight"])
        setting[f"stages.{number}.width"] = index(network._table[number], width, f"stage {number}")
        setting[f"stages.{number}.depth"] = last - first - network.base_depths[number]
        for offset in range(last - first):
            block = network.stages[number][offset]
            elastic = cast(ElasticBottleneck, network.blocks[block])
            hidden = len(state[f"blocks.{first + offset}.conv1.conv.weight"])
            fits = [expand for expand in elastic.expands if make_divisible(round(width * expand)) == hidden]
            if not fits:
                raise LissomError(f"block {first + offset} has {hidden} hidden channels, which no expansion gives")
            setting[f"blocks.{block}.expand"] = fits[0]
    return check_setting(network, setting)


# Registration


def _cfg(**fields: Any) -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bilinear",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": "stem.conv",
        "classifier": "classifier",
        "license": "mit",
        **fields,
    }


default_cfgs = generate_default_cfgs(
    {
        "ofa_mobilenetv3_100": _cfg(),
        "ofa_mobilenetv3_120": _cfg(),
        "ofa_proxyless_130": _cfg(),
        "ofa_resnet50": _cfg(first_conv="stem.0.conv"),
    }
)


@register_model
def ofa_mobilenetv3_100(pretrained: bool = False, **kwargs: Any) -> OFAMobileNetV3:
    """Width 1.0: 7 678 880 parameters, sub-networks of 3.4 to 7.7 million, 121 to 566 million multiply-adds at 224."""
    return _built(OFAMobileNetV3, "ofa_mobilenetv3_100", pretrained, kwargs)


@register_model
def ofa_mobilenetv3_120(pretrained: bool = False, **kwargs: Any) -> OFAMobileNetV3:
    """Width 1.2: 10 715 752 parameters, sub-networks of 4.6 to 10.7 million, 193 to 843 million multiply-adds."""
    return _built(OFAMobileNetV3, "ofa_mobilenetv3_120", pretrained, {"width": 1.2, **kwargs})


@register_model
def ofa_proxyless_130(pretrained: bool = False, **kwargs: Any) -> OFAProxyless:
    """Width 1.3: 7 956 882 parameters, sub-networks of 3.7 to 7.9 million, 266 to 1005 million multiply-adds at 224."""
    return _built(OFAProxyless, "ofa_proxyless_130", pretrained, kwargs)


@register_model
def ofa_resnet50(pretrained: bool = False, **kwargs: Any) -> OFAResNet50:
    """48 105 992 parameters, sub-networks of 6.5 to 48 million, 962 to 7492 million multiply-adds at 224."""
    return _built(OFAResNet50, "ofa_resnet50", pretrained, kwargs)


def _built(kind: type[nn.Module], name: str, pretrained: bool, arguments: dict[str, Any]) -> Any:
    count = 4 if kind is OFAResNet50 else 6 if kind is OFAProxyless else 5
    return build_model_with_cfg(
        kind, name, pretrained, pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"feature_cls": "getter", "out_indices": tuple(range(count))}, **arguments,
    )  # fmt: skip
