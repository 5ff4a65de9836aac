"""Layers whose features are points of the Poincaré ball (Poincaré ResNet, ICCV 2023, arXiv 2303.14027).

Every layer takes and returns tangent vectors at the origin, which are ordinary tensors: exp_0, the operation on the
ball, log_0. So activations, pooling and Euclidean layers stand between them as they are.

Defaults are what the mathematics says. The code that the paper's results were obtained with differs in three places,
each behind a switch: ``lambda_form="published"`` (an inverted conformal factor in the fully connected layer),
``MobiusResidual(dim=-1)`` (vectors along the width of the map), ``running=False`` (statistics of the batch in eval mode
too, so that an answer depends on the rest of the batch). ``use_published_forms_`` sets all three.

Under autocast, and with weights or inputs in float16 or bfloat16, everything is computed in float32.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from lissom.ops import poincare

__all__ = [
    "CENTRES",
    "INITS",
    "ORDERS",
    "MobiusResidual",
    "PoincareBall",
    "PoincareBatchNorm2d",
    "PoincareConv2d",
    "PoincareHead",
    "PoincareLinear",
    "collect_statistics_",
    "set_forms_",
    "use_published_forms_",
    "with_poincare_head_",
]

INITS = ("identity", "normal")
ORDERS = ("fr", "rf")
CENTRES = ("midpoint", "frechet")


class PoincareBall(nn.Module):
    """The ball of curvature -c, and the maps of ``lissom.ops.poincare`` on it: ``PoincareBall(0.1).mobius_add(x, y)``.

    ``learnable`` makes c = softplus(raw) with a parameter ``raw``, and starts at the c given. (The published code
    starts a learnable ball at softplus(c) instead: give c = log(1 + exp(0.1)) = 0.744 for its 0.1.)
    Raises ValueError where c is not greater than 0.
    """

    raw: nn.Parameter | None

    def __init__(self, c: float = 0.1, learnable: bool = False) -> None:
        super().__init__()
        if not c > 0:
            raise ValueError(f"a curvature of {c} makes no ball; c is greater than 0")
        self.fixed = float(c)
        raw = nn.Parameter(torch.tensor(c + math.log(-math.expm1(-c)))) if learnable else None
        self.register_parameter("raw", raw)

    @property
    def c(self) -> float | torch.Tensor:
        """The curvature: a number, or where it is learnt a tensor of no dimensions, at least in float32."""
        return self.fixed if self.raw is None else F.softplus(poincare.widened(self.raw)[0])

    def extra_repr(self) -> str:
        return f"c={float(self.c):g}, learnable={self.raw is not None}"

    def mobius_add(self, x: torch.Tensor, y: torch.Tensor, dim: int = -1) -> torch.Tensor:
        return poincare.mobius_add(x, y, self.c, dim)

    def project(self, x: torch.Tensor, dim: int = -1) -> torch.Tensor:
        return poincare.project(x, self.c, dim)

    def conformal_factor(self, x: torch.Tensor, dim: int = -1) -> torch.Tensor:
        return poincare.conformal_factor(x, self.c, dim)

    def expmap0(self, v: torch.Tensor, dim: int = -1) -> torch.Tensor:
        return poincare.expmap0(v, self.c, dim)

    def logmap0(self, x: torch.Tensor, dim: int = -1) -> torch.Tensor:
        return poincare.logmap0(x, self.c, dim)

    def expmap(self, x: torch.Tensor, v: torch.Tensor, dim: int = -1) -> torch.Tensor:
        return poincare.expmap(x, v, self.c, dim)

    def logmap(self, x: torch.Tensor, y: torch.Tensor, dim: int = -1) -> torch.Tensor:
        return poincare.logmap(x, y, self.c, dim)

    def transport(self, x: torch.Tensor, y: torch.Tensor, v: torch.Tensor, dim: int = -1) -> torch.Tensor:
        return poincare.transport(x, y, v, self.c, dim)

    def distance(self, x: torch.Tensor, y: torch.Tensor, dim: int = -1) -> torch.Tensor:
        return poincare.distance(x, y, self.c, dim)

    def midpoint(self, x: torch.Tensor, dim: int = -1, over: int | tuple[int, ...] | None = None) -> torch.Tensor:
        return poincare.midpoint(x, self.c, dim, over)


def _ball(ball: PoincareBall | float) -> PoincareBall:
    return ball if isinstance(ball, PoincareBall) else PoincareBall(ball)


def _one_of(value: str, known: tuple[str, ...], what: str) -> str:
    if value not in known:
        raise ValueError(f"{what} {value!r} is none of {', '.join(known)}")
    return value


def _in_full(x: torch.Tensor) -> Any:
    """No autocast inside: it would take the products to bfloat16."""
    kind = x.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return contextlib.nullcontext()


class _FullyConnected(nn.Module):
    """The weight (out, ...), the bias (out) and their start, of the linear and the convolutional layer."""

    bias: nn.Parameter | None

    def __init__(
        self, shape: tuple[int, ...], bias: bool, ball: PoincareBall | float, lambda_form: str, init: str
    ) -> None:  # fmt: skip
        super().__init__()
        self.ball = _ball(ball)
        self.lambda_form = _one_of(lambda_form, poincare.LAMBDA_FORMS, "lambda_form")
        self.init = _one_of(init, INITS, "init")
        self.weight = nn.Parameter(torch.empty(shape))
        self.register_parameter("bias", nn.Parameter(torch.empty(shape[0])) if bias else None)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """ "identity": half the identity matrix, whose half the layer's factor of 2 takes back. "normal": deviation
        (2 n m)^-1/2, as hyperbolic layers were started before. The bias is 0."""
        flat = self.weight.view(len(self.weight), -1)
        if self.init == "identity":
            flat.copy_(torch.eye(*flat.shape, dtype=flat.dtype, device=flat.device) / 2)
        else:
            flat.normal_(std=(2 * flat.numel()) ** -0.5)
        if self.bias is not None:
            self.bias.zero_()

    def _widened(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        x, weight = poincare.widened(x, self.weight)
        return x, weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype)


class PoincareLinear(_FullyConnected):
    """The Poincaré fully connected layer between tangent spaces: (..., in_features) -> (..., out_features).

    exp_0, ``lissom.ops.poincare.fully_connected``, log_0, in one. ``weight`` (out, in) and ``bias`` (out) are as in
    nn.Linear. ``ball`` is a PoincareBall or a curvature. ``init`` "identity" keeps norms through any number of layers,
    "normal" is the older start, with which they vanish. Raises ValueError for an unknown ``lambda_form`` or ``init``.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, *, ball: PoincareBall | float = 0.1,
        lambda_form: str = "correct", init: str = "identity",
    ) -> None:  # fmt: skip
        super().__init__((out_features, in_features), bias, ball, lambda_form, init)
        self.in_features, self.out_features = in_features, out_features

    def forward(self, v: torch.Tensor) -> torch.Tensor:
        kind = v.dtype
        with _in_full(v):
            v, weight, bias = self._widened(v)
            c = self.ball.c
            normals, offsets, lengths = poincare.hyperplanes(weight, bias, c)
            reach, square = poincare.reach_of_expmap0(v.square().sum(-1, keepdim=True), c)
            products = F.linear(v, normals)
            w = poincare.signed_sines(products, reach, square, offsets, lengths, c, -1, self.lambda_form)
            return poincare.tangents_of_sines(w, c).to(kind)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, lambda_form={self.lambda_form}"


class PoincareHead(PoincareLinear):
    """A Poincaré classifier behind the features of any network: (..., in_features) -> logits (..., num_classes).

    The features are taken as tangent vectors at the origin. Beyond the length artanh(1 - 4e-3) / sqrt(c), 9.8 at
    c = 0.1, only their direction counts. ``with_poincare_head_`` puts one in place of a network's own classifier.
    """


class PoincareConv2d(_FullyConnected):
    """A convolution that is a Poincaré fully connected layer on every patch: (B, in, H, W) -> (B, out, H', W').

    A patch of tangent vectors, scaled by B(k^2 in / 2, 1/2) / B(in / 2, 1/2) so that concatenation keeps their expected
    norm (B is Euler's beta function), goes to the ball as one vector of k^2 in numbers. H' = floor((H + 2 padding -
    dilation (k - 1) - 1) / stride) + 1, padded with zeros. ``weight`` is (out, in, k, k), as in nn.Conv2d.

    No patch is ever stored: exp_0 multiplies a whole patch by one number, which depends on its norm. So the products
    are an ordinary convolution, and the norms another of the squares with ones.
    """

    ones: torch.Tensor

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1, padding: int | tuple[int, int] = 0, dilation: int | tuple[int, int] = 1,
        bias: bool = True, *, ball: PoincareBall | float = 0.1, lambda_form: str = "correct", init: str = "identity",
    ) -> None:  # fmt: skip
        height, width = (kernel_size, kernel_size) if isinstance(kernel_size, int) else kernel_size
        super().__init__((out_channels, in_channels, height, width), bias, ball, lambda_form, init)
        self.in_channels, self.out_channels, self.kernel_size = in_channels, out_channels, (height, width)
        self.stride, self.padding, self.dilation = stride, padding, dilation
        self.scale = _beta(height * width * in_channels / 2) / _beta(in_channels / 2)
        self.register_buffer("ones", torch.ones(1, 1, height, width), persistent=False)

    def forward(self, v: torch.Tensor) -> torch.Tensor:
        kind = v.dtype
        with _in_full(v):
            v, weight, bias = self._widened(v)
            c = self.ball.c
            normals, offsets, lengths = poincare.hyperplanes(weight, bias, c)
            products = F.conv2d(v, self.scale * normals, None, self.stride, self.padding, self.dilation)
            ones = self.scale**2 * self.ones.to(v.dtype)
            squares = F.conv2d(v.square().sum(1, keepdim=True), ones, None, self.stride, self.padding, self.dilation)
            reach, square = poincare.reach_of_expmap0(squares, c)
            w = poincare.signed_sines(products, reach, square, offsets, lengths, c, 1, self.lambda_form)
            return poincare.tangents_of_sines(w, c, 1).to(kind)

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, bias={self.bias is not None}, lambda_form={self.lambda_form}"
        )


def _beta(x: float) -> float:
    """Euler's B(x, 1/2)."""
    return math.exp(math.lgamma(x) + math.lgamma(0.5) - math.lgamma(x + 0.5))


class PoincareBatchNorm2d(nn.Module):
    """Batch norm on the ball: (B, num_features, H, W) -> the same shape; every position of every image is a point.

    The points are carried from their midpoint to beta = exp_0(``mean``), and their tangent vectors there scaled by
    sqrt(``var`` / variance), where the variance is the mean squared distance from the midpoint. ``mean``
    (num_features) and the one number ``var`` are learnt.

    ``running`` (the default): in eval mode the midpoint and variance are running ones, gathered in training mode. The
    midpoint moves along the geodesic to that of the batch, by the share ``momentum`` of the way; momentum None makes
    both cumulative averages. Without it the batch's own are used in eval mode too, as published; an answer then
    depends on all images of the batch. ``centre`` "frechet" takes the Fréchet mean by ``iterations`` in place of the
    midpoint. Raises ValueError for another ``centre``.
    """

    running_mean: torch.Tensor
    running_var: torch.Tensor

    def __init__(
        self, num_features: int, *, ball: PoincareBall | float = 0.1, running: bool = True,
        momentum: float | None = 0.1, eps: float = 1e-6, centre: str = "midpoint", iterations: int = 10,
    ) -> None:  # fmt: skip
        super().__init__()
        self.ball, self.num_features = _ball(ball), num_features
        self.running, self.momentum, self.eps = running, momentum, eps
        self.centre, self.iterations = _one_of(centre, CENTRES, "centre"), iterations
        self.mean = nn.Parameter(torch.zeros(num_features))
        self.var = nn.Parameter(torch.ones(()))
        self.register_buffer("running_mean", torch.zeros(num_features))  # a point of the ball
        self.register_buffer("running_var", torch.ones(()))
        self.batches = 0  # seen since the start of a cumulative average

    @torch.no_grad()
    def reset_running_stats(self) -> None:
        """The origin, and variance 1, as in the beginning."""
        self.running_mean.zero_()
        self.running_var.fill_(1)
        self.batches = 0

    def forward(self, v: torch.Tensor) -> torch.Tensor:
        kind = v.dtype
        with _in_full(v):
            (v,) = poincare.widened(v)
            c = self.ball.c
            x = poincare.expmap0(v, c, 1)
            of_batch = self.training or not self.running
            centre = self._centre(x, c) if of_batch else self.running_mean.to(v.dtype).view(1, -1, 1, 1)
            # log_centre(x) = 2 / lambda_centre t, and its length at the centre, which is the distance, is 2 |t|.
            t = poincare.logmap0(poincare.mobius_add(-centre, x, c, 1), c, 1)
            variance = 4 * t.square().sum(1).mean() if of_batch else self.running_var.to(v.dtype)
            if self.training and self.running:
                self._update(centre.detach(), variance.detach(), c)
            beta = poincare.expmap0(self.mean.to(v.dtype), c).view(1, -1, 1, 1)
            # Transport is gyr[beta, -centre] lambda_centre / lambda_beta, and exp_beta(u) is beta (+) exp_0(u
            # lambda_beta / 2): every lambda cancels.
            gain = (self.var.to(v.dtype).clamp_min(self.eps) / (variance + self.eps)).sqrt()
            t = F.conv2d(t, (gain * self._rotation(beta, -centre, c))[..., None, None])
            x = poincare.mobius_add(beta, poincare.expmap0(t, c, 1, clip=False), c, 1)
            return poincare.logmap0(x, c, 1, clip=True).to(kind)

    def _rotation(self, u: torch.Tensor, v: torch.Tensor, c: float | torch.Tensor) -> torch.Tensor:
        """gyr[u, v], which is the same at all positions, as a matrix (num_features, num_features)."""
        unit = torch.eye(self.num_features, dtype=u.dtype, device=u.device)
        return poincare.gyration(u.flatten(), v.flatten(), unit, c).T

    def _centre(self, x: torch.Tensor, c: float | torch.Tensor) -> torch.Tensor:
        if self.centre == "frechet":
            return poincare.frechet_mean(x, c, 1, iterations=self.iterations)
        return poincare.midpoint(x, c, 1)

    @torch.no_grad()
    def _update(self, centre: torch.Tensor, variance: torch.Tensor, c: float | torch.Tensor) -> None:
        if self.momentum is None:
            self.batches += 1
            share = 1 / self.batches
        else:
            share = self.momentum
        before, centre = self.running_mean.to(centre.dtype), centre.flatten()
        step = share * poincare.logmap(before, centre, c)
        self.running_mean.copy_(poincare.expmap(before, step, c))
        self.running_var.lerp_(variance.to(self.running_var.dtype), share)

    def extra_repr(self) -> str:
        return f"{self.num_features}, running={self.running}, momentum={self.momentum}, centre={self.centre}"


class MobiusResidual(nn.Module):
    """The skip connection: log_0(exp_0(f) (+) exp_0(residual)) of two tensors of one shape, vectors along ``dim``.

    Möbius addition does not commute: ``order`` "fr" is f (+) residual, "rf" is residual (+) f. The published code adds
    along the last dimension, a map's width. Raises ValueError for another order.
    """

    def __init__(self, dim: int = 1, order: str = "fr", *, ball: PoincareBall | float = 0.1) -> None:
        super().__init__()
        self.ball, self.dim, self.order = _ball(ball), dim, _one_of(order, ORDERS, "order")

    def forward(self, f: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        kind = f.dtype
        with _in_full(f):
            c, dim = self.ball.c, self.dim
            first, second = (f, residual) if self.order == "fr" else (residual, f)
            first, second = (poincare.expmap0(v, c, dim) for v in poincare.widened(first, second))
            return poincare.logmap0(poincare.mobius_add(first, second, c, dim), c, dim).to(kind)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, order={self.order}"


@torch.no_grad()
def collect_statistics_(model: nn.Module, batches: Iterable[torch.Tensor]) -> nn.Module:
    """Running midpoints and variances from ``batches`` of inputs, for a model that was trained without; in eval mode.

    Every PoincareBatchNorm2d is set to ``running`` and gets the averages over the batches, each normalised by its own
    statistics on the way. All other modules are in eval mode meanwhile. Raises ValueError for a model without such a
    norm, or without batches.
    """
    norms = [m for m in model.eval().modules() if isinstance(m, PoincareBatchNorm2d)]
    if not norms:
        raise ValueError("the model has no PoincareBatchNorm2d that could collect statistics")
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.train()
        norm.running, norm.momentum = True, None
    try:
        for batch in batches:
            model(batch)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.eval()
            norm.momentum = momentum
    if not all(norm.batches for norm in norms):
        raise ValueError("there were no batches to collect statistics from")
    return model


def set_forms_(model: nn.Module, lambda_form: str, dim: int, running: bool) -> nn.Module:
    """The three forms in which the published code differs, set in every layer of ``model``; returns it."""
    _one_of(lambda_form, poincare.LAMBDA_FORMS, "lambda_form")
    for module in model.modules():
        if isinstance(module, _FullyConnected):
            module.lambda_form = lambda_form
        elif isinstance(module, MobiusResidual):
            module.dim = dim
        elif isinstance(module, PoincareBatchNorm2d):
            module.running = running
    return model


def use_published_forms_(model: nn.Module) -> nn.Module:
    """The published forms in every layer of ``model``; returns it."""
    return set_forms_(model, "published", -1, False)


def with_poincare_head_(model: nn.Module, ball: PoincareBall | float = 0.1, init: str = "identity") -> nn.Module:
    """The model (timm's, or one with ``get_classifier``) with a PoincareHead where its classifier was; returns it.

    Raises ValueError where there is no classifier, or it is not one linear layer (two heads, a convolution).
    """
    find = getattr(model, "get_classifier", None)
    old = find() if callable(find) else None
    if not isinstance(old, nn.Linear):
        raise ValueError(
            f"the classifier of {type(model).__name__} is {type(old).__name__}; a PoincareHead replaces one nn.Linear"
        )
    path = next(path for path, module in model.named_modules() if module is old)
    parent, _, name = path.rpartition(".")
    head = PoincareHead(old.in_features, old.out_features, old.bias is not None, ball=ball, init=init)
    setattr(model.get_submodule(parent), name, head.to(old.weight).train(old.training))
    return model
