"""A model's own end as an exit's head: where stacks are seen, that the end is the model's, that nothing else runs."""

from __future__ import annotations

import copy
import pickle
from typing import Any, NamedTuple

import pytest
import timm
import torch
from torch import nn
from torchvision.models import VisionTransformer as Torchvisions

from lissom.errors import LissomError
from lissom.layers.exits import exits_of, remove_exits
from lissom.layers.own_end import BlockStack, attach_own_ends, block_stacks, own_end_error
from lissom.layers.token_clustering import attach_token_clusters
from lissom.meters.costs import layer_costs

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "num_heads": 2, "num_classes": 4}


def vit(depth: int = 4, **other: Any) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", depth=depth, **{**SMALL, **other}).eval()


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def longest(model: nn.Module, x: torch.Tensor) -> BlockStack:
    return max(block_stacks(model, x), key=lambda s: len(s.paths))


def test_the_stack_of_a_vit_is_its_blocks(x):
    model = vit()
    (stack,) = block_stacks(model, x)
    assert stack.paths == tuple(f"blocks.{i}" for i in range(4))
    assert stack.shape == (17, 32)
    assert stack.first == 0
    assert "patch_embed" in stack.before
    assert not any(path.startswith(("blocks", "patch_embed.")) or path in ("norm", "head") for path in stack.before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_runs_end_where_kind_or_shape_changes():
    class Other(nn.Linear):
        pass

    parts = [nn.Linear(3, 5), nn.Linear(5, 5), nn.Linear(5, 5), Other(5, 5), Other(5, 5), Other(5, 5), nn.Linear(5, 2)]
    stacks = block_stacks(nn.Sequential(*parts), torch.zeros(1, 3))
    assert [(s.paths, s.first) for s in stacks] == [(("1", "2"), 1), (("3", "4", "5"), 3)]
    assert stacks[1].before == ("0", "1", "2")
    shared = nn.Linear(5, 5)
    assert block_stacks(nn.Sequential(shared, shared), torch.zeros(1, 5)) == []


def wrapped() -> nn.Module:
    """A model of transformers' form: layers in a list further inside, called by name, an answer that is an object."""

    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Conv2d(3, 16, 8, 8)
            self.encoder = nn.Module()
            self.encoder.layer = nn.ModuleList(Called() for _ in range(3))
            self.layernorm = nn.LayerNorm(16)

        def forward(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
            h = self.embed(pixel_values).flatten(2).transpose(1, 2)
            for layer in self.encoder.layer:
                h = layer(hidden_states=h)
            return {"last_hidden_state": self.layernorm(h)}

    class Called(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)

        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return self.inner(hidden_states)

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vit, self.classifier = Inner(), nn.Linear(16, 4)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.classifier(self.vit(images)["last_hidden_state"].mean(1))

    torch.manual_seed(0)
    return Wrapped().eval()


MODELS = {
    "ViT": vit,
    "mean of tokens": lambda: vit(class_token=False, global_pool="avg"),
    "DeiT": lambda: timm.create_model("deit_tiny_distilled_patch16_224", depth=4, **SMALL).eval(),
    "CaiT": lambda: timm.create_model("cait_xxs24_224", depth=3, **SMALL).eval(),
    "BEiT": lambda: timm.create_model("beit_base_patch16_224", depth=3, **SMALL).eval(),
    "rotary": lambda: timm.create_model("eva02_tiny_patch14_224", depth=3, **SMALL).eval(),
    "torchvision": lambda: Torchvisions(32, 8, 3, 2, 16, 32, num_classes=4).eval(),
    "wrapped": wrapped,
    "ConvNeXt": lambda: timm.create_model("convnext_atto", num_classes=4).eval(),
}


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_the_end_is_the_models_own(name, x):
    torch.manual_seed(0)
    model = MODELS[name]()
    for parameter in model.parameters():  # some begin with blocks that add next to nothing
        parameter.add_(0.1 * torch.randn_like(parameter))
    stack = longest(model, x)
    if name == "ConvNeXt":  # the longest stands in its third stage; behind the last stands nothing but the end
        stack = block_stacks(model, x)[-1]
    assert own_end_error(model, stack, x) == 0.0
    own = model(x)
    scale = float(own.abs().max())
    states: list[torch.Tensor] = []
    attach_own_ends(model, stack, stack.paths[:-1])
    handles = [
        model.get_submodule(path).register_forward_hook(lambda m, i, o: states.append(o)) for path in stack.paths
    ]
    answers = model(x)
    for handle in handles:
        handle.remove()
    assert len(answers) == len(stack.paths) == len(states)  # every block ran once
    torch.testing.assert_close(answers[-1], own)
    remove_exits(model)
    for answer, state in zip(answers[:-1], states[:-1], strict=True):
        assert float((answer - own).abs().max()) > 1e-3 * scale
        # A model whose later blocks add nothing answers the same.
        handle = model.get_submodule(stack.paths[-1]).register_forward_hook(lambda m, i, o, state=state: state)
        torch.testing.assert_close(answer, model(x))
        handle.remove()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@torch.no_grad()
def test_at_the_models_end_the_answers_are_norm_and_head(x):
    model = vit()
    stack = longest(model, x)
    attach_own_ends(model, stack, ["blocks.2", "blocks.0"])
    assert exits_of(model).positions == ("blocks.0", "blocks.2")
    h = model.patch_embed(x)
    h = model.norm_pre(model.patch_drop(model._pos_embed(h)))
    for number, answer in ((0, 0), (1, None), (2, 1)):
        h = model.blocks[number](h)
        if answer is not None:
            torch.testing.assert_close(model(x)[answer], model.forward_head(model.norm(h)))


def test_copies_and_pickles_stand_on_their_own_weights(x):
    model = vit()
    attach_own_ends(model, longest(model, x), ["blocks.1"])
    with torch.no_grad():
        want = model(x)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert all(torch.equal(a, b) for a, b in zip(other(x), want, strict=True))
            for parameter in other.parameters():
                parameter.mul_(0.5)
            assert not torch.allclose(other(x)[0], want[0])
        assert all(torch.equal(a, b) for a, b in zip(model(x), want, strict=True))
    assert set(model.state_dict()) == {*vit().state_dict(), "exits.steps"}
    assert len(list(model.parameters())) == len(list(vit().parameters()))


def test_gradients_reach_blocks_before_the_exit_and_the_end_alone(x):
    model = vit()
    attach_own_ends(model, longest(model, x), ["blocks.1"])
    model(x)[0].sum().backward()
    with_gradient = {
        ".".join(name.split(".")[:2]) for name, p in model.named_parameters() if p.grad is not None and p.grad.any()
    }
    assert {"blocks.0", "blocks.1", "norm.weight", "head.weight", "patch_embed.proj"} <= with_gradient
    assert not {"blocks.2", "blocks.3"} & with_gradient


def test_what_ran_before_runs_once_and_is_counted_once(x):
    """A norm before the blocks takes in each batch once, and dropout draws once."""

    class Stem(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(3)
            self.embed, self.drop = nn.Conv2d(3, 16, 8, 8), nn.Dropout(0.5)
            self.blocks = nn.Sequential(*(nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True) for _ in "abc"))
            self.head = nn.Linear(16, 4)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            h = self.drop(self.embed(self.norm(images)).flatten(2).transpose(1, 2))
            return self.head(self.blocks(h).mean(1))

    torch.manual_seed(0)
    model, plain = Stem(), Stem()
    plain.load_state_dict(model.state_dict())
    attach_own_ends(model, longest(model, x), ["blocks.0", "blocks.1"])
    torch.manual_seed(1)
    answers = model.train()(x)
    torch.manual_seed(1)
    torch.testing.assert_close(answers[-1], plain.train()(x))
    torch.testing.assert_close(model.norm.running_mean, plain.norm.running_mean)
    ends = {cost.path: cost.macs for cost in layer_costs(model.eval(), (3, 32, 32))}
    assert ends["exits.heads.0"] == ends["exits.heads.1"] == ends["head"] == 16 * 4
    assert {p: m for p, m in ends.items() if not p.startswith("exits")} == {
        cost.path: cost.macs for cost in layer_costs(plain.eval(), (3, 32, 32))
    }


def test_a_module_that_the_end_uses_too_runs_there(x):
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.norm = nn.Conv2d(3, 16, 8, 8), nn.LayerNorm(16)
            self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True) for _ in "abc")
            self.head = nn.Linear(16, 4)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            h = self.norm(self.norm(self.embed(images).flatten(2).transpose(1, 2)) * 2)
            for block in self.blocks:
                h = block(h)
            return self.head(self.norm(h).mean(1))

    torch.manual_seed(0)
    model = Twice().eval()
    assert own_end_error(model, longest(model, x), x) == 0.0


@torch.no_grad()
def test_exits_before_and_behind_a_clustering(x):
    plain, model = vit(), vit()
    stack = longest(plain, x)
    attach_token_clusters(model, 2, (2, 3))
    attach_own_ends(model, stack, stack.paths[:-1])
    attach_own_ends(plain, stack, stack.paths[:-1])
    clustered, whole = model(x), plain(x)
    for number in (0, 1):
        assert torch.equal(clustered[number], whole[number])
    for number in (2, 3):
        assert clustered[number].shape == (2, 4)
        assert not torch.allclose(clustered[number], whole[number], atol=1e-4)


def test_the_graph_is_that_of_the_modules(x):
    model = vit()
    attach_own_ends(model, longest(model, x), ["blocks.1"])
    with torch.no_grad():
        program = torch.export.export(model, (x,))
        for exported, own in zip(program.module()(x), model(x), strict=True):
            torch.testing.assert_close(exported, own)
    used = [node for node in program.graph.nodes if "layer_norm" in str(node.target)]
    inner = [list(node.meta["nn_module_stack"].values())[-1][0].partition("@")[0] for node in used]
    assert inner.count("norm") == 2


def test_an_end_that_reads_more_than_the_last_block_is_found_out(x):
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Conv2d(3, 16, 8, 8), nn.Linear(16, 4)
            self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True) for _ in "abc")

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            h = self.embed(images).flatten(2).transpose(1, 2)
            states = [h]
            for block in self.blocks:
                states.append(block(states[-1]))
            return self.head(sum(state.mean(1) for state in states))

    torch.manual_seed(0)
    model = Both().eval()
    assert own_end_error(model, longest(model, x), x) > 1e-3


def test_what_is_refused(x):
    model = vit()
    stack = longest(model, x)
    for position in ("blocks.3", "norm"):
        with pytest.raises(ValueError, match="none of the blocks that have another behind them"):
            attach_own_ends(model, stack, [position])
    attach_own_ends(model, stack, ["blocks.1"])
    with pytest.raises(LissomError, match="within a forward pass of the model only"):
        model.exits.heads[0](torch.zeros(1, 17, 32))
    # A pass that fails leaves the model as it was.
    forwards = {name: vars(module).get("forward") for name, module in model.named_modules()}
    hooks = {name: len(module._forward_hooks) for name, module in model.named_modules()}
    head, model.head = model.head, nn.Linear(3, 4)
    with pytest.raises(RuntimeError):
        model(x)
    model.head = head
    assert {name: vars(module).get("forward") for name, module in model.named_modules()} == forwards
    assert {name: len(module._forward_hooks) for name, module in model.named_modules()} == hooks
    assert len(model(x)) == 2


class Outputs(NamedTuple):
    """As torchvision's GoogLeNet gives in training."""

    logits: torch.Tensor
    aux: torch.Tensor


def test_an_auxiliary_head_is_not_taken_for_the_models_own_answer(x):
    model = vit()
    stack, (own, forward) = longest(model, x), (model(x), model.forward)
    model.forward = lambda images: Outputs(answer := forward(images), answer * 0)  # type: ignore[method-assign]
    assert own_end_error(model, stack, x) < 1e-6
    model.blocks[3] = nn.Identity()  # then the exit in front of it answers as the model
    early, answer = attach_own_ends(model, stack, ["blocks.2"])(x)
    assert not torch.equal(answer, own)
    assert answer.abs().max() > 0
    torch.testing.assert_close(early, answer)


def test_blocks_that_answer_with_a_tuple_are_a_stack_too(x):
    """As transformers' Swin's do: (tensor, None); what stands beside the tensor is handed on as it was."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(16, 16)

        def forward(self, h: torch.Tensor) -> tuple[torch.Tensor, None]:
            return h + self.linear(h), None

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Conv2d(3, 16, 8, 8)
            self.layers = nn.ModuleList(Block() for _ in range(3))
            self.head = nn.Linear(16, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.embed(x).flatten(2).transpose(1, 2)
            for layer in self.layers:
                h, weights = layer(h)
                assert weights is None
            return self.head(h.mean(1))

    torch.manual_seed(0)
    model = Model().eval()
    (stack,) = block_stacks(model, x)
    assert (stack.paths, stack.beside) == (("layers.0", "layers.1", "layers.2"), (None,))
    assert own_end_error(model, stack, x) == 0
    want = model.head(model.layers[0](model.embed(x).flatten(2).transpose(1, 2))[0].mean(1))
    attach_own_ends(model, stack, ["layers.0"])
    early, _ = model(x)
    torch.testing.assert_close(early, want)
