"""A published checkpoint becomes a network's own weights: what ``lissom convert`` reads, and what it says of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from lissom.models.factory import _config, _translated, build_published, check_name
from lissom.models.weights import Checkpoint, read_checkpoint

__all__ = ["Conversion", "read_published", "tensors_of"]


@dataclass(frozen=True, eq=False)
class Conversion:
    """The network ``name`` with the weights of ``checkpoint``, whose tensors are no longer held (``state`` is empty).

    ``dropped`` are keys of the file that are no weights of the network: numbers that it makes itself. ``made`` are the
    network's own that the file lacks, which it made. ``classes`` is None where the network does not classify.
    """

    name: str
    model: nn.Module
    checkpoint: Checkpoint
    dropped: tuple[str, ...]
    made: tuple[str, ...]
    classes: int | None
    channels: int | None
    parameters: int


def read_published(path: str | Path, name: str, ema: bool | None = None) -> Conversion:
    """The network ``name`` with the weights of a published file; ``ema`` as in ``read_checkpoint``.

    Raises LissomError for an unknown network, a file that cannot be read, and weights that do not fit.
    """
    check_name(name)  # before a large file is read
    checkpoint = read_checkpoint(path, ema=ema, mapped=True)
    model, loaded = build_published(name, checkpoint.state)
    dropped = _dropped(model, checkpoint.state, name)
    made = tuple(key for key in model.state_dict() if key not in loaded)
    checkpoint.state.clear()
    return Conversion(
        name=name,
        model=model,
        checkpoint=checkpoint,
        dropped=dropped,
        made=made,
        classes=getattr(model, "num_classes", None) or None,
        channels=_channels(model),
        parameters=sum(p.numel() for p in model.parameters()),
    )


def tensors_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """The model's state dict as a file of tensors takes it: contiguous, none in the memory of another."""
    tensors: dict[str, torch.Tensor] = {}
    taken: set[int] = set()
    for key, value in model.state_dict().items():
        place = value.untyped_storage().data_ptr()
        whole = value.is_contiguous() and value.untyped_storage().nbytes() == value.numel() * value.element_size()
        tensors[key] = value if whole and place not in taken else value.contiguous().clone()
        taken.add(place)
    return tensors


def _dropped(model: nn.Module, state: dict[str, torch.Tensor], name: str) -> tuple[str, ...]:
    """The keys that the translation leaves out: the rest translates to the same names without them."""
    translated = _translated(model, state, name)
    kept = {id(value) for value in translated.values()}
    candidates = [key for key, value in state.items() if key not in translated and id(value) not in kept]

    def lost(keys: list[str]) -> int:
        """How many names the network lacks without these."""
        without = _translated(model, {k: v for k, v in state.items() if k not in keys}, name)
        return len(translated.keys() - without.keys())

    together = lost(candidates) if candidates else 0
    if together == len(candidates):  # each under a new name, and as a new tensor
        return ()
    return tuple(key for key in candidates if together == 0 or lost([key]) == 0)


def _channels(model: nn.Module) -> int | None:
    """What the first convolution takes, where the network says which one it is."""
    first = _config(model).get("first_conv")
    path = first[0] if isinstance(first, tuple | list) and first else first
    try:
        layer = model.get_submodule(path) if isinstance(path, str) else None
    except AttributeError:
        return None
    return layer.in_channels if isinstance(layer, nn.Conv2d) else None
