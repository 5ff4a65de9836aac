"""For tools/check_parity.py: networks whose published figures need more than ``lissom.from_published(name, state)``.

``BUILD["<system>/<variant>"]`` is a function (state dict in the publisher's names) -> model, ``OUTPUTS`` one
(model, *inputs) -> tensors in the fixture's order, for answers that are not ``model(*inputs)``.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from timm.utils.model import reparameterize_model
from torch import nn

from lissom.models.convfirst import BlockStack
from lissom.models.factory import _load, _translated, create_model, from_published
from lissom.registry import parts

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

BUILD |= {
    "shvit/shvit_s3": published("shvit_s3_distilled"),
    "cvt/cvt_13_avg": published("cvt_13_224", method="avg"),
}

# The merged forms by their own names; and a trained one that is merged before it answers (the fixture with a ``call``).
BUILD |= {f"unireplknet/unireplknet_{size}_deploy": published(f"unireplknet_{size}", deploy=True) for size in "an"}
OUTPUTS["unireplknet"] = lambda model, x: reparameterize_model(model)(x)

BUILD |= {
    "metamixer/ffnetsr_x2_small": published(
        "ffnetsr_light_x2", scale=2, dim=12, depth=2, expansion_ratio=3, norm="BN"
    ),
    "metamixer/ffnetsr_x4_small": published(
        "ffnetsr_light_x2", scale=4, dim=16, depth=3, expansion_ratio=2, norm="LN"
    ),
}  # fmt: skip


def stack_convfirst(state: State) -> nn.Module:
    """The published stage of blocks, which is no registered network: its answer is a map of one pixel."""
    stack = BlockStack(64, group_width=8, expansion=4, depth=4, extra=2)
    stack.load_state_dict(dict(state))
    return stack


BUILD |= {
    "fit/fit_encoder_24241": published("fit_encoder"),
    "fit/fit_encoder_causal": lambda state: published(
        "fit_encoder", layers="(1)2(1)2", groups=5, group_size=9, latents=3, dim=24, latent_dim=32, heads=3,
        latent_heads=4, mlp_ratio=2, position="sin_cos", mask="causal", in_dim=len(state["stem.kernel"]),
    )(state),
    "fit/fit_ar_unshared": published(
        "fit_ar", vocabulary=33, layers="(1)2(1)2(1)", groups=5, group_size=8, latents=2, dim=16, latent_dim=24,
        heads=2, latent_heads=4, mlp_ratio=2, shared=False, bias=False,
    ),
}  # fmt: skip
OUTPUTS["fit/fit_denoiser"] = lambda model, x, previous, time, condition: model(x, time, condition, previous)

BUILD["convfirst/stack_convfirst"] = stack_convfirst

# In eval mode a Dyn-Perceiver answers with its merged logits alone; the figures are of all four exits.
OUTPUTS |= {
    f"dyn_perceiver/{part.name}": lambda model, x: tuple(model.answers(x))
    for part in parts("network")
    if part.module == "lissom.models.dyn_perceiver"
}


def active_of(variant: str) -> Any:
    """The sub-network that figures of DepS were read from: their own ``active``, beside the module that fills weights
    or in LISSOM_PARITY; the whole network where there is none."""
    folders = [Path(os.environ[name]) for name in ("LISSOM_PARITY",) if name in os.environ]
    filler = getattr(sys.modules.get("parity"), "__file__", None)
    folders += [Path(filler).parent] if filler else []
    for folder in folders:
        path = folder / "deps" / f"{variant}.json"
        if path.is_file():
            return json.loads(path.read_text())["active"]
    return "max"


def once_for_all(name: str, variant: str) -> Callable[[State], nn.Module]:
    """The super-network ``name`` with the published sub-network active."""

    def build(state: State) -> nn.Module:
        network, active = from_published(name, state), active_of(variant)
        if active != "max":
            words = {"ks": "kernel", "e": "expand", "d": "depth", "w": "width"}
            network.set_active(network.setting(**{words[key]: value for key, value in active.items()}))
        return network

    return build


BUILD |= {
    f"deps/{variant}": once_for_all(name, variant)
    for variant, name in (
        ("ofa_mbv3_w1.0_max", "ofa_mobilenetv3_100"), ("ofa_mbv3_w1.0_min", "ofa_mobilenetv3_100"),
        ("ofa_mbv3_w1.2_mixed", "ofa_mobilenetv3_120"), ("ofa_resnet50_mid", "ofa_resnet50"),
        ("ofa_resnet50_mixed", "ofa_resnet50"),
    )
}  # fmt: skip
