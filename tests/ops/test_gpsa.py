"""Gated positional self-attention: against its map, as a convolution, the gate's limits, gradients, the figures."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lissom.ops.gpsa import GPSA, positional_attention
from tests.models.families import check_operator, fixture, images, needs_parity


def operator(dim: int, heads: int, **more: object) -> GPSA:
    torch.manual_seed(0)
    return GPSA(dim, heads, **more).double()


@pytest.mark.parametrize("grid", [(3, 3), (2, 5), (4, 1)])
def test_the_answer_is_that_of_the_whole_map(grid: tuple[int, int]) -> None:
    op = operator(8, 4, grid=grid)
    torch.nn.init.normal_(op.pos_proj.weight, std=0.3)
    torch.nn.init.normal_(op.qk.weight)
    torch.nn.init.normal_(op.gating_param)
    x = images(2, grid[0] * grid[1], 8).double()
    places = torch.tensor([(r, c) for r in range(grid[0]) for c in range(grid[1])]).double()
    dy, dx = (places[None, :] - places[:, None]).unbind(-1)  # from the query, rows, to the key, columns
    scores = op.pos_proj(torch.stack((dx, dy, dx.square() + dy.square()), -1)).permute(2, 0, 1).softmax(-1)
    q, k = (t.unflatten(2, (4, 2)).transpose(1, 2) for t in op.qk(x).chunk(2, -1))
    gate = op.gating_param.sigmoid()[:, None, None]
    want = (1 - gate) * (q @ k.transpose(2, 3) * 2**-0.5).softmax(-1) + gate * scores
    found = op.attention_map(x)
    assert torch.allclose(found, want)
    assert torch.allclose(found.sum(-1), torch.ones(()).double())
    y = (want @ op.v(x).unflatten(2, (4, 2)).transpose(1, 2)).transpose(1, 2).flatten(2)
    assert torch.allclose(op(x), op.proj(y))
    apart = (dx.square() + dy.square()).sqrt()
    assert torch.allclose(op.attention_distance(x), (want * apart).sum(-1).mean((0, 2)))


def test_it_begins_as_a_convolution() -> None:
    op = operator(18, 9, locality_strength=40.0, grid=(6, 7))
    torch.nn.init.constant_(op.gating_param, 50.0)
    torch.nn.init.normal_(op.proj.weight)
    kernel = torch.zeros(18, 18, 3, 3, dtype=torch.float64)
    for row in range(3):
        for column in range(3):
            head = row + 3 * column
            own = slice(2 * head, 2 * head + 2)  # a head sees its own channels only
            kernel[:, own, row, column] = op.proj.weight[:, own]
    x = images(2, 18, 6, 7).double()
    found = op(x.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, (6, 7))
    want = F.conv2d(x, kernel, op.proj.bias)
    assert torch.allclose(found[:, :, 1:-1, 1:-1], want)


def test_the_limits_of_the_gate() -> None:
    op, x, other = operator(8, 4), images(1, 9, 8).double(), images(1, 9, 8, seed=1).double()
    torch.nn.init.constant_(op.gating_param, -60.0)
    q, k = (t.unflatten(2, (4, 2)).transpose(1, 2) for t in op.qk(x).chunk(2, -1))
    v = op.v(x).unflatten(2, (4, 2)).transpose(1, 2)
    want = op.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
    assert torch.allclose(op(x), want)
    torch.nn.init.constant_(op.gating_param, 60.0)  # no content left: linear in the tokens
    assert torch.allclose(op(x + other) - op.proj.bias, op(x) + op(other) - 2 * op.proj.bias)


def test_gradients() -> None:
    op, x = operator(4, 2, grid=(2, 3)), images(2, 6, 4).double().requires_grad_()
    assert torch.autograd.gradcheck(op, x)
    weight = images(2, 3).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda w: positional_attention(w, (3, 2)), weight)
    op(x).sum().backward()
    assert [name for name, p in op.named_parameters() if p.grad is None] == ["pos_proj.bias"]


def test_refusals() -> None:
    with pytest.raises(ValueError, match="do not divide"):
        GPSA(8, 3)
    with pytest.raises(ValueError, match="do not fill a grid of 2 x 2"):
        GPSA(8, 4)(images(1, 6, 8))
    assert GPSA(8, 4, local_init=False).pos_proj.weight.abs().max() < 0.1


@needs_parity
def test_published_figures() -> None:
    def build(state: dict[str, torch.Tensor]) -> GPSA:
        op = GPSA(36, 9)
        op.load_state_dict(state)
        return op

    check_operator("convit", "op_gpsa", build)


@needs_parity
def test_published_beginnings() -> None:
    for case in fixture("convit", "cases")["cases"]:
        op = GPSA(case["dim"], case["heads"], case["locality_strength"])
        weight = torch.tensor(case["pos_proj_weight"])
        assert torch.allclose(op.pos_proj.weight, weight)
        torch.nn.init.constant_(op.gating_param, 60.0)  # positions alone
        found = op.attention_map(torch.zeros(1, case["tokens"], case["dim"]))[0, :, case["query_token"]]
        assert found.argmax(-1).tolist() == case["pos_attention_of_query_argmax"]
        assert torch.allclose(found.amax(-1), torch.tensor(case["pos_attention_of_query_max"]), atol=1e-6)
        assert torch.allclose(GPSA(4, 1).gating_param.sigmoid(), torch.tensor(case["gate_at_init"]))
