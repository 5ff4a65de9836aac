"""Linear layers as convolutions compute the same, in the fewest layout changes."""

import numpy as np
import openvino as ov
import pytest
import torch
from torch import nn

from lissom.export.linear_as_conv import linear_as_conv


class Mlp(nn.Module):
    def __init__(self, act, bias=True):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(12, 20, bias=bias), act, nn.Linear(20, 7)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x))) + 1


class Shared(nn.Module):
    """A linear layer whose answer is read twice, once before its activation."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(12, 20), nn.Linear(20, 20)

    def forward(self, x):
        y = self.fc1(x)
        return self.fc2(y.relu()) + y


def convert(model, shape):
    example = torch.randn(shape)
    graph = ov.convert_model(torch.export.export(model.eval(), (example,)))
    graph.reshape({graph.inputs[0]: list(shape)})
    return graph, example.numpy()


def run(graph, x):
    """In float32, whatever the processor prefers: one with bf16 arithmetic would use it."""
    return ov.compile_model(graph, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(x)[0]


def kinds(graph):
    return [node.get_type_name() for node in graph.get_ordered_ops()]


@pytest.mark.parametrize("shape", [(1, 9, 12), (3, 5, 12), (2, 4, 3, 12)])
@pytest.mark.parametrize("act", [nn.GELU(), nn.GELU("tanh"), nn.SiLU(), nn.ReLU(), nn.Hardswish(), nn.Identity()])
def test_the_same_answers(shape, act):
    graph, x = convert(Mlp(act), shape)
    want = run(graph, x)
    assert linear_as_conv(graph) == 2
    assert "MatMul" not in kinds(graph)
    assert kinds(graph).count("Transpose") == 2  # one in, one out: none between the two layers
    np.testing.assert_allclose(run(graph, x), want, atol=1e-5)


def test_an_answer_that_is_read_twice():
    graph, x = convert(Shared(), (2, 6, 12))
    want = run(graph, x)
    assert linear_as_conv(graph) == 2
    np.testing.assert_allclose(run(graph, x), want, atol=1e-5)


def test_without_bias():
    graph, x = convert(Mlp(nn.GELU(), bias=False), (1, 9, 12))
    want = run(graph, x)
    assert linear_as_conv(graph) == 2
    np.testing.assert_allclose(run(graph, x), want, atol=1e-5)


def test_a_head_and_a_product_of_activations_stay():
    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(12, 5)

        def forward(self, x):
            return self.head((x @ x.transpose(1, 2) @ x).mean(1))

    graph, _ = convert(Head(), (1, 9, 12))
    assert linear_as_conv(graph) == 0
