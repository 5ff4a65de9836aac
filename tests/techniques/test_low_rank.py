"""low_rank: what it replaces and leaves, its text, what it asks of the training, and what it lets the device decide."""

from __future__ import annotations

import copy
import importlib.util
import os
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torch import nn

from lissom.errors import LissomError, NotApplicable
from lissom.export.capture import run_eager
from lissom.export.exporting import export_plan, run_artifact
from lissom.export.plan import Plan, Precision
from lissom.layers.low_rank import LowRankLayer, merge_low_rank, thin_layers
from lissom.meters.measurement import Measurement
from lissom.runtime.artifact import Artifact
from lissom.runtime.target import Target
from lissom.search.recipes import RecipeSpace
from lissom.tasks.task import Task
from lissom.techniques import probes
from lissom.techniques.low_rank import LowRank
from lissom.techniques.probes import layer_probe
from lissom.techniques.recipe import Recipe
from lissom.training.methods.pela import FeatureMSE, Perturbation, Retrained


def task_of(*shape: int) -> Task:
    return Task(choose=None, report=None, shape=shape)  # type: ignore[arg-type]


SMALL = task_of(3, 32, 32)


@pytest.fixture(scope="module")
def vit() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 2, "num_classes": 12}
    return timm.create_model("vit_tiny_patch16_224", **sizes).eval()


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("resnet14t", channels=(16, 24, 32, 48), num_classes=12).eval()


def thin_paths(model: nn.Module) -> set[str]:
    return {path for path, m in model.named_modules() if isinstance(m, LowRankLayer)}


KINDS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")


# What is replaced


def test_a_vision_transformer(vit):
    x = torch.randn(2, 3, 32, 32)
    before = run_eager(vit, x)
    plan = LowRank().apply(Plan.of(vit), SMALL)
    assert thin_paths(plan.model) == {f"blocks.{i}.{kind}" for i in range(3) for kind in KINDS}
    assert plan.model.blocks[0].attn.qkv.rank == 18  # 48 * 144 // (2 * 192)
    assert torch.equal(run_eager(vit, x), before)
    assert not thin_paths(vit)
    assert plan.notes == ("low_rank put two thin layers in the place of 12 of 13 linear layers and 1x1 convolutions; "
                          "left alone: head (the classifier)",)  # fmt: skip
    (features,) = plan.recovery
    assert features == FeatureMSE(("blocks.0", "blocks.1", "blocks.2"), 1.0)
    merged = merge_low_rank(copy.deepcopy(plan.model))
    assert torch.allclose(run_eager(merged, x), run_eager(plan.model, x), atol=1e-4)


def test_a_convolutional_network(resnet):
    plan = LowRank(features="last").apply(Plan.of(resnet), task_of(3, 64, 64))
    assert thin_paths(plan.model) == {f"layer{i}.0.conv{j}" for i in range(1, 5) for j in (1, 3)}
    assert "downsample" in plan.notes[0]
    assert plan.recovery == (FeatureMSE(("layer4.0",), 1.0),)
    assert run_eager(plan.model, torch.randn(1, 3, 64, 64)).shape == (1, 12)


def test_a_checkpoint_of_the_changed_model_comes_back(vit):
    technique = LowRank(ratio=3.0)
    first, second = (technique.apply(Plan.of(vit), SMALL).model for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    second.load_state_dict(first.state_dict())


def test_the_exported_graph_answers_as_the_model(tmp_path):
    model = nn.Sequential(nn.Conv2d(16, 24, 1, 2), nn.GELU(), nn.Flatten(2), nn.Linear(16, 32), nn.Linear(32, 12))
    plan = LowRank().apply(Plan.of(model.eval()), task_of(16, 8, 8))
    assert thin_paths(plan.model) == {"0", "3"}
    x = torch.randn(3, 16, 8, 8)
    artifact = export_plan(plan, Target("openvino", batch=3), tmp_path / "a", shape=(16, 8, 8), verify=x.numpy())
    answers = run_artifact(artifact, x.numpy(), 1)
    assert np.allclose(answers, run_eager(plan.model, x).numpy(), atol=1e-4)


def test_knobs_decide_which_layers_and_ranks(vit):
    def thin(**knobs) -> set[str]:
        return thin_paths(LowRank(**knobs).apply(Plan.of(vit), SMALL).model)

    assert thin(skip=("blocks.0", "attn.proj", "mlp", "head")) == {"blocks.1.attn.qkv", "blocks.2.attn.qkv"}
    assert "head" in thin(skip=())  # a given skip takes the place of the classifier's protection too
    assert thin(skip=("blocks.1", "head")) == {f"blocks.{i}.{kind}" for i in (0, 2) for kind in KINDS}
    plan = LowRank(ranks=(("blocks.0.mlp.fc1", 5), ("head", 3)), skip=("blocks",)).apply(Plan.of(vit), SMALL)
    assert thin_paths(plan.model) == {"blocks.0.mlp.fc1", "head"}
    assert plan.model.blocks[0].mlp.fc1.rank == 5


def test_an_entry_that_is_a_modules_path_means_no_other():
    model = nn.Sequential()
    for name in ("fc", "fc1", "fc2"):
        model.add_module(name, nn.Linear(24, 24))
    model.add_module("out", nn.Linear(24, 3))
    task = task_of(24)
    assert thin_paths(LowRank(skip=("fc",)).apply(Plan.of(model), task).model) == {"fc1", "fc2"}
    assert thin_paths(LowRank(skip=("c1",)).apply(Plan.of(model), task).model) == {"fc", "fc2"}  # out: 3 outputs
    wide = nn.Sequential(nn.Linear(24, 24), nn.Linear(24, 40))
    assert thin_paths(LowRank().apply(Plan.of(wide), task).model) == {"0"}  # the last layer classifies


class Reader(nn.Module):
    """Multiplies by one layer's weight itself, calls a second, and a third in training only."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(24, 2, batch_first=True)
        self.read, self.called, self.helper = nn.Linear(24, 24), nn.Linear(24, 24), nn.Linear(24, 24)
        self.out = nn.Linear(24, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.linear(self.attention(x, x, x)[0], self.read.weight)
        x = self.called(x)
        return self.out(self.helper(x) if self.training else x)


def test_layers_that_are_not_called_stay_and_are_told():
    model = Reader().eval()
    plan = LowRank().apply(Plan.of(model), task_of(5, 24))
    assert thin_paths(plan.model) == {"called"}
    assert "read, helper (not called)" in plan.notes[0]
    assert "attention.out_proj (nn.MultiheadAttention reads its weight without calling it)" in plan.notes[0]
    with pytest.raises(NotApplicable, match="'read', which the model never calls"):
        LowRank(ranks=(("read", 2),)).apply(Plan.of(model), task_of(5, 24))


def test_a_transformers_model_by_its_public_structure():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.ViTConfig(image_size=32, patch_size=8, hidden_size=48, num_hidden_layers=2,
                                    num_attention_heads=2, intermediate_size=96, num_labels=12)  # fmt: skip

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = transformers.ViTForImageClassification(config)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.model(x).logits

    plan = LowRank().apply(Plan.of(Logits().eval()), SMALL)
    assert len(thin_paths(plan.model)) == 12
    assert len(plan.recovery[0].blocks) == 2


# Ratios layer by layer


def thin_ranks(plan: Plan) -> dict[str, int]:
    return {path: m.rank for path, m in plan.model.named_modules() if isinstance(m, LowRankLayer)}


def test_kinds_and_layers_have_ratios_of_their_own(vit):
    ratios = (("attn", 1), ("blocks.1", 3.0), ("blocks.1.mlp.fc2", 4.0))
    plan = LowRank(ratios=ratios).apply(Plan.of(vit), SMALL)
    ranks = thin_ranks(plan)
    assert set(ranks) == {f"blocks.{i}.mlp.{kind}" for i in range(3) for kind in ("fc1", "fc2")} | {
        "blocks.1.attn.qkv", "blocks.1.attn.proj",
    }  # fmt: skip
    assert (ranks["blocks.0.mlp.fc1"], ranks["blocks.1.mlp.fc1"], ranks["blocks.1.mlp.fc2"]) == (19, 12, 9)
    assert "blocks.0.attn.qkv, blocks.0.attn.proj, blocks.2.attn.qkv, blocks.2.attn.proj (in ratios)" in plan.notes[0]
    exact = LowRank(ratios=(("mlp", 4.0),), ranks=(("blocks.0.mlp.fc1", 7),)).apply(Plan.of(vit), SMALL)
    assert thin_ranks(exact)["blocks.0.mlp.fc1"] == 7
    with pytest.raises(NotApplicable, match="ratio for 'mpl'"):
        LowRank(ratios=(("mpl", 4.0),)).check(Plan.of(vit), Target())


def test_singular_values_spread_the_ratio(vit):
    model = copy.deepcopy(vit)
    with torch.no_grad():  # one layer of rank 4, which loses nothing by being thin
        fc1 = model.blocks[0].mlp.fc1
        fc1.weight.copy_(fc1.weight[:, :4] @ fc1.weight[:4])
    technique = LowRank(ratio=2.0, spread="energy")
    technique.check(Plan.of(model), Target())
    plan, even = technique.apply(Plan.of(model), SMALL), LowRank().apply(Plan.of(model), SMALL)
    assert "by their singular values: " in plan.notes[1]
    ranks = thin_ranks(plan)
    assert ranks["blocks.0.mlp.fc1"] == 9  # ratio 4
    assert len(set(ranks.values())) > 2

    def parameters(plan: Plan) -> int:
        return sum(p.numel() for p in plan.model.parameters())

    assert parameters(plan) <= parameters(even)
    # Whatever has a ratio of its own is no part of what is spread.
    fixed = replace(technique, ratios=(("mlp.fc1", 3.0),)).apply(Plan.of(model), SMALL)
    assert {r for path, r in thin_ranks(fixed).items() if path.endswith("fc1")} == {12}


def test_settle_writes_the_spread_ratios_of_what_is_faster(vit):
    calls = []

    def probe(pairs):
        calls.append(len(pairs))
        return [0.9 if layer.weight.shape == (48, 48) else 1.5 for layer, _, _ in pairs]

    technique = LowRank(ratio=2.0, spread="energy")
    settled = technique.settle(Plan.of(vit), SMALL, probe)
    assert max(calls) <= 8
    assert Recipe.parse(str(settled)).techniques == (settled,)
    assert {f"blocks.{i}.attn.proj" for i in range(3)} < set(settled.skip)
    assert {path for path, _ in settled.ratios} | set(settled.skip) == {
        *(f"blocks.{i}.{kind}" for i in range(3) for kind in KINDS), "head",
    }  # fmt: skip
    before, after = (thin_ranks(t.apply(Plan.of(vit), SMALL)) for t in (technique, settled))
    assert after == {path: rank for path, rank in before.items() if not path.endswith("attn.proj")}
    # Behind a technique that makes layers narrower the ratios stay what they are.
    narrower = Recipe.parse(f"crop(keep=0.7) + {settled}").apply(Plan.of(vit, (3, 32, 32)), SMALL, Target())
    assert set(thin_ranks(narrower)) == set(after)


def test_a_search_tries_ratios_kind_by_kind(vit, resnet):
    space = LowRank.space(Plan.of(vit), Target())
    assert [name for name, _ in space["ratios"].items] == list(KINDS)
    assert [name for name, _ in LowRank.space(Plan.of(resnet), Target())["ratios"].items] == [".conv1", "conv3"]
    rng = random.Random(0)
    drawn = [LowRank(ratio=3.0, ratios=space["ratios"].draw(rng)) for _ in range(20)]
    for technique in drawn:
        assert Recipe.parse(str(technique)).techniques == (technique,)
        if {ratio for _, ratio in technique.ratios} != {1.0} or len(technique.ratios) < len(KINDS):
            ranks = thin_ranks(technique.apply(Plan.of(vit), SMALL))
            whole = {kind for kind, ratio in technique.ratios if ratio == 1}
            assert not any(path.endswith(kind) for path in ranks for kind in whole)
    assert len(set(drawn)) > 15
    search = RecipeSpace(["low_rank"], Plan.of(vit), Target())
    vector = np.array([1, 2, 1, 5])
    recipe = search.decode(vector)
    assert recipe.techniques[0].spread == "energy"
    assert recipe.techniques[0].ratios
    assert search.encode(recipe).tolist() == vector.tolist()
    # "fc" is a part of "fc1" too, so that each layer is named by itself.
    blocks = [nn.ModuleDict({"fc": nn.Linear(24, 24), "fc1": nn.Linear(24, 24)}) for _ in range(2)]
    named = nn.ModuleDict({**{str(i): block for i, block in enumerate(blocks)}, "out": nn.Linear(24, 12)})
    assert [name for name, _ in LowRank.space(Plan.of(named), Target())["ratios"].items] == ["0.fc", "1.fc", "fc1"]
    empty = LowRank.space(Plan.of(nn.Sequential(nn.Conv2d(3, 8, 3))), Target())
    assert empty["ratios"].items == ()


# What it asks of the training


def test_terms_follow_the_knobs(vit):
    def terms(**knobs) -> tuple:
        return LowRank(**knobs).apply(Plan.of(vit), SMALL).recovery

    assert terms(features="last", feature_weight=0.1) == (FeatureMSE(("blocks.2",), 0.1),)
    assert terms(features="none") == (Retrained(),) == terms(feature_weight=0.0)
    features, perturbation = terms(perturbation_weight=0.5, eps=0.0)
    assert isinstance(features, FeatureMSE)
    assert isinstance(perturbation, Perturbation)
    assert (perturbation.weight, perturbation.eps) == (0.5, 0.0)
    assert set(perturbation.originals) == {f"blocks.{i}.{kind}" for i in range(3) for kind in KINDS}
    assert torch.equal(perturbation.originals["blocks.1.mlp.fc1"], vit.blocks[1].mlp.fc1.weight)
    plan = LowRank().apply(Plan.of(nn.Sequential(nn.Linear(24, 24), nn.Linear(24, 24))), task_of(24))
    assert plan.recovery == (Retrained(),)
    assert "no repeated blocks" in plan.notes[1]


# What it refuses


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("low_rank(ratio=0.5)", "at least 1"),
        ("low_rank(ratio='2')", "at least 1"),
        ("low_rank(skip='head')", "tuple"),
        ("low_rank(skip=('',))", "tuple"),
        ("low_rank(ranks=('blocks.0', 3))", "tuple of"),
        ("low_rank(ranks=(('blocks.0', 0),))", "tuple of"),
        ("low_rank(ranks=(('a', 3), ('a', 4)))", "twice"),
        ("low_rank(spread='wide')", "'even' or 'energy'"),
        ("low_rank(ratios=('mlp', 3))", "tuple of"),
        ("low_rank(ratios=(('mlp', 0.5),))", "at least 1"),
        ("low_rank(ratios=(('mlp', 2), ('mlp', 3)))", "twice in ratios"),
        ("low_rank(features='some')", "'last'"),
        ("low_rank(eps=-1)", "at least 0"),
    ],
)
def test_wrong_knobs_are_told(text, says):
    with pytest.raises(LissomError, match=says):
        Recipe.parse(text)


@pytest.mark.parametrize(
    "text",
    ["low_rank()", "low_rank(ratio=3.0, skip=('head', 'blocks.0'))", "low_rank(ranks=(('blocks.0.mlp.fc1', 5),))"],
)
def test_text_and_back(text):
    assert str(Recipe.parse(text)) == text


def test_where_nothing_can_be_replaced(vit):
    def refusal(model: nn.Module, technique: LowRank) -> str:
        with pytest.raises(NotApplicable) as caught:
            technique.check(Plan.of(model), Target())
        return str(caught.value)

    plain = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 10))
    assert "finds none that it may; left alone: 3 (the classifier)" in refusal(plain, LowRank())
    assert "the model has none" in refusal(nn.Sequential(nn.Conv2d(3, 8, 3)), LowRank())
    assert "blocks.0.attn.qkv" in refusal(vit, LowRank(skip=("blocks", "head")))
    assert "no module's path contains" in refusal(vit, LowRank(skip=("hed",)))
    assert "'blocks.9': the model has no" in refusal(vit, LowRank(ranks=(("blocks.9", 3),)))
    assert "rank 49; it has at most 48" in refusal(vit, LowRank(ranks=(("blocks.0.attn.proj", 49),)))
    attention = nn.Sequential(nn.MultiheadAttention(8, 2), nn.Linear(8, 12))
    assert "reads its weight" in refusal(attention, LowRank(ranks=(("0.out_proj", 2),)))
    with pytest.raises(LissomError, match=r"does not take inputs of shape \(1, 7, 7\)"):
        LowRank().apply(Plan.of(vit), task_of(1, 7, 7))


def test_the_plain_cnn_has_shortcuts_to_replace():
    """Its 3x3 convolutions stay, and its head; its two 1x1 shortcuts are what the technique finds."""
    folder = os.environ.get("LISSOM_PARITY")
    if not folder or not (path := Path(folder).parent / "models" / "models.py").exists():
        pytest.skip("LISSOM_PARITY is not set, beside which a user's networks lie (models/models.py)")
    spec = importlib.util.spec_from_file_location("plain_models", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    plan = LowRank().apply(Plan.of(module.cnn().eval()), SMALL)
    assert thin_paths(plan.model) == {"blocks.3.short.0", "blocks.6.short.0"}
    assert plan.recovery == (FeatureMSE(tuple(f"blocks.{i}" for i in range(9))),)


# What the device decides


def test_each_kind_is_probed_once_and_what_is_not_faster_is_skipped(vit):
    probed = []

    def probe(pairs):
        probed.extend(pairs)
        return [0.8 if layer.weight.shape == (48, 48) else 1.02 if layer.out_features == 192 else 1.4
                for layer, _, _ in pairs]  # fmt: skip

    settled = LowRank(ratio=3.0).settle(Plan.of(vit), SMALL, probe)
    # 16 patches and a class token; the last number of weight.shape is the layer's input.
    assert [(tuple(layer.weight.shape), thin.rank, shape) for layer, thin, shape in probed] == [
        ((144, 48), 12, (17, 48)), ((48, 48), 8, (17, 48)), ((192, 48), 12, (17, 48)), ((48, 192), 12, (17, 192)),
    ]  # fmt: skip
    skip = (*(f"blocks.{i}.{kind}" for i in range(3) for kind in ("attn.proj", "mlp.fc1")), "head")
    assert settled == LowRank(ratio=3.0, skip=skip)
    assert Recipe.parse(str(settled)).techniques == (settled,)
    plan = settled.apply(Plan.of(vit), SMALL)
    assert thin_paths(plan.model) == {f"blocks.{i}.{kind}" for i in range(3) for kind in ("attn.qkv", "mlp.fc2")}
    assert settled.settle(Plan.of(vit), SMALL, lambda pairs: pytest.fail("decided already")) is settled
    assert not thin_paths(vit)


def test_convolutions_are_probed_at_their_size_and_stride(resnet):
    seen = {}

    def probe(pairs):
        for layer, thin, shape in pairs:
            seen[tuple(layer.weight.shape[:2]), shape] = (thin.rank, thin(torch.zeros(1, *shape)).shape)
        return [2.0] * len(pairs)

    settled = LowRank().settle(Plan.of(resnet), task_of(3, 64, 64), probe)
    # A stem of stride 4; in these blocks the second convolution has the stride.
    assert seen[(64, 16), (16, 16, 16)] == (6, (1, 64, 16, 16))
    assert seen[(24, 64), (64, 16, 16)] == (8, (1, 24, 16, 16))
    assert settled.skip == (*(f"layer{i}.0.downsample.1" for i in (2, 3, 4)), "fc")


def test_windows_in_the_batch_are_part_of_the_shape():
    class Windows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head = nn.Linear(24, 24), nn.Linear(24, 12)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.inner(x.reshape(4 * len(x), -1, 24)).reshape(len(x), -1, 24).mean(1))

    shapes = []
    LowRank().settle(Plan.of(Windows()), task_of(16, 24), lambda pairs: [shapes.append(p[2]) or 2.0 for p in pairs])
    assert shapes == [(4, 4, 24)]


def test_where_no_layer_is_faster(vit):
    with pytest.raises(NotApplicable, match=r"no layer is faster .* at best 0\.90x"):
        LowRank().settle(Plan.of(vit), SMALL, lambda pairs: [0.9] * len(pairs))
    pinned = (("blocks.0.mlp.fc1", 4),)
    settled = LowRank(ranks=pinned).settle(Plan.of(vit), SMALL, lambda pairs: [0.9] * len(pairs))
    assert thin_paths(settled.apply(Plan.of(vit), SMALL).model) == {"blocks.0.mlp.fc1"}


# The probe


class Clock:
    """A meter that tells a time by the size of an artifact's weights, and keeps what it was handed."""

    def __init__(self) -> None:
        self.shapes, self.bits = [], []

    def measure(self, artifacts, *, threads, seconds=2.0, memory=True):
        assert not memory
        assert not self.shapes  # all in one call
        self.shapes = [a.input_shape for a in artifacts]
        self.bits = [a.plan["precision"] for a in artifacts]
        sizes = [float((a.path / "stage0.bin").stat().st_size) for a in artifacts]
        return [Measurement(s, s, 1 / s, sizes[0] / s) for s in sizes]


def test_all_pairs_are_measured_in_one_call(monkeypatch):
    def export(plan, target, path, *, shape, calibration, recipe):
        assert calibration is None
        assert plan.precision == Precision({"": 32})
        path.mkdir()
        (path / "stage0.bin").write_bytes(bytes(sum(p.numel() for p in plan.model.parameters())))
        return Artifact(path, {"input": {"shape": [target.batch, *shape]}, "precision": {}})

    monkeypatch.setattr(probes, "export_plan", export)
    meter = Clock()
    probe = layer_probe(Target("openvino", batch=2), meter)
    assert probe([]) == []
    layers = [nn.Linear(64, 64, bias=False), nn.Conv2d(32, 64, 1, stride=2, bias=False)]
    pairs = [(layers[0], thin_layers(layers[0], 8), (9, 64)), (layers[1], thin_layers(layers[1], 4), (32, 8, 8))]
    ratios = probe(pairs)
    assert meter.shapes == [(2, 9, 64)] * 2 + [(2, 32, 8, 8)] * 2
    assert ratios == pytest.approx([64 * 64 / (8 * 128), 64 * 32 / (4 * 96)])


def test_int8_is_calibrated_and_both_forms_have_it():
    meter = Clock()
    layer = nn.Linear(48, 48)
    policy = Precision({"": 8, "1": 32, "head": 32}, {"model_type": None, "linear": "matmul"})
    (ratio,) = layer_probe(Target("openvino"), meter, policy)([(layer, thin_layers(layer, 8), (5, 48))])
    assert meter.bits == [{"": 8}, {"": 8}]  # what the policy says of other paths is not of the probe's modules
    assert ratio > 1.5


def test_a_ratio_is_taken_round_by_round_where_the_meter_does_so():
    paired = [Measurement(ms, ms, 1.0, speedup) for ms, speedup in ((8.0, 1.0), (5.0, 2.0))]
    assert probes._ratio(*paired) == 2.0
    plain = [replace(m, speedup=None) for m in paired]
    assert probes._ratio(*plain) == 1.6
    with pytest.raises(LissomError, match="told no time"):
        probes._ratio(plain[0], replace(plain[1], latency_ms=0.0))
