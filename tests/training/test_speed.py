"""How a step is computed: precision, attention and layout by the model and the processor, the same values."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lissom.errors import LissomError
from lissom.training import speed
from lissom.training.checkpoint import CHECKPOINT
from lissom.training.loop import fit
from lissom.training.methods.distillation import Distillation
from lissom.training.methods.recovery import Recovery, Term
from lissom.training.speed import channels_last, fast_precision, taught_in


def separable(spatial: int, depthwise: int) -> nn.Module:
    """A network of so many spatial convolutions and so many that are depthwise."""
    layers = [nn.Conv2d(8, 8, 3, padding=1) for _ in range(spatial)]
    layers += [nn.Conv2d(8, 8, 3, padding=1, groups=8) for _ in range(depthwise)]
    return nn.Sequential(nn.Conv2d(1, 8, 1), *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))


class Views(nn.Module):
    """A network as some write theirs: what it flattens has to be contiguous."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv, self.head = (
            nn.Conv2d(1, 8, 3, padding=1),
            nn.Conv2d(8, 8, 3, padding=1),
            nn.Linear(512, 3),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.conv(self.stem(x).relu()).relu().view(len(x), -1))


def laid_out_last(model: nn.Module) -> list[bool]:
    """Of each spatial convolution, whether its weight is laid out with the channels last."""
    weights = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size != (1, 1)]
    return [weight.stride(1) == 1 for weight in weights]


def convolutional() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8),
        nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(128, 3),
    )  # fmt: skip


def test_a_convolutional_network_is_laid_out_and_computes_the_same():
    model, images = convolutional(), torch.randn(6, 1, 8, 8)
    found = []
    for models in ([], [model]):
        model.zero_grad()
        with channels_last(models, images[:2]):
            assert laid_out_last(model) == [bool(models)] * 2
            answers = model(images)
            answers.square().sum().backward()
        found.append([answers.detach(), *(p.grad.clone() for p in model.parameters())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_afterwards_weights_are_as_they_were():
    model = convolutional()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(KeyError), channels_last([model], torch.randn(2, 1, 8, 8)):  # whatever happens meanwhile
        raise KeyError
    assert laid_out_last(model) == [False] * 2
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])  # the trial has not moved BatchNorm's statistics


@pytest.mark.parametrize("model", [Views(), separable(1, 0)], ids=["needs contiguous maps", "a single convolution"])
def test_a_network_that_cannot_or_does_not_gain_is_left(model):
    with channels_last([model], torch.randn(2, 1, 8, 8)):
        assert not any(laid_out_last(model))


def test_fit_lays_out_the_model_and_its_teacher(task):
    seen = []

    class Watched(Distillation):
        def loss(self, model, inputs, targets, task):
            seen.append((laid_out_last(model), laid_out_last(self.teacher)))
            return super().loss(model, inputs, targets, task)

    model, teacher = convolutional(), convolutional().requires_grad_(False)
    fit(model, task, method=Watched(teacher=teacher), epochs=1, batch=32, max_steps=2, accelerator="cpu")
    assert seen == [([True] * 2, [True] * 2)] * 2
    assert laid_out_last(model) == laid_out_last(teacher) == [False] * 2


def test_a_network_that_needs_contiguous_maps_is_trained(task):
    torch.manual_seed(0)
    result = fit(Views(), task, epochs=6, batch=32, lr=1e-2, accelerator="cpu")
    assert result.history[-1]["loss"] < 0.9 * result.history[0]["loss"]


def test_a_network_of_depthwise_convolutions_is_trained_in_float32(monkeypatch):
    monkeypatch.setattr(speed, "cpu_flags", lambda: frozenset({"amx_bf16"}))
    chosen = [fast_precision(separable(*counts), "cpu") for counts in ((2, 0), (1, 1), (1, 2))]
    assert chosen == ["bf16-mixed", "bf16-mixed", "32-true"]


class Several(nn.Module):
    """Answers as some networks do, and notes in what its layer computed."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(64, 3)
        self.computed: list[torch.dtype] = []

    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        found = self.head(x.flatten(1))
        self.computed.append(found.dtype)
        return {"logits": (found, found.argmax(1)), "name": "several"}


@pytest.mark.parametrize(
    ("precision", "computed"),
    [("32-true", torch.float32), ("bf16-mixed", torch.bfloat16), ("16-mixed", torch.float16)],
)
def test_a_teacher_computes_in_the_trainings_precision(precision, computed):
    teacher, device = Several(), torch.device("cpu")
    with taught_in(precision, teacher, device):
        answers = teacher(torch.randn(2, 1, 8, 8))
    with pytest.raises(KeyError), taught_in(precision, teacher, device):  # whatever happens meanwhile
        raise KeyError
    assert teacher.computed == [computed]
    assert [part.dtype for part in answers["logits"]] == [torch.float32, torch.int64]
    assert "forward" not in vars(teacher)
    teacher(torch.randn(2, 1, 8, 8))
    assert teacher.computed[1:] == [torch.float32]
    teacher.forward = own = lambda x: x  # a forward of the object's own stays its own
    with taught_in(precision, teacher, device):
        assert teacher(torch.ones(2)).dtype == torch.float32
    assert teacher.forward is own
    with taught_in(precision, "snapshots", device), taught_in(precision, None, device):
        pass


@pytest.mark.parametrize(("precision", "computed"), [("32-true", torch.float32), ("bf16-mixed", torch.bfloat16)])
def test_fit_lets_a_teacher_compute_in_its_precision(task, precision, computed):
    seen = []

    class Watched(Term):
        def student(self):
            return ["8"]

        teacher = student

        def parameters(self, model):
            return model.parameters()

        def loss(self, model, student, teacher, targets, task):
            seen.append((teacher.answer.dtype, teacher.features["8"].dtype))
            return nn.functional.mse_loss(student.answer, teacher.answer)

    model, original = convolutional(), convolutional()
    original[8].register_forward_hook(lambda module, given, found: layers.append(found.dtype))
    layers: list[torch.dtype] = []
    settings = {"epochs": 1, "batch": 32, "max_steps": 2, "accelerator": "cpu", "precision": precision}
    fit(model, task, method=Recovery(original, (Watched(),)), **settings)
    assert layers[-2:] == [computed] * 2  # before them comes the trial of a layout
    assert seen == [(torch.float32, torch.float32)] * 2


class Attends(nn.Module):
    """A transformer's middle: attention between the rows of an image (B, 1, 8, 8)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.head = nn.Linear(8, 24), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.head(nn.functional.scaled_dot_product_attention(q, k, value=v).mean((1, 2)))


@pytest.mark.parametrize(
    ("precision", "trained", "expected"),
    [
        ("32-true", "qkv", 0),
        ("bf16-mixed", "qkv", 2),  # once a step
        ("bf16-mixed", "head", 0),  # frozen attention has no backward pass
    ],
)
def test_attention_is_plain_products_where_it_is_trained_below_float32(task, monkeypatch, precision, trained, expected):
    forced = []
    monkeypatch.setattr(speed, "sdpa_kernel", lambda backend: forced.append(backend) or sdpa_kernel(backend))
    settings = {"accelerator": "cpu", "max_steps": 2, "parameters": lambda name, p: name.startswith(trained)}
    fit(Attends(), task, epochs=1, batch=32, precision=precision, **settings)
    assert forced == [SDPBackend.MATH] * expected
    assert not torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()


@pytest.mark.parametrize(
    ("flags", "expected"),
    [({"avx2", "amx_bf16"}, "bf16-mixed"), ({"avx512_bf16"}, "bf16-mixed"), ({"avx2"}, "32-true")],
)
def test_auto_precision_is_what_the_processor_does_fast(task, network, tmp_path, monkeypatch, flags, expected):
    monkeypatch.setattr("lissom.training.speed.cpu_flags", lambda: frozenset(flags))
    settings = {"epochs": 1, "batch": 32, "precision": "auto", "accelerator": "cpu", "folder": tmp_path}
    fit(network(), task, **settings)
    state = torch.load(tmp_path / CHECKPOINT, weights_only=True)
    assert state["settings"]["precision"] == expected
    monkeypatch.setattr("lissom.training.speed.cpu_flags", lambda: frozenset({"avx512_bf16", "amx_bf16"} ^ flags))
    if expected == "32-true":  # another processor would train otherwise
        with pytest.raises(LissomError, match="precision"):
            fit(network(), task, resume=True, **settings)
