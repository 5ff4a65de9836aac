"""digits_vit: shapes, and where its position embeddings start."""

from __future__ import annotations

import pytest
import torch

from lissom.models.factory import create_model
from lissom.models.vit import waves


def test_waves_tell_every_place_apart_and_depend_on_shifts_alone():
    table = waves(8, 6, 32)
    assert table.shape == (48, 32)
    products = table @ table.T  # sums of cosines of differences
    assert torch.allclose(products.diagonal(), torch.full((48,), 16.0), atol=1e-4)
    off = products - torch.diag(products.diagonal())
    assert off.max() < 15.95
    grid = products.reshape(8, 6, 8, 6)
    assert grid[0, 0, 2, 1] == pytest.approx(float(grid[5, 4, 7, 5]), abs=1e-4)


def test_the_first_frequency_is_one_radian_a_patch():
    table = waves(3, 4, 8).reshape(3, 4, 8)
    rows = torch.arange(3.0)
    assert torch.allclose(table[:, 2, 0], rows.sin())
    assert torch.allclose(table[:, 2, 2], rows.cos())
    columns = torch.arange(4.0)
    assert torch.allclose(table[1, :, 4], columns.sin())
    assert torch.allclose(table[1, :, 6], columns.cos())
    assert not waves(3, 4, 10)[:, 8:].any()


def test_the_network_starts_with_them():
    torch.manual_seed(0)
    model = create_model("digits_vit")
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert torch.allclose(model.pos_embed[0], 0.7 * waves(8, 8, 192))
    assert model.pos_embed.requires_grad
    with_token = create_model("digits_vit", class_token=True, global_pool="token", embed_dim=12, depth=1)
    assert torch.allclose(with_token.pos_embed[0, -64:], 0.7 * waves(8, 8, 12))
    assert create_model("digits_vit", pos_embed="none", depth=1).pos_embed is None
