"""For tools/check_parity.py: networks whose published figures need more than ``lissom.from_published(name, state)``.

``BUILD["<system>/<variant>"]`` is a function (state dict in the publisher's names) -> model, ``OUTPUTS`` one
(model, *inputs) -> tensors in the fixture's order, for answers that are not ``model(*inputs)``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from lissom.models.factory import _load, _translated, create_model, from_published

State = Mapping[str, torch.Tensor]
BUILD: dict[str, Callable[[State], nn.Module]] = {}
OUTPUTS: dict[str, Callable[..., Any]] = {}


def published(name: str, **sizes: Any) -> Callable[[State], nn.Module]:
    """The network ``name``, of other ``sizes`` than its own where they are given; loaded as strictly either way."""

    def build(state: State) -> nn.Module:
        if not sizes:
            return from_published(name, state)
        model = create_model(name, **sizes)
        _load(model, _translated(model, state, name), name)
        return model

    return build


BUILD |= {
    "lgvit/vit_base_cifar100": published("lgvit_vit_base"),
    "lgvit/deit_base_cifar100": published("lgvit_deit_base"),
    "lgvit/deit_small_10cls": published("lgvit_deit_small"),
    "lgvit/swin_base_cifar100": published("lgvit_swin_base"),
    "lgvit/swin_e64_10cls": published("lgvit_swin_base", embed_dim=64, num_heads=(2, 4, 8, 16), num_classes=10),
    "lgvit/vit_tiny_4exits": published(
        "lgvit_vit_base", embed_dim=192, num_heads=3, num_classes=37, exits=(4, 6, 9, 11)
    ),
}

# The checkpoint's own keys say which layers are two thin ones, and of which rank.
BUILD |= {
    "pela/deit_tiny_r2.0": published("deit_tiny_patch16_224"),
    "pela/deit_small_r1.5": published("deit_small_patch16_224"),
}

# SAM's encoder at a small size, as Expedit's figures were read from it.
SMALL_SAM = {"img_size": 256, "embed_dim": 96, "depth": 6, "num_heads": 4, "neck_chans": 32, "window_size": 7,
             "global_attn_indexes": (2, 5)}  # fmt: skip
BUILD |= {
    "expedit/sam_plain_small": published("sam_encoder_b", **SMALL_SAM),
    "expedit/sam_hourglass_small": published(
        "sam_encoder_b", **SMALL_SAM, hourglass_location=3, hourglass_clusters=25
    ),
    "expedit/sam_hourglass_small_b": published(
        "sam_encoder_b", **SMALL_SAM, hourglass_location=2, hourglass_clusters=16, hourglass_temperature=0.02,
        hourglass_window=3, hourglass_k=9,
    ),
}  # fmt: skip
