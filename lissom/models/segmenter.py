"""Segmenter: semantic segmentation by a plain vision transformer (arXiv 2105.05633).

Strudel et al., ICCV 2021. The image's patches pass through a ViT (timm's); a decoder gives every patch token one logit
a class, and these maps of the patches' resolution are enlarged bilinearly to the image. ``vit_segmenter`` has the
paper's linear decoder, a point-wise linear layer; ``vit_segmenter_mask`` its mask transformer (section 3.2): K class
embeddings c join the N patch tokens z through M more layers, and the logit of patch n for class k is the scalar product
z_n . c_k of the projected and L2-normalised embeddings, put on a scale for the softmax by a LayerNorm over the classes.

Both are small, for 96 x 128 images: patches of 8 x 8, 192 wide, 6 blocks. As in ``lissom.models.vit``, the position
embeddings start as sines and cosines of row and column.

Through ``model.blocks`` tokens are (B, N, D), in the order of the grid's rows; there is no class token by default. The
decoder, ``model.head``, maps (B, n, D) to (B, n, classes) for any n: a technique may shorten the tokens between two
blocks and restore them after the last block, or the logits after ``model.head``.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import Block, VisionTransformer, checkpoint_filter_fn
from torch import nn
from torch.nn import functional

from lissom.models.vit import waves

__all__ = ["MaskTransformer", "Segmenter", "checkpoint_filter_fn", "vit_segmenter", "vit_segmenter_mask"]


class MaskTransformer(nn.Module):
    """Tokens (B, n, dim) -> logits (B, n, num_classes): the mask transformer of arXiv 2105.05633, section 3.2.

    ``layers`` (M, 2 in the paper) transformer blocks over the tokens and ``num_classes`` learnt class embeddings.
    """

    def __init__(self, dim: int, num_classes: int, layers: int = 2, num_heads: int = 3, mlp_ratio: float = 4.0) -> None:
        super().__init__()
        self.classes = nn.Embedding(num_classes, dim)
        self.blocks = nn.Sequential(*[Block(dim, num_heads, mlp_ratio, qkv_bias=True) for _ in range(layers)])
        self.norm = nn.LayerNorm(dim)
        self.patch_proj = nn.Linear(dim, dim, bias=False)
        self.class_proj = nn.Linear(dim, dim, bias=False)
        self.scale = nn.LayerNorm(num_classes)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.trunc_normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for projection in (self.patch_proj, self.class_proj):
            nn.init.normal_(projection.weight, std=dim**-0.5)  # keeps lengths: the norm alone decides the scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        count = x.shape[1]
        classes = self.classes.weight.expand(x.shape[0], -1, -1)  # (B, K, dim)
        z = self.norm(self.blocks(torch.cat([x, classes], 1)))
        patches = functional.normalize(self.patch_proj(z[:, :count]), dim=-1)
        classes = functional.normalize(self.class_proj(z[:, count:]), dim=-1)
        return self.scale(patches @ classes.transpose(1, 2))  # (B, n, K)


class Segmenter(VisionTransformer):
    """timm's ViT of a fixed ``img_size`` that answers with logits (B, num_classes, H, W).

    ``decoder`` is ``linear`` or ``mask`` (with ``decoder_layers`` layers); other arguments are timm's. The features
    (``forward_features``, ``forward_head`` with ``pre_logits``, ``num_classes=0``) are the tokens.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        num_classes: int = 1000,
        decoder: str = "linear",
        decoder_layers: int = 2,
        num_heads: int = 12,
        global_pool: str = "",
        **kwargs: Any,
    ) -> None:
        if decoder not in ("linear", "mask"):
            raise ValueError(f"the decoder {decoder!r} is none of linear, mask")
        if global_pool:
            raise ValueError(f"tokens are decoded one by one: global_pool is '', not {global_pool!r}")
        if kwargs.get("dynamic_img_size") or kwargs.get("dynamic_img_pad") or kwargs.get("patch_drop_rate"):
            raise ValueError("a segmenter has a fixed input size and keeps all its patches; give it an img_size")
        super().__init__(img_size=img_size, num_classes=num_classes, num_heads=num_heads, global_pool="", **kwargs)
        sides = tuple(zip(self.patch_embed.img_size, self.patch_embed.patch_size, strict=True))
        if any(size % patch for size, patch in sides):
            raise ValueError(
                f"the patches of {sides[0][1]} x {sides[1][1]} do not divide {sides[0][0]} x {sides[1][0]}"
            )
        self.decoder = decoder
        self.decoder_layers = decoder_layers
        self.num_heads = num_heads
        self.reset_classifier(num_classes)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new decoder for ``num_classes`` classes; 0: none."""
        if global_pool:
            raise ValueError(f"tokens are decoded one by one: global_pool is '', not {global_pool!r}")
        self.num_classes = num_classes
        head: nn.Module = nn.Identity()
        if num_classes and self.decoder == "mask":
            head = MaskTransformer(self.embed_dim, num_classes, self.decoder_layers, self.num_heads)
        elif num_classes:
            head = nn.Linear(self.embed_dim, num_classes)
            nn.init.trunc_normal_(head.weight, std=0.02)
            nn.init.zeros_(head.bias)
        self.head = head.to(self.patch_embed.proj.weight).train(self.training)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Tokens (B, prefix + N, D) -> logits (B, num_classes, H, W); with ``pre_logits`` the patches (B, N, D)."""
        x = self.head_drop(self.fc_norm(x[:, self.num_prefix_tokens :]))
        return x if pre_logits or not self.num_classes else self.to_image(self.head(x))

    def to_image(self, x: torch.Tensor) -> torch.Tensor:
        """Logits of the patches (B, N, num_classes), enlarged bilinearly: (B, num_classes, H, W)."""
        maps = x.transpose(1, 2).unflatten(2, self.patch_embed.grid_size)
        return functional.interpolate(maps, size=self.patch_embed.img_size, mode="bilinear", align_corners=False)


def _cfg(classifier: str) -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": 11,
        "input_size": (3, 96, 128),
        "pool_size": None,
        "crop_pct": 1.0,
        "crop_mode": "squash",
        "interpolation": "bicubic",
        "fixed_input_size": True,
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": "patch_embed.proj",
        "classifier": classifier,
        "license": "apache-2.0",
    }


default_cfgs = generate_default_cfgs({"vit_segmenter": _cfg("head"), "vit_segmenter_mask": _cfg("head.classes")})


@register_model
def vit_segmenter(pretrained: bool = False, **kwargs: Any) -> Segmenter:
    """Six blocks of three heads, 192 wide, and the linear decoder. Input (B, 3, 96, 128), output (B, 11, 96, 128)."""
    return _built("vit_segmenter", pretrained, {"decoder": "linear", **kwargs})


@register_model
def vit_segmenter_mask(pretrained: bool = False, **kwargs: Any) -> Segmenter:
    """The same with the mask transformer of two layers as its decoder."""
    return _built("vit_segmenter_mask", pretrained, {"decoder": "mask", **kwargs})


def _built(name: str, pretrained: bool, kwargs: dict[str, Any]) -> Segmenter:
    """The network, its position embeddings as waves where its weights are not loaded."""
    arguments = {
        "img_size": (96, 128),
        "patch_size": 8,
        "embed_dim": 192,
        "depth": 6,
        "num_heads": 3,
        "class_token": False,
        "num_classes": 11,
        **kwargs,
    }
    model = build_model_with_cfg(
        Segmenter,
        name,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": arguments.pop("out_indices", 3), "feature_cls": "getter"},
        **arguments,
    )
    if not pretrained and getattr(model, "pos_embed", None) is not None:
        rows, columns = model.patch_embed.grid_size
        with torch.no_grad():
            # A class token, where there is one, stands before the patches.
            model.pos_embed[:, -rows * columns :].copy_(0.7 * waves(rows, columns, model.embed_dim))
    return model
