"""Slow networks: kernels from coordinates by hand, renormalisation, contexts of images and batches, gradients."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lissom.layers.slow_nets import ContextMAGNet, MAGNet, SlowNetG, SlowNetGC, SlowNetL, s_renormalised
from tests.models.families import check_operator, images, needs_parity


@pytest.mark.parametrize(("dim", "size"), [(1, 7), (2, 5), (2, 1)])
def test_a_kernel_is_the_product_of_waves_written_out(dim: int, size: int) -> None:
    torch.manual_seed(0)
    net = MAGNet(dim, 6, 2, 3, size).double()
    nn.init.normal_(net.bias_p)
    axis = torch.linspace(-1, 1, size)
    found = net()
    assert found.shape == (1, 3, *(size,) * dim)
    places = [(i,) for i in range(size)] if dim == 1 else [(i, j) for i in range(size) for j in range(size)]
    for place in places:
        p = torch.stack([axis[i] for i in place]).double()  # rows first

        def wave(level: int, p: torch.Tensor = p) -> torch.Tensor:
            layer = net.filters[level].linear
            return (layer.weight.flatten(1) @ p + layer.bias).sin()

        z = wave(0)
        for level, layer in enumerate(net.linears):
            z = wave(level + 1) * (layer.weight.flatten(1) @ z + layer.bias) + net.bias_p[(0, 0, *place)]
        want = net.output_linear.weight.flatten(1) @ z + net.output_linear.bias
        torch.testing.assert_close(found[(0, slice(None), *place)], want)


def test_how_it_starts() -> None:
    torch.manual_seed(0)
    net = MAGNet(2, 256, 3, 256, 8, omega=2.0)
    spread = [float(f.linear.weight.detach().abs().mean()) for f in net.filters]
    # |A| of a linear layer of two inputs is 1 / (2 sqrt 2) on average, gamma 6 / (level + 1), independent of it.
    for level, found in enumerate(spread):
        assert found == pytest.approx(2 * torch.pi * 2 * 6 / (level + 1) / 8**0.5, rel=0.15)
    assert all(f.linear.bias.abs().max() == 0 for f in net.filters)
    assert all((layer.bias == 1).all() for layer in net.linears)
    assert net.output_linear.bias.abs().max() == 0
    bound = (3 / 256) ** 0.5 / 8  # kaiming's for a linear layer, scaled by 1 / sqrt(8 x 8)
    assert 0.99 * bound < float(net.output_linear.weight.detach().abs().max()) <= bound
    assert net.bias_p.abs().max() == 0


def test_the_last_layer_is_rescaled_once() -> None:
    torch.manual_seed(0)
    late = SlowNetG(4, 5, 8, rescale="first_forward")
    torch.manual_seed(0)
    early = SlowNetG(4, 5, 8)
    weight = late.Kernel.output_linear.weight.clone()
    torch.testing.assert_close(early.Kernel.output_linear.weight, weight / 5)
    torch.testing.assert_close(late(), early())
    torch.testing.assert_close(late(), early())
    # As published, weights that were loaded are scaled again; by default they are not.
    again = SlowNetG(4, 5, 8, rescale="first_forward")
    again.load_state_dict(early.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(again(), early() / 5)
        own = SlowNetG(4, 5, 8)
        own.load_state_dict(early.state_dict())
        assert torch.equal(own(), early())


def test_global_kernels_do_not_look_at_the_input() -> None:
    net = SlowNetG(3, 6)
    assert torch.equal(net(images(2, 3, 6, 6)), net(images(5, 3, 6, 6, seed=1)))
    assert torch.equal(net(), net(images(1, 3, 6, 6)))
    assert SlowNetGC(9)().shape == (1, 1, 9)
    assert SlowNetG(3, 6, dim=1)().shape == (1, 3, 6)


def test_renormalisation() -> None:
    z = images(2, 3, 4, 5).double().requires_grad_()
    with torch.no_grad():
        want = 2 * z + 0.5 * z / z.square().sum((2, 3), keepdim=True).sqrt()
        torch.testing.assert_close(s_renormalised(z, 2.0, 0.5), want)
    s_renormalised(z, 1.0, 0.0).square().sum().backward()
    assert z.grad is not None
    assert z.grad.abs().max() == 0
    beta = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    alpha = torch.tensor(1.2, dtype=torch.float64, requires_grad=True)
    # What reaches z is the gradient of the second term alone.
    (of_z,) = torch.autograd.grad(s_renormalised(z, alpha, beta).sum(), z)
    (want,) = torch.autograd.grad((beta * F.normalize(z.flatten(2), dim=2)).sum(), z)
    torch.testing.assert_close(of_z, want)
    assert torch.autograd.gradcheck(lambda a, b: s_renormalised(z.detach(), a, b), (alpha, beta))


@pytest.mark.parametrize("dim", [1, 2])
def test_whose_kernels(dim: int) -> None:
    torch.manual_seed(0)
    own = SlowNetL(3, 5, 8, dim=dim)
    x = images(4, 3, *(7, 9)[-dim:])
    kernels = own(x)
    assert kernels.shape == (4, 3, *(5,) * dim)
    torch.testing.assert_close(own(x[2:3]), kernels[2:3])  # whatever the other images
    shared = SlowNetL(3, 5, 8, dim=dim, kernels="batch", trainable_extras=False)
    shared.load_state_dict({k: v for k, v in own.state_dict().items() if not k.endswith(("alphas", "betas"))})
    assert shared(x).shape == (3, 1, *(5,) * dim)
    assert not torch.allclose(shared(x), shared(x[:2]))
    torch.testing.assert_close(shared(x[2:3]).transpose(0, 1), kernels[2:3])  # a batch of one is its own mean
    assert not torch.allclose(kernels[0], kernels[1])


def test_running_kernels_are_constants_outside_of_training() -> None:
    torch.manual_seed(0)
    net = SlowNetL(3, 5, 8, kernels="running")
    batches = [images(4, 3, 6, 6, seed=seed) for seed in range(3)]
    with torch.no_grad():
        for x in batches:
            net(x)
    mean = torch.cat([net.Kernel.fast_reduce(F.adaptive_avg_pool2d(x, 5)) for x in batches]).mean(0, keepdim=True)
    torch.testing.assert_close(net.Kernel.running_context, mean)  # the first ten batches weigh the same
    net.eval()
    assert torch.equal(net(batches[0]), net(batches[1][:1]))
    net.Kernel.contexts.fill_(1000)
    net.train()(batches[0])
    first = net.Kernel.fast_reduce(F.adaptive_avg_pool2d(batches[0], 5)).mean(0, keepdim=True)
    torch.testing.assert_close(net.Kernel.running_context, 0.9 * mean + 0.1 * first)
    assert {"Kernel.running_context", "Kernel.contexts"} <= set(net.state_dict())


@pytest.mark.parametrize("dim", [1, 2])
def test_gradients(dim: int) -> None:
    torch.manual_seed(0)
    net = ContextMAGNet(dim, 4, 2, 3, 3, context=2).double()
    x = images(2, 2, *(4,) * dim).double().requires_grad_()

    def answer(x: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(net, dict(zip(names, values, strict=True)), (x,))

    # Numerical differences see through the first term of the renormalisation, which passes no gradient: what stands
    # behind it is compared.
    names = [name for name, _ in net.named_parameters() if name.startswith(("output_linear", "fast_linears_x.1"))]
    values = [net.get_parameter(name).detach().requires_grad_() for name in names]
    assert torch.autograd.gradcheck(lambda *v: answer(x.detach(), *v), values)
    net(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


def test_extras_train_or_do_not() -> None:
    net = SlowNetL(3, 5, 8)
    assert {"Kernel.alphas", "Kernel.betas"} <= {name for name, _ in net.named_parameters()}
    net.Kernel.use_published_()
    assert not {"Kernel.alphas", "Kernel.betas"} & set(net.state_dict())
    assert net.Kernel.alphas.tolist() == [1, 1]
    assert net.Kernel.betas.tolist() == pytest.approx([0.1, 0.1])
    assert net(images(2, 3, 6, 6)).shape == (3, 1, 5, 5)
    assert sum(p.numel() for p in net.parameters()) + 4 == sum(p.numel() for p in SlowNetL(3, 5, 8).parameters())


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: MAGNet(3, 8, 2, 4, 5), "1 or 2 dimensions"),
        (lambda: MAGNet(2, 8, 2, 4, 0), "at least 1"),
        (lambda: MAGNet(2, 8, 2, 4, 5, rescale="never"), "none of constructor, first_forward"),
        (lambda: SlowNetL(3, 4), "no middle"),
        (lambda: SlowNetL(3, 5, kernels="mine"), "none of image, running, batch"),
    ],
)
def test_what_is_refused(call, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        call()


@needs_parity
@pytest.mark.parametrize(
    ("name", "empty"),
    [
        ("op_global_hyper_kernel", lambda: SlowNetG(6, 8, 16, 2)),
        ("op_local_hyper_kernel", lambda: SlowNetL(6, 5, 16, 2, kernels="batch", trainable_extras=False)),
    ],
)
def test_the_published_kernels(name: str, empty: type[nn.Module]) -> None:
    def build(state: Mapping[str, torch.Tensor]) -> nn.Module:
        module = empty()
        module.load_state_dict(dict(state))
        return module

    check_operator("terminator", name, build)
