"""What proofs of operators share: data without overlap, equal budgets, resumed arms, memory, claims by interval."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from lissom.data.sources import DataSet, read
from lissom.errors import LissomError
from lissom.proofs import arms
from lissom.proofs.arms import Budget, Trained
from lissom.proofs.base import INCONCLUSIVE, NOT_SHOWN, SHOWS, Settings

TINY = Budget(steps=3, batch=16, lr=1e-3)


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.Flatten(), nn.Linear(4 * 9, 10))


def settings(folder: Path, seeds: tuple[int, ...] = (0, 1)) -> Settings:
    return Settings(True, seeds, lambda sentence: None, folder)


def test_images_that_judge_were_not_trained_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LISSOM_DATA", raising=False)
    data = arms.pooled(arms.data_set("cifar10"))
    assert data.name == "digits"
    task = arms.image_task(data, 8, 0, train=300)
    assert (len(task.fit), len(task.report)) == (300, 1497)
    assert np.bincount(task.fit.labels).min() >= 28
    # The digits hold a few pictures twice; rows are what counts.
    assert not set(task.fit._images.rows) & set(task.report._images.rows)
    other = arms.image_task(data, 8, 1, train=300)
    assert set(task.fit._images.rows) != set(other.fit._images.rows)
    whole = arms.image_task(read("digits"), 8, 0, held_out=50, channels=1)
    assert whole.shape == (1, 8, 8)
    assert len(whole.fit) == 1438
    assert len(whole.report) == 50
    with pytest.raises(LissomError, match="none are left"):
        arms.image_task(data, 8, 0)


def test_splits_of_several_files_are_not_pooled() -> None:
    data = read("digits")
    with pytest.raises(LissomError, match="cannot be divided anew"):
        arms.pooled(DataSet("both", data.classes, train=data.train, test=read("digits").test))


def test_a_run_that_was_killed_goes_on(tmp_path: Path) -> None:
    data = arms.pooled(read("digits"))
    looked: list[str] = []

    def look(name: str, model: nn.Module, task: object) -> dict[str, float]:
        looked.append(name)
        return {"weight": float(model[0].weight.detach().sum())}

    def run(budget: Budget = TINY) -> dict[str, list[Trained]]:
        makes = {"a": network, "b": network}
        return arms.run_arms(
            settings(tmp_path), makes, lambda seed: arms.image_task(data, 8, seed, train=60), budget, look
        )

    first = run()
    assert [arm.seed for arm in first["a"]] == [0, 1]
    # The same network under two names: the same images, order and start.
    assert [arm.accuracy for arm in first["a"]] == [arm.accuracy for arm in first["b"]]
    assert first["a"][0].figures != first["a"][1].figures
    assert (first["a"][0].parameters, first["a"][0].macs) == (4 * 27 + 4 + 370, 9 * 4 * 27 + 360)
    assert len(looked) == 4
    path = tmp_path / arms.KEPT
    text = path.read_text()
    path.write_text(text[: text.rindex("\n") + 40])  # killed within the last of four lines
    assert run()["a"] == first["a"]
    assert len(looked) == 5
    run(Budget(steps=2, batch=16, lr=1e-3))
    assert len(looked) == 9
    assert [row.cost["parameters"] for row in arms.accuracy_rows(first)] == [482, 482]
    assert arms.figure_rows(first, "weight")[0].values == tuple(a.figures["weight"] for a in first["a"])
    assert arms.figure_rows(first, "gate") == []


def summing(batch: int, numbers: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(batch, 4, generator=numbers)
    return x, x.sum(1, keepdim=True)


def test_a_generated_task_is_learnt_and_is_the_same_for_all_arms(tmp_path: Path) -> None:
    scored: list[float] = []

    def score(outputs: torch.Tensor, targets: torch.Tensor) -> float:
        scored.append(nn.functional.mse_loss(outputs, targets).item())
        return scored[-1]

    def run() -> dict[str, list[Trained]]:
        makes = {"a": lambda: nn.Linear(4, 1), "b": lambda: nn.Linear(4, 1)}
        budget = Budget(150, 16, 5e-2, weight_decay=0)
        return arms.run_stream(settings(tmp_path), makes, summing, nn.functional.mse_loss, score, budget, judged=64)

    found = run()
    assert [arm.accuracy for arm in found["a"]] == [arm.accuracy for arm in found["b"]] == [scored[0], scored[2]]
    assert max(scored) < 0.01
    assert (found["a"][0].parameters, found["a"][0].macs, found["a"][0].count) == (5, 4, 64)
    assert run() == found
    assert len(scored) == 4
    assert torch.equal(summing(4, arms.generator(5))[0], summing(4, arms.generator(5))[0])
    assert not torch.equal(summing(4, arms.generator(5))[0], summing(4, arms.generator(5, 1))[0])


def test_every_call_is_timed_once_a_round() -> None:
    ran: list[str] = []
    calls = {name: (lambda name=name: ran.append(name)) for name in "abc"}
    times = arms.interleaved(calls, repetitions=2, rounds=3)
    assert all(len(values) == 2 for values in times.values())
    assert [ran.count(name) for name in "abc"] == [10, 10, 10]
    assert {"".join(ran[i : i + 3]) for i in range(0, 30, 3)} == {"abc", "bca", "cab"}
    assert arms.ratios({"slow": [4.0, 6.0], "fast": [2.0, 2.0]}, "slow", "fast") == [2.0, 3.0]
    model = nn.Linear(3, 2)
    arms.step_call(model, torch.ones(1, 3))()
    assert model.weight.grad is not None
    assert not arms.forward_call(model, torch.ones(1, 3))().requires_grad


def test_memory_is_what_tensors_hold_at_one_time() -> None:
    x = torch.ones(1000)

    def call() -> None:
        y = x[:500] + 1  # a view of what was there: 2000 bytes
        z = torch.cat([y, y])  # and 4000 more
        del y
        w = z.view(10, 100) * 2  # 4000 for 2000 freed
        w.add_(1)

    assert arms.peak_memory(call) == 8000
    assert arms.peak_memory(lambda: x.view(10, 100).t()) == 0


def trained(*accuracies: float) -> list[Trained]:
    return [Trained("x", seed, value, 100, 1, 1, 1, 1.0) for seed, value in enumerate(accuracies)]


def test_claims_follow_their_figures() -> None:
    high, low, noisy = trained(90, 91, 90), trained(80, 80, 81), trained(60, 99, 85)
    assert arms.better("", high, low, matters=1).verdict == SHOWS
    assert arms.better("", low, high, matters=1).verdict == NOT_SHOWN
    assert arms.better("", high, noisy, matters=1).verdict == INCONCLUSIVE
    assert arms.better("", [0.1, 0.11], [0.5, 0.52], matters=0.1, sign=-1).verdict == SHOWS
    assert arms.no_worse("", high, trained(90.2, 91.1, 90.3), margin=0.5).verdict == SHOWS
    assert arms.no_worse("", low, high, margin=0.5).verdict == NOT_SHOWN
    assert arms.no_worse("", noisy, high, margin=0.5).verdict == INCONCLUSIVE
    times = {"slow": [3.0, 3.1, 3.2], "fast": [1.0, 1.0, 1.0]}
    assert arms.faster("", times, "slow", "fast", at_least=2).verdict == SHOWS
    assert arms.faster("", times, "slow", "fast", at_least=4).verdict == NOT_SHOWN
    assert "3.10 [2.85, 3.35] times as fast" in arms.faster("", times, "slow", "fast").evidence
    assert arms.together([SHOWS, INCONCLUSIVE]) == INCONCLUSIVE
    assert arms.together([SHOWS, INCONCLUSIVE, NOT_SHOWN]) == NOT_SHOWN
    assert arms.together([SHOWS, SHOWS]) == SHOWS
    assert arms.spread([1.0]) == "1.00 (one seed)"
