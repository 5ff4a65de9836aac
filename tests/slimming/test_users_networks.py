"""A user's own CNNs through the main job, structure and precision: exported, and answering. An operator that breaks a
technique is a reason, and the run goes on."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional

from lissom.cli import main
from lissom.export.exporting import run_artifact
from lissom.runtime.artifact import Artifact
from tests.layers import tangled
from tests.slimming import standin

STRUCTURE = ("crop(keep=0.6)", "subnet(width=0.6)")
INT8 = "int8(model_type='plain', linear='matmul', products=8)"


def given_models() -> Path:
    """The file of a user's networks that lies beside the parity figures."""
    folder = os.environ.get("LISSOM_PARITY")
    if not folder or not (path := Path(folder).parent / "models" / "models.py").exists():
        pytest.skip("LISSOM_PARITY is not set, beside which a user's networks lie (models/models.py)")
    return path


def of_file(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location("users_models", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def users_cnn() -> tuple[nn.Module, tuple[int, ...]]:
    """The class of the reference CNN, with fewer blocks, on smaller images."""
    torch.manual_seed(0)
    return of_file(given_models()).CNN(depth=1, width=16, num_classes=4).eval(), (3, 16, 16)


def tangled_cnn() -> tuple[nn.Module, tuple[int, ...]]:
    """Forty lines with a concatenation, a depthwise convolution, and a module called twice."""
    torch.manual_seed(0)
    return tangled.Tangled(width=16, classes=4).eval(), (3, 16, 16)


NETWORKS = {"users": users_cnn, "tangled": tangled_cnn}
BOTH = tuple(("users", structure) for structure in STRUCTURE)


# test_subnet.py beside this file takes the tangled network through subnet in make test, test_crop.py through crop.
@pytest.mark.full
@pytest.mark.parametrize(
    ("name", "structure"),
    [
        ("tangled", STRUCTURE[0]),
        ("tangled", STRUCTURE[1]),
        *BOTH,
    ],
)
def test_all_of_it_is_exported_and_answers(tmp_path, name, structure):
    net, shape = NETWORKS[name]()
    task = standin.task(net, shape=shape)
    recipe = f"{structure} + low_rank(skip=('head',)) + {INT8}"
    result = standin.run(tmp_path / "r", net=net, task=task, recipe=recipe)
    trial = next(t for t in result.trials if t.role == "given")
    assert trial.ok, trial.reason
    base = result.trials[0].metrics
    assert trial.metrics.params < base.params
    assert trial.metrics.macs < base.macs
    artifact = Artifact.open(result.folder / trial.artifact)
    assert artifact.plan["recipe"] == trial.resolved
    for technique in (structure.partition("(")[0], "low_rank", "int8"):
        assert f"{technique}(" in trial.resolved
    assert set(artifact.plan["precision"].values()) == {8}
    inputs = task.report.inputs(slice(0, 3))
    answers = run_artifact(artifact, inputs, 1)
    assert answers.shape == (3, 4)
    assert np.isfinite(answers).all()
    assert np.ptp(answers, axis=1).min() > 0


class Knotted(nn.Module):
    """Written so that every change of structure breaks it: channels shuffled by numbers that forward holds, a weight
    that is multiplied by and never called as a layer, a normalisation over channels."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.GroupNorm(1, 16)
        self.mix = nn.Linear(16, 16)
        self.head = nn.Conv2d(16, 4, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.first(x)))
        x = x.reshape(len(x), 2, 8, *x.shape[2:]).transpose(1, 2).flatten(1, 2)
        x = functional.linear(x.transpose(1, 3), self.mix.weight, self.mix.bias).transpose(1, 3)
        return self.head(x).mean((2, 3))


def test_operators_that_break_techniques_are_reasons_and_the_run_goes_on(tmp_path):
    torch.manual_seed(0)
    net = Knotted().eval()
    broken = {"crop": "can be removed", "low_rank": "not called", "subnet": "nothing of Knotted can be made elastic"}
    task = standin.task(net)
    result = standin.run(tmp_path / "r", net=net, task=task, techniques=(*broken, "int8"), trials=8)
    alone = {t.recipe.partition("(")[0]: t for t in result.trials if t.role == "alone"}
    for name, says in broken.items():
        assert alone[name].status == "not applicable", (name, alone[name])
        assert says in alone[name].reason
    assert alone["int8"].ok
    assert run_artifact(Artifact.open(result.artifact), task.report.inputs(slice(0, 2)), 1).shape == (2, 4)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Dark and bright images of 16 x 16 pixels, in folders of two classes."""
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for split, count in (("train", 40), ("val", 20)):
        for label, level in (("bright", 170), ("dark", 80)):
            folder = root / split / label
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = np.clip(rng.normal(level, 25, (16, 16, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return root


@pytest.mark.full
@pytest.mark.parametrize(("name", "structure"), [("users", STRUCTURE[0]), ("tangled", STRUCTURE[1])])
def test_from_the_command_line(tmp_path, capsys, pictures, name, structure):
    """``lissom slim file.py:function``, measured here, and ``lissom predict`` with what comes out."""
    source = given_models() if name == "users" else Path(tangled.__file__)
    made = "CNN(depth=1, width=16, num_classes=2)" if name == "users" else "Tangled(width=16, classes=2)"
    tail = "" if name == "users" else "\n\nMEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)\n"
    file = tmp_path / "mine.py"
    file.write_text(f"{source.read_text()}{tail}\n\ndef net():\n    torch.manual_seed(0)\n    return {made}\n")
    weights = tmp_path / "mine.safetensors"
    save_file({k: v.contiguous() for k, v in of_file(file).net().state_dict().items()}, weights)
    recipe = f"{structure} + low_rank(skip=('head',)) + int8()"
    options = ["--weights", weights, "--data", pictures, "--recipe", recipe, "--threads", "1", "--out", tmp_path / "r"]
    code = main(["slim", f"{file}:net", *map(str, options)])
    said = capsys.readouterr()
    assert code in (0, 3), said.err  # 3: a budget that random weights do not meet
    assert "Traceback" not in said.err
    (line,) = [line for line in (tmp_path / "r" / "trials.jsonl").read_text().splitlines() if '"given"' in line]
    trial = json.loads(line)
    assert trial["status"] == "ok", trial["reason"]
    image = next((pictures / "val" / "dark").iterdir())
    assert main(["predict", str(tmp_path / "r" / trial["artifact"]), str(image), "--json"]) == 0
    (answer,) = json.loads(capsys.readouterr().out)
    assert answer["class"] in ("bright", "dark")
    assert 0.5 <= answer["confidence"] <= 1
