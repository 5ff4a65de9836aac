"""Convolutions and linear layers with their norms: folded, they answer the same."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lissom.layers.conv_norm import ConvNorm, NormLinear, ResidualConvNorm


def settled(module: nn.Module) -> nn.Module:
    """Statistics and weights of norms that are not those they start with; eval mode."""
    generator = torch.Generator().manual_seed(0)
    for m in module.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            m.running_mean.normal_(generator=generator)
            m.running_var.uniform_(0.5, 2, generator=generator)
            with torch.no_grad():
                m.weight.uniform_(0.5, 2, generator=generator)
                m.bias.normal_(generator=generator)
    return module.eval()


@pytest.mark.parametrize(
    "branch",
    [
        ConvNorm(6, 8),
        ConvNorm(6, 9, 3, stride=2, groups=3),
        ConvNorm(6, 6, 5, dilation=2, groups=6, scale=0.0),
        ConvNorm(6, 4, 3, padding=0),
        ResidualConvNorm(ConvNorm(6, 6, 3, groups=6)),
    ],
)
def test_a_folded_convolution_answers_the_same(branch: nn.Module) -> None:
    branch = settled(branch)
    x = torch.randn(2, 6, 11, 7, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        want = branch(x)
        fused = branch.fuse()
        assert type(fused) is nn.Conv2d
        assert not fused.training
        torch.testing.assert_close(fused(x), want, rtol=1e-5, atol=1e-5)


def test_half_the_kernel_is_the_padding() -> None:
    assert ConvNorm(3, 3, 5)(torch.zeros(2, 3, 8, 8)).shape == (2, 3, 8, 8)
    assert ConvNorm(3, 3, 3, dilation=3)(torch.zeros(2, 3, 8, 8)).shape == (2, 3, 8, 8)


def test_a_silent_branch_starts_at_zero() -> None:
    x = torch.randn(2, 6, 5, 5)
    assert torch.equal(ResidualConvNorm(ConvNorm(6, 6, 3, groups=6, scale=0.0))(x), x)


def test_only_a_depthwise_branch_takes_its_input_in() -> None:
    for branch in (ConvNorm(6, 6, 3), ConvNorm(6, 6, 3, stride=2, groups=6), ConvNorm(6, 12, 3, groups=6)):
        with pytest.raises(ValueError, match="must be depthwise"):
            ResidualConvNorm(branch)


@pytest.mark.parametrize("bias", [True, False])
def test_a_folded_linear_layer_answers_the_same(bias: bool) -> None:
    layer = settled(NormLinear(7, 5, bias))
    x = torch.randn(3, 7, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(layer.fuse()(x), layer(x), rtol=1e-5, atol=1e-5)


def test_timm_folds_them() -> None:
    from timm.utils.model import reparameterize_model

    net = settled(
        nn.Sequential(ConvNorm(3, 6, 3), ResidualConvNorm(ConvNorm(6, 6, 3, groups=6)), nn.Flatten(), NormLinear(96, 4))
    )
    fused = reparameterize_model(net)
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in fused.modules())
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(fused(x), net(x), rtol=1e-4, atol=1e-5)
