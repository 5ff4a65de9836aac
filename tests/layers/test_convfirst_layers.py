"""ConvFirst and MBConv against figures of the published block definitions."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lissom.layers.convfirst import ConvFirst, MBConv
from lissom.meters.costs import layer_costs
from lissom.meters.waterline import convfirst_block, mbconv_block

BLOCKS = {
    "op_convfirst_block": lambda: ConvFirst(32, 32),
    "op_convfirst_block_s2": lambda: ConvFirst(32, 48, stride=2, expansion=3),
    "op_mbconv_block": lambda: MBConv(32, 32),
}


@pytest.fixture(scope="module")
def folder() -> Path:
    where = os.environ.get("LISSOM_PARITY")
    if not where:
        pytest.skip("LISSOM_PARITY is not set: it names the folder of published figures")
    return Path(where)


@pytest.fixture(scope="module")
def parity(folder: Path) -> Any:
    spec = importlib.util.spec_from_file_location("published_figures", folder / "parity.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("variant", BLOCKS)
def test_same_block_as_published(variant: str, folder: Path, parity: Any) -> None:
    fixture = json.loads((folder / "convfirst" / f"{variant}.json").read_text())
    block = BLOCKS[variant]().eval()
    assert {name: list(t.shape) for name, t in block.state_dict().items()} == fixture["keys"]
    assert sum(p.numel() for p in block.parameters()) == fixture["params"]
    parity.fill_(block.state_dict())
    with torch.no_grad():
        output = block(parity.make_input(tuple(fixture["input"])))
    assert parity.close(parity.digest(output), fixture["output"], rtol=1e-5)


@pytest.mark.parametrize(("block", "costs"), [(ConvFirst, convfirst_block), (MBConv, mbconv_block)])
def test_costs_of_the_module_are_the_formulas(block: type[nn.Module], costs: Any) -> None:
    measured = [c for c in layer_costs(block(32, 32), (32, 14, 14), batch=2) if c.macs]
    formula = costs(2, 14, 32)
    assert [c.ops for c in measured] == [k.ops for k in formula.layers]
    assert [c.bytes for c in measured] == [k.bytes for k in formula.layers]


def test_the_input_is_added_only_where_shapes_agree() -> None:
    x = torch.randn(1, 16, 7, 7)
    for options, shape in (({}, (1, 16, 7, 7)), ({"stride": 2}, (1, 16, 4, 4))):
        block = ConvFirst(16, 16, **options).eval()
        nn.init.zeros_(block.layers[-1].weight)  # the branch answers its last BatchNorm's bias: 0
        assert torch.equal(block(x), x if not options else torch.zeros(shape))


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="12 channels are not divisible into groups of 8"):
        ConvFirst(12, 12)
    with pytest.raises(ValueError, match="an odd one"):
        MBConv(8, 8, kernel_size=4)
