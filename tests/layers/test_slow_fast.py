"""The Terminator's layers: gates, standardisation, interactions and convolutions by hand; the published interaction."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lissom.layers.slow_fast import (
    GIBS,
    PUBLISHED,
    RGU,
    HyperChannelInteract,
    HyperInteract,
    HyperZZWGlobal,
    HyperZZWLocal,
    LocalConv,
    SFNEBlock,
    SFNELayer,
    Switches,
    tiled,
    use_published_,
)
from lissom.ops.hyper_zzw import hyper_zzw_local
from tests.models.families import check_operator, check_trains, images, needs_parity


def by_hand(x: torch.Tensor, *axes: int) -> torch.Tensor:
    return (x - x.mean(axes, keepdim=True)) / (x.var(axes, correction=0, keepdim=True) + 1e-5).sqrt()


def silent_(kernels: nn.Module) -> None:
    """Every slow network gives zeros."""
    for name, parameter in kernels.named_parameters():
        if "output_linear" in name:
            nn.init.zeros_(parameter)


@pytest.mark.parametrize("dim", [1, 2])
def test_the_recursive_gated_unit(dim: int) -> None:
    torch.manual_seed(0)
    unit, x = RGU(3, 5, dim), images(2, 3, *(5,) * dim)
    nn.init.normal_(unit.fast_bias_p)

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        layer = unit.get_submodule(f"fast_linear_{name}")
        return torch.einsum("oc,bc...->bo...", layer.weight.flatten(1), x) + layer.bias.view(-1, *(1,) * dim)

    q = F.gelu(by_hand(linear("k", x) * linear("q", linear("v", x)), *range(2, x.ndim))) + unit.fast_bias_p
    torch.testing.assert_close(unit(x), linear("y", q), atol=1e-5, rtol=1e-4)


def test_zero_kernels_make_gates_of_a_half() -> None:
    x = images(2, 6, 5, 5)
    for module in (HyperChannelInteract(6), HyperInteract(6, 5)):
        silent_(module)
        torch.testing.assert_close(module(x), x / 2)
    line = images(2, 6, 5)
    one = HyperInteract(6, 5, dim=1)
    silent_(one)
    torch.testing.assert_close(one(line), line / 2)


@pytest.mark.parametrize("shape", [(2, 4, 5), (2, 4, 5, 5)])
def test_interactions(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    y, x = images(*shape), images(*shape, seed=1)
    axes, ones = tuple(range(2, y.ndim)), (1,) * (y.ndim - 2)
    channel = HyperChannelInteract(4)
    kernel = channel.slow_net_gc().view(1, 4, *ones)
    torch.testing.assert_close(channel(x), x * (kernel * x.mean(axes, keepdim=True).square()).sigmoid())
    both = HyperInteract(4, 5, dim=y.ndim - 2)
    of_channel = both.slow_net_gc().view(1, 4, *ones) * y.mean(axes, keepdim=True).square()
    of_position = both.slow_net_gs() * y.mean(1, keepdim=True).square()
    torch.testing.assert_close(both(y, x), x * (of_channel * of_position).sigmoid())
    torch.testing.assert_close(both(y), both(y, y))


@pytest.mark.parametrize("statistics", ["running", "batch"])
def test_alternating_standardisation(statistics: str) -> None:
    x = 3 + 2 * images(4, 24, 5, 3)
    norm = GIBS(24, 12, statistics=statistics)
    found = norm(x)
    for group in range(12):
        own = slice(2 * group, 2 * group + 2)
        want = by_hand(x[:, own], *((0, 2, 3) if group % 2 == 0 else (2, 3)))
        torch.testing.assert_close(found[:, own], want, atol=1e-5, rtol=1e-4)
    assert found.mean((0, 2, 3)).abs().max() < 1e-5
    torch.testing.assert_close(GIBS(24, dim=1)(x.flatten(2)).view(x.shape), found)
    # At test time, running statistics do not depend on the batch, the batch's own do.
    for _ in range(100):
        norm(x)
    norm.eval()
    alone = norm(x[:1])
    assert torch.allclose(alone, norm(x)[:1], atol=1e-5) == (statistics == "running")
    torch.testing.assert_close(norm(x), found, atol=0.02, rtol=0.02)  # settled on this one batch


@pytest.mark.parametrize("dim", [1, 2])
def test_the_local_convolution(dim: int) -> None:
    torch.manual_seed(0)
    x, kernel = images(3, 4, *(7, 5)[-dim:]), images(3, 4, *(3,) * dim, seed=1)
    layer = LocalConv(4, dim)
    mixed = layer.channel_mixer(hyper_zzw_local(kernel, x))
    torch.testing.assert_close(layer(kernel, x), F.gelu(by_hand(mixed, 0, *range(2, x.ndim))), atol=1e-5, rtol=1e-4)


def test_operators_with_their_networks() -> None:
    torch.manual_seed(0)
    x, y = images(2, 3, 6, 6), images(2, 3, 6, 6, seed=1)
    net = HyperZZWGlobal(3, 6, 8)
    torch.testing.assert_close(net(x, y), (x * net.slow_net_g()) @ y)
    torch.testing.assert_close(net(x), net(x, x))
    local = HyperZZWLocal(3, 5, 8)
    torch.testing.assert_close(local(x, y), hyper_zzw_local(local.slow_net_l(x), y))
    assert HyperZZWLocal(3, 5, 8, dim=1)(x.flatten(2)).shape == (2, 3, 36)


def test_tiling() -> None:
    x = images(2, 3, 4, 4)
    assert torch.equal(tiled(x, 6), torch.cat([x, x], 1))
    assert torch.equal(tiled(x, 5), torch.cat([x, x[:, :2]], 1))
    assert torch.equal(tiled(x, 3), x)


def test_the_branches_stand_in_the_published_order() -> None:
    """A bottleneck that passes one branch through shows which it is."""
    torch.manual_seed(0)
    layer = SFNELayer(3, 3, 6, earlier=2, switches=PUBLISHED)
    x, pre, pre_pre = images(2, 3, 6, 6), images(2, 3, 6, 6, seed=1), images(2, 1, 6, 6, seed=2)
    kernel = layer.slow_net_g()
    context = x * kernel
    fast = by_hand(layer.Fast_Kernel_rgu_2(context) + layer.Fast_Kernel_rgu(x), 2, 3)
    mix, hci = by_hand(layer.channel_mixer_mlp(x), 2, 3), by_hand(layer.channel_mixer_hci(x), 2, 3)
    out = context @ fast

    def local(number: int, source: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        generator, convolution = (
            layer.get_submodule(f"slow_net_l{number}"), layer.get_submodule(f"local_interact_conv_{number}")
        )  # fmt: skip
        return convolution(generator(source), y) + number

    for number in range(1, 5):
        nn.init.constant_(layer.get_parameter(f"bias{number}"), number)
    want = [
        out, local(2, hci, x), pre, fast, context @ mix, local(1, x, hci), out.sigmoid() * out, local(3, mix, x),
        context @ hci, local(4, x, mix), pre_pre.repeat(1, 3, 1, 1), layer.hyper_interact(out, x),
    ]  # fmt: skip
    for place, branch in enumerate(want):
        with torch.no_grad():
            layer.bottleneck_layer.weight.zero_()
            layer.bottleneck_layer.weight[:, 3 * place : 3 * place + 3, 0, 0] = torch.eye(3)
            torch.testing.assert_close(layer(x, pre, pre_pre), branch, atol=1e-4, rtol=1e-4)


def test_a_block() -> None:
    torch.manual_seed(0)
    block = SFNEBlock(3, 12, 6)
    nn.init.constant_(block.bias, 0.3)
    x = images(4, 3, 6, 6)
    torch.testing.assert_close(block(x), F.gelu(block.norm(block.fast_multi_branch(x))) + 0.3)
    block.drop.p = 0.5
    kept = block(x).flatten(2).abs().sum(2) > 0
    assert 0 < int(kept.sum()) < kept.numel()  # whole channels are dropped
    check_trains(SFNEBlock(3, 12, 6), x)


def test_the_published_behaviour_is_one_switch() -> None:
    torch.manual_seed(0)
    block = SFNEBlock(3, 12, 6)
    published = SFNEBlock(3, 12, 6, switches=PUBLISHED)
    assert set(block.state_dict()) > set(published.state_dict())
    published.load_state_dict({k: v for k, v in block.state_dict().items() if k in published.state_dict()})
    use_published_(block)
    assert set(block.state_dict()) == set(published.state_dict())
    x = images(3, 3, 6, 6)
    with torch.no_grad():
        assert torch.equal(block.eval()(x), published.eval()(x))
        assert not torch.allclose(block(x)[:1], block(x[:1]))  # other images matter


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: GIBS(24, 7), "pairs of equal groups"),
        (lambda: GIBS(20), "pairs of equal groups"),
        (lambda: GIBS(24, statistics="mine"), "none of running, batch"),
        (lambda: Switches(kernels="mine"), "kernels 'mine' is none of"),
        (lambda: SFNELayer(3, 12, 6, earlier=3), "at most two"),
        (lambda: SFNELayer(3, 12, 6, local_kernels=(3, 5)), "four local kernels"),
        (lambda: SFNELayer(3, 12, 6)(images(1, 3, 7, 7)), "maps of 3 x 6 x 6 are wanted, not 3 x 7 x 7"),
    ],
)
def test_what_is_refused(call, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        call()


@needs_parity
def test_the_published_interaction() -> None:
    def build(state: Mapping[str, torch.Tensor]) -> nn.Module:
        module = HyperInteract(6, 8, 16, 16)
        module.load_state_dict(dict(state))
        return module

    check_operator("terminator", "op_hyper_interact", build)
