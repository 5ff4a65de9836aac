"""HyperZ·Z·W: the three operators against their sums written out, at odd shapes; gradients, graphs, refusals."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from lissom.ops.hyper_zzw import hyper_zzw_2e, hyper_zzw_global, hyper_zzw_local


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def global_by_definition(x: torch.Tensor, kernel: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    out = torch.zeros(*x.shape[:3], y.shape[3], dtype=x.dtype)
    for i in range(x.shape[2]):
        for j in range(y.shape[3]):
            for k in range(x.shape[3]):
                out[:, :, i, j] += x[:, :, i, k] * kernel[:, :, i, k] * y[:, :, k, j]
    return out


def local_by_definition(kernel: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Shifted maps times their tap, summed; sequences are maps one pixel high."""
    if y.ndim == 3:
        return local_by_definition(kernel.unsqueeze(2), y.unsqueeze(2)).squeeze(2)
    if kernel.shape[:2] != y.shape[:2]:
        kernel = kernel.transpose(0, 1)
    (rows, columns), (height, width) = kernel.shape[2:], y.shape[2:]
    padded = F.pad(y, (columns // 2, columns // 2, rows // 2, rows // 2))
    out = torch.zeros_like(y)
    for u in range(rows):
        for v in range(columns):
            out += padded[:, :, u : u + height, v : v + width] * kernel[:, :, u, v, None, None]
    return out


@pytest.mark.parametrize(("h", "k", "w"), [(5, 5, 5), (3, 7, 4), (1, 5, 1), (4, 1, 9)])
@pytest.mark.parametrize("own", [False, True])
def test_the_global_operator(h: int, k: int, w: int, own: bool) -> None:
    x, y = draw(2, 3, h, k), draw(2, 3, k, w, seed=1)
    kernel = draw(2 if own else 1, 3, h, k, seed=2)
    torch.testing.assert_close(hyper_zzw_global(x, kernel, y), global_by_definition(x, kernel, y))


def test_maps_side_by_side_are_several_products() -> None:
    x, kernel, a, b = draw(2, 3, 5, 5), draw(1, 3, 5, 5, seed=1), draw(2, 3, 5, 5, seed=2), draw(2, 3, 5, 5, seed=3)
    first, second = hyper_zzw_global(x, kernel, torch.cat([a, b], 3)).chunk(2, 3)
    torch.testing.assert_close(first, hyper_zzw_global(x, kernel, a))
    torch.testing.assert_close(second, hyper_zzw_global(x, kernel, b))


@pytest.mark.parametrize(
    ("kernel", "y"),
    [
        ((3, 1, 3, 3), (2, 3, 5, 7)),
        ((2, 3, 3, 3), (2, 3, 5, 7)),
        ((2, 3, 5, 1), (2, 3, 4, 6)),
        ((4, 1, 9, 9), (1, 4, 5, 3)),  # larger than the map
        ((3, 1, 3), (2, 3, 8)),
        ((2, 3, 7), (2, 3, 5)),
        ((1, 1, 3, 3), (4, 1, 5, 5)),
        ((4, 1, 3, 3), (4, 1, 5, 5)),  # four images of one channel, each with its own
    ],
)
def test_the_local_operator(kernel: tuple[int, ...], y: tuple[int, ...]) -> None:
    w, x = draw(*kernel), draw(*y, seed=1)
    torch.testing.assert_close(hyper_zzw_local(w, x), local_by_definition(w, x))


def test_equal_kernels_of_all_images_are_one_kernel() -> None:
    kernel, y = draw(3, 1, 5, 5), draw(4, 3, 6, 7, seed=1)
    own = kernel.transpose(0, 1).expand(4, -1, -1, -1)
    torch.testing.assert_close(hyper_zzw_local(own, y), hyper_zzw_local(kernel, y))


def test_the_elementwise_operator() -> None:
    x, kernel = draw(2, 3, 5), draw(1, 1, 5, seed=1)
    want = torch.stack([torch.stack([x[b, c] ** 2 * kernel[0, 0] for c in range(3)]) for b in range(2)])
    torch.testing.assert_close(hyper_zzw_2e(x, kernel), want)
    assert hyper_zzw_2e(x, torch.zeros(1, 1, 1, dtype=x.dtype)).abs().max() == 0


def test_gradients() -> None:
    x, y = draw(2, 2, 3, 4).requires_grad_(), draw(2, 2, 4, 3, seed=1).requires_grad_()
    kernel = draw(1, 2, 3, 4, seed=2).requires_grad_()
    assert torch.autograd.gradcheck(hyper_zzw_global, (x, kernel, y))
    assert torch.autograd.gradcheck(hyper_zzw_2e, (x, kernel))
    for shape in ((2, 1, 3, 3), (2, 2, 3, 3)):
        assert torch.autograd.gradcheck(hyper_zzw_local, (draw(*shape, seed=3).requires_grad_(), y))
    line = draw(3, 2, 5).requires_grad_()
    assert torch.autograd.gradcheck(hyper_zzw_local, (draw(3, 2, 3, seed=3).requires_grad_(), line))


def test_a_graph_gives_the_same_answer() -> None:
    class All(torch.nn.Module):
        def forward(self, x: torch.Tensor, kernel: torch.Tensor, local: torch.Tensor) -> torch.Tensor:
            return hyper_zzw_local(local, hyper_zzw_global(x, kernel, hyper_zzw_2e(x, kernel)))

    args = draw(2, 3, 5, 5), draw(1, 3, 5, 5, seed=1), draw(2, 3, 3, 3, seed=2)
    program = torch.export.export(All(), args)
    torch.testing.assert_close(program.module()(*args), All()(*args))


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: hyper_zzw_global(draw(1, 2, 3, 4), draw(1, 2, 3, 4), draw(1, 2, 3, 4)), "are wanted"),
        (lambda: hyper_zzw_global(draw(1, 2, 3, 3), draw(1, 2, 4, 3), draw(1, 2, 3, 3)), "not as large"),
        (lambda: hyper_zzw_global(draw(3, 2, 3, 3), draw(2, 2, 3, 3), draw(3, 2, 3, 3)), "not as large"),
        (lambda: hyper_zzw_local(draw(2, 1, 4, 4), draw(1, 2, 5, 5)), "no middle"),
        (lambda: hyper_zzw_local(draw(2, 1, 3), draw(1, 2, 5, 5)), "are wanted"),
        (lambda: hyper_zzw_local(draw(3, 3, 3, 3), draw(2, 3, 5, 5)), "are wanted"),
        (lambda: hyper_zzw_2e(draw(1, 2, 5), draw(3, 2, 5)), "does not broadcast"),
        (lambda: hyper_zzw_2e(draw(1, 2, 5), draw(1, 2, 4)), "does not broadcast"),
    ],
)
def test_shapes_that_do_not_fit(call, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        call()
