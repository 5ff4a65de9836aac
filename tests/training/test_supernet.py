"""A super-network from a user's own model: what becomes elastic, exact extraction, gradients, training, copies."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from torch import nn

from lissom.errors import LissomError, NotApplicable
from lissom.layers.elastic import draw_setting, is_elastic, largest, smallest
from lissom.tasks.task import Task
from lissom.training.loop import fit
from lissom.training.methods.progressive_shrinking import published_stages
from lissom.training.recalibration import recalibrate
from lissom.training.shrinking import fit_progressive
from lissom.training.supernet import SuperNetwork, supernet_of
from tests.models.families import images, settle


class Residual(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, hidden, 3, 1, 1, bias=False), nn.BatchNorm2d(hidden)
        self.conv2, self.bn2 = nn.Conv2d(hidden, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x + self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))


class Plain(nn.Module):
    """A residual CNN as a user writes one: a stem, three blocks, a linear head."""

    def __init__(self, channels: int = 1, classes: int = 3) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(channels, 8, 3, 1, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.blocks = nn.Sequential(*(Residual(8, 12) for _ in range(3)))
        self.head = nn.Linear(8, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


class Awkward(nn.Module):
    """A concatenation, a depthwise convolution, and a module that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 3, 1, 1), nn.Conv2d(3, 12, 1)
        self.depthwise = nn.Conv2d(20, 20, 3, 1, 1, groups=20)
        self.mix = nn.Conv2d(20, 16, 1)
        self.shared = nn.Conv2d(16, 16, 3, 1, 1)
        self.head = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.cat([self.one(x), self.two(x)], 1).relu()
        x = self.mix(self.depthwise(x).relu())
        x = self.shared(self.shared(x).relu()).relu()
        return self.head(x.mean((2, 3)))


def built(kind: str) -> tuple[nn.Module, tuple[int, ...]]:
    torch.manual_seed(0)
    if kind == "plain":
        return Plain(), (1, 8, 8)
    if kind == "awkward":
        return Awkward(), (3, 8, 8)
    if kind == "vit":
        arguments = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 4, "num_classes": 5}
        return timm.create_model("vit_tiny_patch16_224", **arguments), (3, 16, 16)
    return timm.create_model("resnet18", num_classes=5), (3, 32, 32)


KINDS = ("plain", "awkward", "vit")


@pytest.mark.parametrize("kind", [*KINDS, pytest.param("resnet18", marks=pytest.mark.full)])
def test_an_extracted_network_answers_the_same(kind: str) -> None:
    model, shape = built(kind)
    x = images(3, *shape)
    settle(model, x)
    whole = copy.deepcopy(model)
    network = supernet_of(model, shape, streams=(0.5,)).eval()
    assert is_elastic(network)
    with torch.no_grad():
        assert torch.equal(network(x), whole(x))
        assert torch.equal(network.extract()(x), whole(x))
        answers = []
        for setting in [smallest(network), *(draw_setting(network) for _ in range(3))]:
            network.set_active(setting)
            plain = network.extract()
            assert type(plain) is type(model)
            assert not plain.training
            answers.append(network(x))
            assert torch.equal(plain(x), answers[-1])
            assert sum(p.numel() for p in plain.parameters()) < sum(p.numel() for p in model.parameters())
        assert not torch.allclose(answers[0], whole(x))
        network.set_active({})
        assert torch.equal(network(x), whole(x))


def kinds_of(network: SuperNetwork) -> dict[str, int]:
    found: dict[str, int] = {}
    for dimension in network.dimensions():
        found[dimension.kind] = found.get(dimension.kind, 0) + 1
    return found


def test_what_becomes_elastic() -> None:
    plain = supernet_of(*built("plain"))
    assert kinds_of(plain) == {"expand": 3, "depth": 1}
    assert {d.name for d in plain.dimensions()} == {"blocks.depth", *(f"blocks.{i}.conv1.width" for i in range(3))}
    assert plain.dimensions()[-1].values == (-2, -1, 0)
    vit = supernet_of(*built("vit"))
    assert kinds_of(vit) == {"expand": 4, "heads": 4, "depth": 1}
    assert kinds_of(supernet_of(*built("plain"), streams=(0.5,), blocks=1.0)) == {"expand": 3, "width": 1}


def test_the_most_important_channels_stay() -> None:
    model, shape = built("plain")
    with torch.no_grad():
        for i in (3, 5):
            model.blocks[0].conv1.weight[i] *= 100
            model.blocks[0].conv2.weight[:, i] *= 100
    small = supernet_of(model, shape, widths=(1 / 6,)).extract({"blocks.0.conv1.width": 1 / 6})
    assert torch.equal(small.blocks[0].conv1.weight, model.blocks[0].conv1.weight[[3, 5]])
    assert torch.equal(small.blocks[0].conv2.weight, model.blocks[0].conv2.weight[:, [3, 5]])
    assert torch.equal(small.blocks[1].conv1.weight, model.blocks[1].conv1.weight)


def test_the_least_important_block_goes_first() -> None:
    model, shape = built("plain")
    with torch.no_grad():
        model.blocks[1].bn2.weight.zero_()
        model.blocks[1].bn2.bias.zero_()
    model.eval()
    network, x = supernet_of(model, shape).eval(), images(2, *shape)
    small = network.extract({"blocks.depth": -1})
    assert isinstance(small.blocks[1], nn.Identity)
    with torch.no_grad():
        torch.testing.assert_close(small(x), model(x))  # the block was the identity


def test_heads_that_matter_stay() -> None:
    model, shape = built("vit")
    attention = model.blocks[2].attn
    with torch.no_grad():
        attention.proj.weight[:, 8:16] *= 50
    small = supernet_of(model, shape).extract({"blocks.2.attn.heads": 0.5})
    kept = small.blocks[2].attn
    assert (kept.num_heads, kept.attn_dim, kept.qkv.out_features) == (2, 16, 48)
    assert any(torch.equal(kept.proj.weight[:, i : i + 8], attention.proj.weight[:, 8:16]) for i in (0, 8))


def test_gradients_reach_the_shared_weights() -> None:
    model, shape = built("plain")
    network = supernet_of(model, shape).train()
    before = {name: value.clone() for name, value in model.named_buffers()}
    network.set_active(smallest(network))
    network(images(4, *shape)).square().sum().backward()
    row = model.blocks[0].conv1.weight.grad.flatten(1).abs().sum(1)
    assert (row > 0).sum() == 6
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())  # statistics are the whole's
    gone = [i for i in range(3) if model.blocks[i].conv1.weight.grad is None]
    assert len(gone) == 2


def test_copies_and_weights_travel() -> None:
    model, shape = built("plain")
    network, x = supernet_of(model, shape).eval(), images(2, *shape)
    network.set_active(smallest(network))
    other_model, _ = built("plain")
    with torch.no_grad():
        for parameter in other_model.parameters():
            parameter.add_(torch.randn_like(parameter))
        want = network(x)
        assert torch.equal(copy.deepcopy(network)(x), want)
        other = supernet_of(other_model, shape).eval()
        other.set_active(smallest(other))
        assert not torch.allclose(other(x), want)
        other.load_state_dict(network.state_dict())
        assert torch.equal(other(x), want)


SGD: dict[str, Any] = {"optimizer": "sgd", "weight_decay": 1e-3, "batch": 40, "clip": None, "augment": False}


def test_a_users_network_is_trained_to_be_cut(task: Task) -> None:
    torch.manual_seed(0)
    model = Plain()
    fit(model, task, epochs=4, lr=0.1, **SGD)
    network = supernet_of(model, task.shape)
    fit(network, task, method="delayed_shrinking", epochs=4, lr=0.05, **SGD)
    assert network.active == largest(network)
    small = recalibrate(network.extract(smallest(network)), task.fit)
    with torch.no_grad():
        answer = small(torch.from_numpy(task.choose.inputs(slice(None))))
    assert (answer.argmax(1).numpy() == task.choose.labels).mean() > 0.8


def test_stages_of_a_users_network(task: Task) -> None:
    network = supernet_of(*built("plain"))
    stages = published_stages(network)
    assert [s.name for s in stages] == [
        "depth -1, 0", "depth -2, -1, 0", "expand 0.75, 1.0", "expand 0.5, 0.75, 1.0",
    ]  # fmt: skip
    done = fit_progressive(network, task, epochs=4, lr=0.01, **SGD)
    assert len(done) == 4


def test_dead_dimensions_change_nothing() -> None:
    network = supernet_of(*built("plain")).eval()
    setting = {"blocks.depth": -1}
    (dead,) = network.dead(setting)
    x = images(2, 1, 8, 8)
    with torch.no_grad():
        network.set_active(setting)
        want = network(x)
        network.set_active({**setting, dead: 0.5})
        assert torch.equal(network(x), want)
    assert not network.dead({})


def test_a_uniform_setting() -> None:
    network = supernet_of(*built("vit"))
    setting = network.uniform(expand=0.5, depth=0.5)
    kinds = {d.name: d.kind for d in network.dimensions()}
    assert {kinds[name]: value for name, value in setting.items()} == {"expand": 0.5, "heads": 1.0, "depth": -2}


def test_what_cannot_be() -> None:
    with pytest.raises(LissomError, match="widths are shares"):
        supernet_of(*built("plain"), widths=(0.0,))
    with pytest.raises(NotApplicable, match="elastic"):
        supernet_of(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), (1, 8, 8))
    with pytest.raises(LissomError):
        supernet_of(Plain(), (3, 8, 8))
    network = supernet_of(*built("plain"))
    with pytest.raises(LissomError, match="may be"):
        network.set_active({"blocks.depth": -3})
