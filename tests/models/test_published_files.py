"""Every family's checkpoints as its publisher saves them: ``lissom convert``, timm's own loader, and what is refused.

Small networks stand in for the registered ones under their names; files of the published sizes are the tests marked
full, made from the published key names.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors import safe_open
from timm.utils.model import reparameterize_model
from torch import nn

import lissom
from lissom.cli import main
from lissom.errors import LissomError
from lissom.layers.tvconv import TVConv2d
from lissom.models.factory import create_model, from_published, load_model
from lissom.models.weights import sha256
from tests.models.families import fixture, images, needs_parity, parity, settle

State = dict[str, torch.Tensor]
ARGS = argparse.Namespace(model="x", lr=5e-4, output_dir=Path("runs"), input_size=224)


def plain(state: State, model: nn.Module) -> Any:
    return state


def in_model(state: State, model: nn.Module) -> Any:
    """As DeiT's program saves: the weights beside the optimizer's state and the settings."""
    return {"model": state, "optimizer": {"state": {0: torch.ones(3)}}, "epoch": 299, "args": ARGS}


def in_state_dict(state: State, model: nn.Module) -> Any:
    """As timm's program saves, whose best figure is one of NumPy's."""
    return {"epoch": 9, "arch": "x", "state_dict": state, "args": ARGS, "version": 2, "metric": np.float64(81.25)}


def beside_the_average(state: State, model: nn.Module) -> Any:
    raw = {key: value + 1 if value.is_floating_point() else value for key, value in state.items()}
    return {"model": raw, "model_ema": state, "epoch": 1}


def with_bias_tables(state: State, model: nn.Module) -> Any:
    """LSNet: tables of indices, of no use without the published forward pass."""
    tables = {
        key.removesuffix("biases") + "bias_idxs": torch.zeros(4, 4).long() for key in state if key.endswith("_biases")
    }
    assert tables
    return {"model": {**state, **tables}}


def without_unit_kernels(state: State, model: nn.Module) -> Any:
    return with_bias_tables({key: value for key, value in state.items() if ".mixer.conv1." not in key}, model)


def with_shifts(state: State, model: nn.Module) -> Any:
    """STViT: constant kernels in every attention over super tokens."""
    shifts = {}
    for key in state:
        if key.endswith("attn.stoken_refine.qkv.weight"):
            stem = key.removesuffix("stoken_refine.qkv.weight")
            shifts |= {f"{stem}{name}.weights": torch.eye(9).reshape(9, 1, 3, 3) for name in ("unfold", "fold")}
    assert shifts
    return in_model({**state, **shifts}, model)


def shvits_names(state: State, model: nn.Module) -> Any:
    """Stages are named blocks1 to blocks3; the pair before the merging, the merging and the pair behind it come
    first in the second and the third."""

    def renamed(key: str) -> str:
        found = re.match(r"stages\.(\d)\.(blocks|downsample)\.(\d+)\.(.*)", key)
        if found is None:
            return key
        stage, kind, number, rest = int(found[1]) + 1, found[2], int(found[3]), found[4]
        if kind == "blocks":
            return f"blocks{stage}.{number + (3 if stage > 1 else 0)}.{rest}"
        return f"blocks{stage}.{('0.0', '0.1', '1', '2.0', '2.1')[number]}.{rest}"

    return in_model({renamed(key): value for key, value in state.items()}, model)


def transformers_names(state: State, model: nn.Module) -> Any:
    """CvT as the transformers package names it."""
    words = {"q": "query", "k": "key", "v": "value"}
    renamed = {}
    for key, value in state.items():
        name = re.sub(r"^stage(\d)\.", r"cvt.encoder.stages.\1.", key)
        for ours, theirs in (
            (".patch_embed.proj.", ".embedding.convolution_embeddings.projection."),
            (".patch_embed.norm.", ".embedding.convolution_embeddings.normalization."),
            (".blocks.", ".layers."), (".norm1.", ".layernorm_before."), (".norm2.", ".layernorm_after."),
            (".attn.proj.", ".attention.output.dense."), (".mlp.fc1.", ".intermediate.dense."),
            (".mlp.fc2.", ".output.dense."),
        ):  # fmt: skip
            name = name.replace(ours, theirs)
        for letter, word in words.items():
            maps = f".attention.attention.convolution_projection_{word}.convolution_projection."
            name = name.replace(f".attn.conv_proj_{letter}.conv.", f"{maps}convolution.")
            name = name.replace(f".attn.conv_proj_{letter}.bn.", f"{maps}normalization.")
            name = name.replace(f".attn.proj_{letter}.", f".attention.attention.projection_{word}.")
        renamed[re.sub(r"^head\.", "classifier.", re.sub(r"^norm\.", "layernorm.", name))] = value
    return renamed


def fused(state: State, model: nn.Module) -> Any:
    return {"state_dict": reparameterize_model(model).state_dict()}


def merged(state: State, model: nn.Module) -> Any:
    return reparameterize_model(model).state_dict()


def with_numbers(state: State, model: nn.Module) -> Any:
    """TVConv: every layer's settings among its tensors."""
    numbers = {
        f"{path}.{name}": torch.tensor(3)
        for path, module in model.named_modules()
        if isinstance(module, TVConv2d)
        for name in ("TVConv_k", "TVConv_k_square", "stride", "channels", "h", "w")
    }
    assert numbers
    return {"state_dict": {**{f"module.{key}": value for key, value in {**state, **numbers}.items()}}}


def lgvits_names(state: State, model: nn.Module) -> Any:
    """LGViT: transformers' names; queries, keys and values apart; exits in each stage's ``highway``."""
    swin, distilled = hasattr(model, "layers"), hasattr(model, "head_dist")
    positions = model.exits.positions
    own = "cls_classifier." if distilled else "classifier."
    rules = (
        (r"^cls_token$", "deit.embeddings.cls_token"), (r"^dist_token$", "deit.embeddings.distillation_token"),
        (r"^pos_embed$", "deit.embeddings.position_embeddings"), (r"^blocks\.", "deit.encoder.layer."),
        (r"^patch_embed\.norm\.", "swin.embeddings.norm."),
        (r"^patch_embed\.proj\.", f"{'swin' if swin else 'deit'}.embeddings.patch_embeddings.projection."),
        (r"^norm\.", f"{'swin' if swin else 'deit'}.layernorm."), (r"^pooler\.", "deit.pooler.dense."),
        (r"^head\.(fc\.)?", own), (r"^head_dist\.", "distillation_classifier."),
        (r"^layers\.", "swin.encoder.layers."),
        (r"\.norm1\.", ".layernorm_before."), (r"\.norm2\.", ".layernorm_after."),
        (r"\.attn\.proj\.", ".attention.output.dense."), (r"\.attn\.rel", ".attention.self.rel"),
        (r"\.mlp\.fc1\.", ".intermediate.dense."), (r"\.mlp\.fc2\.", ".output.dense."),
    )  # fmt: skip
    renamed: State = {}
    for key, value in state.items():
        found = re.match(r"exits\.heads\.(\d+)\.(\w+)\.(.*)", key)
        if found is not None:
            position, part, rest = positions[int(found[1])], found[2], found[3]
            stage = position.split(".")[1]
            number = sum(1 for other in positions[: int(found[1])] if not swin or other.split(".")[1] == stage)
            part = {"mixer": "mlp", "norm": "classifier.layernorm", "distillation_classifier": part}.get(
                part, "classifier.classifier" if swin else own.removesuffix(".")
            )
            where = f"swin.encoder.layers.{stage}" if swin else "deit.encoder"
            renamed[f"{where}.highway.{number}.{part}.{rest}"] = value
            continue
        merging = re.match(r"layers\.(\d)\.downsample\.(.*)", key)
        if merging is not None:
            renamed[f"swin.encoder.layers.{int(merging[1]) - 1}.downsample.{merging[2]}"] = value
            continue
        if key == "exits.steps":
            continue
        name = key
        for pattern, theirs in rules:
            name = re.sub(pattern, theirs, name)
        if ".attn.qkv." in name:
            inside = ".attention.self." if swin else ".attention.attention."
            for word, third in zip(("query", "key", "value"), value.chunk(3), strict=True):
                renamed[name.replace(".attn.qkv.", f"{inside}{word}.")] = third
        else:
            renamed[name] = value
    if swin:
        renamed["swin.encoder.layers.0.blocks.0.attention.self.relative_position_index"] = torch.zeros(4, 4).long()
    return renamed


def perceivers_names(state: State, model: nn.Module) -> Any:
    """Dyn-Perceiver on a ResNet, in both an average and the weights themselves."""
    rules = (
        (r"^stem\.", "cnn_stem."), (r"^stages\.(\d)\.", lambda m: f"cnn_body_stage{int(m[1]) + 1}."),
        (r"^exchanges\.(\d)\.dwc\.", lambda m: f"dwc{int(m[1]) + 1}_x2z."),
        (r"^exchanges\.(\d)\.(x2z|z2x)\.", lambda m: f"cross_att{int(m[1]) + 1}_{m[2]}."),
        (r"^exchanges\.(\d)\.self_attention\.", lambda m: f"self_att{int(m[1]) + 1}."),
        (r"^exchanges\.(\d)\.(mixer|expander)\.", lambda m: f"token_{m[2]}.{int(m[1]) - 1}."),
        (r"^last_z2x\.", "last_cross_att_z2x."),
        (r"^(.*x2z|.*z2x)\.(attention|q_norm|kv_norm)\.", r"\1.cross_attn.\2."),
        (r"^(self_att\d\.\d+)\.(attention|norm)\.", r"\1.self_attn.\2."),
        (r"\.mlp\.norm\.", ".mlp.layernorm."),
        (r"^heads\.early\.", "early_classifier3."), (r"^heads\.late\.", "classifier_att."),
        (r"^heads\.maps\.", "classifier_cnn."), (r"^heads\.merged\.", "classifier_merge."),
        (r"^knowledge\.early\.", "isc3."), (r"^knowledge\.late\.", "isc4."),
    )  # fmt: skip
    renamed = {}
    for key, value in state.items():
        for pattern, theirs in rules:
            key = re.sub(pattern, theirs, key)  # type: ignore[arg-type]
        renamed[key] = value
    return beside_the_average(renamed, model)


@dataclass(frozen=True)
class File:
    """A published file of the network ``name``: its ending, ``layout`` (state dict and model to what is saved), the
    ``sizes`` of the small network that stands in, and an input's ``shape``."""

    name: str
    layout: Callable[[State, nn.Module], Any]
    sizes: Mapping[str, Any]
    ending: str = ".pth"
    shape: tuple[int, int, int] = (3, 32, 32)
    dropped: bool = False  # whether the file holds tensors that are no weights
    averaged: bool = False

    def __str__(self) -> str:
        return f"{self.name}, {self.layout.__name__}"


LSNET = {"embed_dim": (16, 16, 24, 32), "depth": (0, 2, 2, 2), "img_size": 96}
HORNET = {"dim": 8, "depths": (1, 1, 2, 1), "layer_scale": 0.5}
CVT = {"dims": (8, 12, 16), "heads": (1, 3, 2), "depths": (1, 1, 2)}
SHVIT = {"embed_dim": (16, 24, 32), "partial_dim": (4, 6, 8), "depth": (1, 2, 1)}
FFNET = {"dims": (8, 8, 16, 16), "depths": (1, 1, 2, 1), "stem_dim": 8}
UNIREP = {"dims": (8, 8, 16, 16), "depths": (1, 1, 2, 1), "kernel_sizes": (3, 7, (13, 3), 0)}
FACES = {"img_size": 32, "hidden": 4, "layers": 0, "embedding": 8, "most": 1}
INCEPTION = {"width": 1 / 16, "depths": (1, 1, 1), "drop_rate": 0.0}
SR = {"dim": 8, "depth": 2}
STVIT = {
    "dims": (8, 8, 16, 16), "depths": (1, 1, 1, 1), "num_heads": (1, 2, 2, 4), "cells": (4, 2, 1, 1), "projection": 24,
}  # fmt: skip
CONVIT = {"img_size": 32, "patch_size": 8, "embed_dim": 4, "num_heads": 4, "depth": 3, "local_up_to_layer": 2}
CONVFIRST = {
    "widths": (8, 16, 16, 24), "depths": (1, 2, 1, 1), "expansions": (2, 2, 2, 3), "stem": 8, "head": 32,
}  # fmt: skip
LGVIT = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "num_heads": 2, "depth": 4, "exits": (1, 2, 3)}
LGSWIN = {
    "img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 8, "num_heads": (1, 2, 2, 4),
    "depths": (1, 1, 3, 1), "exits": (2, 3, 4),
}  # fmt: skip
FILES = (
    File("shvit_s1", shvits_names, SHVIT, shape=(3, 64, 64)),
    File("shvit_s1_distilled", shvits_names, SHVIT, shape=(3, 64, 64)),
    File("stvit_small", with_shifts, STVIT, dropped=True),
    File("inceptionnext_tiny", plain, {"dims": (8, 16, 16, 24), "depths": (1, 1, 2, 1), "ls_init_value": 0.5},
         shape=(3, 64, 64)),
    File("lsnet_t", with_bias_tables, LSNET, shape=(3, 96, 96), dropped=True),
    File("lsnet_t_distill", with_bias_tables, LSNET, shape=(3, 96, 96), dropped=True),
    File("lsnet_b_distill", without_unit_kernels, LSNET, shape=(3, 96, 96), dropped=True),
    File("unireplknet_a", plain, UNIREP),
    File("unireplknet_s", in_model, UNIREP),
    File("unireplknet_t", merged, UNIREP),
    File("ffnet_1", in_state_dict, FFNET, ".pth.tar", (3, 45, 38)),
    File("ffnet_3", in_state_dict, {**FFNET, "ls_init_value": 1.0}, ".pth.tar", (3, 45, 38)),
    File("ffnet_2", fused, FFNET, ".pth.tar", (3, 45, 38)),
    File("hornet_tiny_7x7", beside_the_average, HORNET, shape=(3, 64, 64), averaged=True),
    File("hornet_tiny_gf", beside_the_average, HORNET, shape=(3, 64, 64), averaged=True),
    File("convit_tiny", plain, CONVIT),
    File("cvt_13_224", plain, CVT),
    File("cvt_13_224", transformers_names, CVT, ".bin"),
    File("inception_resnet_v1_facenet", plain, INCEPTION, ".pt", (3, 96, 96)),
    File("mobilenet_v2_x0_1_tvconv", with_numbers, FACES, dropped=True),
    File("convfirst_t", in_model, CONVFIRST, shape=(3, 64, 64)),
    File("light_cnn", in_model, {}, ".pt", (1, 28, 28)),
    File("lgvit_vit_base", lgvits_names, LGVIT),
    File("lgvit_deit_small", lgvits_names, LGVIT, ".bin"),
    File("lgvit_swin_base", lgvits_names, LGSWIN, dropped=True),
    File("resnet18_perceiver_t128", perceivers_names, {"latents": 8, "depths": (1, 1, 1, 1)}, shape=(3, 64, 64),
         averaged=True),
)  # fmt: skip
ONE_A_FAMILY = tuple({file.name.split("_")[0]: file for file in FILES}.values())
ENLARGING = File("ffnetsr_light_x2", lambda state, model: {"params_ema": state}, SR)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Callable[[File], None]:
    """Makes a small network answer to a file's name, whoever builds it."""

    def put(file: File) -> None:
        entrypoints = timm.models._registry._model_entrypoints
        monkeypatch.setitem(entrypoints, file.name, functools.partial(timm.model_entrypoint(file.name), **file.sizes))

    return put


def trained(file: File, **arguments: Any) -> nn.Module:
    """A network whose statistics are not those that a norm starts with."""
    torch.manual_seed(0)
    model = create_model(file.name, **arguments)
    channels = arguments.get("in_chans", file.shape[0])
    return settle(model, images(4, channels, *file.shape[1:]))


def held(file: File, model: nn.Module) -> Any:
    return file.layout(dict(model.state_dict()), model)


def innermost(found: Any) -> State:
    """The state dict in what a publisher saves, without the prefix of a wrapper."""
    while not all(isinstance(value, torch.Tensor) for value in found.values()):
        found = next(found[key] for key in ("model_ema", "params_ema", "model", "state_dict") if key in found)
    return {key.removeprefix("module."): value for key, value in found.items()}


def answer(model: nn.Module, file: File, channels: int | None = None) -> torch.Tensor:
    with torch.no_grad():
        found = model.eval()(images(2, channels or file.shape[0], *file.shape[1:], seed=1))
    return found[0] if isinstance(found, tuple) else found


# Converting


@pytest.mark.parametrize("file", FILES, ids=str)
def test_published_files_become_the_networks_own(
    file: File, stand_in: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in(file)
    model = trained(file, num_classes=7)
    path, out = tmp_path / f"published{file.ending}", tmp_path / "published.safetensors"
    torch.save(held(file, model), path)
    assert main(["convert", str(path), "--arch", file.name, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["network"], said["classes"], said["in_chans"]) == (file.name, 7, file.shape[0])
    assert (bool(said["dropped"]), said["averaged"], said["out"]) == (file.dropped, file.averaged, str(out))

    loaded = load_model(out, arch=file.name)
    wanted = from_published(file.name, innermost(held(file, model)))
    assert said["parameters"] == sum(p.numel() for p in wanted.parameters())
    want, got = answer(wanted, file), answer(loaded.model, file)
    assert torch.equal(got, want)
    if file.layout is not without_unit_kernels:
        assert torch.allclose(want, answer(model, file), atol=1e-4, rtol=1e-4)
    with safe_open(out, "pt") as tensors:
        assert set(tensors.keys()) == set(wanted.state_dict())  # timm's layout: the network's own names
        noted = tensors.metadata()
    assert (noted["network"], noted["lissom"]) == (file.name, lissom.__version__)
    assert noted["source_sha256"] == sha256(path)
    assert load_model(out).name == file.name  # the file says itself what it is
    if file.layout not in (fused, merged):  # timm builds the trained form
        assert torch.equal(answer(timm.create_model(file.name, num_classes=7, checkpoint_path=str(out)), file), want)


def test_a_network_without_classes(stand_in: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stand_in(ENLARGING)
    model = create_model(ENLARGING.name)
    torch.save(held(ENLARGING, model), tmp_path / "sr.pth")
    assert main(["convert", str(tmp_path / "sr.pth"), "--arch", ENLARGING.name]) == 0
    out = capsys.readouterr().out
    assert "params_ema: the average of the weights" in out
    assert " parameters, 3 input channels\n" in out
    loaded = load_model(tmp_path / "sr.safetensors", arch=ENLARGING.name).model
    assert torch.equal(answer(loaded, ENLARGING), answer(model, ENLARGING))


def test_other_channels_are_the_files(stand_in: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = File("lsnet_t", with_bias_tables, LSNET, shape=(3, 96, 96))
    stand_in(file)
    model = trained(file, num_classes=3, in_chans=1)
    torch.save(held(file, model), tmp_path / "grey.pth")
    assert main(["convert", str(tmp_path / "grey.pth"), "--arch", file.name]) == 0
    assert "3 classes, 1 input channel\n" in capsys.readouterr().out
    loaded = load_model(tmp_path / "grey.safetensors").model
    assert torch.equal(answer(loaded, file, 1), answer(model, file, 1))


@needs_parity
@pytest.mark.parametrize(
    ("system", "name"),
    [
        ("fit", "fit_encoder_24241"),
        ("tvconv", "mobilenet_v2_x0_1_base"),
        *(
            pytest.param(system, name, marks=pytest.mark.full)
            for system, name in (
                ("shvit", "shvit_s1"), ("svit", "stvit_small"), ("inceptionnext", "inceptionnext_atto"),
                ("lsnet", "lsnet_t"), ("lsnet", "lsnet_s_distill"), ("unireplknet", "unireplknet_a"),
                ("metamixer", "ffnet_1"), ("hornet", "hornet_tiny_7x7"), ("hornet", "hornet_tiny_gf"),
                ("convit", "convit_tiny"), ("cvt", "cvt_13_224"), ("inception_v4", "inception_v4"),
                ("inception_v4", "inception_resnet_v1_facenet"), ("tvconv", "mobilenet_v2_x0_1_tvconv"),
            )
        ),
    ],
)  # fmt: skip
def test_files_of_the_published_names_and_sizes(
    system: str, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own, figures = parity(), fixture(system, name)
    arch = "fit_encoder" if system == "fit" else figures["variant"]
    whole = set(figures.get("int_keys") or ())
    state = {
        key: torch.zeros(shape, dtype=torch.long if key in whole or key.endswith("batches_tracked") else torch.float32)
        for key, shape in figures["keys"].items()
    }
    fixed = (*figures["skip"], *whole)
    own.fill_({key: value for key, value in state.items() if not key.endswith(fixed or "\0")},
              rule=figures.get("fill", ""))  # fmt: skip
    path = tmp_path / "published.pth"
    torch.save({"model": state, "args": ARGS}, path)
    assert main(["convert", str(path), "--arch", arch, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["parameters"] == figures["params"]
    assert set(said["dropped"]) <= {key for key in state if key.endswith(fixed or "\0")}
    wanted, got = from_published(arch, state).state_dict(), load_model(said["out"], arch=arch).model
    assert all(torch.equal(value, wanted[key]) for key, value in got.state_dict().items())
    shape = tuple(figures["input"])
    if figures["mode"] == "train":
        own.batch_statistics_(got)
    if figures["mode"] == "calibrated":
        own.calibrate_(got, own.make_input((8, *shape[1:]), "calibration"))
    with torch.no_grad():
        answers = got(own.make_input(shape))
    if isinstance(answers, torch.Tensor):
        assert own.close(own.digest(answers), figures["output"], 1e-3)


# What is refused


def foreign(state: State) -> tuple[State, str]:
    return {**state, "tail.weight": torch.zeros(2)}, r"1 unknown: tail\.weight$"


def missing(state: State) -> tuple[State, str]:
    key = [k for k, v in state.items() if k.endswith(".weight") and v.ndim == 4 and v.shape[0] > 4][-1]
    return {k: v for k, v in state.items() if k != key}, "do not fit .*1 missing: "


def misshapen(state: State) -> tuple[State, str]:
    key = next(k for k, v in state.items() if v.ndim == 1 and v.is_floating_point() and len(v) > 2)
    return {**state, key: state[key][1:]}, r"do not fit .*of another shape: \S+ is \(\d+,\), wanted \(\d+,\)"


@pytest.mark.parametrize("fault", [foreign, missing, misshapen])
@pytest.mark.parametrize("file", ONE_A_FAMILY, ids=str)
def test_weights_that_do_not_fit(
    file: File, fault: Any, stand_in: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in(file)
    state, words = fault(innermost(held(file, create_model(file.name))))
    torch.save({"model": state}, tmp_path / "w.pth")
    assert main(["convert", str(tmp_path / "w.pth"), "--arch", file.name]) == 2
    out, err = capsys.readouterr()
    assert re.search(words, err.strip()), err
    assert (out, err.count("\n")) == ("", 1)
    assert [p.name for p in tmp_path.iterdir()] == ["w.pth"]


# timm's own loader


LOADED = tuple(
    file for file in FILES if file.name not in ("shvit_s1", "convit_tiny", "light_cnn", "convfirst_t")
    and file.layout not in (fused, merged, beside_the_average)
)  # fmt: skip


@pytest.mark.parametrize("file", LOADED, ids=str)
def test_timms_loader_reads_published_files(file: File, stand_in: Any, tmp_path: Path) -> None:
    """With ``pretrained=True`` and a local file: timm hands it to the family's ``checkpoint_filter_fn``."""
    stand_in(file)
    classes = timm.get_pretrained_cfg(file.name).num_classes
    model = trained(file, num_classes=classes)
    path = tmp_path / f"w{file.ending}"
    torch.save(held(file, model), path)
    arguments: dict[str, Any] = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(path)}}
    got = answer(create_model(file.name, **arguments), file)
    wanted = from_published(file.name, innermost(held(file, model)))
    assert torch.equal(got, answer(wanted, file))
    other = create_model(file.name, num_classes=3, **arguments)
    assert answer(other, file).shape == (2, 3)  # timm leaves the head out, and takes the rest


class Hub:
    """Stands in the place of the hub's client: keeps what was asked for, and answers with local files."""

    def __init__(self, files: Mapping[tuple[str, str], Path]) -> None:
        self.files, self.asked = files, []

    def __call__(self, repo_id: str, filename: str, **_: Any) -> str:
        from huggingface_hub.errors import EntryNotFoundError

        self.asked.append((repo_id, filename))
        if (repo_id, filename) not in self.files:
            raise EntryNotFoundError(f"no {filename} in {repo_id}")
        return str(self.files[repo_id, filename])


HUB = {
    **{name: ("jameslahm/lsnet", f"{name}.pth") for name in
       ("lsnet_t", "lsnet_s", "lsnet_b", "lsnet_t_distill", "lsnet_s_distill", "lsnet_b_distill")},
    "unireplknet_a": ("DingXiaoH/UniRepLKNet", "unireplknet_a_in1k_224_acc77.03.pth"),
    "unireplknet_s": ("DingXiaoH/UniRepLKNet", "unireplknet_s_in1k_224_acc83.91.pth"),
    "unireplknet_s.in22k_ft_in1k_384": ("DingXiaoH/UniRepLKNet", "unireplknet_s_in22k_to_in1k_384_acc86.44.pth"),
    "unireplknet_xl": ("DingXiaoH/UniRepLKNet", "unireplknet_xl_in22k_to_in1k_384_acc87.96.pth"),
    "cvt_13_224": ("microsoft/cvt-13", "pytorch_model.bin"),
    "cvt_13_384.in22k_ft_in1k": ("microsoft/cvt-13-384-22k", "pytorch_model.bin"),
    "cvt_w24_384": ("microsoft/cvt-w24-384-22k", "pytorch_model.bin"),
    "inceptionnext_tiny": ("timm/inception_next_tiny.sail_in1k", "pytorch_model.bin"),
}  # fmt: skip
URLS = {
    "ffnet_1": "ffnet_1.pth.tar",
    "ffnet_3.in1k_384": "ffnet_3_384.pth.tar",
    "ffnet_4": "ffnet_4_384.pth.tar",
    "inception_resnet_v1_facenet": "20180402-114759-vggface2.pt",
    "inception_resnet_v1_facenet.casia_webface": "20180408-102900-casia-webface.pt",
}
LAYOUTS = {
    "lsnet": (with_bias_tables, LSNET), "unireplknet": (in_model, UNIREP), "cvt": (transformers_names, CVT),
    "inceptionnext": (plain, FILES[3].sizes), "ffnet": (in_state_dict, FFNET), "inception": (plain, INCEPTION),
}  # fmt: skip


def published_as(name: str) -> File:
    layout, sizes = LAYOUTS[name.split("_")[0]]
    return File(name.partition(".")[0], layout, sizes, shape=(3, 96, 96))


def fetched(file: File, name: str, path: Path) -> nn.Module:
    """Writes the file that the source of ``name`` would give; returns the network it holds."""
    model = trained(file, num_classes=timm.get_pretrained_cfg(name).num_classes)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(held(file, model), path)
    return model


@pytest.mark.parametrize("name", HUB)
def test_where_a_hub_keeps_the_weights(name: str) -> None:
    found = timm.get_pretrained_cfg(name)
    assert (found.hf_hub_id, found.hf_hub_filename or "pytorch_model.bin") == HUB[name]
    assert timm.models.is_model_pretrained(name)


@pytest.mark.parametrize("name", ["lsnet_t", "lsnet_b_distill", "unireplknet_s.in22k_ft_in1k_384", "cvt_13_224",
                                  "cvt_13_384.in22k_ft_in1k", "inceptionnext_tiny"])  # fmt: skip
def test_pretrained_networks_of_a_hub(
    name: str, stand_in: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = published_as(name)
    stand_in(file)
    model = fetched(file, name, tmp_path / "w.bin")
    hub = Hub({HUB[name]: tmp_path / "w.bin"})
    monkeypatch.setattr("timm.models._hub.hf_hub_download", hub)
    got = create_model(name, pretrained=True)
    assert hub.asked[-1] == HUB[name]
    assert {repository for repository, _ in hub.asked} == {HUB[name][0]}
    assert torch.equal(answer(got, file), answer(model, file))
    hub.files = {}
    with pytest.raises(LissomError, match=r"could not be fetched \(EntryNotFoundError"):
        create_model(name, pretrained=True)


@pytest.mark.parametrize("name", URLS)
def test_pretrained_networks_of_a_release(
    name: str, stand_in: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))  # the file lies where torch keeps what it has fetched
    file = published_as(name)
    stand_in(file)
    model = fetched(file, name, tmp_path / "hub" / "checkpoints" / URLS[name])
    got = create_model(name, pretrained=True)
    assert torch.equal(answer(got, file), answer(model, file))


def test_a_published_file_that_cannot_be_read_is_one_sentence(
    stand_in: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = published_as("lsnet_t")
    stand_in(file)
    torch.save({"model": {"a": torch.zeros(1)}}, tmp_path / "w.pth")
    monkeypatch.setattr("timm.models._hub.hf_hub_download", Hub({HUB["lsnet_t"]: tmp_path / "w.pth"}))
    with pytest.raises(LissomError, match=r"weights of lsnet_t could not be read \(RuntimeError: Error.*LSNet"):
        create_model("lsnet_t", pretrained=True)


@pytest.mark.parametrize("name", ["hornet_tiny_7x7", "stvit_base", "shvit_s1_distilled", "convit_tiny_local0",
                                  "convfirst_t", "light_cnn", "mobilenet_v2_x0_1_base", "fit_encoder"])  # fmt: skip
def test_networks_without_files_to_fetch(name: str) -> None:
    with pytest.raises(LissomError, match=f"no published weights for {name}; give a weight file"):
        create_model(name, pretrained=True)
