"""What a GPU computes beside the processor: families of networks, exits in the torch runtime, training and resuming.

Skipped where there is no GPU.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from lissom.data.splits import ArraySplit
from lissom.export.exporting import export_plan
from lissom.export.plan import Exit, Plan
from lissom.layers.exits import Exits, attach_exits
from lissom.runtime.backends import Stages
from lissom.runtime.target import Target
from lissom.tasks.task import Task
from lissom.training.loop import fit
from tests.models.families import images, small
from tests.models.test_every_family import NARROW

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


@pytest.fixture(autouse=True)
def _exact():
    """Products in float32, not TF32: what is compared are formulas, not roundings."""
    matmul, convolution = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, convolution


def answers(found: object) -> list[torch.Tensor]:
    return list(found) if isinstance(found, tuple | list) else [found]  # type: ignore[list-item]


@pytest.mark.parametrize("name", NARROW)
def test_a_network_answers_and_learns_as_on_the_processor(name: str) -> None:
    arguments, shape = NARROW[name]
    model, x = small(name, **arguments).eval(), images(*shape)
    there = copy.deepcopy(model).cuda()
    own, other = answers(model(x)), answers(there(x.cuda()))
    for a, b in zip(own, other, strict=True):
        torch.testing.assert_close(b.cpu(), a, rtol=1e-3, atol=1e-4)
    torch.stack([a.square().mean() for a in own]).sum().backward()
    torch.stack([b.square().mean() for b in other]).sum().backward()
    # Sums of thousands of terms that nearly cancel have an error in proportion to the terms, not to the sum.
    largest = max(float(p.grad.abs().max()) for p in model.parameters() if p.grad is not None)
    for (path, p), q in zip(model.named_parameters(), there.parameters(), strict=True):
        if p.grad is None or q.grad is None:
            assert p.grad is q.grad, path
            continue
        scale = max(float(p.grad.abs().max()), 1e-3 * largest)
        assert float((q.grad.cpu() - p.grad).abs().max()) / scale < 2e-2, path


def network() -> nn.Module:
    torch.manual_seed(0)

    def head() -> nn.Module:
        return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))

    convolutions = [nn.Sequential(nn.Conv2d(3 if n == 0 else 8, 8, 3, padding=1), nn.ReLU()) for n in range(3)]
    model = nn.Sequential(*convolutions, *head()).eval()
    return attach_exits(model, Exits(("0", "1"), [head(), head()]))


@pytest.mark.parametrize("batch", [1, 4])
def test_stages_of_a_plan_leave_and_answer_there_as_here(tmp_path: Path, batch: int) -> None:
    plan = replace(Plan.of(network(), (3, 8, 8)), decisions=(Exit("0"), Exit("1")))
    artifact = export_plan(plan, Target("torch", threads=1, batch=batch), tmp_path / "a", shape=(3, 8, 8))
    x = np.random.default_rng(0).standard_normal((64, 3, 8, 8), dtype=np.float32)
    here = Stages(artifact, 1)
    found = [here.run_all(part)[1] for part in x.reshape(-1, batch, 3, 8, 8)]
    middle = [float(np.median(column)) for column in np.concatenate(found).T]
    decisions = [{**d, "threshold": t} for d, t in zip(artifact.plan["decisions"], middle, strict=True)]
    artifact = artifact.with_decisions(decisions, {})
    want, left = Stages(artifact, 1).run_many(x, batch)
    assert len(np.unique(left)) == 3
    for stage in artifact.plan["stages"]:
        stage["options"]["device"] = "cuda:0"
    got, where = Stages(artifact, 1).run_many(x, batch)
    assert (where == left).mean() > 0.95  # the medians themselves may fall on either side
    np.testing.assert_allclose(got[where == left], want[where == left], rtol=1e-3, atol=1e-4)


def task() -> Task:
    rng = np.random.default_rng(0)
    splits = []
    for count in (256, 64, 64):
        labels = rng.integers(0, 4, count)
        x = rng.standard_normal((count, 3, 8, 8)).astype(np.float32)
        x[np.arange(count), labels % 3] += labels[:, None, None]
        splits.append(ArraySplit("blobs", x, labels))
    train, choose, report = splits
    return Task(choose, report, train, (3, 8, 8), ("a", "b", "c", "d"), name="blobs")


@pytest.mark.parametrize("precision", ["32-true", "auto"])
def test_training_there_learns_and_goes_on(tmp_path: Path, precision: str) -> None:
    def trained(folder: Path, epochs_first: int | None) -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
        settings = {"epochs": 4, "batch": 32, "precision": precision, "folder": folder, "augment": False}
        if epochs_first is not None:

            class Stop(Exception):
                pass

            def stop(event: object) -> None:
                if event.epoch == epochs_first:  # type: ignore[attr-defined]
                    raise Stop

            with pytest.raises(Stop):
                fit(model, task(), progress=stop, **settings)
        result = fit(model, task(), resume=epochs_first is not None, **settings)
        assert result.history[-1]["loss"] < result.history[0]["loss"]
        return model

    whole, resumed = trained(tmp_path / "a", None), trained(tmp_path / "b", 2)
    assert next(whole.parameters()).device.type == "cpu"
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
