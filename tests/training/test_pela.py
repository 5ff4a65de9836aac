"""PELA's losses against the published figures and by hand; the blocks that the feature loss reads."""

from __future__ import annotations

import copy
import json
import os
import sys
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from lissom.errors import LissomError
from lissom.layers.low_rank import factorise, rank_of_ratio
from lissom.training.loop import fit
from lissom.training.methods.pela import AnswerMSE, FeatureMSE, Pela, Perturbation, Retrained, block_paths
from lissom.training.methods.recovery import Answers, Recovery, Seen

NOTHING = Seen((torch.zeros(2, 3),), {})


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.body(x)


class Net(nn.Module):
    """Two blocks between an embedding of 8 x 8 images and a head of three classes."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Linear(64, 16)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x.flatten(1))
        for block in self.blocks:
            x = block(x)
        return self.head(x)


RANKS = {f"blocks.{i}.body.{j}": 3 for i in range(2) for j in (0, 2)}
BLOCKS = ("blocks.0", "blocks.1")


def pair_of_models():
    original = Net().eval()
    dense = {path: original.get_submodule(path).weight.detach().clone() for path in RANKS}
    return original, factorise(copy.deepcopy(original), RANKS), dense


def test_perturbation_is_the_published_one(task):
    folder = os.environ.get("LISSOM_PARITY")
    if not folder:
        pytest.skip("LISSOM_PARITY is not set: it names the folder of published figures")
    sys.path.insert(0, folder)
    try:
        from parity import make_input
    finally:
        sys.path.remove(folder)
    cases = json.loads((Path(folder) / "pela" / "cases.json").read_text())["svd"]
    model, originals = nn.Sequential(), {}
    for number, case in enumerate(cases):
        layer = nn.Linear(case["in_features"], case["out_features"])
        shape = (case["out_features"], case["in_features"])
        layer.weight.data = make_input(shape, f"pelaW{number}") / case["in_features"] ** 0.5
        originals[str(number)] = layer.weight.detach()
        model.append(layer)
    factorise(model, {str(i): rank_of_ratio(c["in_features"], c["out_features"], c["ratio"])
                      for i, c in enumerate(cases)})  # fmt: skip
    values = []
    for number, case in enumerate(cases):
        one = Perturbation({str(number): originals[str(number)]}, eps=case["eps"])
        values.append(one.loss(model, NOTHING, NOTHING, None, task).item())
        assert values[-1] == pytest.approx(case["loss_perturb"], rel=1e-4)
    both = Perturbation(originals, weight=0.5).loss(model, NOTHING, NOTHING, None, task)
    assert both.item() == pytest.approx(0.5 * sum(values) / 2)


def test_perturbation_has_two_sides_and_moves_the_largest_entry(task):
    _, model, dense = pair_of_models()
    path = "blocks.0.body.0"
    factorise(whole := Net(), {path: 16})
    exact = Perturbation({path: dense[path]}, eps=0.01)
    assert exact.loss(whole, NOTHING, NOTHING, None, task).item() == pytest.approx(0.01**2, rel=1e-3)
    term = Perturbation({path: dense[path]}, eps=0.0)
    loss = term.loss(model, NOTHING, NOTHING, None, task)
    loss.backward()
    pair = model.get_submodule(path)
    error = (pair.weight - dense[path]).detach()
    row, column = divmod(int(error.abs().argmax()), error.shape[1])
    assert loss.item() == pytest.approx(float(error[row, column]) ** 2, rel=1e-5)
    # Only the row and the column that make the largest entry have a gradient.
    assert [int(i) for i in pair[1].weight.grad.abs().sum(1).nonzero()] == [row]
    assert [int(i) for i in pair[0].weight.grad.abs().sum(0).nonzero()] == [column]
    assert torch.allclose(pair[1].weight.grad[row], 2 * error[row, column] * pair[0].weight[:, column], atol=1e-6)


def test_perturbation_is_measured_in_float32_under_autocast(task):
    _, model, dense = pair_of_models()
    term = Perturbation(dense)
    exact = term.loss(model, NOTHING, NOTHING, None, task).item()
    with torch.autocast("cpu", torch.bfloat16):
        assert term.loss(model, NOTHING, NOTHING, None, task).item() == exact


def test_features_are_averaged_over_blocks_and_the_teacher_gets_no_gradient(task):
    torch.manual_seed(0)
    own = {path: torch.randn(2, 4, 5, requires_grad=True) for path in BLOCKS}
    given = {path: torch.randn(2, 4, 5, requires_grad=True) for path in BLOCKS}
    student, teacher = Seen((), own), Seen((), given)
    loss = FeatureMSE(BLOCKS, 0.1).loss(nn.Identity(), student, teacher, None, task)
    by_hand = sum((own[p] - given[p]).square().sum().item() / 40 for p in BLOCKS) / 2
    assert loss.item() == pytest.approx(0.1 * by_hand, rel=1e-5)
    loss.backward()
    assert all(x.grad is not None for x in own.values())
    assert all(x.grad is None for x in given.values())
    nested = Seen((), {"blocks.0": (own["blocks.0"], "attention")})  # as some of transformers' layers answer
    one = FeatureMSE(("blocks.0",)).loss(nn.Identity(), nested, teacher, None, task)
    assert one.item() == pytest.approx((own["blocks.0"] - given["blocks.0"]).square().mean().item())


def test_a_training_with_all_terms_brings_the_model_back(task):
    original = Net()
    fit(original, task, epochs=4, batch=16, lr=5e-3)
    dense = {path: original.get_submodule(path).weight.detach().clone() for path in RANKS}
    model = factorise(copy.deepcopy(original), RANKS)
    weights = copy.deepcopy(original.state_dict())
    x = torch.from_numpy(task.choose.inputs(slice(None)))

    def distance(model: nn.Module) -> float:
        return float((model(x) - original(x)).square().mean().detach())

    before = distance(model)
    terms = (Answers(alpha=0.5), FeatureMSE(BLOCKS), Perturbation(dense))
    fit(model, task, method=Recovery(original, terms), epochs=4, batch=16, lr=5e-3, augment=False)
    assert distance(model) < 0.5 * before
    assert all(torch.equal(v, weights[k]) for k, v in original.state_dict().items())


def test_retrained_asks_for_a_training_and_adds_nothing(task):
    model, other = Net(), Net(1)
    x, y = torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 2, 0])
    term = Retrained()
    assert len(list(term.parameters(model))) == len(list(model.parameters()))
    alone = Recovery(other, (Answers(),)).loss(model, x, y, task)
    assert torch.equal(Recovery(other, (Answers(), term)).loss(model, x, y, task), alone)


def test_the_stage_is_the_sum_of_its_terms(task):
    original, model, dense = pair_of_models()
    x, y = torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 2, 0])
    settings = {"feature_weight": 0.1, "logit_weight": 0.3, "perturbation_weight": 2.0, "eps": 0.01}
    method = Pela(original, **settings)
    method.prepare(model, task)
    terms = (Answers(alpha=0.0), FeatureMSE(BLOCKS, 0.1), AnswerMSE(0.3), Perturbation(dense, 2.0, 0.01))
    want = Recovery(original, terms).loss(model, x, y, task)
    assert torch.equal(method.loss(model, x, y, task), want)
    by_hand = torch.nn.functional.cross_entropy(model(x), y) + 0.3 * (model(x) - original(x)).square().mean()
    plain = Pela(original, features="none", logit_weight=0.3)
    plain.prepare(model, task)
    torch.testing.assert_close(plain.loss(model, x, y, task), by_hand)
    last = Pela(original, features="last")
    last.prepare(model, task)
    own = Recovery(original, (Answers(alpha=0.0), FeatureMSE(BLOCKS[-1:]))).loss(model, x, y, task)
    assert torch.equal(last.loss(model, x, y, task), own)
    assert all(p.grad is None for p in original.parameters())


def test_the_stage_mends_a_model_that_is_then_tuned_on_other_data(task, tmp_path):
    """The teacher stays as it is; resuming repeats the run; the thin layers go on as thin layers."""
    original = Net()
    fit(original, task, epochs=4, batch=16, lr=5e-3)
    weights = copy.deepcopy(original.state_dict())
    made = []
    for folder in ("whole", "parts"):
        model = factorise(copy.deepcopy(original), RANKS)
        method = Pela(original, perturbation_weight=1.0)
        if folder == "parts":
            torch.manual_seed(7)
        fit(model, task, method=method, epochs=2, batch=16, lr=5e-3, folder=tmp_path / folder)
        made.append(model)
    same = zip(made[0].state_dict().values(), made[1].state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in same)
    again = factorise(copy.deepcopy(original), RANKS)
    settings = {"epochs": 2, "batch": 16, "lr": 5e-3, "folder": tmp_path / "whole", "resume": True}
    fit(again, task, method=Pela(original, perturbation_weight=1.0), **settings)
    assert torch.equal(again.head.weight, made[0].head.weight)
    with pytest.raises(LissomError, match="method"):
        fit(again, task, method=Pela(original, perturbation_weight=0.5), **settings)
    assert all(torch.equal(v, weights[k]) for k, v in original.state_dict().items())

    tuned = made[0]
    tuned.head = nn.Linear(16, 3)
    before = copy.deepcopy(tuned.get_submodule("blocks.0.body.0").state_dict())
    fit(tuned, task, epochs=2, batch=16, lr=5e-3)
    after = tuned.get_submodule("blocks.0.body.0").state_dict()
    assert [v.shape for v in after.values()] == [v.shape for v in before.values()]
    assert not torch.equal(after["0.weight"], before["0.weight"])


def test_what_the_stage_refuses(task):
    original, model, _ = pair_of_models()
    for method, student, sentence in (
        (Pela(), model, "teacher=original"),
        (Pela(original), Net(), "no low-rank layer"),
        (Pela(nn.Sequential(nn.Linear(3, 3))), model, r"no layer at 'blocks\.0"),
        (Pela(factorise(Net(), {"blocks.0.body.0": 2})), factorise(Net(), {"embed": 2}), None),
        (Pela(flat(False)), flat(True), "no repeated blocks"),
    ):
        if sentence is None:  # a teacher that is low-rank elsewhere still has a dense layer here
            method.prepare(student, task)
            continue
        with pytest.raises(LissomError, match=sentence):
            fit(student, task, method=method, epochs=1)
    for wrong, sentence in (
        ({"features": "some"}, "features"),
        ({"eps": -1.0}, "eps is -1"),
        ({"logit_weight": float("nan")}, "logit"),
    ):
        with pytest.raises(LissomError, match=sentence):
            Pela(original, **wrong)


def flat(thin: bool) -> nn.Module:
    """A model without blocks, its first layer as two thin ones."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.Tanh(), nn.Linear(12, 3))
    return factorise(model, {"1": 4}) if thin else model


def test_what_the_terms_refuse(task):
    original, model, dense = pair_of_models()
    wrong_shape = {"blocks.0.body.0": torch.zeros(3, 3)}
    for term, sentence in (
        (FeatureMSE(), "reads no block"),
        (FeatureMSE(("blocks.7",)), r"'blocks\.7', which the changed model lacks"),
        (Perturbation(), "no layer to hold"),
        (Perturbation(wrong_shape), "no low-rank layer of that shape"),
        (Perturbation({"embed": dense["blocks.0.body.0"]}), "no low-rank layer"),
    ):
        with pytest.raises(LissomError, match=sentence):
            fit(model, task, method=Recovery(original, (term,)), epochs=1)
    student, teacher = (Seen((), {"blocks.0": torch.zeros(2, n)}) for n in (3, 4))
    with pytest.raises(LissomError, match=r"\(2, 3\).*\(2, 4\).*features='none'"):
        FeatureMSE(("blocks.0",)).loss(model, student, teacher, None, task)
    with pytest.raises(LissomError, match="answers with dict"):
        FeatureMSE(("blocks.0",)).loss(model, Seen((), {"blocks.0": {}}), teacher, None, task)


@pytest.mark.parametrize(
    ("name", "count", "first", "last"),
    [
        ("vit_tiny_patch16_224", 12, "blocks.0", "blocks.11"),
        ("resnet14t", 4, "layer1.0", "layer4.0"),
        ("convnext_atto", 12, "stages.0.blocks.0", "stages.3.blocks.1"),
        ("efficientnet_b0", 15, "blocks.1.0", "blocks.6.0"),
        ("vgg11", 0, "", ""),
    ],
)
def test_blocks_are_found_in_networks_of_all_kinds(name, count, first, last):
    with torch.device("meta"):
        paths = block_paths(timm.create_model(name))
    assert len(paths) == count
    assert not count or (paths[0], paths[-1]) == (first, last)


def test_a_row_of_bare_layers_is_no_row_of_blocks():
    assert block_paths(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))) == ()
    assert block_paths(nn.Sequential(Block(), Block())) == ("0", "1")
    assert block_paths(Net()) == BLOCKS
    assert block_paths(factorise(Net(), RANKS)) == BLOCKS
