"""A shared recovery: its loss by hand, what it leaves alone, that it teaches sub-networks, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lissom.errors import LissomError
from lissom.layers.elastic import largest, smallest
from lissom.models.ofa import OFAMobileNetV3
from lissom.tasks.task import Task
from lissom.training.loop import fit
from lissom.training.methods.recovery import Answers, kl
from lissom.training.methods.shared_recovery import SharedRecovery
from lissom.training.supernet import supernet_of

FIT: dict[str, Any] = {"batch": 40, "lr": 5e-3, "threads": 1}


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3)).eval()


def pair(task: Task) -> tuple[nn.Module, Any]:
    """An original, and the super-network of its like with other weights."""
    original, other = network(), network()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return original, supernet_of(other, task.shape)


def images(task: Task) -> tuple[torch.Tensor, torch.Tensor]:
    assert task.fit is not None
    return torch.from_numpy(task.fit.inputs(slice(0, 8))), torch.from_numpy(task.fit.labels[:8])


def test_the_loss_is_of_the_whole_and_the_smallest(task: Task) -> None:
    original, model = pair(task)
    x, y = images(task)
    method = SharedRecovery(original=original, random=0, eps0=0.25, ramp=1.0, answers=Answers(3.0, 0.6))
    method.prepare(model, task)
    found = method.loss(model, x, y, task)

    def own(setting: Any) -> torch.Tensor:
        model.set_active(setting)
        answer = model(x)
        return 0.6 * 9 * kl(original(x) / 3, answer / 3) + 0.4 * task.loss(answer, y)

    with torch.no_grad():
        want = own(largest(model)) + 0.25 * own(smallest(model))
    torch.testing.assert_close(found.detach(), want)
    half = method.at(0.5).loss(model, x, y, task)
    with torch.no_grad():
        torch.testing.assert_close(half.detach(), own(largest(model)) + 0.625 * own(smallest(model)))
    assert method.loss(model, x, y, task).requires_grad
    assert model.active == largest(model)
    unlabelled = method.loss(model, x, None, task)
    with torch.no_grad():
        model.set_active(smallest(model))
        small = model(x)
        model.set_active(largest(model))
        want = 9 * (kl(original(x) / 3, model(x) / 3) + 0.25 * kl(original(x) / 3, small / 3))
    torch.testing.assert_close(unlabelled.detach(), want)


def test_sub_networks_come_nearer_to_the_original_which_stays(task: Task) -> None:
    original, model = pair(task)
    before = {name: value.clone() for name, value in original.state_dict().items()}
    x, _ = images(task)

    def distance() -> float:
        with torch.no_grad():
            return float(kl(original(x), model.extract(smallest(model)).eval()(x)))

    far = distance()
    fit(model, task, method=SharedRecovery(original=original, answers=Answers(alpha=1.0)), epochs=4, **FIT)
    assert distance() < 0.5 * far
    assert all(torch.equal(value, before[name]) for name, value in original.state_dict().items())


def test_what_it_refuses(task: Task) -> None:
    original, model = pair(task)
    with pytest.raises(LissomError, match="trains super-networks, and Sequential is none"):
        SharedRecovery(original=original).prepare(network(), task)
    for wrong in (None, model):
        with pytest.raises(LissomError, match="learns from the original model"):
            SharedRecovery(original=wrong).prepare(model, task)


def test_statistics_stay_those_of_the_whole(task: Task) -> None:
    torch.manual_seed(0)
    model = OFAMobileNetV3(num_classes=3, in_chans=1, widths=(8, 16), first=8, neck=16, features=24, depths=(1, 2),
                           expands=(2, 4), kernels=(3, 5), stem_stride=1)  # fmt: skip
    original = OFAMobileNetV3(num_classes=3, in_chans=1, widths=(8, 16), first=8, neck=16, features=24, depths=(1, 2),
                              expands=(2, 4), kernels=(3, 5), stem_stride=1)  # fmt: skip
    x, y = images(task)
    counts = [m.num_batches_tracked for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    method = SharedRecovery(original=original)
    method.prepare(model.train(), task)
    method.at(0.5).loss(model, x, y, task).backward()
    assert {int(count) for count in counts} == {1}
