"""Terminator: exact sizes, wiring, slow loss, one narrow network through everything, the published figures."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lissom.errors import LissomError
from lissom.layers.slow_fast import SlowWidths, tiled
from lissom.models.factory import create_model, from_published, load_model
from lissom.models.terminator import Terminator, checkpoint_filter_fn
from tests.models.families import (
    check_classifier,
    check_export,
    check_features,
    check_network,
    check_trains,
    count,
    fixture,
    images,
    needs_parity,
    parity,
    small,
)  # fmt: skip

PUBLISHED: dict[str, Any] = {"kernels": "batch", "statistics": "batch", "trainable_extras": False}
SIZES: dict[str, Any] = {
    "img_size": 8, "widths": (12, 12, 24, 24, 24), "global_layers": (1, 1, 1, 1, 1), "local_kernels": (3, 5, 3, 3),
    "slow_widths": SlowWidths(8, 4, 4, 4, 8), "num_classes": 5,
}  # fmt: skip
NAME = "terminator_cifar"
PARAMS = {"terminator_cifar": 1_336_855, "terminator_cifar100": 1_362_865}
EXTRAS = 5 * 4 * 2 * 2 + 5  # alphas and betas of two levels of four local networks a block, and a scalar a block


@pytest.mark.parametrize("name", PARAMS)
def test_published_sizes(name: str) -> None:
    assert count(name, **PUBLISHED) == PARAMS[name]
    assert count(name) == PARAMS[name] + EXTRAS


def test_published_sizes_of_the_parts() -> None:
    with torch.device("meta"):
        model = create_model(NAME, **PUBLISHED)
    blocks = [sum(p.numel() for p in block.parameters()) for block in model.blocks]
    assert blocks == [53_377, 57_824, 105_188, 253_580, 863_996]
    slow = sum(p.numel() for name, p in model.named_parameters() if "slow_net" in name)
    assert slow == 318_976
    assert (model.num_classes, create_model("terminator_16").num_classes) == (10, 7)
    assert create_model("terminator_16").img_size == 16


def test_a_step_reaches_every_parameter() -> None:
    x = images(3, 1, 8, 8)
    for kernels in ("image", "running", "batch"):
        model = small(NAME, **SIZES, in_chans=1, kernels=kernels, block_drop_rate=0.1)
        check_trains(model, x)
        assert load_model(model).input_size == (1, 32, 32)
    model.set_grad_checkpointing()
    check_trains(model, x)


def test_checkpointing_changes_no_gradient() -> None:
    x, found = images(3, 3, 8, 8), []
    for enable in (False, True):
        model = small(NAME, **SIZES)
        model.set_grad_checkpointing(enable)
        model(x).square().sum().backward()
        found.append([p.grad for p in model.parameters()])
    for plain, anew in zip(*found, strict=True):
        torch.testing.assert_close(plain, anew)


def test_the_slow_loss_trains_global_kernels_alone() -> None:
    model = small(NAME, **SIZES)
    model.slow_loss().backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None}
    assert reached == {name for name, _ in model.named_parameters() if ".slow_net_g." in name}


def test_the_slow_loss() -> None:
    model = small(NAME, **SIZES)
    with torch.no_grad():
        kernels = [block.fast_multi_branch.slow_net_g() for block in model.blocks]
    want = sum(
        float((tiled(kernels[j], kernels[i].shape[1]) - kernels[i]).square().mean()) for i in range(5) for j in range(i)
    )
    assert float(model.slow_loss().detach()) == pytest.approx(want, rel=1e-5)
    assert float(model.slow_loss().detach()) == pytest.approx(want, rel=1e-5)  # nothing is added up over calls
    first = model.blocks[0].fast_multi_branch.slow_net_g.Kernel
    for block in model.blocks[1:]:
        own = block.fast_multi_branch.slow_net_g.Kernel
        state = {k: v for k, v in first.state_dict().items() if "output" not in k}
        own.load_state_dict(state, strict=False)
        with torch.no_grad():
            rows = torch.arange(own.output_linear.out_channels) % first.output_linear.out_channels
            own.output_linear.weight.copy_(first.output_linear.weight[rows])
            own.output_linear.bias.copy_(first.output_linear.bias[rows])
    assert float(model.slow_loss().detach()) < 1e-10  # every kernel is the tiled one before
    assert float(small(NAME, **{**SIZES, "widths": (12,), "global_layers": (1,)}).slow_loss().detach()) == 0


def test_the_wiring() -> None:
    """Block i reads the one before, i - 2 from the third on, and i - 3 from the fifth on; scalars between count."""
    model = small(NAME, **SIZES).eval()
    nn.init.normal_(model.block_biases)
    x = images(2, 3, 8, 8)
    with torch.no_grad():
        b, s = model.blocks, model.block_biases
        o0 = b[0](x) + s[0]
        o1 = b[1](o0) + s[1]
        o2 = b[2](o1, o0) + s[2]
        o3 = b[3](o2, o1) + s[3]
        o4 = b[4](o3, o2, o1) + s[4]
        torch.testing.assert_close(model.forward_features(x), o4)
        torch.testing.assert_close(model(x), model.out_layer(o4.mean((2, 3))))
    drops = [block.drop.p for block in small(NAME, **SIZES, block_drop_rate=0.05).blocks]
    assert drops == [0, 0, 0.05, 0.05, 0.05]


@pytest.mark.parametrize("kernels", ["image", "running"])
def test_an_answer_does_not_depend_on_the_other_images(kernels: str) -> None:
    model = small(NAME, **SIZES, kernels=kernels)
    x = images(4, 3, 8, 8)
    with torch.no_grad():
        for _ in range(3):
            model(x)
        model.eval()
        torch.testing.assert_close(model(x)[:1], model(x[:1]), atol=1e-4, rtol=1e-3)
        model.use_published_()
        assert not torch.allclose(model(x)[:1], model(x[:1]), atol=1e-2)


def test_features() -> None:
    check_features(NAME, images(2, 3, 8, 8), **SIZES)
    model = small(NAME, **SIZES).eval()
    with torch.no_grad():
        (found,) = model.forward_intermediates(images(2, 3, 8, 8), [2], stop_early=True, intermediates_only=True)
        short = small(NAME, **SIZES, features_only=True, out_indices=(0, 2)).eval()
        assert torch.equal(short(images(2, 3, 8, 8))[1], found)
    assert len(short.model.blocks) == 3
    with pytest.raises(ValueError, match="NCHW"):
        model.forward_intermediates(images(2, 3, 8, 8), output_fmt="NLC")


def test_classifiers() -> None:
    check_classifier(small(NAME, **SIZES), images(2, 3, 8, 8))


def exported(blocks: int, kernels: str) -> None:
    sizes = {**SIZES, "widths": (12, 12, 24)[:blocks], "global_layers": (1,) * blocks}
    model = small(NAME, **sizes, kernels=kernels)
    x = images(4, 3, 8, 8)
    with torch.no_grad():
        model(x)  # for statistics, and running kernels
    check_export(model, x[:1])


def test_export() -> None:
    exported(1, "image")


@pytest.mark.full
@pytest.mark.parametrize("kernels", ["image", "running", "batch"])
def test_export_of_several_blocks(kernels: str) -> None:
    exported(3, kernels)


def test_other_sizes_of_image() -> None:
    model = small(NAME, **SIZES).eval()
    for name, p in model.named_parameters():
        if "bias_p" in name:
            nn.init.normal_(p, std=0.1)
    larger = small(NAME, **{**SIZES, "img_size": 12}).eval()
    state = {**model.state_dict(), "blocks.0.fast_multi_branch.slow_net_g.train_length": torch.zeros(1)}
    larger.load_state_dict(checkpoint_filter_fn(state, larger))
    x = images(1, 3, 12, 12)
    with pytest.raises(ValueError, match="12 x 12"):
        model(x)
    model.set_input_size(12)
    with torch.no_grad():
        torch.testing.assert_close(model(x), larger(x))
    assert model(x).requires_grad
    with pytest.raises(LissomError, match="not square"):
        create_model(NAME, img_size=(32, 16))
    with pytest.raises(LissomError, match="pairs of equal groups"):
        create_model(NAME, widths=(10, 36, 72, 144, 288))
    with pytest.raises(LissomError, match="one each"):
        create_model(NAME, global_layers=(2, 2))


def test_any_number_of_input_channels() -> None:
    model = small(NAME, **SIZES, in_chans=5)
    assert model(images(2, 5, 8, 8)).shape == (2, 5)
    assert model.slow_loss().isfinite()


def test_checkpoints() -> None:
    torch.manual_seed(0)
    published = create_model("terminator_16", **PUBLISHED, num_classes=4)
    flags = {"blocks.0.fast_multi_branch.slow_net_g.train_length": torch.tensor([16])}
    model = from_published("terminator_16", {**published.state_dict(), **flags})
    assert isinstance(model, Terminator)
    assert model.num_classes == 4
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in published.parameters())
    x = images(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(model.eval()(x), published.eval()(x))  # no weight is rescaled again
    ours = create_model("terminator_16")
    again = from_published("terminator_16", ours.state_dict())
    assert again.block_biases is not None
    key = "blocks.1.fast_multi_branch.slow_net_l2.Kernel.fast_fc1.weight"
    for broken, what in (
        ({k: v for k, v in published.state_dict().items() if k != key}, f"1 missing: {key}"),
        ({**published.state_dict(), "blocks.5.x": torch.zeros(1)}, "1 unknown: blocks.5.x"),
    ):
        with pytest.raises(LissomError, match=what):
            from_published("terminator_16", broken)


@needs_parity
def test_the_published_names_are_the_networks_own() -> None:
    figures = fixture("terminator", NAME)
    with torch.device("meta"):
        own = create_model(NAME, **PUBLISHED).state_dict()
    wanted = {key: tuple(shape) for key, shape in figures["keys"].items() if key not in figures["int_keys"]}
    assert {key: tuple(value.shape) for key, value in own.items()} == wanted


@needs_parity
def test_the_published_kernels_and_slow_loss() -> None:
    own, figures = parity(), fixture("terminator", NAME)
    model = create_model(NAME, **PUBLISHED)
    own.fill_(model.state_dict())
    with torch.no_grad():
        for block, want in zip(model.blocks, figures["hyper_kernels"], strict=True):
            assert own.close(own.digest(block.fast_multi_branch.slow_net_g()), want)
        assert float(model.slow_loss()) == pytest.approx(figures["slow_loss"], rel=1e-5)


@needs_parity
def test_the_answers_are_the_published_ones() -> None:
    check_network("terminator", NAME)
