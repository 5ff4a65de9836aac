"""PyTorch back end: a program saved by torch.export, run as it is or through torch.compile."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from lissom.errors import LissomError
from lissom.registry import register
from lissom.runtime.backends import Answer, beside, missing

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
        module, inputs = _load(torch, path)
        module = module.to(device=self.device)
        self.shared = [self._weight(tensor, convert) for tensor in _shared(path, names)]
        own = inputs[: len(inputs) - len(names)]
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


def _load(torch: Any, path: Path | None) -> tuple[Any, list[tuple[tuple[int, ...], Any]]]:
    """The program's module, and the shape and type of each of its inputs."""
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
        return torch.nn.ReLU(), [((1, 1), torch.float32)]
    _refuse_code(torch, path)
    try:
        program = torch.export.load(str(path))
        nodes = {node.name: node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"}
        inputs = [nodes[name] for name in program.graph_signature.user_inputs]
        # Guards are code in the file; what they guard, the inputs' shapes, is checked before.
        return program.module(check_guards=False), [(tuple(value.shape), value.dtype) for value in inputs]
    except Exception as error:  # torch.export raises anything from KeyError to AssertionError on a damaged file
        reason = str(error).strip().splitlines()
        raise LissomError(f"PyTorch cannot open {path}: {reason[0] if reason else type(error).__name__}") from error


def _refuse_code(torch: Any, path: Path) -> None:
    """Raise LissomError where a ``.pt2`` file holds pickles or expressions that torch.export.load would execute.

    It falls back to full unpickling wherever an archive asks for it, so that an archive must not ask.
    """
    refused = LissomError(f"{path} holds code that PyTorch would execute on loading; export the model anew")
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if not name.endswith("/")]
            inside = {name: name.split("/", 1)[-1] for name in names}
            if not any(name.startswith("models/") for name in inside.values()):
                raise LissomError(f"{path} is no program saved by torch.export of this version")
            for member, name in inside.items():
                if name.startswith(("data/weights/", "data/constants/")):
                    if name.endswith(".pt"):
                        raise refused
                    if name.endswith(".json"):
                        for payload in json.loads(archive.read(member))["config"].values():
                            objects = payload["path_name"].startswith(("custom_obj", "opaque_obj"))
                            if objects or payload["use_pickle"]:
                                raise refused
                elif name.startswith("data/sample_inputs/"):
                    torch.load(io.BytesIO(archive.read(member)), weights_only=True)
                elif name.startswith("models/") and b'"expr_str"' in archive.read(member):
                    raise refused
    except LissomError:
        raise
    except Exception as error:  # torn archives, bad JSON, pickles of anything but tensors
        raise LissomError(f"{path} is damaged, or holds code that PyTorch would execute on loading") from error
