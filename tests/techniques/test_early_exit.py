"""early_exit: where exits stand, what is refused, and that heads trained once serve every choice of places."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from timm.models.cait import Cait
from timm.models.convit import ConVit
from timm.models.pvt_v2 import PyramidVisionTransformerV2
from timm.models.swin_transformer import SwinTransformer
from timm.models.xcit import Xcit
from torch import nn

from lissom.data.splits import ArraySplit
from lissom.errors import NotApplicable
from lissom.export.cuts import check_cut
from lissom.export.exporting import export_plan, run_stages
from lissom.export.plan import Plan
from lissom.layers.exit_heads import GlobalAggregationHead, LocalPerceptionHead, MapExit, TokenExit, head_kinds
from lissom.layers.exits import OwnExit, exits_of, put_away_exits
from lissom.models.factory import create_model
from lissom.runtime.target import RUNTIMES, Target
from lissom.tasks.task import Task
from lissom.techniques.early_exit import EarlyExit, positions
from lissom.techniques.recipe import Recipe
from lissom.techniques.recovering import Recoverer, adopt, training_form
from lissom.training import phases
from lissom.training.methods.lgvit import AlternatingExits, ExitDistillation
from lissom.training.methods.recovery import Afterwards, Answers, Recovery

TARGET = Target("openvino", "cpu", 1, 1)


def small_vit() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, num_heads=2, depth=6, num_classes=4
    ).eval()


def small_cnn() -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for i in range(6):
        layers += [nn.Conv2d(8 if i else 3, 8, 3, 2 if i == 2 else 1, 1), nn.BatchNorm2d(8), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).eval()


def stemmed_vit() -> nn.Module:
    """With a convolutional stem so dear that an exit may stand behind it, on maps."""
    torch.manual_seed(0)
    return create_model("cifar_vit", embed_dim=32, num_heads=2, depth=6, num_classes=4).eval()


def task(count: int = 64) -> Task:
    rng = np.random.default_rng(0)
    y = rng.integers(0, 4, count)
    x = (rng.standard_normal((count, 3, 32, 32)) * 0.3 + y[:, None, None, None]).astype(np.float32)
    split = ArraySplit("made", x, y.astype(np.int64))
    return Task(choose=split, report=split, fit=split, shape=(3, 32, 32), classes=tuple("abcd"), name="made")


def test_places_of_a_vit_are_its_blocks_from_a_third_on() -> None:
    assert positions(small_vit(), (3, 32, 32)) == tuple(f"blocks.{i}" for i in (1, 2, 3, 4))


def test_places_of_a_cnn_hand_on_few_numbers() -> None:
    known = positions(small_cnn(), (3, 32, 32))
    assert 2 <= len(known) <= 8
    # Behind the activation nothing is handed on that the convolution's output would not be; the first of them stands.
    assert all(path.isdigit() for path in known)
    assert [int(p) for p in known] == sorted(int(p) for p in known)


@pytest.mark.parametrize("make", [small_vit, small_cnn])
def test_the_plan_answers_at_every_exit_and_leaves_the_model_alone(make) -> None:  # type: ignore[no-untyped-def]
    model = make()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    plan = Plan.of(model, (3, 32, 32))
    changed = EarlyExit(risk=1.0).apply(plan, task())
    assert exits_of(model) is None
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        answers = changed.model(x)
        torch.testing.assert_close(answers[-1], model(x))
    assert len(answers) == len(changed.decisions) + 1
    assert all(a.shape == (2, 4) for a in answers)
    costs = [e.cost for e in changed.decisions]
    assert costs == sorted(costs)
    assert 0 < costs[0] < 1.2
    assert all(0 < e.heads < 1 and e.risk == 1.0 for e in changed.decisions)
    assert len(changed.recovery) == 1


def test_numbers_are_blocks_and_paths_are_paths() -> None:
    plan = Plan.of(small_vit(), (3, 32, 32))
    by_number = EarlyExit(at=(3, 1)).apply(plan, task())
    by_path = EarlyExit(at=("blocks.1", "blocks.3")).apply(plan, task())
    assert [e.at for e in by_number.decisions] == ["blocks.1", "blocks.3"] == [e.at for e in by_path.decisions]
    assert str(EarlyExit(at=(1, 3))) == "early_exit(at=(1, 3))"
    assert Recipe.parse("early_exit(at=(1, 3)) + int8()").techniques[0] == EarlyExit(at=(1, 3))


def test_what_is_refused() -> None:
    plan = Plan.of(small_vit(), (3, 32, 32))
    for at in ((9,), ("nowhere",)):
        with pytest.raises(NotApplicable, match="no module"):
            EarlyExit(at=at).apply(plan, task())
    with pytest.raises(NotApplicable, match=r"cannot be cut behind 'blocks\.1\.mlp'"):
        EarlyExit(at=("blocks.1.mlp",)).apply(plan, task())
    for runtime in RUNTIMES:
        EarlyExit().check(plan, Target(runtime, "cpu", 1, 1))  # all of them cut
    once = EarlyExit().apply(plan, task())
    with pytest.raises(NotApplicable, match="exits already"):
        EarlyExit().check(once, TARGET)
    shallow = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 4))
    with pytest.raises(NotApplicable, match="no place in its middle"):
        EarlyExit().apply(Plan.of(shallow, (3, 32, 32)), task())
    for wrong in ({"at": "blocks.1"}, {"at": ()}, {"rule": "mood"}, {"risk": 0}, {"risk": 100}, {"risk": "low"},
                  {"heads": "conv"}, {"train": "some"}, {"patience": 0}, {"patience": True}, {"among": (1, 2)},
                  {"among": (1, 2), "heads": "published"}):  # fmt: skip
        with pytest.raises(ValueError, match=r"(at|rule|risk|heads|train|patience|among) is"):
            EarlyExit(**wrong)
    with pytest.raises(NotApplicable, match="2 exits cannot be sure 3 times in a row"):
        EarlyExit(at=(1, 2), rule="patient_and_confident", patience=3).apply(plan, task())


def test_a_network_with_something_of_the_exits_name_is_refused() -> None:
    class Named(nn.Module):
        def __init__(self, declared: bool) -> None:
            super().__init__()
            self.body, self.head = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 8)), nn.Linear(8, 4)
            self.exits = nn.ModuleList([nn.Linear(8, 4)])
            self.declared = declared

        def own_exits(self) -> list[OwnExit]:
            return [OwnExit("exits.0", carries=("body",))] if self.declared else []

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.body(x)
            self.exits[0](x)
            return self.head(x)

    for declared in (True, False):
        plan = Plan.of(Named(declared).eval(), (3, 32, 32))
        sentence = "Named has something else called 'exits', the name that exits go by; rename it"
        with pytest.raises(NotApplicable, match=sentence):
            EarlyExit().check(plan, TARGET)
        with pytest.raises(NotApplicable, match=sentence):
            EarlyExit().apply(plan, task())


def test_the_space_offers_places_and_risks() -> None:
    space = EarlyExit.space(Plan.of(small_vit(), (3, 32, 32)), TARGET)
    assert ("blocks.1",) in space["at"]
    assert tuple(f"blocks.{i}" for i in (1, 2, 3, 4)) in space["at"]
    assert len(space["at"]) == len(set(space["at"]))
    assert set(space["risk"]) == {0.25, 0.5, 1.0, 2.0}


@pytest.mark.parametrize(("make", "early"), [(small_vit, "blocks.1"), (stemmed_vit, "patch_embed.layers.12")])
def test_heads_trained_once_serve_every_choice(tmp_path, make, early) -> None:  # type: ignore[no-untyped-def]
    plan, of = Plan.of(make(), (3, 32, 32)), task()
    assert {early, "blocks.2", "blocks.4"} <= set(positions(plan.model, (3, 32, 32)))
    recoverer = Recoverer(plan, of, TARGET, tmp_path, epochs=2, seconds=None, seed=0)
    first, second = EarlyExit(at=("blocks.2",)), EarlyExit(at=(early, "blocks.4"), risk=1.0)
    assert str(training_form(Recipe((first,)))) == str(training_form(Recipe((second,))))
    one = recoverer.recover(Recipe((first,)), first.apply(plan, of))
    files = list(tmp_path.glob("*.safetensors"))
    assert len(files) == 1
    stamp = files[0].stat().st_mtime_ns
    two = recoverer.recover(Recipe((second,)), second.apply(plan, of))
    assert list(tmp_path.glob("*.safetensors")) == files
    assert files[0].stat().st_mtime_ns == stamp
    # The backbone is frozen, and the heads have learnt: they answer otherwise than untrained ones.
    x = torch.from_numpy(of.fit.inputs(slice(0, 16)))  # type: ignore[union-attr]
    with torch.no_grad():
        torch.testing.assert_close(two.model(x)[-1], plan.model(x))
        fresh = second.apply(plan, of).model(x)
        assert not torch.allclose(two.model(x)[0], fresh[0], atol=1e-3)
    # Every place's head is the same wherever it stands in the recipe.
    both = EarlyExit(at=(early, "blocks.2"))
    three = recoverer.recover(Recipe((both,)), both.apply(plan, of))
    with torch.no_grad():
        torch.testing.assert_close(three.model(x)[1], one.model(x)[0])
        torch.testing.assert_close(three.model(x)[0], two.model(x)[0])


@pytest.mark.parametrize("make", [small_vit, stemmed_vit])
def test_heads_serve_clustered_tokens_too(tmp_path, make) -> None:  # type: ignore[no-untyped-def]
    plan, of = Plan.of(make(), (3, 32, 32)), task()
    recoverer = Recoverer(plan, of, TARGET, tmp_path, epochs=1, seconds=None, seed=0)
    plain = Recipe.parse("early_exit(at=(2, 4))")
    fewer = Recipe.parse("token_clustering(after=3) + early_exit(at=(2, 4))")
    one = recoverer.recover(plain, plain.apply(plan, of, TARGET)).model
    two = recoverer.recover(fewer, fewer.apply(plan, of, TARGET)).model
    assert len(list(tmp_path.glob("*.safetensors"))) == 1
    x = torch.from_numpy(of.choose.inputs(slice(0, 4)))
    with torch.no_grad():
        first, second = one(x), two(x)
    torch.testing.assert_close(second[0], first[0])  # before the clustering nothing differs
    assert not torch.allclose(second[1], first[1], atol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))


def test_places_that_a_search_would_not_try_are_trained_too(tmp_path) -> None:  # type: ignore[no-untyped-def]
    plan, of = Plan.of(small_vit(), (3, 32, 32)), task()
    last = f"blocks.{len(plan.model.blocks) - 1}"  # type: ignore[arg-type]
    assert last not in positions(plan.model, (3, 32, 32))
    recoverer = Recoverer(plan, of, TARGET, tmp_path, epochs=1, seconds=None, seed=0)
    given = EarlyExit(at=("blocks.2", last))
    fresh = given.apply(plan, of)
    trained = recoverer.recover(Recipe((given,)), fresh)
    before, after = (exits_of(p.model).state_dict() for p in (fresh, trained))  # type: ignore[union-attr]
    for head in ("heads.0.", "heads.1."):
        assert any(not torch.equal(before[k], after[k]) for k in before if k.startswith(head))
    alone = EarlyExit(at=(last,))
    assert alone.apply(plan, of).decisions[0].at == last
    recoverer.recover(Recipe((alone,)), alone.apply(plan, of))
    assert len(list(tmp_path.glob("*.safetensors"))) == 1


def test_without_training_data_it_is_refused(tmp_path) -> None:  # type: ignore[no-untyped-def]
    plan, of = Plan.of(small_vit(), (3, 32, 32)), task().with_splits(fit=None)
    recoverer = Recoverer(plan, of, TARGET, tmp_path, epochs=1, seconds=None, seed=0)
    with pytest.raises(NotApplicable, match="nothing to train on"):
        recoverer.recover(Recipe((EarlyExit(),)), EarlyExit().apply(plan, of))
    assert recoverer.recover(Recipe(), plan) is plan


def test_adopting_takes_heads_by_their_place() -> None:
    plan, of = Plan.of(small_vit(), (3, 32, 32)), task()
    every = EarlyExit(at=("*",)).apply(plan, of).model
    with torch.no_grad():
        for i, head in enumerate(exits_of(every).heads):  # type: ignore[union-attr]
            head.classifier.bias.fill_(float(i))
    some = EarlyExit(at=("blocks.3",)).apply(plan, of).model
    taken = adopt(some, every)
    assert exits_of(taken).heads[0].classifier.bias.tolist() == [2.0] * 4  # type: ignore[union-attr]
    assert exits_of(some).heads[0].classifier.bias.tolist() != [2.0] * 4  # type: ignore[union-attr]


def kinds_of(plan: Plan) -> list[str]:
    """The kinds of the plan's heads, as ``build_head`` calls them."""
    found = []
    for head in exits_of(plan.model).heads:  # type: ignore[union-attr]
        mixer = getattr(head, "mixer", None)
        if isinstance(mixer, LocalPerceptionHead):
            found.append("lph_a" if mixer.depthwise else "lph_b")
        elif isinstance(mixer, GlobalAggregationHead):
            found.append(f"gah{mixer.stride}")
        else:
            found.append(type(head).__name__)
    return found


def deep_vit(**sizes: Any) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224",
        **{"img_size": 32, "patch_size": 8, "embed_dim": 32, "num_heads": 2, "depth": 12, "num_classes": 4, **sizes},
    ).eval()


def test_kinds_of_heads_by_their_number_or_by_their_place() -> None:
    plan = Plan.of(deep_vit(), (3, 32, 32))
    for at in ((3, 4, 5, 6, 7, 8, 9, 10), (3, 5, 7, 8, 9, 10), (3, 5, 8, 10), (3, 8), (9, 2, 5)):
        published = EarlyExit(at=at, heads="published").apply(plan, task())
        assert kinds_of(published) == head_kinds(len(at))
    some = EarlyExit(at=(3, 5, 8, 10), heads="published").only(("blocks.5", "blocks.10"))
    assert kinds_of(some.apply(plan, task())) == ["lph_b", "gah3"]
    assert some.training_form().apply(plan, task()).decisions[0].at == "blocks.3"
    assert kinds_of(some.training_form().apply(plan, task())) == head_kinds(4)
    assert some.only(("blocks.10",)) == replace(some, at=("blocks.10",))
    # By place, a head is of one kind in every recipe.
    by_place = {e.at: k for p in [EarlyExit(at=("*",)).apply(plan, task())]
                for e, k in zip(p.decisions, kinds_of(p), strict=True)}  # fmt: skip
    assert list(by_place.values()) == head_kinds(len(by_place))
    assert kinds_of(EarlyExit(at=("blocks.9",)).apply(plan, task())) == [by_place["blocks.9"]]


def test_linear_heads_are_the_baseline() -> None:
    plan = Plan.of(deep_vit(depth=4), (3, 32, 32))
    changed = EarlyExit(at=(1, 2), heads="linear").apply(plan, task())
    x = torch.randn(2, 3, 32, 32)
    seen = {}
    changed.model.blocks[1].register_forward_hook(lambda m, i, o: seen.update(x=o))
    with torch.no_grad():
        early = changed.model(x)[0]
        torch.testing.assert_close(early, changed.model.exits.heads[0].classifier(seen["x"][:, 0]))
    cnn = EarlyExit(at=("4",), heads="linear").apply(Plan.of(small_cnn(), (3, 32, 32)), task())
    assert kinds_of(cnn) == ["LinearExit"]
    with torch.no_grad():
        inside = cnn.model[:5](x)
        torch.testing.assert_close(cnn.model(x)[0], cnn.model.exits.heads[0].classifier(inside.mean((2, 3))))


def test_special_tokens_are_read_as_what_they_are() -> None:
    plan = Plan.of(distilled_vit(), (3, 32, 32))
    head = exits_of(EarlyExit(at=(2,)).apply(plan, task()).model).heads[0]  # type: ignore[union-attr]
    assert isinstance(head, TokenExit)
    assert (head.prefix, head.class_token, head.distillation_classifier is not None) == (2, True, True)
    registers = deep_vit(depth=4, class_token=False, reg_tokens=2, global_pool="avg")
    changed = EarlyExit(at=(2,)).apply(Plan.of(registers, (3, 32, 32)), task())
    head = exits_of(changed.model).heads[0]  # type: ignore[union-attr]
    assert (head.prefix, head.class_token, head.distillation_classifier) == (2, False, None)


@pytest.mark.parametrize(("kind", "sizes"), [(Cait, {}), (ConVit, {"local_up_to_layer": 4}), (Xcit, {})])
def test_a_class_token_that_joins_late_is_read_where_it_is(kind: Any, sizes: Any, tmp_path: Any) -> None:
    torch.manual_seed(0)
    small: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "num_heads": 2, "num_classes": 4}
    model, of = kind(depth=6, **small, **sizes).eval(), task(16)
    plan = Plan.of(model, (3, 32, 32))
    for heads in ("auto", "linear"):
        plans = EarlyExit(at=(1, 3, 4), heads=heads).apply(plan, of)
        found = [(head.prefix, head.class_token) for head in exits_of(plans.model).heads]  # type: ignore[union-attr]
        assert found == [(0, False), (0, False), (1, True) if kind is ConVit else (0, False)]
    recoverer = Recoverer(plan, of, TARGET, tmp_path, epochs=1, seconds=None, seed=0)
    exits = EarlyExit(at=(1, 4))
    answers = recoverer.recover(Recipe((exits,)), exits.apply(plan, of)).model(torch.zeros(2, 3, 32, 32))
    assert [tuple(answer.shape) for answer in answers] == [(2, 4)] * 3


class Pairs(nn.Module):
    """Makes one token of every two patches, and leaves the class token out."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, 1:].unflatten(1, (-1, 2)).mean(2)


@pytest.mark.parametrize("heads", ["auto", "linear"])
def test_tokens_that_are_no_longer_the_patches_are_refused(heads: str) -> None:
    model = small_vit()
    model.blocks[1] = nn.Sequential(model.blocks[1], Pairs())  # type: ignore[operator]
    sentence = r"'blocks\.2' answers with 8 tokens, which are neither 4 x 4 patches nor these behind 1 special tokens"
    with pytest.raises(NotApplicable, match=sentence):
        EarlyExit(at=(2,), heads=heads).apply(Plan.of(model, (3, 32, 32)), task())


def test_images_of_another_size_than_the_model_was_built_for() -> None:
    shape, model = (3, 32, 48), deep_vit(depth=4, dynamic_img_size=True)
    for heads in ("auto", "linear"):
        changed = EarlyExit(at=(2,), heads=heads).apply(Plan.of(model, shape), replace(task(), shape=shape))
        (head,) = exits_of(changed.model).heads  # type: ignore[union-attr]
        assert (head.prefix, head.class_token, getattr(head, "grid", (4, 6))) == (1, True, (4, 6))


def distilled_vit() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(
        "deit_tiny_distilled_patch16_224", img_size=32, patch_size=8, embed_dim=32, num_heads=2, depth=4, num_classes=4
    ).eval()


def small_swin() -> nn.Module:
    torch.manual_seed(0)
    return SwinTransformer(
        img_size=32, patch_size=2, window_size=4, embed_dim=16, depths=(1, 2, 3, 1), num_heads=(1, 2, 2, 4),
        num_classes=4,
    ).eval()  # fmt: skip


def small_pvt() -> nn.Module:
    torch.manual_seed(0)
    return PyramidVisionTransformerV2(
        depths=(1, 2, 3, 1), embed_dims=(8, 16, 24, 32), num_heads=(1, 1, 2, 2), sr_ratios=(4, 2, 1, 1),
        mlp_ratios=(2, 2, 2, 2), num_classes=4,
    ).eval()  # fmt: skip


class Block(nn.Module):
    """Answers with a tuple, as blocks of the transformers package do."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(dim), nn.Linear(dim, dim)
        self.mix = nn.MultiheadAttention(dim, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        y = self.norm(x)
        x = x + self.mix(y, y, y, need_weights=False)[0]
        return (x + self.mlp(x).relu(),)


class Stage(nn.Module):
    """Blocks on tokens (B, h w, C), then, in front of another stage, patches merged; answers as transformers' Swin."""

    def __init__(self, dim: int, depth: int, merging: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(dim) for _ in range(depth))
        self.downsample = nn.Linear(4 * dim, 2 * dim) if merging else None

    def forward(self, x: torch.Tensor, grid: tuple[int, int]) -> tuple[Any, ...]:
        for block in self.blocks:
            x = block(x)[0]
        before = x
        if self.downsample is None:
            return x, before, grid
        rows, columns = grid
        x = x.unflatten(1, (rows // 2, 2, columns // 2, 2)).permute(0, 1, 3, 2, 4, 5).flatten(3).flatten(1, 2)
        return self.downsample(x), before, (rows // 2, columns // 2)


class Staged(nn.Module):
    """The public structure of transformers' Swin, inside a user's wrapper: 3 stages of tokens without a class token."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.swin = nn.Module()
        self.swin.embed = nn.Conv2d(3, 8, 4, 4)
        self.swin.encoder = nn.Module()
        self.swin.encoder.layers = nn.ModuleList([Stage(8, 1, True), Stage(16, 3, True), Stage(32, 1, False)])
        self.swin.layernorm = nn.LayerNorm(32)
        self.classifier = nn.Linear(32, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.swin.embed(x)
        grid: tuple[int, int] = (x.shape[2], x.shape[3])
        x = x.flatten(2).transpose(1, 2)
        for stage in self.swin.encoder.layers:
            x, _, grid = stage(x, grid)
        return self.classifier(self.swin.layernorm(x).mean(1))


class Wrapped(nn.Module):
    """The public structure of transformers' DeiT, inside a user's wrapper."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Module()
        self.net.embeddings = nn.Module()
        self.net.embeddings.cls_token = nn.Parameter(torch.randn(1, 1, 64))
        self.net.embeddings.distillation_token = nn.Parameter(torch.randn(1, 1, 64))
        patches = nn.Module()
        patches.image_size, patches.patch_size = (32, 32), (8, 8)
        patches.projection = nn.Conv2d(3, 64, 8, 8)
        self.net.embeddings.patch_embeddings = patches
        self.net.encoder = nn.Module()
        self.net.encoder.layer = nn.ModuleList(Block(64) for _ in range(5))
        self.head, self.other = nn.Linear(64, 4), nn.Linear(64, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inside = self.net.embeddings
        x = inside.patch_embeddings.projection(x).flatten(2).transpose(1, 2)
        x = torch.cat((inside.cls_token.expand(len(x), -1, -1), inside.distillation_token.expand(len(x), -1, -1), x), 1)
        for block in self.net.encoder.layer:
            x = block(x)[0]
        return (self.head(x[:, 0]) + self.other(x[:, 1])) / 2


@pytest.mark.parametrize(
    ("make", "side", "numbers", "paths"),
    [
        (small_swin, (32, 32), (2, 3, 5), ("layers.1", "layers.2.blocks.0", "layers.2")),
        (small_pvt, (64, 96), (2, 3), ("stages.1.blocks.1", "stages.2.blocks.0")),
        (Staged, (32, 48), (1, 3), tuple(f"swin.encoder.layers.1.blocks.{i}" for i in (0, 2))),
        (Wrapped, (32, 32), (1, 3), tuple(f"net.encoder.layer.{i}" for i in (1, 3))),
        (distilled_vit, (32, 32), (1, 2), ("blocks.1", "blocks.2")),
    ],
)
def test_transformers_by_their_public_structure(make: Any, side: Any, numbers: Any, paths: Any) -> None:
    model, shape = make().eval(), (3, *side)
    known = positions(model, shape)
    stages = make in (small_swin, small_pvt, Staged)
    # Behind blocks alone, and in front of what merges patches.
    assert set(paths) <= set(known)
    assert not any("downsample" in path or "embed" in path for path in known)
    of = replace(task(), shape=shape)
    plan = EarlyExit(at=numbers).apply(Plan.of(model, shape), of)
    found = [e.at for e in plan.decisions]
    # A stage that ends with its last block shares that block's place.
    assert [check_cut(model, shape, a).done for a in found] == [check_cut(model, shape, b).done for b in paths]
    every = EarlyExit(at=("*",)).apply(Plan.of(model, shape), of)
    assert kinds_of(every) == head_kinds(len(known), maps=stages)
    heads = exits_of(every.model).heads  # type: ignore[union-attr]
    assert all(isinstance(head, MapExit if stages else TokenExit) for head in heads)
    if not stages:
        assert all((head.prefix, head.distillation_classifier is not None) == (2, True) for head in heads)
    x = torch.randn(2, *shape)
    with torch.no_grad():
        answers = every.model(x)
        assert [tuple(a.shape) for a in answers] == [(2, 4)] * (len(known) + 1)
        torch.testing.assert_close(answers[-1], model(x))
    # Both ways of training take it: the loss is there, and reaches heads that read tokens.
    method = Recovery(terms=(ExitDistillation(),))
    method.prepare(every.model, of)
    loss = method.loss(every.model, x, torch.tensor([0, 1]), of)
    loss.backward()
    assert all(p.grad is not None for p in exits_of(every.model).parameters())  # type: ignore[union-attr]
    if make is Staged:
        with pytest.raises(NotApplicable, match=r"'swin\.encoder\.layers\.0' answers with several tensors"):
            EarlyExit(at=("swin.encoder.layers.0",)).apply(Plan.of(model, shape), of)


@pytest.mark.parametrize(
    ("make", "side"), [pytest.param(Wrapped, (32, 32), marks=pytest.mark.full), (Staged, (32, 48))]
)
def test_blocks_that_answer_with_tuples_are_cut(make: Any, side: Any, tmp_path: Any) -> None:
    model, shape = make().eval(), (3, *side)
    plan = EarlyExit(at=(1, 3)).apply(Plan.of(model, shape), replace(task(), shape=shape))
    artifact = export_plan(plan, Target("openvino", "cpu", 2, 1), tmp_path / "a", shape=shape)
    inputs = np.random.default_rng(0).standard_normal((4, *shape)).astype(np.float32)
    answers, scores = run_stages(artifact, inputs, 1)
    with torch.no_grad():
        for own, other in zip(answers, plan.model(torch.from_numpy(inputs)), strict=True):
            np.testing.assert_allclose(own, other.numpy(), atol=1e-4)
    assert scores.shape == (4, 2)


def test_a_class_token_of_the_last_stage_is_read() -> None:
    torch.manual_seed(0)
    model = create_model("cvt_13_224", dims=(8, 12, 16), heads=(1, 3, 2), depths=(1, 1, 3), num_classes=4).eval()
    plan = EarlyExit(at=(1, 3)).apply(Plan.of(model, (3, 64, 64)), replace(task(), shape=(3, 64, 64)))
    assert [e.at for e in plan.decisions] == ["stage1.blocks.0", "stage2.blocks.1"]
    first, second = exits_of(plan.model).heads  # type: ignore[union-attr]
    assert isinstance(first, MapExit)
    assert isinstance(second, TokenExit)
    assert (second.prefix, second.class_token, second.grid) == (1, True, (4, 4))


def test_a_stage_of_a_transformer_is_a_map_of_tokens() -> None:
    plan = EarlyExit(at=("stages.1",)).apply(Plan.of(small_pvt(), (3, 64, 64)), replace(task(), shape=(3, 64, 64)))
    (head,) = exits_of(plan.model).heads  # type: ignore[union-attr]
    assert isinstance(head, MapExit)
    assert head.channels_first


class Turned(nn.Module):
    """A network whose maps have their channels last inside, and which does not say so."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Conv2d(3, 24, 4, 4)
        self.layers = nn.Sequential(*(nn.Sequential(nn.LayerNorm(24), nn.Linear(24, 24)) for _ in range(4)))
        self.head = nn.Linear(24, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layers(self.embed(x).permute(0, 2, 3, 1)).mean((1, 2)))


def test_maps_of_images_that_are_not_square() -> None:
    shape = (3, 16, 24)
    of = replace(task(), shape=shape)
    # 8 channels on 8 x 12 places: the first sizes are equal, and the channels are not the last.
    plan = EarlyExit(at=("7", "13")).apply(Plan.of(small_cnn(), shape), of)
    assert kinds_of(plan) == ["ConvExit", "ConvExit"]
    linear = EarlyExit(at=("7",), heads="linear").apply(Plan.of(small_cnn(), shape), of)
    turned = EarlyExit(at=("layers.1", "layers.2")).apply(Plan.of(Turned().eval(), shape), of)
    heads = [head for p in (linear, turned) for head in exits_of(p.model).heads]  # type: ignore[union-attr]
    assert [(type(head).__name__, head.channels_first) for head in heads] == [
        ("LinearExit", True), ("MapExit", False), ("MapExit", False)
    ]  # fmt: skip
    assert [head.classifier.in_features for head in heads] == [8, 24, 24]


@pytest.mark.parametrize("name", ["ViT", "DeiT", "Swin"])
def test_models_of_the_transformers_package(name: str) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    sizes = {"image_size": 32, "num_labels": 4}
    if name == "Swin":
        config = transformers.SwinConfig(patch_size=2, embed_dim=16, depths=[1, 2, 2], num_heads=[1, 2, 2],
                                         window_size=4, **sizes)  # fmt: skip
        inner = transformers.SwinForImageClassification(config)
    else:
        kind = {"ViT": "ViTForImageClassification", "DeiT": "DeiTForImageClassificationWithTeacher"}[name]
        config = getattr(transformers, f"{name}Config")(
            patch_size=8, hidden_size=32, num_hidden_layers=5, num_attention_heads=2, intermediate_size=64, **sizes
        )
        inner = getattr(transformers, kind)(config)

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.model(x).logits

    model = Logits().eval()
    known = positions(model, (3, 32, 32))
    assert len(known) >= 2
    plan = EarlyExit(at=("*",)).apply(Plan.of(model, (3, 32, 32)), task())
    heads = exits_of(plan.model).heads  # type: ignore[union-attr]
    assert all(isinstance(head, MapExit if name == "Swin" else TokenExit) for head in heads)
    if name != "Swin":
        prefix = 1 + (name == "DeiT")
        assert all((h.prefix, h.distillation_classifier is not None) == (prefix, prefix == 2) for h in heads)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(plan.model(x)[-1], model(x))


def test_both_stages_of_training(tmp_path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    plan, of = Plan.of(deep_vit(depth=4), (3, 32, 32)), task()
    both = EarlyExit(at=(1, 2), train="both")
    terms = both.apply(plan, of).recovery
    assert terms == (AlternatingExits(), Afterwards(ExitDistillation()))
    assert EarlyExit(at=(1, 2), train="all").apply(plan, of).recovery == (AlternatingExits(),)
    assert str(training_form(Recipe((both,)))) == "early_exit(at=('*',), train='both')"
    recoverer = Recoverer(plan, of, TARGET, tmp_path, epochs=2, seconds=None, seed=0)
    events: list[Any] = []
    recoverer.progress = events.append
    found = recoverer.recover(Recipe((both,)), both.apply(plan, of))
    assert [(e.epoch, e.epochs) for e in events] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert [training.passes for training in recoverer.trainings] == [2, 2]  # a phase each
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".safetensors"]  # nothing else is left
    trained, fresh = found.model.state_dict(), both.apply(plan, of).model.state_dict()
    moved = {key for key in trained if not torch.equal(trained[key], fresh[key])}
    assert "blocks.0.attn.qkv.weight" in moved
    assert "exits.heads.0.classifier.weight" in moved
    # The second training leaves the backbone as the first left it.
    alone = Recoverer(plan, of, TARGET, tmp_path / "one", epochs=2, seconds=None, seed=0)
    fits: list[Any] = []
    real = phases.fit

    def watched(model: nn.Module, task: Task, **settings: Any) -> Any:
        fits.append((settings["method"], {k: v.clone() for k, v in model.state_dict().items()}))
        return real(model, task, **settings)

    monkeypatch.setattr(phases, "fit", watched)
    alone.recover(Recipe((both,)), both.apply(plan, of))
    (first, _), (second, before) = fits
    assert first.original is plan.model
    assert first.terms == (AlternatingExits(),)  # which teaches the model's own answer, so that nothing else need
    assert second.original is None
    assert all(torch.equal(before[key], trained[key]) for key in before if not key.startswith("exits."))
    # A search that only chooses among the places trains nothing anew.
    less = EarlyExit(at=(2,), train="both", risk=2.0)
    recoverer.recover(Recipe((less,)), less.apply(plan, of))
    assert len(events) == 4


def test_a_second_training_that_was_killed_goes_on(tmp_path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    plan, of = Plan.of(deep_vit(depth=3), (3, 32, 32)), task()
    both = EarlyExit(at=(1,), train="both")
    recipe = Recipe((both,))
    whole = Recoverer(plan, of, TARGET, tmp_path / "whole", epochs=2, seconds=None, seed=0)
    want = whole.recover(recipe, both.apply(plan, of)).model.state_dict()

    class Stop(Exception):
        pass

    seen: list[Any] = []

    def stop(event: Any) -> None:
        seen.append(event)
        if len(seen) in (1, 3):  # after an epoch of the first training, and after one of the second
            raise Stop

    killed = Recoverer(plan, of, TARGET, tmp_path / "killed", epochs=2, seconds=None, seed=0, progress=stop)
    for _ in range(2):
        with pytest.raises(Stop):
            killed.recover(recipe, both.apply(plan, of))
    found = killed.recover(recipe, both.apply(plan, of)).model.state_dict()
    assert len(seen) == 4
    assert all(torch.equal(found[key], want[key]) for key in want)


def test_depths_are_operations_where_blocks_cannot_be_counted() -> None:
    plan = EarlyExit(at=("4", "11"), train="both").apply(Plan.of(small_cnn(), (3, 32, 32)), task())
    first = plan.recovery[0]
    assert first.blocks == 1.0
    assert first.depths == tuple(check_cut(small_cnn(), (3, 32, 32), p).done for p in ("4", "11"))
    exits = exits_of(plan.model)
    assert exits is not None
    assert not exits.detached


def test_depths_behind_stages_are_counted_in_blocks() -> None:
    for make, at, depths in (
        (small_swin, ("layers.1", "layers.2"), (3, 6)), (small_pvt, ("stages.0", "stages.1"), (1, 3)),
    ):  # fmt: skip
        of = replace(task(), shape=(3, 64, 64)) if make is small_pvt else task()
        plan = EarlyExit(at=at, train="all").apply(Plan.of(make(), of.shape), of)
        assert plan.recovery == (AlternatingExits(depths, 7),)
    blocks = EarlyExit(at=("layers.2.blocks.0", "layers.2.blocks.1"), train="all")
    assert blocks.apply(Plan.of(small_swin(), (3, 32, 32)), task()).recovery == (AlternatingExits((4, 5), 7),)


def test_exits_where_nobody_leaves_count_for_patience() -> None:
    patient = EarlyExit(at=(1, 2, 3), rule="patience")
    assert patient.only(("blocks.3",)) is patient
    assert EarlyExit(at=(1, 2, 3)).only(("blocks.3",)).at == ("blocks.3",)
    plan = replace(patient, rule="patient_and_confident").apply(Plan.of(small_vit(), (3, 32, 32)), task())
    assert [(e.rule, e.patience) for e in plan.decisions] == [("patient_and_confident", 2)] * 3
    assert patient.training_form() == EarlyExit(at=("*",))


def test_the_exits_a_model_arrived_with_read_clustered_tokens() -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"img_size": 32, "patch_size": 4, "embed_dim": 16, "num_heads": 2, "depth": 6}
    ready = create_model("lgvit_deit_small", num_classes=4, exits=(2, 3, 5), **sizes).eval()
    plan = Plan.of(put_away_exits(copy.deepcopy(ready)), (3, 32, 32))
    fewer = Recipe.parse("token_clustering(after=2, grid=(6, 6)) + early_exit()").apply(plan, task(), TARGET)
    heads = exits_of(fewer.model).heads  # type: ignore[union-attr]
    assert [head.grid for head in heads] == [(8, 8), (6, 6), (6, 6)]
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        want, found = ready(x), fewer.model(x)
    assert [tuple(answer.shape) for answer in found] == [(2, 4)] * 4
    torch.testing.assert_close(found[0], want[0])  # before the clustering nothing differs
    assert [head.grid for head in ready.exits.heads] == [(8, 8)] * 3


@pytest.mark.parametrize("name", ["lgvit_vit_base", "lgvit_deit_small", "lgvit_swin_base"])
def test_a_model_leaves_through_the_exits_it_arrived_with(name: str) -> None:
    sizes: dict[str, Any] = {"img_size": 32, "embed_dim": 16, "num_heads": 2, "num_classes": 4, "exits": (2, 3, 5)}
    if name == "lgvit_swin_base":
        sizes |= {"patch_size": 2, "window_size": 4, "embed_dim": 8, "num_heads": (1, 2, 2, 4), "depths": (1, 1, 4, 1)}
    else:
        sizes |= {"depth": 6}
    torch.manual_seed(0)
    ready = create_model(name, **sizes).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        want = ready(x)
    model = put_away_exits(copy.deepcopy(ready))
    plan = Plan.of(model, (3, 32, 32))
    assert EarlyExit.space(plan, TARGET)["at"][0] == (ready.exits.positions[0],)
    changed = EarlyExit().apply(plan, task())
    assert [e.at for e in changed.decisions] == list(ready.exits.positions)
    assert changed.recovery == ()  # they are trained
    with torch.no_grad():
        for own, other in zip(changed.model(x), want, strict=True):
            torch.testing.assert_close(own, other)
        some = EarlyExit(at=(1, 4)).apply(plan, task())
        for own, other in zip(some.model(x), (want[0], want[2], want[3]), strict=True):
            torch.testing.assert_close(own, other)
    with pytest.raises(NotApplicable, match=r"arrives with trained exits behind .*, and none behind"):
        EarlyExit(at=(3,)).apply(plan, task())
    fresh = EarlyExit(at=(3,), heads="linear").apply(plan, task())
    assert kinds_of(fresh) == ["LinearExit"]
    # Where the model is trained for another's sake, and where it is asked for, they are trained on.
    assert EarlyExit().apply(plan.with_recovery(Answers()), task()).recovery == (Answers(), ExitDistillation())
    if name != "lgvit_swin_base":
        assert EarlyExit(train="all").apply(plan, task()).recovery == (AlternatingExits(),)
