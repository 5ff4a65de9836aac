"""Convolutional attention: the formula, the class token, its methods, gradients, the published answer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import nn

from lissom.ops.conv_attention import ConvAttention
from tests.models.families import check_operator, images, needs_parity


def settled(dim: int, **more: Any) -> ConvAttention:
    torch.manual_seed(0)
    module = ConvAttention(dim, **more)
    for m in module.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_()
            m.running_var.uniform_(0.5, 2)
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.normal_(m.bias)
    return module.eval()


@pytest.mark.parametrize("method", ["dw_bn", "avg", "linear"])
def test_the_formula(method: str) -> None:
    """Written out head by head, with a class token, on a map of odd sides."""
    module = settled(6, num_heads=2, method=method, cls_token=True)
    x = images(2, 1 + 15, 6)
    maps = x[:, 1:].transpose(1, 2).reshape(2, 6, 5, 3)
    parts = []
    for letter in "qkv":
        y = getattr(module, f"conv_proj_{letter}")(maps).flatten(2).transpose(1, 2)
        parts.append(getattr(module, f"proj_{letter}")(torch.cat([x[:, :1], y], 1)))
    q, k, v = parts
    assert len(k[0]) == {"dw_bn": 3 * 2, "avg": 3 * 2, "linear": 15}[method] + 1
    heads = []
    for head in range(2):
        own = slice(3 * head, 3 * head + 3)
        weights = (q[..., own] @ k[..., own].transpose(1, 2) / 6**0.5).softmax(-1)  # the whole width, not a head's
        heads.append(weights @ v[..., own])
    torch.testing.assert_close(module(x, 5, 3), module.proj(torch.cat(heads, -1)))


def test_strides() -> None:
    module = settled(4, stride_kv=1, stride_q=2)
    assert module(images(1, 35, 4), 5, 7).shape == (1, 3 * 4, 4)


def test_folding_its_norms() -> None:
    from timm.utils.model import reparameterize_model

    module, x = settled(6, num_heads=2), images(2, 35, 6)
    with torch.no_grad():
        want = module(x, 5, 7)
        fused = reparameterize_model(module)
        assert not any(isinstance(m, nn.BatchNorm2d) for m in fused.modules())
        torch.testing.assert_close(fused(x, 5, 7), want)


def test_gradients() -> None:
    for cls_token in (False, True):
        module = settled(4, num_heads=2, cls_token=cls_token).double()
        # A batch of 2: torch 2.15's BatchNorm gives wrong gradients on CPU where one sample alone is laid out otherwise
        # than its gradient.
        x = images(2, 15 + cls_token, 4).double().requires_grad_()
        assert torch.autograd.gradcheck(lambda x, module=module: module(x, 3, 5), (x,))


@pytest.mark.parametrize(
    ("more", "match"), [({"method": "max"}, "known: dw_bn"), ({"num_heads": 3}, "3 heads"), ({"kernel_size": 2}, "odd")]
)
def test_arguments_that_cannot_be(more: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        ConvAttention(8, **more)


@needs_parity
def test_the_published_answer() -> None:
    class OnMap(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x, 10, 10)

    def build(state: Mapping[str, torch.Tensor]) -> nn.Module:
        module = ConvAttention(48, 3, cls_token=True)
        module.load_state_dict(dict(state))
        return OnMap(module)

    check_operator("cvt", "op_conv_attention", build)
