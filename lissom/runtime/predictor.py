"""``load(artifact)``: an artifact as a function, from arrays to answers or from images to classes.

NumPy and the artifact's runtime are enough; images also need Pillow.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from lissom.errors import LissomError
from lissom.images import Preprocessing, open_image
from lissom.runtime.artifact import Artifact
from lissom.runtime.backends import Answer, Stages
from lissom.runtime.memory import Memory, Remembered
from lissom.runtime.pooling import filled

__all__ = ["Prediction", "Predictor", "load"]

POOLED = 16  # batches of images that ``predict`` prepares at once where they gain from going together


@dataclass(frozen=True)
class Prediction:
    """What an artifact says of one image: the best class, its confidence (softmax), and the stage that answered.

    ``image`` names the image: its path, or ``image 3`` for the fourth that came without a name. ``ranking`` holds
    (class name, confidence) of the best classes, best first. ``remembered``: the answer is that of an earlier image
    with the same fingerprint (``lissom.runtime.memory``); no network ran.
    """

    image: str
    label: int
    name: str
    confidence: float
    exit: int
    ranking: tuple[tuple[str, float], ...]
    remembered: bool = False


def load(artifact: str | Path, threads: int | None = None, memory: Memory | str | None = None) -> Predictor:
    """Open an artifact's folder for use, on ``threads`` threads (None: all that this process may use).

    ``memory`` ("exact", "dhash", "invariants", each perhaps with ":CAPACITY", or a ``Memory``) lets ``predict`` answer
    images that it has seen before without running a network. Kinds other than exact can be wrong
    (``lissom.runtime.memory.false_hits`` counts how often); without ``memory`` nothing is remembered.

    Raises LissomError where the folder is no artifact, is damaged, was altered since its export, or its runtime is not
    installed, and where the memory holds another artifact's answers.
    """
    opened = Artifact.open(artifact)
    opened.verify()
    return Predictor(opened, threads, memory)


class Predictor:
    """An opened artifact. ``classes`` are the names of its outputs, ``recipe`` is how it was made, ``memory`` what
    ``predict`` remembers (None: nothing)."""

    def __init__(self, artifact: Artifact, threads: int | None = None, memory: Memory | str | None = None) -> None:
        self.artifact = artifact
        self.classes: tuple[str, ...] = tuple(artifact.plan.get("classes") or ())
        self.recipe: str = artifact.plan.get("recipe", "")
        self._stages = Stages(artifact, threads)
        self._batch, *self._shape = artifact.input_shape
        gives = self._stages.graphs[-1].gives
        if any(shape is not None and shape[:1] != (self._batch,) for shape in gives):
            raise LissomError(f"{artifact.path} does not give {self._batch} inputs one row each; export it anew")
        self._answer = None if gives[0] is None else gives[0][1:]
        self._preprocessing = _preprocessing(artifact)
        self.memory = Memory.of(memory) if isinstance(memory, str) else memory
        if self.memory is not None:
            if self._preprocessing is None:
                raise LissomError("a memory is of images, and the artifact was exported for tensors")
            self.memory.bind(_hash_of_answers(artifact))

    @property
    def exits(self) -> int:
        """How many early exits there are."""
        return len(self._stages.thresholds)

    def place(self, stage: int) -> str:
        """Where an answer of that stage was given, in words."""
        if stage >= self.exits:
            return "ran to the end"
        return f"left at exit {stage + 1} of {self.exits}, after {self.artifact.plan['decisions'][stage].get('at')}"

    def __call__(self, x: np.ndarray) -> Answer:
        """The artifact's answers to float32 (n, C, H, W): (n, ...), or a list of such where it has several outputs.

        Any n will do, though the artifact's own batch is static. ``x`` is left as it is. Raises LissomError where
        ``x`` has another shape or holds whole numbers (pixels: ``predict`` prepares them).
        """
        return self.answer(x)[0]

    def answer(self, x: np.ndarray) -> tuple[Answer, np.ndarray]:
        """What calling it gives, and the stage that gave each answer, int64 (n,): 0 is the first exit.

        With exits and a batch above 1, many inputs in one call cost less than in several: those that wait for a stage
        are gathered until a batch of them is there.
        """
        x = np.asarray(x)
        if x.ndim != 1 + len(self._shape) or list(x.shape[1:]) != self._shape:
            one = " (one input is x[None])" if list(x.shape) == self._shape else ""
            want = ", ".join(str(size) for size in self._shape)
            raise LissomError(f"the artifact takes inputs of shape (n, {want}), not {x.shape}{one}")
        if not np.issubdtype(x.dtype, np.floating):
            raise LissomError(f"the artifact takes prepared float32 inputs, not {x.dtype}; predict() prepares images")
        if self._stages.thresholds:
            return self._stages.run_many(x, self._batch)
        answers = [self._stages.run(part) for part in filled(x, self._batch)]
        where = np.full(len(x), len(self._stages.graphs) - 1)
        if isinstance(answers[0], list):
            return [np.concatenate(parts)[: len(x)] for parts in zip(*answers, strict=True)], where
        return np.concatenate(answers)[: len(x)], where  # type: ignore[arg-type]  # arrays all, as the first is

    def prepare(self, image: Any) -> np.ndarray:
        """One image (path, bytes, uint8 (H, W) or (H, W, C), or a Pillow image) as this artifact's float32 (C, H, W).

        Raises LissomError where it is no readable image, or the artifact was exported for tensors.
        """
        if self._preprocessing is None:
            raise LissomError(
                f"{self.artifact.path} does not say how images become its inputs, because it was exported for tensors; "
                "call it with float32 arrays"
            )
        if isinstance(image, np.ndarray):
            _check_pixels(image)
        return self._preprocessing(image)

    def predict(self, images: Iterable[Any], top: int = 1) -> list[Prediction]:
        """Classify images (see ``prepare``), some batches at a time; ``top`` classes in each ranking.

        Raises LissomError, with the image's name, where one cannot be read.
        """
        predictions: list[Prediction] = []
        pooled = self.exits > 0 and self._batch > 1
        for chunk in _chunks(images, (POOLED if pooled else 1) * self._batch):
            names = [self._name(image, len(predictions) + i) for i, image in enumerate(chunk)]
            if self.memory is not None:
                predictions += self._remembered(chunk, names, self.memory, top)
                continue
            inputs = []
            for name, image in zip(names, chunk, strict=True):
                with _named(name):
                    inputs.append(self.prepare(image))
            answers, stages = self.answer(np.stack(inputs))
            predictions += self.read(answers, names, top, stages)
        return predictions

    def _remembered(self, images: list[Any], names: list[str], memory: Memory, top: int) -> list[Prediction]:
        """The predictions of one batch, where the network runs only on images whose fingerprint is new."""
        places: dict[bytes, list[int]] = {}
        opened: dict[bytes, Any] = {}
        for i, (name, image) in enumerate(zip(names, images, strict=True)):
            with _named(name):
                image, key = self._fingerprint(image, memory)
            places.setdefault(key, []).append(i)
            opened.setdefault(key, image)
        known = {key: self._recalled(memory, key) for key in places}
        new = [key for key, found in known.items() if found is None]
        if new:
            inputs = []
            for key in new:
                with _named(names[places[key][0]]):
                    inputs.append(self.prepare(opened[key]))
            answers, stages = self.answer(np.stack(inputs))
            for key, row, stage in zip(new, answers[0] if isinstance(answers, list) else answers, stages, strict=True):
                if row.ndim == 1 and np.isfinite(row).all():  # else ``read`` may say that these are no classes
                    memory.put(key, row, int(stage))
                known[key] = Remembered(row, int(stage))
        ordered: dict[int, tuple[Remembered, bool]] = {}
        for key, spots in places.items():
            for number, i in enumerate(spots):
                if number:
                    memory.get(key)  # counts as a look-up
                found = known[key]
                assert found is not None
                ordered[i] = found, number > 0 or key not in new
        given = [ordered[i][0] for i in range(len(names))]
        if len({r.answer.shape for r in given}) > 1:
            raise LissomError(f"the memory {memory.file or ''} holds answers of another number of classes; delete it")
        read = self.read(np.stack([r.answer for r in given]), names, top, np.array([r.stage for r in given], np.int64))
        return [replace(prediction, remembered=ordered[i][1]) for i, prediction in enumerate(read)]

    def _recalled(self, memory: Memory, key: bytes) -> Remembered | None:
        """What the memory holds under a key. Raises LissomError where this artifact cannot have answered it."""
        found = memory.get(key)
        if found is not None:
            length = self._answer is None or found.answer.shape == self._answer
            if not length or found.stage >= len(self._stages.graphs):
                raise LissomError(f"the memory {memory.file} is damaged; delete it")
        return found

    def _fingerprint(self, image: Any, memory: Memory) -> tuple[Any, bytes]:
        """The image decoded, so that it is decoded once, and its key: that of its raw pixels in the artifact's colours,
        before they are resized and normalised."""
        from PIL import Image

        if isinstance(image, bytes | str | Path):
            image = open_image(image)
        if isinstance(image, np.ndarray):
            _check_pixels(image)
            image = Image.fromarray(image[..., 0] if image.ndim == 3 and image.shape[-1] == 1 else image)
        assert self._preprocessing is not None
        pixels = np.asarray(image.convert("L" if self._preprocessing.channels == 1 else "RGB"))
        return image, memory.key(pixels)

    def read(
        self, answers: Answer, names: list[str], top: int = 1, stages: np.ndarray | None = None
    ) -> list[Prediction]:
        """Answers (n, classes) as predictions for the images of those names; ``stages`` (n,) gave them.

        Raises LissomError where the answers are not one score a class, and, with the image's name, where a confidence
        would be no number: for a score of NaN or +inf (a class at -inf has confidence 0).
        """
        scores = answers[0] if isinstance(answers, list) else answers
        if scores.ndim != 2 or not scores.shape[1]:
            raise LissomError(f"the artifact answers {scores.shape[1:]} an input, which is not one score a class")
        with np.errstate(invalid="ignore"):
            exponents = np.exp(scores.astype(np.float64) - scores.max(-1, keepdims=True))
            shares = exponents / exponents.sum(-1, keepdims=True)
        predictions = []
        if stages is None:
            stages = np.full(len(names), len(self._stages.graphs) - 1)
        for name, share, stage in zip(names, shares, stages, strict=True):
            if not np.isfinite(share).all():
                raise LissomError(
                    f"{name}: the artifact's scores are no finite numbers, so that no class is the best; look at the "
                    "model that it was exported from"
                )
            order = np.argsort(-share, kind="stable")[: max(1, top)]
            ranking = tuple((self._class(int(label)), float(share[label])) for label in order)
            label = int(order[0])
            predictions.append(Prediction(name, label, ranking[0][0], ranking[0][1], int(stage), ranking))
        return predictions

    def _class(self, label: int) -> str:
        return str(self.classes[label]) if label < len(self.classes) else str(label)

    @staticmethod
    def _name(image: Any, index: int) -> str:
        return str(image) if isinstance(image, str | Path) else f"image {index}"


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Puts an image's name before what is wrong with it."""
    try:
        yield
    except LissomError as error:
        raise LissomError(f"{name}: {error}") from error


def _check_pixels(image: np.ndarray) -> None:
    if image.dtype != np.uint8 or image.ndim not in (2, 3):
        raise LissomError(f"an image array is uint8 (H, W) or (H, W, C), not {image.dtype} {image.shape}")


def _hash_of_answers(artifact: Artifact) -> str:
    """What decides an artifact's answers to images: its graphs, its decisions, and how images become its inputs."""
    how = json.dumps([artifact.digest, artifact.plan["input"]], sort_keys=True)
    return hashlib.sha256(how.encode()).hexdigest()


def _chunks(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk


def _preprocessing(artifact: Artifact) -> Preprocessing | None:
    fields = artifact.plan["input"].get("preprocessing")
    if fields is None:
        return None
    try:
        made = Preprocessing.from_json(fields)
        # Tried out now, not on a user's first image: on one pixel, and without Pillow, which only images need.
        sizes = (made.channels, made.height, made.width)
        known = made.interpolation in ("bicubic", "bilinear") and made.resize in ("crop", "squash")
        known = known and made.crop > 0 and math.isfinite(made.crop) and made.channels in (1, 3)
        if not known or not all(type(size) is int for size in sizes) or sizes != artifact.input_shape[1:]:
            raise ValueError(f"{made}")
        with np.errstate(all="ignore"):
            prepared = made.normalise(np.zeros((1, 1, 1, made.channels), np.uint8))
        if prepared.shape != (1, made.channels, 1, 1) or not np.isfinite(prepared).all():
            raise ValueError(f"{made}")
    except (ArithmeticError, AttributeError, TypeError, ValueError) as error:
        raise LissomError(f"the preprocessing in {artifact.path}/plan.json is damaged ({error})") from error
    return made
