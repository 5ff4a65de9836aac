"""SAM's image encoder with token clustering inside its windows (Expedit, arXiv 2210.01035; SAM, arXiv 2304.02643).

The encoder is timm's ``VisionTransformerSAM`` (windowed and global blocks, decomposed relative positions, a neck of two
convolutions). What is added is the hourglass of Expedit-SAM: before block ``hourglass_location`` the map is padded and
cut in its windows, and each window of s x s tokens is clustered to g x g; the windows of centres, side by side, are a
smaller map. Later windowed blocks attend within g x g, global blocks over the smaller map; relative positions are
resized linearly from their own tables. Before the neck every window is rebuilt to s x s and the padding removed. No
parameter is added: published weights of SAM load as they are, under SAM's names.

Shapes: maps (B, H, W, C) between blocks; the answer is (B, out_chans, H, W), H and W the image's sides over the patch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from timm.layers import resample_abs_pos_embed_nhwc
from timm.models import build_model_with_cfg, checkpoint, generate_default_cfgs, register_model
from timm.models.vision_transformer_sam import VisionTransformerSAM, window_partition, window_unpartition
from torch import nn

from lissom.layers.token_clustering import TokenClustering, TokenReconstruction

__all__ = ["Hourglass", "SamEncoder", "checkpoint_filter_fn", "sam_encoder_b", "sam_encoder_h", "sam_encoder_l"]


class Hourglass(nn.Module):
    """Clusters every window of a map, and rebuilds them: (B, H, W, C) to (B, H', W', C) and back.

    Windows of ``window`` x ``window`` tokens become ``side`` x ``side`` centres, so H' = ceil(H / window) side. The
    other arguments are those of ``TokenClustering`` and ``TokenReconstruction``, the published values by default.
    """

    def __init__(
        self,
        window: int,
        side: int,
        iterations: int = 5,
        temperature: float | str = 0.01,
        cluster_window: int = 5,
        k: int = 20,
    ) -> None:
        super().__init__()
        self.window, self.side = window, side
        self.clustering = TokenClustering((window, window), (side, side), iterations, temperature, cluster_window)
        self.reconstruction = TokenReconstruction(k, temperature)

    def cluster(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The smaller map; and what ``rebuild`` needs: tokens (B windows, window^2, C), centres (B windows, side^2, C).

        The map is padded with zeros to whole windows, and the padding clustered like the rest, as published.
        """
        windows, padded = window_partition(x, self.window)  # (B windows, window, window, C)
        tokens = windows.flatten(1, 2)
        centres = self.clustering(tokens)
        smaller = self._smaller(padded)
        return window_unpartition(centres.unflatten(1, (self.side,) * 2), self.side, smaller), tokens, centres

    def rebuild(
        self, y: torch.Tensor, tokens: torch.Tensor, centres: torch.Tensor, size: tuple[int, int]
    ) -> torch.Tensor:
        """The map (B, H, W, C) of ``size`` (H, W) from the refined smaller one."""
        refined, _ = window_partition(y, self.side)
        rebuilt = self.reconstruction(refined.flatten(1, 2), tokens, centres)
        rows, columns = (side // self.side * self.window for side in y.shape[1:3])
        return window_unpartition(rebuilt.unflatten(1, (self.window,) * 2), self.window, size, (rows, columns))

    def _smaller(self, padded: tuple[int, int]) -> tuple[int, int]:
        return padded[0] // self.window * self.side, padded[1] // self.window * self.side


class SamEncoder(VisionTransformerSAM):
    """timm's SAM encoder; ``hourglass_location`` (a block's number, from 0; None: no hourglass) clusters before it.

    ``hourglass_clusters`` are those of a window, a square number (121, 100 and 81 of a 14 x 14 window in the paper's
    release); ``hourglass_iterations``, ``hourglass_temperature``, ``hourglass_window`` and ``hourglass_k`` are its
    settings. All other arguments are timm's. Raises ValueError where they do not fit together.
    """

    def __init__(
        self,
        *args: Any,
        window_size: int = 14,
        hourglass_location: int | None = None,
        hourglass_clusters: int = 100,
        hourglass_iterations: int = 5,
        hourglass_temperature: float | str = 0.01,
        hourglass_window: int = 5,
        hourglass_k: int = 20,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, window_size=window_size, **kwargs)
        self.hourglass: Hourglass | None = None
        self.hourglass_location = hourglass_location
        if hourglass_location is None:
            return
        if not 0 <= hourglass_location < len(self.blocks):
            raise ValueError(f"there is no block {hourglass_location}; the last is {len(self.blocks) - 1}")
        side = math.isqrt(max(hourglass_clusters, 0))
        if side * side != hourglass_clusters or not 0 < side <= window_size:
            raise ValueError(
                f"{hourglass_clusters} clusters are no square number of at most {window_size}^2, a window's tokens"
            )
        if kwargs.get("use_rope"):
            raise ValueError("rotary positions belong to one grid; the hourglass needs use_rel_pos or neither")
        self.hourglass = Hourglass(
            window_size, side, hourglass_iterations, hourglass_temperature, hourglass_window, hourglass_k
        )
        # The tables of relative positions keep their size, which is that of the weights; timm resizes what it reads.
        for block in self.blocks[hourglass_location:]:
            if block.window_size:
                block.window_size = side

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Images (B, C, H, W) to the neck's maps (B, out_chans, h, w)."""
        x = self.patch_embed(x)
        size = (x.shape[1], x.shape[2])
        if self.pos_embed is not None:
            # Resized only where it must be: timm resizes in every exported graph, by an operator no runtime takes.
            fits = size == tuple(self.pos_embed.shape[1:3])
            x = x + (self.pos_embed if fits else resample_abs_pos_embed_nhwc(self.pos_embed, list(size)))
        x = self.norm_pre(self.patch_drop(self.pos_drop(x)))
        for number, block in enumerate(self.blocks):
            if self.hourglass is not None and number == self.hourglass_location:
                x, tokens, centres = self.hourglass.cluster(x)
            x = checkpoint(block, x) if self.grad_checkpointing else block(x)
        if self.hourglass is not None:
            x = self.hourglass.rebuild(x, tokens, centres, size)
        return self.neck(x.permute(0, 3, 1, 2))

    def forward_intermediates(self, *args: Any, **kwargs: Any) -> Any:
        """As timm's, where there is no hourglass; behind one the maps are smaller, and no features come out."""
        if self.hourglass is not None:
            raise ValueError("features of the single blocks come without an hourglass: hourglass_location=None")
        return super().forward_intermediates(*args, **kwargs)


def checkpoint_filter_fn(state_dict: Mapping[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """SAM's own names as timm's: a whole SAM's ``image_encoder.`` alone is kept, ``mlp.lin1`` becomes ``mlp.fc1``."""
    prefix = "image_encoder."
    whole = any(key.startswith(prefix) for key in state_dict)
    state = {
        key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix) or not whole
    }
    return {key.replace(".mlp.lin", ".mlp.fc"): value for key, value in state.items()}


def _cfg() -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": 0,
        "input_size": (3, 1024, 1024),
        "pool_size": None,
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "fixed_input_size": True,
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": "patch_embed.proj",
        "classifier": "head.fc",
        "license": "apache-2.0",
    }


default_cfgs = generate_default_cfgs({f"sam_encoder_{size}": _cfg() for size in "blh"})


@register_model
def sam_encoder_b(pretrained: bool = False, **kwargs: Any) -> SamEncoder:
    """ViT-B: 12 blocks, 768 wide. Input (B, 3, 1024, 1024), output (B, 256, 64, 64)."""
    return _built("sam_encoder_b", pretrained, 768, 12, 12, (2, 5, 8, 11), kwargs)


@register_model
def sam_encoder_l(pretrained: bool = False, **kwargs: Any) -> SamEncoder:
    """ViT-L: 24 blocks, 1,024 wide. Shapes as ``sam_encoder_b``'s."""
    return _built("sam_encoder_l", pretrained, 1024, 24, 16, (5, 11, 17, 23), kwargs)


@register_model
def sam_encoder_h(pretrained: bool = False, **kwargs: Any) -> SamEncoder:
    """ViT-H: 32 blocks, 1,280 wide. Shapes as ``sam_encoder_b``'s."""
    return _built("sam_encoder_h", pretrained, 1280, 32, 16, (7, 15, 23, 31), kwargs)


def _built(
    name: str, pretrained: bool, width: int, depth: int, heads: int, everywhere: tuple[int, ...], kwargs: dict[str, Any]
) -> SamEncoder:
    """``everywhere`` are the blocks of global attention."""
    arguments = {
        "img_size": 1024,
        "patch_size": 16,
        "embed_dim": width,
        "depth": depth,
        "num_heads": heads,
        "global_attn_indexes": everywhere,
        "window_size": 14,
        "use_rel_pos": True,
        "norm_layer": partial(nn.LayerNorm, eps=1e-6),  # SAM's; timm's own samvit_* have torch's 1e-5
        "num_classes": 0,
        "global_pool": "avg" if kwargs.get("num_classes") else "",  # without a classifier, maps
        **kwargs,
    }
    return build_model_with_cfg(
        SamEncoder,
        name,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": arguments.pop("out_indices", 3), "feature_cls": "getter"},
        **arguments,
    )
