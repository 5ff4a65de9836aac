"""LS convolution: shapes, normalisation of its kernels, gradients, the published answers."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import nn

from lissom.layers.lsconv import LKP, LSConv
from tests.models.families import check_fuse, check_operator, images, needs_parity, settle


def test_a_kernels_weights_are_normalised_together() -> None:
    torch.manual_seed(0)
    module = LKP(16, 5, 3, 4)
    kernels = module(images(2, 16, 5, 7))
    assert kernels.shape == (2, 4, 9, 5, 7)
    torch.testing.assert_close(kernels.mean((2, 3, 4)), torch.zeros(2, 4), atol=1e-5, rtol=0)
    torch.testing.assert_close(kernels.var((2, 3, 4), unbiased=False), torch.ones(2, 4), atol=1e-2, rtol=0)


@pytest.mark.parametrize("sizes", [(12, 7, 3, 8), (9, 7, 3, 3), (8, 6, 3, 4), (8, 7, 2, 4)])
def test_sizes_that_cannot_be(sizes: tuple[int, int, int, int]) -> None:
    with pytest.raises(ValueError, match=r"cannot be halved|no centre"):
        LSConv(*sizes)


def test_gradients() -> None:
    torch.manual_seed(0)
    module = settle(LSConv(4, 3, 3, 2), images(4, 4, 5, 3)).double()
    x = images(1, 4, 5, 3, seed=1).double().requires_grad_()
    assert torch.autograd.gradcheck(module, (x,))


def test_folding_its_norms() -> None:
    torch.manual_seed(0)
    fused = check_fuse(LSConv(16), images(4, 16, 9, 7), 1e-5)
    assert [path for path, m in fused.named_modules() if isinstance(m, nn.BatchNorm2d)] == ["bn"]


@needs_parity
@pytest.mark.parametrize(("name", "empty"), [("op_lkp", lambda: LKP(24, 5, 3, 6)), ("op_lsconv", lambda: LSConv(32))])
def test_the_published_answers(name: str, empty: type[nn.Module]) -> None:
    def build(state: Mapping[str, torch.Tensor]) -> nn.Module:
        module = empty()
        module.load_state_dict(dict(state))
        return module

    check_operator("lsnet", name, build)
