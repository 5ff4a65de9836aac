"""Super token attention: against the definition written out, gradients, borders and padding, the published figures."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lissom.ops.super_token_attention import (
    MapAttention,
    SuperTokenAttention,
    super_token_assign,
    super_token_gather,
    super_token_upsample,
)
from tests.models.families import check_operator, images, needs_parity


def dense(x: torch.Tensor, cell: tuple[int, int], n_iter: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Shares of all pixels in all super tokens, (B, N, M), and the tokens (B, M, C), by a dense table; x divides."""
    _, channels, height, width = x.shape
    rows, columns = height // cell[0], width // cell[1]
    tokens = F.avg_pool2d(x, cell).flatten(2).transpose(1, 2)
    pixels = x.flatten(2).transpose(1, 2)
    place = [(i // cell[0], j // cell[1]) for i in range(height) for j in range(width)]
    near = torch.tensor(
        [[max(abs(i - m // columns), abs(j - m % columns)) <= 1 for m in range(rows * columns)] for i, j in place]
    )
    outside = 9 - near.sum(1)  # neighbours beyond the grid: zeros, whose products are 0
    for _ in range(n_iter):
        weights = (pixels @ tokens.transpose(1, 2) * channels**-0.5).exp() * near
        shares = weights / (weights.sum(2) + outside)[..., None]
        tokens = shares.transpose(1, 2) @ pixels / shares.sum(1)[..., None]
    return shares, tokens


@pytest.mark.parametrize(("cell", "size"), [((2, 2), (6, 8)), ((3, 2), (9, 2)), ((2, 4), (2, 12)), ((1, 3), (4, 6))])
@pytest.mark.parametrize("n_iter", [1, 3])
def test_the_assignment_is_that_of_the_dense_table(cell: tuple[int, int], size: tuple[int, int], n_iter: int) -> None:
    x = images(2, 5, *size).double()
    want, tokens = dense(x, cell, n_iter)
    shares, found = super_token_assign(x, cell, n_iter)
    rows, columns = size[0] // cell[0], size[1] // cell[1]
    assert found.shape == (2, 5, rows, columns)
    assert torch.allclose(found.flatten(2).transpose(1, 2), tokens)
    spread = (want @ tokens).transpose(1, 2).unflatten(2, size)
    assert torch.allclose(super_token_upsample(found, shares, cell), spread)
    inside = shares.sum((1, 2, 3)).sum()
    assert torch.isclose(inside, torch.tensor(2.0 * size[0] * size[1], dtype=torch.float64))


def test_maps_are_padded_to_whole_cells() -> None:
    torch.manual_seed(0)
    mixer = SuperTokenAttention(6, (4, 4), num_heads=2).double()
    x = images(2, 6, 7, 10).double()
    whole = mixer(F.pad(x, (0, 2, 0, 1)))
    assert torch.equal(mixer(x), whole[:, :, :7, :10])
    assert mixer(images(1, 6, 3, 2).double()).shape == (1, 6, 3, 2)


def test_one_pixel_a_cell_is_plain_attention() -> None:
    torch.manual_seed(0)
    mixer, x = SuperTokenAttention(6, (1, 1), num_heads=3), images(2, 6, 3, 5)
    attend = mixer.stoken_refine
    q, k, v = attend.qkv(x).flatten(2).unflatten(1, (3, 3, 2)).unbind(2)  # (B, heads, width of a head, N)
    shares = (q.transpose(2, 3) @ k * 2**-0.5).softmax(3)
    want = attend.proj((v @ shares.transpose(2, 3)).flatten(1, 2).unflatten(2, (3, 5)))
    assert torch.allclose(mixer(x), want, atol=1e-6)


def test_gradients() -> None:
    torch.manual_seed(0)
    x = images(1, 4, 5, 3).double().requires_grad_()
    mixer = SuperTokenAttention(4, (2, 2), 2, num_heads=2, through_assignment=True).double()
    assert torch.autograd.gradcheck(mixer, x)
    shares, tokens = (t.detach().requires_grad_() for t in super_token_assign(x, (2, 2)))
    pixels = images(1, 6, 4, 4, seed=1).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda p, s: super_token_gather(p, s, (3, 2)), (pixels, shares))
    assert torch.autograd.gradcheck(lambda t, s: super_token_upsample(t, s, (2, 2)), (tokens, shares))


def test_no_gradient_passes_the_assignment() -> None:
    """As published: the derivative is that of the same expression with the shares constant."""
    torch.manual_seed(0)
    x = images(1, 4, 4, 6).double().requires_grad_()
    mixer = SuperTokenAttention(4, (2, 2), 2, num_heads=2).double()
    direction = images(1, 4, 4, 6, seed=1).double()
    (found,) = torch.autograd.grad((mixer(x) * direction).sum(), x)
    shares, _ = super_token_assign(x.detach(), (2, 2), 2)
    pixels = x.unflatten(3, (3, 2)).unflatten(2, (2, 2)).permute(0, 2, 4, 3, 5, 1).reshape(1, 6, 4, 4)
    tokens = mixer.stoken_refine(super_token_gather(pixels, shares, (2, 3)))
    (want,) = torch.autograd.grad((super_token_upsample(tokens, shares, (2, 2)) * direction).sum(), x)
    assert torch.allclose(found, want)
    mixer(x).sum().backward()
    assert all(p.grad is not None for p in mixer.parameters())


def test_refusals() -> None:
    for cell, n_iter in (((0, 2), 1), ((2, 2), 0)):
        with pytest.raises(ValueError, match="both are at least 1"):
            super_token_assign(images(1, 2, 4, 4), cell, n_iter)
    with pytest.raises(ValueError, match="a map"):
        super_token_assign(images(2, 4, 4), (2, 2))
    with pytest.raises(ValueError, match="do not divide"):
        MapAttention(6, 4)


@needs_parity
@pytest.mark.parametrize(
    ("name", "dim", "cell", "n_iter", "heads"),
    [("op_stoken_attention", 32, (4, 4), 1, 2), ("op_stoken_attention_n2", 24, (2, 2), 2, 3)],
)
def test_published_figures(name: str, dim: int, cell: tuple[int, int], n_iter: int, heads: int) -> None:
    def build(state: dict[str, torch.Tensor]) -> SuperTokenAttention:
        mixer = SuperTokenAttention(dim, cell, n_iter, heads)
        mixer.load_state_dict(state)
        return mixer

    check_operator("svit", name, build)
