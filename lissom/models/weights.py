"""Weight files as their publishers save them: read without running code, without what training left beside the weights.

Published checkpoints are pickles that nest the weights (``model``, ``state_dict``), keep an average of them in the same
file (``model_ema``) and the settings of their training (``args``). What a file may hold besides tensors and plain
Python values is a fixed list of harmless kinds (``INERT``); of those nothing is built either: an empty stand-in takes
their place. Everything else is refused.
"""

from __future__ import annotations

import hashlib
import re
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from lissom.errors import LissomError

__all__ = ["Checkpoint", "few", "first_line", "inner_state", "is_weight_file", "network_of", "read_checkpoint",
           "read_weights", "sha256"]  # fmt: skip

TENSOR_FILES = (".safetensors",)
PICKLE_FILES = (".pth", ".pt", ".bin", ".pth.tar")
# Where training programs put the weights in a checkpoint. An average of the weights (EMA) comes first: authors mostly
# publish figures of it where they keep one, and timm takes it too.
AVERAGES = ("state_dict_ema", "model_ema", "ema_model", "ema_state_dict", "ema", "params_ema")
WEIGHTS = ("module", "state_dict", "model_state_dict", "model_state", "model", "net", "params")
PREFIXES = ("module.", "_orig_mod.")  # of nn.DataParallel and torch.compile
DEPTH = 4  # a hostile file may nest without end
PACKED = 20  # weights hardly shrink when packed
NAMED = 8  # how many keys an error names
# Kinds that training programs leave beside their weights: settings, paths, figures in NumPy's types. NumPy's own
# constructors are not called: on bytes of an attacker's choice they are no safe ground.
INERT = (
    "argparse.Namespace", "types.SimpleNamespace",
    "pathlib.Path", "pathlib.PosixPath", "pathlib.PurePosixPath", "pathlib.WindowsPath", "pathlib.PureWindowsPath",
    "pathlib._local.Path", "pathlib._local.PosixPath", "pathlib._local.WindowsPath",
    "numpy.dtype", "numpy.ndarray",
    "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar",
    "numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A weight file's state dict, and what was taken of the file.

    ``nesting`` are the keys that led to the state dict, outermost first; ``averaged`` is whether one of them is known
    to hold an average of the weights (EMA), ``choice`` whether the file holds both. ``prefix`` stood before every key
    and was removed. ``beside`` are the keys next to those taken: of the training, not of the network.
    """

    path: Path
    state: dict[str, torch.Tensor]
    nesting: tuple[str, ...] = ()
    averaged: bool = False
    choice: bool = False
    prefix: str = ""
    beside: tuple[str, ...] = ()


def is_weight_file(path: str | Path) -> bool:
    """Whether the name ends as those of weight files do."""
    return str(path).endswith(TENSOR_FILES + PICKLE_FILES)


def read_weights(path: str | Path) -> dict[str, torch.Tensor]:
    """The state dict in a weight file, without the wrappings that training programs put around it.

    Code in a pickle is refused, never run. Raises LissomError where the file is missing, damaged or holds no weights.
    """
    return read_checkpoint(path).state


def read_checkpoint(path: str | Path, *, ema: bool | None = None, mapped: bool = False) -> Checkpoint:
    """The state dict in a weight file, and what was taken of the file.

    ``ema`` asks for the average of the weights, or for the weights themselves; None is the average where there is one.
    ``mapped`` leaves the tensors in the file until they are copied, so that what is not wanted of it never fills the
    memory; the file must then not be written to meanwhile. Code in a pickle is refused, never run. Raises LissomError
    where the file is missing, damaged, of another kind, or holds no weights or not those asked for.
    """
    path = Path(path).expanduser()
    _check_file(path)
    found = _read_tensors(path) if path.name.endswith(TENSOR_FILES) else _read_pickle(path, mapped)
    checkpoint = _unwrapped(path, found, ema)
    if checkpoint is None:
        keys = f"; it holds {few(found)}" if isinstance(found, Mapping) and found else ""
        raise LissomError(f"{path} holds no state dict{keys}; save one with torch.save(model.state_dict(), ...)")
    _check_tensors(checkpoint)
    if ema and not checkpoint.averaged:
        raise LissomError(f"{path} holds one set of weights, not named as an average (EMA); leave --ema out")
    return checkpoint


def inner_state(found: Mapping[str, Any]) -> Mapping[str, torch.Tensor]:
    """The state dict in what timm hands a ``checkpoint_filter_fn``: with files of a hub, the whole checkpoint."""
    checkpoint = _unwrapped(Path(), found, None)
    return found if checkpoint is None else checkpoint.state


def network_of(path: str | Path) -> str | None:
    """The network that ``lissom convert`` noted in the file; None for other files and for what cannot be read."""
    from safetensors import safe_open

    if not str(path).endswith(TENSOR_FILES):
        return None
    try:
        with safe_open(Path(path).expanduser(), "pt") as file:
            noted = file.metadata() or {}
    except Exception:  # whoever reads the weights says what is wrong with the file
        return None
    return noted.get("network") if "lissom" in noted else None


def sha256(path: str | Path) -> str:
    """The file's SHA-256 in hexadecimal, read in blocks."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def inert() -> Iterator[None]:
    """Inside, torch's reader of weights puts stand-ins in the place of what ``INERT`` names; it refuses the rest."""
    with torch.serialization.safe_globals([(_Inert, name) for name in INERT]):
        yield


class _Inert:
    """In the place of an object that is no weight: takes whatever it is given and keeps nothing."""

    def __init__(self, *arguments: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


# Reading


def _check_file(path: Path) -> None:
    if path.is_dir():
        raise LissomError(f"{path} is a folder; name the weight file in it")
    if not is_weight_file(path):
        known = ", ".join(TENSOR_FILES + PICKLE_FILES)
        raise LissomError(f"{path} is no weight file that lissom reads; known endings: {known}")
    if not path.is_file():
        raise LissomError(f"there is no file {path}")
    try:
        with open(path, "rb") as file:
            start = file.read(64).lstrip().lower()
    except OSError as error:
        raise LissomError(f"{path} cannot be read: {(error.strerror or 'it is locked').lower()}") from error
    if not start:
        raise LissomError(f"{path} is damaged or truncated: it is empty; fetch it anew")
    if start.startswith(b"version https://git-lfs"):
        raise LissomError(f"{path} is Git LFS's note of a file, not the file; git lfs pull fetches it")
    if start.startswith((b"<!doctype", b"<html")):
        raise LissomError(f"{path} is a web page, not weights: the share it came from asks first; fetch it anew")


def _read_tensors(path: Path) -> Any:
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except Exception as error:  # SafetensorError, OSError or ValueError, by the place of the damage
        raise LissomError(
            f"{path} is damaged or truncated and cannot be read as safetensors ({first_line(error)}); fetch it anew"
        ) from error


def _read_pickle(path: Path, mapped: bool) -> Any:
    try:
        with warnings.catch_warnings(), inert():
            warnings.simplefilter("ignore")  # what torch says of other pickles is not for lissom's user
            plain = _can_be_mapped(path)
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped and plain)
    except LissomError:
        raise
    except UnpicklingError as error:
        if "GLOBAL" in str(error):  # torch names the class or function that it refuses
            name = re.search(r"GLOBAL (\S+)", str(error))
            raise LissomError(
                f"{path} holds Python objects besides weights{f' ({few([name[1]])})' if name else ''}, which could run "
                "code and are refused; where it was made, save the weights alone with "
                "torch.save(model.state_dict(), ...)"
            ) from error
        raise LissomError(f"{path} is damaged, or holds more than weights, and was not read; fetch it anew") from error
    except Exception as error:  # RuntimeError, EOFError, zip and struct errors, by the place of the damage
        raise LissomError(
            f"{path} is damaged or truncated and cannot be read as weights ({first_line(error)}); fetch it anew"
        ) from error


def _can_be_mapped(path: Path) -> bool:
    """Whether the tensors lie in the file as they lie in memory: in torch's zip, unless it was packed anew.

    Raises LissomError for one that would unpack to far more than it is.
    """
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as file:
        entries = file.infolist()
    if sum(entry.file_size for entry in entries) > PACKED * path.stat().st_size:
        raise LissomError(f"{path} unpacks to more than {PACKED} times its size, as no weights do; not read")
    return all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)


def _unwrapped(path: Path, found: Any, ema: bool | None) -> Checkpoint | None:
    """The innermost dictionary of tensors, prefixes of wrappers removed; None where there is none."""
    nesting: list[str] = []
    beside: list[str] = []
    averaged = choice = False
    for _ in range(DEPTH):
        if not isinstance(found, Mapping) or not found:
            return None
        if all(isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in found.items()):
            break
        averages, weights = ([k for k in keys if isinstance(found.get(k), Mapping) and found[k]]
                             for keys in (AVERAGES, WEIGHTS))  # fmt: skip
        if averages and weights:
            choice = True
        if averages and ema is False and not weights:
            raise LissomError(f"{path} holds an average of the weights alone ({averages[0]}); leave --no-ema out")
        taken = next(iter(weights if ema is False else averages + weights), None)
        if taken is None:
            return None
        averaged = averaged or taken in averages
        beside += [".".join((*nesting, str(key))) for key in found if key != taken]
        nesting.append(taken)
        found = found[taken]
    else:
        return None
    state, prefix = dict(found), ""
    while added := next((p for p in PREFIXES if all(key.startswith(p) for key in state)), ""):
        state = {key[len(added) :]: value for key, value in state.items()}
        prefix += added
    return Checkpoint(path, state, tuple(nesting), averaged, choice, prefix, tuple(beside))


def _check_tensors(checkpoint: Checkpoint) -> None:
    """Raise LissomError for tensors that are not what they seem: they would fill the memory, or hold no numbers."""
    size = checkpoint.path.stat().st_size
    for key, value in checkpoint.state.items():
        if value.is_quantized or value.layout != torch.strided or value.device.type != "cpu":
            raise LissomError(f"{checkpoint.path}: {few([key])} is no plain tensor; save dense floating-point weights")
        if value.numel() > size:  # every number takes a byte at least; a stride of 0 makes millions of one
            raise LissomError(f"{checkpoint.path}: {few([key])} has more numbers than the file has bytes; not read")


# Words


def few(keys: Iterable[object]) -> str:
    """The first keys as text for a sentence, and how many more there are."""
    names = ["".join(c if c.isprintable() else "?" for c in str(key)[:120]) for key in keys]
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
