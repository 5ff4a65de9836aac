"""From an image file to a model's input: decoding within size limits, resizing, normalising. Pillow and NumPy only.

The data room and the predictor both use this file, so a picture is prepared for measuring exactly as it is prepared
in use.
"""

from __future__ import annotations

import io
import stat
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lissom.errors import LissomError

__all__ = ["MAX_BYTES", "MAX_PIXELS", "Preprocessing", "open_image"]

MAX_PIXELS = 64_000_000  # 8000 x 8000: a decompression bomb stays outside, a camera's picture passes
MAX_BYTES = 64 * 2**20


def open_image(source: bytes | str | Path) -> Any:
    """Decode an image file, or the bytes of one, into a Pillow image.

    Raises LissomError, with the reason, where the file is no image, is truncated or exceeds MAX_BYTES or MAX_PIXELS;
    and for a pipe or a device, which may never end.
    """
    from PIL import Image

    try:
        if isinstance(source, bytes):
            data = source
        else:
            known = Path(source).stat()
            if not stat.S_ISREG(known.st_mode):
                raise LissomError("not a readable image (a folder, a pipe or a device)")
            if known.st_size > MAX_BYTES:
                raise LissomError(f"{known.st_size} bytes, more than the limit of {MAX_BYTES}")
            with Path(source).open("rb") as file:
                data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise LissomError(f"{len(data)} bytes, more than the limit of {MAX_BYTES}")
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data))
            if image.width * image.height > MAX_PIXELS:
                raise LissomError(f"{image.width} x {image.height} pixels, more than the limit of {MAX_PIXELS}")
            image.load()
        return image
    except LissomError:
        raise
    except Exception as error:  # Pillow raises anything from SyntaxError to struct.error on a hostile file
        reason = str(error).split("<")[0].strip() or type(error).__name__
        raise LissomError(f"not a readable image ({reason})") from error


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes a model's input of shape (channels, height, width), float32.

    The shorter side is resized to ``size / crop``, the centre is cropped to ``size``, pixels are scaled to [0, 1] and
    normalised with ``mean`` and ``std`` (one value a channel). ``resize="squash"`` ignores the aspect ratio and crops
    nothing.
    """

    height: int
    width: int
    channels: int = 3
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    resize: str = "crop"
    crop: float = 1.0
    interpolation: str = "bicubic"

    def pixels(self, image: Any) -> np.ndarray:
        """A Pillow image, or uint8 (H, W) or (H, W, C), as uint8 (height, width, channels).

        Raises LissomError where a long and narrow image, made as wide as it must be, would exceed MAX_PIXELS.
        """
        from PIL import Image

        if isinstance(image, np.ndarray):
            array = image[..., 0] if image.ndim == 3 and image.shape[-1] == 1 else image
            image = Image.fromarray(array)
        image = image.convert("L" if self.channels == 1 else "RGB")
        filters = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
        kernel = filters[self.interpolation]
        if image.size != (self.width, self.height):
            if self.resize == "squash":
                image = image.resize((self.width, self.height), kernel)
            else:
                scale = max(self.width / image.width, self.height / image.height) / self.crop
                if not image.width * scale * image.height * scale <= MAX_PIXELS:
                    raise LissomError(
                        f"{image.width} x {image.height} pixels, which would be resized to more than the limit of "
                        f"{MAX_PIXELS}"
                    )
                wide = max(self.width, round(image.width * scale))
                high = max(self.height, round(image.height * scale))
                image = image.resize((wide, high), kernel)
                left, top = (wide - self.width) // 2, (high - self.height) // 2
                image = image.crop((left, top, left + self.width, top + self.height))
        array = np.asarray(image, dtype=np.uint8)
        return array[..., None] if array.ndim == 2 else array

    def normalise(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 (N, height, width, channels) as float32 (N, channels, height, width), contiguous."""
        mean = np.asarray(self.mean, np.float32) * 255
        scale = 1 / (np.asarray(self.std, np.float32) * 255)
        x = (pixels.astype(np.float32) - mean) * scale
        return np.ascontiguousarray(x.transpose(0, 3, 1, 2))

    def __call__(self, image: Any) -> np.ndarray:
        """One image (file path, bytes, Pillow image or uint8 array) as float32 (channels, height, width)."""
        if isinstance(image, bytes | str | Path):
            image = open_image(image)
        return self.normalise(self.pixels(image)[None])[0]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Preprocessing:
        known: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
        return cls(**known)
