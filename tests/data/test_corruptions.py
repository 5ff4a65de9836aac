"""Spoilt images: of the same shape, the same for the same seed, worse with every strength, spoilt before they are
resized."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from lissom.data.corruptions import EVERY, LEVELS, Corruption, corrupt, corrupted
from lissom.data.splits import ArraySplit, Images, PixelSplit
from lissom.errors import LissomError
from lissom.images import Preprocessing


def picture(seed: int, shape: tuple[int, ...] = (40, 60, 3)) -> np.ndarray:
    """Smooth enough that a blur is not all there is to see."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(60, 180, (shape[0] // 4 + 1, shape[1] // 4 + 1, *shape[2:]))
    return np.repeat(np.repeat(coarse, 4, 0), 4, 1)[: shape[0], : shape[1]].astype(np.uint8)


@pytest.mark.parametrize("shape", [(40, 60, 3), (66, 42), (66, 42, 1)])
@pytest.mark.parametrize("corruption", EVERY, ids=lambda c: f"{c.kind}{c.strength}")
def test_an_image_is_spoilt_and_stays_an_image(shape: tuple[int, ...], corruption: Corruption) -> None:
    image = picture(0, shape)
    before = image.copy()
    found = corrupt(image, corruption, 3)
    assert (found.shape, found.dtype) == (shape, np.uint8)
    assert (found != image).any()
    np.testing.assert_array_equal(image, before)
    np.testing.assert_array_equal(found, corrupt(image, corruption, 3))
    other = corrupt(image, corruption, 4)
    assert (other != found).any() == (corruption.kind == "noise")


@pytest.mark.parametrize("kind", LEVELS)
def test_strength_grows(kind: str) -> None:
    image = picture(1, (64, 64, 3))
    distances = [np.abs(corrupt(image, Corruption(kind, s)).astype(float) - image).mean() for s in (1, 2, 3)]
    assert distances[0] < distances[1] < distances[2]


def test_what_the_kinds_do() -> None:
    flat = np.full((50, 50, 3), 100, np.uint8)
    np.testing.assert_array_equal(corrupt(flat, Corruption("blur", 3)), flat)  # the edges too
    np.testing.assert_array_equal(corrupt(flat, Corruption("brightness", 2)), flat + 51)
    assert corrupt(flat + 150, Corruption("brightness", 3)).max() == 255
    noisy = corrupt(flat, Corruption("noise", 2)).astype(float)
    assert noisy.mean() == pytest.approx(100, abs=0.8)
    assert noisy.std() == pytest.approx(0.08 * 255, rel=0.03)
    # Of a point in an image twice as large the blur is twice as wide.
    points = []
    for size in (50, 100):
        point = np.zeros((size, size), np.uint8)
        point[size // 2, size // 2] = 255
        points.append(int((corrupt(point, Corruption("blur", 3)) > 0).sum()))
    assert points[1] > 2 * points[0]


def test_what_is_no_image_or_no_corruption_is_refused() -> None:
    for wrong in (np.zeros((4, 4), np.float32), np.zeros(4, np.uint8), np.zeros((0, 4), np.uint8)):
        with pytest.raises(LissomError, match="corruptions act on uint8 images"):
            corrupt(wrong, Corruption("blur", 1))
    with pytest.raises(LissomError, match="known: blur, noise, brightness"):
        Corruption("rain", 1)
    with pytest.raises(LissomError, match="1, 2 or 3, not 4"):
        Corruption("blur", 4)
    with pytest.raises(LissomError, match="only images can be spoilt"):
        corrupted(ArraySplit("x", np.zeros((2, 3, 4, 4), np.float32)), EVERY[0])  # type: ignore[arg-type]


def split(items: list[object], channels: int = 3) -> PixelSplit:
    labels = np.arange(len(items)) % 2
    return PixelSplit(Images.of("made", items, labels), Preprocessing(20, 20, channels, resize="squash"))


def test_images_are_spoilt_before_they_are_resized() -> None:
    items = [picture(n) for n in range(4)]
    corruption = Corruption("noise", 3)
    found = corrupted(split([*items]), corruption, seed=5)
    want = [found.preprocessing.pixels(corrupt(image, corruption, (5, n))) for n, image in enumerate(items)]
    np.testing.assert_array_equal(found.pixels, np.stack(want))
    np.testing.assert_array_equal(found.labels, [0, 1, 0, 1])
    assert found.inputs(slice(1, 3)).shape == (2, 3, 20, 20)


def test_an_images_noise_is_its_own_whatever_is_drawn_beside_it() -> None:
    whole = corrupted(split([picture(0)] * 6), Corruption("noise", 1), seed=1)
    assert len({image.tobytes() for image in whole.pixels}) == 6
    drawn = split([picture(0)] * 6).sample(3, 7)
    some = corrupted(drawn, Corruption("noise", 1), seed=1)
    np.testing.assert_array_equal(some.pixels, whole.pixels[drawn._images.rows])
    np.testing.assert_array_equal(whole.sample(3, 7).pixels, some.pixels)


def test_files_in_any_form_and_broken_ones(tmp_path) -> None:  # type: ignore[no-untyped-def]
    Image.fromarray(picture(0)).convert("P").save(tmp_path / "a.png")
    Image.fromarray(picture(1, (30, 30))).save(tmp_path / "b.png")
    (tmp_path / "c.png").write_bytes(b"no image")
    paths = [tmp_path / name for name in ("a.png", "b.png", "c.png")]
    for channels in (3, 1):
        plain = split(paths, channels)
        with pytest.warns(UserWarning, match="1 of 3 images were left out"):
            assert plain.pixels.shape == (2, 20, 20, channels)
        found = corrupted(plain, Corruption("brightness", 1))  # what is broken is known, and not told again
        assert found.pixels.shape == (2, 20, 20, channels)
        np.testing.assert_array_equal(found.labels, plain.labels)
