"""Exits attached by hooks: answers, gradients, copies, export, and taking them off again."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from lissom.errors import LissomError
from lissom.layers.exits import (
    Exits,
    OwnExit,
    attach_exits,
    attach_own_exits,
    exits_of,
    exits_put_away,
    first_tensor,
    own_exits,
    put_away_exits,
    remove_exits,
)


class Net(nn.Module):
    """Two layers and a head; ``skip`` leaves the second out."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.inner = nn.ModuleDict({"second": nn.Linear(6, 6)})
        self.head = nn.Linear(6, 3)
        self.skip = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x).relu()
        return self.head(x if self.skip else self.inner["second"](x).relu())


POSITIONS = ("first", "inner.second")


def with_exits(detached: bool = True) -> Net:
    torch.manual_seed(0)
    return attach_exits(Net(), Exits(POSITIONS, [nn.Linear(6, 3), nn.Linear(6, 3)], detached))


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(5, 4, generator=torch.Generator().manual_seed(1))


def test_the_answer_is_every_exits_and_the_models_own_last(x):
    model = with_exits()
    first, second, own = model(x)
    assert not model.exits.seen  # nothing is held between two forward passes
    hidden = model.first(x)
    assert torch.equal(first, model.exits.heads[0](hidden))
    after = model.inner["second"](hidden.relu())
    assert torch.equal(second, model.exits.heads[1](after))
    assert torch.equal(own, model.head(after.relu()))
    assert exits_of(model) is model.exits
    assert isinstance(model, Net)


@pytest.mark.parametrize("detached", [True, False])
def test_what_the_exits_train(x, detached):
    model = with_exits(detached)
    first, second, own = model(x)
    (first.sum() + second.sum()).backward(retain_graph=True)
    assert all(p.grad is not None for p in model.exits.parameters())
    assert (model.first.weight.grad is None) is detached
    assert model.head.weight.grad is None
    own.sum().backward()
    assert model.first.weight.grad is not None


def test_a_copy_has_exits_of_its_own(x):
    model = with_exits()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        before = [answer.clone() for answer in model(x)]
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.add_(1)
        changed = other(x)
        assert all(torch.equal(a, b) for a, b in zip(before, model(x), strict=True))
        assert not any(torch.equal(a, b) for a, b in zip(before, changed, strict=True))
        assert not model.exits.seen
        assert not other.exits.seen
        remove_exits(other)
        assert isinstance(other(x), torch.Tensor)
        assert len(model(x)) == 3


def test_a_module_run_alone_leaves_nothing_that_a_copy_or_a_pass_would_meet(x):
    model = with_exits()
    model.inner["second"](model.first(x))
    assert len(copy.deepcopy(model)(x)) == 3
    assert not copy.deepcopy(model).exits.seen
    model.skip = True
    with pytest.raises(LissomError, match="did not run"):
        model(x)


def test_a_sequential_root_calls_the_exits_as_a_child_and_is_none_the_worse(x):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    expected = model(x)
    attach_exits(model, Exits(["0"], [nn.Linear(6, 3)]))
    early, own = model(x)
    assert torch.equal(own, expected)
    assert torch.equal(early, model.exits.heads[0](model[0](x)))


def test_removing_leaves_the_model_as_it_was(x):
    plain = Net()
    names = plain.state_dict().keys()
    expected = plain(x)
    attach_exits(plain, Exits(POSITIONS, [nn.Linear(6, 3), nn.Linear(6, 3)]))
    assert "exits.heads.1.weight" in plain.state_dict()
    assert remove_exits(plain) is plain
    assert torch.equal(plain(x), expected)
    assert plain.state_dict().keys() == names
    assert exits_of(plain) is None
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in plain.modules())
    assert remove_exits(plain) is plain  # twice is once


def test_attaching_again_replaces(x):
    model = with_exits()
    chosen = model.exits.select(["inner.second", "elsewhere"])
    assert chosen.positions == ("inner.second",)
    assert chosen.heads[0] is model.exits.heads[1]
    assert chosen.detached
    _, second, own = model(x)
    attach_exits(model, chosen)
    answers = model(x)
    assert len(answers) == 2
    assert torch.equal(answers[0], second)
    assert torch.equal(answers[1], own)
    assert not model.first._forward_hooks


def test_the_joint_model_exports(x):
    model = with_exits().eval()
    program = torch.export.export(model, (x,))
    for exported, own in zip(program.module()(x), model(x), strict=True):
        torch.testing.assert_close(exported, own)
    assert not model.exits.seen


def test_steps_travel_with_the_weights():
    model, other = with_exits(), with_exits()
    model.exits.steps += 3
    other.load_state_dict(model.state_dict())
    assert int(other.exits.steps) == 3


def test_what_cannot_be_attached():
    with pytest.raises(ValueError, match="2 heads for 1 positions"):
        Exits(["first"], [nn.Identity(), nn.Identity()])
    with pytest.raises(ValueError, match="each of which is named once"):
        Exits(["first", "first"], [nn.Identity(), nn.Identity()])
    with pytest.raises(ValueError, match="no module 'third'"):
        attach_exits(Net(), Exits(["third"], [nn.Identity()]))
    model = Net()
    model.exits = nn.Linear(1, 1)
    with pytest.raises(ValueError, match="Net has something else called 'exits'"):
        attach_exits(model, Exits(["first"], [nn.Identity()]))


def test_a_module_that_does_not_run_is_named(x):
    model = with_exits()
    model.skip = True
    with pytest.raises(LissomError, match=r"an exit reads 'inner\.second', which this forward pass did not run"):
        model(x)


def test_a_module_that_answers_with_more_than_a_tensor_is_refused():
    class Pair(nn.Module):
        def forward(self, x):
            return x, x

    model = nn.Sequential(Pair())
    attach_exits(model, Exits(["0"], [nn.Identity()]))
    with pytest.raises(TypeError, match="an exit reads one tensor, and 0 answers"):
        model(torch.zeros(1, 2))


class Declared(Net):
    """Has an exit of its own on the first layer, and says so; in training it answers with both by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.early = nn.Linear(6, 3)

    def own_exits(self) -> list[OwnExit]:
        return [OwnExit("early", ("first",))]

    def forward(self, x: torch.Tensor):  # type: ignore[no-untyped-def]
        early = self.early(self.first(x).relu())
        return (early, super().forward(x)) if self.training else super().forward(x)


def test_a_networks_own_exits_answer_beside_it(x):
    torch.manual_seed(0)
    model = Declared().eval()
    assert own_exits(Net()) == ()
    assert own_exits(model) == (OwnExit("early", ("first",)),)
    own = model(x)
    attach_own_exits(model)
    for module in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        early, last = module(x)
        assert torch.equal(early, model.early(model.first(x).relu()))
        assert torch.equal(last, own)
        assert len(module.train()(x)) == 2  # its own tuple counts as its last answer
        module.eval()
    early.sum().backward()
    assert model.early.weight.grad is None  # the copy's has it
    model(x)[0].sum().backward()
    assert model.first.weight.grad is not None  # own exits hand their gradients on
    assert torch.equal(remove_exits(model)(x), own)
    assert len(attach_own_exits(model, [])(x)) == 1
    with pytest.raises(ValueError, match="no exit of its own at 'first'; it has early"):
        attach_own_exits(model, ["first"])


class Outputs(NamedTuple):
    """As torchvision's GoogLeNet gives in training."""

    logits: torch.Tensor
    aux2: torch.Tensor
    aux1: torch.Tensor


class Auxiliary(Net):
    """Answers with two auxiliary heads beside in training; ``kind`` is the tuple."""

    def __init__(self, kind: Callable[..., Any] = Outputs) -> None:
        super().__init__()
        self.aux = nn.Linear(6, 3)
        self.kind = kind

    def forward(self, x: torch.Tensor) -> Any:
        own, aux = super().forward(x), self.aux(self.first(x).relu())
        return self.kind(own, aux, aux + 1) if self.training else own


def test_an_auxiliary_head_is_not_taken_for_the_models_own_answer(x):
    torch.manual_seed(0)
    model = Auxiliary().eval()
    own = model(x)
    attach_exits(model.train(), Exits(["first"], [nn.Linear(6, 3)]))
    early, answer = model(x)
    assert torch.equal(answer, own)
    assert torch.equal(early, model.exits.heads[0](model.first(x)))

    def plain(*answers: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return answers

    model.kind = plain
    with pytest.raises(LissomError, match="Auxiliary gives 3 answers at once, and which of them is its own cannot"):
        model(x)
    assert torch.equal(model.eval()(x)[1], own)
    model.train().kind = lambda own, *rest: (own, None)
    assert torch.equal(model(x)[1], own)


def test_a_child_may_declare_exits_for_the_model(x):
    class Beside(nn.Module):
        def host_exits(self) -> list[OwnExit]:
            return [OwnExit("first", ("first",))]

    class Inner(nn.Module):
        def own_exits(self) -> list[OwnExit]:
            raise AssertionError("paths of a part are none of the whole")

    model = Net()
    model.part = Inner()
    assert own_exits(model) == ()
    model.beside = Beside()
    assert own_exits(model) == (OwnExit("first", ("first",)),)


def test_a_tuple_that_holds_one_tensor_is_read():
    class Block(nn.Module):
        def forward(self, x):
            return (x + 1, None)

    class Unpacking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block()

        def forward(self, x):
            return self.block(x)[0] * 2

    model = attach_exits(Unpacking(), Exits(["block"], [nn.Identity()]))
    early, own = model(torch.zeros(1, 2))
    assert early.tolist() == [[1, 1]]
    assert own.tolist() == [[2, 2]]
    assert first_tensor((torch.zeros(1), torch.zeros(1))) is None
    assert first_tensor(()) is None


def test_exits_are_put_away_beside_the_model(x):
    plain, model = Net(), with_exits()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("exits.")})
    exits = model.exits
    expected = model(x)
    assert put_away_exits(model) is model
    assert torch.equal(model(x), expected[-1])
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert sum(1 for _ in model.parameters()) == sum(1 for _ in plain.parameters())
    assert exits_put_away(model) is exits
    other = exits_put_away(copy.deepcopy(model))
    assert other is not exits
    attach_exits(model, other)
    for own, want in zip(model(x), expected, strict=True):
        assert torch.equal(own, want)
    assert exits_put_away(put_away_exits(plain)) is None
