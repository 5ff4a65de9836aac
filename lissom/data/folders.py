"""Images in folders: ``train/``, ``val/`` and ``test/`` of class folders or of images and masks; or one folder.

One folder alone holds unlabelled images. A class's images lie in a folder of their own below the split's; a split with
masks holds the two folders ``images/`` and ``masks/``, in which a file and its mask have the same name before the dot.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from lissom.data.masks import MaskedImages
from lissom.data.splits import Images
from lissom.errors import LissomError

__all__ = ["SPLITS", "SUFFIXES", "has_mask_folders", "read_class_folders", "read_images", "read_mask_folders"]

SPLITS = ("train", "val", "test")
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
MASK_SUFFIXES = (".png", ".bmp", ".gif", ".tif", ".tiff", ".pgm")  # those that keep every index


def _folders(path: Path) -> list[str]:
    return sorted(p.name for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))


def _images(path: Path) -> list[Path]:
    """The image files directly in a folder, by name."""
    return sorted(
        p for p in path.iterdir() if p.suffix.lower() in SUFFIXES and p.is_file() and not p.name.startswith(".")
    )


def _images_below(path: Path) -> list[Path]:
    """The image files in a folder and its sub-folders, by path; links to folders are not followed."""
    return sorted(image for folder, _, _ in os.walk(path) for image in _images(Path(folder)))


def read_images(path: Path) -> Images | None:
    """The unlabelled images directly in ``path``; None where there are none."""
    files = _images(path)
    return Images.of("images", files, root=path) if files else None


def read_class_folders(path: Path) -> tuple[tuple[str, ...], dict[str, Images]]:
    """Class names, and the splits of ``path/{train,val,test}/CLASS/**/*.png``.

    Classes are the folders of ``train/`` (of the first split there is, without it), in the order of their names as
    text: 0, 1, 10, 2. Raises LissomError for an empty class, a class that ``train/`` lacks, and a split without
    classes.
    """
    present = [name for name in SPLITS if (path / name).is_dir()]
    classes: tuple[str, ...] = ()
    splits: dict[str, Images] = {}
    for split in present:
        names = _folders(path / split)
        if not names:
            raise LissomError(f"{path / split} holds no class folders; put each class's images in a folder of its own")
        classes = classes or tuple(names)
        unknown = [name for name in names if name not in classes]
        if unknown:
            raise LissomError(
                f"{path / split} has the class {unknown[0]!r}, which {present[0]}/ lacks; "
                f"{present[0]}/ has: {_few(classes)}"
            )
        files: list[Path] = []
        labels: list[int] = []
        for name in names:
            found = _images_below(path / split / name)
            if not found:
                raise LissomError(
                    f"the class {name!r} is empty: {path / split / name} holds no image ({', '.join(SUFFIXES)}); "
                    "add some, or remove the folder"
                )
            files += found
            labels += [classes.index(name)] * len(found)
        splits[split] = Images.of(split, files, np.array(labels, np.int64), root=path)
    return classes, splits


def has_mask_folders(path: Path) -> bool:
    """Whether a split of ``path`` holds ``images/`` and ``masks/``, and no other folder."""
    return any(_folders(path / name) == ["images", "masks"] for name in SPLITS if (path / name).is_dir())


def read_mask_folders(path: Path) -> dict[str, MaskedImages]:
    """The splits of ``path/{train,val,test}/{images,masks}/*.png``; a mask has the name of its image.

    What has no partner is listed all the same, so that it is named when the split is decoded. Raises LissomError for a
    split without one of the folders, without images, and for two files of one name.
    """
    splits: dict[str, MaskedImages] = {}
    for split in (name for name in SPLITS if (path / name).is_dir()):
        for part in ("images", "masks"):
            if not (path / split / part).is_dir():
                raise LissomError(f"{path / split} has no {part}/ and another split has; give it one, or remove it")
        images = _by_stem(path / split / "images", SUFFIXES)
        masks = _by_stem(path / split / "masks", MASK_SUFFIXES)
        if not images:
            raise LissomError(f"{path / split / 'images'} holds no image ({', '.join(SUFFIXES)}); add some")
        stems = sorted(images.keys() | masks.keys())
        splits[split] = MaskedImages.pairs(
            split, [images.get(stem) for stem in stems], [masks.get(stem) for stem in stems], root=path
        )
    return splits


def _by_stem(path: Path, suffixes: tuple[str, ...]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for file in _images(path):
        if file.suffix.lower() not in suffixes:
            continue
        if file.stem in found:
            raise LissomError(
                f"{path} holds {found[file.stem].name} and {file.name}; give each image a name of its own"
            )
        found[file.stem] = file
    return found


def _few(names: tuple[str, ...] | list[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
