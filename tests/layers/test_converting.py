"""The converting autoencoder: sizes, the range of its images, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lissom.errors import LissomError
from lissom.layers.converting import ConvertingAutoencoder
from lissom.meters.costs import total


def test_the_designs_size() -> None:
    model = ConvertingAutoencoder((1, 28, 28))
    assert [m.weight.shape for m in model.modules() if isinstance(m, nn.Linear)] == [
        (384, 784), (384, 384), (32, 384), (784, 32),
    ]  # fmt: skip
    assert total(model, (1, 28, 28)) == (487_472, model.macs) == (487_472, 485_888)
    assert isinstance(model.encoder[-1], nn.Identity)
    assert isinstance(model.decoder[-1], nn.Sigmoid)


def test_sizes_and_activations_are_arguments() -> None:
    model = ConvertingAutoencoder((2, 3, 5), (7,), 4, (6, 9), activation="tanh", code_activation="relu")
    widths = [(m.in_features, m.out_features) for m in model.modules() if isinstance(m, nn.Linear)]
    assert widths == [(30, 7), (7, 4), (4, 6), (6, 9), (9, 30)]
    assert [type(m) for m in model.encoder] == [nn.Linear, nn.Tanh, nn.Linear, nn.ReLU]
    assert [type(m) for m in model.decoder][1::2] == [nn.Tanh, nn.Tanh, nn.Sigmoid]
    assert model(torch.randn(3, 2, 3, 5)).shape == (3, 2, 3, 5)


def test_images_are_normalised_as_they_came() -> None:
    mean, std = (0.2, 0.5), (0.3, 0.25)
    model = ConvertingAutoencoder((2, 4, 4), (8,), 4, mean=mean, std=std)
    pixels = torch.rand(5, 2, 4, 4)
    x = (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    torch.testing.assert_close(model.pixels(x), pixels)
    torch.testing.assert_close(model.normalise(pixels), x)
    made = model.decoder(model.encoder(pixels.flatten(1))).view(5, 2, 4, 4).detach()
    assert 0 < float(made.min()) < float(made.max()) < 1
    torch.testing.assert_close(model(x), model.normalise(made))
    other = ConvertingAutoencoder((2, 4, 4), (8,), 4)
    other.load_state_dict(model.state_dict())  # how images are normalised goes with the weights
    torch.testing.assert_close(other(x), model(x))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"shape": (28, 28)}, "the shape is"),
        ({"shape": (1, 4, 4), "hidden": (8, 0)}, "at least 1"),
        ({"shape": (1, 4, 4), "code": 0}, "at least 1"),
        ({"shape": (1, 4, 4), "activation": "swish"}, "no activation 'swish'"),
        ({"shape": (1, 4, 4), "std": 0.0}, "above 0"),
        ({"shape": (3, 4, 4), "mean": (0.1, 0.2)}, "2 numbers normalise 3 channels"),
    ],
)
def test_what_it_refuses(arguments, says) -> None:
    with pytest.raises(LissomError, match=says):
        ConvertingAutoencoder(**arguments)
