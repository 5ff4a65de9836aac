"""The part of a model up to one of its modules: what it answers, what is left of the model, what cannot be followed."""

from __future__ import annotations

import copy
import pickle

import pytest
import timm
import torch
from torch import nn

from lissom.errors import NotApplicable
from lissom.export.capture import capture, module_paths
from lissom.export.truncation import truncate


def vit() -> nn.Module:
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=4, in_chans=1, embed_dim=16, depth=3, num_heads=2, num_classes=3
    )


def resnet() -> nn.Module:
    return timm.create_model("resnet10t", in_chans=1, channels=(8, 12, 16, 24), num_classes=3)


def output_of(model: nn.Module, path: str, x: torch.Tensor) -> torch.Tensor:
    found = []
    handle = model.get_submodule(path).register_forward_hook(lambda module, inputs, output: found.append(output))
    with torch.no_grad():
        model(x)
    handle.remove()
    return found[0]


@pytest.mark.parametrize(("make", "path", "gone"), [(vit, "blocks.1", "blocks.2"), (resnet, "layer2", "layer3")])
def test_it_answers_as_the_module_and_keeps_paths(make, path, gone) -> None:
    torch.manual_seed(0)
    model = make().eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    part = truncate(model, (1, 16, 16), path)
    x = torch.randn(5, 1, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(part(x), output_of(model, path, x))
    own = part.state_dict()
    assert set(own) < set(before)
    assert all(torch.equal(value, before[name]) for name, value in own.items())
    assert any(name.startswith(f"{path}.") for name in own)
    assert not any(name.startswith((gone, "head", "fc")) for name in own)
    # A copy: training it changes nothing in the model.
    with torch.no_grad():
        for parameter in part.parameters():
            parameter.add_(1)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    # Its layers are found by their paths in an exported graph.
    paths = set(module_paths(capture(nn.Sequential(part), (1, 16, 16))).values())
    layers = [name for name, m in part.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert {f"0.{name}" for name in layers} <= paths


def test_copies_and_pickles_answer_alike_and_norms_follow_the_mode() -> None:
    torch.manual_seed(0)
    part = truncate(resnet().eval(), (1, 16, 16), "layer1")
    x = torch.randn(4, 1, 16, 16)
    for other in (copy.deepcopy(part), pickle.loads(pickle.dumps(part))):
        with torch.no_grad():
            assert torch.equal(other(x), part(x))
        name = next(n for n, m in other.named_modules() if isinstance(m, nn.BatchNorm2d))
        mean = other.get_submodule(name).running_mean.clone()
        other.train()(x)
        assert not torch.equal(other.get_submodule(name).running_mean, mean)


class Deciding(nn.Module):
    """Decides by what it sees, which cannot be followed."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 2, 3), nn.Conv2d(2, 2, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        return self.second(x) if x.sum() > 0 else x


class Pair(nn.Module):
    """Answers with what it did not compute last."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 2, 3), nn.Conv2d(1, 2, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        answer = self.a(x)
        self.b(x)
        return answer


def test_what_cannot_be_taken_apart() -> None:
    with pytest.raises(NotApplicable, match="followed symbolically"):
        truncate(Deciding(), (1, 8, 8), "first")
    with pytest.raises(NotApplicable, match="no module 'third'"):
        truncate(Deciding(), (1, 8, 8), "third")
    with pytest.raises(NotApplicable, match="does not answer as that module"):
        truncate(nn.Sequential(Pair(), nn.Flatten()), (1, 8, 8), "0")
    unused = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU())
    unused.add_module("spare", nn.Identity())
    unused.forward = lambda x: unused[1](unused[0](x))  # type: ignore[method-assign]
    with pytest.raises(NotApplicable):
        truncate(unused, (1, 8, 8), "spare")
