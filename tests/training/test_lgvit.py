"""LGViT's losses to the published cases, the two stages against their formulas, and resuming with its alternation."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.nn import functional

from lissom.errors import LissomError
from lissom.layers.exit_heads import build_head, head_kinds
from lissom.layers.exits import Exits, attach_exits, remove_exits
from lissom.training.loop import FitEvent, fit
from lissom.training.methods.lgvit import (
    AlternatingExits,
    ExitDistillation,
    alternating_loss,
    gram_loss,
    heterogeneous_loss,
    prediction_loss,
    subsample,
    subsample_indices,
    token_loss,
)
from lissom.training.methods.recovery import Recovery, Seen


@pytest.fixture(scope="module")
def cases() -> dict[str, Any]:
    where = os.environ.get("LISSOM_PARITY")
    if not where:
        pytest.skip("LISSOM_PARITY is not set: it names the folder of published figures")
    return json.loads((Path(where) / "lgvit" / "cases.json").read_text())


def test_losses_are_the_published_ones(cases):
    for case in cases["losses"]:
        tensors = {name: torch.tensor(value) for name, value in case.items() if isinstance(value, list)}
        tokens = tensors["student_tokens"], tensors["teacher_tokens"]
        assert float(heterogeneous_loss(*tokens)) == pytest.approx(case["hete_loss"], rel=1e-6)
        assert float(token_loss(*tokens)) == pytest.approx(case["homo_mse"], rel=1e-6)
        grams = tensors["gram_student"], tensors["gram_teacher"]
        assert float(gram_loss(*grams)) == pytest.approx(case["homo_gram_mse"], rel=1e-6)
        logits = tensors["student_logits"], tensors["teacher_logits"]
        soft = float(prediction_loss(*logits, temperature=case["temperature"]))
        assert soft == pytest.approx(case["prediction_kd"], rel=1e-5)
        labelled = float(functional.cross_entropy(logits[0], tensors["target"]))
        assert labelled == pytest.approx(case["ce"], rel=1e-6)
        assert 0.7 * labelled + 0.3 * soft == pytest.approx(case["prediction_loss_coef_0_3"], rel=1e-6)


def test_subsampling_is_the_published_one(cases):
    for name, indices in cases["subsample_indices"].items():
        grid, stride = name.split("_r")
        h, w = (int(side) for side in grid.split("x"))
        assert subsample_indices((h, w), int(stride)) == indices
        tokens = torch.arange(h * w).reshape(1, -1, 1)
        assert subsample(tokens, (h, w), int(stride)).flatten().tolist() == indices


def test_alternation_is_the_published_one(cases):
    for case in cases["alternating_weighted"]:
        exits, final = [torch.tensor(v) for v in case["exit_ce"]], torch.tensor(case["final_ce"])
        for step, expected in ((0, "even"), (1, "odd"), (2, "even"), (7, "odd")):
            loss = alternating_loss(exits, final, case["exit_after_block"], case["num_blocks"], step)
            assert float(loss) == pytest.approx(case[f"{expected}_step_loss"], rel=1e-6)


SIZES = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 16, "depth": 9, "num_heads": 2, "num_classes": 3}


def vit(seed: int = 0, distilled: bool = False, **sizes: Any) -> nn.Module:
    """4 x 4 patches, 9 blocks: room for the published eight exits."""
    torch.manual_seed(seed)
    return (VisionTransformerDistilled if distilled else VisionTransformer)(**{**SIZES, **sizes})


def with_exits(model: nn.Module, blocks: tuple[int, ...] = tuple(range(8)), detached: bool = True, seed: int = 1):
    torch.manual_seed(seed)
    distilled = isinstance(model, VisionTransformerDistilled)
    prefix = model.num_prefix_tokens
    sample = torch.empty(1, prefix + 16, 16)
    heads = [
        build_head(sample, 3, kind, prefix=prefix, grid=(4, 4), distilled=distilled) for kind in head_kinds(len(blocks))
    ]
    return attach_exits(model, Exits([f"blocks.{b}" for b in blocks], heads, detached))


@pytest.fixture
def batch(task):
    return torch.from_numpy(task.fit.inputs(slice(0, 8))), torch.from_numpy(task.fit.labels[:8])


def blocks_of(model: nn.Module, images: torch.Tensor) -> list[torch.Tensor]:
    """The output of every block."""
    x = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images))))
    outputs = []
    for block in model.blocks:
        x = block(x)
        outputs.append(x)
    return outputs


def by_hand(model: nn.Module, original: nn.Module, images: torch.Tensor, y: torch.Tensor, official: bool = False):
    """Stage 2's sum for eight exits as the paper's code has it, written out."""
    heads, prefix = model.exits.heads, model.num_prefix_tokens
    features = [x.detach() for x in blocks_of(model, images)[:8]]
    logits = [head(x) for head, x in zip(heads, features, strict=True)]
    tokens = [head.mixer(x[:, prefix:], (4, 4)) for head, x in zip(heads, features, strict=True)]
    with torch.no_grad():
        last = blocks_of(original, images)[-1]
        given = original.forward_head(last if official else original.norm(last))
        last = last[:, prefix:]
    loss = 0.7 * sum(functional.cross_entropy(own, y) for own in logits)
    for own in logits:
        p, q = (given / 2).softmax(-1), (own / 2).log_softmax(-1)
        loss = loss + 0.3 * 4 * (p * (p.log() - q)).sum() / given.numel()
    two, three = (last.unflatten(1, (4, 4))[:, ::s, ::s].flatten(1, 2) for s in (2, 3))
    for own, teacher in ((tokens[0], last), (tokens[3], last), (tokens[4], two), (tokens[7], three)):
        p = teacher.softmax(-1)
        loss = loss + 0.01 * (p * (p.log() - own.log_softmax(-1))).sum() / len(own)
    for i in range(3):
        loss = loss + 0.01 * (tokens[i] - tokens[3]).square().mean()
        loss = loss + 0.01 * (tokens[4 + i].mT @ tokens[4 + i] - tokens[7].mT @ tokens[7]).square().mean()
    return loss


@pytest.mark.parametrize("distilled", [False, True])
@pytest.mark.parametrize("final", ["normed", "official"])
def test_stage_two_is_the_papers_sum(task, batch, distilled, final):
    x, y = batch
    original = vit(0, distilled).eval()
    model = with_exits(vit(0, distilled)).eval()  # eval, so that both ways see the same BatchNorm
    method = Recovery(original, (ExitDistillation(final=final),))
    method.prepare(model, task)
    loss = method.loss(model, x, y, task)
    torch.testing.assert_close(loss, by_hand(model, original, x, y, final == "official"))
    loss.backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert trained == {name for name, _ in model.named_parameters() if name.startswith("exits.")}
    assert all(p.grad is None for p in original.parameters())


def test_official_is_another_teacher(task, batch):
    x, y = batch
    original, model = vit().eval(), with_exits(vit()).eval()
    losses = [Recovery(original, (ExitDistillation(final=f),)).loss(model, x, y, task) for f in ("normed", "official")]
    assert abs(float((losses[0] - losses[1]).detach())) > 1e-3


def test_without_labels_the_originals_answer_stands_for_them(task, batch):
    x, _ = batch
    original, model = vit().eval(), with_exits(vit()).eval()
    method = Recovery(original, (ExitDistillation(),))
    assert torch.equal(method.loss(model, x, None, task), method.loss(model, x, original(x).argmax(1), task))


def test_the_model_itself_teaches_its_exits_as_its_original_does(task, batch):
    x, y = batch
    model = with_exits(vit()).eval()
    alone = Recovery(terms=(ExitDistillation(),)).loss(model, x, y, task)
    torch.testing.assert_close(alone, Recovery(vit().eval(), (ExitDistillation(),)).loss(model, x, y, task))


@pytest.mark.parametrize(
    ("blocks", "heads", "last"),
    [
        ((0, 1, 2, 3, 4, 5, 6, 7), list(range(8)), True),
        ((2, 5), [0, 1], True),  # one head of each kind: nothing to compare it with but the last block
        ((1, 3, 5, 7), [0, 1, 2, 3], True),
        ((1, 2, 3, 4, 5, 6), list(range(6)), True),
        ((4,), [0], True),
    ],
)
def test_which_modules_are_read(blocks, heads, last):
    model = with_exits(vit(), blocks)
    paths = [f"exits.heads.{i}.mixer" for i in heads]
    assert ExitDistillation().reads(model, vit()) == (paths, ["blocks.8"] if last else [])
    assert ExitDistillation(beta_het=0, beta_hom=0).reads(model, vit()) == ([], [])
    assert ExitDistillation(last="blocks.5").reads(model, vit())[1] == ["blocks.5"]


def test_heads_in_two_rows_have_no_tokens_to_compare():
    stages = nn.Sequential(vit().blocks[:2], vit().blocks[:2])
    heads = [build_head(torch.empty(1, 17, 16), 3, "lph_a") for _ in range(2)]
    attach_exits(stages, Exits(["0.1", "1.0"], heads))
    assert ExitDistillation().reads(stages, stages) == ([], [])
    both = ["exits.heads.0.mixer", "exits.heads.1.mixer"]
    assert ExitDistillation(last="1.1").reads(stages, stages) == (both, ["1.1"])


def test_one_head_of_each_kind(task, batch):
    x, y = batch
    original, model = vit().eval(), with_exits(vit(), (2, 5)).eval()
    loss = Recovery(original, (ExitDistillation(beta_het=1.0, alpha=0.0),)).loss(model, x, y, task)
    outputs = blocks_of(original, x)
    last = outputs[-1][:, 1:]
    expected = sum(functional.cross_entropy(answer, y) for answer in model(x)[:-1])
    for head, features, teacher in (
        (model.exits.heads[0], outputs[2], last),
        (model.exits.heads[1], outputs[5], subsample(last, (4, 4), 2)),
    ):
        expected = expected + heterogeneous_loss(head.mixer(features[:, 1:], (4, 4)), teacher)
    torch.testing.assert_close(loss, expected)


def test_stage_two_trains_the_heads_alone_and_lowers_the_loss(task):
    original, model = vit(), with_exits(vit())
    assert isinstance(model.exits.heads[0].mixer.conv1[2], nn.BatchNorm2d)
    before = {n: v.clone() for n, v in model.state_dict().items()}
    task = task.with_splits(fit=task.fit.sample(64, 0))
    result = fit(model, task, method=Recovery(original, (ExitDistillation(),)), epochs=3, batch=16, lr=3e-3)
    assert result.history[-1]["loss"] < 0.95 * result.history[0]["loss"]
    after = model.state_dict()
    rest = {n for n in before if not n.startswith("exits.")}
    assert rest
    assert all(torch.equal(before[n], after[n]) for n in rest)
    moved = {n for n in before if n.startswith("exits.") and not torch.equal(before[n], after[n])}
    assert moved == {n for n in before if n.startswith("exits.")} - {"exits.steps"}  # BatchNorms' statistics too


def cnn(seed: int = 0, detached: bool = True) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, 1, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(8, 3),
    )  # fmt: skip
    samples = {"1": torch.empty(1, 8, 8, 8), "3": torch.empty(1, 8, 4, 4)}
    heads = [build_head(sample, 3, "lph_a", channels_last=False) for sample in samples.values()]
    return attach_exits(model, Exits(list(samples), heads, detached))


def test_convolutional_heads_learn_from_labels_and_answer_alone(task, batch):
    x, y = batch
    model = cnn().eval()
    assert ExitDistillation().reads(model, model) == ([], [])
    original = remove_exits(cnn(1)).eval()
    loss = Recovery(original, (ExitDistillation(),)).loss(model, x, y, task)
    *early, _ = model(x)
    given = original(x).detach()
    expected = sum(0.7 * functional.cross_entropy(own, y) + 0.3 * prediction_loss(own, given) for own in early)
    torch.testing.assert_close(loss, expected)


def test_stage_one_alternates_and_trains_everything(task, batch):
    x, y = batch
    original, model = vit(), with_exits(vit(), (3, 5), detached=False).eval()
    method = Recovery(original, (AlternatingExits(),))
    method.prepare(model, task)
    *early, own = model(x)
    final = functional.cross_entropy(own, y)
    odd = (4 * functional.cross_entropy(early[0], y) + 6 * functional.cross_entropy(early[1], y) + 9 * final) / 19
    for step, expected in enumerate((final, odd, final, odd)):
        assert int(model.exits.steps) == step
        torch.testing.assert_close(method.loss(model, x, y, task), expected)
    method.loss(model, x, y, task).backward()
    assert model.blocks[0].attn.qkv.weight.grad is not None
    assert model.exits.heads[0].classifier.weight.grad is None
    model.zero_grad()
    method.loss(model, x, y, task).backward()
    assert model.exits.heads[0].classifier.weight.grad is not None
    assert {id(p) for p in method.parameters(model)} == {id(p) for p in model.parameters()}
    method.prepare(model, task)
    assert int(model.exits.steps) == 0  # a new training begins anew


def test_depths_are_counted_or_given(task, batch):
    term = AlternatingExits()
    model = with_exits(vit(), (3, 5), detached=False)
    assert term._depths(model, model.exits) == ([4, 6], 9)
    given = AlternatingExits(depths=(1.0, 2.0), blocks=3.0)
    assert given._depths(model, model.exits) == ((1.0, 2.0), 3.0)
    mixed = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))
    attach_exits(mixed, Exits(["0", "1"], [nn.Linear(4, 3), nn.Linear(4, 3)], detached=False))
    with pytest.raises(LissomError, match=r"depth cannot be counted; give depths=\(\.\.\.\)"):
        term.prepare(mixed, mixed, task)
    given.prepare(mixed, mixed, task)
    for wrong in (AlternatingExits((1.0,), 3), AlternatingExits((1.0, 2.0))):
        with pytest.raises(LissomError, match="depths were given for 2 exits"):
            wrong.prepare(mixed, mixed, task)


class Stop(Exception):
    pass


def stop_after(count: int):
    def progress(event: FitEvent) -> None:
        if event.epoch == count:
            raise Stop

    return progress


def test_a_resumed_stage_one_alternates_as_an_uninterrupted_one(task, tmp_path):
    def model(seed: int = 0) -> nn.Module:
        return with_exits(vit(seed, depth=3), (0, 1), detached=False)

    task = task.with_splits(fit=task.fit.sample(48, 0))  # 3 steps an epoch: each epoch begins with the other kind
    settings = {"epochs": 2, "batch": 16, "method": Recovery(vit(0, depth=3), (AlternatingExits(),))}
    whole = fit(model(), task, folder=tmp_path / "whole", **settings)
    assert int(whole.model.exits.steps) == 6
    with pytest.raises(Stop):
        fit(model(), task, folder=tmp_path / "killed", progress=stop_after(1), **settings)
    resumed = fit(model(7), task, folder=tmp_path / "killed", resume=True, **settings)
    assert [h["loss"] for h in resumed.history] == [h["loss"] for h in whole.history]
    for (name, a), b in zip(whole.model.state_dict().items(), resumed.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_what_the_stages_refuse(task, network):
    plain, detached, open_ = vit(), with_exits(vit()), with_exits(vit(), detached=False)
    for model, term, sentence in (
        (plain, ExitDistillation(), "ExitDistillation trains early exits, and the model has none"),
        (plain, AlternatingExits(), "AlternatingExits trains early exits, and the model has none"),
        (detached, AlternatingExits(), "these read detached features; set detached=False"),
        (open_, ExitDistillation(), "hand their gradients on to the model; set detached=True"),
        (cnn(), ExitDistillation(final="official"), "repeats published figures of timm's ViT and DeiT"),
        (
            detached,
            ExitDistillation(last="blocks.99"),
            r"ExitDistillation reads 'blocks\.99', which the original model",
        ),
    ):
        with pytest.raises(LissomError, match=sentence) as error:
            Recovery(vit(1), (term,)).prepare(model, task)
        assert "\n" not in str(error.value)
    x = torch.zeros(2, 1, 8, 8)
    y = torch.zeros(2, dtype=torch.long)
    with pytest.raises(LissomError, match="exits need the original's classes"):
        Recovery(vit(num_classes=4), (ExitDistillation(),)).loss(detached, x, y, task)
    wide = vit(embed_dim=24)
    with pytest.raises(LissomError, match=r"set beta_het=0 for a model of other widths than the original's"):
        Recovery(wide, (ExitDistillation(),)).loss(detached, x, y, task)
    Recovery(wide, (ExitDistillation(beta_het=0),)).loss(detached, x, y, task)
    for settings, sentence in (
        ({"alpha": 1.5}, "alpha is 1.5"),
        ({"temperature": 0}, "temperature is 0"),
        ({"beta_hom": -1}, "beta_hom -1"),
        ({"final": "raw"}, "final is 'raw'"),
    ):
        with pytest.raises(LissomError, match=sentence):
            replace(ExitDistillation(), **settings)


def test_terms_say_what_they_read_of_any_seen(task):
    """A term is a function of what was seen, and of nothing else."""
    torch.manual_seed(0)
    model = cnn()
    logits = tuple(torch.randn(4, 3) for _ in range(3))
    seen, given = Seen(logits, {}), Seen((torch.randn(4, 3),), {})
    y = torch.tensor([0, 1, 2, 0])
    loss = ExitDistillation(alpha=1.0).loss(model, seen, given, y, task)
    torch.testing.assert_close(
        loss, prediction_loss(logits[0], given.answer) + prediction_loss(logits[1], given.answer)
    )
