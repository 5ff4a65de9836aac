"""Images as a camera might spoil them: blur, noise and brightness, three strengths each, the same for the same seed.

They act on an image as it was read, before it is resized for a model. The kinds, and about their strengths, are among
those of ImageNet-C and CIFAR-10-C (Hendrycks and Dietterich 2019, arXiv 1903.12261). Blur is in shares of the image's
shorter side, so that it is as visible in a large image as in a small one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import ndimage

from lissom.data.splits import Images, PixelSplit
from lissom.errors import LissomError
from lissom.images import Preprocessing

__all__ = ["EVERY", "LEVELS", "Corruption", "corrupt", "corrupted"]

LEVELS = {
    "blur": (0.0125, 0.02, 0.03),  # Gaussian: its standard deviation, as a share of the shorter side
    "noise": (0.04, 0.08, 0.16),  # Gaussian, each value of each pixel by itself: standard deviation, of the full range
    "brightness": (0.1, 0.2, 0.3),  # added to every value, of the full range
}


@dataclass(frozen=True)
class Corruption:
    """One kind (a key of ``LEVELS``) and its strength, 1 to 3."""

    kind: str
    strength: int

    def __post_init__(self) -> None:
        if self.kind not in LEVELS:
            raise LissomError(f"no corruption is called {self.kind!r}; known: {', '.join(LEVELS)}")
        if self.strength not in (1, 2, 3):
            raise LissomError(f"a corruption's strength is 1, 2 or 3, not {self.strength!r}")

    @property
    def level(self) -> float:
        return LEVELS[self.kind][self.strength - 1]


EVERY = tuple(Corruption(kind, strength) for kind in LEVELS for strength in (1, 2, 3))


def corrupt(image: np.ndarray, corruption: Corruption, seed: int | tuple[int, ...] = 0) -> np.ndarray:
    """A spoilt copy of uint8 (H, W) or (H, W, C), of the same shape. Raises LissomError for any other array."""
    if image.dtype != np.uint8 or image.ndim not in (2, 3) or not image.size:
        raise LissomError(f"corruptions act on uint8 images (H, W) or (H, W, C), not {image.dtype} {image.shape}")
    x = image.astype(np.float32)
    if corruption.kind == "blur":
        sigma = corruption.level * min(image.shape[:2])
        x = ndimage.gaussian_filter(x, (sigma, sigma, 0)[: image.ndim], mode="nearest")
    elif corruption.kind == "noise":
        rng = np.random.default_rng(seed)
        x += 255 * corruption.level * rng.standard_normal(image.shape, dtype=np.float32)
    else:
        x += 255 * corruption.level
    return np.rint(x).clip(0, 255).astype(np.uint8)


def corrupted(split: PixelSplit, corruption: Corruption, seed: int = 0) -> PixelSplit:
    """The same images, spoilt when they are decoded. An image's noise depends on ``seed`` and its row in the source,
    and on nothing else. Raises LissomError for a split of tensors, which have no images to spoil."""
    if type(split) is not PixelSplit:
        raise LissomError("only images can be spoilt: these data arrive as tensors, or have masks")
    known = split._stored is not None  # then it has told already which images cannot be read
    images = split._images.take(split._kept) if known else split._images
    return _Corrupted(images, split.preprocessing, corruption, seed)


class _Corrupted(PixelSplit):
    def __init__(self, images: Images, preprocessing: Preprocessing, corruption: Corruption, seed: int) -> None:
        super().__init__(images, preprocessing)
        self.corruption, self.seed = corruption, seed

    def _part(self, rows: np.ndarray) -> Any:
        return _Corrupted(self._images.take(rows), self.preprocessing, self.corruption, self.seed)

    def _row(self, i: int) -> tuple[np.ndarray, ...]:
        image = self._images.open(i)
        if not isinstance(image, np.ndarray):  # Pillow's; in the model's channels, as preparing it makes it anyway
            image = np.asarray(image.convert("L" if self.preprocessing.channels == 1 else "RGB"), np.uint8)
        row = int(self._images.rows[i])
        return (self.preprocessing.pixels(corrupt(image, self.corruption, (self.seed, row))),)
