"""ConViT: vision transformers whose first blocks begin as convolutions (arXiv 2103.10697), added to what timm has.

timm holds the networks ``convit_tiny``, ``convit_small`` and ``convit_base`` (its class ``ConVit``), in the publisher's
own names of parameters, so that published checkpoints load as they are. Here stand the published form without local
blocks (``convit_tiny_local0``), the paper's wider ``_plus`` networks, and what tells how far a network has left its
convolutions. ``ConViT`` is timm's network with lissom's layers: images need not be square, positional maps are never
made whole, blocks may be computed anew for the backward pass, and the local beginning can be left out. The operator
alone is ``lissom.ops.gpsa.GPSA``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from timm.layers import resample_abs_pos_embed
from timm.models import build_model_with_cfg, checkpoint, generate_default_cfgs, register_model
from timm.models import convit as timms
from torch import nn

from lissom.ops.gpsa import GPSA

__all__ = [
    "ConViT",
    "attention_distances",
    "checkpoint_filter_fn",
    "convit_base_plus",
    "convit_small_plus",
    "convit_tiny_local0",
    "convit_tiny_plus",
    "gates",
    "gpsa_from_attention",
]


class ConViT(timms.ConVit):
    """timm's ConViT with ``lissom.ops.gpsa.GPSA``: images (B, in_chans, H, W) of ``img_size`` to (B, num_classes).

    ``img_size`` may be (H, W). ``local_init`` False lets the gated layers begin like any others. Other arguments are
    timm's; ``embed_dim`` is the width of one head. Parameters have the same names, and the same weights give the same
    answers. Raises ValueError for dropout inside attention, which these layers do not have.
    """

    def __init__(self, *arguments: Any, local_init: bool = True, **more: Any) -> None:
        if more.get("attn_drop_rate") or more.get("proj_drop_rate"):
            raise ValueError("the gated layers have no dropout inside; drop paths (drop_path_rate) instead")
        super().__init__(*arguments, **more)
        self.grad_checkpointing = False
        for block in self.blocks:
            if block.use_gpsa:
                old = block.attn
                block.attn = GPSA(
                    old.dim, old.num_heads, old.locality_strength, local_init, self.patch_embed.grid_size,
                    old.v.bias is not None,
                ).to(old.v.weight)  # fmt: skip

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute blocks anew in the backward pass instead of keeping their intermediate tokens."""
        self.grad_checkpointing = enable

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Images to the normalised tokens (B, 1 + N, C), the class token first."""
        if not (self.grad_checkpointing and self.training):
            return super().forward_features(x)
        x = self.patch_embed(x)
        x = self.pos_drop(x + self.pos_embed if self.use_pos_embed else x)
        for number, block in enumerate(self.blocks):
            if number == self.local_up_to_layer and self.cls_token is not None:
                x = torch.cat((self.cls_token.expand(len(x), -1, -1), x), 1)
            x = checkpoint(block, x)
        return self.norm(x)


def checkpoint_filter_fn(state_dict: Mapping[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """A published checkpoint for this model: position embeddings resized to its grid, from a square one."""
    state = dict(state_dict)
    places, own = state.get("pos_embed"), getattr(model, "pos_embed", None)
    if places is not None and own is not None and places.ndim == 3 and places.shape != own.shape:
        grid = list(model.patch_embed.grid_size)  # type: ignore[union-attr,arg-type]
        state["pos_embed"] = resample_abs_pos_embed(places, grid, num_prefix_tokens=0)
    return state


def attention_distances(model: nn.Module, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """How far each head of each gated layer looks at these images, in tokens: (heads,) by the layer's path.

    Of timm's layers and our own; the model is run once, in eval mode, and left as it was.
    """
    found: dict[str, torch.Tensor] = {}

    def note(path: str, own: bool) -> Any:
        def hook(module: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            found[path] = module.attention_distance(inputs[0]) if own else module.get_attention_map(inputs[0])

        return hook

    handles = [
        module.register_forward_hook(note(path, isinstance(module, GPSA)))
        for path, module in model.named_modules()
        if isinstance(module, GPSA | timms.GPSA)
    ]
    training = model.training
    try:
        with torch.no_grad():
            model.eval()(images)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return found


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


def _cfg() -> dict[str, Any]:
    return {
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


default_cfgs = generate_default_cfgs(
    {
        "convit_tiny_local0": _cfg(),
        "convit_tiny_plus": _cfg(),
        "convit_small_plus": _cfg(),
        "convit_base_plus": _cfg(),
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


@register_model
def convit_tiny_plus(pretrained: bool = False, **kwargs: Any) -> ConViT:
    """ConViT-Ti+, four heads of 64 channels. Input (B, 3, 224, 224), output (B, 1000)."""
    return _plus("convit_tiny_plus", 4, pretrained, kwargs)


@register_model
def convit_small_plus(pretrained: bool = False, **kwargs: Any) -> ConViT:
    """ConViT-S+, nine heads of 64 channels. Input (B, 3, 224, 224), output (B, 1000)."""
    return _plus("convit_small_plus", 9, pretrained, kwargs)


@register_model
def convit_base_plus(pretrained: bool = False, **kwargs: Any) -> ConViT:
    """ConViT-B+, sixteen heads of 64 channels. Input (B, 3, 224, 224), output (B, 1000)."""
    return _plus("convit_base_plus", 16, pretrained, kwargs)


def _plus(name: str, heads: int, pretrained: bool, kwargs: dict[str, Any]) -> ConViT:
    arguments = {
        "local_up_to_layer": 10, "locality_strength": 1.0, "embed_dim": 64, "num_heads": heads, **kwargs
    }  # fmt: skip
    return build_model_with_cfg(
        ConViT,
        name,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": arguments.pop("out_indices", 3), "feature_cls": "getter"},
        **arguments,
    )
