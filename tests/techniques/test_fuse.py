"""fuse folds what the graph says stands before a norm, and nothing else."""

import pytest
import timm
import torch
from torch import nn

from lissom.export.capture import run_eager
from lissom.export.plan import Plan
from lissom.tasks.task import Task
from lissom.techniques.fuse import Fuse, fold_batch_norm

SHAPE = (3, 16, 16)


def busy(model):
    """Norms with statistics and affine maps that matter."""
    generator = torch.Generator().manual_seed(0)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
            m.running_mean.normal_(0, 0.5, generator=generator)
            m.running_var.uniform_(0.5, 2, generator=generator)
            if m.affine:
                m.weight.data.uniform_(0.5, 1.5, generator=generator)
                m.bias.data.normal_(0, 0.3, generator=generator)
    return model.eval()


def norms(model):
    return sum(isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d) for m in model.modules())


class Awkward(nn.Module):
    """Attributes in another order than they are used; a convolution that is read twice; a norm without affine map."""

    def __init__(self):
        super().__init__()
        self.bn2 = nn.BatchNorm2d(8)
        self.bn1 = nn.BatchNorm2d(8, affine=False)
        self.conv1 = nn.Conv2d(3, 8, 3, bias=False)
        self.conv2 = nn.Conv2d(8, 8, 3)
        self.up = nn.ConvTranspose2d(8, 6, 2, 2)
        self.bn3 = nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, 5)
        self.bn4 = nn.BatchNorm1d(5)

    def forward(self, x):
        x = self.bn1(self.conv1(x)).relu()
        y = self.conv2(x)
        x = self.bn2(y) + y  # conv2 feeds two: folding would change the second
        return self.bn4(self.fc(self.bn3(self.up(x)).mean((2, 3))))


def test_only_what_may_be_folded_is():
    model = busy(Awkward())
    x = torch.randn(4, *SHAPE)
    before = run_eager(model, x)
    assert fold_batch_norm(model, SHAPE) == 3
    assert isinstance(model.bn2, nn.BatchNorm2d)
    assert isinstance(model.bn1, nn.Identity)
    torch.testing.assert_close(run_eager(model, x), before, rtol=1e-4, atol=1e-5)


def test_a_layer_used_twice_stays():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

        def forward(self, x):
            return self.bn(self.conv(self.conv(x))).mean((2, 3))

    assert fold_batch_norm(busy(Twice()), SHAPE) == 0


@pytest.mark.parametrize("name", ["resnet10t", "mobilenetv3_small_050", "repvgg_a0", "regnety_002"])
def test_timm_families(name):
    model = busy(timm.create_model(name, num_classes=5))
    task = Task(choose=None, report=None, shape=(3, 64, 64))
    plan = Fuse().apply(Plan.of(model), task)
    x = torch.randn(2, 3, 64, 64)
    want, got = run_eager(model, x), run_eager(plan.model, x)
    assert norms(plan.model) == 0
    assert norms(model) > 0  # the plan's own model stays as it was
    assert (want - got).abs().max() <= 1e-4 * want.abs().max()
