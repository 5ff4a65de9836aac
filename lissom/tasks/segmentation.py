"""Semantic segmentation: one class a pixel, judged by the mean intersection over union (mIoU).

With T_c the pixels of class c in the masks of a split, A_c those that are answered with c (pixels whose mask is the
ignored index belong to neither),

    IoU_c = |T_c & A_c| / |T_c | A_c|        mIoU = mean of IoU_c over the classes c with pixels in the masks

(the measure of the Pascal VOC challenges, Everingham et al., IJCV 2015; the sums run over the split, not an image).
A class that no mask has is left out of the mean: what is answered with it counts against the true class alone, so that
a single stray pixel of a rare class does not take a whole class's share from the mean.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from lissom.data.masks import IGNORE, MaskedImages, MaskSplit
from lissom.data.sources import DataSet
from lissom.data.splits import ArraySplit, Images, PixelSplit
from lissom.errors import LissomError
from lissom.images import Preprocessing
from lissom.tasks.division import divided
from lissom.tasks.task import Quality, Split, Task

if TYPE_CHECKING:
    import torch

__all__ = ["SegmentationTask", "make_segmentation_task"]

RESAMPLES = 1000
SEED = 0  # of the bootstrap: the same answers have the same interval


@dataclass(frozen=True)
class SegmentationTask(Task):
    """Semantic segmentation; a split's ``labels`` are masks of class indices, uint8 (N, H, W), H and W as in ``shape``.

    ``ignore`` is the index in masks that counts neither in the loss nor in the quality. Models answer with logits
    (B, classes, h, w) of any size, which are resized bilinearly to the masks'.
    """

    kind: str = "segmentation"
    ignore: int = IGNORE

    @property
    def metric(self) -> str:
        """What ``quality`` measures, in words."""
        return "mean IoU" if self.labelled else "agreement with the original"

    def loss(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Cross entropy over the pixels that are not ignored: output (B, classes, h, w), target integers (B, H, W).

        0 where every pixel is ignored.
        """
        from torch.nn import functional

        target = target.long()
        output = _resized(output.float(), target.shape[-2:])
        total = functional.cross_entropy(output, target, ignore_index=self.ignore, reduction="sum")
        return total / (target != self.ignore).sum().clamp(min=1)

    def reduce(self, outputs: np.ndarray) -> np.ndarray:
        """The best class of each pixel at the masks' size: (n, classes, h, w) -> (n, H, W), uint8 (uint16 above 256).

        What is reduced already stays as it is. Raises LissomError where the answers are not one map a class.
        """
        if outputs.ndim == 3 and np.issubdtype(outputs.dtype, np.integer):
            return outputs
        import torch

        self.check_answer(outputs.shape)
        logits = _resized(torch.from_numpy(np.ascontiguousarray(outputs, np.float32)), self.shape[1:])
        return logits.argmax(1).numpy().astype(np.uint8 if outputs.shape[1] <= 256 else np.uint16)

    def targets(self, split: Split, original: np.ndarray) -> np.ndarray:
        """The masks, or the original model's own answers where there are none."""
        return split.labels if split.labels is not None else self.reduce(original)

    def scores(self, outputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """mIoU of each image alone, in [0, 1]; 1 where its mask is ignored everywhere. Shapes as for ``quality``."""
        return np.nan_to_num(_mean_iou(self._areas(outputs, targets)), nan=1.0)

    def quality(self, outputs: np.ndarray, targets: np.ndarray) -> Quality:
        """mIoU over a split, in points: outputs (N, classes, h, w) or reduced, targets integers (N, H, W).

        The interval is a bootstrap's over images (Efron 1979): 1,000 samples of N images drawn with replacement, the
        2.5th to the 97.5th percentile of their mIoU, widened where need be to hold the value itself (rare classes miss
        in some samples); 0 to 100 for a single image. Raises LissomError where every pixel is ignored.
        """
        areas = self._areas(outputs, targets)
        value = float(_mean_iou(areas.sum(0)))
        if np.isnan(value):
            raise LissomError(
                f"every pixel of the masks is ignored (index {self.ignore}); there is nothing to judge by"
            )
        low, high = _bootstrap(areas, value)
        return Quality(100 * value, 100 * low, 100 * high, len(areas))

    def check_outputs(self, outputs: int) -> None:
        """Raise LissomError where a model with ``outputs`` maps cannot serve this task."""
        known = len(self.classes)
        if known and outputs != known:
            raise LissomError(
                f"the model answers with {outputs} maps and the data have {known} classes; "
                f"give a model with {known} maps, one a class"
            )

    def check_answer(self, shape: tuple[int, ...]) -> None:
        """Raise LissomError where answers of ``shape`` (B, ...) are not one map a class."""
        if len(shape) != 4:
            raise LissomError(
                f"the model answers with shape {tuple(shape)}; for segmentation, one tensor (batch, classes, height, "
                "width) is wanted"
            )
        self.check_outputs(shape[1])

    def _areas(self, outputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """int64 (N, 3, classes): pixels of each class in both, in the answer, and in the mask."""
        answers = self.reduce(outputs)
        if answers.shape != targets.shape:
            raise LissomError(f"the answers are of shape {answers.shape} and the masks of shape {targets.shape}")
        known = targets != self.ignore
        count = max(len(self.classes), int(answers.max()) + 1, int(targets.max(where=known, initial=0)) + 1)
        areas = np.zeros((len(answers), 3, count), np.int64)
        for area, answer, target, seen in zip(areas, answers, targets, known, strict=True):
            a, t = answer[seen], target[seen]
            for row, values in enumerate((t[a == t], a, t)):
                area[row] = np.bincount(values, minlength=count)
        return areas


def _resized(maps: torch.Tensor, size: tuple[int, ...]) -> torch.Tensor:
    """(B, classes, h, w) as (B, classes, *size), bilinearly; pixel centres keep their places."""
    from torch.nn import functional

    if tuple(maps.shape[-2:]) == tuple(size):
        return maps
    return functional.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=False)


def _mean_iou(areas: np.ndarray) -> np.ndarray:
    """(..., 3, classes) areas in both, answer and mask -> (...) shares; nan where no class has a pixel."""
    both, answer, mask = np.moveaxis(areas.astype(np.float64), -2, 0)
    present = mask > 0
    iou = np.divide(both, answer + mask - both, out=np.zeros_like(both), where=present)
    count = present.sum(-1)
    return np.divide(iou.sum(-1), count, out=np.full(count.shape, np.nan), where=count > 0)


def _bootstrap(areas: np.ndarray, value: float) -> tuple[float, float]:
    """95 % interval of the mIoU over images: areas (N, 3, classes)."""
    total = len(areas)
    if total < 2:
        return 0.0, 1.0
    drawn = np.random.default_rng(SEED).integers(total, size=(RESAMPLES, total))
    drawn += total * np.arange(RESAMPLES)[:, None]
    times = np.bincount(drawn.ravel(), minlength=RESAMPLES * total).reshape(RESAMPLES, total)
    sums = times.astype(np.float64) @ areas.reshape(total, -1).astype(np.float64)
    shares = _mean_iou(sums.reshape(RESAMPLES, *areas.shape[1:]))
    low, high = np.nanpercentile(shares, [2.5, 97.5])
    return min(float(low), value), max(float(high), value)


def make_segmentation_task(
    data: DataSet, *, preprocessing: Preprocessing | None, trained_here: bool, seed: int = 0
) -> SegmentationTask:
    """The task of ``data`` with masks, or without any labels: its splits by where the baseline was trained.

    The splits are those of ``lissom.tasks.classification.make_task``, but for divisions, which are seeded and know no
    classes. ``preprocessing`` is how the model wants its images (unused for data that arrive as tensors); images and
    masks are resized to its whole input, whatever it says of cropping, so that both stay aligned and no pixel of the
    mask is lost. Raises LissomError where a split is missing or too small to divide, and for labels that are no masks.
    """
    parts = divided(data, trained_here, seed)
    ignore = IGNORE if data.ignore is None else data.ignore
    first = parts["report"]
    if isinstance(first, ArraySplit):
        shape, preprocessing = first.shape, None
    else:
        if preprocessing is None:
            raise LissomError("the data are images, and how the model wants them is unknown: give preprocessing")
        preprocessing = replace(preprocessing, resize="squash", crop=1.0)
        shape = (preprocessing.channels, preprocessing.height, preprocessing.width)

    def ready(part: Images | ArraySplit, name: str) -> Split:
        part = part.take(np.arange(len(part)), name)
        if isinstance(part, MaskedImages):
            assert preprocessing is not None  # refused above
            return MaskSplit(part, preprocessing, len(data.classes), ignore)
        labels = part.labels
        if labels is not None and labels.shape[1:] != shape[1:]:
            raise LissomError(
                f"the labels of {part.name} are of shape {labels.shape}; for segmentation, masks "
                f"({len(part)}, {', '.join(map(str, shape[1:]))}) are wanted"
            )
        if isinstance(part, ArraySplit):
            if labels is not None and data.classes:
                wrong = labels[(labels != ignore) & ((labels < 0) | (labels >= len(data.classes)))]
                if len(wrong):
                    raise LissomError(
                        f"a mask of {part.name} holds the index {wrong[0]}, and there are {len(data.classes)} classes "
                        f"and the ignored index {ignore}; correct the mask"
                    )
            return part
        assert preprocessing is not None
        return PixelSplit(part, preprocessing)

    splits = {name: ready(part, name) for name, part in parts.items()}
    return SegmentationTask(
        choose=splits["choose"],
        report=splits["report"],
        fit=splits.get("fit"),
        shape=shape,
        classes=data.classes,
        preprocessing=preprocessing,
        name=data.name,
        ignore=ignore,
    )
