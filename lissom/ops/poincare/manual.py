"""The maps of the Poincaré ball with backward passes derived by hand: what is kept for them are the inputs alone.

Autograd keeps every intermediate of the definitions in ``naive.py``, some of them as large as the input, so that deep
networks need many times the memory (Poincaré ResNet, arXiv 2303.14027, section 3.4). Each class below keeps its inputs
and computes the few sums along the vector's dimension again.

The radial maps are written in u = c |x|^2, in which they are smooth at the origin: exp_0(v) = P(u) v with
P(u) = tanh(sqrt(u)) / sqrt(u), log_0(x) = Q(u) x with Q(u) = artanh(sqrt(u)) / sqrt(u), and for a gradient g of P x
dL/dx = P g + 2 c P' <x, g> x, dL/dc = |x|^2 P' <x, g>. Every map has the gradient of its curvature too (the published
one of Möbius addition is wrong). Second derivatives are not defined.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from lissom.ops.poincare.naive import TINY, Curvature, artanh_limit, radius, root

__all__ = [
    "conformal_factor",
    "distance",
    "expmap",
    "expmap0",
    "gyration",
    "logmap",
    "logmap0",
    "midpoint",
    "mobius_add",
    "profile",
    "project",
]

Gradients = tuple[Any, ...]


def _dot(x: torch.Tensor, y: torch.Tensor, dim: int) -> torch.Tensor:
    return (x * y).sum(dim, keepdim=True)


def _keep(ctx: Any, c: Curvature, dim: int, *tensors: torch.Tensor) -> None:
    ctx.dim, ctx.number = dim, None if isinstance(c, torch.Tensor) else c
    ctx.save_for_backward(*tensors, *((c,) if isinstance(c, torch.Tensor) else ()))


def _kept(ctx: Any) -> tuple[Any, ...]:
    """What ``_keep`` kept, the curvature last."""
    return ctx.saved_tensors if ctx.number is None else (*ctx.saved_tensors, ctx.number)


def _of(tensor: Any, gradient: torch.Tensor) -> torch.Tensor:
    """A gradient summed over what was broadcast, and over everything for a curvature, in the tensor's own type."""
    return gradient.sum_to_size(tensor.shape).to(tensor.dtype)


def _of_curvature(c: Any, gradient: torch.Tensor) -> torch.Tensor:
    return gradient.sum().reshape(c.shape).to(c.dtype)


class _MobiusAdd(torch.autograd.Function):
    """z = (A x + B y) / D, A = 1 + 2cp + cr, B = 1 - cq, D = 1 + 2cp + c^2 q r; p = <x, y>, q = |x|^2, r = |y|^2."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, y: torch.Tensor, c: Curvature, dim: int) -> torch.Tensor:
        _keep(ctx, c, dim, x, y)
        p, q, r = _dot(x, y, dim), _dot(x, x, dim), _dot(y, y, dim)
        below = (1 + 2 * c * p + c * c * q * r).clamp_min(TINY)
        return ((1 + 2 * c * p + c * r) / below) * x + ((1 - c * q) / below) * y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: torch.Tensor) -> Gradients:
        x, y, c = _kept(ctx)
        dim = ctx.dim
        p, q, r = _dot(x, y, dim), _dot(x, x, dim), _dot(y, y, dim)
        gx, gy = _dot(g, x, dim), _dot(g, y, dim)
        a, b, d = 1 + 2 * c * p + c * r, 1 - c * q, 1 + 2 * c * p + c * c * q * r
        below = d.clamp_min(TINY)
        to_a, to_b = gx / below, gy / below
        to_d = torch.where(d > TINY, -(a * to_a + b * to_b) / below, 0)
        to_p = 2 * c * (to_a + to_d)
        grad_x = grad_y = grad_c = None
        if ctx.needs_input_grad[0]:
            to_q = -c * to_b + c * c * r * to_d
            grad_x = _of(x, (a / below) * g + to_p * y + 2 * to_q * x)
        if ctx.needs_input_grad[1]:
            to_r = c * to_a + c * c * q * to_d
            grad_y = _of(y, (b / below) * g + to_p * x + 2 * to_r * y)
        if ctx.needs_input_grad[2]:
            grad_c = _of_curvature(c, to_a * (2 * p + r) - to_b * q + to_d * (2 * p + 2 * c * q * r))
        return grad_x, grad_y, grad_c, None


class _Project(torch.autograd.Function):
    """x m / |x| where |x| > m = radius / sqrt(c): there the gradient along x is lost."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, c: Curvature, dim: int) -> torch.Tensor:
        _keep(ctx, c, dim, x)
        return x * _shrink(x, c, dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: torch.Tensor) -> Gradients:
        x, c = _kept(ctx)
        scale, square, along = _shrink(x, c, ctx.dim), _dot(x, x, ctx.dim), _dot(x, g, ctx.dim)
        clipped = scale < 1
        grad_c = None
        if ctx.needs_input_grad[1]:
            grad_c = _of_curvature(c, torch.where(clipped, -scale * along / (2 * c), 0))
        radial = torch.where(clipped, along / square.clamp_min(TINY**2), 0)
        return scale * (g - radial * x), grad_c, None


def _shrink(x: torch.Tensor, c: Curvature, dim: int) -> torch.Tensor:
    length = _dot(x, x, dim).sqrt().clamp_min(TINY)
    return (radius(x) / root(c) / length).clamp_max(1)


class _ConformalFactor(torch.autograd.Function):
    """2 / (1 - c |x|^2), whose derivative by c |x|^2 is half its square."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, c: Curvature, dim: int) -> torch.Tensor:
        _keep(ctx, c, dim, x)
        return 2 / (1 - c * _dot(x, x, dim)).clamp_min(TINY)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: torch.Tensor) -> Gradients:
        x, c = _kept(ctx)
        square = _dot(x, x, ctx.dim)
        rest = 1 - c * square
        slope = torch.where(rest > TINY, 2 / rest.clamp_min(TINY).square(), 0) * g
        grad_c = _of_curvature(c, slope * square) if ctx.needs_input_grad[1] else None
        return 2 * c * slope * x, grad_c, None


class _Radial(torch.autograd.Function):
    """t^k P(c t^2 |x|^2) x of a radial map P and a factor t (or None: 1) that has one element a vector.

    exp: k = 1, the tangent vector is t x. log: k = -1 and P does not see t.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, t: torch.Tensor | None, c: Curvature, dim: int, log: bool, limit: float
    ) -> torch.Tensor:
        ctx.log, ctx.limit, ctx.scaled = log, limit, t is not None
        _keep(ctx, c, dim, x, *(() if t is None else (t,)))
        value, _ = _profile(_argument(x, t, c, dim, log), "artanh" if log else "tanh", limit, slope=False)
        if t is not None:
            value = value / t if log else value * t
        return value * x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: torch.Tensor) -> Gradients:
        *tensors, c = _kept(ctx)
        x, t = tensors if ctx.scaled else (tensors[0], None)
        dim, log = ctx.dim, ctx.log
        value, slope = _profile(_argument(x, t, c, dim, log), "artanh" if log else "tanh", ctx.limit)
        along, square = _dot(x, g, dim), _dot(x, x, dim)
        inner = 1.0 if t is None or log else t * t  # du / d(c |x|^2)
        outer = 1.0 if t is None else 1 / t if log else t
        grad_t = grad_c = None
        if t is not None and ctx.needs_input_grad[1]:
            by_t = -value / (t * t) if log else value + 2 * c * inner * square * slope
            grad_t = _of(t, by_t * along)
        if ctx.needs_input_grad[2]:
            grad_c = _of_curvature(c, outer * inner * square * slope * along)
        grad_x = _of(x, outer * (value * g + (2 * c * inner * slope * along) * x))
        return grad_x, grad_t, grad_c, None, None, None


def _argument(x: torch.Tensor, t: torch.Tensor | None, c: Curvature, dim: int, log: bool) -> torch.Tensor:
    u = c * _dot(x, x, dim)
    return u if t is None or log else u * t * t


# Derivatives of tanh(s) / s, artanh(s) / s and arsinh(s) / s by u = s^2: the first coefficients at u = 0.
_SERIES = {
    "tanh": (-1 / 3, 4 / 15, -17 / 105, 248 / 2835, -1382 / 31185),
    "artanh": (1 / 3, 2 / 5, 3 / 7, 4 / 9, 5 / 11),
    "arsinh": (-1 / 6, 3 / 20, -15 / 112, 35 / 288, -315 / 2816),
}


def _profile(u: torch.Tensor, kind: str, limit: float, slope: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """min(tanh(s), limit) / s, artanh(min(s, limit)) / s or min(arsinh(s), limit) / s at s = sqrt(u), and its
    derivative by u, which near 0 is a difference of nearly equal numbers, and is taken from the series there."""
    s = u.sqrt().clamp_min(TINY)
    inner = torch.tanh(s) if kind == "tanh" else s if kind == "artanh" else torch.asinh(s)
    kept = inner.clamp_max(limit)
    value = (torch.atanh(kept) if kind == "artanh" else kept) / s
    if not slope:
        return value, value
    if kind == "tanh":
        found = 1 - inner * inner
    else:
        found = 1 / (1 - kept * kept) if kind == "artanh" else (1 + u).rsqrt()
    found = (torch.where(inner > limit, 0, found) - value) / (2 * u.clamp_min(TINY**2))
    series = torch.zeros_like(u)
    for coefficient in reversed(_SERIES[kind]):
        series = series * u + coefficient
    return value, torch.where(u < (1e-3 if u.dtype is torch.float64 else 0.05), series, found)


class _Profile(torch.autograd.Function):
    """A radial map's factor alone, as a function of u."""

    @staticmethod
    def forward(ctx: Any, u: torch.Tensor, kind: str, limit: float) -> torch.Tensor:
        ctx.kind, ctx.limit = kind, limit
        ctx.save_for_backward(u)
        return _profile(u, kind, limit, slope=False)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: torch.Tensor) -> Gradients:
        return g * _profile(ctx.saved_tensors[0], ctx.kind, ctx.limit)[1], None, None


class _Gyration(torch.autograd.Function):
    """w + m (A u + B v), m = 2 / D, with a = <u, w>, b = <v, w>, p = <u, v>, q = |u|^2, r = |v|^2:
    A = -c^2 a r + c b + 2 c^2 p b, B = -c^2 b q - c a, D = 1 + 2cp + c^2 q r."""

    @staticmethod
    def forward(
        ctx: Any, u: torch.Tensor, v: torch.Tensor, w: torch.Tensor, c: Curvature, dim: int
    ) -> torch.Tensor:  # fmt: skip
        _keep(ctx, c, dim, u, v, w)
        a, b, p, q, r = _dot(u, w, dim), _dot(v, w, dim), _dot(u, v, dim), _dot(u, u, dim), _dot(v, v, dim)
        m = 2 / (1 + 2 * c * p + c * c * q * r).clamp_min(TINY)
        to_u, to_v = -c * c * a * r + c * b + 2 * c * c * p * b, -c * c * b * q - c * a
        return w + (m * to_u) * u + (m * to_v) * v

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: torch.Tensor) -> Gradients:
        u, v, w, c = _kept(ctx)
        dim = ctx.dim
        a, b, p, q, r = _dot(u, w, dim), _dot(v, w, dim), _dot(u, v, dim), _dot(u, u, dim), _dot(v, v, dim)
        gu, gv = _dot(g, u, dim), _dot(g, v, dim)
        along_u, along_v = -c * c * a * r + c * b + 2 * c * c * p * b, -c * c * b * q - c * a
        d = 1 + 2 * c * p + c * c * q * r
        m = 2 / d.clamp_min(TINY)
        on_u, on_v = m * gu, m * gv  # the gradients of A and B
        on_d = torch.where(d > TINY, -m / d * (along_u * gu + along_v * gv), 0)
        on_a, on_b = -c * c * r * on_u - c * on_v, (c + 2 * c * c * p) * on_u - c * c * q * on_v
        on_p = 2 * c * c * b * on_u + 2 * c * on_d
        grad_u = grad_v = grad_w = grad_c = None
        if ctx.needs_input_grad[0]:
            on_q = -c * c * b * on_v + c * c * r * on_d
            grad_u = _of(u, m * along_u * g + on_a * w + on_p * v + 2 * on_q * u)
        if ctx.needs_input_grad[1]:
            on_r = -c * c * a * on_u + c * c * q * on_d
            grad_v = _of(v, m * along_v * g + on_b * w + on_p * u + 2 * on_r * v)
        if ctx.needs_input_grad[2]:
            grad_w = _of(w, g + on_a * u + on_b * v)
        if ctx.needs_input_grad[3]:
            direct = on_u * (-2 * c * a * r + b + 4 * c * p * b) + on_v * (-2 * c * b * q - a)
            grad_c = _of_curvature(c, direct + on_d * (2 * p + 2 * c * q * r))
        return grad_u, grad_v, grad_w, grad_c, None


class _Distance(torch.autograd.Function):
    """2 / sqrt(c) arsinh(sqrt(m)), m = c |x - y|^2 / ((1 - c |x|^2)(1 - c |y|^2)).

    The same number as by artanh of the norm of (-x) (+) y, without the cancellation near the border.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, y: torch.Tensor, c: Curvature, dim: int) -> torch.Tensor:
        _keep(ctx, c, dim, x, y)
        return (2 / root(c) * torch.asinh(_apart(x, y, c, dim)[0])).squeeze(dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: torch.Tensor) -> Gradients:
        x, y, c = _kept(ctx)
        dim = ctx.dim
        g = g.unsqueeze(dim)
        sine, a, b = _apart(x, y, c, dim)
        m = sine * sine
        slope = g / (root(c) * (1 + m).sqrt() * sine.clamp_min(TINY))  # by m
        away = x - y
        between = 2 * c / (a * b)
        grad_x = grad_y = grad_c = None
        if ctx.needs_input_grad[0]:
            grad_x = _of(x, slope * (between * away + (2 * c * m / a) * x))
        if ctx.needs_input_grad[1]:
            grad_y = _of(y, slope * ((2 * c * m / b) * y - between * away))
        if ctx.needs_input_grad[2]:
            by_m = slope * m * (1 / c + _dot(x, x, dim) / a + _dot(y, y, dim) / b)
            grad_c = _of_curvature(c, by_m - g * torch.asinh(sine) / (c * root(c)))
        return grad_x, grad_y, grad_c, None


def _apart(x: torch.Tensor, y: torch.Tensor, c: Curvature, dim: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """sinh(sqrt(c) d / 2), 1 - c |x|^2 and 1 - c |y|^2."""
    a, b = (1 - c * _dot(x, x, dim)).clamp_min(TINY), (1 - c * _dot(y, y, dim)).clamp_min(TINY)
    away = x - y
    return root(c) * (_dot(away, away, dim) / (a * b)).sqrt(), a, b


class _Midpoint(torch.autograd.Function):
    """K(c |m|^2) m with m = sum g x / (sum g - N / 2), g = 1 / (1 - c |x|^2), K(w) = 1 / (1 + sqrt(1 - w))."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, c: Curvature, dim: int, over: tuple[int, ...]) -> torch.Tensor:
        ctx.over = over
        _keep(ctx, c, dim, x)
        _, _, mean, rest = _klein(x, c, dim, over)
        return mean / (1 + rest.sqrt())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: torch.Tensor) -> Gradients:
        x, c = _kept(ctx)
        dim = ctx.dim
        weights, total, mean, rest = _klein(x, c, dim, ctx.over)
        factor, square = 1 / (1 + rest.sqrt()), _dot(mean, mean, dim)
        slope = torch.where(1 - c * square > torch.finfo(x.dtype).eps, factor.square() / (2 * rest.sqrt()), 0)
        along = slope * _dot(mean, g, dim)
        to_sum = (factor * g + 2 * c * along * mean) / total
        to_weight = _dot(to_sum, x, dim) - _dot(to_sum, mean, dim)
        by_square = to_weight * weights.square()
        grad_c = None
        if ctx.needs_input_grad[1]:
            grad_c = _of_curvature(c, along * square) + _of_curvature(c, by_square * _dot(x, x, dim))
        return weights * to_sum + (2 * c * by_square) * x, grad_c, None, None


def _klein(
    x: torch.Tensor, c: Curvature, dim: int, over: tuple[int, ...]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The weights g, sum g - N / 2, m, and 1 - c |m|^2."""
    weights = 1 / (1 - c * _dot(x, x, dim)).clamp_min(TINY)
    total = weights.sum(over, keepdim=True) - math.prod(x.shape[d] for d in over) / 2
    mean = (weights * x).sum(over, keepdim=True) / total
    return weights, total, mean, (1 - c * _dot(mean, mean, dim)).clamp_min(torch.finfo(x.dtype).eps)


def mobius_add(x: torch.Tensor, y: torch.Tensor, c: Curvature, dim: int) -> torch.Tensor:
    """``naive.mobius_add``, with the backward pass by hand."""
    return _MobiusAdd.apply(x, y, c, dim)


def project(x: torch.Tensor, c: Curvature, dim: int) -> torch.Tensor:
    """``naive.project``, with the backward pass by hand."""
    return _Project.apply(x, c, dim)


def conformal_factor(x: torch.Tensor, c: Curvature, dim: int) -> torch.Tensor:
    """``naive.conformal_factor``, with the backward pass by hand."""
    return _ConformalFactor.apply(x, c, dim)


def expmap0(v: torch.Tensor, c: Curvature, dim: int, clip: bool = True) -> torch.Tensor:
    """``naive.expmap0``, with the backward pass by hand."""
    return _Radial.apply(v, None, c, dim, False, radius(v) if clip else math.inf)


def logmap0(x: torch.Tensor, c: Curvature, dim: int, clip: bool = False) -> torch.Tensor:
    """``naive.logmap0``, with the backward pass by hand."""
    return _Radial.apply(x, None, c, dim, True, radius(x) if clip else artanh_limit(x))


def expmap(x: torch.Tensor, v: torch.Tensor, c: Curvature, dim: int) -> torch.Tensor:
    """``naive.expmap``, with the backward pass by hand."""
    step = _Radial.apply(v, conformal_factor(x, c, dim) / 2, c, dim, False, math.inf)
    return project(mobius_add(x, step, c, dim), c, dim)


def logmap(x: torch.Tensor, y: torch.Tensor, c: Curvature, dim: int) -> torch.Tensor:
    """``naive.logmap``, with the backward pass by hand."""
    u = mobius_add(-x, y, c, dim)
    return _Radial.apply(u, conformal_factor(x, c, dim) / 2, c, dim, True, artanh_limit(u))


def profile(u: torch.Tensor, kind: str, limit: float) -> torch.Tensor:
    """``naive.profile``, with the backward pass by hand."""
    return _Profile.apply(u, kind, limit)


def gyration(u: torch.Tensor, v: torch.Tensor, w: torch.Tensor, c: Curvature, dim: int) -> torch.Tensor:
    """``naive.gyration``, with the backward pass by hand."""
    return _Gyration.apply(u, v, w, c, dim)


def distance(x: torch.Tensor, y: torch.Tensor, c: Curvature, dim: int) -> torch.Tensor:
    """``naive.distance``, with the backward pass by hand."""
    return _Distance.apply(x, y, c, dim)


def midpoint(x: torch.Tensor, c: Curvature, dim: int, over: tuple[int, ...]) -> torch.Tensor:
    """``naive.midpoint``, with the backward pass by hand."""
    return _Midpoint.apply(x, c, dim, over)
