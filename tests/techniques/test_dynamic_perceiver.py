"""dynamic_perceiver: the branch on CNNs as they are, where they are cut, what is refused, training and graphs."""

from __future__ import annotations

import copy
import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from torch import nn

from lissom.data.splits import ArraySplit
from lissom.errors import LissomError, NotApplicable
from lissom.export.exits import fit_exits
from lissom.export.exporting import export_plan, run_stages
from lissom.export.joint import JointOutputs
from lissom.export.openvino import joint_graph
from lissom.export.openvino_cut import cut_graph
from lissom.export.plan import Plan
from lissom.layers.exits import exits_of, own_exits, remove_exits
from lissom.layers.latent_branch import latent_branch_of, remove_latent_branch
from lissom.meters.costs import total
from lissom.models.dyn_perceiver import DynPerceiver
from lissom.runtime.predictor import load
from lissom.runtime.target import Target
from lissom.tasks.task import Task
from lissom.techniques.dynamic_perceiver import DynamicPerceiver, stage_ends
from lissom.techniques.int8 import Int8
from lissom.techniques.recipe import Recipe
from lissom.techniques.recovering import Recoverer, training_form
from lissom.training.methods.multi_exit_kd import OwnExits, kd_term
from lissom.training.methods.recovery import Seen
from tests.export.cutting import Compiled, differences
from tests.models.tiny_perceiver import SHAPE, block, patterns, tiny

TARGET = Target("openvino", "cpu", 4, 1)
CONFIG = {"INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": "f32"}
EXITS = ("perceiver.heads.early", "perceiver.heads.late", "perceiver.heads.maps")
SMALL = {"latents": 16, "depths": (1, 1, 2, 1), "widening": 2.0}
USERS = Path(__file__).parents[3] / "shared" / "models" / "models.py"


class Net(nn.Module):
    """A CNN as a user writes it: a stem, five convolutions, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = block(3, 8, 1)
        sizes = ((8, 8, 1), (8, 8, 2), (8, 16, 2), (16, 24, 2), (24, 24, 1))
        self.body = nn.Sequential(*(block(*size) for size in sizes))
        self.head = nn.Linear(24, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(self.stem(x)).mean((2, 3)))


def net(steps: int = 40) -> nn.Module:
    """Trained until it is mostly right."""
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for step in range(steps):
        x, y = (torch.from_numpy(a) for a in patterns(64, step))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model.train()(x), y).backward()
        optimizer.step()
    return model.eval()


def task(choose: int = 64) -> Task:
    parts = {
        name: ArraySplit(name, *patterns(n, seed)) for name, n, seed in (("fit", 512, 900), ("choose", choose, 901))
    }
    return Task(**parts, report=parts["choose"], shape=SHAPE, classes=tuple("abcd"), name="patterns")


def of_shape(side: int) -> Task:
    images = np.zeros((2, 3, side, side), np.float32)
    split = ArraySplit("noise", images, np.array([0, 1]))
    return Task(choose=split, report=split, fit=split, shape=(3, side, side), classes=tuple("0123456789"))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return net()


@pytest.fixture(scope="module")
def plan(model: nn.Module) -> Plan:
    return DynamicPerceiver(risk=5.0, **SMALL).apply(Plan.of(model, SHAPE), task())


def users_cnn() -> nn.Module:
    if not USERS.exists():
        pytest.skip(f"{USERS} is not there")
    spec = importlib.util.spec_from_file_location("users_models", USERS)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    torch.manual_seed(0)
    return module.cnn().eval()


@pytest.mark.parametrize(
    ("make", "side", "ends"),
    [
        (net, 16, ("stem", "body.0", "body.1", "body.2", "body")),
        (users_cnn, 32, ("stem", "blocks.0", "blocks.2", "blocks.5", "blocks")),
        (lambda: torchvision.models.resnet18(), 64, ("maxpool", "layer1", "layer2", "layer3", "layer4")),
        (lambda: timm.create_model("resnet18"), 64, ("maxpool", "layer1", "layer2", "layer3", "layer4")),
        (lambda: timm.create_model("regnety_002"), 64, ("stem", "s1", "s2", "s3", "s4")),
        (lambda: timm.create_model("convnext_atto"), 64, ("stem", *(f"stages.{i}" for i in range(4)))),
        (
            lambda: timm.create_model("vgg11_bn"), 112,  # what timm names last is a pooling
            ("features.3", "features.6", "features.13", "features.20", "features.27"),
        ),
        (
            lambda: timm.create_model("mobilenetv3_small_100"), 64,
            ("bn1", "blocks.0", "blocks.1", "blocks.3", "blocks.5"),
        ),
    ],
)  # fmt: skip
def test_where_a_cnn_falls_into_four_stages(make: Any, side: int, ends: tuple[str, ...]) -> None:
    found = stage_ends(make().eval(), (3, side, side))
    assert tuple(point.path for point in found) == ends
    done = [point.done for point in found]
    assert done == sorted(set(done))


def test_stages_that_timm_names_and_that_cannot_be_cut_are_found() -> None:
    """Of a network whose features lie inside residual branches, as those of timm's Xception do."""

    class Residual(nn.Module):
        def __init__(self, before: int, width: int) -> None:
            super().__init__()
            self.rep, self.skip = block(before, width, 2), nn.Conv2d(before, width, 1, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.rep(x) + self.skip(x)

    model = nn.Sequential(block(3, 8, 1), *(Residual(8, 8) for _ in range(4)), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                          nn.Linear(8, 4))  # fmt: skip
    model.feature_info = [{"num_chs": 8, "reduction": 2**i, "module": f"{i}.rep"} for i in range(1, 5)]
    assert [point.path for point in stage_ends(model.eval(), (3, 32, 32))] == ["0", "1", "2", "3", "4"]
    # In front of the first stage, too.
    model.feature_info = [{"num_chs": 8, "reduction": 1, "module": name} for name in ("1.rep", "1", "2", "3", "4")]
    assert [point.path for point in stage_ends(model, (3, 32, 32))] == ["0", "1", "2", "3", "4"]


def test_stages_of_the_users_choice(model: nn.Module) -> None:
    chosen = ("stem.2", "body.0", "body.2", "body.3", "body.4")
    assert tuple(p.path for p in stage_ends(model, SHAPE, chosen)) == chosen
    changed = DynamicPerceiver(stages=chosen, **SMALL).apply(Plan.of(model, SHAPE), task())
    branch = latent_branch_of(changed.model)
    assert branch is not None
    assert branch.places == chosen
    assert changed.decisions[2].carries[0] == "perceiver.hand"
    with pytest.raises(NotApplicable, match=r"in order of execution, not stem, body\.2, body\.0"):
        stage_ends(model, SHAPE, ("stem", "body.2", "body.0", "body.3", "body.4"))
    with pytest.raises(NotApplicable, match="no module 'nowhere'"):
        stage_ends(model, SHAPE, ("nowhere", *chosen[1:]))
    with pytest.raises(NotApplicable, match=r"reads maps \(C, H, W\), and 'head' answers with \(4,\)"):
        stage_ends(model, SHAPE, (*chosen[:4], "head"))


def test_the_model_keeps_its_weights_and_at_first_its_answer(model: nn.Module, plan: Plan) -> None:
    assert latent_branch_of(model) is None
    assert own_exits(model) == ()
    state = plan.model.state_dict()
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    assert all(k.startswith(("perceiver.", "exits.")) for k in state.keys() - model.state_dict().keys())
    assert [e.at for e in plan.decisions] == list(EXITS)
    assert all(e.risk == 5.0 for e in plan.decisions)
    x = torch.from_numpy(patterns(5, 7)[0])
    with torch.no_grad():
        early, late, maps, merged = plan.model(x)
        torch.testing.assert_close(maps, model(x))  # its own classifier, and its maps are as it knows them
        assert early.shape == late.shape == merged.shape == (5, 4)
    # Costs are shares of the CNN's own, and running to the end costs what the branch adds.
    whole = total(remove_exits(copy.deepcopy(plan.model)), SHAPE)[1] / total(model, SHAPE)[1]
    costs = [*(e.cost for e in plan.decisions), 1 + plan.decisions[-1].heads]
    assert costs == sorted(set(costs))
    assert costs[-1] == pytest.approx(whole, rel=0.05)
    assert costs[-1] > 1.2
    assert "dynamic_perceiver: 16 latents beside stem > body.0" in plan.notes[-2]


@torch.no_grad()
def test_the_branch_computes_what_the_ready_network_does(plan: Plan) -> None:
    """The same weights in the class of the ready networks, on the same CNN."""
    changed = copy.deepcopy(plan.model)
    torch.manual_seed(1)
    for parameter in changed.perceiver.parameters():
        parameter.add_(0.05 * torch.randn(parameter.shape))
    cnn = remove_latent_branch(remove_exits(copy.deepcopy(changed)))
    stages = [cnn.body[:1], cnn.body[1:2], cnn.body[2:3], cnn.body[3:]]
    ready = DynPerceiver((cnn.stem, stages), num_classes=4, latents=16, depths=(1, 1, 2, 1), self_ratio=2.0).eval()
    for own, other in zip(ready.exchanges, changed.perceiver.exchanges, strict=True):
        own.pool = other.pool  # as many places as the map has, where it has fewer than 7 x 7
        own.x2z.attention.relative_position_bias = other.x2z.attention.relative_position_bias
    state = changed.perceiver.state_dict() | {f"heads.maps.{k}": v for k, v in changed.head.state_dict().items()}
    missing, unknown = ready.load_state_dict(state, strict=False)
    assert not unknown
    assert all(key.startswith(("stem.", "stages.")) for key in missing)
    x = torch.from_numpy(patterns(5, 8)[0])
    for own, other in zip(changed(x), ready.answers(x), strict=True):
        torch.testing.assert_close(own, other)


@pytest.mark.full
@pytest.mark.parametrize("quantised", [False, True])
def test_cut_equals_joint(plan: Plan, quantised: bool) -> None:
    inputs = patterns(8, 3)[0]
    if quantised:
        plan = Int8(model_type="plain", linear="matmul", products=8).apply(plan, None)  # type: ignore[arg-type]
    graph, _ = joint_graph(plan, TARGET, SHAPE, inputs)
    outputs = JointOutputs.of(plan.decisions)
    cut = cut_graph(graph, outputs)
    assert [len(stage.inputs) for stage in cut] == [1, 3, 4, 4]
    for kernels in (False, True) if quantised else (True,):
        config = {**CONFIG, "LP_TRANSFORMS_MODE": kernels}
        tolerance = 0.05 if quantised and kernels else 0.0  # int8 kernels round by all that reads a tensor
        joint, *stages = (Compiled(g, config) for g in (graph, *cut))
        for x in (inputs[:4], inputs[4:]):
            assert max(differences(joint, stages, outputs, x)) <= tolerance


@pytest.mark.full
def test_a_recipe_is_trained_exported_and_fitted(model: nn.Module, tmp_path: Path) -> None:
    of = task()
    base = Plan.of(model, SHAPE)
    recipe = Recipe.parse("dynamic_perceiver(latents=16, depths=(1, 1, 2, 1), widening=2.0, risk=20.0)")
    plan = recipe.apply(base, of, TARGET)
    (term,) = plan.recovery
    assert term == OwnExits(weights=(0.5, 0.5, 1.0), taught_by="last")
    recoverer = Recoverer(base, of, TARGET, tmp_path / "recovery", epochs=6, seconds=None, seed=0)
    trained = recoverer.recover(recipe, plan)
    before, after = plan.model.state_dict(), trained.model.state_dict()
    for key in ("stem.0.weight", "head.bias", "perceiver.latent", "perceiver.heads.early.weight",
                "perceiver.last_z2x.mlp.fc2.weight"):  # fmt: skip
        assert not torch.equal(before[key], after[key]), key
    artifact = export_plan(trained, TARGET, tmp_path / "a", shape=SHAPE, verify=patterns(8, 4)[0], classes=list("abcd"))
    assert artifact.plan["verification"]["relative_error"] < 1e-3
    inputs, labels = patterns(600, 31)
    answers, scores = run_stages(artifact, inputs, 1)
    with torch.no_grad():
        for own, other in zip(answers, trained.model(torch.from_numpy(inputs)), strict=True):
            np.testing.assert_allclose(own, other.numpy(), atol=1e-3)
    right = [float((a.argmax(1) == labels).mean()) for a in answers]
    assert min(right[2:]) > 0.8  # the CNN's own answer, and the merged one, whose classifier was new
    assert np.argmin(right) == 0  # tokens take more than a few steps
    fitted, _, known = fit_exits(artifact, trained.decisions, answers, scores, lambda a: a.argmax(1) == labels)
    assert known.harm <= 0.2
    predictor = load(fitted.path)
    assert predictor.answer(inputs[:5])[0].shape == (5, 4)
    # One training serves every choice of exits.
    some = Recipe((replace(recipe.techniques[0], at=(1, 3)),))
    assert str(training_form(some)) == str(training_form(recipe))
    less = recoverer.recover(some, some.apply(base, of, TARGET))
    assert len(list((tmp_path / "recovery").glob("*.safetensors"))) == 1
    with torch.no_grad():
        x = torch.from_numpy(inputs[:3])
        first, third, last = less.model(x)
        every = trained.model(x)
    for own, other in zip((first, third, last), (every[0], every[2], every[3]), strict=True):
        torch.testing.assert_close(own, other)
    assert less.decisions[0].carries == trained.decisions[0].carries


def test_the_loss_is_the_papers() -> None:
    torch.manual_seed(0)
    early, late, maps, merged = (torch.randn(6, 4, requires_grad=True) for _ in range(4))
    labels = torch.tensor([0, 1, 2, 3, 0, 1])
    of = task()
    term = OwnExits(weights=(0.5, 0.5, 1.0), taught_by="last")
    seen = Seen((early, late, maps, merged), {})
    loss = term.loss(nn.Linear(1, 1), seen, Seen((torch.zeros(6, 4),), {}), labels, of)
    ce = [nn.functional.cross_entropy(a, labels) for a in (early, late, maps)]
    given = merged.log_softmax(-1)
    soft = [(given.exp() * (given - a.log_softmax(-1))).sum(-1).mean() for a in (early, late, maps)]
    torch.testing.assert_close(loss, 0.5 * ce[0] + 0.5 * ce[1] + ce[2] + 0.5 * sum(soft))
    loss.backward()
    assert merged.grad is None  # the last answer learns nothing from what it teaches
    alone = term.loss(nn.Linear(1, 1), seen, Seen((torch.zeros(6, 4),), {}), None, of)
    torch.testing.assert_close(alone, 0.5 * kd_term((early, late, maps), merged, 1.0))
    with pytest.raises(LissomError, match="3 weights for 2 exits"):
        term.loss(nn.Linear(1, 1), Seen((early, late, merged), {}), seen, labels, of)
    with pytest.raises(LissomError, match="'original' or from the 'last' answer"):
        OwnExits(taught_by="nobody")


@pytest.mark.parametrize(
    "name", ["resnet18", *(pytest.param(n, marks=pytest.mark.full) for n in ("mobilenetv3_small_100", "convnext_atto"))]
)
def test_on_networks_of_timm(name: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10).eval()
    smallest = DynamicPerceiver(latents=8, depths=(1, 1, 1, 1), widening=1.0)
    plan = smallest.apply(Plan.of(model, (3, 64, 64)), of_shape(64))
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        answers = plan.model(x)
        torch.testing.assert_close(answers[2], model(x))
    assert [tuple(a.shape) for a in answers] == [(2, 10)] * 4
    assert len(plan.decisions) == 3


@pytest.mark.parametrize(
    ("name", "options", "side", "sentence"),
    [
        ("vit_tiny_patch16_224", {"img_size": 64, "depth": 2}, 64, "four stages of maps"),
        ("swin_tiny_patch4_window7_224", {"img_size": 56, "depths": (1, 1, 1, 1)}, 56, "four stages of maps"),
        ("hrnet_w18_small", {}, 64, "cannot be cut|four stages of maps"),
    ],
)
def test_what_cannot_be_cut_is_refused(name: str, options: Any, side: int, sentence: str) -> None:
    model = timm.create_model(name, num_classes=10, **options).eval()
    with pytest.raises(NotApplicable, match=sentence):
        DynamicPerceiver(**SMALL).apply(Plan.of(model, (3, side, side)), of_shape(side))
    assert DynamicPerceiver.space(Plan.of(model, (3, side, side)), TARGET) == {}


def test_what_is_refused(model: nn.Module, plan: Plan) -> None:
    for wrong in ({"latents": 12}, {"latents": 4}, {"latents": 8.5}, {"depths": (1, 1)}, {"depths": (0, 1, 1, 1)},
                  {"depths": 3}, {"widening": 0}, {"risk": 0}, {"rule": "mood"}, {"stages": ("a", "b")},
                  {"stages": "layer1"}, {"at": ()}, {"patience": 0}):  # fmt: skip
        with pytest.raises(ValueError, match=r"latents|depths|widening|risk|rule|stages|at is|patience"):
            DynamicPerceiver(**wrong)
    ready = Plan.of(tiny().eval(), SHAPE)
    with pytest.raises(NotApplicable, match=r"early_exit\(\) leaves through those"):
        DynamicPerceiver().check(ready, TARGET)
    with pytest.raises(NotApplicable, match="exits already"):
        DynamicPerceiver().check(plan, TARGET)
    with pytest.raises(NotApplicable, match="one of them would do"):
        Recipe.parse("dynamic_perceiver() + early_exit()").check(Plan.of(model, SHAPE), TARGET)
    with pytest.raises(NotApplicable, match="no exit of its own 4"):
        DynamicPerceiver(at=(4,), **SMALL).apply(Plan.of(model, SHAPE), task())
    taken = net()
    taken.perceiver = nn.Identity()
    with pytest.raises(NotApplicable, match="something else called 'perceiver'"):
        DynamicPerceiver(**SMALL).apply(Plan.of(taken, SHAPE), task())


def test_rules_of_patience_say_how_patient(model: nn.Module) -> None:
    base, of = Plan.of(model, SHAPE), task()
    patient = DynamicPerceiver(rule="patient_and_confident", patience=3, **SMALL)
    assert [(e.rule, e.patience) for e in patient.apply(base, of).decisions] == [("patient_and_confident", 3)] * 3
    assert patient.training_form() == DynamicPerceiver(**SMALL)  # what is trained does not depend on it
    assert str(DynamicPerceiver(rule="patience", patience=2)) == "dynamic_perceiver(rule='patience')"
    assert Recipe.parse(str(patient)).techniques[0] == patient
    with pytest.raises(NotApplicable, match="3 exits cannot be sure 4 times in a row"):
        replace(patient, patience=4).apply(base, of)


def test_it_stands_with_what_changes_the_cnn(model: nn.Module) -> None:
    recipe = Recipe.parse("fuse() + dynamic_perceiver(latents=8, depths=(1, 1, 1, 1))")
    plan = recipe.apply(Plan.of(model, SHAPE), task(), TARGET)
    x = torch.from_numpy(patterns(3, 5)[0])
    with torch.no_grad():
        torch.testing.assert_close(plan.model(x)[2], model(x), atol=1e-4, rtol=1e-4)
    assert exits_of(plan.model) is not None
    assert not any(isinstance(m, nn.BatchNorm2d) for m in plan.model.modules())


def test_the_space_offers_sizes_and_risks(model: nn.Module) -> None:
    space = DynamicPerceiver.space(Plan.of(model, SHAPE), TARGET)
    assert set(space) == {"latents", "depths", "risk"}
    for latents in space["latents"]:
        for depths in space["depths"]:
            DynamicPerceiver(latents=latents, depths=depths)
    one = DynamicPerceiver(at=(1, 2)).only(("perceiver.heads.late",))
    assert one.at == ("perceiver.heads.late",)
