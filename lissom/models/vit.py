"""A small vision transformer for 32 x 32 images: the embedded demonstration's network.

Vision Transformer (Dosovitskiy et al., arXiv 2010.11929) as timm keeps it, at 65 tokens' scale: 8 x 8 patches of 4 x 4
pixels, 192 wide, so that arithmetic dominates its time and not the overhead of calling operators.
"""

from __future__ import annotations

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn

__all__ = ["digits_vit"]


default_cfgs = generate_default_cfgs(
    {
        "digits_vit": {
            "url": "",
            "num_classes": 10,
            "input_size": (3, 32, 32),
            "pool_size": None,
            "crop_pct": 1.0,
            "interpolation": "bicubic",
            "fixed_input_size": True,
            "mean": (0.5, 0.5, 0.5),
            "std": (0.5, 0.5, 0.5),
            "first_conv": "patch_embed.proj",
            "classifier": "head",
            "license": "apache-2.0",
        }
    }
)


@register_model
def digits_vit(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """Four blocks of three heads; the mean of the tokens is classified. Input (B, 3, 32, 32), output (B, 10)."""
    arguments = {
        "img_size": 32,
        "patch_size": 4,
        "embed_dim": 192,
        "depth": 4,
        "num_heads": 3,
        "class_token": False,
        "global_pool": "avg",
        "num_classes": 10,
        **kwargs,
    }
    return build_model_with_cfg(
        VisionTransformer,
        "digits_vit",
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        **arguments,
    )
