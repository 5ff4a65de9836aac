"""The branch beside a model as it stands: attached and taken off, in copies, and what it refuses."""

from __future__ import annotations

import copy
import pickle
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from lissom.layers.exits import OwnExit, attach_own_exits, exits_of, own_exits, remove_exits
from lissom.layers.latent_branch import attach_latent_branch, latent_branch_of, remove_latent_branch
from tests.models.tiny_perceiver import SHAPE, block

PLACES = tuple("01234")
SHAPES = ((8, 16, 16), (8, 8, 8), (16, 4, 4), (16, 2, 2), (24, 1, 1))


def cnn(seed: int = 0) -> nn.Sequential:
    """A stem, four stages and a classifier, one after the other: the root calls every child, the branch too."""
    torch.manual_seed(seed)
    widths = (8, 8, 16, 16, 24)
    stages = [block(widths[n], widths[n + 1], 2) for n in range(4)]
    return nn.Sequential(block(3, 8, 1), *stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 4)).eval()


def beside(model: nn.Module, seed: int = 1) -> nn.Module:
    torch.manual_seed(seed)
    return attach_latent_branch(model, PLACES, SHAPES, 4, latents=16, depths=(1, 1, 2, 1), ratio=2.0)


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_attached_and_taken_off(x: torch.Tensor) -> None:
    model = cnn()
    expected, names = model(x), list(model.state_dict())
    assert beside(model) is model
    branch = latent_branch_of(model)
    assert branch is not None
    assert list(model.state_dict())[: len(names)] == names
    merged = model(x)
    assert merged.shape == (3, 4)
    assert not torch.allclose(merged, expected)
    assert not branch.seen
    assert branch.latent.shape == (16, 8)
    assert [e.pool for e in branch.exchanges] == [7, 7, 4, 2]
    # Nothing of the tokens reaches the map yet, and everything may later.
    seen = {}
    model[4].register_forward_hook(lambda m, i, o: seen.update(map=o))
    model(x)
    first = seen["map"].clone()
    for exchange in branch.exchanges[1:]:
        exchange.z2x.attention.o_proj.weight.normal_()
    model(x)
    assert not torch.allclose(seen["map"], first)
    assert remove_latent_branch(model) is model
    assert latent_branch_of(model) is None
    torch.testing.assert_close(model(x), expected)
    assert list(model.state_dict()) == names
    assert remove_latent_branch(model) is model


@torch.no_grad()
def test_its_exits_answer_in_order(x: torch.Tensor) -> None:
    plain, model = cnn(), beside(cnn())
    assert [exit.at for exit in own_exits(model)] == [f"perceiver.heads.{n}" for n in ("early", "late", "maps")]
    assert all(isinstance(exit, OwnExit) and exit.carries for exit in own_exits(model))
    merged = model(x)
    attach_own_exits(model)
    for same in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        early, late, maps, last = same(x)
        assert torch.equal(last, merged)
        torch.testing.assert_close(maps, plain(x))
        assert early.shape == late.shape == (3, 4)
        assert len(copy.deepcopy(same).train()(x)) == 4
    assert exits_of(model) is not None
    assert torch.equal(remove_exits(model)(x), merged)


class Outputs(NamedTuple):
    """As torchvision's GoogLeNet gives in training."""

    logits: torch.Tensor
    aux: torch.Tensor


class Auxiliary(nn.Sequential):
    """Has an auxiliary head that answers beside in training."""

    def forward(self, x: torch.Tensor) -> Any:
        answer = super().forward(x)
        return Outputs(answer, answer + 1) if self.training else answer


def test_the_cnns_own_answer_is_handed_on_and_not_an_auxiliary_heads(x: torch.Tensor) -> None:
    model = attach_own_exits(beside(Auxiliary(*cnn())))
    handed: list[torch.Tensor] = []
    model.perceiver.heads["maps"].register_forward_hook(lambda m, i, o: handed.append(o))
    model[7].register_forward_hook(lambda m, i, o: handed.append(o))
    assert len(model.train()(x)) == 4
    assert torch.equal(handed[0], handed[1])


def test_a_copy_has_hooks_of_its_own(x: torch.Tensor) -> None:
    model = beside(cnn())
    other = copy.deepcopy(model)
    with torch.no_grad():
        before = model(x)
        for parameter in other.perceiver.parameters():
            parameter.add_(1)
        assert torch.equal(model(x), before)
        assert not torch.allclose(other(x), before)
    # A module that ran alone leaves nothing that a copy or a pass would meet.
    model[0](x)
    assert latent_branch_of(model).seen  # type: ignore[union-attr]
    assert not latent_branch_of(copy.deepcopy(model)).seen  # type: ignore[union-attr]
    assert torch.equal(model(x), before)


def test_gradients_reach_the_cnn_and_every_part_of_the_branch(x: torch.Tensor) -> None:
    model = attach_own_exits(beside(cnn())).train()
    sum(answer.square().sum() for answer in model(x)).backward()
    silent = {n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    # What reads tokens begins at nothing: only its last layers have a gradient at first.
    assert all(".z2x." in n or "last_z2x" in n for n in silent), silent
    assert "perceiver.exchanges.1.z2x.attention.o_proj.weight" not in silent
    assert "perceiver.last_z2x.mlp.fc2.weight" not in silent


def test_what_cannot_be_attached() -> None:
    for arguments, sentence in (
        ((PLACES[:4], SHAPES[:4], 4), "at 5 places with maps"),
        ((("0", "0", "1", "2", "3"), SHAPES, 4), "at 5 places with maps"),
        ((PLACES, ((8, 16),) * 5, 4), "at 5 places with maps"),
        ((("0", "1", "2", "3", "nowhere"), SHAPES, 4), "no module 'nowhere'"),
    ):
        with pytest.raises(ValueError, match=sentence):
            attach_latent_branch(cnn(), *arguments)
    for sizes, sentence in (({"latents": 12}, "multiple of 8, not 12"), ({"depths": (1, 1, 1)}, "4 numbers each")):
        with pytest.raises(ValueError, match=sentence):
            attach_latent_branch(cnn(), PLACES, SHAPES, 4, **sizes)
    taken = cnn()
    taken.perceiver = nn.Identity()
    with pytest.raises(ValueError, match="something else called 'perceiver'"):
        beside(taken)
