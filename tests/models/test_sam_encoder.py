"""SAM's encoder: published figures with and without the hourglass, names of its checkpoints, export."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lissom
from lissom.errors import LissomError
from lissom.export.exporting import export_plan
from lissom.export.plan import Plan
from lissom.models.factory import create_model, from_published
from lissom.models.sam_encoder import Hourglass, checkpoint_filter_fn
from lissom.runtime.target import Target

SMALL: dict[str, Any] = {"img_size": 256, "embed_dim": 96, "depth": 6, "num_heads": 4, "neck_chans": 32,
                         "window_size": 7, "global_attn_indexes": (2, 5)}  # fmt: skip
TINY: dict[str, Any] = {**SMALL, "img_size": 64, "patch_size": 8, "embed_dim": 32, "depth": 4, "window_size": 3,
                        "global_attn_indexes": (1, 3), "num_heads": 2, "neck_chans": 8}  # fmt: skip


@pytest.mark.parametrize(
    ("variant", "hourglass"),
    [("sam_plain_small", {}), ("sam_hourglass_small", {"hourglass_location": 3, "hourglass_clusters": 25})],
)
def test_the_published_figures(variant: str, hourglass: dict[str, int]) -> None:
    where = os.environ.get("LISSOM_PARITY")
    if not where:
        pytest.skip("LISSOM_PARITY is not set: it names the folder of published figures")
    spec = importlib.util.spec_from_file_location("published_figures", Path(where) / "parity.py")
    assert spec is not None
    assert spec.loader is not None
    parity = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(parity)
    fixture = json.loads((Path(where) / "expedit" / f"{variant}.json").read_text())
    state = parity.fill_({key: torch.zeros(shape) for key, shape in fixture["keys"].items()})
    model = create_model("sam_encoder_b", **SMALL, **hourglass).eval()
    assert sum(p.numel() for p in model.parameters()) == fixture["params"]
    model.load_state_dict(checkpoint_filter_fn(state, model))
    with torch.no_grad():
        output = model(parity.make_input(tuple(fixture["input"])))
    assert parity.close(parity.digest(output), fixture["output"], rtol=1e-4)


def tiny(**hourglass: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    model = create_model("sam_encoder_b", **{**TINY, **hourglass})
    for parameter in model.parameters():  # zeros at first: position embeddings and relative positions
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("location", [0, 1, 2])
def test_as_many_clusters_as_tokens_change_nothing(location: int, images: torch.Tensor) -> None:
    """Of 8 x 8 tokens in windows of 3 the padding shows: global blocks see it. So the map is one of whole windows."""
    settings = {"hourglass_clusters": 9, "hourglass_iterations": 0, "hourglass_k": 1}
    fitting = images[:, :, :48, :48]
    with torch.no_grad():
        got = tiny(hourglass_location=location, **settings)(fitting)
        torch.testing.assert_close(got, tiny()(fitting), rtol=1e-4, atol=1e-5)


def test_the_map_between_and_behind(images: torch.Tensor) -> None:
    model = tiny(hourglass_location=1, hourglass_clusters=4)
    seen: dict[int, tuple[int, ...]] = {}
    for i, block in enumerate(model.blocks):
        block.register_forward_hook(lambda m, inputs, output, i=i: seen.update({i: tuple(output.shape)}))
    assert model(images).shape == (2, 8, 8, 8)
    assert seen == {0: (2, 8, 8, 32), 1: (2, 6, 6, 32), 2: (2, 6, 6, 32), 3: (2, 6, 6, 32)}
    assert [block.window_size for block in model.blocks] == [3, 0, 2, 0]
    assert model.state_dict().keys() == tiny().state_dict().keys()
    assert model(images[:, :, :40, :56]).shape == (2, 8, 5, 7)


def test_windows_are_clustered_each_by_itself() -> None:
    hourglass = Hourglass(4, 2)
    x = torch.randn(1, 6, 8, 5, generator=torch.Generator().manual_seed(0))
    y, tokens, centres = hourglass.cluster(x)
    assert (y.shape, tokens.shape, centres.shape) == ((1, 4, 4, 5), (4, 16, 5), (4, 4, 5))
    torch.testing.assert_close(y[0, :2, 2:].reshape(4, 5), hourglass.clustering(x[:, :4, 4:].reshape(1, 16, 5))[0])
    assert not tokens[2, 8:].any()  # rows 6 and 7 are padding
    same = hourglass.rebuild(y, tokens, centres, (6, 8))
    want = hourglass.reconstruction(centres, tokens, centres)
    torch.testing.assert_close(same[0, 4:, :4].reshape(8, 5), want[2, :8])


def test_checkpoints_of_a_whole_sam_load(images: torch.Tensor) -> None:
    model = create_model("sam_encoder_b", img_size=64, depth=1, embed_dim=24, num_heads=2)
    theirs = {f"image_encoder.{k.replace('mlp.fc', 'mlp.lin')}": v for k, v in model.state_dict().items()}
    theirs["mask_decoder.iou_token.weight"] = torch.zeros(1, 256)
    assert checkpoint_filter_fn(theirs, model).keys() == model.state_dict().keys()
    with pytest.raises(LissomError, match="of another shape"):
        from_published("sam_encoder_b", theirs)
    assert all(lissom.is_model(f"sam_encoder_{size}") for size in "blh")


def test_with_a_classifier_and_gradient_checkpointing(images: torch.Tensor) -> None:
    assert create_model("sam_encoder_b", **TINY, num_classes=7).eval()(images).shape == (2, 7)
    model = tiny(hourglass_location=2, hourglass_clusters=4).train()
    want = model(images)
    model.set_grad_checkpointing(True)
    got = model(images)
    torch.testing.assert_close(got, want)
    got.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.full
def test_the_exported_graph(images: torch.Tensor, tmp_path: Path) -> None:
    model = tiny(hourglass_location=0, hourglass_clusters=4, depth=1, global_attn_indexes=(0,))
    artifact = export_plan(
        Plan.of(model), Target("openvino", threads=1), tmp_path / "a", shape=(3, 64, 64), verify=images.numpy()
    )
    assert artifact.plan["verification"]["relative_error"] < 1e-3
    assert np.isfinite(artifact.plan["verification"]["max_error"])


def test_settings_that_do_not_fit(images: torch.Tensor) -> None:
    for wrong, says in (
        ({"hourglass_location": 4}, "no block 4; the last is 3"),
        ({"hourglass_location": 1, "hourglass_clusters": 5}, "5 clusters are no square number of at most 3"),
        ({"hourglass_location": 1, "hourglass_clusters": 16}, "16 clusters are no square"),
    ):
        with pytest.raises(LissomError, match=says):
            tiny(**wrong)
    with pytest.raises(ValueError, match="without an hourglass"):
        tiny(hourglass_location=1, hourglass_clusters=4).forward_intermediates(images)
    maps = tiny().forward_intermediates(images, intermediates_only=True)
    assert [tuple(m.shape) for m in maps] == [(2, 32, 8, 8)] * 4
