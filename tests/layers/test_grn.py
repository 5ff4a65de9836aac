"""Global response normalisation: identity at the start, both layouts, the published figures."""

from __future__ import annotations

import pytest
import torch

from lissom.layers.grn import GRN
from tests.models.families import check_operator, images, needs_parity


def test_it_starts_as_the_identity() -> None:
    x = images(2, 5, 7, 6)
    assert torch.equal(GRN(6)(x), x)


def test_both_layouts_and_the_formula() -> None:
    layer = GRN(4).double()
    torch.nn.init.normal_(layer.gamma)
    torch.nn.init.normal_(layer.beta)
    first = GRN(4, channels_last=False).double()
    first.load_state_dict(layer.state_dict())
    x = images(2, 3, 5, 4).double()
    norm = x.square().sum((1, 2), keepdim=True).sqrt()
    want = x + layer.gamma * x * norm / (norm.mean(3, keepdim=True) + 1e-6) + layer.beta
    assert torch.allclose(layer(x), want)
    assert torch.allclose(first(x.permute(0, 3, 1, 2)), want.permute(0, 3, 1, 2))


@pytest.mark.parametrize("last", [True, False])
def test_gradients(last: bool) -> None:
    layer = GRN(3, channels_last=last).double()
    torch.nn.init.normal_(layer.gamma)
    shape = (2, 3, 5, 3) if last else (2, 3, 3, 5)
    assert torch.autograd.gradcheck(layer, images(*shape).double().requires_grad_())


def test_refusals() -> None:
    with pytest.raises(ValueError, match="3 channels on axis 3"):
        GRN(3)(images(1, 3, 4, 4))
    assert GRN(3, bias=False).beta is None


@needs_parity
def test_published_figures() -> None:
    def build(state: dict[str, torch.Tensor]) -> GRN:
        layer = GRN(12)
        layer.load_state_dict(state)
        return layer

    check_operator("unireplknet", "op_grn", build)
