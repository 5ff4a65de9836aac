"""converting: what it makes of a network, what it asks of the training, what it refuses, and how it exports."""

from __future__ import annotations

import copy
import functools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torch import nn

from lissom.data.splits import ArraySplit
from lissom.errors import LissomError, NotApplicable
from lissom.export.exporting import export_plan, run_artifact
from lissom.export.plan import Plan, Precision
from lissom.images import Preprocessing
from lissom.layers.exits import attach_own_exits, exits_of
from lissom.meters.costs import layer_costs, total
from lissom.models.branchy_lenet import BranchyLeNet
from lissom.runtime.artifact import Artifact
from lissom.runtime.target import Target
from lissom.tasks.task import Task
from lissom.techniques.converting import Converting
from lissom.techniques.mue import SimilarityExit
from lissom.techniques.recipe import Recipe
from lissom.techniques.recovering import Recoverer
from lissom.training.loop import FitEvent, evaluate, fit
from lissom.training.methods.cbnet import Conversion, exit_entropy
from lissom.training.methods.recovery import Answers, Phase

TARGET = Target("openvino", "cpu", 1, 1)
SHAPE = (1, 12, 12)
SMALL = Converting(hidden=(48,), code=8)


def cnn() -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for i in range(6):
        layers += [nn.Conv2d(8 if i else 1, 8, 3, 2 if i == 2 else 1, 1), nn.BatchNorm2d(8), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).eval()


def vit() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=12, patch_size=3, in_chans=1, embed_dim=16, num_heads=2, depth=4, num_classes=4
    ).eval()


def lenet() -> nn.Module:
    torch.manual_seed(0)
    return BranchyLeNet(4, img_size=12, rest=(10, 20, 40)).eval()


def images(name: str, count: int, seed: int, labelled: bool = True) -> ArraySplit:
    """Bright rows, columns, fields of a chessboard or all of it, in noise; pixels from 0 to 1, normalised by 0.5 and
    0.25. An exit's head takes the mean over the image, so that classes differ in texture and not in place."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 4, count)
    x = rng.uniform(0, 0.4, (count, *SHAPE)).astype(np.float32)
    rows, columns = np.indices((12, 12)) % 2
    patterns = np.stack([rows, columns, rows ^ columns, np.ones((12, 12))]).astype(np.float32)
    x[:, 0] += 0.6 * patterns[y]
    return ArraySplit(name, (x - 0.5) / 0.25, y.astype(np.int64) if labelled else None)


def task(labelled: bool = True) -> Task:
    sizes = {"fit": 4096, "choose": 160, "report": 160}
    parts = {name: images(name, count, i, labelled) for i, (name, count) in enumerate(sizes.items())}
    known = Preprocessing(12, 12, 1, mean=(0.5,), std=(0.25,))
    return Task(**parts, shape=SHAPE, classes=tuple("abcd"), preprocessing=known, name="patterns")  # type: ignore[arg-type]


@pytest.mark.parametrize(("make", "head"), [(cnn, True), (vit, True), (lenet, False)])
def test_the_plan_is_an_autoencoder_and_the_networks_beginning(make, head) -> None:  # type: ignore[no-untyped-def]
    model, of = make(), task()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    plan = Plan.of(model, SHAPE)
    changed = SMALL.apply(plan, of)
    assert changed.model is not model
    assert exits_of(model) is None
    assert plan.recovery == plan.decisions == changed.decisions == ()
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    autoencoder, light = changed.model
    x = torch.from_numpy(of.choose.inputs(slice(0, 3)))
    with torch.no_grad():
        torch.testing.assert_close(changed.model(x), light(autoencoder(x)))
        assert changed.model(x).shape == (3, 4)
        torch.testing.assert_close(autoencoder.pixels(x), 0.25 * x + 0.5)
    assert [p.of for p in changed.recovery] == (["light"] if head else []) + ["", ""]
    assert all(isinstance(p, Phase) for p in changed.recovery)
    terms = [p.terms for p in changed.recovery]
    assert terms[-2:] == [(Conversion(),), (Answers(part="light"),)]
    assert [p.length for p in changed.recovery] == ([1.0] if head else []) + [3.0, 0.2]
    # The stem is the network's own, in its weights and in its names; only what comes before the exit is left.
    own = light.stem.state_dict()
    assert own
    assert all(torch.equal(before[k], v) for k, v in own.items())
    assert len(own) < len(before)
    again = SMALL.apply(plan, of).model.state_dict()
    assert all(torch.equal(again[k], v) for k, v in changed.model.state_dict().items())


def test_operations_add_up_and_are_the_same_for_all() -> None:
    changed = SMALL.apply(Plan.of(cnn(), SHAPE), task())
    autoencoder, light = changed.model
    macs = total(changed.model, SHAPE)[1]
    assert autoencoder.macs == 144 * 48 + 48 * 8 + 8 * 144
    assert macs == total(autoencoder, SHAPE)[1] + total(light, SHAPE)[1] == autoencoder.macs + total(light, SHAPE)[1]
    assert macs < total(cnn(), SHAPE)[1]
    paths = {cost.path for cost in layer_costs(changed.model, SHAPE) if cost.macs}
    assert {"autoencoder.encoder.0", "light.stem.0"} <= paths


def test_a_networks_own_exit_is_taken_as_it_is() -> None:
    model = lenet()
    changed = SMALL.apply(Plan.of(model, SHAPE), task())
    x = torch.randn(3, *SHAPE)
    with torch.no_grad():
        early = attach_own_exits(copy.deepcopy(model))(x)[0]
        torch.testing.assert_close(changed.model.light(x), early)  # type: ignore[operator]
    assert not any("rest" in name or name.endswith("head") for name in changed.model.state_dict())
    assert replace(SMALL, at=1).apply(Plan.of(lenet(), SHAPE), task()).notes == changed.notes


def test_text_and_back_and_where_the_network_ends() -> None:
    recipe = Recipe.parse("converting(at='6', hidden=(48,), code=8, target='keep') + int8()")
    technique = recipe.techniques[0]
    assert technique == Converting(at="6", hidden=(48,), code=8, target="keep")
    assert str(technique) == "converting(at='6', hidden=(48,), code=8, target='keep')"
    changed = technique.apply(Plan.of(cnn(), SHAPE), task())
    assert [int(name) for name, _ in changed.model.light.stem.named_children()] == list(range(7))
    assert "up to 6" in changed.notes[0]
    deeper = replace(technique, at="14").apply(Plan.of(cnn(), SHAPE), task())
    assert total(deeper.model, SHAPE)[1] > total(changed.model, SHAPE)[1]
    blocks = replace(SMALL, at=2).apply(Plan.of(vit(), SHAPE), task())
    assert len(blocks.model.light.stem.blocks._modules) == 3
    space = Converting.space(Plan.of(cnn(), SHAPE), TARGET)
    assert all(isinstance(place, str) for place in space["at"])
    assert Converting.space(Plan.of(lenet(), SHAPE), TARGET)["at"] == (1,)


def shaped(*shape: int) -> Task:
    return Task(choose=None, report=None, shape=shape, classes=tuple("abcd"))  # type: ignore[arg-type]


def test_what_is_refused() -> None:
    plan = Plan.of(cnn(), SHAPE)

    def refusal(technique: Converting, plan: Plan, of: Task) -> str:
        with pytest.raises(NotApplicable) as caught:
            technique.apply(plan, of)
        return str(caught.value)

    for shape in ((3, 12, 12), (1, 33, 32)):
        said = refusal(SMALL, plan, shaped(*shape))
        assert "grey images up to about 32 x 32" in said
        assert "force=True" in said
        with pytest.raises(NotApplicable, match="CIFAR-10"):
            SMALL.check(replace(plan, shape=shape), TARGET)
    SMALL.check(replace(plan, shape=(1, 32, 32)), Target("torch"))
    assert "images (C, H, W)" in refusal(SMALL, plan, shaped(16, 8))
    assert "for classification" in refusal(SMALL, plan, replace(task(), kind="segmentation"))
    assert "would save nothing" in refusal(Converting(), plan, task())
    assert Converting(force=True).apply(plan, task()).model is not None
    assert "needs a training first" in refusal(SMALL, plan.with_recovery(Answers()), task())
    assert "no module 'nowhere'" in refusal(replace(SMALL, at="nowhere"), plan, task())
    shallow = Plan.of(nn.Sequential(nn.Flatten(), nn.Linear(144, 4)), SHAPE)
    assert "no place in its middle" in refusal(SMALL, shallow, task())
    with pytest.raises(NotApplicable, match="answers once"):
        SMALL.check(replace(plan, decisions=(object(),)), TARGET)  # type: ignore[arg-type]
    exited = SimilarityExit(at=(1,)).apply(Plan.of(vit(), SHAPE), task())
    assert "the plan has exits, and converting makes a network that answers once" in refusal(SMALL, exited, task())
    for other in ("early_exit()", "low_rank()", "token_clustering()", "similarity_exit()", "cascade(first=(int8()))"):
        with pytest.raises(NotApplicable, match="leave one of the two out"):
            Recipe.parse(f"converting() + {other}").check(Plan.of(vit(), SHAPE), TARGET)


def test_colours_may_be_forced() -> None:
    torch.manual_seed(0)
    convolutions = [nn.Sequential(nn.Conv2d(c, 16, 3, padding=1), nn.ReLU()) for c in (3, 16, 16, 16)]
    model = nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(16 * 64, 4)).eval()
    of = replace(task(), shape=(3, 8, 8), preprocessing=Preprocessing(8, 8))
    changed = replace(SMALL, force=True).apply(Plan.of(model, (3, 8, 8)), of)
    assert changed.model(torch.randn(2, 3, 8, 8)).shape == (2, 4)
    assert changed.model.autoencoder.pixels.mean.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])


@pytest.mark.parametrize(
    "wrong",
    [
        {"at": (1, 2)}, {"at": True}, {"hidden": 384}, {"hidden": (0,)}, {"code": 0}, {"target": "mean"},
        {"activity": -1}, {"threshold": "low"}, {"threshold": 0}, {"finetune": -1}, {"force": 1},
    ],
)  # fmt: skip
def test_wrong_knobs_are_told(wrong) -> None:  # type: ignore[no-untyped-def]
    (name,) = wrong
    with pytest.raises(ValueError, match=f"^{name} is"):
        Converting(**wrong)
    with pytest.raises(LissomError, match=rf"converting: {name} is"):
        Recipe.parse(f"converting({name}={wrong[name]!r})")


# Training


@functools.cache
def trained(make) -> nn.Module:  # type: ignore[no-untyped-def]
    model = make()
    fit(model, task(), epochs=3, batch=32, lr=3e-3, augment=False, threads=1)
    return model


def recoverer(model: nn.Module, of: Task, folder: Path, progress=None) -> Recoverer:  # type: ignore[no-untyped-def]
    return Recoverer(
        Plan.of(model, SHAPE), of, TARGET, folder, epochs=5, seconds=None, seed=0, progress=progress, threads=1
    )


@pytest.mark.full
@pytest.mark.parametrize("labelled", [True, False])
def test_one_recovery_trains_head_autoencoder_and_light_network(tmp_path, labelled) -> None:  # type: ignore[no-untyped-def]
    model, of = trained(cnn), task(labelled)
    told: list[FitEvent] = []
    maker = recoverer(model, of, tmp_path, told.append)
    recipe = Recipe((SMALL,))
    fresh = recipe.apply(maker.plan, of, TARGET)
    made = maker.recover(recipe, fresh)
    assert [e.epoch for e in told] == list(range(1, 22))
    assert {e.epochs for e in told} == {21}
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".json", ".safetensors"]
    changed = {k for k, v in made.model.state_dict().items() if not torch.equal(v, fresh.model.state_dict()[k])}
    assert any(k.startswith("autoencoder.encoder") for k in changed)
    assert {"light.head.classifier.weight", "light.stem.0.weight"} <= changed
    assert not changed & {"autoencoder.pixels.mean", "autoencoder.pixels.std"}
    judged = task()
    assert evaluate(made.model, judged, judged.report).value > 50  # of four classes, after 480 steps of the autoencoder
    # A second trial with the recipe trains nothing.
    again = maker.recover(recipe, fresh)
    assert len(told) == 21
    assert all(torch.equal(a, b) for a, b in zip(again.model.state_dict().values(), made.model.state_dict().values(),
                                                 strict=True))  # fmt: skip
    # What conversion means: more images pass the exit than before.
    x = torch.from_numpy(judged.report.inputs(slice(None)))
    with torch.no_grad():
        raw, easy = made.model.light(x), made.model(x)
    assert float(exit_entropy(easy).mean()) < float(exit_entropy(raw).mean())


@pytest.mark.full
def test_without_fine_tuning_the_light_network_is_the_exit(tmp_path) -> None:  # type: ignore[no-untyped-def]
    model, of = trained(lenet), task()
    technique = replace(SMALL, finetune=0)
    recipe = Recipe((technique,))
    maker = recoverer(model, of, tmp_path)
    made = maker.recover(recipe, recipe.apply(maker.plan, of, TARGET))
    x = torch.randn(3, *SHAPE)
    with torch.no_grad():
        torch.testing.assert_close(made.model.light(x), attach_own_exits(copy.deepcopy(model))(x)[0])


class Stop(Exception):
    pass


@pytest.mark.full
@pytest.mark.parametrize("at", [3, 12, 21])
def test_a_killed_recovery_goes_on_as_it_would_have(tmp_path, at) -> None:  # type: ignore[no-untyped-def]
    of, recipe = task(), Recipe((SMALL,))

    def recovered(folder: str, progress=None) -> dict[str, torch.Tensor]:  # type: ignore[no-untyped-def]
        maker = recoverer(trained(cnn), of, tmp_path / folder, progress)
        return maker.recover(recipe, recipe.apply(maker.plan, of, TARGET)).model.state_dict()

    def stop(event: FitEvent) -> None:
        if event.epoch == at:
            raise Stop

    with pytest.raises(Stop):
        recovered("killed", stop)
    whole, resumed = recovered("whole"), recovered("killed")
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


def test_a_technique_that_trains_all_at_once_cannot_join(tmp_path) -> None:  # type: ignore[no-untyped-def]
    maker = recoverer(cnn(), task(), tmp_path)
    plan = SMALL.apply(maker.plan, task())
    assert maker._phases(plan) == list(plan.recovery)
    with pytest.raises(NotApplicable, match="trains in phases and another all at once"):
        maker._phases(plan.with_recovery(Answers()))


@pytest.mark.full
def test_the_range_of_tensors_is_that_of_the_training_data(tmp_path) -> None:  # type: ignore[no-untyped-def]
    of = replace(task(), preprocessing=None)
    maker = recoverer(trained(lenet), of, tmp_path)
    recipe = Recipe((replace(SMALL, finetune=0),))
    fresh = recipe.apply(maker.plan, of, TARGET)
    assert "the range of the training images" in fresh.notes[-1]
    made = maker.recover(recipe, fresh)
    assert of.fit is not None
    with torch.no_grad():
        pixels = made.model.autoencoder.pixels(torch.from_numpy(of.fit.inputs(slice(None))))
    assert float(pixels.min()) == pytest.approx(0, abs=1e-6)
    assert float(pixels.max()) == pytest.approx(1, abs=1e-6)


# Export and other techniques


def test_fuse_before_it() -> None:
    plan = Recipe.parse("fuse() + converting(hidden=(48,), code=8)").apply(Plan.of(cnn(), SHAPE), task(), TARGET)
    stem = plan.model.light.stem
    assert not any(isinstance(m, nn.BatchNorm2d) for m in stem.modules())
    plain = SMALL.apply(Plan.of(cnn(), SHAPE), task()).model
    x = torch.randn(2, *SHAPE)
    with torch.no_grad():
        torch.testing.assert_close(stem(x), plain.light.stem(x), rtol=1e-3, atol=1e-4)


def test_paths_are_those_that_modules_had() -> None:
    precision = Precision({"": 8, "layer1": 32, "head": 16}, {"root": "light.stem"})
    paths = ("light.stem.layer1.conv", "light.stem.conv", "autoencoder.decoder.0", "light.head", "light.stem.head")
    assert [precision.at(path) for path in paths] == [32, 8, 8, 8, 16]


@pytest.mark.parametrize("runtime", ["openvino", "torch"])
def test_it_exports_as_one_graph(tmp_path, runtime) -> None:  # type: ignore[no-untyped-def]
    of = task()
    plan = SMALL.apply(Plan.of(cnn(), SHAPE), of)
    x = of.choose.inputs(slice(0, 8))
    artifact = export_plan(plan, Target(runtime, batch=2, threads=1), tmp_path / "a", shape=SHAPE, verify=x)
    assert len(artifact.plan["stages"]) == 1
    assert artifact.plan["decisions"] == []
    with torch.no_grad():
        want = plan.model(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(run_artifact(Artifact.open(artifact.path), x, 1), want, atol=1e-4)


@pytest.mark.full
def test_int8_behind_it_keeps_what_it_is_to_keep(tmp_path) -> None:  # type: ignore[no-untyped-def]
    import openvino as ov

    of = task()
    assert of.fit is not None

    def floats(text: str, name: str) -> tuple[set[str], np.ndarray]:
        """Which convolutions have weights that are not quantised, and the answers."""
        plan = Recipe.parse(text).apply(Plan.of(cnn(), SHAPE), of, TARGET)
        given = of.fit.inputs(slice(0, 64))  # type: ignore[union-attr]
        artifact = export_plan(plan, TARGET, tmp_path / name, shape=SHAPE, calibration=given, verify=given[:4])
        graph = ov.Core().read_model(artifact.path / artifact.plan["stages"][0]["graph"])
        plain = {
            artifact.plan["nodes"].get(node.get_friendly_name().partition("/")[0], "")
            for node in graph.get_ordered_ops()
            if node.get_type_name() == "Convolution" and node.input_value(1).get_node().get_type_name() == "Constant"
        }
        return plain, run_artifact(artifact, of.choose.inputs(slice(0, 32)), 1)

    converted = "converting(at='6', hidden=(48,), code=8)"
    all8, _ = floats(f"{converted} + int8(model_type='plain')", "a")
    kept, _ = floats(f"{converted} + int8(model_type='plain', keep=('3',))", "b")
    assert all8 == set()
    assert kept == {"light.stem.3"}
