"""Two networks in one module: how unsure an answer is to the last digit, and which of two stands."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from lissom.layers.cascade import SCORES, Cascade, Member, PostCheck, Renormalise, Temperature, doubt
from lissom.runtime.decisions import confidence, difference, normalised_entropy

PUBLISHED = {"confidence": confidence, "difference": difference, "entropy": lambda z: 1 - normalised_entropy(z)}


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("spread", [0.1, 3.0, 20.0])
def test_doubt_is_one_minus_the_score(score: str, spread: float) -> None:
    logits = spread * torch.randn(200, 7, generator=torch.Generator().manual_seed(0))
    np.testing.assert_allclose(doubt(logits, score).numpy(), 1 - PUBLISHED[score](logits.numpy()), atol=2e-6)


@pytest.mark.parametrize("score", SCORES)
def test_doubt_tells_answers_apart_whose_scores_are_both_one(score: str) -> None:
    sure = torch.tensor([[20.0, 0.0, 0.0], [25.0, 0.0, 0.0], [40.0, 0.0, 0.0]])
    found = doubt(sure, score)
    assert (found > 0).all()
    assert found[0] > found[1] > found[2]
    exact = doubt(sure.double(), score)
    torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=0)
    a, b = (np.exp(-20.0), np.exp(-20.0)) if score != "entropy" else (None, None)
    if score == "difference":
        assert exact[0].item() == pytest.approx((a + b + a) / (1 + a + b), rel=1e-9)
    level = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0]])  # two best
    torch.testing.assert_close(doubt(level, score), torch.from_numpy(1 - PUBLISHED[score](level.numpy())).float())
    assert doubt(level, "difference").tolist() == [1.0, 1.0]


@pytest.mark.parametrize("score", SCORES)
def test_the_surer_stands_and_the_first_of_equals(score: str) -> None:
    numbers = torch.Generator().manual_seed(1)
    a, b = torch.randn(100, 5, generator=numbers) * 2, torch.randn(100, 5, generator=numbers) * 2
    second = PUBLISHED[score](b.numpy()) > PUBLISHED[score](a.numpy())
    assert 20 < second.sum() < 80
    want = torch.where(torch.from_numpy(second)[:, None], b, a)
    torch.testing.assert_close(PostCheck(score)(a, b), want, rtol=0, atol=0)
    same = a[:, [1, 0, 2, 3, 4]]  # as sure, and of another class
    torch.testing.assert_close(PostCheck(score)(a, same), a, rtol=0, atol=0)


def test_entropy_of_no_idea_is_one() -> None:
    assert doubt(torch.zeros(1, 6), "entropy").item() == pytest.approx(1, abs=1e-6)
    assert doubt(torch.zeros(1, 6), "confidence").item() == pytest.approx(5 / 6, abs=1e-6)


def net(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5)).eval()


def test_a_cascade_answers_twice() -> None:
    x = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    first, second = net(0), net(1)
    with torch.no_grad():
        early, late = Cascade(Member(first), Member(second))(x)
        torch.testing.assert_close(early, first(x))
        torch.testing.assert_close(late, PostCheck()(first(x), second(x)))
        plain = Cascade(Member(first), Member(second), None)
        torch.testing.assert_close(plain(x)[1], second(x))
    assert plain.carries == ("input",)
    assert Cascade(Member(first), Member(second)).carries == ("input", "first")
    with pytest.raises(ValueError, match="'confidence' or 'difference' or 'entropy'"):
        PostCheck("mood")


def test_a_temperature_and_another_normalisation() -> None:
    logits = torch.tensor([[2.0, 0.0]])
    assert Temperature()(logits) is logits
    torch.testing.assert_close(Temperature(4.0)(logits), logits / 4)
    assert str(Temperature(2.5)) == "Temperature(2.5)"
    pixels = torch.rand(2, 3, 4, 4)
    given, wanted = ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4)), ((0.1, 0.2, 0.3), (1.0, 0.5, 0.25))
    normalised = [
        (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None] for mean, std in (given, wanted)
    ]
    torch.testing.assert_close(Renormalise(*given, *wanted)(normalised[0]), normalised[1], rtol=1e-4, atol=1e-5)
    member = Member(net(0), Renormalise(*given, *wanted))
    assert set(member.state_dict()) == {f"network.{k}" for k in net(0).state_dict()}
    assert math.isclose(member.temperature.value, 1.0)
