"""crop: fewer channels in convolutions and linear layers, a dense narrower network (PreCrop, 2203.02549, and pruning).

Channels that belong together are removed together (torch-pruning's dependency graph, DepGraph, arXiv 2301.12900; see
``lissom.layers.channels``), and only such that leave the rest of the network exactly what it was: what an operator
mixes is left alone. How many a layer loses follows from layer-wise densities, the same for all or PreCrop's
(``lissom.training.densities``, ``precropping``), corrected until the whole network keeps its share. Which ones go is
said by their weights, or by what the next layers read of them. A training mends the rest.

No mask stays, so that every runtime gains: the operators are the same, on smaller tensors.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import nn

from lissom.errors import LissomError, NotApplicable
from lissom.export.capture import clone
from lissom.export.plan import Plan
from lissom.layers.channel_importance import activation_scores, best_units, magnitude_scores, random_scores
from lissom.layers.channels import Channels, Group, find_channels, narrow
from lissom.layers.exits import first_tensor
from lissom.layers.low_rank import LowRankLayer
from lissom.registry import register
from lissom.runtime.target import Target
from lissom.tasks.task import Task
from lissom.techniques.base import Probe, Technique
from lissom.training.methods.narrowed import Narrowed
from lissom.training.precropping import (
    SOURCES,
    draw_anew,
    fitted_widths,
    inner_groups,
    layer_densities,
    width_factors,
)

__all__ = ["Crop"]

IMPORTANCE = ("magnitude", "activation", "random")
COSTS = ("macs", "parameters")
LEAST = 0.1  # of its channels a layer keeps
IMAGES, BATCH = 256, 32  # that activations are looked at on
NAMED = 4  # how many layers a note names

_known: weakref.WeakKeyDictionary[nn.Module, dict[tuple[int, ...], Channels]] = weakref.WeakKeyDictionary()


@register("technique", "crop")
@dataclass(frozen=True)
class Crop(Technique):
    """Remove channels.

    ``keep``: the share that is left of the multiplications of convolutions and linear layers, or of the "parameters"
    (``of``). ``importance`` ranks the channels of a layer: "magnitude", all weights a channel has; "activation", what
    the next layers lose, read from a few training images, which needs ``settle``; "random", the control, drawn by
    ``seed``. ``densities`` shares the cut out among the layers: "uniform" gives all widths the same factor,
    "closed_form", "synflow" and "erk" are PreCrop's, for networks that are not trained yet, or trained anew (``fresh``:
    weights are drawn anew, as PreCrop does; else those of the channels that stay are kept).

    ``streams``: whether channels that several layers add to (the stream of a residual network) are removed too; None:
    only where the blocks' inner widths do not suffice. ``multiple``: widths are multiples of it, less in narrow layers,
    since kernels work on several channels at once. ``skip``: paths of layers whose outputs stay. No layer is left with
    less than a tenth of its channels.

    ``kept``: what is left, decided already: (layer, hexadecimal mask of its channels, the first the highest bit).
    ``settle`` writes it for "activation"; the knobs that decide are then not heard.
    """

    name: ClassVar[str] = "crop"
    stage: ClassVar[str] = "structure"
    turn: ClassVar[int] = -1  # in front of low_rank: ranks are those of the layers that are left
    refuses: ClassVar[Mapping[str, str]] = {
        "cascade": "what changes a network stands in the members: cascade(first=(crop()), second=(crop()))",
        "converting": "converting labels images by the network as it is, and crop changes it; slim with crop first, "
        "and convert what comes of it",
    }

    keep: float = 0.5
    importance: str = "magnitude"
    of: str = "macs"
    densities: str = "uniform"
    streams: bool | None = None
    multiple: int = 8
    skip: tuple[str, ...] = ()
    fresh: bool = False
    seed: int = 0
    kept: tuple[tuple[str, str], ...] | None = None

    def __post_init__(self) -> None:
        number = isinstance(self.keep, int | float) and not isinstance(self.keep, bool) and math.isfinite(self.keep)
        whole = isinstance(self.multiple, int) and not isinstance(self.multiple, bool)
        drawn = isinstance(self.seed, int) and not isinstance(self.seed, bool) and 0 <= self.seed < 2**63
        for wrong, sentence in (
            (not number or not 0 < self.keep < 1, f"keep is a share between 0 and 1, not {self.keep!r}"),
            (self.importance not in IMPORTANCE, f"importance is {_or(IMPORTANCE)}, not {self.importance!r}"),
            (self.of not in COSTS, f"of is {_or(COSTS)}, not {self.of!r}"),
            (self.densities not in SOURCES, f"densities is {_or(SOURCES)}, not {self.densities!r}"),
            (self.streams not in (True, False, None), f"streams is True, False or None, not {self.streams!r}"),
            (not whole or self.multiple < 1, f"multiple is a whole number, at least 1, not {self.multiple!r}"),
            (not isinstance(self.fresh, bool), f"fresh is True or False, not {self.fresh!r}"),
            (not drawn, f"seed is a whole number, at least 0, not {self.seed!r}"),
            (
                not isinstance(self.skip, tuple) or not all(s and isinstance(s, str) for s in self.skip),
                "skip is a tuple of module paths, as in skip=('layer4.1.conv1',)",
            ),
            (
                self.kept is not None and not (isinstance(self.kept, tuple) and all(map(_layer_and_mask, self.kept))),
                "kept is a tuple of (path, hexadecimal mask), as in kept=(('layer1.0.conv1', 'ff0f'),)",
            ),
        ):
            if wrong:
                raise ValueError(sentence)

    def check(self, plan: Plan, target: Target) -> None:
        if len(plan.stages) != 1 or plan.decisions:
            raise NotApplicable("crop comes before exits and cascades: it changes one whole model")
        if not any(isinstance(m, nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear) for m in plan.model.modules()):
            raise NotApplicable("crop removes channels of convolutions and linear layers, and the model has neither")
        paths = {path for path, _ in plan.model.named_modules()}
        for entry in self.skip:
            if entry not in paths:
                raise NotApplicable(f"crop is to leave {entry!r} alone, but the model has no module of that path")

    def apply(self, plan: Plan, task: Task) -> Plan:
        """The plan with a narrower model, a note on what was removed, and a wish to be trained.

        Raises NotApplicable where no channels can be removed exactly, where the share cannot be reached, and where
        "activation" was not settled.
        """
        found = _channels(plan.model, task.shape)
        kept = self._given(found) if self.kept is not None else self._chosen(plan.model, found, task)
        model = narrow(clone(plan.model), found, kept)
        if self.fresh:
            draw_anew(model)
            model.eval()
        before, after = _shapes(plan.model, task.shape), _shapes(model, task.shape)
        narrowed = tuple(path for path, shape in after.items() if before.get(path) != shape)
        if "" in narrowed:
            raise NotApplicable(f"crop: the model's answer would be {after['']} and not {before['']}")
        changed = plan.with_model(model, self._note(found, kept))
        return changed.with_recovery(Narrowed(narrowed))

    @classmethod
    def space(cls, plan: Plan, target: Target) -> Mapping[str, Sequence[Any]]:
        return {"keep": (0.35, 0.5, 0.65, 0.8), "importance": ("magnitude", "activation")}

    def settle(self, plan: Plan, task: Task, probe: Probe) -> Self:
        """The same technique with ``kept`` decided for "activation", on at most 256 images of ``fit`` (of ``choose``,
        where there is nothing to train on); itself where it is decided, or needs no data. Nothing is measured.

        Raises NotApplicable as ``apply`` does.
        """
        if self.importance != "activation" or self.kept is not None:
            return self
        found = _channels(plan.model, task.shape)
        widths = self._widths(plan.model, found, task.shape)
        split = task.fit if task.fit is not None and len(task.fit) else task.choose
        few = split.sample(IMAGES, 0)

        def images() -> Iterator[torch.Tensor]:
            for start in range(0, len(few), BATCH):
                yield torch.from_numpy(few.inputs(slice(start, min(start + BATCH, len(few)))))

        units = best_units(activation_scores(plan.model, found, images()), widths)
        masks = {name: _mask(indices, found.groups[name].size) for name, indices in units.items()}
        return replace(self, kept=tuple(masks.items()))

    def _given(self, found: Channels) -> dict[str, list[int]]:
        """The units that ``kept`` names."""
        units = {}
        for name, mask in self.kept or ():
            group = found.groups.get(name)
            if group is None:
                why = found.left.get(name, "a technique in front of it may have changed the network")
                raise NotApplicable(f"crop knows no channels to remove at {name!r}: {why}")
            units[name] = _units(name, mask, group.size)
        return units

    def _chosen(self, model: nn.Module, found: Channels, task: Task) -> dict[str, list[int]]:
        if self.importance == "activation":
            raise NotApplicable(
                "crop by activation reads images, which is done before a recipe is applied (settle); "
                "importance='magnitude' needs none"
            )
        widths = self._widths(model, found, task.shape)
        scores = magnitude_scores(model, found) if self.importance == "magnitude" else random_scores(found, self.seed)
        return best_units(scores, widths)

    def _widths(self, model: nn.Module, found: Channels, shape: tuple[int, ...]) -> dict[str, int]:
        """How many channels every group keeps, those that lose none left out."""
        every = [name for name in found.groups if not self._stays(model, found, name)]
        inner = [name for name in inner_groups(found) if name in set(every)]
        if not every:
            raise NotApplicable("crop finds no channels that it may remove; leave out skip=")
        densities = self._densities(model, found, shape)
        tries = {None: [inner, every], True: [every], False: [inner]}[self.streams]
        refused: NotApplicable | None = None
        for names in tries:
            try:
                factors = width_factors(found, densities, names) if densities else dict.fromkeys(names, 1.0)
                parameters, macs = self._budget
                widths = fitted_widths(
                    found, factors, parameters=parameters, macs=macs, multiple=self.multiple, least=LEAST
                )
            except NotApplicable as error:
                refused = error
            else:
                return {name: width for name, width in widths.items() if width < found.groups[name].size}
        assert refused is not None
        raise NotApplicable(f"crop(keep={self.keep:g}): {refused}") from refused

    def _densities(self, model: nn.Module, found: Channels, shape: tuple[int, ...]) -> dict[str, float]:
        """Layer -> density; none where all widths have the same factor."""
        if self.densities == "uniform":
            return {}
        parameters, macs = self._budget
        try:
            return layer_densities(model, shape, found, source=self.densities, parameters=parameters, macs=macs)
        except LissomError as error:
            raise NotApplicable(f"crop(densities={self.densities!r}): {error}") from error

    @property
    def _budget(self) -> tuple[float | None, float | None]:
        """(share of the parameters, share of the multiplications)."""
        return (None, self.keep) if self.of == "macs" else (self.keep, None)

    def _stays(self, model: nn.Module, found: Channels, name: str) -> bool:
        group = found.groups[name]
        writers = found.writers(group)
        return any(_means(entry, path) for entry in self.skip for path in writers) or _is_rank(model, group)

    def _note(self, found: Channels, kept: Mapping[str, Sequence[int]]) -> str:
        widths = {name: len(units) for name, units in kept.items()}
        pairs = zip(found.cost(widths), found.cost(), strict=True)
        parameters, macs = (after / before if before else 1.0 for after, before in pairs)
        gone = sum(found.groups[name].size - width for name, width in widths.items())
        paths = list(found.left)
        more = f" and {len(paths) - NAMED} more" if len(paths) > NAMED else ""
        left = f"; left alone: {', '.join(f'{p} ({found.left[p]})' for p in paths[:NAMED])}{more}" if paths else ""
        return (
            f"crop removed {gone} channels in {len(widths)} of {len(found.groups)} places, which leaves "
            f"{parameters:.0%} of the parameters and {macs:.0%} of the layers' multiplications{left}"
        )


def _channels(model: nn.Module, shape: tuple[int, ...]) -> Channels:
    """What can be removed, found once for a model and a shape."""
    cache = _known.setdefault(model, {})
    if shape not in cache:
        cache[shape] = find_channels(model, shape)
    return cache[shape]


@torch.no_grad()
def _shapes(model: nn.Module, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Module path -> shape of its last output, for one input of zeros; "" is the model itself."""
    seen: dict[str, tuple[int, ...]] = {}
    handles = []
    for path, module in model.named_modules():

        def look(module: nn.Module, inputs: Any, output: Any, path: str = path) -> None:
            found = first_tensor(output)
            seen[path] = () if found is None else tuple(found.shape)

        handles.append(module.register_forward_hook(look))
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    try:
        model(torch.zeros(1, *shape, device=device))
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _is_rank(model: nn.Module, group: Group) -> bool:
    """Whether the channels are those between the two thin layers of low_rank, whose number is a rank."""
    paths = [axis.path for axis in group.places]
    parent = paths[0].rpartition(".")[0]
    return isinstance(model.get_submodule(parent), LowRankLayer) and all(p.startswith(f"{parent}.") for p in paths)


def _means(entry: str, path: str) -> bool:
    return path == entry or path.startswith(f"{entry}.")


def _mask(units: Sequence[int], size: int) -> str:
    """The units as bits of a hexadecimal number, the first unit the highest bit."""
    digits = -(-size // 4)
    number = sum(1 << (4 * digits - 1 - unit) for unit in units)
    return f"{number:0{digits}x}"


def _units(name: str, mask: str, size: int) -> list[int]:
    """The units of a mask. Raises NotApplicable where it is of another number of channels."""
    digits = -(-size // 4)
    number = int(mask, 16)
    units = [unit for unit in range(size) if number >> (4 * digits - 1 - unit) & 1]
    if len(mask) != digits or len(units) != number.bit_count() or not units:
        raise NotApplicable(
            f"crop's mask {mask!r} is not one of the {size} channels at {name!r}: {digits} digits, at least one bit set"
        )
    return units


def _layer_and_mask(item: Any) -> bool:
    return (
        isinstance(item, tuple)
        and len(item) == 2
        and all(isinstance(part, str) and part for part in item)
        and all(digit in "0123456789abcdef" for digit in item[1])
    )


def _or(values: Sequence[str]) -> str:
    return " or ".join(map(repr, values))
