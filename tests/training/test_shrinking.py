"""Super-network training: eps, sandwich steps, what stays bit by bit, stages, resuming, recalibration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lissom.errors import LissomError
from lissom.layers.elastic import largest, smallest
from lissom.models.ofa import OFAMobileNetV3
from lissom.tasks.task import Task
from lissom.training.loop import evaluate, fit
from lissom.training.methods.delayed_shrinking import DelayedShrinking, Sandwich, eps_at, soft_cross_entropy
from lissom.training.methods.progressive_shrinking import ProgressiveShrinking, published_stages, teacher_of
from lissom.training.recalibration import recalibrate
from lissom.training.shrinking import fit_progressive, lengths

SIZES: dict[str, Any] = {"widths": (8, 16), "first": 8, "neck": 16, "features": 24, "depths": (1, 2), "kernels": (3, 5),
                         "expands": (2, 4), "stem_stride": 1, "in_chans": 1, "num_classes": 3}  # fmt: skip
SGD: dict[str, Any] = {"optimizer": "sgd", "weight_decay": 1e-3, "batch": 40, "lr": 0.05, "clip": None}


def super_network(**more: Any) -> OFAMobileNetV3:
    torch.manual_seed(0)
    return OFAMobileNetV3(**{**SIZES, **more})


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, other[name]) for name, value in one.items())


def test_eps() -> None:
    assert eps_at(0.0) == eps_at(0.4999) == 0
    assert eps_at(0.5) == 1e-4
    assert eps_at(0.55) == pytest.approx(1e-4 + (1 - 1e-4) / 2)
    assert eps_at(0.6) == pytest.approx(1)
    assert eps_at(0.9) == 1
    assert eps_at(0.5, ramp=0) == 1
    assert eps_at(0.0, start=0, eps0=1) == 1


def test_soft_cross_entropy_of_labels_is_cross_entropy() -> None:
    logits, labels = torch.randn(5, 4), torch.tensor([0, 1, 2, 3, 0])
    hard = nn.functional.one_hot(labels, 4).float()
    torch.testing.assert_close(soft_cross_entropy(logits, hard), nn.functional.cross_entropy(logits, labels))


@pytest.mark.parametrize("method", [DelayedShrinking(start=1.0), DelayedShrinking(start=0, eps0=0, ramp=1, weight=0)])
def test_without_eps_the_whole_network_trains_as_ever(task: Task, method: DelayedShrinking) -> None:
    plain, own = super_network(drop_rate=0.2), super_network(drop_rate=0.2)
    fit(plain, task, epochs=2, **SGD)
    fit(own, task, method=method, epochs=2, **SGD)
    assert same(weights(plain), weights(own))


def test_before_the_start_nothing_else_is_trained(task: Task) -> None:
    network = super_network()
    matrix = network.blocks[1].depthwise.conv.matrix_3
    x, y = torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 2, 0])
    method = DelayedShrinking()
    method.at(0.49).loss(network.train(), x, y, task).backward()
    assert matrix.grad is None
    method.at(0.5).loss(network, x, y, task).backward()
    assert matrix.grad is not None
    assert network.active == largest(network)


def gradient(network: nn.Module, method: DelayedShrinking, share: float, task: Task) -> torch.Tensor:
    network.zero_grad()
    torch.manual_seed(3)
    x, y = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(1)), torch.arange(6) % 3
    method.at(share).loss(network.train(), x, y, task).backward()
    return network.blocks[1].expand.conv.weight.grad.clone()


def test_eps_weighs_gradients_alone(task: Task) -> None:
    """g = g_full + eps sum g_i, exactly linear in eps."""
    network, method = super_network(), DelayedShrinking(start=0, eps0=0, ramp=1)
    full, half, whole = (gradient(network, method, share, task) for share in (0.0, 0.5, 1.0))
    torch.testing.assert_close(half, (full + whole) / 2, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(full, whole)


def test_the_statistics_are_the_whole_networks(task: Task) -> None:
    one, other = super_network(), super_network()
    x, y = torch.randn(6, 1, 8, 8), torch.arange(6) % 3
    Sandwich().loss(one.train(), x, y, task)
    other.train()(x)
    names = [name for name in weights(one) if "running" in name or "tracked" in name]
    assert names
    assert all(torch.equal(weights(one)[name], weights(other)[name]) for name in names)


def test_no_gradient_reaches_the_teacher(task: Task) -> None:
    """Of the sub-networks' losses the largest channels get none: soft labels are detached."""
    network = super_network().train()
    x = torch.randn(6, 1, 8, 8)
    with torch.no_grad():
        soft = network(x).softmax(1)
    network.set_active(smallest(network))
    soft_cross_entropy(network(x), soft).backward()
    hidden = network.blocks[1].hidden(2)
    assert network.blocks[1].expand.conv.weight.grad[hidden:].abs().sum() == 0
    assert network.blocks[2].project.conv.weight.grad is None


@pytest.mark.parametrize("teachers", [pytest.param("current", marks=pytest.mark.full), "snapshots"])
def test_a_training_cut_off_goes_on(task: Task, tmp_path: Path, teachers: str) -> None:
    method = {"teachers": teachers, "start": 0.25, "every": 0.2, "ramp": 0.3}
    whole, parts = super_network(), super_network()
    fit(whole, task, method=DelayedShrinking(**method), epochs=4, seed=5, folder=tmp_path / "a", **SGD)

    def stop(event: Any) -> None:
        if event.epoch == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(
            parts,
            task,
            method=DelayedShrinking(**method),
            epochs=4,
            seed=5,
            folder=tmp_path / "b",
            progress=stop,
            **SGD,
        )
    again = super_network()
    fit(again, task, method=DelayedShrinking(**method), epochs=4, seed=5, folder=tmp_path / "b", resume=True, **SGD)
    assert same(weights(whole), weights(again))
    assert not same(weights(whole), weights(super_network()))


def test_snapshots_are_taken_in_time_and_kept_few(task: Task) -> None:
    network, method = super_network(), DelayedShrinking(teachers="snapshots", start=0.5, every=0.1, keep=2)
    x, y = torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 2, 0])
    method.prepare(network, task)
    taken = []
    for share in (0.2, 0.5, 0.55, 0.61, 0.71, 0.75, 0.82):
        method.at(share).loss(network.train(), x, y, task)
        taken.append((method._copies.taken, len(method._copies.models)))
    assert taken == [(0, 0), (1, 1), (1, 1), (2, 2), (3, 2), (3, 2), (4, 2)]


def test_resolutions_are_drawn_a_batch(task: Task) -> None:
    network = super_network().train()
    seen: list[tuple[int, ...]] = []
    network.stem.register_forward_pre_hook(lambda module, given: seen.append(tuple(given[0].shape)))
    x, y = torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 2, 0])
    for _ in range(8):
        Sandwich(resolutions=(6, 8)).loss(network, x, y, task)
    assert len(seen) == 8 * 4
    batches = [set(seen[i : i + 4]) for i in range(0, 32, 4)]
    assert all(len(batch) == 1 for batch in batches)  # one size in all passes of a step
    assert set().union(*batches) == {(4, 1, 6, 6), (4, 1, 8, 8)}
    seen.clear()
    ProgressiveShrinking(resolutions=(6,)).loss(network, x, y, task)
    assert seen == [(4, 1, 6, 6)]


@pytest.mark.full
def test_sub_networks_learn(task: Task) -> None:
    network = super_network()
    before = recalibrate(network.extract(smallest(network)), task.fit)
    untrained = evaluate(before, task, task.choose).value
    fit(network, task, method="sandwich", epochs=10, augment=False, **SGD)
    small = recalibrate(network.extract(smallest(network)), task.fit)
    assert evaluate(small, task, task.choose).value > max(80, untrained)
    assert evaluate(network, task, task.choose).value > 80


# Progressive shrinking


def test_published_stages() -> None:
    with torch.device("meta"):
        stages = published_stages(OFAMobileNetV3())
    assert [(s.epochs, s.lr, s.count, s.sort) for s in stages] == [
        (120, 3e-2, 1, None), (25, 2.5e-3, 2, None), (120, 7.5e-3, 2, None), (25, 2.5e-3, 4, 0), (120, 7.5e-3, 4, 1),
    ]  # fmt: skip
    assert [dict(s.opened) for s in stages] == [
        {"kernel": (3, 5, 7)},
        {"kernel": (3, 5, 7), "depth": (3, 4)},
        {"kernel": (3, 5, 7), "depth": (2, 3, 4)},
        {"kernel": (3, 5, 7), "depth": (2, 3, 4), "expand": (4, 6)},
        {"kernel": (3, 5, 7), "depth": (2, 3, 4), "expand": (3, 4, 6)},
    ]
    assert [round(s.warmup * s.epochs, 9) for s in stages] == [5, 0, 5, 0, 5]


def test_lengths() -> None:
    assert lengths([120, 25, 120, 25, 120], 10) == [3, 1, 3, 1, 2]
    assert sum(lengths([1, 2, 3], 17)) == 17
    assert lengths([1, 1], 2) == [1, 1]
    with pytest.raises(LissomError, match="too few"):
        lengths([1, 1], 1)


def test_a_stage_draws_what_is_open(task: Task) -> None:
    network = super_network()
    seen: list[dict[str, Any]] = []
    set_active = network.set_active
    network.set_active = lambda setting: (seen.append(dict(setting)), set_active(setting))[1]
    x, y = torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 2, 0])
    method = ProgressiveShrinking(opened=(("kernel", (3, 5)),), count=8)
    method.loss(network.train(), x, y, task).backward()
    drawn = seen[:-1]
    assert len(drawn) == 8
    kinds = {d.name: d.kind for d in network.dimensions()}
    whole = largest(network)
    assert all(value == whole[name] for s in drawn for name, value in s.items() if kinds[name] != "kernel")
    assert {value for s in drawn for name, value in s.items() if kinds[name] == "kernel"} == {3, 5}


def test_progressive_shrinking_goes_on(task: Task, tmp_path: Path) -> None:
    start = super_network()
    fit(start, task, epochs=2, **SGD)
    rest = {k: v for k, v in SGD.items() if k != "lr"}
    whole, again = super_network(), super_network()
    for network in (whole, again):
        network.load_state_dict(start.state_dict())
    done = fit_progressive(whole, task, epochs=4, folder=tmp_path / "a", **rest)
    assert [len(result.history) for result in done] == [2, 1, 1]

    def stop(event: Any) -> None:
        if event.epochs == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit_progressive(again, task, epochs=4, folder=tmp_path / "b", progress=stop, **rest)
    again.load_state_dict(start.state_dict())
    fit_progressive(again, task, epochs=4, folder=tmp_path / "b", resume=True, **rest)
    assert same(weights(whole), weights(again))


# Recalibration


def test_statistics_are_those_of_the_data(task: Task) -> None:
    network = super_network()
    plain = network.extract(smallest(network))
    recalibrate(plain, task.fit, images=1000, batch=len(task.fit))
    x = torch.from_numpy(task.fit.inputs(slice(None)))
    with torch.no_grad():
        y = plain.stem.conv(x)
    assert not plain.training
    torch.testing.assert_close(plain.stem.bn.running_mean, y.mean((0, 2, 3)), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(plain.stem.bn.running_var, y.var((0, 2, 3)), rtol=1e-3, atol=1e-5)
    assert plain.stem.bn.momentum == 0.1


def test_what_cannot_be(task: Task) -> None:
    plain = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    for method in ("delayed_shrinking", "sandwich", "progressive_shrinking"):
        with pytest.raises(LissomError, match="super-network"):
            fit(plain, task, method=method, epochs=1)
    with pytest.raises(LissomError, match=r"extract\(\)"):
        recalibrate(super_network(), task.fit)
    with pytest.raises(LissomError, match="'heads'"):
        fit(super_network(), task, method=ProgressiveShrinking(opened=(("heads", (1,)),)), epochs=1)
    network = super_network()
    with pytest.raises(LissomError, match="a copy"):
        fit(network, task, method=ProgressiveShrinking(teacher=network), epochs=1)
    assert recalibrate(plain, task.fit) is plain
    assert not teacher_of(network).training
    for wrong in ({"start": 2}, {"eps0": -1}, {"random": -1}, {"teachers": "last"}, {"keep": 0}, {"every": 0}):
        with pytest.raises(LissomError, match=next(iter(wrong))):
            DelayedShrinking(**wrong)
