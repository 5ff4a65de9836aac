"""Augmentation of a batch of images: random crop and horizontal flip, drawn from a given generator."""

from __future__ import annotations

import torch
from torch.nn import functional

__all__ = ["Draws", "augment_images", "draw"]

# For every image: rows and columns of shift in [0, 2 * padding], and whether it is mirrored.
Draws = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def padding_of(height: int, width: int) -> int:
    """An eighth of the shorter side: the usual 4 pixels of 32."""
    return min(height, width) // 8


def draw(count: int, height: int, width: int, flip: bool, generator: torch.Generator) -> Draws:
    """What happens to each of ``count`` images of (height, width)."""
    choices = 2 * padding_of(height, width) + 1
    down = torch.randint(choices, (count,), generator=generator)
    right = torch.randint(choices, (count,), generator=generator)
    mirrored = torch.rand(count, generator=generator) < 0.5
    return down, right, mirrored & flip


def augment_images(images: torch.Tensor, draws: Draws) -> torch.Tensor:
    """images (B, C, H, W), padded by repeating their edge, cropped back to (H, W) at the drawn place, and mirrored."""
    height, width = images.shape[-2:]
    margin = padding_of(height, width)
    down, right, mirrored = (d.to(images.device) for d in draws)
    padded = functional.pad(images, (margin,) * 4, mode="replicate")
    rows = down[:, None] + torch.arange(height, device=images.device)  # (B, H)
    columns = right[:, None] + torch.arange(width, device=images.device)  # (B, W)
    columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    which = torch.arange(len(images), device=images.device)[:, None, None]
    # Indices around a slice put the indexed axes first: (B, H, W, C).
    return padded[which, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()
