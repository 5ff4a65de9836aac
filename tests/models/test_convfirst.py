"""ConvFirst networks and the fused block: shapes, counts, tiles of any size, nothing of the expansion stored whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lissom.layers.convfirst import ConvFirst, FusedConvFirst, MBConv, MLPBlock
from lissom.models.convfirst import BlockStack, fuse_blocks_
from lissom.models.factory import from_published
from tests.models.families import (
    check_classifier,
    check_export,
    check_features,
    check_fuse,
    check_trains,
    count,
    images,
    settle,
    small,
)

SMALL: dict[str, Any] = {
    "widths": (8, 16, 16, 24), "depths": (1, 2, 1, 1), "expansions": (2, 2, 2, 3), "stem": 8, "head": 32,
    "num_classes": 5,
}  # fmt: skip


def test_the_published_stack() -> None:
    stack = BlockStack(64, group_width=8, expansion=4, depth=4, extra=2)
    assert sum(p.numel() for p in stack.parameters()) == 219_392
    assert [len(part) for part in (stack.pre, stack.blocks, stack.post)] == [1, 4, 1]
    assert [len(part) for part in (BlockStack(8, depth=1, extra=1).pre, BlockStack(8, depth=1, extra=1).post)] == [1, 0]
    assert stack(images(2, 64, 9, 7)).shape == (2, 64, 1, 1)
    assert isinstance(BlockStack(8, depth=1, block=MBConv).blocks[0], MBConv)


def test_an_mlp_block_is_convfirst_without_its_convolution() -> None:
    block = settle(ConvFirst(8, 8, expansion=2), images(4, 8, 6, 5))
    mlp = settle(MLPBlock(8, 8, 2), images(4, 8, 6, 5))
    mlp.layers.load_state_dict(torch.nn.Sequential(*block.layers[2:]).state_dict())
    x = images(2, 8, 6, 5, seed=1)
    with torch.no_grad():
        torch.testing.assert_close(mlp(x), block.layers[2:](x) + x)


@pytest.mark.parametrize(("name", "low", "high"), [("convfirst_t", 4e6, 6e6), ("convfirst_s", 20e6, 32e6)])
def test_sizes_are_of_their_class(name: str, low: float, high: float) -> None:
    assert low < count(name) < high


def test_a_small_one_through_everything() -> None:
    x = images(2, 3, 64, 45)
    check_trains(small("convfirst_t", **SMALL), x)
    check_classifier(small("convfirst_t", **SMALL), x)
    fused = check_fuse(small("convfirst_t", **SMALL), x)
    check_export(fused, images(1, 3, 64, 45, seed=1))
    model = small("convfirst_t", **SMALL)
    assert from_published("convfirst_t", model_state()).num_classes == 11
    model.set_grad_checkpointing(True)
    check_trains(model, x)


def model_state() -> dict[str, torch.Tensor]:
    return dict(small("convfirst_t", num_classes=11).state_dict())


def test_maps() -> None:
    x = images(1, 3, 64, 96)
    model = small("convfirst_t", **SMALL).eval()
    with torch.no_grad():
        _, maps = model.forward_intermediates(x)
        assert [tuple(m.shape[1:]) for m in maps] == [(8, 32, 48), (8, 16, 24), (16, 8, 12), (16, 4, 6), (24, 2, 3)]
        assert len(model.forward_intermediates(x, 2, intermediates_only=True)) == 2
        assert len(model.forward_intermediates(x, [0, 1], intermediates_only=True, stop_early=True)) == 2
    check_features("convfirst_t", x, **SMALL)
    with pytest.raises(ValueError, match="NCHW"):
        model.forward_intermediates(x, output_fmt="NHWC")


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize(("tile", "chunk"), [(1, 1), (3, 7), (4, 32), (100, 1000)])
def test_tiles_of_any_size_give_the_same(tile: int, chunk: int, kernel: int, stride: int) -> None:
    for out in (16, 24):
        block = settle(ConvFirst(16, out, kernel, stride, expansion=2), images(4, 16, 11, 9))
        fused = FusedConvFirst.from_block(block, tile, chunk)
        x = images(2, 16, 11, 9, seed=1)
        with torch.no_grad():
            torch.testing.assert_close(fused(x), block(x), rtol=1e-5, atol=1e-5)


class Largest(TorchDispatchMode):
    """The most numbers that a tensor made inside holds."""

    most = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        made = function(*arguments, **(keywords or {}))
        if isinstance(made, torch.Tensor):
            self.most = max(self.most, made.numel())
        return made


def test_the_expansion_is_never_stored_whole() -> None:
    block = settle(ConvFirst(16, 16, expansion=6), images(2, 16, 32, 24))
    x = images(1, 16, 32, 24)
    with torch.no_grad():
        with Largest() as plain:
            block(x)
        with Largest() as tiled:
            FusedConvFirst.from_block(block, tile=4, chunk=24)(x)
    assert plain.most == 6 * x.numel()
    assert tiled.most <= x.numel()


def test_blocks_of_a_network_are_fused() -> None:
    model = settle(small("convfirst_t", **SMALL), images(2, 3, 64, 64))
    x = images(2, 3, 64, 64, seed=1)
    with torch.no_grad():
        want = model(x)
        fused = fuse_blocks_(model, tile=3, chunk=5)
        assert sum(isinstance(m, FusedConvFirst) for m in fused.modules()) == 5
        torch.testing.assert_close(fused(x), want, rtol=1e-4, atol=1e-5)


def test_tiles_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        FusedConvFirst(ConvFirst(8, 8), tile=0)
