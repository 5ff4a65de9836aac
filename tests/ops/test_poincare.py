"""Maps of the Poincaré ball: published figures, identities of the geometry, gradients by hand and by definition."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pytest
import torch

from lissom.ops import poincare
from lissom.ops.poincare import manual, naive
from tests.models.families import fixture, needs_parity


def draw(*shape: int, seed: int = 0, scale: float = 0.5) -> torch.Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def points(*shape: int, c: float, seed: int = 0, scale: float = 0.5, dim: int = -1) -> torch.Tensor:
    return poincare.expmap0(draw(*shape, seed=seed, scale=scale), c, dim)


# Every map as a function of tensors and c alone, at vectors of 4 along dimension 1 of (3, 4, 5), c = 0.7. The second
# point is broadcast.
C = 0.7
X, Y, V = points(3, 4, 5, c=C), points(1, 4, 1, c=C, seed=1), draw(3, 4, 5, seed=2)
MAPS: dict[str, tuple[Callable[..., torch.Tensor], tuple[torch.Tensor, ...]]] = {
    "mobius_add": (poincare.mobius_add, (X, Y)),
    "mobius_add, the first broadcast": (poincare.mobius_add, (Y, X)),
    "project": (poincare.project, (X,)),
    "project, clipped": (poincare.project, (5 * X,)),
    "conformal_factor": (poincare.conformal_factor, (X,)),
    "expmap0": (poincare.expmap0, (V,)),
    "expmap0, near the origin": (poincare.expmap0, (V / 50,)),
    "expmap0, clipped": (poincare.expmap0, (20 * V,)),
    "logmap0": (poincare.logmap0, (X,)),
    "logmap0, near the origin": (poincare.logmap0, (X / 50,)),
    "logmap0, clipped": (lambda x, c, dim: poincare.logmap0(x, c, dim, True), (X * (1 + 0.4 * (V[:, :1] > 0)),)),
    "expmap": (poincare.expmap, (X, V)),
    "expmap, one vector": (poincare.expmap, (X, draw(1, 4, 1, seed=3))),
    "expmap, one point": (poincare.expmap, (Y, V)),
    "expmap, clipped": (poincare.expmap, (X, 20 * V)),
    "logmap": (poincare.logmap, (X, Y)),
    "logmap, from one point": (poincare.logmap, (Y, X)),
    "gyration": (poincare.gyration, (X, Y, V)),
    "gyration, of fixed points": (poincare.gyration, (Y, -Y / 3 + 0.1, V)),
    "transport": (poincare.transport, (Y, X, V)),
    "distance": (poincare.distance, (X, Y)),
    "midpoint": (poincare.midpoint, (X,)),
    "midpoint, over one dimension": (lambda x, c, dim: poincare.midpoint(x, c, dim, 0), (X,)),
}


@pytest.mark.parametrize("name", MAPS)
def test_gradients_of_every_map_and_of_the_curvature(name: str) -> None:
    function, tensors = MAPS[name]
    inputs = [t.clone().requires_grad_() for t in tensors]
    c = torch.tensor(C, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *given: function(*given, 1), (*inputs, c))


@pytest.mark.parametrize("name", MAPS)
def test_what_is_derived_by_hand_is_the_definitions_own(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    function, tensors = MAPS[name]
    found = []
    for form in ("manual", "naive"):
        monkeypatch.setenv("LISSOM_OPS", form)
        assert poincare._form() is {"manual": manual, "naive": naive}[form]
        inputs = [t.clone().requires_grad_() for t in tensors]
        c = torch.tensor(C, dtype=torch.float64, requires_grad=True)
        answer = function(*inputs, c, 1)
        weights = draw(*answer.shape, seed=9)
        gradients = torch.autograd.grad((answer * weights).sum(), (*inputs, c))
        plain = function(*tensors, C, 1)  # the curvature a number
        torch.testing.assert_close(plain, answer)
        found.append((answer, *gradients))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "function", [poincare.expmap0, poincare.logmap0, poincare.project, poincare.midpoint, poincare.conformal_factor]
)
def test_the_origin_has_gradients(function: Callable[..., torch.Tensor], kind: torch.dtype) -> None:
    for size in (0.0, 1e-30, 1e-12):
        x = torch.full((2, 3), size, dtype=kind, requires_grad=True)
        (gradient,) = torch.autograd.grad(function(x, 0.5).sum(), x)
        assert gradient.isfinite().all()
        if function in (poincare.expmap0, poincare.logmap0, poincare.project):
            torch.testing.assert_close(gradient, torch.ones_like(gradient))
    same = torch.full((2, 3), 0.2, dtype=kind, requires_grad=True)
    (gradient,) = torch.autograd.grad(poincare.distance(same, same.detach(), 0.5).square().sum(), same)
    assert torch.equal(gradient, torch.zeros_like(gradient))


def test_slopes_near_the_origin_come_from_the_series_without_a_step() -> None:
    for kind, edge in ((torch.float32, 0.05), (torch.float64, 1e-3)):
        u = torch.tensor([0.1, 0.5, 0.999, 1.001, 2.0], dtype=kind) * edge
        for name, function in {"tanh": torch.tanh, "artanh": torch.atanh, "arsinh": torch.asinh}.items():
            wide = u.double().requires_grad_()
            (want,) = torch.autograd.grad((function(wide.sqrt()) / wide.sqrt()).sum(), wide)
            value, slope = manual._profile(u, name, 2.0)
            torch.testing.assert_close(slope.double(), want, rtol=2e-5 if kind is torch.float32 else 1e-10, atol=0)
            torch.testing.assert_close(value, naive.profile(u, name, 2.0))
    u = draw(9).square().requires_grad_()
    for name, limit in itertools.product(("tanh", "artanh", "arsinh"), (0.3, 0.99)):
        assert torch.autograd.gradcheck(partial(manual.profile, kind=name, limit=limit), (u,))


# Identities


@pytest.mark.parametrize("c", [0.1, 1.0, 2.5])
def test_identities(c: float) -> None:
    x, y, z = (points(6, 5, c=c, seed=seed, scale=0.25) for seed in range(3))
    v = draw(6, 5, seed=4)
    add = poincare.mobius_add
    torch.testing.assert_close(poincare.logmap0(poincare.expmap0(v, c), c), v)
    torch.testing.assert_close(poincare.logmap(x, poincare.expmap(x, v / 9, c), c), v / 9)
    torch.testing.assert_close(add(x, -x, c), torch.zeros_like(x))
    torch.testing.assert_close(add(-x, add(x, y, c), c), y)
    torch.testing.assert_close(poincare.distance(x, y, c), poincare.distance(y, x, c))
    torch.testing.assert_close(poincare.distance(add(z, x, c), add(z, y, c), c), poincare.distance(x, y, c))
    # A tangent vector is as long as the way it leads, and keeps its length when carried.
    step = poincare.logmap(x, y, c)
    length = (poincare.conformal_factor(x, c) * step.norm(dim=-1, keepdim=True)).squeeze(-1)
    torch.testing.assert_close(length, poincare.distance(x, y, c))
    carried = poincare.transport(x, y, step, c)
    after = (poincare.conformal_factor(y, c) * carried.norm(dim=-1, keepdim=True)).squeeze(-1)
    torch.testing.assert_close(after, length)
    torch.testing.assert_close(add(x, add(y, z, c), c), add(add(x, y, c), poincare.gyration(x, y, z, c), c))


def test_a_flat_ball() -> None:
    x, y, c = draw(6, 5), draw(6, 5, seed=1), 1e-9
    torch.testing.assert_close(poincare.mobius_add(x, y, c), x + y, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(poincare.distance(x, y, c), 2 * (x - y).norm(dim=-1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(poincare.midpoint(x, c), x.mean(0, keepdim=True), rtol=1e-6, atol=1e-6)
    weight, bias = draw(3, 5, seed=2), draw(3, seed=3)
    want = 2 * x @ weight.T - 2 * bias * weight.norm(dim=1)
    for form in poincare.LAMBDA_FORMS:
        torch.testing.assert_close(poincare.fully_connected(x, weight, bias, c, form), want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("c", [0.1, 1.0])
def test_half_the_identity_is_the_identity_with_the_correct_lambda_only(c: float) -> None:
    x = points(6, 5, c=c, scale=1.0)
    half = torch.eye(5, dtype=x.dtype) / 2
    torch.testing.assert_close(poincare.fully_connected(x, half, torch.zeros(5), c), x, rtol=1e-13, atol=1e-15)
    published = poincare.fully_connected(x, half, None, c, "published")
    assert (published - x).norm() > 0.3 * x.norm()
    with pytest.raises(ValueError, match="none of correct, published"):
        poincare.fully_connected(x, half, None, c, "inverted")


def test_midpoints() -> None:
    x = points(1, 5, c=0.8)
    torch.testing.assert_close(poincare.midpoint(x.expand(7, 5), 0.8), x)
    torch.testing.assert_close(poincare.midpoint(torch.cat([x, -x]), 0.8), torch.zeros_like(x))
    # Of two points it is the middle of the way, as far as both; of close ones nearly the Fréchet mean.
    y = points(1, 5, c=0.8, seed=1)
    middle = poincare.midpoint(torch.cat([x, y]), 0.8)
    torch.testing.assert_close(poincare.distance(x, middle, 0.8), poincare.distance(x, y, 0.8) / 2)
    torch.testing.assert_close(poincare.frechet_mean(torch.cat([x, y]), 0.8, iterations=30), middle)
    cloud = points(2, 5, 3, 4, c=0.8, scale=0.2, dim=1)
    mean = poincare.frechet_mean(cloud, 0.8, 1)
    assert mean.shape == poincare.midpoint(cloud, 0.8, 1).shape == (1, 5, 1, 1)
    assert poincare.distance(mean, poincare.midpoint(cloud, 0.8, 1), 0.8, 1).max() < 0.02
    log = poincare.logmap(mean, cloud, 0.8, 1).mean((0, 2, 3))
    torch.testing.assert_close(log, torch.zeros_like(log), atol=1e-8, rtol=0)
    assert poincare.midpoint(cloud, 0.8, 1, (0, -1)).shape == (1, 5, 3, 1)
    with pytest.raises(ValueError, match="cannot be averaged over"):
        poincare.midpoint(cloud, 0.8, 1, (0, 1))


def test_the_frechet_mean_has_gradients() -> None:
    x = points(4, 3, c=C).requires_grad_()
    c = torch.tensor(C, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, c: poincare.frechet_mean(x, c, iterations=3), (x, c))
    assert torch.autograd.gradcheck(
        lambda x, c: poincare.frechet_variance(x, poincare.midpoint(x, c), c), (x, c)
    )  # fmt: skip


@pytest.mark.parametrize("form", poincare.LAMBDA_FORMS)
def test_gradients_of_the_fully_connected_layer(form: str) -> None:
    x = points(4, 3, c=C).requires_grad_()
    weight, bias = draw(2, 3, seed=1).requires_grad_(), draw(2, seed=2).requires_grad_()
    c = torch.tensor(C, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *given: poincare.fully_connected(*given, form), (x, weight, bias, c))
    # A row of zeros, as the identity start has them where there are more outputs than inputs, can still learn.
    weight = torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)
    poincare.fully_connected(x, weight, None, C, form).sum().backward()
    assert weight.grad is not None
    assert weight.grad.abs().min() > 1e-3


# Numbers


def test_far_vectors_stay_inside_and_finite() -> None:
    for kind, eps in ((torch.float32, 4e-3), (torch.float64, 1e-5)):
        v = (1e6 * draw(4, 5)).to(kind).requires_grad_()
        x = poincare.expmap0(v, 0.1)
        torch.testing.assert_close(x.norm(dim=-1), torch.full((4,), (1 - eps) * 0.1**-0.5, dtype=kind))
        weight = (100 * draw(3, 5, seed=1)).to(kind).requires_grad_()
        y = poincare.fully_connected(x, weight, torch.zeros(3, dtype=kind), 0.1)
        poincare.logmap0(poincare.mobius_add(y, -y.detach(), 0.1), 0.1).sum().backward()
        assert (y.norm(dim=-1) < 0.1**-0.5).all()
        assert v.grad is not None
        assert weight.grad is not None
        assert v.grad.isfinite().all()
        assert weight.grad.isfinite().all()


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_short_numbers_are_computed_in_float32(kind: torch.dtype) -> None:
    for name, (function, tensors) in MAPS.items():
        short = [t.to(kind) for t in tensors]
        found = function(*short, C, 1)
        assert found.dtype is kind, name
        assert torch.equal(found, function(*(t.float() for t in short), C, 1).to(kind)), name
    x, weight = X[:, :, 0].to(kind), V[0].T.to(kind)
    found = poincare.fully_connected(x, weight, torch.ones(5, dtype=kind), C)
    assert torch.equal(found, poincare.fully_connected(x.float(), weight.float(), torch.ones(5), C).to(kind))


def test_the_manual_backward_keeps_inputs_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def kept(form: str) -> int:
        monkeypatch.setenv("LISSOM_OPS", form)
        seen: dict[int, int] = {}

        def pack(t: torch.Tensor) -> torch.Tensor:
            seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        x, y = (points(100, 16, c=C, seed=seed).requires_grad_() for seed in range(2))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            answer = poincare.mobius_add(x, y, C)
        answer.sum().backward()
        return sum(seen.values())

    assert kept("manual") == 2 * 100 * 16 * 8
    assert kept("naive") > 1.5 * kept("manual")


def test_a_graph_holds_the_definitions() -> None:
    class Chain(torch.nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            middle = poincare.midpoint(torch.stack([x, y]), C, -1, 0)[0]
            return poincare.logmap(middle, poincare.expmap(x, y, C), C) + poincare.transport(x, middle, y, C)

    x, y = points(3, 4, c=C), points(3, 4, c=C, seed=1)
    program = torch.export.export(Chain(), (x, y))
    assert "autograd" not in program.graph_module.code
    torch.testing.assert_close(program.module()(x, y), Chain()(x, y))


@pytest.mark.parametrize("c", [0.0, -0.1, float("nan")])
def test_a_curvature_that_makes_no_ball(c: float) -> None:
    with pytest.raises(ValueError, match="makes no ball"):
        poincare.mobius_add(X, Y, c)
    with pytest.raises(ValueError, match="makes no ball"):
        poincare.fully_connected(X, draw(2, 5), None, c)


# Published figures


def _figures() -> list[Mapping[str, Any]]:
    def read(value: Any) -> Any:
        return torch.tensor(value, dtype=torch.float64) if isinstance(value, list) else value

    cases = fixture("poincare_resnet", "cases")["cases"]
    return [{key: read(value) for key, value in case.items()} for case in cases]


@needs_parity
@pytest.mark.parametrize("form", ["manual", "naive"])
def test_the_published_answers(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LISSOM_OPS", form)
    cases = _figures()
    assert [case["c"] for case in cases] == [0.1, 1.0]
    for case in cases:
        c, v, w, x, y = (case[key] for key in ("c", "v", "w", "x_expmap0_v", "y_expmap0_w"))
        found = {
            "x_expmap0_v": poincare.expmap0(v, c),
            "y_expmap0_w": poincare.expmap0(w, c),
            "mobius_add_x_y": poincare.mobius_add(x, y, c),
            "logmap0_x": poincare.logmap0(x, c),
            "logmap_x_y": poincare.logmap(x, y, c),
            "expmap_x_v": poincare.expmap(x, case["expmap_x_v_scale"] * v, c),
            "transp_x_to_y_of_v": poincare.transport(x, y, v, c),
            "dist_x_y": poincare.distance(x, y, c),
            "midpoint_of_x": poincare.midpoint(x, c),
            # The library that they are from does not project them: one is nearer to the border.
            "fc_published_lambda": poincare.fully_connected(x, case["z"].T, case["r"], c, "published", clip=False),
            "fc_correct_lambda": poincare.fully_connected(x, case["z"].T, case["r"], c, clip=False),
        }
        variance = poincare.frechet_variance(x, poincare.midpoint(x, c), c)
        assert variance.item() == pytest.approx(case["frechet_variance"], rel=1e-7)
        assert set(found) == case.keys() - {"c", "v", "w", "z", "r", "expmap_x_v_scale", "frechet_variance"}
        for key, value in found.items():
            assert torch.allclose(value, case[key], rtol=1e-6, atol=2e-8), key
        projected = poincare.fully_connected(x, case["z"].T, case["r"], c)
        torch.testing.assert_close(projected, poincare.project(found["fc_correct_lambda"], c))
