"""FFNified attention: reach and independence of channels, fused forms, gradients, MetaMixer's settings, figures."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from timm.utils.model import reparameterize_model
from torch import nn

from lissom.layers.ffnified_attention import FFNifiedAttention, MetaMixer, RepDepthwise
from tests.models.families import check_fuse, check_operator, images, needs_parity, settle


class _Filled:
    """A module of published names, with a state dict loaded strictly."""

    def __init__(self, build: Callable[[], nn.Module], fused: bool = False) -> None:
        self.build, self.fused = build, fused

    def __call__(self, state: dict[str, torch.Tensor]) -> nn.Module:
        model = self.build()
        model.load_state_dict(state)
        return reparameterize_model(nn.Sequential(model.eval())) if self.fused else model


@pytest.mark.parametrize(("inside", "outside", "size", "stride"), [(3, 3, 7, 1), (3, 6, 7, 2), (2, 2, 5, 1)])
def test_two_branches_become_one_convolution(inside: int, outside: int, size: int, stride: int) -> None:
    block = RepDepthwise(inside, outside, size, stride)
    x = images(3, inside, 9, 12)
    settle(block, x)
    fused = block.fuse()
    assert fused.weight.shape == (outside, 1, size, size)
    with torch.no_grad():
        assert torch.allclose(fused(x), block(x), atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [((4, 6), "no multiple"), ((4, 4, 6), "no common centre"), ((4, 4, 3), "no common centre")],
)
def test_depthwise_refusals(arguments: tuple[int, ...], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        RepDepthwise(*arguments)
    with pytest.raises(ValueError, match="has no centre"):
        FFNifiedAttention(4, 4)


def test_behind_the_projection_every_channel_stands_alone() -> None:
    mixer = FFNifiedAttention(5).eval()
    with torch.no_grad():
        mixer.fc.c.weight.copy_(torch.eye(5)[:, :, None, None])
    x = images(1, 5, 17, 17)
    other = x.clone()
    other[:, 2, 8, 8] += 1
    with torch.no_grad():
        change = (mixer(other) - mixer(x))[0].abs()
    assert change[[0, 1, 3, 4]].max() == 0
    rows, columns = torch.nonzero(change[2] > 0, as_tuple=True)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (2, 14, 2, 14)  # 13 x 13


def test_kernels_and_fused_form() -> None:
    assert isinstance(FFNifiedAttention(4, 3, 7).conv1, nn.Conv2d)
    assert isinstance(FFNifiedAttention(4, 3, 7).conv2, RepDepthwise)
    assert isinstance(FFNifiedAttention(4, reparam=False).conv2, nn.Conv2d)
    torch.manual_seed(0)
    fused = check_fuse(nn.Sequential(FFNifiedAttention(6)), images(4, 6, 9, 11))
    assert not any(isinstance(m, nn.BatchNorm2d) for m in fused.modules())


@pytest.mark.parametrize("size", [3, 7])
def test_gradients(size: int) -> None:
    mixer = FFNifiedAttention(2, size, size).double()
    x = images(2, 2, 5, 3).double().requires_grad_()
    assert torch.autograd.gradcheck(mixer, x)
    mixer(x).sum().backward()
    assert all(p.grad is not None for p in mixer.parameters())


def test_the_three_settings_of_one_frame() -> None:
    torch.manual_seed(0)
    tokens, maps = images(2, 6, 8), images(2, 8, 5, 7)
    frame, plain = MetaMixer.ffnified(8), FFNifiedAttention(8)
    names = {"query": "fc", "key.memory": "conv1", "value.memory": "conv2"}
    plain.load_state_dict(
        {names[(head := next(n for n in names if key.startswith(n)))] + key[len(head) :]: value
         for key, value in frame.state_dict().items()}
    )  # fmt: skip
    assert torch.equal(frame.eval()(maps), plain.eval()(maps))

    layer = MetaMixer.feed_forward(8, 2)
    want = layer.value.memory(nn.functional.gelu(layer.key.memory(tokens)))
    assert torch.equal(layer(tokens), want)

    mixer = MetaMixer.attention(8, 2)
    q, k, v = (
        linear(tokens).unflatten(2, (2, 4)).transpose(1, 2)
        for linear in (mixer.query, mixer.key.proj, mixer.value.v)
    )  # fmt: skip
    want = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    assert torch.allclose(mixer(tokens), mixer.value.proj(want), atol=1e-6)
    with pytest.raises(ValueError, match="do not divide"):
        MetaMixer.attention(8, 3)
    own = MetaMixer(nn.Identity(), MetaMixer.learned(nn.Linear(8, 4)), nn.ReLU(), MetaMixer.learned(nn.Linear(4, 8)))
    assert own(tokens).shape == tokens.shape


@needs_parity
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("size", "dim"), [(3, 16), (7, 24)])
def test_published_figures(size: int, dim: int, fused: bool) -> None:
    build = _Filled(lambda: FFNifiedAttention(dim, size, size), fused)
    check_operator("metamixer", f"op_token_mixer_{size}", build)
