"""Scaling: a convolutional network made larger, or smaller, by a rule for depth, width and image (arXiv 2103.06877).

Fast and Accurate Model Scaling (CVPR 2021). A convolution of width w, in d layers, on maps of side r, costs d w^2 r^2
multiply-adds and writes d w r^2 activations. To multiply the multiply-adds by s, with e_d + e_w + e_r = 1,

    d' = s^e_d d,    w' = s^(e_w / 2) w,    r' = s^(e_r / 2) r        (section 4)

and activations grow by s^(e_d + e_w / 2 + e_r). Uniform compound scaling ("dwr") spends a third on each; fast compound
scaling ("dWr") e_w = 0.8 and 0.1 each on depth and image: at like accuracy, activations grow by s^0.6 in place of
s^0.83, and time, which follows them, with them (``lissom.meters.activations``). Widths of groups grow with the widths
("wg", "dWr"): where they stay, grouped convolutions grow by less than s.

Everything here is pure: settings go in, other settings come out. After rounding, the true factor is another than s,
most of all where stages are shallow; ``Scaled.ratios`` counts it.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import nn

from lissom.errors import LissomError
from lissom.meters.activations import Complexity, complexity
from lissom.models.factory import create_model
from lissom.models.stages import Stages, in_channels, read_stages, with_stages

__all__ = [
    "FAST",
    "PRESETS",
    "Factors",
    "Scaled",
    "adjust_block_compatibility",
    "exponents",
    "scale",
    "scale_config",
    "scale_network",
    "scaling_factors",
    "type_of_alpha",
]

FAST = "d1_w8_g8_r1"  # dWr, alpha = 0.8
PRESETS = ("d", "w", "r", "dw", "dr", "wr", "dwr", "wg", "dWr")
_TERM = re.compile(r"([dwgr])(\d+(?:\.\d*)?|\.\d+)")
STEP = 8  # widths are multiples of it; image sizes of 4
IMAGE_STEP = 4


class Factors(NamedTuple):
    """What depths, widths, group widths and the sides of images are multiplied by."""

    depth: float
    width: float
    group: float
    resolution: float


def type_of_alpha(alpha: float) -> str:
    """The type of the paper's family: e_w = alpha, e_d = e_r = (1 - alpha) / 2, groups as widths.

    0.8 is "dWr", 1 is "wg"; at 1/3 it is "dwr" whose groups grow as well. Raises LissomError outside [0, 1].
    """
    if not 0 <= alpha <= 1:
        raise LissomError(f"alpha is {alpha}; it is the share that goes into the width, from 0 to 1")
    other = f"{(1 - alpha) / 2:.9f}"
    return f"d{other}_w{alpha:.9f}_g{alpha:.9f}_r{other}"


def _weights(scale_type: str) -> dict[str, float]:
    """The weights of d, w, g and r in a type."""
    if not isinstance(scale_type, str):
        raise LissomError(f"a type of scaling is a string, not {type(scale_type).__name__}")
    text = FAST if scale_type == "dWr" else scale_type
    weights = dict.fromkeys("dwgr", 0.0)
    if text and set(text) <= set(weights) and len(set(text)) == len(text):
        weights |= dict.fromkeys(text, 1.0)
    else:
        terms = [_TERM.fullmatch(term) for term in text.split("_")]
        letters = [term[1] for term in terms if term]
        if not all(terms) or len(set(letters)) < len(letters):
            raise LissomError(
                f"{scale_type!r} is no type of scaling; letters of d, w, g and r once each are one (dwr), letters with "
                f"weights (d1_w8_g8_r1), and the presets {', '.join(PRESETS)}"
            )
        weights |= {term[1]: float(term[2]) for term in terms if term}
    if not any(weights.values()):
        raise LissomError(f"all weights of {scale_type!r} are 0; nothing would grow")
    return weights


def exponents(scale_type: str) -> dict[str, float]:
    """e_d, e_w and e_r of a type, and the exponents that ``params`` and ``activations`` grow with by the paper's
    count for plain convolutions (section 4): under the names ``d``, ``w``, ``r``, ``params``, ``activations``."""
    weights = _weights(scale_type)
    whole = weights["d"] + weights["w"] + weights["r"]
    if not whole:
        raise LissomError(f"{scale_type!r} changes groups alone; it has no exponents of depth, width and image")
    d, w, r = (weights[letter] / whole for letter in "dwr")
    return {"d": d, "w": w, "r": r, "params": d + w, "activations": d + w / 2 + r}


def scaling_factors(scale_type: str, factor: float) -> Factors:
    """Factors of a type (a preset, "d1_w8_g8_r1", ...) for ``factor`` times the multiply-adds: d w^2 r^2 = factor.

    Weights are divided by the sum of those of d, w and r; in "g" alone by half of its own. Raises LissomError for
    another type, and a factor that is not above 0.
    """
    weights = _weights(scale_type)
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 < factor < math.inf:
        raise LissomError(f"the factor is {factor!r}; it is a number above 0")
    whole = weights["d"] + weights["w"] + weights["r"] or weights["g"] / 2
    return Factors(
        factor ** (weights["d"] / whole),
        factor ** (weights["w"] / (2 * whole)),
        factor ** (weights["g"] / (2 * whole)),
        factor ** (weights["r"] / (2 * whole)),
    )


# Rounding. Python's round goes to the even neighbour of a half, and so do these rules.


def _depth(depth: int, by: float) -> int:
    return max(1, round(depth * by))


def _width(width: int, by: float) -> int:
    return STEP * max(1, round(width * by / STEP))


def _group(group: int, by: float) -> int:
    wide = max(1, round(group * by))
    if wide <= 2:
        return wide
    return 4 if wide <= 5 else STEP * round(wide / STEP)


def _side(side: int, by: float) -> int:
    return IMAGE_STEP * max(1, round(side * by / IMAGE_STEP))


def adjust_block_compatibility(
    widths: tuple[int, ...], bottlenecks: tuple[float, ...], group_widths: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Widths and group widths that fit each other, stage by stage: groups divide what is inside a block.

    The inside, v = widths * bottlenecks, goes to the nearest multiple of the group, which is no wider than v; a group
    width of 0 means one group of all. Raises LissomError where no width gives an inside that groups divide.
    """
    found = []
    for width, share, group in zip(widths, bottlenecks, group_widths, strict=True):
        inside = int(max(1, width * share))
        whole = group == 0
        group = int(min(group or inside, inside))
        step = math.lcm(group, int(share)) if share > 1 else group
        inside = max(step, int(round(inside / step) * step))
        width = int(inside / share)
        if round(width * share) % group:
            raise LissomError(
                f"no width near {width} with a bottleneck of {share:g} can be divided into groups of {group}"
            )
        found.append((width, 0 if whole else group))
    return tuple(width for width, _ in found), tuple(group for _, group in found)


def scale_config(stages: Stages, scale_type: str = "dWr", factor: float = 1.0) -> Stages:
    """The settings of the network that is ``stages`` scaled by ``factor``.

    Depths are rounded to whole blocks, widths to multiples of 8, group widths to 1, 2, 4 or multiples of 8, image sizes
    to multiples of 4, the test size as the training size. An EfficientNet's stem and head are scaled with its widths
    and it has no groups; the stem of a RegNet or ResNet stays, and its widths are made to fit its groups. A convolution
    with one group of all keeps one. A ``factor`` of 1 changes nothing but such roundings.
    """
    by = scaling_factors(scale_type, factor)
    widths = tuple(_width(width, by.width) for width in stages.widths)
    scaled = replace(
        stages, depths=tuple(_depth(depth, by.depth) for depth in stages.depths),
        train_size=_side(stages.train_size, by.resolution), test_size=_side(stages.test_size, by.resolution),
    )  # fmt: skip
    if stages.family == "efficientnet":
        head = _width(stages.head, by.width) if stages.head else 0
        return replace(scaled, widths=widths, stem=_width(stages.stem, by.width), head=head)
    groups = tuple(_group(group, by.group) if group else 0 for group in stages.group_widths)
    widths, groups = adjust_block_compatibility(widths, stages.bottlenecks, groups)
    return replace(scaled, widths=widths, group_widths=groups)


# Networks


@dataclass(frozen=True, eq=False)
class Scaled:
    """A scaled network, with random weights in training mode, and what became of it.

    ``name`` is the network it was made of, ``type`` and ``factor`` how; ``before`` and ``after`` its settings, and
    ``cost_before`` and ``cost_after`` what one image costs, each at its own training size.
    """

    model: nn.Module
    name: str
    type: str
    factor: float
    before: Stages
    after: Stages
    cost_before: Complexity
    cost_after: Complexity

    @property
    def ratios(self) -> dict[str, float]:
        """The true factors, after rounding, of ``macs``, ``params`` and ``activations``."""
        return self.cost_after.over(self.cost_before)

    def __str__(self) -> str:
        lines = [f"{self.name}, {self.type}, {self.factor:g} times the multiply-adds asked"]
        for what, stages, cost in (
            ("before", self.before, self.cost_before),
            ("after", self.after, self.cost_after),
        ):
            lines.append(
                f"  {what}: {stages}; {cost.macs / 1e6:.1f} M multiply-adds, {cost.params / 1e6:.2f} M parameters, "
                f"{cost.activations / 1e6:.2f} M activations"
            )
        found = self.ratios
        lines.append(
            f"  counted: x{found['macs']:.2f} multiply-adds, x{found['params']:.2f} parameters, "
            f"x{found['activations']:.2f} activations"
        )
        return "\n".join(lines)


def scale(
    model: str | nn.Module | Stages,
    factor: float,
    type: str = "dWr",
    *,
    alpha: float | None = None,
    image_size: int | None = None,
    **kwargs: Any,
) -> Scaled | Stages:
    """A network with ``factor`` times the multiply-adds of ``model``, by a rule of arXiv 2103.06877.

    ``model`` is one of timm's EfficientNets, RegNets or ResNets, or the name of one; of settings (``Stages``), settings
    are returned. ``type`` is "dWr" (fast compound scaling, mostly wider), "dwr" (uniform), "d", "w", "r", "dw", "dr",
    "wr", "wg", or weights of one's own, as "d1_w8_g8_r1"; or ``alpha``, the share that goes into the width, in its
    place. A factor below 1 makes the network smaller. ``image_size`` is the side of the images that ``model`` is meant
    for, before they are scaled; by default what its ``default_cfg`` says. ``kwargs`` are the network's own
    (``num_classes``, ...).

    The new network's weights are random: scaling says what to train, and nothing of trained weights is kept. Its
    ``default_cfg`` has the scaled image size. Sizes are rounded, so the factor comes out another than was asked;
    ``ratios`` of the result counts it.

        net = lissom.scale("regnety_004", 4)
        net.model, net.ratios["activations"]

    Raises LissomError for an unknown name or type and a factor that is not above 0, NotApplicable for networks of other
    kinds.
    """
    if alpha is not None:
        if type != "dWr":
            raise LissomError(f"give a type ({type}) or alpha ({alpha}), not both")
        type = type_of_alpha(alpha)
    if isinstance(model, Stages):
        if kwargs or image_size is not None:
            names = ", ".join([*kwargs, *["image_size"] * (image_size is not None)])
            raise LissomError(f"{names} belongs to a network, and settings were given")
        return scale_config(model, type, factor)
    return scale_network(model, factor, type, image_size=image_size, **kwargs)


def scale_network(
    model: str | nn.Module, factor: float, type: str = "dWr", *, image_size: int | None = None, **kwargs: Any
) -> Scaled:
    """``scale`` of a network or the name of one, by a type."""
    given = {name: value for name, value in kwargs.items() if name in ("num_classes", "in_chans")}
    if isinstance(model, str):
        with torch.device("meta"):
            original = create_model(model, **given)
    elif isinstance(model, nn.Module):
        original = model
    else:
        raise LissomError(f"scale takes a network, the name of one, or settings, not {_kind(model)}")
    before = read_stages(original)
    if image_size is not None:
        if image_size < 1:
            raise LissomError(f"image_size is {image_size}; it is at least 1")
        test_size = round(image_size * before.test_size / before.train_size)  # the ratio of the two stays
        before = replace(before, train_size=image_size, test_size=test_size)
    after = scale_config(before, type, factor)
    with torch.device("meta"):
        small = with_stages(original, before, **kwargs)
        large = with_stages(original, after, check=False, **kwargs)
    costs = [
        complexity(network, (in_channels(network), stages.train_size, stages.train_size))
        for network, stages in ((small, before), (large, after))
    ]
    name = model if isinstance(model, str) else str(dict(original.default_cfg)["architecture"])  # type: ignore[arg-type]
    built = with_stages(original, after, check=False, **kwargs)
    return Scaled(built, name, type, float(factor), before, after, costs[0], costs[1])


def _kind(value: Any) -> str:
    return value.__class__.__name__
