"""ConViT: vision transformers whose first blocks begin as convolutions (arXiv 2103.10697), added to what timm has.

timm holds the networks ``convit_tiny``, ``convit_small`` and ``convit_base`` (its class ``ConVit``), in the publisher's
own names of parameters, so that published checkpoints load as they are. Here stand the published form without local
blocks (``convit_tiny_local0``) and what tells how far a network has left its convolutions. The operator alone, on grids
of any shape, is ``lissom.ops.gpsa.GPSA``.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models import convit as timms
from torch import nn

from lissom.ops.gpsa import GPSA

__all__ = ["convit_tiny_local0", "gates", "gpsa_from_attention"]


def gates(model: nn.Module) -> dict[str, torch.Tensor]:
    """The share of positions in each head of each gated layer, (heads,) from 0 to 1, by the layer's path.

    It starts at 0.73; what training brings near 0 has become ordinary attention. Of timm's layers and our own.
    """
    return {
        path: module.gating_param.detach().sigmoid()
        for path, module in model.named_modules()
        if isinstance(module, GPSA | timms.GPSA)
    }


@torch.no_grad()
def gpsa_from_attention(attention: nn.Module, grid: tuple[int, int] | None = None, gate: float = -8.0) -> GPSA:
    """A gated layer that answers as ``attention``, a trained one of timm's vision transformers, nearly does.

    ``attention`` has ``qkv``, ``proj`` and ``num_heads``; its weights are copied, the positional maps start local, and
    the gates at ``gate``: sigmoid(-8) = 0.0003 of them is felt. ``grid`` (H, W) as in ``GPSA``; the layer takes no
    class token. Raises ValueError for a layer of another kind, or one that normalises queries and keys.
    """
    if not (hasattr(attention, "qkv") and hasattr(attention, "proj") and hasattr(attention, "num_heads")):
        raise ValueError(f"{type(attention).__name__} has no qkv, proj and num_heads, which timm's attention has")
    if any(
        not isinstance(getattr(attention, name, nn.Identity()), nn.Identity) for name in ("q_norm", "k_norm", "norm")
    ):
        raise ValueError(f"{type(attention).__name__} normalises inside, which a gated layer does not")
    width = attention.qkv.in_features
    biased = attention.qkv.bias is not None
    gated = GPSA(width, attention.num_heads, grid=grid, qkv_bias=biased).to(attention.qkv.weight)
    for name in ("weight", "bias") if biased else ("weight",):
        whole = getattr(attention.qkv, name)
        getattr(gated.qk, name).copy_(whole[: 2 * width])
        getattr(gated.v, name).copy_(whole[2 * width :])
    gated.proj.load_state_dict(attention.proj.state_dict())
    nn.init.constant_(gated.gating_param, gate)
    return gated.train(attention.training)


default_cfgs = generate_default_cfgs(
    {
        "convit_tiny_local0": {
            "url": "",
            "num_classes": 1000,
            "input_size": (3, 224, 224),
            "pool_size": None,
            "crop_pct": 0.875,
            "interpolation": "bicubic",
            "fixed_input_size": True,
            "mean": (0.485, 0.456, 0.406),
            "std": (0.229, 0.224, 0.225),
            "first_conv": "patch_embed.proj",
            "classifier": "head",
            "license": "apache-2.0",
        }
    }
)


@register_model
def convit_tiny_local0(pretrained: bool = False, **kwargs: Any) -> timms.ConVit:
    """``convit_tiny`` without local blocks: the class token joins before the first. Input (B, 3, 224, 224)."""
    arguments = {"local_up_to_layer": 0, "locality_strength": 1.0, "embed_dim": 48, "num_heads": 4, **kwargs}
    return build_model_with_cfg(
        timms.ConVit,
        "convit_tiny_local0",
        pretrained,
        feature_cfg={"out_indices": arguments.pop("out_indices", 3), "feature_cls": "getter"},
        **arguments,
    )
