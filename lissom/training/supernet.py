"""A super-network from a user's own trained model: hidden widths, attention heads and depth made elastic.

As Once-for-All (arXiv 1908.09791) does it with a network of its own design, for any network whose channels can be
followed (``lissom.layers.channels``): what is kept of a width are its most important channels or heads, by the norm of
all weights that they have (DepGraph, arXiv 2301.12900), so that a smaller width lies in every larger one. Blocks that
take and give a tensor of one shape may be left out, those first that change a drawn input least.

A sub-network is the user's own network with smaller layers. Running it inside the super-network means running that
very module on slices of the shared weights; so the extracted network answers the same to the bit, and a small
sub-network costs as little in training as it will afterwards.
"""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from lissom.errors import LissomError, NotApplicable
from lissom.layers.channel_importance import magnitude_scores
from lissom.layers.channels import Axis, Channels, find_channels, narrow
from lissom.layers.elastic import Dimension, Setting, check_setting, largest, make_divisible
from lissom.training.methods.pela import block_paths

__all__ = ["SuperNetwork", "supernet_of"]

WIDTHS = (0.5, 0.75, 1.0)
SHARE_OF_BLOCKS = 0.25
KEPT = 16  # sub-networks held ready
ROUNDED = 32  # widths from here on stay multiples of 8


@dataclass(frozen=True)
class _Row:
    """Blocks of one parent that may be left out, by their paths; ``order``: their numbers, the least important first,
    in a buffer of the super-network."""

    parent: str
    paths: tuple[str, ...]
    order: str


@dataclass
class _Ready:
    """A sub-network's module, and for each of its tensors the indices along each dimension (None: all)."""

    module: nn.Module
    slices: dict[str, tuple[torch.Tensor | None, ...]]


def supernet_of(
    model: nn.Module,
    shape: Sequence[int],
    *,
    widths: Sequence[float] = WIDTHS,
    heads: Sequence[float] = WIDTHS,
    streams: Sequence[float] = (1.0,),
    blocks: float = SHARE_OF_BLOCKS,
) -> SuperNetwork:
    """The super-network around ``model``, whose weights it shares, for inputs of ``shape`` (C, H, W).

    ``widths``: shares of the hidden channels that a sub-network may keep, in every layer by itself. ``heads``: of
    attention's heads, in layers like timm's (``qkv``, ``proj``, ``num_heads``). ``streams``: of channels that several
    layers add to, as in a residual network's stages; left whole by default. ``blocks``: the least share that stays of
    each row of blocks that can be left out; 1 keeps all. 1.0 is always among the shares.

    Raises LissomError for shares that are not above 0 and at most 1, NotApplicable where nothing can be made elastic.
    """
    for name, shares in (("widths", widths), ("heads", heads), ("streams", streams), ("blocks", (blocks,))):
        if not all(0 < share <= 1 for share in shares):
            raise LissomError(f"{name} are shares above 0 and at most 1, not {', '.join(map(str, shares))}")
    left: dict[str, str] = {}
    channels: Channels | None = None
    try:
        channels = find_channels(model, tuple(shape))
        left.update(channels.left)
    except NotApplicable as reason:
        left[""] = str(reason)
    found = SuperNetwork(model, tuple(shape), channels, left)
    found._open(_shares(widths), _shares(heads), _shares(streams), blocks)
    if not found.dimensions():
        why = next(iter(left.values()), "it has no hidden channels, heads or blocks to spare")
        raise NotApplicable(f"nothing of {type(model).__name__} can be made elastic: {why}")
    return found


def _shares(values: Sequence[float]) -> tuple[float, ...]:
    return tuple(sorted({*values, 1.0}))


class SuperNetwork(nn.Module):
    """A user's network with sizes that can be set; made by ``supernet_of``.

    Dimensions: ``<layer>.width`` (kind "expand"), ``<stream>.width`` (kind "width"), ``<attention>.heads``: the share
    kept; ``<row>.depth``: 0, or how many blocks fewer as a negative number. ``left`` says of layers why they stay.
    """

    active: dict[str, Any]

    def __init__(
        self, model: nn.Module, shape: tuple[int, ...], channels: Channels | None, left: Mapping[str, str]
    ) -> None:
        super().__init__()
        self.model = model
        self.shape, self.channels, self.left = shape, channels, dict(left)
        self._attentions = {path: module for path, module in _attentions(model).items() if self._heads_can_go(path)}
        self._rows: tuple[_Row, ...] = ()
        self._dimensions: tuple[Dimension, ...] = ()
        self._ready: OrderedDict[tuple[Any, ...], _Ready] = OrderedDict()
        self.active = {}
        # The order of importance travels with the weights: they may be loaded into a network made of others.
        groups = channels.groups if channels is not None else {}
        scores = magnitude_scores(model, channels) if channels is not None else {}
        self._group_order = {name: f"order_of_group_{number}" for number, name in enumerate(groups)}
        self._head_order = {path: f"order_of_heads_{number}" for number, path in enumerate(self._attentions)}
        for name, buffer in self._group_order.items():
            self.register_buffer(buffer, torch.argsort(scores[name], descending=True, stable=True))
        for path, buffer in self._head_order.items():
            order = torch.argsort(_head_scores(self._attentions[path]), descending=True, stable=True)
            self.register_buffer(buffer, order)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_ready": OrderedDict()}  # copies make theirs anew

    def _heads_can_go(self, path: str) -> bool:
        """Whether the attention answers alike without some heads as with what reads them at zero."""
        if _exact_heads(self.model.get_submodule(path)):
            return True
        self.left[path] = "without some of its heads it does not answer as with them at zero"
        return False

    def _open(
        self, widths: tuple[float, ...], heads: tuple[float, ...], streams: tuple[float, ...], blocks: float
    ) -> None:
        found = []
        inside = {Axis(f"{path}.qkv", "out") for path in self._attentions}
        inside |= {Axis(f"{path}.proj", "in") for path in self._attentions}
        for name, group in (self.channels.groups if self.channels is not None else {}).items():
            if inside & set(group.places):
                continue  # heads say what goes there
            shares = streams if group.stream else widths
            values = _distinct(shares, lambda share, size=group.size: _count(size, share))  # type: ignore[misc]
            if len(values) > 1:
                found.append(Dimension(f"{name}.width", "width" if group.stream else "expand", values))
        for path, module in self._attentions.items():
            count = int(module.num_heads)  # type: ignore[arg-type]
            values = _distinct(heads, lambda share, count=count: max(1, round(count * share)))  # type: ignore[misc]
            if len(values) > 1:
                found.append(Dimension(f"{path}.heads", "heads", values))
        changes = _changes(self.model, self.shape) if blocks < 1 else {}
        for number, (parent, change) in enumerate(changes.items()):
            row = _Row(parent, tuple(change), f"order_of_blocks_{number}")
            self._rows = (*self._rows, row)
            self.register_buffer(row.order, torch.argsort(torch.tensor(list(change.values())), stable=True))
            spare = len(row.paths) - math.ceil(blocks * len(row.paths))
            if spare:
                found.append(Dimension(f"{row.parent}.depth", "depth", tuple(range(-spare, 1))))
        self._dimensions = tuple(found)
        self.set_active({})

    # The protocol of super-networks

    def dimensions(self) -> tuple[Dimension, ...]:
        return self._dimensions

    def set_active(self, setting: Setting) -> None:
        """Run this sub-network from now on; dimensions that are not named are at their largest.

        Raises LissomError for a name or a value that the network does not have.
        """
        self.active = check_setting(self, setting)

    def uniform(self, **shares: float) -> dict[str, Any]:
        """The setting that keeps of every dimension of a kind (expand, width, heads, depth) the named share, or the
        nearest value that it has; kinds that are not named stay whole."""
        setting: dict[str, Any] = {}
        for d in self.dimensions():
            wanted = shares.get(d.kind, 1.0)
            if d.kind == "depth":
                row = next(row for row in self._rows if f"{row.parent}.depth" == d.name)
                wanted = -round((1 - wanted) * len(row.paths))
            setting[d.name] = min(d.values, key=lambda value: abs(value - wanted))
        return setting

    def forward(self, x: torch.Tensor) -> Any:
        if self.active == largest(self):
            return self.model(x)
        ready = self._sub()
        modes = {name: module.training for name, module in self.model.named_modules()}
        for name, module in ready.module.named_modules():
            module.training = modes[name]
        return functional_call(ready.module, self._sliced(ready), (x,))

    @torch.no_grad()
    def extract(self, setting: Setting | None = None) -> nn.Module:
        """The sub-network of ``setting`` (None: the active one) as a network of the user's own class, with weights of
        its own, in the mode of the super-network. Raises LissomError as ``set_active``."""
        before = self.active
        try:
            if setting is not None:
                self.set_active(setting)
            if self.active == largest(self):
                return copy.deepcopy(self.model)
            ready = self._sub()
            made, values = copy.deepcopy(ready.module), self._sliced(ready)
            own = [*made.named_parameters(remove_duplicate=False), *made.named_buffers(remove_duplicate=False)]
            modes = {name: module.training for name, module in self.model.named_modules()}
            flags = dict(self.model.named_parameters(remove_duplicate=False))
            for name, tensor in own:
                tensor.data = values[name].detach().clone()
                if name in flags:
                    tensor.requires_grad_(flags[name].requires_grad)
            for name, module in made.named_modules():
                module.training = modes[name]
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    # The module held ready may have been made while statistics were left alone.
                    norm: Any = self.model.get_submodule(name)
                    module.momentum = norm.momentum
                    if norm.num_batches_tracked is not None:
                        module.num_batches_tracked = norm.num_batches_tracked.clone()
            return made
        finally:
            self.active = before

    # Sub-networks

    def _sub(self) -> _Ready:
        """The active sub-network, made or held ready."""
        orders = [*self._group_order.values(), *self._head_order.values(), *(row.order for row in self._rows)]
        key = (*self.active.values(), *(tuple(self.get_buffer(name).tolist()) for name in orders))
        if key in self._ready:
            self._ready.move_to_end(key)
            return self._ready[key]
        with torch.no_grad():
            plain = copy.deepcopy(self.model)
            numbered = copy.deepcopy(self.model).double()
            for _, tensor in [*numbered.named_parameters(), *numbered.named_buffers()]:
                if tensor.is_floating_point():
                    tensor.data = torch.arange(tensor.numel(), dtype=torch.float64).reshape(tensor.shape)
            for module in (plain, numbered):
                self._cut(module)
            slices = {}
            sources = _tensors(self.model)
            for name, tensor in _tensors(numbered).items():
                slices[name] = _indices(tensor, sources[name]) if tensor.is_floating_point() else ()
        self._ready[key] = made = _Ready(plain, slices)
        while len(self._ready) > KEPT:
            self._ready.popitem(last=False)
        return made

    def _cut(self, module: nn.Module) -> None:
        """Make ``module``, a copy of the whole network, the active sub-network in structure."""
        kept: dict[str, list[int]] = {}
        for d in self.dimensions():
            value = self.active[d.name]
            if d.kind in ("expand", "width") and value < 1:
                name = d.name.removesuffix(".width")
                assert self.channels is not None
                count = _count(self.channels.groups[name].size, value)
                kept[name] = sorted(self.get_buffer(self._group_order[name])[:count].tolist())
            elif d.kind == "heads" and value < 1:
                path = d.name.removesuffix(".heads")
                order = self.get_buffer(self._head_order[path])
                _keep_heads(module.get_submodule(path), sorted(order[: max(1, round(len(order) * value))].tolist()))
        if kept:
            assert self.channels is not None
            narrow(module, self.channels, kept)
        for path in self._left_out(self.active):
            parent, _, name = path.rpartition(".")
            setattr(module.get_submodule(parent), name, nn.Identity())

    def _left_out(self, setting: Setting) -> list[str]:
        """Paths of the blocks that the setting's depths leave out."""
        gone = []
        for row in self._rows:
            fewer = -int(setting.get(f"{row.parent}.depth", 0))
            gone += [row.paths[number] for number in self.get_buffer(row.order)[:fewer].tolist()]
        return gone

    def left_out(self, setting: Setting) -> tuple[str, ...]:
        """Paths of the blocks that this setting's depths leave out. Raises LissomError as ``set_active``."""
        return tuple(self._left_out(check_setting(self, setting)))

    def dead(self, setting: Setting) -> frozenset[str]:
        """The dimensions that change nothing at this setting: those inside blocks that its depths leave out.

        Raises LissomError as ``set_active``.
        """
        gone = tuple(f"{path}." for path in self.left_out(setting))
        return frozenset(d.name for d in self.dimensions() if d.name.startswith(gone))

    def _sliced(self, ready: _Ready) -> dict[str, torch.Tensor]:
        """The sub-network's tensors, cut out of the shared ones with their gradients."""
        found = {}
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        for name, source in _tensors(self.model).items():
            if name not in ready.slices:
                continue  # of a block that is left out
            if name not in parameters:
                source = source.clone()  # a norm in training writes its statistics, which are the whole network's
            for dim, index in enumerate(ready.slices[name]):
                if index is not None:
                    source = source.index_select(dim, index.to(source.device))
            found[name] = source
        return found


def _tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers under all their names."""
    return {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }


def _indices(numbers: torch.Tensor, source: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """Along each dimension of ``source``, which elements are left in ``numbers``, where each element is numbered."""
    found: list[torch.Tensor | None] = []
    for dim, size in enumerate(source.shape):
        if numbers.shape[dim] == size:
            found.append(None)
            continue
        line = numbers.movedim(dim, 0).reshape(numbers.shape[dim], -1)[:, 0].long()
        behind = math.prod(source.shape[dim + 1 :])
        found.append(line // behind % size)
    return tuple(found)


def _count(size: int, share: float) -> int:
    """How many channels a share of ``size`` is: multiples of 8 for wide layers, never none."""
    if share >= 1:
        return size
    count = max(1, round(size * share))
    return min(size, make_divisible(count)) if size >= ROUNDED else count


def _distinct(shares: Sequence[float], count: Any) -> tuple[float, ...]:
    """The shares that make different numbers; of those that make one number the largest."""
    return tuple(sorted({count(share): share for share in sorted(shares)}.values()))


# Attention


def _attentions(model: nn.Module) -> dict[str, nn.Module]:
    """Attention as timm writes it: one linear layer for queries, keys and values, a width of its own for all heads."""
    found = {}
    for path, module in model.named_modules():
        parts: Any = module
        if not all(hasattr(parts, name) for name in ("qkv", "proj", "num_heads", "head_dim", "attn_dim")):
            continue
        linear = type(parts.qkv) is nn.Linear and type(parts.proj) is nn.Linear
        if linear and path and len(parts.qkv.weight) == 3 * parts.attn_dim == 3 * parts.num_heads * parts.head_dim:
            found[path] = module
    return found


def _head_scores(attention: nn.Module) -> torch.Tensor:
    """float64 (heads,): the norm of all that a head has, each layer's part over its mean, as for channels."""
    parts: Any = attention
    heads, width = parts.num_heads, parts.head_dim
    rows = parts.qkv.weight.detach().double().cpu().square().sum(1).reshape(3, heads, width).sum((0, 2))
    columns = parts.proj.weight.detach().double().cpu().square().sum(0).reshape(heads, width).sum(1)
    return (rows / rows.mean().clamp_min(1e-30) + columns / columns.mean().clamp_min(1e-30)).div(2).sqrt()


@torch.no_grad()
def _keep_heads(attention: nn.Module, heads: Sequence[int]) -> None:
    """Keep, in place, only these heads."""
    parts: Any = attention
    width, whole = parts.head_dim, parts.attn_dim
    index = torch.tensor([head * width + i for head in heads for i in range(width)])
    rows = torch.cat([index + part * whole for part in range(3)])
    qkv, proj = parts.qkv, parts.proj
    qkv.weight = nn.Parameter(qkv.weight[rows.to(qkv.weight.device)], qkv.weight.requires_grad)
    if qkv.bias is not None:
        qkv.bias = nn.Parameter(qkv.bias[rows.to(qkv.bias.device)], qkv.bias.requires_grad)
    proj.weight = nn.Parameter(proj.weight[:, index.to(proj.weight.device)], proj.weight.requires_grad)
    parts.num_heads, parts.attn_dim = len(heads), len(index)
    qkv.out_features, proj.in_features = len(rows), len(index)


@torch.no_grad()
def _exact_heads(attention: nn.Module) -> bool:
    """Whether removing heads is what setting the columns that read them to zero is; tried on drawn tokens."""
    tried: Any = copy.deepcopy(attention).cpu().float().eval()
    heads = list(range(0, tried.num_heads, 2))
    if len(heads) == tried.num_heads:
        return False
    x = torch.randn(2, 5, tried.qkv.in_features, generator=torch.Generator().manual_seed(0))
    masked = copy.deepcopy(tried)
    for head in set(range(tried.num_heads)) - set(heads):
        masked.proj.weight[:, head * tried.head_dim : (head + 1) * tried.head_dim] = 0
    _keep_heads(tried, heads)
    try:
        one, other = tried(x), masked(x)
    except Exception:  # a class of the user's that takes other inputs, or holds numbers of its own
        return False
    return isinstance(one, torch.Tensor) and torch.allclose(one, other, rtol=1e-4, atol=1e-5)


# Depth


@torch.no_grad()
def _changes(model: nn.Module, shape: tuple[int, ...]) -> dict[str, dict[str, float]]:
    """Blocks that take one tensor and give one of its shape, once a pass, by their parents: path -> how much they
    change what a drawn input becomes, |f(x) - x| / |x|."""
    change: dict[str, list[float | None]] = {}
    handles = []
    for path in block_paths(model):

        def look(module: nn.Module, given: Any, named: Any, output: Any, path: str = path) -> None:
            alike = (
                len(given) == 1
                and not named
                and isinstance(given[0], torch.Tensor)
                and isinstance(output, torch.Tensor)
                and given[0].shape == output.shape
            )
            size = float(given[0].norm()) if alike else 0.0
            change.setdefault(path, []).append(float((output - given[0]).norm()) / max(size, 1e-12) if alike else None)

        handles.append(model.get_submodule(path).register_forward_hook(look, with_kwargs=True))
    modes = {name: module.training for name, module in model.named_modules()}
    parameter = next(model.parameters())
    try:
        x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
        model.eval()(x.to(parameter))
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise LissomError(f"the model does not take inputs of shape {shape}: {reason}") from error
    finally:
        for handle in handles:
            handle.remove()
        for name, module in model.named_modules():
            module.training = modes[name]
    rows: dict[str, dict[str, float]] = {}
    for path, seen in change.items():
        if len(seen) == 1 and seen[0] is not None:
            rows.setdefault(path.rpartition(".")[0], {})[path] = seen[0]
    return rows
