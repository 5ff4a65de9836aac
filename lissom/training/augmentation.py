"""Augmentation of a batch of images, and of their masks: random crop and horizontal flip, drawn from a generator."""

from __future__ import annotations

import torch

__all__ = ["Draws", "augment_images", "augment_masks", "draw"]

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
    which, rows, columns = _places(images, draws)
    # Indices around a slice put the indexed axes first: (B, H, W, C). Of grey images contiguous() would be this tensor
    # with strides that torch takes for channels that come last, and a network that reads maps by view() would fail.
    return images[which, :, rows, columns].permute(0, 3, 1, 2).clone(memory_format=torch.contiguous_format)


def augment_masks(masks: torch.Tensor, draws: Draws) -> torch.Tensor:
    """masks (B, H, W), moved exactly as ``augment_images`` moves images of the same draws."""
    return masks[_places(masks, draws)]


def _places(maps: torch.Tensor, draws: Draws) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Where each pixel of the result comes from: image (B, 1, 1), row (B, H, 1) and column (B, 1, W)."""
    height, width = maps.shape[-2:]
    margin = padding_of(height, width)
    down, right, mirrored = (d.to(maps.device) for d in draws)
    # Beyond the edge stands the edge itself.
    rows = (down[:, None] + torch.arange(height, device=maps.device) - margin).clamp(0, height - 1)
    columns = (right[:, None] + torch.arange(width, device=maps.device) - margin).clamp(0, width - 1)
    columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    which = torch.arange(len(maps), device=maps.device)
    return which[:, None, None], rows[:, :, None], columns[:, None, :]
