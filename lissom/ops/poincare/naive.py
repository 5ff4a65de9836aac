"""The maps of the Poincaré ball by their definitions, in plain PyTorch with autograd's own backward.

What ``lissom.ops.poincare`` computes; its tests compare with this. Arguments are as there, without its checks: float32
or float64, ``c`` a number or a tensor with one element.
"""

from __future__ import annotations

import math
from typing import TypeAlias

import torch

__all__ = [
    "TINY",
    "Curvature",
    "artanh_limit",
    "conformal_factor",
    "distance",
    "expmap",
    "expmap0",
    "gyration",
    "logmap",
    "logmap0",
    "midpoint",
    "mobius_add",
    "norm",
    "profile",
    "project",
    "radius",
    "root",
]

Curvature: TypeAlias = float | torch.Tensor
TINY = 1e-15  # the least norm and denominator


def root(c: Curvature) -> Curvature:
    """The square root of a curvature, of its own kind."""
    return c.sqrt() if isinstance(c, torch.Tensor) else math.sqrt(c)


def radius(x: torch.Tensor) -> float:
    """sqrt(c) |x| of the farthest point that is kept: rounding would carry others over the border."""
    return 1 - (1e-5 if x.dtype is torch.float64 else 4e-3)


def artanh_limit(x: torch.Tensor) -> float:
    """The largest argument that artanh gets: the last number below 1."""
    return 1 - torch.finfo(x.dtype).eps


def norm(x: torch.Tensor, dim: int) -> torch.Tensor:
    """|x| along ``dim``, which stays, at least TINY. Its gradient at 0 is 0."""
    return torch.linalg.vector_norm(x, dim=dim, keepdim=True).clamp_min(TINY)


def _dot(x: torch.Tensor, y: torch.Tensor, dim: int) -> torch.Tensor:
    return (x * y).sum(dim, keepdim=True)


def mobius_add(x: torch.Tensor, y: torch.Tensor, c: Curvature, dim: int) -> torch.Tensor:
    """x (+) y = ((1 + 2c<x,y> + c|y|^2) x + (1 - c|x|^2) y) / (1 + 2c<x,y> + c^2 |x|^2 |y|^2)."""
    xy, xx, yy = _dot(x, y, dim), _dot(x, x, dim), _dot(y, y, dim)
    above = (1 + 2 * c * xy + c * yy) * x + (1 - c * xx) * y
    return above / (1 + 2 * c * xy + c * c * xx * yy).clamp_min(TINY)


def project(x: torch.Tensor, c: Curvature, dim: int) -> torch.Tensor:
    """x, its norm clipped to (1 - eps) / sqrt(c)."""
    length, most = norm(x, dim), radius(x) / root(c)
    return torch.where(length > most, x * (most / length), x)


def conformal_factor(x: torch.Tensor, c: Curvature, dim: int) -> torch.Tensor:
    """lambda_x = 2 / (1 - c |x|^2), (..., 1) along ``dim``."""
    return 2 / (1 - c * _dot(x, x, dim)).clamp_min(TINY)


def expmap0(v: torch.Tensor, c: Curvature, dim: int, clip: bool = True) -> torch.Tensor:
    """tanh(sqrt(c)|v|) v / (sqrt(c)|v|), projected where ``clip``."""
    s = root(c) * norm(v, dim)
    x = torch.tanh(s) / s * v
    return project(x, c, dim) if clip else x


def logmap0(x: torch.Tensor, c: Curvature, dim: int, clip: bool = False) -> torch.Tensor:
    """artanh(sqrt(c)|x|) x / (sqrt(c)|x|), x projected first where ``clip``."""
    x = project(x, c, dim) if clip else x
    s = root(c) * norm(x, dim)
    return torch.atanh(s.clamp_max(artanh_limit(x))) / s * x


def expmap(x: torch.Tensor, v: torch.Tensor, c: Curvature, dim: int) -> torch.Tensor:
    """x (+) tanh(sqrt(c) lambda_x |v| / 2) v / (sqrt(c)|v|), projected."""
    s = root(c) * norm(v, dim)
    step = torch.tanh(conformal_factor(x, c, dim) * s / 2) / s * v
    return project(mobius_add(x, step, c, dim), c, dim)


def logmap(x: torch.Tensor, y: torch.Tensor, c: Curvature, dim: int) -> torch.Tensor:
    """2 / (sqrt(c) lambda_x) artanh(sqrt(c)|u|) u / |u| with u = (-x) (+) y."""
    return 2 / conformal_factor(x, c, dim) * logmap0(mobius_add(-x, y, c, dim), c, dim)


def profile(u: torch.Tensor, kind: str, limit: float) -> torch.Tensor:
    """tanh(s) / s, artanh(s) / s or asinh(s) / s with s = sqrt(u); ``limit`` keeps them inside the ball."""
    s = u.clamp_min(TINY**2).sqrt()
    if kind == "tanh":
        return torch.tanh(s).clamp_max(limit) / s
    if kind == "artanh":
        return torch.atanh(s.clamp_max(limit)) / s
    return torch.asinh(s).clamp_max(limit) / s


def gyration(u: torch.Tensor, v: torch.Tensor, w: torch.Tensor, c: Curvature, dim: int) -> torch.Tensor:
    """gyr[u, v] w = -(u (+) v) (+) (u (+) (v (+) w))."""
    uv, uw, vw = _dot(u, v, dim), _dot(u, w, dim), _dot(v, w, dim)
    uu, vv = _dot(u, u, dim), _dot(v, v, dim)
    a = -c * c * uw * vv + c * vw + 2 * c * c * uv * vw
    b = -c * c * vw * uu - c * uw
    return w + 2 * (a * u + b * v) / (1 + 2 * c * uv + c * c * uu * vv).clamp_min(TINY)


def distance(x: torch.Tensor, y: torch.Tensor, c: Curvature, dim: int) -> torch.Tensor:
    """2 / sqrt(c) artanh(sqrt(c) |(-x) (+) y|), one entry along ``dim``."""
    s = root(c) * norm(mobius_add(-x, y, c, dim), dim)
    return (2 / root(c) * torch.atanh(s.clamp_max(artanh_limit(x)))).squeeze(dim)


def midpoint(x: torch.Tensor, c: Curvature, dim: int, over: tuple[int, ...]) -> torch.Tensor:
    """The gyromidpoint of all points along the dimensions ``over``."""
    weights = 1 / (1 - c * _dot(x, x, dim)).clamp_min(TINY)
    count = math.prod(x.shape[d] for d in over)
    mean = (weights * x).sum(over, keepdim=True) / (weights.sum(over, keepdim=True) - count / 2)
    # gm / (1 + gm) with gm = 1 / sqrt(1 - c |m|^2): half of the way from the origin to m.
    rest = (1 - c * _dot(mean, mean, dim)).clamp_min(torch.finfo(x.dtype).eps)
    return mean / (1 + rest.sqrt())
