"""Maps of the Poincaré ball: Möbius addition, exp and log, transport, distance, midpoint (Poincaré ResNet, 2303.14027).

The ball of curvature -c, c > 0, is {x : c |x|^2 < 1}. Vectors lie along ``dim``; all other dimensions are broadcast.
``c`` is a number or a tensor with one element, which then gets its gradient. float16 and bfloat16 are computed in
float32, as they cannot hold points near the border; the answer has the first argument's type.

``naive.py`` holds the definitions. ``manual.py`` computes the same with backward passes derived by hand, which keep the
inputs alone: it runs wherever gradients are recorded. A compiler or an exporter gets the definitions, as does
``LISSOM_OPS=naive``. Second derivatives need that too.

Distances and angles: Ganea et al. (arXiv 1805.09112); fully connected layers: Shimizu et al. (arXiv 2006.08210);
midpoints: Ungar's gyromidpoint, in closed form.
"""

from __future__ import annotations

import math
import os
from typing import Any

import torch
from torch.nn import functional as F

from lissom.ops.poincare import manual, naive
from lissom.ops.poincare.naive import TINY, Curvature

__all__ = [
    "LAMBDA_FORMS",
    "Curvature",
    "conformal_factor",
    "distance",
    "expmap",
    "expmap0",
    "frechet_mean",
    "frechet_variance",
    "fully_connected",
    "gyration",
    "hyperplanes",
    "logmap",
    "logmap0",
    "midpoint",
    "mobius_add",
    "project",
    "reach_of_expmap0",
    "signed_sines",
    "tangents_of_sines",
    "transport",
    "widened",
]

LAMBDA_FORMS = ("correct", "published")
_SHORT = (torch.float16, torch.bfloat16)
_FAR = 40.0  # sinh of more overflows when squared and summed in float32; points saturate at a fifth of it


def mobius_add(x: torch.Tensor, y: torch.Tensor, c: Curvature, dim: int = -1) -> torch.Tensor:
    """x (+) y = ((1 + 2c<x,y> + c|y|^2) x + (1 - c|x|^2) y) / (1 + 2c<x,y> + c^2 |x|^2 |y|^2) of two points."""
    return _call("mobius_add", (x, y), c, dim)


def project(x: torch.Tensor, c: Curvature, dim: int = -1) -> torch.Tensor:
    """x, or where it is nearer to the border than rounding allows, or beyond, the last point allowed in its direction.

    That is at (1 - eps) / sqrt(c), with eps 4e-3 in float32 and 1e-5 in float64, as published.
    """
    return _call("project", (x,), c, dim)


def conformal_factor(x: torch.Tensor, c: Curvature, dim: int = -1) -> torch.Tensor:
    """lambda_x = 2 / (1 - c |x|^2), by which lengths at x grow; ``dim`` stays, with one entry."""
    return _call("conformal_factor", (x,), c, dim)


def expmap0(v: torch.Tensor, c: Curvature, dim: int = -1, clip: bool = True) -> torch.Tensor:
    """The point that the tangent vector v at the origin leads to: tanh(sqrt(c)|v|) v / (sqrt(c)|v|), projected.

    Without ``clip`` it is not projected, and may lie on the border by rounding.
    """
    return _call("expmap0", (v,), c, dim, clip)


def logmap0(x: torch.Tensor, c: Curvature, dim: int = -1, clip: bool = False) -> torch.Tensor:
    """The tangent vector at the origin that leads to x, with ``clip`` to x projected: artanh(sqrt(c)|x|) x /
    (sqrt(c)|x|)."""
    return _call("logmap0", (x,), c, dim, clip)


def expmap(x: torch.Tensor, v: torch.Tensor, c: Curvature, dim: int = -1) -> torch.Tensor:
    """The point that the tangent vector v at x leads to: x (+) tanh(sqrt(c) lambda_x|v| / 2) v / (sqrt(c)|v|)."""
    return _call("expmap", (x, v), c, dim)


def logmap(x: torch.Tensor, y: torch.Tensor, c: Curvature, dim: int = -1) -> torch.Tensor:
    """The tangent vector at x that leads to y: 2 / (sqrt(c) lambda_x) artanh(sqrt(c)|u|) u / |u|, u = (-x) (+) y."""
    return _call("logmap", (x, y), c, dim)


def gyration(u: torch.Tensor, v: torch.Tensor, w: torch.Tensor, c: Curvature, dim: int = -1) -> torch.Tensor:
    """gyr[u, v] w, the rotation by which Möbius addition is not associative: u (+) (v (+) w) =
    (u (+) v) (+) gyr[u, v] w for points u and v."""
    return _call("gyration", (u, v, w), c, dim)


def transport(x: torch.Tensor, y: torch.Tensor, v: torch.Tensor, c: Curvature, dim: int = -1) -> torch.Tensor:
    """The tangent vector v at x carried to y along the shortest way: gyr[y, -x] v lambda_x / lambda_y."""
    (x, y, v), kind = _wide(x, y, v)
    lengths = conformal_factor(x, c, dim) / conformal_factor(y, c, dim)
    return (gyration(y, -x, v, c, dim) * lengths).to(kind)


def distance(x: torch.Tensor, y: torch.Tensor, c: Curvature, dim: int = -1) -> torch.Tensor:
    """d(x, y) = 2 / sqrt(c) artanh(sqrt(c) |(-x) (+) y|), without ``dim``."""
    return _call("distance", (x, y), c, dim)


def midpoint(
    x: torch.Tensor, c: Curvature, dim: int = -1, over: int | tuple[int, ...] | None = None
) -> torch.Tensor:  # fmt: skip
    """Ungar's gyromidpoint of N points: half of the way to sum g x / (sum g - N / 2), with g = 1 / (1 - c |x|^2).

    ``over`` are the dimensions that the points are counted along, by default all but ``dim``; they stay, with one
    entry. In contrast to the Fréchet mean it needs no iterations. Raises ValueError where ``over`` holds ``dim``.
    """
    return _call("midpoint", (x,), c, dim, _places(x, dim, over))


def frechet_mean(
    x: torch.Tensor, c: Curvature, dim: int = -1, over: int | tuple[int, ...] | None = None, iterations: int = 10
) -> torch.Tensor:
    """The point of least mean squared distance, by ``iterations`` of mu <- exp_mu(mean of log_mu(x)) from the mean of
    the tangent vectors at the origin. Arguments and shape as in ``midpoint``; gradients go through all iterations."""
    places = _places(x, dim, over)
    (x,), kind = _wide(x)
    centre = expmap0(logmap0(x, c, dim).mean(places, keepdim=True), c, dim)
    for _ in range(iterations):
        centre = expmap(centre, logmap(centre, x, c, dim).mean(places, keepdim=True), c, dim)
    return centre.to(kind)


def frechet_variance(
    x: torch.Tensor, centre: torch.Tensor, c: Curvature, dim: int = -1, over: int | tuple[int, ...] | None = None
) -> torch.Tensor:
    """The mean squared distance of all points from ``centre``, which is broadcast; ``over`` and shape as in
    ``midpoint``, with one entry along ``dim``."""
    places = _places(x, dim, over)
    (x, centre), kind = _wide(x, centre)
    return distance(x, centre, c, dim).square().unsqueeze(dim).mean(places, keepdim=True).to(kind)


def fully_connected(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, c: Curvature, lambda_form: str = "correct",
    clip: bool = True,
) -> torch.Tensor:  # fmt: skip
    """The Poincaré fully connected layer: points (..., n), weight (m, n), bias (m,) or None to points (..., m).

    Row k of the weight is the normal z_k of a hyperplane, r_k its offset from the origin:

        v_k = 2 |z_k| / sqrt(c) arsinh(sqrt(c) lambda_x <x, z_k / |z_k|> cosh(2 sqrt(c) r_k)
                                       - (lambda_x - 1) sinh(2 sqrt(c) r_k))
        w_k = sinh(sqrt(c) v_k) / sqrt(c),  y = w / (1 + sqrt(1 + c |w|^2)), projected unless ``clip`` is off.

    For c -> 0 it is 2 W x - 2 r |z|; W = I / 2 without bias is the identity at every c. ``lambda_form`` "published"
    takes lambda_x = 2 (1 - c |x|^2), as the code does with which the paper's results were obtained, in place of
    2 / (1 - c |x|^2). Raises ValueError for another form.
    """
    (x, weight), kind = _wide(x, weight)
    bias = None if bias is None else bias.to(x.dtype)
    normals, offsets, lengths = hyperplanes(weight, bias, c)
    square = x.square().sum(-1, keepdim=True)
    w = signed_sines(F.linear(x, normals), 1.0, square, offsets, lengths, c, -1, lambda_form)
    y = w / (naive.root(c) * (1 + (1 + w.square().sum(-1, keepdim=True)).sqrt()))
    return (project(y, c) if clip else y).to(kind)


def hyperplanes(
    weight: torch.Tensor, bias: torch.Tensor | None, c: Curvature
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """What a fully connected layer needs of its weight (m, ...) and bias (m,), whatever its input: the scaled unit
    normals z_k / |z_k| cosh(2 sqrt(c) r_k) (m, ...), the offsets sinh(2 sqrt(c) r_k) (m,), the lengths |z_k| (m,)."""
    lengths = torch.linalg.vector_norm(weight.flatten(1), dim=1).clamp_min(TINY)
    if bias is None:
        return weight / lengths.view(-1, *[1] * (weight.ndim - 1)), None, lengths
    turned = 2 * naive.root(c) * bias
    scale = torch.cosh(turned) / lengths
    return weight * scale.view(-1, *[1] * (weight.ndim - 1)), torch.sinh(turned), lengths


def signed_sines(
    products: torch.Tensor, reach: torch.Tensor | float, square: torch.Tensor, offsets: torch.Tensor | None,
    lengths: torch.Tensor, c: Curvature, dim: int = -1, lambda_form: str = "correct",
) -> torch.Tensor:  # fmt: skip
    """sinh(sqrt(c) v_k) of the fully connected layer, in float32 or float64: (..., m along ``dim``, ...).

    ``reach`` ``products`` are the products of x with the scaled unit normals, ``square`` is |x|^2 (one entry along
    ``dim``, as ``reach`` has); the rest is from ``hyperplanes``.
    """
    if lambda_form not in LAMBDA_FORMS:
        raise ValueError(f"lambda_form {lambda_form!r} is none of {', '.join(LAMBDA_FORMS)}")
    _check(c)
    shape = [1] * products.ndim
    shape[dim] = -1
    rest = 1 - c * square
    factor = 2 * rest if lambda_form == "published" else 2 / rest.clamp_min(TINY)
    inner = (naive.root(c) * factor * reach) * products
    if offsets is not None:
        inner = torch.addcmul(inner, 1 - factor, offsets.view(shape))
    return torch.sinh(((2 * lengths).view(shape) * torch.asinh(inner)).clamp(-_FAR, _FAR))


def tangents_of_sines(w: torch.Tensor, c: Curvature, dim: int = -1) -> torch.Tensor:
    """log_0 of the projected point that ``fully_connected`` makes of sinh(sqrt(c) v), in one step.

    With h = |w|, artanh(h / (1 + sqrt(1 + h^2))) is arsinh(h) / 2.
    """
    most = 2 * math.atanh(naive.radius(w))
    return w * (_form().profile(w.square().sum(dim, keepdim=True), "arsinh", most) / (2 * naive.root(c)))


def reach_of_expmap0(v_square: torch.Tensor, c: Curvature) -> tuple[torch.Tensor, torch.Tensor]:
    """What exp_0 multiplies a tangent vector of squared length |v|^2 by, and the squared length of the point."""
    reach = _form().profile(c * v_square, "tanh", naive.radius(v_square))
    return reach, reach * reach * v_square


def widened(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The tensors, float16 and bfloat16 as float32: what the maps are computed in."""
    return tuple(t.float() if t.dtype in _SHORT else t for t in tensors)


def _wide(*tensors: torch.Tensor) -> tuple[tuple[torch.Tensor, ...], torch.dtype]:
    return widened(*tensors), tensors[0].dtype


def _call(name: str, tensors: tuple[torch.Tensor, ...], c: Curvature, dim: int, *further: Any) -> torch.Tensor:
    _check(c)
    wide, kind = _wide(*tensors)
    return getattr(_form(), name)(wide[0], *wide[1:], c, dim, *further).to(kind)


def _form() -> Any:
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return naive  # plain operations: a compiler fuses them, and every runtime knows them
    return naive if os.environ.get("LISSOM_OPS") == "naive" else manual


def _check(c: Curvature) -> None:
    if not isinstance(c, torch.Tensor) and not c > 0:
        raise ValueError(f"a curvature of {c} makes no ball; c is greater than 0")


def _places(x: torch.Tensor, dim: int, over: int | tuple[int, ...] | None) -> tuple[int, ...]:
    dim %= x.ndim
    if over is None:
        return tuple(d for d in range(x.ndim) if d != dim)
    places = tuple(d % x.ndim for d in ((over,) if isinstance(over, int) else over))
    if dim in places:
        raise ValueError(f"dimension {dim} holds the points' coordinates and cannot be averaged over")
    return places
