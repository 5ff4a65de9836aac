"""Small-kernel aggregation: the definition, its special cases, its gradients, the published answers."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from lissom.ops.ska import ska
from tests.models.families import fixture, needs_parity, parity


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def by_definition(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    size = round(w.shape[2] ** 0.5)
    columns = F.unfold(x, size, padding=size // 2).view(*x.shape[:2], size**2, *x.shape[2:])
    kernels = w.repeat(1, x.shape[1] // w.shape[1], 1, 1, 1)  # channel c has kernel c mod G
    return (columns * kernels).sum(2)


@pytest.mark.parametrize(("channels", "kernels", "size"), [(6, 2, 3), (4, 4, 5), (3, 1, 3), (4, 2, 1)])
def test_the_definition(channels: int, kernels: int, size: int) -> None:
    x, w = draw(2, channels, 5, 3), draw(2, kernels, size**2, 5, 3, seed=1)
    torch.testing.assert_close(ska(x, w), by_definition(x, w))


def test_kernels_that_are_the_same_everywhere_are_a_depthwise_convolution() -> None:
    x, kernels = draw(2, 6, 5, 7), draw(2, 9, seed=1)
    w = kernels[None, :, :, None, None].expand(2, 2, 9, 5, 7)
    weight = kernels.view(2, 1, 3, 3).repeat(3, 1, 1, 1)
    torch.testing.assert_close(ska(x, w), F.conv2d(x, weight, padding=1, groups=6))


def test_the_centre_alone_is_the_identity() -> None:
    x, w = draw(2, 6, 5, 7), torch.zeros(2, 3, 9, 5, 7)
    w[:, :, 4] = 1
    assert torch.equal(ska(x, w), x)


def test_gradients() -> None:
    x = draw(2, 4, 3, 5).double().requires_grad_()
    w = draw(2, 2, 9, 3, 5, seed=1).double().requires_grad_()
    assert torch.autograd.gradcheck(ska, (x, w))
    assert torch.autograd.gradcheck(lambda w: ska(x.detach(), w), (w,))


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_short_numbers_are_summed_in_float32(kind: torch.dtype) -> None:
    x, w = draw(1, 4, 5, 5).to(kind), draw(1, 2, 25, 5, 5, seed=1).to(kind)
    want = ska(x.float(), w.float())
    found = ska(x.requires_grad_(), w.float())
    assert found.dtype is kind
    assert torch.equal(found, want.to(kind))
    found.sum().backward()
    assert x.grad is not None
    assert x.grad.dtype is kind


def test_a_graph_gives_the_same_answer() -> None:
    class Pair(torch.nn.Module):
        def forward(self, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
            return ska(x, w)

    x, w = draw(2, 6, 5, 3), draw(2, 2, 9, 5, 3, seed=1)
    program = torch.export.export(Pair(), (x, w))
    torch.testing.assert_close(program.module()(x, w), ska(x, w))


@pytest.mark.parametrize(
    ("x", "w", "match"),
    [
        ((1, 4, 5, 5), (1, 3, 9, 5, 5), "3 kernels do not divide 4"),
        ((1, 4, 5, 5), (1, 2, 8, 5, 5), "no square kernel"),
        ((1, 4, 5, 5), (1, 2, 4, 5, 5), "odd size"),
        ((1, 4, 5, 5), (1, 2, 9, 5, 4), "differ in batch or pixels"),
        ((2, 4, 5, 5), (1, 2, 9, 5, 5), "differ in batch or pixels"),
        ((4, 5, 5), (1, 2, 9, 5, 5), "are wanted"),
    ],
)
def test_shapes_that_do_not_fit(x: tuple[int, ...], w: tuple[int, ...], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        ska(torch.zeros(x), torch.zeros(w))


@needs_parity
def test_the_published_answers_and_gradients() -> None:
    own, figures = parity(), fixture("lsnet", "cases")
    for case in figures["cases"]:
        x = own.make_input(tuple(case["x"]), "x").requires_grad_()
        w = own.make_input(tuple(case["w"]), "w").requires_grad_()
        found = ska(x, w)
        found.backward(own.make_input(tuple(case["x"]), "g"))
        assert own.close(own.digest(found), case["output"], 1e-5)
        assert own.close(own.digest(x.grad), case["grad_x"], 1e-5)
        assert own.close(own.digest(w.grad), case["grad_w"], 1e-5)
    tiny = figures["tiny"]
    w = torch.arange(1.0, 10.0).view(1, 1, 9, 1, 1).expand(1, 1, 9, 2, 2)
    assert ska(torch.tensor(tiny["x"]), w).tolist() == tiny["output"]
