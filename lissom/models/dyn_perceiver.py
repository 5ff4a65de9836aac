"""Dyn-Perceiver: a CNN without early classifiers, and beside it a few latent tokens that early exits look at.

Dynamic Perceiver for Efficient Visual Recognition (ICCV 2023, arXiv 2306.11248). Any CNN of four stages extracts maps
x. A small set of latents z, learned, runs through self-attention. In front of every stage the two meet: x reads z, and
z reads x. Four classifiers answer: of z in front of stage 3's run (early) and of stage 4's (late), of x (maps), and of
both (merged). So no low map of the CNN has to be linearly separable for an exit's sake.

Legend of the shapes: B batch, C channels of a stage's input, n tokens (a share of ``latents``), H W a map's size.

In training a network answers with all four logits, a tuple; in eval mode with the merged ones alone, and
``forward(x, exit=k)`` computes what the answer of exit k (1 to 4) needs and nothing more. For ``lissom slim`` the first
three are exits of its own (``lissom.layers.exits``), which need no new heads.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice, pairwise
from typing import Any

import torch
from timm.models import build_model_with_cfg, checkpoint, generate_default_cfgs, register_model
from timm.models._features import FeatureDictNet, feature_take_indices
from timm.models.efficientnet import EfficientNetFeatures
from timm.models.mobilenetv3 import MobileNetV3Features
from timm.models.resnet import BasicBlock, Bottleneck, make_blocks
from torch import nn
from torch.nn import functional as F
from torchvision.models import mobilenet_v3_large, regnet

from lissom.layers.exits import OwnExit, exits_of
from lissom.layers.latent_branch import (
    DEPTHS,
    HEADS,
    STAGES,
    Attention,
    CrossAttention,
    SelfAttention,
    TokenMean,
    check_sizes,
    exchanges,
    knowledge,
    latent,
    read_tokens,
    told,
)

__all__ = ["Attention", "CrossAttention", "DynPerceiver", "SelfAttention", "checkpoint_filter_fn", "split_cnn"]


def split_cnn(cnn: Any) -> tuple[nn.Module, list[nn.Module]]:
    """A CNN as its stem and its four stages, each a module from map to map; its classifier is left out.

    Known forms: torchvision's RegNet, ResNet and MobileNetV3-Large; timm's ResNets, and any of timm's networks as
    ``timm.create_model(name, features_only=True)`` takes it apart module by module or, as EfficientNets and
    MobileNets, block by block (its last four maps are the stages'); and a pair (stem, [stage 1, ..., stage 4]) of your
    own. Raises ValueError for anything else.
    """
    if isinstance(cnn, tuple | list):
        stem, stages = cnn
        if len(stages) != STAGES:
            raise ValueError(f"a Dyn-Perceiver stands on a CNN of {STAGES} stages, not {len(stages)}")
        return stem, list(stages)
    own = isinstance(cnn, EfficientNetFeatures | MobileNetV3Features) and cnn.feature_hooks is None
    if own or isinstance(cnn, FeatureDictNet):
        return _split_features(cnn)
    if hasattr(cnn, "trunk_output") and hasattr(cnn, "stem"):
        return cnn.stem, list(cnn.trunk_output.children())
    if all(hasattr(cnn, f"layer{n + 1}") for n in range(STAGES)) and hasattr(cnn, "conv1"):
        act = cnn.act1 if hasattr(cnn, "act1") else cnn.relu
        stem = nn.Sequential(cnn.conv1, cnn.bn1, act, cnn.maxpool)
        return stem, [getattr(cnn, f"layer{n + 1}") for n in range(STAGES)]
    features = getattr(cnn, "features", None)
    if isinstance(features, nn.Sequential) and len(features) == 17:  # MobileNetV3-Large: stem, 15 blocks, last 1 x 1
        bounds = (0, 3, 5, 8, 14, 17)
        stem, *parts = (features[a:b] for a, b in pairwise(bounds))
        return _renumbered(stem), [_renumbered(part) for part in parts]
    raise ValueError(
        f"the four stages of {type(cnn).__name__} are not known; give timm.create_model(name, features_only=True) of a "
        "network that timm takes apart, or a pair (stem, [stage 1, stage 2, stage 3, stage 4]) of modules"
    )


def _renumbered(part: nn.Sequential) -> nn.Sequential:
    return nn.Sequential(*part.children())  # a slice keeps the numbers it had


def _split_features(features: Any) -> tuple[nn.Module, list[nn.Module]]:
    """timm's features as a stem and the stages that end with the last four maps."""
    if isinstance(features, FeatureDictNet):
        modules = list(features.values())
        ends = [n + 1 for n, name in enumerate(features) if name in features.return_layers]
        begins = [end - 1 for end in ends]  # what stands between the stem's map and a stage (a pooling) is the stem's
    else:
        stem = [module for name, module in features.named_children() if name != "blocks"]
        modules = [*stem, *features.blocks]
        # What timm calls a stage is a block's number from 1; 0 is the first convolution, which is no stage here.
        maps = [len(stem) + info["stage"] for info in features.feature_info.info]
        ends = [len(stem) + info["stage"] for info in features.feature_info.get_dicts() if info["stage"]]
        begins = [max((n for n in maps if n < end), default=len(stem)) for end in ends]
    if len(ends) < STAGES:
        raise ValueError(f"a Dyn-Perceiver stands on a CNN of {STAGES} stages, and these features are {len(ends)} maps")
    bounds = [begins[-STAGES], *ends[-STAGES:]]
    parts = [modules[a:b] for a, b in pairwise(bounds)]
    return nn.Sequential(*modules[: bounds[0]]), [p[0] if len(p) == 1 else nn.Sequential(*p) for p in parts]


@torch.no_grad()
def _sizes(stem: nn.Module, stages: Sequence[nn.Module], in_chans: int) -> tuple[list[int], list[int]]:
    """Channels behind the stem and every stage, and how many times smaller than the image their maps are; found by
    one small image, in eval mode, so that no running statistics move."""
    side, parts = 64, [stem, *stages]
    modes = {module: module.training for part in parts for module in part.modules()}
    weight = next(stem.parameters(), torch.empty(0))
    x = torch.zeros(1, in_chans, side, side, device=weight.device, dtype=weight.dtype)
    widths, reductions = [], []
    try:
        for part in parts:
            x = part.eval()(x)
            widths.append(x.shape[1])
            reductions.append(round(side / x.shape[2]))
    finally:
        for module, mode in modes.items():
            module.training = mode
    return widths, reductions


def _with_channels(stem: nn.Module, in_chans: int) -> None:
    """Give the stem's first convolution ``in_chans`` channels, in place: a new, untrained one where it had others."""
    for path, module in stem.named_modules():
        if isinstance(module, nn.Conv2d):
            if module.in_channels == in_chans:
                return
            if module.groups != 1 or not path:
                break
            fresh = nn.Conv2d(
                in_chans, module.out_channels, module.kernel_size, module.stride, module.padding, module.dilation,
                bias=module.bias is not None,
            )  # fmt: skip
            parent, _, name = path.rpartition(".")
            setattr(stem.get_submodule(parent), name, fresh.to(module.weight))
            return
    raise ValueError(f"the CNN's first convolution cannot be given {in_chans} input channels; build it with them")


class DynPerceiver(nn.Module):
    """Images (B, in_chans, H, W) to logits: in training a tuple of four (B, num_classes), else the merged ones.

    ``backbone`` is a CNN of four stages in a form that ``split_cnn`` knows; its modules are used, not copied.
    ``latents`` tokens enter, and half of them go on at each stage; ``depths`` and ``num_heads`` are of the
    self-attention in front of each stage, ``self_ratio`` its MLPs' widening; ``pool`` is the side of the map that z
    reads. ``isc``: the late and the merged classifier also read the logits of the exit before them. ``hidden`` is the
    width of a hidden layer in the classifiers of x and of both (None: there is none). ``drop_rate`` drops what the
    last layer of the classifier of x reads, and of both where there is a hidden layer. With ``num_classes`` 0 the
    answers are features, the merged ones (B, ``num_features``). Raises ValueError where sizes do not fit.
    """

    def __init__(
        self,
        backbone: Any,
        num_classes: int = 1000,
        in_chans: int = 3,
        latents: int = 128,
        depths: Sequence[int] = DEPTHS,
        num_heads: Sequence[int] = HEADS,
        self_ratio: float = 4.0,
        pool: int = 7,
        isc: bool = True,
        hidden: int | None = None,
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        check_sizes(latents, depths, num_heads)
        self.in_chans, self.hidden, self.drop_rate, self.isc = in_chans, hidden, drop_rate, isc
        self.grad_checkpointing = False
        self.stem, stages = split_cnn(backbone)
        _with_channels(self.stem, in_chans)
        self.stages = nn.ModuleList(stages)
        self.widths, reductions = _sizes(self.stem, stages, in_chans)
        dims = self.widths[:STAGES]
        self.feature_info = [
            {"num_chs": width, "reduction": reduction, "module": f"stages.{number}"}
            for number, (width, reduction) in enumerate(zip(self.widths[1:], reductions[1:], strict=True))
        ]
        self.latent = latent(latents, dims[0])
        self.exchanges = exchanges(dims, latents, depths, num_heads, self_ratio, [pool] * STAGES)
        self.last_z2x = CrossAttention(self.widths[-1], dims[-1], max(1, self.widths[-1] // 8))
        self.means = nn.ModuleDict({"early": TokenMean(), "late": TokenMean()})
        # What the merged classifier reads, without the logits of earlier exits.
        self.num_features = self.head_hidden_size = self.widths[-1] + dims[-1]
        self._classifiers(num_classes)

    def _classifiers(self, num_classes: int) -> None:
        """The four classifiers, and what hands the logits of two of them on."""
        self.num_classes = num_classes
        _, _, third, fourth, last = self.widths
        known = fourth if self.isc and num_classes else 0
        self.knowledge = knowledge(num_classes, known)  # logits -> (B, C4), for the exit behind
        self.heads = nn.ModuleDict(
            {
                "early": nn.Linear(third, num_classes),
                "late": nn.Linear(fourth + known, num_classes),
                "maps": self._classifier(last, num_classes),
                "merged": self._classifier(last + fourth + known, num_classes, nn.BatchNorm1d(last + fourth + known)),
            }
            if num_classes
            else {name: nn.Identity() for name in ("early", "late", "maps", "merged")}
        )

    def _classifier(self, width: int, num_classes: int, *before: nn.Module) -> nn.Module:
        if self.hidden is None:
            linear = nn.Linear(width, num_classes)
            return nn.Sequential(*before, linear) if before else linear
        return nn.Sequential(
            *before, nn.Linear(width, self.hidden), nn.Hardswish(), nn.Dropout(self.drop_rate),
            nn.Linear(self.hidden, num_classes),
        )  # fmt: skip

    def no_weight_decay(self) -> set[str]:
        """The latents and the vectors of positions."""
        return {n for n, _ in self.named_parameters() if n == "latent" or n.endswith("relative_position_bias")}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """How timm groups layers for a rate of learning by depth: a stage goes with the exchange in front of it."""
        blocks = [(r"^(?:stages|exchanges)\.(\d+)", None), (r"^last_z2x", (99999,))]
        return {"stem": r"^stem|^latent", "blocks": blocks}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether the insides of stages and of self-attention are computed anew for the backward pass."""
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """The four classifiers, by their names: ``early``, ``late``, ``maps`` and ``merged``."""
        return self.heads

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """New, untrained classifiers of ``num_classes`` outputs, all four and what lies between them; none for 0."""
        if global_pool not in (None, "avg"):
            raise ValueError(f"maps are averaged ('avg'), not {global_pool!r}")
        self._classifiers(num_classes)
        for part in (self.heads, self.knowledge):
            part.to(self.latent).train(self.training)

    def own_exits(self) -> tuple[OwnExit, ...]:
        """The exits in front of the merged answer, and what is carried on behind each (lissom.layers.exits)."""
        if not self.num_classes:
            return ()
        known = {name: (f"heads.{name}",) if self.isc else () for name in ("early", "late")}
        # The mean of z could be taken anew, but OpenVINO's int8 kernels (2026.4) answer wrongly where the mean of a
        # graph's own input is put beside others in front of a norm.
        fourth = ("exchanges.3.self_attention", "means.late")
        return (
            OwnExit("heads.early", ("exchanges.2.z2x", "exchanges.2.self_attention", *known["early"])),
            OwnExit("heads.late", ("exchanges.3.z2x", *fourth, *known["late"])),
            OwnExit("heads.maps", ("stages.3", *fourth, *known["late"])),
        )

    def _meet(self, number: int, x: torch.Tensor, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The exchange in front of a stage."""
        exchange = self.exchanges[number]
        return checkpoint(exchange, x, z) if self.grad_checkpointing and self.training else exchange(x, z)

    def _stage(self, number: int, x: torch.Tensor) -> torch.Tensor:
        stage = self.stages[number]
        return checkpoint(stage, x) if self.grad_checkpointing and self.training else stage(x)

    def answers(self, x: torch.Tensor, maps: bool = True) -> Iterator[torch.Tensor]:
        """The four logits (B, num_classes) in order of execution: early, late, maps, merged.

        Each is computed when it is asked for. ``maps`` False leaves the third out, which no other needs.
        """
        x, z = self._meet(0, self.stem(x), self.latent.expand(len(x), -1, -1))
        for number in (1, 2):
            x, z = self._meet(number, self._stage(number - 1, x), z)
        early = self.heads["early"](self.means["early"](z))
        yield early
        x, z = self._meet(3, self._stage(2, x), z)
        mean = self.means["late"](z)
        late = self.heads["late"](told(self.knowledge, "early", mean, early))
        yield late
        x = self._stage(3, x)
        if maps:
            pooled = x.mean((2, 3))
            yield self.heads["maps"](F.dropout(pooled, self.drop_rate, self.training and self.hidden is None))
        x = read_tokens(self.last_z2x, x, z)
        yield self.heads["merged"](told(self.knowledge, "late", torch.cat((x.mean((2, 3)), mean), 1), late))

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """timm's: the last map, as the merged classifier reads it, and those of the stages ``indices``, or these alone.

        The maps are what stages answer, before x reads z again.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"maps come as NCHW, not {output_fmt}")
        taken, last = feature_take_indices(len(self.stages), indices)
        count = last + 1 if stop_early or intermediates_only else len(self.stages)
        found = []
        x, z = self.stem(x), self.latent.expand(len(x), -1, -1)
        for number in range(count):
            x, z = self._meet(number, x, z)
            x = self._stage(number, x)
            if number in taken:
                found.append(x)
        if intermediates_only:
            return found
        return (read_tokens(self.last_z2x, x, z) if count == STAGES else x), found

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """timm's: drop the stages behind the last of ``indices``, and the classifiers."""
        taken, last = feature_take_indices(len(self.stages), indices)
        self.stages, self.exchanges = self.stages[: last + 1], self.exchanges[: last + 1]
        if prune_head:
            self.reset_classifier(0)
            self.last_z2x = nn.Identity()
        return taken

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Images to the map (B, C5, H / 32, W / 32) that the merged classifier reads, beside z and earlier logits."""
        return self.forward_intermediates(x, indices=[STAGES - 1])[0]

    def forward(self, x: torch.Tensor, exit: int | None = None) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """All four logits in training, the merged ones in eval mode, or those of ``exit`` (1 to 4), computed that far.

        With exits attached (lissom.layers.exits) its own answer is the merged one in either mode.
        """
        if exit is not None:
            if exit not in range(1, STAGES + 1):
                raise ValueError(f"exits go from 1 to {STAGES}, and {exit!r} was asked for")
            if exit < STAGES:
                return next(islice(self.answers(x), exit - 1, None))
            return tuple(self.answers(x, maps=False))[-1]
        attached = exits_of(self)
        everything = self.training if attached is None else "heads.maps" in attached.positions
        answers = tuple(self.answers(x, maps=everything))
        return answers if self.training and attached is None else answers[-1]


_KEYS = (
    (r"^cnn_stem\.", "stem."),
    (r"^cnn_body\.block(\d)\.", lambda m: f"stages.{int(m[1]) - 1}."),
    (r"^cnn_body_stage(\d)\.", lambda m: f"stages.{int(m[1]) - 1}."),
    (r"^dwc(\d)_x2z\.", lambda m: f"exchanges.{int(m[1]) - 1}.dwc."),
    (r"^cross_att(\d)_(x2z|z2x)\.", lambda m: f"exchanges.{int(m[1]) - 1}.{m[2]}."),
    (r"^last_cross_att_z2x\.", "last_z2x."),
    (r"^self_att(\d)\.", lambda m: f"exchanges.{int(m[1]) - 1}.self_attention."),
    (r"^token_(mixer|expander)\.(\d)\.", lambda m: f"exchanges.{int(m[2]) + 1}.{m[1]}."),
    (r"^early_classifier3\.", "heads.early."),
    (r"^classifier_att\.", "heads.late."),
    (r"^classifier_cnn\.", "heads.maps."),
    (r"^classifier_merge\.", "heads.merged."),
    (r"^isc3\.", "knowledge.early."),
    (r"^isc4\.", "knowledge.late."),
    (r"(^|\.)(?:cross_attn|self_attn)\.", r"\1"),
    (r"(^|\.)mlp\.layernorm\.", r"\1mlp.norm."),
)


def own_key(key: str) -> str:
    """A key of a published checkpoint in this file's names."""
    for pattern, name in _KEYS:
        key = re.sub(pattern, name, key)  # type: ignore[arg-type]
    return key


def checkpoint_filter_fn(state_dict: Mapping[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """A published checkpoint in the names of ``DynPerceiver``; its own as they are."""
    return {own_key(key): value for key, value in state_dict.items()}


# The published CNNs. Each function returns a CNN for ``split_cnn`` and the sizes that go with it.

Built = tuple[Any, dict[str, Any]]


def _regnet(size: str) -> Built:
    with torch.device("cpu"):  # torchvision computes the widths by tensors, which the meta device cannot
        cnn = getattr(regnet, f"regnet_y_{size}")()
    return cnn.to(torch.get_default_device()), {}


def _mobilenet(width: float) -> Built:
    cnn = mobilenet_v3_large(width_mult=width)
    return cnn, {"hidden": cnn.classifier[0].out_features, "drop_rate": 0.2}


def _resnet(depth: int, width: float = 1.0, drop_path_rate: float = 0.2) -> Built:
    """timm's ResNet with every width multiplied, the stem's too, which timm's own class does not offer."""
    block = BasicBlock if depth < 50 else Bottleneck
    channels = tuple(int(width * c) for c in (64, 128, 256, 512))
    named, _ = make_blocks(
        (block,) * STAGES, channels, (2, 2, 2, 2) if depth == 18 else (3, 4, 6, 3), channels[0],
        drop_path_rate=drop_path_rate, cardinality=1, base_width=64, norm_layer=nn.BatchNorm2d, act_layer=nn.ReLU,
    )  # fmt: skip
    stem = nn.Sequential(
        nn.Conv2d(3, channels[0], 7, 2, 3, bias=False), nn.BatchNorm2d(channels[0]), nn.ReLU(inplace=True),
        nn.MaxPool2d(3, 2, 1),
    )  # fmt: skip
    stages = [stage for _, stage in named]
    for part in (stem, *stages):
        for module in part.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, BasicBlock | Bottleneck):
                module.zero_init_last()
    return (stem, stages), {"drop_rate": 0.2}


# Name -> how it is built, and what multiplies the depths of self-attention.
CNNS: dict[str, tuple[Callable[..., Built], tuple[int, ...]]] = {
    **{
        f"reg{name}": (partial(_regnet, size), (1, 1, 1, 2))
        for name, size in {
            "400m": "400mf", "800m": "800mf", "1x6g": "1_6gf", "3x2g": "3_2gf", "8g": "8gf", "16g": "16gf",
        }.items()
    },
    "resnet18": (partial(_resnet, 18), (1, 1, 1, 2)),
    "resnet34": (partial(_resnet, 34), (1, 1, 1, 2)),
    **{
        f"resnet50{name}": (partial(_resnet, 50, width), (1, 1, 1, 1))
        for name, width in {"": 1.0, "_0375": 0.375, "_050": 0.5, "_0625": 0.625, "_075": 0.75}.items()
    },
    **{
        f"mobilenetV3{name}": (partial(_mobilenet, width), (1, 1, 1, 3))
        for name, width in {"": 1.0, "_0x5": 0.5, "_0x75": 0.75, "_1x25": 1.25, "_1x5": 1.5, "_2x0": 2.0}.items()
    },
}  # fmt: skip
LATENTS = {
    "reg400m": (32, 64, 128, 256, 512), "reg800m": (32, 64, 128, 256, 512), "reg1x6g": (128, 256, 512),
    "reg3x2g": (128, 256, 512), "reg8g": (128, 256, 512), "reg16g": (128, 256, 512), "resnet18": (128, 256, 512),
    "resnet34": (128, 256, 512), "resnet50": (64, 128, 256, 512), "resnet50_0375": (64, 128, 256),
    "resnet50_050": (64, 128, 256), "resnet50_0625": (128, 160, 192, 256), "resnet50_075": (128, 256),
    **{name: (128, 256, 512) for name in CNNS if name.startswith("mobilenetV3")},
}  # fmt: skip
# timm's way of saying it, for those of which weights are published.
ALSO = {
    "dyn_perceiver_regnety_008": "reg800m_perceiver_t128",
    "dyn_perceiver_resnet50_0375": "resnet50_0375_perceiver_t128",
    "dyn_perceiver_mobilenetv3_075": "mobilenetV3_0x75_perceiver_t128",
}


def _network(name: str, **arguments: Any) -> DynPerceiver:
    """The network of a published name; ``arguments`` replace its sizes."""
    cnn, _, latents = name.partition("_perceiver_t")
    build, factors = CNNS[cnn]
    backbone, own = build(**{key: arguments.pop(key) for key in ("drop_path_rate",) if key in arguments})
    depths = tuple(depth * factor for depth, factor in zip(DEPTHS, factors, strict=True))
    return DynPerceiver(backbone, **{"latents": int(latents), "depths": depths, **own, **arguments})


def _cfg(name: str) -> dict[str, Any]:
    hidden = name.startswith("mobilenet")
    last = ("heads.maps.3", "heads.merged.4") if hidden else ("heads.maps", "heads.merged.1")
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": "stem.0.0" if hidden else "stem.0",
        # All whose shape the number of classes decides.
        "classifier": ("heads.early", "heads.late", *last, "knowledge.early.0", "knowledge.late.0"),
        "license": "mit",
    }


_NAMES = {name: name for cnn, counts in LATENTS.items() for name in (f"{cnn}_perceiver_t{n}" for n in counts)} | ALSO
default_cfgs = generate_default_cfgs({name: _cfg(published) for name, published in _NAMES.items()})


def _built(name: str, pretrained: bool, kwargs: dict[str, Any]) -> DynPerceiver:
    return build_model_with_cfg(
        partial(_network, _NAMES[name]),
        name,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": (0, 1, 2, 3), "feature_cls": "getter"},
        **kwargs,
    )


# Every network takes images (B, 3, 224, 224), or of other sizes, and answers (B, 1000): four times in training.


@register_model
def reg400m_perceiver_t32(pretrained: bool = False, **kwargs: Any) -> DynPerceiver:
    """Dyn-Perceiver on RegNetY-400MF, 32 latents."""
    return _built("reg400m_perceiver_t32", pretrained, kwargs)


@register_model
def reg400m_perceiver_t64(pretrained: bool = False, **kwargs: Any) -> DynPerceiver:
    """Dyn-Perceiver on RegNetY-400MF, 64 latents."""
    return _built("reg400m_perceiver_t64", pretrained, kwargs)


@register_model
def reg400m_perceiver_t128(pretrained: bool = False, **kwargs: Any) -> DynPerceiver:
    """Dyn-Perceiver on RegNetY-400MF, 128 latents."""
    return _built("reg400m_perceiver_t128", pretrained, kwargs)


@register_model
def reg400m_perceiver_t256(pretrained: bool = False, **kwargs: Any) -> DynPerceiver:
    """Dyn-Perceiver on RegNetY-400MF, 256 latents."""
    return _built("reg400m_perceiver_t256", pretrained, kwargs)


@register_model
def reg400m_perceiver_t512(pretrained: bool = False, **kwargs: Any) -> DynPerceiver:
    """Dyn-Perceiver on RegNetY-400MF, 512 latents."""
    return _built("reg400m_perceiver_t512", pretrained, kwargs)


@register_model
def reg800m_perceiver_t32(pretrained: bool = False, **kwargs: Any) -> DynPerceiver:
    """Dyn-Perceiver on RegNetY-800MF, 32 latents."""
    return _built("reg800m_perceiver_t32", pretrained, kwargs)


@register_model
def reg800m_perceiver_t64(pretrained: bool = False, **kwargs: Any) -> DynPerceiver:
    """Dyn-Perceiver on RegNetY-800MF, 64 latents."""
    return _built("reg800m_perceiver_t64", pretrained, kwargs)


@register_model
def reg800m_perceiver_t128(pretrained: bool = False, **kwargs: Any) -> DynPerceiver:
    """Dyn-Perceiver on RegNetY-800MF, 128 latents."""
    return _built("reg800m_perceiver_t128", pretrained, kwargs)


@register_model
def reg800m_perceiver_t256(pretrained: bool = False, **kwargs: Any) -> DynPerceiver:
    """Dyn-Perceiver on RegNetY-800MF, 256 latents."""
    return _built("reg800m_perceiver_t256", pretrained, kwargs)


@register_model
def reg800m_perceiver_t512(pretrained: bool = False, **kwargs: Any) -> DynPerceiver:
    """Dyn-Perceiver on RegNetY-800MF, 512 latents."""
    return _built("reg800m_perceiver_t512", pretrained, kwargs)


@register_model
def reg1x6g_perceiver_t128(pretrained: bool = False, **kwargs: Any) -> DynPerceiver:
    """Dyn-Perceiver on RegNetY-1.6GF, 128 latents."""
    return _built("reg1x6g_perceiver_t128", pretrained, kwargs)


@register_model
def reg1x6g_perceiver_t256(pretrained: bool = False, **kwargs: Any) -> DynPerceiver:
    """Dyn-Perceiver on RegNetY-1.6GF, 256 latents."""
    return _built("reg1x6g_perceiver_t256", pretrained, kwargs)


@register_model
def reg1x6g_perceiver_t512(pretrained: bool = False, **kwargs: Any) -> DynPerceiver:
    """Dyn-Perceiver on RegNetY-1.6GF, 512 latents."""
    return _built("reg1x6g_perceiver_t512", pretrained, kwargs)


@register_model
def reg3x2g_perceiver_t128(pretrained: bool = False, **kwargs: Any) -> DynPerceiver:
    """Dyn-Perceiver on RegNetY-3.2GF, 128 latents."""
    return _built("reg3x2g_perceiver_t128", pretrained, kwargs)


@register_model
def reg3x2g_perceiver_t256(pretrained: bool = False, **kwargs: Any) -> DynPerceiver:
    """Dyn-Perceiver on RegNetY-3.2GF, 256 latents."""
    return _built("reg3x2g_perceiver_t256", pretrained, kwargs)


@register_model
def reg3x2g_perceiver_t512(pretrained: bool = False, **kwargs: Any) -> DynPerceiver:
    """Dyn-Perceiver on RegNetY-3.2GF, 512 latents."""
    return _built("reg3x2g_perceiver_t512", pretrained, kwargs)


@register_model
def reg8g_perceiver_t128(pretrained: bool = False, **kwargs: Any) -> DynPerceiver:
    """Dyn-Perceiver on RegNetY-8GF, 128 latents."""
    return _built("reg8g_perceiver_t128", pretrained, kwargs)


@register_model
def reg8g_perceiver_t256(pretrained: bool = False, **kwargs: Any) -> DynPerceiver:
    """Dyn-Perceiver on RegNetY-8GF, 256 latents."""
    return _built("reg8g_perceiver_t256", pretrained, kwargs)


@register_model
def reg8g_perceiver_t512(pretrained: bool = False, **kwargs: Any) -> DynPerceiver:
    """Dyn-Perceiver on RegNetY-8GF, 512 latents."""
    return _built("reg8g_perceiver_t512", pretrained, kwargs)


@register_model
def reg16g_perceiver_t128(pretrained: bool = False, **kwargs: Any) -> DynPerceiver:
    """Dyn-Perceiver on RegNetY-16GF, 128 latents."""
    return _built("reg16g_perceiver_t128", pretrained, kwargs)


@register_model
def reg16g_perceiver_t256(pretrained: bool = False, **kwargs: Any) -> DynPerceiver:
    """Dyn-Perceiver on RegNetY-16GF, 256 latents."""
    return _built("reg16g_perceiver_t256", pretrained, kwargs)


@register_model
def reg16g_perceiver_t512(pretrained: bool = False, **kwargs: Any) -> DynPerceiver:
    """Dyn-Perceiver on RegNetY-16GF, 512 latents."""
    return _built("reg16g_perceiver_t512", pretrained, kwargs)


@register_model
def resnet18_perceiver_t128(pretrained: bool = False, **kwargs: Any) -> DynPerceiver:
    """Dyn-Perceiver on ResNet-18, 128 latents."""
    return _built("resnet18_perceiver_t128", pretrained, kwargs)


@register_model
def resnet18_perceiver_t256(pretrained: bool = False, **kwargs: Any) -> DynPerceiver:
    """Dyn-Perceiver on ResNet-18, 256 latents."""
    return _built("resnet18_perceiver_t256", pretrained, kwargs)


@register_model
def resnet18_perceiver_t512(pretrained: bool = False, **kwargs: Any) -> DynPerceiver:
    """Dyn-Perceiver on ResNet-18, 512 latents."""
    return _built("resnet18_perceiver_t512", pretrained, kwargs)


@register_model
def resnet34_perceiver_t128(pretrained: bool = False, **kwargs: Any) -> DynPerceiver:
    """Dyn-Perceiver on ResNet-34, 128 latents."""
    return _built("resnet34_perceiver_t128", pretrained, kwargs)


@register_model
def resnet34_perceiver_t256(pretrained: bool = False, **kwargs: Any) -> DynPerceiver:
    """Dyn-Perceiver on ResNet-34, 256 latents."""
    return _built("resnet34_perceiver_t256", pretrained, kwargs)


@register_model
def resnet34_perceiver_t512(pretrained: bool = False, **kwargs: Any) -> DynPerceiver:
    """Dyn-Perceiver on ResNet-34, 512 latents."""
    return _built("resnet34_perceiver_t512", pretrained, kwargs)


@register_model
def resnet50_perceiver_t64(pretrained: bool = False, **kwargs: Any) -> DynPerceiver:
    """Dyn-Perceiver on ResNet-50, 64 latents."""
    return _built("resnet50_perceiver_t64", pretrained, kwargs)


@register_model
def resnet50_perceiver_t128(pretrained: bool = False, **kwargs: Any) -> DynPerceiver:
    """Dyn-Perceiver on ResNet-50, 128 latents."""
    return _built("resnet50_perceiver_t128", pretrained, kwargs)


@register_model
def resnet50_perceiver_t256(pretrained: bool = False, **kwargs: Any) -> DynPerceiver:
    """Dyn-Perceiver on ResNet-50, 256 latents."""
    return _built("resnet50_perceiver_t256", pretrained, kwargs)


@register_model
def resnet50_perceiver_t512(pretrained: bool = False, **kwargs: Any) -> DynPerceiver:
    """Dyn-Perceiver on ResNet-50, 512 latents."""
    return _built("resnet50_perceiver_t512", pretrained, kwargs)


@register_model
def resnet50_0375_perceiver_t64(pretrained: bool = False, **kwargs: Any) -> DynPerceiver:
    """Dyn-Perceiver on ResNet-50 of 0.375 times the width, 64 latents."""
    return _built("resnet50_0375_perceiver_t64", pretrained, kwargs)


@register_model
def resnet50_0375_perceiver_t128(pretrained: bool = False, **kwargs: Any) -> DynPerceiver:
    """Dyn-Perceiver on ResNet-50 of 0.375 times the width, 128 latents."""
    return _built("resnet50_0375_perceiver_t128", pretrained, kwargs)


@register_model
def resnet50_0375_perceiver_t256(pretrained: bool = False, **kwargs: Any) -> DynPerceiver:
    """Dyn-Perceiver on ResNet-50 of 0.375 times the width, 256 latents."""
    return _built("resnet50_0375_perceiver_t256", pretrained, kwargs)


@register_model
def resnet50_050_perceiver_t64(pretrained: bool = False, **kwargs: Any) -> DynPerceiver:
    """Dyn-Perceiver on ResNet-50 of half the width, 64 latents."""
    return _built("resnet50_050_perceiver_t64", pretrained, kwargs)


@register_model
def resnet50_050_perceiver_t128(pretrained: bool = False, **kwargs: Any) -> DynPerceiver:
    """Dyn-Perceiver on ResNet-50 of half the width, 128 latents."""
    return _built("resnet50_050_perceiver_t128", pretrained, kwargs)


@register_model
def resnet50_050_perceiver_t256(pretrained: bool = False, **kwargs: Any) -> DynPerceiver:
    """Dyn-Perceiver on ResNet-50 of half the width, 256 latents."""
    return _built("resnet50_050_perceiver_t256", pretrained, kwargs)


@register_model
def resnet50_0625_perceiver_t128(pretrained: bool = False, **kwargs: Any) -> DynPerceiver:
    """Dyn-Perceiver on ResNet-50 of 0.625 times the width, 128 latents."""
    return _built("resnet50_0625_perceiver_t128", pretrained, kwargs)


@register_model
def resnet50_0625_perceiver_t160(pretrained: bool = False, **kwargs: Any) -> DynPerceiver:
    """Dyn-Perceiver on ResNet-50 of 0.625 times the width, 160 latents."""
    return _built("resnet50_0625_perceiver_t160", pretrained, kwargs)


@register_model
def resnet50_0625_perceiver_t192(pretrained: bool = False, **kwargs: Any) -> DynPerceiver:
    """Dyn-Perceiver on ResNet-50 of 0.625 times the width, 192 latents."""
    return _built("resnet50_0625_perceiver_t192", pretrained, kwargs)


@register_model
def resnet50_0625_perceiver_t256(pretrained: bool = False, **kwargs: Any) -> DynPerceiver:
    """Dyn-Perceiver on ResNet-50 of 0.625 times the width, 256 latents."""
    return _built("resnet50_0625_perceiver_t256", pretrained, kwargs)


@register_model
def resnet50_075_perceiver_t128(pretrained: bool = False, **kwargs: Any) -> DynPerceiver:
    """Dyn-Perceiver on ResNet-50 of 0.75 times the width, 128 latents."""
    return _built("resnet50_075_perceiver_t128", pretrained, kwargs)


@register_model
def resnet50_075_perceiver_t256(pretrained: bool = False, **kwargs: Any) -> DynPerceiver:
    """Dyn-Perceiver on ResNet-50 of 0.75 times the width, 256 latents."""
    return _built("resnet50_075_perceiver_t256", pretrained, kwargs)


@register_model
def mobilenetV3_perceiver_t128(pretrained: bool = False, **kwargs: Any) -> DynPerceiver:  # noqa: N802
    """Dyn-Perceiver on MobileNetV3-Large, 128 latents."""
    return _built("mobilenetV3_perceiver_t128", pretrained, kwargs)


@register_model
def mobilenetV3_perceiver_t256(pretrained: bool = False, **kwargs: Any) -> DynPerceiver:  # noqa: N802
    """Dyn-Perceiver on MobileNetV3-Large, 256 latents."""
    return _built("mobilenetV3_perceiver_t256", pretrained, kwargs)


@register_model
def mobilenetV3_perceiver_t512(pretrained: bool = False, **kwargs: Any) -> DynPerceiver:  # noqa: N802
    """Dyn-Perceiver on MobileNetV3-Large, 512 latents."""
    return _built("mobilenetV3_perceiver_t512", pretrained, kwargs)


@register_model
def mobilenetV3_0x5_perceiver_t128(pretrained: bool = False, **kwargs: Any) -> DynPerceiver:  # noqa: N802
    """Dyn-Perceiver on MobileNetV3-Large of half the width, 128 latents."""
    return _built("mobilenetV3_0x5_perceiver_t128", pretrained, kwargs)


@register_model
def mobilenetV3_0x5_perceiver_t256(pretrained: bool = False, **kwargs: Any) -> DynPerceiver:  # noqa: N802
    """Dyn-Perceiver on MobileNetV3-Large of half the width, 256 latents."""
    return _built("mobilenetV3_0x5_perceiver_t256", pretrained, kwargs)


@register_model
def mobilenetV3_0x5_perceiver_t512(pretrained: bool = False, **kwargs: Any) -> DynPerceiver:  # noqa: N802
    """Dyn-Perceiver on MobileNetV3-Large of half the width, 512 latents."""
    return _built("mobilenetV3_0x5_perceiver_t512", pretrained, kwargs)


@register_model
def mobilenetV3_0x75_perceiver_t128(pretrained: bool = False, **kwargs: Any) -> DynPerceiver:  # noqa: N802
    """Dyn-Perceiver on MobileNetV3-Large of 0.75 times the width, 128 latents."""
    return _built("mobilenetV3_0x75_perceiver_t128", pretrained, kwargs)


@register_model
def mobilenetV3_0x75_perceiver_t256(pretrained: bool = False, **kwargs: Any) -> DynPerceiver:  # noqa: N802
    """Dyn-Perceiver on MobileNetV3-Large of 0.75 times the width, 256 latents."""
    return _built("mobilenetV3_0x75_perceiver_t256", pretrained, kwargs)


@register_model
def mobilenetV3_0x75_perceiver_t512(pretrained: bool = False, **kwargs: Any) -> DynPerceiver:  # noqa: N802
    """Dyn-Perceiver on MobileNetV3-Large of 0.75 times the width, 512 latents."""
    return _built("mobilenetV3_0x75_perceiver_t512", pretrained, kwargs)


@register_model
def mobilenetV3_1x25_perceiver_t128(pretrained: bool = False, **kwargs: Any) -> DynPerceiver:  # noqa: N802
    """Dyn-Perceiver on MobileNetV3-Large of 1.25 times the width, 128 latents."""
    return _built("mobilenetV3_1x25_perceiver_t128", pretrained, kwargs)


@register_model
def mobilenetV3_1x25_perceiver_t256(pretrained: bool = False, **kwargs: Any) -> DynPerceiver:  # noqa: N802
    """Dyn-Perceiver on MobileNetV3-Large of 1.25 times the width, 256 latents."""
    return _built("mobilenetV3_1x25_perceiver_t256", pretrained, kwargs)


@register_model
def mobilenetV3_1x25_perceiver_t512(pretrained: bool = False, **kwargs: Any) -> DynPerceiver:  # noqa: N802
    """Dyn-Perceiver on MobileNetV3-Large of 1.25 times the width, 512 latents."""
    return _built("mobilenetV3_1x25_perceiver_t512", pretrained, kwargs)


@register_model
def mobilenetV3_1x5_perceiver_t128(pretrained: bool = False, **kwargs: Any) -> DynPerceiver:  # noqa: N802
    """Dyn-Perceiver on MobileNetV3-Large of 1.5 times the width, 128 latents."""
    return _built("mobilenetV3_1x5_perceiver_t128", pretrained, kwargs)


@register_model
def mobilenetV3_1x5_perceiver_t256(pretrained: bool = False, **kwargs: Any) -> DynPerceiver:  # noqa: N802
    """Dyn-Perceiver on MobileNetV3-Large of 1.5 times the width, 256 latents."""
    return _built("mobilenetV3_1x5_perceiver_t256", pretrained, kwargs)


@register_model
def mobilenetV3_1x5_perceiver_t512(pretrained: bool = False, **kwargs: Any) -> DynPerceiver:  # noqa: N802
    """Dyn-Perceiver on MobileNetV3-Large of 1.5 times the width, 512 latents."""
    return _built("mobilenetV3_1x5_perceiver_t512", pretrained, kwargs)


@register_model
def mobilenetV3_2x0_perceiver_t128(pretrained: bool = False, **kwargs: Any) -> DynPerceiver:  # noqa: N802
    """Dyn-Perceiver on MobileNetV3-Large of twice the width, 128 latents."""
    return _built("mobilenetV3_2x0_perceiver_t128", pretrained, kwargs)


@register_model
def mobilenetV3_2x0_perceiver_t256(pretrained: bool = False, **kwargs: Any) -> DynPerceiver:  # noqa: N802
    """Dyn-Perceiver on MobileNetV3-Large of twice the width, 256 latents."""
    return _built("mobilenetV3_2x0_perceiver_t256", pretrained, kwargs)


@register_model
def mobilenetV3_2x0_perceiver_t512(pretrained: bool = False, **kwargs: Any) -> DynPerceiver:  # noqa: N802
    """Dyn-Perceiver on MobileNetV3-Large of twice the width, 512 latents."""
    return _built("mobilenetV3_2x0_perceiver_t512", pretrained, kwargs)


@register_model
def dyn_perceiver_regnety_008(pretrained: bool = False, **kwargs: Any) -> DynPerceiver:
    """``reg800m_perceiver_t128`` by timm's way of naming."""
    return _built("dyn_perceiver_regnety_008", pretrained, kwargs)


@register_model
def dyn_perceiver_resnet50_0375(pretrained: bool = False, **kwargs: Any) -> DynPerceiver:
    """``resnet50_0375_perceiver_t128`` by timm's way of naming."""
    return _built("dyn_perceiver_resnet50_0375", pretrained, kwargs)


@register_model
def dyn_perceiver_mobilenetv3_075(pretrained: bool = False, **kwargs: Any) -> DynPerceiver:
    """``mobilenetV3_0x75_perceiver_t128`` by timm's way of naming."""
    return _built("dyn_perceiver_mobilenetv3_075", pretrained, kwargs)
