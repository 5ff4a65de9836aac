"""Single-head attention over a part of the channels: its formula, its symmetry, its gradients, the published answer."""

from __future__ import annotations

import pytest
import torch

from lissom.layers.shsa import SHSA
from tests.models.families import check_fuse, check_operator, images, needs_parity, settle


def settled(*sizes: int) -> SHSA:
    torch.manual_seed(0)
    module = SHSA(*sizes)
    settle(module, images(4, module.dim, 5, 3))
    return module


def test_the_answer_is_the_formulas() -> None:
    """Written out position by position."""
    module = settled(10, 3, 4)
    x = images(2, 10, 5, 3, seed=1)
    with torch.no_grad():
        found = module(x)
        for image, answer in zip(x, found, strict=True):
            part = image[:4]
            part = (part - part.mean()) / (part.var(unbiased=False) + 1e-5).sqrt()
            q, k, v = module.qkv(part[None])[0].flatten(1).split([3, 3, 4])
            mixed = torch.stack([v @ (q[:, n] @ k / 3**0.5).softmax(0) for n in range(15)], 1).view(4, 5, 3)
            want = module.proj(torch.cat([mixed, image[4:]])[None])[0]
            torch.testing.assert_close(answer, want, rtol=1e-5, atol=1e-5)


def test_positions_carry_no_meaning() -> None:
    module, x = settled(10, 3, 4), images(2, 10, 5, 3, seed=1)
    order = torch.randperm(15, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        moved = module(x.flatten(2)[..., order].view_as(x))
        torch.testing.assert_close(moved, module(x).flatten(2)[..., order].view_as(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("dim", "part"), [(224, 48), (320, 68), (308, 66), (448, 96), (352, 75), (336, 72), (2, 1)])
def test_the_published_share_of_the_channels(dim: int, part: int) -> None:
    assert SHSA(dim).partial_dim == part


def test_it_starts_silent_and_may_take_all_channels() -> None:
    module = SHSA(6, 2, 6)
    assert not module(images(2, 6, 3, 5)).any()


@pytest.mark.parametrize(("sizes", "match"), [((8, 4, 9), "of 8 channels"), ((8, 4, 0), "0 of 8"), ((8, 0), "qk_dim")])
def test_sizes_that_cannot_be(sizes: tuple[int, ...], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        SHSA(*sizes)


def test_gradients() -> None:
    module = settled(5, 2, 3).double()
    x = images(1, 5, 3, 2, seed=2).double().requires_grad_()
    assert torch.autograd.gradcheck(module, (x,))


def test_folding_its_norms() -> None:
    fused = check_fuse(SHSA(10, 3, 4), images(4, 10, 5, 3), 1e-5)
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in fused.modules())


@needs_parity
def test_the_published_answer() -> None:
    def build(state: dict[str, torch.Tensor]) -> SHSA:
        module = SHSA(64, 16, 24)
        module.load_state_dict(state)
        return module

    check_operator("shvit", "op_shsa", build)
