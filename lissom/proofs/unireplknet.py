"""UniRepLKNet (arXiv 2311.15599): what large kernels reach and bring, and what merging their branches saves.

Four parts, each beside its own baselines in the same run:

1. Merging. A trained network with parallel dilated branches, and the same one merged: its answers, and the time of a
   13 x 13 convolution of 160 channels on a map of 28 x 28, alone and in a whole block, on one thread.
2. Reach. The gradient of the middle of the answer with respect to a map of 65 x 65, through four untrained blocks whose
   layer scale is 1 (at its usual 1e-6 only the shortcut would show): the distance, in places along the longer axis,
   within which 50 % and 90 % of its absolute values lie, the middle itself left out.
3. Images. A small network with 13 x 13 kernels and their branches, with 13 x 13 kernels alone, and with 3 x 3 kernels.
4. Sound, in the full run where the folder in LISSOM_DATA has the spoken digits: the network's narrow size a on log-mel
   spectra, with 13 x 13 and with 3 x 3 kernels. Takes 0 to 4 of every speaker and digit judge.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from timm.utils.model import reparameterize_model
from torch import nn

from lissom.data.sounds import read_sounds
from lissom.data.splits import ArraySplit
from lissom.layers.dilated_reparam import DilatedReparamBlock
from lissom.models.unireplknet import UniRepLKNet, UniRepLKNetBlock
from lissom.ops.as_images import audio_to_image
from lissom.proofs.arms import (
    Budget,
    Trained,
    accuracy_rows,
    better,
    built,
    data_set,
    faster,
    figure_rows,
    forward_call,
    generator,
    image_task,
    interleaved,
    no_worse,
    run_arms,
    spread,
    time_rows,
    together,
)
from lissom.proofs.base import Claim, ProofResult, Row, Settings, verdict_by_interval
from lissom.registry import register
from lissom.tasks.task import Task

__all__ = ["gradient_radius", "small_network", "spoken_digits"]

KERNELS = (3, 7, 13)
SAME = 1e-4  # largest difference of logits of the two forms
MATTERS = 0.5  # points of accuracy below which an advantage is not worth having
PASSED = 90.0  # % of spoken digits
MEL_BINS, FRAMES, JUDGED_TAKES = 40, 64, 5


@dataclass(frozen=True)
class _Scale:
    """Networks of ``dims`` and ``depths`` on images of ``pixels``, how many train and judge, their budget; the block
    that is timed and how often; the map whose gradients are taken; the budget of sound."""

    pixels: int
    dims: tuple[int, ...]
    depths: tuple[int, ...]
    train: int
    held_out: int | None
    images: Budget
    timed: tuple[int, int] = (160, 28)  # channels, side
    rounds: int = 15
    field: int = 65
    sound: Budget | None = None


QUICK = _Scale(32, (16, 32), (1, 1), 600, 600, Budget(40, 32, 4e-3), rounds=7, field=33)
CIFAR = _Scale(
    64, (24, 48, 96), (1, 1, 2), 5000, 2000, Budget(5 * 78, 64, 4e-3, augment=True, flip=True),
    sound=Budget(8 * 42, 64, 4e-3),
)  # fmt: skip
DIGITS = _Scale(
    64, (24, 48, 96), (1, 1, 2), 1200, None, Budget(5 * 18, 64, 4e-3, augment=True), sound=Budget(8 * 42, 64, 4e-3)
)  # fmt: skip


@register("proof", "unireplknet")
def unireplknet(settings: Settings) -> ProofResult:
    """All parts. Quick: the digits, smaller networks, a map of 33 x 33, and no sound."""
    data = data_set("cifar10", quick=settings.quick)
    scale = QUICK if settings.quick else CIFAR if data.name == "cifar10" else DIGITS
    arms = {
        name: partial(small_network, scale.dims, scale.depths, len(data.classes), kernel, branches)
        for name, kernel, branches in (
            ("13 x 13 and branches", 13, True), ("13 x 13 alone", 13, False), ("3 x 3", 3, False),
        )
    }  # fmt: skip
    found = run_arms(
        settings, arms, lambda seed: image_task(data, scale.pixels, seed, train=scale.train, held_out=scale.held_out),
        scale.images, _merged, data.name,
    )  # fmt: skip
    rows = [*accuracy_rows(found, data.name), *figure_rows(found, "merged form differs by")]
    times = _times(scale, len(settings.seeds))
    radii = _radii(scale, settings)
    rows += time_rows(times)
    rows += [
        Row(f"four blocks of {kernel} x {kernel}", f"reach of {share} %", tuple(values), "places")
        for (kernel, share), values in radii.items()
    ]
    claims = [
        *_merging(found["13 x 13 and branches"], times, scale),
        _reach(radii),
        better(
            f"Kernels of 13 x 13 are better than 3 x 3 ({data.name}).",
            found["13 x 13 and branches"], found["3 x 3"], matters=MATTERS,
        ),
        better(
            f"The dilated branches help the large kernel to learn ({data.name}).",
            found["13 x 13 and branches"], found["13 x 13 alone"], matters=MATTERS,
        ),
    ]  # fmt: skip
    sound = _sound(settings, scale)
    if sound:
        rows += accuracy_rows(sound, "spoken digits")
        claims += _sound_claims(sound)
    notes = () if sound else ("Sound was left out: it is part of the full run with the spoken digits in LISSOM_DATA.",)
    title = "large kernels beside small ones, and the trained form beside the merged"
    return ProofResult("unireplknet", title, tuple(claims), tuple(rows), notes)


# Images


def small_network(
    dims: tuple[int, ...], depths: tuple[int, ...], classes: int, kernel: int, branches: bool, channels: int = 3
) -> nn.Module:
    """A UniRepLKNet with one kernel size in all stages; without ``branches`` a large kernel is trained alone."""
    model = UniRepLKNet(
        in_chans=channels, num_classes=classes, depths=depths, dims=dims, kernel_sizes=(kernel,) * len(dims)
    )
    if not branches:
        for block in model.modules():
            if isinstance(block, UniRepLKNetBlock) and isinstance(block.dwconv, DilatedReparamBlock):
                alone = DilatedReparamBlock(block.dwconv.channels, kernel, branches=())
                alone.lk_origin.load_state_dict(block.dwconv.lk_origin.state_dict())
                block.dwconv = alone
    return model


def _merged(name: str, model: nn.Module, task: Task) -> Mapping[str, float]:
    """The largest difference of logits that merging makes."""
    x = torch.from_numpy(task.report.inputs(slice(0, 64)))
    with torch.no_grad():
        merged = reparameterize_model(copy.deepcopy(model).eval())
        return {"merged form differs by": float((merged(x) - model(x)).abs().max())}


# Merging


def _times(scale: _Scale, repetitions: int) -> dict[str, list[float]]:
    channels, side = scale.timed
    x = torch.randn(1, channels, side, side, generator=generator(0))
    calls = {}
    for name, make in (("13 x 13", DilatedReparamBlock), ("block", UniRepLKNetBlock)):
        layer = built(partial(make, channels, 13), 0).eval()
        calls[f"{name}, with branches"] = forward_call(layer, x)
        # timm merges what a module holds, and not the module itself
        calls[f"{name}, merged"] = forward_call(reparameterize_model(nn.Sequential(layer).eval()), x)
    return interleaved(calls, repetitions, scale.rounds)


def _merging(trained: list[Trained], times: Mapping[str, list[float]], scale: _Scale) -> tuple[Claim, ...]:
    differences = [arm.figures["merged form differs by"] for arm in trained]
    channels, side = scale.timed
    return (
        Claim(
            "The merged network answers as the trained one.",
            verdict_by_interval([SAME - difference for difference in differences]),
            f"logits differ by at most {max(differences):.1e}, with {SAME:g} allowed",
        ),
        *(
            faster(
                f"Merging makes {what} faster.", times, f"{name}, with branches", f"{name}, merged",
                more=f"{channels} channels on {side} x {side}, one thread",
            )
            for name, what in (("13 x 13", "a convolution with branches"), ("block", "a whole block"))
        ),
    )  # fmt: skip


# Reach


def gradient_radius(gradients: torch.Tensor, share: float) -> float:
    """The r such that the places at most r away from the middle of ``gradients`` (H, W), absolute values, hold
    ``share`` of their sum. Distance is the larger of rows and columns, and the middle does not count; between two whole
    distances the sum counts as growing evenly, so that the whole distance is r rounded up."""
    height, width = gradients.shape
    rows, columns = torch.arange(height) - height // 2, torch.arange(width) - width // 2
    distance = torch.maximum(rows.abs()[:, None], columns.abs()[None])
    sums = torch.zeros(int(distance.max()) + 1, dtype=torch.float64)
    sums.index_add_(0, distance.flatten(), gradients.double().flatten())
    sums[0] = 0
    within = sums.cumsum(0)
    wanted = share * within[-1]
    first = int((within < wanted).sum())  # the first distance that holds so much
    return first - float((within[first] - wanted) / sums[first])


def _radii(scale: _Scale, settings: Settings) -> dict[tuple[int, int], list[float]]:
    """By kernel size and per cent, one radius a seed."""
    found: dict[tuple[int, int], list[float]] = {(kernel, share): [] for kernel in KERNELS for share in (50, 90)}
    for seed in settings.seeds:
        for kernel in KERNELS:
            blocks = built(lambda k=kernel: _blocks(k), seed)  # type: ignore[misc]
            inputs = torch.randn(8, 16, scale.field, scale.field, generator=generator(seed))
            for module in blocks.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.momentum = None  # running statistics are then those of the pass that follows
            with torch.no_grad():
                blocks.train()(inputs)
            blocks.eval()
            inputs.requires_grad_()
            middle = scale.field // 2
            blocks(inputs)[:, :, middle, middle].sum().backward()
            assert inputs.grad is not None
            strength = inputs.grad.abs().sum((0, 1))
            for share in (50, 90):
                found[kernel, share].append(gradient_radius(strength, share / 100))
        settings.progress(f"seed {seed}: reach measured")
    return found


def _blocks(kernel: int) -> nn.Module:
    return nn.Sequential(*(UniRepLKNetBlock(16, kernel, ls_init_value=1.0) for _ in range(4)))


def _reach(radii: Mapping[tuple[int, int], list[float]]) -> Claim:
    verdicts, evidence = [], []
    for share in (50, 90):
        for small, large in ((3, 7), (7, 13)):
            more = [a - b for a, b in zip(radii[large, share], radii[small, share], strict=True)]
            verdicts.append(verdict_by_interval(more))
        reached = ", ".join(f"{kernel} x {kernel}: {spread(radii[kernel, share], 1)}" for kernel in KERNELS)
        evidence.append(f"{share} % of the gradient within {reached}")
    return Claim("Larger kernels reach further.", together(verdicts), "; ".join(evidence))


# Sound


def spoken_digits(path: Path) -> tuple[ArraySplit, ArraySplit]:
    """What trains and what judges, of a table with the columns wav, digit and take: inputs (N, 1, 40, 64).

    Log-mel spectra of 40 bins and 64 frames of 10 ms, normalised by mean and deviation of what trains.
    """
    sounds = read_sounds(path)
    digits, judged = sounds.labels["digit"].astype(np.int64), sounds.labels["take"] < JUDGED_TAKES
    spectra = np.concatenate(
        [
            audio_to_image(torch.from_numpy(sound)[None], FRAMES, None, sounds.rate, MEL_BINS).numpy()
            for sound in sounds.waveforms
        ]
    )
    mean, deviation = spectra[~judged].mean(), spectra[~judged].std()
    spectra = ((spectra - mean) / (2 * deviation)).astype(np.float32)
    return ArraySplit("fit", spectra[~judged], digits[~judged]), ArraySplit("report", spectra[judged], digits[judged])


def _sound(settings: Settings, scale: _Scale) -> dict[str, list[Trained]]:
    """Both arms on the spoken digits; nothing where they are not there, or not asked for."""
    folder = os.environ.get("LISSOM_DATA")
    path = Path(folder or ".") / "spoken_digits" / "all.parquet"
    if scale.sound is None or not folder or not path.is_file():
        return {}
    fit, report = spoken_digits(path)
    names = tuple(str(digit) for digit in range(10))
    task = Task(fit.sample(32, 0), report, fit, (1, MEL_BINS, FRAMES), names, name="spoken digits")
    arms = {
        f"{kernel} x {kernel}": partial(
            UniRepLKNet, in_chans=1, num_classes=10, depths=(2, 2, 6, 2), dims=(16, 32, 64, 128),
            kernel_sizes=(3, kernel, kernel, kernel),
        )
        for kernel in (13, 3)
    }  # fmt: skip
    return run_arms(settings, arms, lambda seed: task, scale.sound, part="spoken digits")


def _sound_claims(found: Mapping[str, list[Trained]]) -> list[Claim]:
    reached = [arm.accuracy for arm in found["13 x 13"]]
    return [
        Claim(
            f"The network reads sound as it is: {PASSED:g} % of spoken digits and more, of spectra made into images.",
            verdict_by_interval([value - PASSED for value in reached]),
            f"{spread(reached)} % of {found['13 x 13'][0].count}",
        ),
        no_worse(
            "Large kernels lose nothing on sound.", found["13 x 13"], found["3 x 3"], margin=MATTERS,
        ),
    ]  # fmt: skip
