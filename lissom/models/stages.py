"""Convolutional networks in stages: depths, widths and groups read from timm's, and the same networks built of others.

The families are EfficientNet (and what timm builds from the same blocks), RegNet and ResNet with its relatives of
bottlenecks. ``read_stages`` tells the numbers of a network, ``with_stages`` builds a network that is like another but
for these numbers. Nothing is guessed: a network is built anew from its own numbers first, and one that does not come
out the same, module by module, is refused.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from timm.models import efficientnet as timms_efficientnet
from timm.models import regnet as timms_regnet
from timm.models import resnet as timms_resnet
from torch import nn

from lissom.errors import LissomError, NotApplicable
from lissom.models import efficientnet, regnet
from lissom.models.factory import create_model

__all__ = ["FAMILIES", "Stages", "in_channels", "read_stages", "with_stages"]

FAMILIES = ("efficientnet", "regnet", "resnet")


@dataclass(frozen=True)
class Stages:
    """What decides the size of a convolutional network, stage by stage, and the sizes of its images.

    ``depths``: blocks a stage. ``widths``: channels that leave a stage. ``bottlenecks``: channels inside a block over
    ``widths`` (RegNet, ResNet); the expansions of an EfficientNet are no numbers here, they stay. ``group_widths``:
    channels of one group of a block's middle convolution, 0 where it has one group of all; empty for an EfficientNet,
    whose middle convolutions are depthwise. ``stem`` and ``head``: channels before the first stage, and of the
    convolution behind the last (0: there is none). ``train_size`` and ``test_size``: the side of an image, and the
    shorter side to which a picture is resized before its centre is cut out at ``train_size``.

    Raises LissomError for numbers that are not positive, or lists of different lengths.
    """

    family: str
    depths: tuple[int, ...]
    widths: tuple[int, ...]
    bottlenecks: tuple[float, ...] = ()
    group_widths: tuple[int, ...] = ()
    stem: int = 32
    head: int = 0
    train_size: int = 224
    test_size: int = 256

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise LissomError(f"the family is {self.family!r}; known: {', '.join(FAMILIES)}")
        grouped = self.family != "efficientnet"
        for name, wanted, least in (
            ("depths", True, 1),
            ("widths", True, 1),
            ("bottlenecks", grouped, 0.0),
            ("group_widths", grouped, 0),
        ):
            values = getattr(self, name)
            if not isinstance(values, tuple) or len(values) != (len(self.depths) if wanted else 0) or not self.depths:
                count = "one number a stage" if wanted else f"nothing for {self.family}"
                raise LissomError(f"{name} is {values!r}; it is a tuple of {count}")
            if any(not value >= least or (name == "bottlenecks" and value == 0) for value in values):
                raise LissomError(f"{name} is {values!r}; its numbers are positive")
        for name, least in (("stem", 1), ("head", 0), ("train_size", 1), ("test_size", 1)):
            if getattr(self, name) < least:
                raise LissomError(f"{name} is {getattr(self, name)}; it is at least {least}")

    def __str__(self) -> str:
        parts = [f"depths {_listed(self.depths)}", f"widths {_listed(self.widths)}"]
        if any(self.group_widths):
            parts.append(f"group widths {_listed(self.group_widths)}")
        parts.append(f"stem {self.stem}")
        if self.head:
            parts.append(f"head {self.head}")
        return f"{', '.join(parts)}, images of {self.train_size}"


def _listed(numbers: Sequence[float]) -> str:
    return " ".join(map(str, numbers))


def read_stages(model: nn.Module) -> Stages:
    """The numbers of one of timm's EfficientNets, RegNets or ResNets, or of one that ``with_stages`` built.

    Raises NotApplicable for a network of another kind.
    """
    train, test = _image_sizes(model)
    if isinstance(model, timms_efficientnet.EfficientNet):
        depths, widths, stem, head = efficientnet.read_numbers(model)
        return Stages("efficientnet", depths, widths, stem=stem, head=head, train_size=train, test_size=test)
    if isinstance(model, timms_regnet.RegNet):
        depths, widths, bottlenecks, groups = regnet.read_numbers(model)
        stem = regnet.stem_width(model)
        return Stages("regnet", depths, widths, bottlenecks, groups, stem, train_size=train, test_size=test)
    if isinstance(model, timms_resnet.ResNet):
        return _read_resnet(model, train, test)
    raise NotApplicable(
        f"{type(model).__name__} is none of the networks whose stages are known; timm's EfficientNets, RegNets and "
        "ResNets are"
    )


def with_stages(model: nn.Module, stages: Stages, *, check: bool = True, **kwargs: Any) -> nn.Module:
    """A network like ``model`` with other numbers, and with new random weights, on the default device.

    ``model`` is one that timm's registry built, or this function; ``kwargs`` are the network's own (``num_classes``,
    ``in_chans``, ...), by default as ``model`` has them. ``default_cfg`` says the image sizes of ``stages``. ``check``
    False is for a ``model`` that was looked at before. Raises NotApplicable for a network whose numbers are not all
    that makes it, LissomError for arguments it does not take.
    """
    own = read_stages(model)
    if own.family != stages.family:
        raise LissomError(f"the numbers are of a {stages.family}, and {type(model).__name__} is a {own.family}")
    if len(own.depths) != len(stages.depths):
        raise LissomError(f"{len(stages.depths)} stages are given, and {type(model).__name__} has {len(own.depths)}")
    arguments = {"num_classes": model.num_classes, "in_chans": in_channels(model)}
    if check:
        _check(model, own, arguments)
    built = _built(model, stages, {**arguments, **kwargs})
    crop = stages.train_size / stages.test_size
    while math.floor(stages.train_size / crop) < stages.test_size:  # the nearest share may be a hair too large
        crop = math.nextafter(crop, 0)
    sizes = {
        "input_size": (in_channels(built), stages.train_size, stages.train_size),
        "test_input_size": None, "crop_pct": crop, "test_crop_pct": None, "pool_size": None,
        "url": "", "file": None, "hf_hub_id": None, "num_classes": built.num_classes,
    }  # fmt: skip
    built.pretrained_cfg = built.default_cfg = {**dict(model.default_cfg), **sizes}  # type: ignore[arg-type]
    return built


def _check(model: nn.Module, own: Stages, arguments: dict[str, Any]) -> None:
    """Raise NotApplicable where the model does not come out the same when it is built from its own numbers."""
    try:
        with torch.device("meta"):
            again = _built(model, own, arguments)
    except LissomError as error:
        raise NotApplicable(f"{_architecture(model)} cannot be built from its stages' numbers: {error}") from error
    if _shapes(again) != _shapes(model) or _structure(again) != _structure(model):
        raise NotApplicable(
            f"{_architecture(model)} does not come out the same when it is built from its stages' numbers; "
            "it has parts that they do not tell"
        )


def _built(model: nn.Module, stages: Stages, arguments: dict[str, Any]) -> nn.Module:
    name = _architecture(model)
    try:
        if isinstance(model, timms_efficientnet.EfficientNet):
            return efficientnet.of_numbers(
                model, name, stages.depths, stages.widths, stages.stem, stages.head, **arguments
            )
        if isinstance(model, timms_regnet.RegNet):
            return regnet.of_numbers(
                model, name, stages.depths, stages.widths, stages.bottlenecks, stages.group_widths, stages.stem,
                **arguments,
            )  # fmt: skip
    except (AttributeError, TypeError, AssertionError, ValueError) as error:
        raise LissomError(f"a {name} of {stages} cannot be built ({error})") from error
    return _built_resnet(model, name, stages, arguments)


def in_channels(model: nn.Module) -> int:
    """What the network's first convolution takes."""
    return next(module.in_channels for module in model.modules() if isinstance(module, nn.Conv2d))


def _architecture(model: nn.Module) -> str:
    """The name under which timm's registry built the model."""
    name = dict(getattr(model, "default_cfg", None) or {}).get("architecture")
    if not name:
        raise NotApplicable(
            f"this {type(model).__name__} does not say which of timm's networks it is; build it with create_model"
        )
    return name


def _image_sizes(model: nn.Module) -> tuple[int, int]:
    """(train_size, test_size) as ``default_cfg`` says them; 224 and 256 where it says nothing."""
    config = dict(getattr(model, "default_cfg", None) or {})
    size = config.get("input_size") or (3, 224, 224)
    return int(size[-1]), math.floor(size[-1] / (config.get("crop_pct") or 0.875))


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in model.state_dict().items()}


def _structure(model: nn.Module) -> list[str]:
    """Every module without children in words, drop paths and dropout left out: they depend on how it is trained."""
    return [
        f"{path} {module}"
        for path, module in model.named_modules()
        if not any(True for _ in module.children()) and "drop" not in path.lower()
    ]


# ResNets: timm builds them of depths and channels given by name, and of a block a stage


@dataclass(frozen=True)
class _BlocksOf:
    """Builds the blocks of one stage: ``block`` with ``groups`` groups of ``width`` channels inside."""

    block: type[timms_resnet.Bottleneck]
    groups: int
    width: int

    @property
    def expansion(self) -> int:
        return self.block.expansion

    def __call__(self, inplanes: int, planes: int, *arguments: Any, **more: Any) -> nn.Module:
        # The block's own rule is floor(planes * base_width / 64) channels a group; half a channel more keeps the floor
        # where it belongs.
        base_width = 64 * (self.width + 0.5) / planes
        return self.block(
            inplanes, planes, *arguments, **{**more, "cardinality": self.groups, "base_width": base_width}
        )


def _resnet_stages(model: nn.Module) -> list[list[nn.Module]]:
    stages = [list(model.get_submodule(f"layer{i}").children()) for i in range(1, len(model.feature_info))]  # type: ignore[arg-type]
    kinds = {type(block) for blocks in stages for block in blocks}
    if len(kinds) != 1 or not kinds <= {timms_resnet.BasicBlock, timms_resnet.Bottleneck}:
        names = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise NotApplicable(f"the stages of {type(model).__name__} are known for timm's plain blocks, not for {names}")
    return stages


def _read_resnet(model: nn.Module, train: int, test: int) -> Stages:
    depths, widths, bottlenecks, groups = [], [], [], []
    stages = _resnet_stages(model)
    first: Any
    for blocks in stages:
        first = blocks[0]
        depths.append(len(blocks))
        if isinstance(first, timms_resnet.Bottleneck):
            widths.append(first.conv3.out_channels)
            bottlenecks.append(first.conv2.out_channels / first.conv3.out_channels)
            groups.append(0 if first.conv2.groups == 1 else first.conv2.out_channels // first.conv2.groups)
        else:
            widths.append(first.conv2.out_channels)
            bottlenecks.append(1.0)
            groups.append(0)
    first = stages[0][0]
    return Stages(
        "resnet", tuple(depths), tuple(widths), tuple(bottlenecks), tuple(groups), first.conv1.in_channels,
        train_size=train, test_size=test,
    )  # fmt: skip


def _built_resnet(model: nn.Module, name: str, stages: Stages, arguments: dict[str, Any]) -> nn.Module:
    block: Any = type(_resnet_stages(model)[0][0])
    if stages.stem != read_stages(model).stem:
        raise LissomError("the stem of a ResNet keeps its width")
    if block is timms_resnet.BasicBlock:
        if set(stages.bottlenecks) != {1.0} or any(stages.group_widths):
            raise LissomError(f"the blocks of {name} are two plain convolutions: bottlenecks are 1, group widths 0")
        return create_model(name, layers=stages.depths, channels=stages.widths, **arguments)
    makers, planes = [], []
    for width, share, group in zip(stages.widths, stages.bottlenecks, stages.group_widths, strict=True):
        inside = round(width * share)
        group = group or inside
        if width % block.expansion or inside % group:
            raise LissomError(
                f"a {name} cannot have a stage of {width} channels with {inside} inside in groups of {group}; widths "
                f"are multiples of {block.expansion}, and groups divide what is inside"
            )
        makers.append(_BlocksOf(block, inside // group, group))
        planes.append(width // block.expansion)
    return create_model(name, layers=stages.depths, channels=tuple(planes), block=tuple(makers), **arguments)
