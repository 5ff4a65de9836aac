"""PyTorch back end: a program saved by torch.export, run as it is or through torch.compile."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import re
import shutil
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from lissom.errors import LissomError
from lissom.registry import register
from lissom.runtime.backends import Answer, Shape, beside, missing

__all__ = ["TorchGraph"]

OPTIONS = {"compile", "dtype", "device", "shared"}
SHARED = "shared.safetensors"  # beside the program: what lissom.export.torch_cut writes there


@register("backend", "torch")
class TorchGraph:
    """A ``.pt2`` file. Options: ``compile`` (run through torch.compile, compiled here and now), ``dtype``
    (``float32`` or ``bfloat16``: weights and inputs are converted, answers are float32), ``device`` (``cpu``,
    ``cuda:0``), ``shared`` (names of weights that several stages read, the last inputs of the program; they lie in
    ``shared.safetensors`` beside it).

    The number of threads is PyTorch's own setting for the whole process.
    """

    def __init__(self, path: Path | None, options: dict[str, Any], threads: int) -> None:
        try:
            import torch
        except ImportError as error:
            raise missing("torch") from error
        if unknown := set(options) - OPTIONS:
            raise LissomError(f"the PyTorch back end takes no option {', '.join(sorted(unknown))}")
        dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
        name = options.get("dtype", "float32")
        if name not in dtypes:
            raise LissomError(f"the PyTorch back end computes in {' or '.join(dtypes)}, not in {name!r}")
        torch.set_num_threads(threads)
        self.torch = torch
        self.dtype = dtypes[name]
        self.device = torch.device(options.get("device", "cpu"))
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise LissomError("PyTorch sees no GPU on this machine")
        self.gpu: str | None = None
        if self.device.type == "cuda":
            self.gpu = f"GPU-{torch.cuda.get_device_properties(self.device).uuid}"
        names, convert = list(options.get("shared") or ()), "dtype" in options
        module, inputs, self.gives = _load(torch, path)
        module = module.to(device=self.device)
        self.shared = [self._weight(tensor, convert) for tensor in _shared(path, names)]
        own = inputs[: len(inputs) - len(names)]
        self.takes = [_static(shape) for shape, _ in own]
        # A program takes what it was exported for: float32, or bfloat16 from the stage before it.
        self.inputs = [self.dtype if convert and dtype.is_floating_point else dtype for _, dtype in own]
        self.module = module.to(self.dtype) if convert else module
        if options.get("compile"):
            self.module = torch.compile(self.module)
            try:
                self.run([np.zeros(shape, _carrier(torch, dtype)) for shape, dtype in own])
            except Exception as error:  # a missing C++ compiler, or any fault of code generation
                reason = str(error).strip().splitlines()
                raise LissomError(f"torch.compile fails on this model: {reason[0] if reason else error!r}") from error

    def run(self, x: np.ndarray | list[np.ndarray]) -> Answer:
        with self.torch.inference_mode():
            given = [
                self.torch.from_numpy(array if array.flags.writeable else array.copy()).to(self.device, dtype)
                for array, dtype in zip(x if isinstance(x, list) else [x], self.inputs, strict=True)
            ]  # copied where they are read-only, which PyTorch has no tensors for
            answers = self.module(*given, *self.shared)
            if not isinstance(answers, tuple | list):
                return self._numpy(answers)
            return self._numpy(answers[0]) if len(answers) == 1 else [self._numpy(a) for a in answers]

    def _weight(self, tensor: Any, convert: bool) -> Any:
        return tensor.to(self.device, self.dtype if convert and tensor.is_floating_point() else tensor.dtype)

    def _numpy(self, answer: Any) -> np.ndarray:
        floating = answer.is_floating_point()
        return (answer.to("cpu", self.torch.float32) if floating else answer.cpu()).numpy()


def _carrier(torch: Any, dtype: Any) -> Any:
    """NumPy's type for a tensor that is handed from stage to stage: bfloat16, which it lacks, goes as float32."""
    return np.float32 if dtype.is_floating_point else torch.empty(0, dtype=dtype).numpy().dtype


def _shared(path: Path | None, names: list[str]) -> list[Any]:
    """The weights of these names that a program shares with others."""
    if not names:
        return []
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(beside(path, SHARED), "pt") as file:
            return [file.get_tensor(name) for name in names]
    except SafetensorError as error:
        raise LissomError(f"PyTorch cannot open the weights beside {path}: {error}") from error


def _static(shape: Sequence[Any]) -> Shape:
    """PyTorch has symbols for sizes that a program leaves open."""
    return tuple(shape) if all(isinstance(size, int) for size in shape) else None


def _load(torch: Any, path: Path | None) -> tuple[Any, list[tuple[tuple[int, ...], Any]], list[Shape]]:
    """The program's module, the shape and type of each of its inputs, and the shapes of its outputs."""
    if path is None:
        # What opening a program imports is the runtime's own cost too, and larger than most programs: it is imported
        # by trying to open none.
        disabled = logging.root.manager.disable
        logging.disable(logging.CRITICAL)
        try:
            with contextlib.suppress(Exception):
                torch.export.load(io.BytesIO())
        finally:
            logging.disable(disabled)
        return torch.nn.ReLU(), [((1, 1), torch.float32)], [(1, 1)]
    try:
        with tempfile.TemporaryFile() as copy:
            _copy_without_code(torch, path, copy)
            copy.seek(0)
            program = torch.export.load(copy)
        nodes = {node.name: node.meta["val"] for node in program.graph.nodes if "val" in node.meta}
        inputs = [nodes[name] for name in program.graph_signature.user_inputs]
        gives = [_static(nodes[name].shape) for name in program.graph_signature.user_outputs]
        # Guards are code in the file; what they guard, the inputs' shapes, is checked before.
        return program.module(check_guards=False), [(tuple(value.shape), value.dtype) for value in inputs], gives
    except LissomError:
        raise
    except Exception as error:  # torch.export raises anything from KeyError to AssertionError on a damaged file
        reason = str(error).strip().splitlines()
        raise LissomError(f"PyTorch cannot open {path}: {reason[0] if reason else type(error).__name__}") from error


def _copy_without_code(torch: Any, path: Path, copy: IO[bytes]) -> None:
    """Write to ``copy`` what of a ``.pt2`` file cannot make torch.export.load execute anything.

    It unpickles, evaluates expressions, imports modules and loads libraries wherever an archive asks for it. Whether
    one asks is seen in what this function read; PyTorch has a reader of archives of its own, which takes other members
    for the same ones (it does not tell upper from lower case), so that it is given no file but this copy. Raises
    LissomError where a file asks.
    """
    refused = LissomError(f"{path} holds code that PyTorch would execute on loading; export the model anew")
    try:
        with zipfile.ZipFile(path) as archive, zipfile.ZipFile(copy, "w") as fresh:
            members = [member for member in archive.infolist() if not member.is_dir()]
            root = members[0].filename.partition("/")[0] if members else ""
            if not any(member.filename == f"{root}/models/model.json" for member in members):
                raise LissomError(f"{path} is no program saved by torch.export of this version")
            if len({member.filename for member in members}) < len(members):
                raise refused
            for member in members:
                folder, _, name = member.filename.partition("/")
                if folder != root or not _MEMBERS.fullmatch(name):
                    raise refused
                if member.compress_type != zipfile.ZIP_STORED:  # as PyTorch writes them: no small file becomes a large
                    raise LissomError(f"{path} is damaged: its members are compressed")
                with archive.open(member) as source, fresh.open(f"program/{name}", "w", force_zip64=True) as target:
                    if name.endswith(".json"):
                        content = json.loads(source.read().decode())
                        if not (_is_plain(content) if name == "models/model.json" else _holds_tensors(content)):
                            raise refused
                        target.write(json.dumps(content).encode())
                    elif name == "data/sample_inputs/model.pt":
                        # Pickled, and unpickled in full where it cannot be as tensors alone.
                        data = source.read()
                        torch.load(io.BytesIO(data), weights_only=True)
                        target.write(data)
                    else:
                        shutil.copyfileobj(source, target)
    except (LissomError, OSError):  # a disk without room for the copy says so itself
        raise
    except Exception as error:  # torn archives, bad JSON, pickles of anything but tensors
        raise LissomError(f"{path} is damaged, or holds code that PyTorch would execute on loading") from error


# What torch.export.save writes; libraries, pickles and other files' contents have no place there.
_MEMBERS = re.compile(
    r"models/model\.json|data/(weights|constants)/model_\1_config\.json|data/weights/weight_\d+|"
    r"data/constants/tensor_\d+|data/sample_inputs/model\.pt|"
    r"archive_format|archive_version|version|byteorder|\.data/version|\.data/serialization_id|\.format_version|"
    r"\.storage_alignment"
)
_OPERATORS = re.compile(
    r"torch\.ops\.(aten|prims|quantized|quantized_decomposed|onednn|mkldnn|torchvision)\.\w+\.\w+|_operator\.getitem|"
    r"torch\.ops\.higher_order\.(cond|while_loop|scan|associative_scan|map_impl|flex_attention|invoke_subgraph|"
    r"wrap_with_autocast|wrap_with_set_grad_enabled)"
)
_FILES = re.compile(r"torch\.ops\.aten\.from_file\..*")  # maps a file of any name, and makes it where there is none


def _holds_tensors(config: Any) -> bool:
    """Whether the list of an archive's weights or constants names tensors alone, none of them pickled."""
    return all(
        payload["use_pickle"] is False and re.fullmatch(r"(weight|tensor)_\d+", payload["path_name"])
        for payload in config["config"].values()
    )


def _is_plain(program: Any) -> bool:
    """Whether a program consists of operators on tensors, and of no expression that is evaluated."""
    waiting = [program]
    while waiting:
        part = waiting.pop()
        if isinstance(part, list):
            waiting += part
        elif isinstance(part, dict):
            if "expr_str" in part or "as_expr" in part:
                return False
            if "target" in part and "inputs" in part:
                target = part["target"]
                if not _OPERATORS.fullmatch(target) or _FILES.fullmatch(target):
                    return False
            if not all(_is_plain_structure(part[name]) for name in ("in_spec", "out_spec") if name in part):
                return False
            waiting += part.values()
    return True


def _is_plain_structure(text: str) -> bool:
    """Whether what a program takes or gives is made of tuples, lists and dicts: for others PyTorch imports modules."""
    _, tree = json.loads(text)
    waiting = [tree]
    while waiting:
        part = waiting.pop()
        if part["type"] not in (None, "builtins.tuple", "builtins.list", "builtins.dict"):
            return False
        context = None if part["context"] is None else json.loads(part["context"])
        if context is not None and not (isinstance(context, list) and all(isinstance(key, str) for key in context)):
            return False
        waiting += part["children_spec"]
    return True
