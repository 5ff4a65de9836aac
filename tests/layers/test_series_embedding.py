"""Embedded series: the circular convolution and what is added to it, gradients, widths that make images."""

from __future__ import annotations

import math

import pytest
import torch

from lissom.layers.series_embedding import SeriesEmbedding, square_factor
from lissom.ops.as_images import series_to_image
from tests.models.families import images


def test_values_times_and_places_add_up() -> None:
    layer = SeriesEmbedding(3, 5, time_features=2, place_features=4)
    x, times, place = images(2, 7, 3), images(2, 7, 2, seed=1), images(2, 4, seed=2)
    found = layer(x, times, place)
    round_about = torch.stack([x.roll(1, 1), x, x.roll(-1, 1)], 3)  # (B, T, channels, taps)
    want = torch.einsum("btck,dck->btd", round_about, layer.value.weight)
    want = want + times @ layer.time.weight.T + layer.place(place)[:, None]
    torch.testing.assert_close(found, want)
    assert layer.value.bias is None
    for given in ((), (times,), (None, place)):
        with pytest.raises(ValueError, match="features of the"):
            layer(x, *given)
    with pytest.raises(ValueError, match="times are given"):
        SeriesEmbedding(3, 5)(x, times)


def test_gradients() -> None:
    layer = SeriesEmbedding(2, 3, 1).double()
    inputs = (images(1, 4, 2).double().requires_grad_(), images(1, 4, 1, seed=1).double().requires_grad_())
    assert torch.autograd.gradcheck(layer, inputs)


@pytest.mark.parametrize(("steps", "least"), [(1, 1), (48, 3), (49, 1), (96, 6), (97, 97)])
def test_the_least_width_that_makes_a_square(steps: int, least: int) -> None:
    assert square_factor(steps) == least
    assert series_to_image(images(1, steps, 4 * least)).shape[-1] == 2 * math.isqrt(steps * least)
    with pytest.raises(ValueError, match="no series"):
        square_factor(0)
