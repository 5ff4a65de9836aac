"""CBNet's pairs and loss: the published rules on given figures, thresholds, and the term of a recovery."""

from __future__ import annotations

import json
import math
import os
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from lissom.errors import LissomError
from lissom.layers.converting import ConvertingAutoencoder
from lissom.training.loop import fit
from lissom.training.methods.cbnet import (
    Conversion,
    auto_threshold,
    conversion_loss,
    easy_mask,
    easy_pools,
    exit_entropy,
    pair_targets,
)
from lissom.training.methods.recovery import Recovery

PARITY = os.environ.get("LISSOM_PARITY")
CASES = json.loads((Path(PARITY) / "cbnet" / "cases.json").read_text())["cases"] if PARITY else []


@pytest.mark.skipif(not PARITY, reason="set LISSOM_PARITY to the folder of published figures")
def test_the_published_rules() -> None:
    assert len(CASES) == 2
    for case in CASES:
        logits = torch.tensor(case["early_exit_logits"], dtype=torch.float64)
        labels = torch.tensor(case["labels"])
        entropy, right = exit_entropy(logits), logits.argmax(1) == labels
        torch.testing.assert_close(entropy, torch.tensor(case["entropy"], dtype=torch.float64), rtol=0, atol=1e-8)
        easy = easy_mask(entropy, case["threshold"])
        assert easy.tolist() == case["exits_early"]
        found = pair_targets(entropy, right, labels, easy, "keep")
        assert found.tolist() == case["target_index_keep_easy_lowest_entropy"]
        code, made, target = (
            torch.tensor(case[name], dtype=torch.float64) for name in ("encoder_activation", "reconstruction", "target")
        )
        assert float(conversion_loss(made, target, code, 0.0)) == pytest.approx(case["mse"], rel=1e-12)
        assert float(code.abs().sum(1).mean()) == pytest.approx(case["activity_l1_mean"], rel=1e-12)
        loss = conversion_loss(made, target, code, case["activity_coef"])
        assert float(loss) == pytest.approx(case["loss"], rel=1e-12)


# Entropies, whether right, labels: class 0 has two easy right images and an easy wrong one, class 1 none that is easy.
ENTROPY = torch.tensor([0.3, 0.1, 0.05, 0.9, 0.6, 0.7, 0.2])
RIGHT = torch.tensor([True, True, False, True, True, True, False])
LABELS = torch.tensor([0, 0, 0, 0, 1, 1, 1])
EASY = ENTROPY < 0.5


def test_each_rule() -> None:
    def paired(rule: str, **more: object) -> list[int]:
        return pair_targets(ENTROPY, RIGHT, LABELS, EASY, rule, fallback=True, **more).tolist()  # type: ignore[arg-type]

    # 2 is the easiest of its class, but classified wrongly: it is nobody's target, not its own either.
    assert paired("keep") == [0, 1, 1, 1, 4, 4, 4]
    assert paired("prototype") == [1, 1, 1, 1, 4, 4, 4]
    drawn = [paired("random", generator=torch.Generator().manual_seed(seed)) for seed in range(20)]
    assert {n for row in drawn for n in row[:4]} == {0, 1}
    assert all(row[4:] == [4, 4, 4] for row in drawn)
    assert drawn[0] == paired("random", generator=torch.Generator().manual_seed(0))


def test_a_class_without_targets_is_told() -> None:
    with pytest.raises(LissomError, match=r"the class 1 has no easy image.*0\.6; raise the threshold"):
        pair_targets(ENTROPY, RIGHT, LABELS, EASY, "keep")
    with pytest.raises(LissomError, match="the class 'seven' has no image that the exit classifies rightly"):
        easy_pools(ENTROPY, RIGHT & (LABELS == 0), LABELS, EASY, fallback=True, classes=("zero", "seven"))
    with pytest.raises(LissomError, match="no rule 'nearest' for targets; known: keep, random, prototype"):
        pair_targets(ENTROPY, RIGHT, LABELS, EASY, "nearest")


@pytest.mark.parametrize("rule", ["keep", "random", "prototype"])
def test_targets_have_the_label_and_are_easy_and_right(rule) -> None:
    random = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(200, 4, generator=random)
    labels = torch.randint(4, (200,), generator=random)
    entropy, right = exit_entropy(logits), logits.argmax(1) == labels
    easy = easy_mask(entropy, 0.4)
    found = pair_targets(entropy, right, labels, easy, rule, generator=random)
    assert torch.equal(labels[found], labels)
    assert bool((easy & right)[found].all())
    if rule == "keep":
        assert torch.equal(found[easy & right], torch.arange(200)[easy & right])
        assert bool(easy.any() and (easy & ~right).any() and (~easy).any())


def test_entropy_is_in_nats_and_survives_large_logits() -> None:
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [500.0, 0.0, -500.0, 0.0]])
    torch.testing.assert_close(exit_entropy(logits), torch.tensor([4.0, 1.0]).log())


def test_the_threshold_is_chosen_by_share_and_accuracy() -> None:
    entropy = torch.linspace(0.01, 1, 100)
    right = torch.ones(100, dtype=torch.bool)
    assert int((entropy < auto_threshold(entropy, right)).sum()) == 70  # all are right: as many as may be
    right[44:] = False
    assert int((entropy < auto_threshold(entropy, right)).sum()) == 44  # 44 of 45 are fewer than 99.5 %
    right[:] = False
    assert int((entropy < auto_threshold(entropy, right)).sum()) == 30  # never fewer
    mixed = torch.randperm(100, generator=torch.Generator().manual_seed(0))
    assert auto_threshold(entropy[mixed], right[mixed]) == auto_threshold(entropy, right)
    level = torch.full((10,), 0.5)
    assert bool((level < auto_threshold(level, right[:10])).all())


def two_parts(shape: tuple[int, int, int], light: nn.Module, **sizes: object) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(OrderedDict(autoencoder=ConvertingAutoencoder(shape, **sizes), light=light))  # type: ignore[arg-type]


class Wise(nn.Module):
    """Knows the stripes: logits by what rows, columns and the corner hold; larger where ``sure``."""

    def __init__(self) -> None:
        super().__init__()
        self.sure = nn.Parameter(torch.tensor(4.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = (x[:, 0].mean(2)[:, ::2].mean(1) - x[:, 0].mean(2)[:, 1::2].mean(1)).abs()
        columns = (x[:, 0].mean(1)[:, ::2].mean(1) - x[:, 0].mean(1)[:, 1::2].mean(1)).abs()
        corner = x[:, 0, :4, :4].mean((1, 2)) - x[:, 0, 4:, 4:].mean((1, 2))
        return self.sure * torch.stack([rows, columns, corner], 1)


@pytest.mark.parametrize("target", ["keep", "random", "prototype"])
@pytest.mark.parametrize("labelled", [True, False])
def test_it_learns_to_make_easy_images(task, target, labelled) -> None:
    if not labelled:
        task = task.with_splits(fit=type(task.fit)("fit", task.fit.x, None))
    light = Wise()
    model = two_parts((1, 8, 8), light, hidden=(48,), code=8)
    term = Conversion(target, scale=True)
    before = {name: value.clone() for name, value in light.state_dict().items()}
    assert term.easy == (0.0, 0.0)
    epochs = 150 if target == "prototype" and labelled else 30
    done = fit(model, task, method=Recovery(Wise(), (term,)), epochs=epochs, batch=32, lr=3e-3, augment=False)
    assert done.history[-1]["loss"] < 0.8 * done.history[0]["loss"]
    threshold, share = term.easy
    assert 0.25 < share < 0.75
    assert all(torch.equal(value, before[name]) for name, value in light.state_dict().items())
    if epochs > 30:  # the mean of stripes that begin here or there is grey; one prototype is not
        x = torch.from_numpy(task.report.inputs(slice(None)))
        labels = torch.from_numpy(task.report.labels)
        with torch.no_grad():
            raw, made = light(x), model(x)
        before_it, behind_it = (float((exit_entropy(z) < threshold).double().mean()) for z in (raw, made))
        assert behind_it > before_it + 0.05
        assert float((made.argmax(1) == labels).double().mean()) > 0.8
    # The range of the training images stands for that of pixels.
    pixels = model.autoencoder.pixels(torch.from_numpy(task.fit.x))
    assert float(pixels.min()) == pytest.approx(0, abs=1e-6)
    assert float(pixels.max()) == pytest.approx(1, abs=1e-6)


def test_targets_of_a_batch_follow_the_rule(task) -> None:
    model = two_parts((1, 8, 8), Wise(), hidden=(8,), code=4)
    x, y = torch.from_numpy(task.fit.inputs(slice(0, 64))), torch.from_numpy(task.fit.labels[:64])
    every = torch.from_numpy(task.fit.inputs(slice(None)))
    labels = torch.from_numpy(task.fit.labels)
    with torch.no_grad():
        logits = model.light(every)
    entropy, right = exit_entropy(logits), logits.argmax(1) == labels
    for rule in ("keep", "random", "prototype"):
        term = Conversion(rule, scale=True)
        term.prepare(model, Wise(), task)
        easy = easy_mask(entropy, term.easy[0])
        pixels = model.autoencoder.pixels(every)
        with torch.no_grad():
            wanted = term._wanted(model.autoencoder, model.light, model.autoencoder.pixels(x), y, task)
        if rule == "random":
            pools = easy_pools(entropy, right, labels, easy, fallback=True)
            for made, label in zip(wanted, y.tolist(), strict=True):
                assert min(float((made - pixels[i]).abs().max()) for i in pools[label].tolist()) < 1e-6
            assert len({row.numpy().tobytes() for row in wanted}) > 10
        else:
            found = pair_targets(entropy, right, labels, easy, rule, fallback=True)[:64]
            torch.testing.assert_close(wanted, pixels[found])


def test_an_identity_autoencoder_leaves_the_exits_logits() -> None:
    light = Wise()
    model = nn.Sequential(OrderedDict(autoencoder=nn.Identity(), light=light))
    x = torch.randn(3, 1, 8, 8)
    assert torch.equal(model(x), light(x))


def test_what_it_refuses(task, network) -> None:
    for wrong, says in (
        ({"target": "mean"}, "no rule 'mean'"),
        ({"activity": -1.0}, "at least 0"),
        ({"threshold": 0.0}, "above 0"),
        ({"threshold": "low"}, "or 'auto'"),
        ({"threshold": True}, "the threshold is True"),
        ({"threshold": math.inf}, "the threshold is inf"),
    ):
        with pytest.raises(LissomError, match=says):
            Conversion(**wrong)
    with pytest.raises(LissomError, match="which the changed model lacks"):
        fit(network(), task, method=Recovery(network(1), (Conversion(),)), epochs=1)
    level = task.with_splits(fit=type(task.fit)("fit", np.ones_like(task.fit.x), task.fit.labels))
    with pytest.raises(LissomError, match="all values of the training images are 1"):
        Conversion(scale=True).prepare(two_parts((1, 8, 8), Wise()), Wise(), level)
