"""Augmentation: the draws say exactly what happens to each image."""

from __future__ import annotations

import torch

from lissom.training.augmentation import augment_images, augment_masks, draw


def test_each_image_is_shifted_and_mirrored_as_drawn():
    images = torch.arange(2 * 3 * 16 * 24, dtype=torch.float32).reshape(2, 3, 16, 24)
    margin = 2  # an eighth of 16
    still = torch.tensor([margin, margin])
    no, yes = torch.tensor([False, False]), torch.tensor([False, True])
    assert torch.equal(augment_images(images, (still, still, no)), images)
    mirrored = augment_images(images, (still, still, yes))
    assert torch.equal(mirrored[0], images[0])
    assert torch.equal(mirrored[1], images[1].flip(-1))
    moved = augment_images(images, (torch.tensor([margin + 2, margin]), torch.tensor([margin, margin - 1]), no))
    assert torch.equal(moved[0, :, :-2], images[0, :, 2:])
    assert torch.equal(moved[0, :, -1], images[0, :, -1])  # the edge is repeated
    assert torch.equal(moved[1, :, :, 1:], images[1, :, :, :-1])


def test_draws_cover_their_range_and_depend_on_the_generator_alone():
    def generator(seed: int) -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    down, right, mirrored = draw(2000, 32, 32, True, generator(1))
    assert set(down.tolist()) == set(right.tolist()) == set(range(9))
    assert 0.4 < mirrored.double().mean() < 0.6
    torch.manual_seed(123)
    again = draw(2000, 32, 32, False, generator(1))
    assert torch.equal(again[0], down)
    assert torch.equal(again[1], right)
    assert not again[2].any()


def test_small_images_pass():
    images = torch.rand(3, 1, 4, 4)
    assert torch.equal(augment_images(images, draw(3, 4, 4, False, torch.Generator())), images)


def test_masks_move_with_their_images():
    generator = torch.Generator().manual_seed(0)
    masks = torch.randint(0, 12, (20, 16, 24), dtype=torch.uint8, generator=generator)
    draws = draw(20, 16, 24, True, generator)
    moved = augment_masks(masks, draws)
    assert moved.dtype == torch.uint8
    assert torch.equal(moved, augment_images(masks[:, None].float(), draws)[:, 0].to(torch.uint8))
    assert not torch.equal(moved, masks)


def test_beyond_the_edge_stands_the_edge():
    """The same as padding by repeating the edge, and cropping."""
    images = torch.rand(6, 3, 16, 24)
    down, right, mirrored = draw(6, 16, 24, True, torch.Generator().manual_seed(1))
    padded = torch.nn.functional.pad(images, (2,) * 4, mode="replicate")
    for i, moved in enumerate(augment_images(images, (down, right, mirrored))):
        expected = padded[i, :, down[i] : down[i] + 16, right[i] : right[i] + 24]
        assert torch.equal(moved, expected.flip(-1) if mirrored[i] else expected)


def test_grey_images_come_laid_out_as_torch_lays_them_out():
    """Strides of a map with one channel are ambiguous, and a convolution goes by them."""
    images = torch.rand(3, 1, 8, 8)
    assert augment_images(images, draw(3, 8, 8, True, torch.Generator())).stride() == images.stride()
