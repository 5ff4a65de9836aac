"""Networks by name, and models as users bring them: a name, a weight file, their own module file, a module.

Nothing here runs code from a weight file, and nothing but ``weights="pretrained"`` reaches for the network.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import timm
import torch
from torch import nn

from lissom.errors import LissomError
from lissom.images import Preprocessing
from lissom.layers.low_rank import factorise, published_ranks
from lissom.models.weights import few, first_line, inert, is_weight_file, network_of, read_checkpoint, read_weights
from lissom.registry import find
from lissom.usercode import is_reference, load_function

__all__ = [
    "Loaded",
    "create_model",
    "from_published",
    "is_model",
    "load_model",
    "num_outputs",
    "read_weights",
    "with_head",
]

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as most published weights expect
PRETRAINED = "pretrained"


@dataclass(frozen=True, eq=False)
class Loaded:
    """A model ready for use, and what is known of how it wants its images.

    ``trained`` is whether its weights are more than random numbers. ``input_size`` is (C, H, W), or None where the
    model does not say. The rest are fields of ``Preprocessing``.
    """

    model: nn.Module
    name: str
    trained: bool
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD
    input_size: tuple[int, int, int] | None = None
    crop: float = 1.0
    resize: str = "crop"
    interpolation: str = "bicubic"

    def preprocessing(self, image_size: tuple[int, int] | None = None) -> Preprocessing:
        """How images become this model's inputs; ``image_size`` (H, W), the data's own, where the model says none.

        Raises LissomError where neither is known.
        """
        channels, *size = self.input_size or (_channels(self.model), *(image_size or ()))
        if not size:
            raise LissomError(
                f"the input size of {self.name} is not known and the images are of several sizes; "
                'set default_cfg = {"input_size": (3, 224, 224)} on the model'
            )
        height, width = size
        mean, std = self.mean, self.std
        if len(mean) != channels:  # the mean over the colours, for a grey model with colour defaults and the reverse
            mean, std = (sum(mean) / len(mean),) * channels, (sum(std) / len(std),) * channels
        return Preprocessing(height, width, channels, mean, std, self.resize, self.crop, self.interpolation)


# Networks by name


def is_model(name: str) -> bool:
    """Whether ``create_model`` and ``from_published`` know the network ``name``, one of ours or timm's."""
    return find("network", name) is not None or (":" not in name and timm.is_model(name))


def create_model(name: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """The network ``name``, with random weights or, where ``pretrained``, its published ones (timm fetches them).

    ``kwargs`` are the network's own (``num_classes``, ``in_chans``, ``features_only``, ...). Raises LissomError for
    an unknown name, arguments that the network does not take, and published weights that do not exist or cannot be
    fetched.
    """
    check_name(name)
    given = kwargs.get("pretrained_cfg") or kwargs.get("pretrained_cfg_overlay")  # timm's: a source of one's own
    if pretrained and not given and not timm.models.is_model_pretrained(name):
        raise LissomError(f"there are no published weights for {name}; give a weight file, or train it with --train")
    try:
        with inert() if pretrained else contextlib.nullcontext():
            return timm.create_model(name, pretrained=pretrained, **kwargs)
    except Exception as error:  # the hub's client raises its own kinds, the networks anything on a wrong argument
        reason = f"{type(error).__name__}: {first_line(error)}"
        if pretrained:
            # The hub's errors are of other kinds; these are of what reads the fetched file, and of what loads it.
            what = "read" if type(error) in (RuntimeError, UnpicklingError, LissomError) else "fetched"
            raise LissomError(f"the published weights of {name} could not be {what} ({reason})") from error
        raise LissomError(f"the network {name} cannot be built with {kwargs or 'its defaults'} ({reason})") from error


def check_name(name: str) -> None:
    """Raise LissomError with similar names where ``name`` is no network's."""
    if is_model(name):
        return
    close = difflib.get_close_matches(name, timm.list_models(), 3)
    raise LissomError(
        f"no network is called {name!r}; "
        + (f"similar names: {', '.join(close)}" if close else "lissom list and timm.list_models() name them all")
    )


def from_published(name: str, state_dict: Mapping[str, torch.Tensor]) -> nn.Module:
    """The network ``name`` with a checkpoint in its publisher's own key names.

    Keys are translated by the ``checkpoint_filter_fn`` of the file that the network's class lives in, where it has
    one; for timm's classes by ``lissom/models/<the same file>`` where that exists. The number of classes and of input
    channels are the checkpoint's. Layers that the checkpoint holds as two thin ones (``<layer>.0.weight``,
    ``<layer>.1.weight``; see lissom.layers.low_rank) become so. Index tables that the network makes itself (integer
    buffers) may be missing. Raises LissomError that lists the keys which are missing, unknown or of another shape.
    """
    return build_published(name, state_dict)[0]


def build_published(name: str, state_dict: Mapping[str, torch.Tensor]) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """``from_published``, and the checkpoint in the network's own names, as it was loaded."""
    model = create_model(name)
    state = _translated(model, state_dict, name)
    shape = _shape_of_weights(model, state)
    if shape:
        model = create_model(name, **shape)
        state = _translated(model, state_dict, name)
    factorise(model, published_ranks(model, state), "random")
    _load(model, state, name)
    return model, state


# Models as users bring them


def load_model(
    spec: nn.Module | str | Path,
    *,
    arch: str | None = None,
    weights: str | Path | None = None,
    num_classes: int | None = None,
    seed: int = 0,
) -> Loaded:
    """The model that ``spec`` names or is, in eval mode.

    - a module: taken as it is, as trained;
    - a network's name: random weights drawn from ``seed``, and ``num_classes`` outputs; or those of
      ``weights`` (``"pretrained"``, or a file);
    - a weight file (``.safetensors``; ``.pth``, ``.pth.tar``, ``.pt`` or ``.bin``, read without running code): of the
      network ``arch``, or of the one that ``lissom convert`` noted in it;
    - ``file.py:function``, which returns a module: taken as trained, with or without a file of ``weights`` (the
      function may have loaded its own).

    Layers that a weight file holds as two thin ones (``lissom.layers.low_rank``) become so, in any of these models.

    A model that has weights keeps the outputs it was trained with, whatever ``num_classes`` says: see ``with_head``.

    Normalisation is the user's module file's ``MEAN`` and ``STD`` where it defines them, else what the model's
    ``default_cfg`` says (timm's form), else ImageNet's; the input size is the model's own (``patch_embed.img_size``,
    ``default_cfg``), else None. Raises LissomError where anything is missing, damaged or does not fit.
    """
    if isinstance(spec, nn.Module):
        if weights is not None:
            _load_own(spec, weights)
        return _described(spec.eval(), type(spec).__name__, True)
    text = str(spec)
    if is_reference(text):
        return _from_function(text, weights, seed)
    if text.endswith(".py"):
        raise LissomError(f"{text} is a Python file; name the function that returns the model too, as {text}:function")
    if is_weight_file(text) or (Path(text).is_file() and not is_model(text)):
        arch = arch or network_of(text)
        if arch is None:
            raise LissomError(f"{text} holds weights and no network; name the network they belong to with --arch NAME")
        if weights is not None:
            raise LissomError(f"two weight files were given, {text} and {weights}; one is enough")
        return _described(from_published(arch, _mapped(text)).eval(), arch, True)
    if weights is None:
        with _drawn_from(seed):
            arguments: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
            model = create_model(text, **arguments)
        return _described(model.eval(), text, False)
    if weights == PRETRAINED:
        return _described(create_model(text, pretrained=True).eval(), text, True)
    return _described(from_published(text, _mapped(weights)).eval(), text, True)


def with_head(model: nn.Module, num_classes: int, seed: int = 0) -> nn.Module:
    """The model, in place, with a new, untrained last layer of ``num_classes`` outputs, drawn from ``seed``.

    timm's networks do this themselves; in others the last linear layer is replaced. Raises LissomError where there
    is none.
    """
    with _drawn_from(seed):
        if callable(getattr(model, "reset_classifier", None)):
            model.reset_classifier(num_classes)  # type: ignore[operator]
            return model
        linear = [(path, m) for path, m in model.named_modules() if type(m) is nn.Linear]
        if not linear or not linear[-1][0]:
            raise LissomError(f"{type(model).__name__} has no linear layer whose place a new head could take")
        path, old = linear[-1]
        parent, _, name = path.rpartition(".")
        head = nn.Linear(old.in_features, num_classes, old.bias is not None)
        setattr(model.get_submodule(parent), name, head.to(old.weight))
    return model


def num_outputs(model: nn.Module, shape: Sequence[int]) -> int:
    """How many answers the model gives to an input of ``shape`` (C, H, W): one forward pass on zeros, in eval mode.

    Raises LissomError where that fails, or the output is not one tensor (B, outputs).
    """
    training = model.training
    parameter = next(model.parameters(), torch.empty(0))
    try:
        with torch.inference_mode():
            output = model.eval()(torch.zeros(1, *shape, device=parameter.device, dtype=parameter.dtype))
    except Exception as error:
        raise LissomError(
            f"the model cannot run on an input of shape {tuple(shape)} ({type(error).__name__}: {first_line(error)})"
        ) from error
    finally:
        model.train(training)
    if not isinstance(output, torch.Tensor) or output.ndim != 2:
        found = f"shape {tuple(output.shape)}" if isinstance(output, torch.Tensor) else type(output).__name__
        raise LissomError(f"the model returns {found}; for classification, one tensor (batch, classes) is wanted")
    return output.shape[1]


# Loading


def _mapped(path: str | Path) -> dict[str, torch.Tensor]:
    """The weights of a file for a model that copies them at once."""
    return read_checkpoint(path, mapped=True).state


def _translated(model: nn.Module, state: Mapping[str, torch.Tensor], source: str) -> dict[str, torch.Tensor]:
    """The checkpoint in the model's own names."""
    state, own = dict(state), model.state_dict()
    translate = getattr(_home(model), "checkpoint_filter_fn", None)
    named = state.keys() == own.keys()
    if translate is None or (named and all(state[k].shape == own[k].shape for k in own)):
        return state
    try:
        translated = dict(translate(dict(state), model))
        # With the model's own names, shapes are what a filter may still change: tables resized for other images.
        return state if named and translated.keys() != own.keys() else translated
    except Exception as error:
        if named:
            return state
        raise LissomError(
            f"{source}: the checkpoint is not in a form known for {type(model).__name__} "
            f"({type(error).__name__}: {first_line(error)}); it holds {few(state)}"
        ) from error


def _home(model: nn.Module) -> Any:
    """The file that reads the model's checkpoints: its own, or for a network of ``timm.models.<name>`` the file
    ``lissom.models.<name>`` where there is one, which knows its publisher's layout too."""
    own = type(model).__module__
    if own.startswith("timm.models."):
        ours = f"lissom.models.{own.rpartition('.')[2]}"
        if importlib.util.find_spec(ours) is not None:
            return importlib.import_module(ours)
    return sys.modules.get(own)  # none where a user's code made the module by other means than an import


def _shape_of_weights(model: nn.Module, state: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """``num_classes`` and ``in_chans`` of the weights, where they differ from the model's."""
    own = model.state_dict()
    shape: dict[str, Any] = {}
    config = _config(model)
    for field, argument, dim in (("classifier", "num_classes", 0), ("first_conv", "in_chans", 1)):
        path = config.get(field)
        key = f"{path[0] if isinstance(path, tuple | list) and path else path}.weight"
        if argument == "num_classes" and key not in own and key in state and state[key].ndim == 2:
            shape[argument] = len(state[key])  # the network has no classifier unless it is told of how many classes
        if key not in own or key not in state:
            continue
        mine, theirs = list(own[key].shape), list(state[key].shape)
        if len(mine) == len(theirs) and mine[dim] != theirs[dim] and mine[:dim] == theirs[:dim]:
            shape[argument] = theirs[dim]
    return shape


def _load(model: nn.Module, state: Mapping[str, torch.Tensor], source: str) -> None:
    """Load strictly. Integer buffers, which a network makes itself, may be missing."""
    own = model.state_dict()
    made = {key for key, value in own.items() if not value.is_floating_point() and not value.is_complex()}
    shapes = [
        f"{key} is {tuple(value.shape)}, wanted {tuple(own[key].shape)}"
        for key, value in state.items()
        if key in own and own[key].shape != value.shape
    ]
    missing = [key for key in own if key not in state and key not in made]
    unknown = [key for key in state if key not in own]
    faults = [
        f"{len(keys)} {what}: {few(keys)}"
        for what, keys in (("missing", missing), ("unknown", unknown), ("of another shape", shapes))
        if keys
    ]
    if faults:
        raise LissomError(f"the weights of {source} do not fit {type(model).__name__}: {'; '.join(faults)}")
    try:
        model.load_state_dict(dict(state), strict=False)
    except RuntimeError as error:
        raise LissomError(f"the weights of {source} do not fit {type(model).__name__} ({first_line(error)})") from error


def _load_own(model: nn.Module, weights: str | Path) -> None:
    """Load a weight file into a user's model, in place; layers that are two thin ones in the file become so."""
    state = _translated(model, read_weights(weights), str(weights))
    factorise(model, published_ranks(model, state), "random")
    _load(model, state, str(weights))


def _from_function(reference: str, weights: str | Path | None, seed: int) -> Loaded:
    function = load_function(reference)
    try:
        with _drawn_from(seed):
            model = function()
    except LissomError:
        raise
    except Exception as error:
        raise LissomError(f"{reference} failed: {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise LissomError(f"{reference} returned {type(model).__name__}; a torch.nn.Module is wanted")
    if weights is not None:
        _load_own(model, weights)
    scope = getattr(function, "__globals__", {})
    normalisation = {
        field: _numbers(scope[constant], f"{constant} in {reference.rpartition(':')[0]}")
        for field, constant in (("mean", "MEAN"), ("std", "STD"))
        if constant in scope
    }
    return _described(model.eval(), reference.rpartition(":")[2], True, **normalisation)


def _numbers(value: Any, what: str) -> tuple[float, ...]:
    try:
        numbers = tuple(float(v) for v in value)
    except (TypeError, ValueError):
        numbers = ()
    if len(numbers) not in (1, 3):
        raise LissomError(f"{what} is {value!r}; one number a colour is wanted, as (0.485, 0.456, 0.406)")
    return numbers


# What a model says of itself


def _described(model: nn.Module, name: str, trained: bool, **known: Any) -> Loaded:
    """Loaded, with what ``default_cfg`` says and, over it, ``known``."""
    config = _config(model)
    fields: dict[str, Any] = {"input_size": _input_size(model, config)}
    for field in ("mean", "std"):
        if config.get(field) is not None:
            fields[field] = _numbers(config[field], f"{field} in the default_cfg of {name}")
    if config.get("crop_pct"):
        fields["crop"] = float(config["crop_pct"])
    if config.get("crop_mode") == "squash":
        fields["resize"] = "squash"
    if config.get("interpolation") in ("bilinear", "bicubic"):
        fields["interpolation"] = config["interpolation"]
    return Loaded(model, name, trained, **{**fields, **known})


def _config(model: nn.Module) -> Mapping[str, Any]:
    for field in ("pretrained_cfg", "default_cfg"):
        config = getattr(model, field, None)
        if isinstance(config, Mapping):
            return config
    return {}


def _input_size(model: nn.Module, config: Mapping[str, Any]) -> tuple[int, int, int] | None:
    # A transformer built for another size than its default_cfg's runs at the size of its patch embedding only.
    built = getattr(getattr(model, "patch_embed", None), "img_size", None)
    if isinstance(built, tuple) and len(built) == 2:
        return (_channels(model), int(built[0]), int(built[1]))
    size = config.get("input_size")
    if isinstance(size, tuple | list) and len(size) == 3:
        return (_channels(model), int(size[1]), int(size[2]))
    return None


def _channels(model: nn.Module) -> int:
    """1 or 3: what the model's first convolution takes; 3 where there is none, or it takes another number."""
    first = next((m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d)), 3)
    return first if first in (1, 3) else 3


class _drawn_from:  # noqa: N801 - a context manager, read as a word
    """Random numbers from ``seed`` inside, the caller's own stream untouched outside."""

    def __init__(self, seed: int) -> None:
        self._fork = torch.random.fork_rng(devices=[])
        self._seed = seed

    def __enter__(self) -> None:
        self._fork.__enter__()
        torch.manual_seed(self._seed)

    def __exit__(self, *error: Any) -> None:
        self._fork.__exit__(*error)
