"""The main job on published networks of several kinds, in small: with the stand-in for the meter, every technique."""

import pytest
import torch

import lissom
from lissom.models.factory import create_model
from lissom.registry import parts
from tests.slimming import standin

EVERY = tuple(part.name for part in parts("technique"))
NETWORKS = {
    # BatchNorm alone
    "inceptionnext_atto": {"dims": (8, 16, 16, 24), "depths": (1, 1, 1, 1)},
    "unireplknet_a": {"dims": (8, 8, 16, 16), "depths": (1, 1, 2, 1), "kernel_sizes": (3, 7, (13, 3), 0)},
    # BatchNorm and attention
    "shvit_s1": {"embed_dim": (16, 24, 32), "partial_dim": (4, 6, 8), "depth": (1, 2, 1)},
    "lsnet_t": {"embed_dim": (16, 16, 24, 32), "depth": (0, 2, 2, 2), "img_size": 64},
    "cvt_13_224": {"dims": (8, 12, 16), "heads": (1, 3, 2), "depths": (1, 1, 2)},
    # LayerNorm and gates
    "hornet_tiny_7x7": {"dim": 8, "depths": (1, 1, 2, 1)},
}


@pytest.mark.full
@pytest.mark.parametrize("name", NETWORKS)
def test_slim_runs_to_a_result(name, tmp_path):
    torch.manual_seed(0)
    network = create_model(name, num_classes=4, **NETWORKS[name]).eval()
    task = standin.task(network, shape=(3, 64, 64))
    result = standin.run(tmp_path / "r", net=network, task=task, techniques=EVERY, trials=len(EVERY) + 3)
    states = {t.recipe: (t.status, t.reason) for t in result.trials}
    # What does not fit a network says so; nothing fails in a way of its own.
    assert {status for status, _ in states.values()} <= {"ok", "not applicable", "budget not met"}, states
    assert all(reason for status, reason in states.values() if status == "not applicable")
    assert states["int8()"][0] == "ok"
    assert result.best.metrics.speedup > 1
    x = task.report.inputs(slice(0, 7))
    answers = lissom.load(result.best.artifact)(x)
    with torch.no_grad():
        original = network(torch.from_numpy(x)).numpy()
    assert (answers.argmax(1) == original.argmax(1)).mean() > 0.5
