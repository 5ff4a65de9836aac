"""Several models as one, and several views of an image as one input: the ensembles of Inception-v4 (1602.07261, 4.)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional

from lissom.errors import LissomError

__all__ = ["CROPS", "Ensemble", "multi_crop"]

CROPS = (1, 10, 12, 144)
# Shorter sides of the four sizes, for crops of 224 (Szegedy et al. 2014, arXiv 1409.4842, section 7).
SIDES = (256, 288, 320, 352)


class Ensemble(nn.Module):
    """One classifier of several: (B, ...) -> (B, classes), whose softmax is the mean of the members' softmax.

    ``average`` "prob" does so; "logit" averages the logits, which weighs a sure member more. With ``views`` V the
    input is (V B, ...), V views of each of B images one after another (``multi_crop`` gives the views of one), and the
    answers to the views are averaged too. Raises LissomError for no members and an unknown ``average``.
    """

    def __init__(self, models: Sequence[nn.Module], average: str = "prob", views: int = 1) -> None:
        super().__init__()
        if not models:
            raise LissomError("an ensemble has at least one member")
        if average not in ("prob", "logit"):
            raise LissomError(f"an ensemble averages by 'prob' or 'logit', not by {average!r}")
        self.models, self.average, self.views = nn.ModuleList(models), average, views

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        answers = torch.stack([model(x) for model in self.models])  # (M, V B, classes)
        members, _, classes = answers.shape
        answers = answers.reshape(members, -1, self.views, classes)
        if self.average == "logit":
            return answers.mean((0, 2))
        shares = functional.log_softmax(answers, -1)
        count = members * self.views
        return shares.logsumexp((0, 2)) - torch.log(torch.tensor(float(count), dtype=x.dtype, device=x.device))


def multi_crop(image: torch.Tensor, size: int, count: int = 144) -> torch.Tensor:
    """Views (count, C, size, size) of an ``image`` (C, H, W), as Inception's figures were taken.

    1: the centre of the image whose shorter side is 8/7 of ``size``. 10: that and the four corners, and the mirror
    images of all. 12: the whole of its central square too. 144: four sizes (shorter side 256, 288, 320 and 352 for
    crops of 224), in each the first, central and last square along the longer side, of each square the 12 views.
    Resizing is bicubic. Raises LissomError for another count and for an image that is no (C, H, W).
    """
    if count not in CROPS:
        raise LissomError(f"there are {', '.join(map(str, CROPS))} crops, not {count}")
    if image.ndim != 3:
        raise LissomError(f"an image of shape (C, H, W) is wanted, not {tuple(image.shape)}")
    if count == 144:
        parts = [
            _views(square, size, whole=True)
            for side in SIDES
            for square in _squares(_resized(image, round(side * size / 224)))
        ]
        return torch.cat(parts)
    near = _resized(image, round(size * 8 / 7))
    if count == 1:
        return _corner(near, size, 0.5, 0.5)[None]
    views = _views(near, size, whole=False)
    if count == 10:
        return views
    whole = _fitted(_squares(near)[1], size)
    return torch.cat([views, whole[None], whole.flip(-1)[None]])


def _resized(image: torch.Tensor, side: int) -> torch.Tensor:
    """The image with its shorter side at ``side``."""
    height, width = image.shape[1:]
    scale = side / min(height, width)
    return _interpolated(image, max(side, round(height * scale)), max(side, round(width * scale)))


def _fitted(image: torch.Tensor, side: int) -> torch.Tensor:
    return _interpolated(image, side, side)


def _interpolated(image: torch.Tensor, height: int, width: int) -> torch.Tensor:
    resized = functional.interpolate(image[None], (height, width), mode="bicubic", antialias=True, align_corners=False)
    return resized[0]


def _squares(image: torch.Tensor) -> list[torch.Tensor]:
    """The first, the central and the last square along the longer side."""
    side = min(image.shape[1:])
    return [_corner(image, side, place, place) for place in (0.0, 0.5, 1.0)]


def _corner(image: torch.Tensor, side: int, down: float, right: float) -> torch.Tensor:
    """A square whose place is 0 at the top or left and 1 at the bottom or right."""
    top, left = (round((length - side) * at) for length, at in zip(image.shape[1:], (down, right), strict=True))
    return image[:, top : top + side, left : left + side]


def _views(image: torch.Tensor, size: int, whole: bool) -> torch.Tensor:
    """Centre, four corners and, where asked, the whole at ``size``; then the mirror images of all."""
    places = [(0.5, 0.5), (0.0, 0.0), (0.0, 1.0), (1.0, 0.0), (1.0, 1.0)]
    views = [_corner(image, size, down, right) for down, right in places]
    if whole:
        views.append(_fitted(image, size))
    stack = torch.stack(views)
    return torch.cat([stack, stack.flip(-1)])
