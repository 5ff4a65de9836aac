"""Layers of the Poincaré ball: their definitions patch by patch and point by point, statistics, published answers."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from functools import partial

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from lissom.layers.poincare import (
    MobiusResidual,
    PoincareBall,
    PoincareBatchNorm2d,
    PoincareConv2d,
    PoincareHead,
    PoincareLinear,
    collect_statistics_,
    use_published_forms_,
    with_poincare_head_,
)
from lissom.models.poincare_resnet import checkpoint_filter_fn
from lissom.ops import poincare
from tests.models.families import check_operator, images, needs_parity


def drawn(layer: nn.Module) -> nn.Module:
    """The layer in float64 with random weights, biases and statistics."""
    torch.manual_seed(0)
    layer.double()
    with torch.no_grad():
        for name, value in layer.named_parameters():
            value.copy_(1 + 0.3 * torch.rand_like(value) if name == "var" else 0.3 * torch.randn_like(value))
    return layer


def by_patches(conv: PoincareConv2d, v: torch.Tensor) -> torch.Tensor:
    """The convolution as the paper has it: scaled, unfolded, every patch a point."""
    height, width = conv.kernel_size
    taps, channels, c = height * width, conv.in_channels, conv.ball.c

    def beta(x: float) -> float:
        return math.gamma(x) * math.gamma(0.5) / math.gamma(x + 0.5)

    scale = beta(taps * channels / 2) / beta(channels / 2)
    patches = F.unfold(v * scale, conv.kernel_size, conv.dilation, conv.padding, conv.stride).transpose(1, 2)
    x = poincare.expmap0(patches, c)
    y = poincare.fully_connected(x, conv.weight.flatten(1), conv.bias, c, conv.lambda_form)
    found = poincare.logmap0(y, c).transpose(1, 2)
    tall = (v.shape[2] + 2 * conv.padding - conv.dilation * (height - 1) - 1) // conv.stride + 1
    return found.unflatten(2, (tall, -1))


@pytest.mark.parametrize("form", poincare.LAMBDA_FORMS)
@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation", "bias"),
    [(3, 1, 1, 1, True), (3, 2, 1, 1, True), (1, 2, 0, 1, False), ((3, 2), 1, 0, 2, True)],
)
def test_a_convolution_is_the_fully_connected_layer_on_every_patch(
    kernel: int, stride: int, padding: int, dilation: int, bias: bool, form: str
) -> None:
    conv = drawn(PoincareConv2d(3, 5, kernel, stride, padding, dilation, bias, ball=0.7, lambda_form=form))
    v = images(2, 3, 7, 9).double()
    v[0, :, :4, :4] = 0  # a patch at the origin
    v[1] *= 100  # patches that are clipped
    torch.testing.assert_close(conv(v), by_patches(conv, v), rtol=1e-9, atol=1e-11)
    v = images(1, 3, 5, 4, seed=1).double().requires_grad_()
    assert torch.autograd.gradcheck(conv, (v,))
    wanted = torch.autograd.grad(by_patches(conv, v).square().sum(), list(conv.parameters()))
    found = torch.autograd.grad(conv(v).square().sum(), list(conv.parameters()))
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


def test_the_identity_start_is_the_identity() -> None:
    v = images(8, 6).double()
    layers = nn.Sequential(*(PoincareLinear(6, 6) for _ in range(50))).double()
    torch.testing.assert_close(layers(v), v, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(PoincareConv2d(6, 6, 1).double()(v[:, :, None, None])[:, :, 0, 0], v)
    published = use_published_forms_(copy.deepcopy(layers))
    assert published(v).norm() < 0.5 * v.norm()
    assert torch.equal(PoincareLinear(4, 6).weight, torch.eye(6, 4) / 2)
    torch.manual_seed(0)
    assert PoincareLinear(100, 50, init="normal").weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert PoincareLinear(3, 2, bias=False).bias is None


def with_values(layer: nn.Module, names: list[str], v: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
    return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (v,))


def test_gradients_of_the_linear_layer() -> None:
    for form in poincare.LAMBDA_FORMS:
        layer = drawn(PoincareLinear(4, 3, ball=PoincareBall(0.7, learnable=True), lambda_form=form))
        v = images(2, 5, 4).double().requires_grad_()
        names = [name for name, _ in layer.named_parameters()]
        assert names == ["weight", "bias", "ball.raw"]

        assert torch.autograd.gradcheck(partial(with_values, layer, names), (v, *layer.parameters()))
        x = poincare.fully_connected(poincare.expmap0(v, layer.ball.c), layer.weight, layer.bias, layer.ball.c, form)
        torch.testing.assert_close(layer(v), poincare.logmap0(x, layer.ball.c))


def test_a_ball_that_learns_starts_where_it_is_told() -> None:
    for c in (0.1, 2.0):
        ball = PoincareBall(c, learnable=True)
        assert ball.c.item() == pytest.approx(c, rel=1e-6)
        assert [name for name, _ in ball.named_parameters()] == ["raw"]
        assert ball.half().c.item() == pytest.approx(c, rel=1e-2)
        assert ball.c.dtype is torch.float32
    assert list(PoincareBall(0.1).state_dict()) == []
    with pytest.raises(ValueError, match="makes no ball"):
        PoincareBall(0.0)


def test_the_balls_maps_are_the_operators() -> None:
    ball, v = PoincareBall(0.5), images(3, 4).double()
    x, y = ball.expmap0(v), ball.expmap0(v.flip(0))
    assert torch.equal(x, poincare.expmap0(v, 0.5))
    for name, tensors in {
        "mobius_add": (x, y), "project": (3 * x,), "conformal_factor": (x,), "logmap0": (x,), "expmap": (x, v),
        "logmap": (x, y), "transport": (x, y, v), "distance": (x, y), "midpoint": (x,),
    }.items():  # fmt: skip
        assert torch.equal(getattr(ball, name)(*tensors), getattr(poincare, name)(*tensors, 0.5)), name


# Batch norm


def by_points(norm: PoincareBatchNorm2d, v: torch.Tensor) -> torch.Tensor:
    """The norm from the maps themselves: midpoint, variance, log, transport, exp."""
    c = norm.ball.c
    x = poincare.expmap0(v.movedim(1, -1).flatten(0, 2), c)
    centre, beta = poincare.midpoint(x, c), poincare.expmap0(norm.mean, c)[None]
    variance = poincare.frechet_variance(x, centre, c)
    moved = poincare.transport(centre, beta, poincare.logmap(centre, x, c), c)
    out = poincare.expmap(beta, moved * (norm.var / (variance + norm.eps)).sqrt(), c)
    return poincare.logmap0(out, c).view(v.shape[0], *v.shape[2:], -1).movedim(-1, 1)


def test_the_norm_is_its_definition() -> None:
    norm = drawn(PoincareBatchNorm2d(4, ball=0.7, running=False))
    v = 0.5 * images(3, 4, 5, 2).double()
    torch.testing.assert_close(norm(v), by_points(norm, v))
    assert torch.equal(norm.eval()(v), norm.train()(v))
    v = v[:2, :, :2].clone().requires_grad_()
    assert torch.autograd.gradcheck(norm, (v,))


def test_what_comes_out_has_the_midpoint_and_variance_that_were_asked_for() -> None:
    norm = PoincareBatchNorm2d(4, ball=0.1).double()
    with torch.no_grad():
        norm.mean.copy_(torch.tensor([0.3, -0.2, 0.1, 0.4]))
        norm.var.fill_(0.5)
    beta = poincare.expmap0(norm.mean, 0.1).view(1, 4, 1, 1)
    # The variance is exact (but for eps). Scaling tangent vectors moves the midpoint, the more the wider the points.
    for spread, error in ((0.1, 0.02), (1.0, 0.04)):
        out = poincare.expmap0(norm(1 + spread * images(8, 4, 6, 6).double()), 0.1, 1)
        assert poincare.frechet_variance(out, beta, 0.1, 1).item() == pytest.approx(0.5, rel=1e-3)
        assert poincare.distance(poincare.midpoint(out, 0.1, 1), beta, 0.1, 1).item() < error
    with torch.no_grad():
        norm.var.fill_(0.005)
    out = poincare.expmap0(norm(1 + 0.1 * images(8, 4, 6, 6).double()), 0.1, 1)
    assert poincare.distance(poincare.midpoint(out, 0.1, 1), beta, 0.1, 1).item() < 1e-3
    with torch.no_grad():
        norm.var.fill_(-1.0)
    assert norm(images(2, 4, 3, 3).double()).isfinite().all()


def test_running_statistics_make_an_answer_independent_of_its_batch() -> None:
    norm = PoincareBatchNorm2d(4, ball=0.3).double()
    v = 1 + 0.5 * images(16, 4, 5, 5).double()
    for _ in range(200):
        norm(v)
    x = poincare.expmap0(v, 0.3, 1)
    centre = poincare.midpoint(x, 0.3, 1)
    torch.testing.assert_close(norm.running_mean, centre.flatten())
    torch.testing.assert_close(norm.running_var, poincare.frechet_variance(x, centre, 0.3, 1).squeeze())
    of_batch = norm(v)
    norm.eval()
    torch.testing.assert_close(norm(v), of_batch)
    torch.testing.assert_close(norm(v[:1]), of_batch[:1])
    before = copy.deepcopy(norm.state_dict())
    norm(3 * v)
    assert all(torch.equal(before[key], value) for key, value in norm.state_dict().items())
    norm.running = False
    assert not torch.allclose(norm(v[:1]), of_batch[:1])
    norm.reset_running_stats()
    assert norm.running_mean.abs().sum() == 0
    assert norm.running_var == 1


def test_one_step_goes_a_tenth_of_the_way() -> None:
    norm = PoincareBatchNorm2d(4, ball=0.3, momentum=0.1).double()
    with torch.no_grad():
        norm.running_mean.copy_(torch.tensor([0.1, -0.5, 0.3, 0.2]))
        norm.running_var.fill_(2)
    before, v = norm.running_mean.clone(), images(6, 4, 3, 3).double()
    norm(v)
    x = poincare.expmap0(v, 0.3, 1)
    target = poincare.midpoint(x, 0.3, 1).flatten()
    whole = poincare.distance(before, target, 0.3)
    torch.testing.assert_close(poincare.distance(before, norm.running_mean, 0.3), 0.1 * whole)
    torch.testing.assert_close(poincare.distance(norm.running_mean, target, 0.3), 0.9 * whole)
    variance = poincare.frechet_variance(x, target.view(1, 4, 1, 1), 0.3, 1).squeeze()
    torch.testing.assert_close(norm.running_var, 0.9 * 2 + 0.1 * variance)


def test_statistics_collected_afterwards() -> None:
    model = nn.Sequential(PoincareBatchNorm2d(4, running=False), nn.Dropout(0.5), PoincareBatchNorm2d(4)).double()
    batches = [0.5 + images(8, 4, 3, 3, seed=seed).double() for seed in range(3)]
    collect_statistics_(model, [batches[0]])
    with torch.no_grad():
        torch.testing.assert_close(model(batches[0]), model.train()[2](model[0](batches[0])))
    collect_statistics_(model, batches)
    assert not model[0].training
    assert model[0].running
    assert model[0].momentum == 0.1
    clouds = [poincare.expmap0(batch, 0.1, 1) for batch in batches]
    variances = [poincare.frechet_variance(x, poincare.midpoint(x, 0.1, 1), 0.1, 1) for x in clouds]
    torch.testing.assert_close(model[0].running_var, torch.stack(variances).mean())
    with pytest.raises(ValueError, match="no batches"):
        collect_statistics_(model, [])
    with pytest.raises(ValueError, match="no PoincareBatchNorm2d"):
        collect_statistics_(nn.ReLU(), batches)


def test_the_frechet_mean_as_centre() -> None:
    v = 0.5 * images(4, 3, 4, 4).double()
    found = PoincareBatchNorm2d(3, centre="frechet").double()(v)
    assert (found - PoincareBatchNorm2d(3).double()(v)).abs().max() < 0.02
    assert not torch.equal(found, PoincareBatchNorm2d(3).double()(v))
    with pytest.raises(ValueError, match="none of midpoint, frechet"):
        PoincareBatchNorm2d(3, centre="median")


# The rest


def test_skip_connections() -> None:
    f, r = images(2, 4, 5, 3).double(), images(2, 4, 5, 3, seed=1).double()
    for dim in (1, -1):
        a, b = poincare.expmap0(f, 0.5, dim), poincare.expmap0(r, 0.5, dim)
        want = poincare.logmap0(poincare.mobius_add(a, b, 0.5, dim), 0.5, dim)
        torch.testing.assert_close(MobiusResidual(dim, ball=0.5)(f, r), want)
        torch.testing.assert_close(MobiusResidual(dim, "rf", ball=0.5)(r, f), want)
    assert not torch.allclose(MobiusResidual(1)(f, r), MobiusResidual(-1)(f, r))
    torch.testing.assert_close(MobiusResidual(ball=1e-9)(f, r), f + r, rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="none of fr, rf"):
        MobiusResidual(1, "ff")


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_short_weights_and_autocast_compute_in_float32(kind: torch.dtype) -> None:
    layers = nn.Sequential(
        PoincareConv2d(3, 4, 3, padding=1), PoincareBatchNorm2d(4), nn.Flatten(), PoincareLinear(64, 5)
    )
    v = images(2, 3, 4, 4)
    with torch.no_grad():
        for layer in (layers[0], layers[3]):
            layer.weight.normal_(std=0.2)
            layer.weight.copy_(layer.weight.to(kind))
        want = layers.eval()(v.to(kind).float())
        with torch.autocast("cpu", kind):
            assert torch.equal(layers(v.to(kind).float()), want)
        short = copy.deepcopy(layers).to(kind)
        # Between the layers stand short numbers, inside them none.
        one = short[0](v.to(kind))
        assert one.dtype is kind
        assert torch.equal(one, layers[0](v.to(kind).float()).to(kind))
        assert short(v.to(kind)).dtype is kind
        assert short.train()[1](one).dtype is kind
        assert short[1].running_mean.isfinite().all()
    short(v.to(kind)).float().sum().backward()
    assert all(p.grad.isfinite().all() for p in short.parameters())


def test_a_head_for_any_network() -> None:
    torch.manual_seed(0)
    for name, path in (("resnet10t", "fc"), ("vit_tiny_patch16_224", "head"), ("convnext_atto", "head.fc")):
        size = {"img_size": 32} if name.startswith("vit") else {}
        model = with_poincare_head_(timm.create_model(name, num_classes=7, **size).eval(), 0.2)
        head = model.get_submodule(path)
        assert isinstance(head, PoincareHead)
        assert model.get_classifier() is head
        assert head.ball.fixed == 0.2
        assert not head.training
        answer = model(images(2, 3, 32, 32))
        assert answer.shape == (2, 7)
        answer.logsumexp(1).sum().backward()
        assert head.weight.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="a PoincareHead replaces one"):
        with_poincare_head_(timm.create_model("resnet10t", num_classes=0))
    with pytest.raises(ValueError, match="NoneType"):
        with_poincare_head_(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="none of identity, normal"):
        PoincareHead(3, 3, init="zero")


def loaded(layer: nn.Module, state: Mapping[str, torch.Tensor]) -> nn.Module:
    """Translated as a whole network's checkpoint is, under a path of its own."""
    model = nn.ModuleDict({"layer": layer})
    own = checkpoint_filter_fn({f"layer.{key}": value for key, value in state.items()}, model)
    model.load_state_dict(own)
    return use_published_forms_(layer)


@needs_parity
def test_the_published_answers() -> None:
    def conv(state: Mapping[str, torch.Tensor]) -> nn.Module:
        return loaded(PoincareConv2d(6, 10, 3, 2, 1), state)

    def norm(state: Mapping[str, torch.Tensor]) -> nn.Module:
        named = {key.removeprefix("norm."): v.squeeze(0) if v.ndim == 2 else v for key, v in state.items()}
        layer = PoincareBatchNorm2d(6)
        layer.load_state_dict(named)
        return use_published_forms_(layer)

    check_operator("poincare_resnet", "op_conv2d", conv)
    check_operator("poincare_resnet", "op_batchnorm2d", norm)
