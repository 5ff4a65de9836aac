"""A deterministic stand-in for the meter, and a small model and task; run as a program, it makes one run.

``python standin.py FOLDER [--resume] [--kill TEXT] [--after SECONDS] [--only TECHNIQUE]``: kills itself with SIGKILL at
the first event that reads so ("done 4: fuse()"), or after so many seconds; with ``--only`` it slims a small transformer
by that technique alone.
``forked`` does the same in a process that finds everything imported: imports are half of such a run.
"""

import contextlib
import hashlib
import multiprocessing
import os
import signal
import sys
import threading
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from torch import nn

from lissom import slimming
from lissom.data.splits import ArraySplit
from lissom.meters.measurement import Measurement
from lissom.tasks.task import Task

SHAPE = (3, 12, 12)


class StandIn:
    """Costs drawn from a hash of the recipe; int8 is faster, ``slow`` says which recipes are slower than float32."""

    def __init__(self, slow=lambda recipe: False):
        self.slow = slow
        self.measured = []

    def capabilities(self, runtime):
        return {"cpu": "stand-in", "processors": 2, "flags": [], "precisions": ["fp32", "int8"]}

    def milliseconds(self, artifact):
        recipe = artifact.plan["recipe"]
        share = int(hashlib.sha256(recipe.encode()).hexdigest()[:8], 16) / 2**32
        base = 10.0 if not recipe else 5.0 + share
        return 14.0 + share if self.slow(recipe) else base

    def measure(self, artifacts, *, threads, seconds=2.0, memory=True):
        self.measured.append([a.plan["recipe"] for a in artifacts])
        times = [self.milliseconds(a) for a in artifacts]
        rows = []
        for i, ms in enumerate(times):
            ratio = times[0] / ms
            ci = (ratio * 0.99, ratio * 1.01) if i else (1.0, 1.0)
            rows.append(Measurement(ms, 1.2 * ms, 1e3 / ms, ratio, ci, 100.0, 40.0, 90.0))
        return rows


def model():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, 2, 1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )
    net[1].running_var.fill_(0.5)
    net[1].running_mean.fill_(0.1)
    return net.eval()


def transformer():
    """A ViT of 16 tokens, which every technique but fuse and bf16 has something to do on."""
    import timm

    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=12, patch_size=3, embed_dim=32, num_heads=2, depth=4, num_classes=4
    ).eval()


def task(model, labelled=True, shape=SHAPE):
    """Data whose labels are the model's own answers, with a tenth of them changed: quality is 90 points."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((240, *shape)).astype(np.float32)
    with torch.no_grad():
        y = model(torch.from_numpy(x)).argmax(1).numpy()
    y[::10] = (y[::10] + 1) % 4
    parts = {"fit": slice(0, 80), "choose": slice(80, 160), "report": slice(160, 240)}
    splits = {n: ArraySplit(n, x[s], y[s].astype(np.int64) if labelled else None) for n, s in parts.items()}
    return Task(**splits, shape=shape, classes=("a", "b", "c", "d"), name="made")


def run(folder, **options):
    """One run of ``slim`` with the stand-in; the profile, which would measure this machine, is left out, and so, unless
    ``peers``, is PyTorch beside it, whose exports take longer than the trials."""
    left_out = {"profiles": lambda self, base, winner: None}
    if not options.pop("peers", False):
        left_out["peers"] = lambda self: []
    net = options.pop("net", None) or model()
    options.setdefault("trials", 7)
    options.setdefault("techniques", ("fuse", "bf16", "int8"))  # those that train have runs of their own
    options.setdefault("meter", StandIn())
    options["task"] = options.get("task") or task(net)
    with patch.multiple(slimming._Job, **left_out):
        return slimming.slim(net, out=folder, threads=1, budget="latency<=0.7x, drop<=5", **options)


def main(folder, words):
    text, seconds = None, None
    if "--kill" in words:
        text = words[words.index("--kill") + 1]
    if "--after" in words:
        seconds = float(words[words.index("--after") + 1])

    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    def progress(event):
        if text is not None and text in f"{event.kind} {event.number}: {event.text}":
            die()

    if seconds is not None:
        threading.Timer(seconds, die).start()
    options = {}
    if "--only" in words:
        options = {"net": transformer(), "techniques": (words[words.index("--only") + 1],), "trials": 4}
    run(folder, resume="--resume" in words, progress=progress, **options)


def logged(folder, words):
    with (folder.parent / "log").open("a") as log, contextlib.redirect_stderr(log):
        main(folder, words)


def forked(folder, *words):
    """``main`` in a process of its own, whose exit code is returned (-9: it was killed); errors go to ``log`` beside
    the folder. The process is forked from a server that has imported what a run imports and computed nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.slimming.imports"])
    process = context.Process(target=logged, args=(folder, words))
    process.start()
    process.join()
    return process.exitcode


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
