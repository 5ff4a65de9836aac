"""What is asked of all families alike: published names, one graph for the compiler, the pages' tables."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lissom.models.factory import create_model, is_model
from lissom.registry import parts
from tests.models.families import PARITY, images, needs_parity, small
from tests.parity_adapters import BUILD

ROOT = Path(__file__).parent.parent.parent
SYSTEMS = (
    "shvit", "svit", "inceptionnext", "lsnet", "unireplknet", "metamixer", "hornet", "convit", "cvt", "inception_v4",
    "tvconv", "terminator", "model_scaling", "deps", "convfirst", "fit",
)  # fmt: skip
# One narrow network of every kind: name, arguments, input.
NARROW: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "shvit_s1_distilled": ({"embed_dim": (16, 24, 32), "partial_dim": (4, 6, 8), "depth": (1, 1, 1)}, (2, 3, 67, 91)),
    "stvit_small": (
        {"dims": (8, 8, 16, 16), "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2), "projection": 16}, (2, 3, 67, 91),
    ),
    "inceptionnext_atto": ({"dims": (8, 16, 16, 24), "depths": (1, 1, 1, 1)}, (2, 3, 67, 91)),
    "lsnet_t": ({"embed_dim": (16, 16, 24, 32), "depth": (0, 2, 2, 2)}, (2, 3, 67, 91)),
    "unireplknet_a": (
        {"dims": (8, 8, 16, 16), "depths": (1, 1, 1, 1), "kernel_sizes": (3, 7, 13, 0)}, (2, 3, 67, 91),
    ),
    "unireplknet_series": (
        {"channels": 3, "lookback": 24, "dim": 24, "horizon": 5, "dims": (8, 8, 16), "depths": (1, 1, 1),
         "kernel_sizes": (3, 7, 7)}, (2, 24, 3),
    ),
    "ffnet_1": ({"dims": (8, 8, 16, 16), "depths": (1, 1, 1, 1), "stem_dim": 8}, (2, 3, 67, 91)),
    "ffnetsr_light_x2": ({"dim": 8, "depth": 1}, (2, 3, 9, 14)),
    "ffnet_segmenter": (
        {"dims": (8, 8, 16, 16), "depths": (1, 1, 1, 1), "stem_dim": 8, "head_dim": 8, "head_depth": 1}, (2, 3, 67, 91),
    ),
    "ffnet_series": ({"variables": 3, "lookback": 24, "horizon": 7, "dim": 4, "kernel_size": 9}, (2, 24, 3)),
    "hornet_tiny_7x7": ({"dim": 8, "depths": (1, 1, 1, 1)}, (2, 3, 67, 91)),
    "hornet_tiny_gf": ({"dim": 8, "depths": (1, 1, 1, 1)}, (2, 3, 67, 91)),
    "convit_tiny_plus": ({"img_size": (32, 48), "patch_size": 8, "embed_dim": 4, "num_heads": 4, "depth": 3,
                          "local_up_to_layer": 2}, (2, 3, 32, 48)),
    "cvt_13_224": ({"dims": (8, 12, 16), "heads": (1, 3, 2), "depths": (1, 1, 1)}, (2, 3, 67, 91)),
    "inception_resnet_v1": ({"width": 0.125}, (2, 3, 107, 91)),
    "mobilenet_v2_x0_1_tvconv": ({"img_size": 32}, (2, 3, 32, 32)),
    "shufflenet_v2_x0_5_tvconv": ({"img_size": 32}, (2, 3, 32, 32)),
    "terminator_cifar": (
        {"img_size": 8, "widths": (12, 12), "global_layers": (1, 1), "local_kernels": (3, 5, 3, 3)}, (2, 3, 8, 8),
    ),
    "convfirst_t": ({}, (2, 3, 37, 45)),
    "light_cnn": ({}, (2, 1, 28, 28)),
    "effnet_b0": (
        {"depths": (1,) * 7, "widths": (8, 8, 8, 16, 16, 16, 24), "stem": 8, "head": 32}, (2, 3, 67, 91),
    ),
    "regnety_800mf_dWr4": (
        {"depths": (1, 1, 1, 1), "widths": (8, 16, 16, 24), "group_widths": (8, 8, 8, 8)}, (2, 3, 67, 91),
    ),
    "ofa_mobilenetv3_100": ({"widths": (8, 16), "depths": (1, 2), "neck": 24, "features": 32}, (2, 3, 67, 91)),
    "fit_encoder": ({}, (2, 4, 16, 12)),
}  # fmt: skip


@needs_parity
def test_every_published_name_is_known() -> None:
    assert PARITY is not None
    names = json.loads((PARITY / "NAMES.json").read_text())
    unknown = [
        f"{system}/{name}" for system in SYSTEMS for name in names[system]
        if f"{system}/{name}" not in BUILD and not is_model(name)
    ]  # fmt: skip
    assert unknown == []


@pytest.mark.full
@needs_parity
@pytest.mark.parametrize("system", SYSTEMS)
def test_every_published_name_builds(system: str) -> None:
    assert PARITY is not None
    for name in json.loads((PARITY / "NAMES.json").read_text())[system]:
        if f"{system}/{name}" not in BUILD:
            with torch.device("meta"):
                assert sum(p.numel() for p in create_model(name).parameters()) > 0


@pytest.mark.full
@pytest.mark.parametrize("name", NARROW)
def test_the_compiler_sees_one_graph(name: str) -> None:
    """``fullgraph`` refuses a break; nothing is generated from the graph, it is run as it was captured."""
    arguments, shape = NARROW[name]
    model, x = small(name, **arguments).eval(), images(*shape)
    torch._dynamo.reset()
    with torch.no_grad():
        want = model(x)
        got = torch.compile(model, fullgraph=True, backend="eager")(x)
    for a, b in zip(*((y if isinstance(y, tuple | list) else [y]) for y in (want, got)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def systems(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "docs" / "systems.py"), "--check", *arguments], capture_output=True, text=True
    )


@pytest.mark.full
def test_the_tables_of_the_pages_are_what_is_counted() -> None:
    done = systems()
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_network_of_a_family_stands_in_its_page() -> None:
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        import systems as script
    finally:
        sys.path.pop(0)
    for family, rows in script.FAMILIES.items():
        text = (ROOT / "docs" / "systems" / f"{family}.md").read_text(encoding="utf-8")
        assert text.count(script.FIRST) == text.count(script.LAST) == 1
        assert script.registered(family), f"{family} names no file that registers a network"
        for name in script.registered(family) | {row.name for row in rows}:
            assert f"| `{name}` |" in text, f"{name} is missing in docs/systems/{family}.md"
    assert {part.name for part in parts("network")} >= {row.name for row in script.FAMILIES["hornet"]}


@pytest.mark.full
@pytest.mark.parametrize("family", [*SYSTEMS[:-2], "fit", "light_cnn"])
def test_the_pages_examples_run(family: str) -> None:
    text = (ROOT / "docs" / "systems" / f"{family}.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    assert blocks
    done = subprocess.run([sys.executable, "-c", "\n".join(blocks)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout
