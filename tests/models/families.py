"""What the tests of every family of networks ask: exact counts, one small network through everything, the published
figures. A family's test file names its networks, their sizes and their figures, and calls these."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lissom.models.factory import create_model
from tests.parity_adapters import BUILD, published

PARITY = Path(os.environ["LISSOM_PARITY"]) if "LISSOM_PARITY" in os.environ else None
needs_parity = pytest.mark.skipif(PARITY is None, reason="set LISSOM_PARITY to the folder of published figures")


def count(name: str, **sizes: Any) -> int:
    """Trainable parameters, on the meta device: costs neither memory nor time."""
    with torch.device("meta"):
        model = create_model(name, **sizes)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def small(name: str, **sizes: Any) -> nn.Module:
    torch.manual_seed(0)
    return create_model(name, **sizes)


def images(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def settle(model: nn.Module, x: torch.Tensor) -> nn.Module:
    """Running statistics that are not those a norm starts with, so that folding them is felt; then eval mode."""
    model.train()
    with torch.no_grad():
        for _ in range(3):
            model(x)
            for module in model.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.weight is not None:
                    torch.nn.init.uniform_(module.weight, 0.5, 1.5)
                    torch.nn.init.normal_(module.bias, std=0.1)
    return model.eval()


def check_trains(model: nn.Module, x: torch.Tensor) -> None:
    """A step reaches every parameter with a gradient that is a number."""
    model.train()
    found = model(x)
    answers = found if isinstance(found, tuple | list) else [found]
    torch.stack([answer.square().sum() for answer in answers]).sum().backward()
    without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not without
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def check_classifier(model: nn.Module, x: torch.Tensor) -> None:
    """``get_classifier``, ``reset_classifier`` to other classes and to none."""
    model.eval()
    assert isinstance(model.get_classifier(), nn.Module)
    model.reset_classifier(7)
    with torch.no_grad():
        assert model(x).shape == (len(x), 7)
        model.reset_classifier(0)
        assert model(x).shape == (len(x), model.num_features)


def check_features(name: str, x: torch.Tensor, **sizes: Any) -> None:
    """``features_only`` and ``forward_intermediates`` tell the channels and reductions that ``feature_info`` names."""
    model = small(name, features_only=True, **sizes).eval()
    with torch.no_grad():
        maps = model(x)
    assert [m.shape[1] for m in maps] == model.feature_info.channels()
    for found, reduction in zip(maps, model.feature_info.reduction(), strict=True):
        assert all(-(-side // reduction) == own for side, own in zip(x.shape[-2:], found.shape[-2:], strict=True))
    whole = small(name, **sizes).eval()
    with torch.no_grad():
        last, maps = whole.forward_intermediates(x)
        assert torch.allclose(last, whole.forward_features(x), atol=1e-5)
        assert [m.shape for m in maps] == [m.shape for m in model(x)]


def check_fuse(model: nn.Module, x: torch.Tensor, tolerance: float = 1e-4) -> nn.Module:
    """The technique's form answers as the trained one does; returns it."""
    from timm.utils.model import reparameterize_model

    settle(model, x)
    with torch.no_grad():
        fused = reparameterize_model(model, inplace=False)
        want, got = model(x), fused(x)
    assert (got - want).norm() <= tolerance * want.norm()
    return fused


def check_export(model: nn.Module, x: torch.Tensor, tolerance: float = 1e-4) -> None:
    """torch.export, and OpenVINO's answer to the same input."""
    import tempfile

    from lissom.export.exporting import export_plan, run_artifact
    from lissom.export.plan import Plan
    from lissom.runtime.target import Target

    shape = tuple(x.shape[1:])
    with tempfile.TemporaryDirectory() as folder:
        artifact = export_plan(Plan.of(model.eval(), shape), Target("openvino"), Path(folder) / "a", shape=shape)
        with torch.no_grad():
            want = model(x)
        got = torch.from_numpy(run_artifact(artifact, x.numpy(), 1))
    assert (got - want).norm() <= tolerance * want.norm()


def parity() -> Any:
    """The module that fills networks and digests answers."""
    assert PARITY is not None
    spec = importlib.util.spec_from_file_location("parity", PARITY / "parity.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fixture(system: str, name: str) -> Mapping[str, Any]:
    assert PARITY is not None
    path = PARITY / system / f"{name}.json"
    if not path.exists():
        pytest.skip(f"there are no figures {system}/{name}")
    return json.loads(path.read_text())


def check_operator(system: str, name: str, build: Callable[[Mapping[str, torch.Tensor]], nn.Module]) -> None:
    """One operator's figures: ``build`` makes it from a state dict in the published names."""
    own, figures = parity(), fixture(system, name)
    kept = set(figures.get("int_keys", ()))
    state = {
        key: torch.zeros(shape)
        for key, shape in figures["keys"].items()
        if key not in kept and not key.endswith(tuple(figures.get("skip", ())) or ("\0",))
    }
    own.fill_(state, rule=figures.get("fill"))
    model = build(state).eval()
    with torch.no_grad():
        answer = model(own.make_input(tuple(figures["input"])))
    assert own.close(own.digest(answer), figures["output"])


def check_network(system: str, name: str, rtol: float = 1e-3) -> None:
    """A whole network's figures: built from the published names as ``tests/parity_adapters.py`` says, else by its own
    name; the answer is one tensor to one input."""
    own, figures = parity(), fixture(system, name)
    left_out = (*figures.get("skip", ()), *figures.get("int_keys", ()))
    state = {
        key: torch.zeros(shape, dtype=torch.long if key.endswith("num_batches_tracked") else torch.float32)
        for key, shape in figures["keys"].items()
        if not key.endswith(left_out or "\0")
    }
    build = BUILD.get(f"{system}/{figures['variant']}", published(figures["variant"]))
    model = build(own.fill_(state, rule=figures.get("fill", ""))).eval()
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == figures["params"]
    shape = tuple(figures["input"])
    if figures.get("mode") == "calibrated":
        own.calibrate_(model, own.make_input((8, *shape[1:]), "calibration"))
    elif figures.get("mode") == "train":
        own.batch_statistics_(model)
    with torch.no_grad():
        assert own.close(own.digest(model(own.make_input(shape))), figures["output"], rtol)
