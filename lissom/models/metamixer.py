"""FFNet: convolutional networks whose token mixer is attention's frame with learned keys and values (arXiv 2406.02021).

A block is FFNified attention (``lissom.layers.ffnified_attention``) and a channel mixer of a depthwise convolution and
a feed-forward layer; convolutions, BatchNorm and GELU only, so that timm's ``reparameterize_model`` leaves nothing but
convolutions before the last norm. ``ffnet_1`` to ``ffnet_4`` classify, ``ffnetsr_*`` enlarge images. Parameters bear
the published names, in the trained and in the fused form.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.layers import DropPath, LayerNorm2d, SqueezeExcite, calculate_drop_path_rates, trunc_normal_
from timm.models import (
    build_model_with_cfg,
    checkpoint_seq,
    generate_default_cfgs,
    register_model,
)
from timm.models._features import feature_take_indices
from timm.utils.model import reparameterize_model
from torch import nn

from lissom.layers.conv_norm import ConvNorm, _affine
from lissom.layers.ffnified_attention import FFNifiedAttention, RepDepthwise
from lissom.models.weights import inner_state

__all__ = ["ChannelMixer", "FFNet", "FFNetSR", "PatchMerging", "checkpoint_filter_fn"]


class ChannelMixer(nn.Module):
    """A depthwise convolution, then a feed-forward layer of 1 x 1 convolutions: (B, dim, H, W) to the same shape.

    Kernels above 5 are ``RepDepthwise``, others a convolution and its BatchNorm.
    """

    def __init__(self, dim: int, kernel_size: int = 7, ratio: float = 3.0) -> None:
        super().__init__()
        hidden = int(dim * ratio)
        self.conv: nn.Module = (
            RepDepthwise(dim, dim, kernel_size) if kernel_size > 5 else ConvNorm(dim, dim, kernel_size, groups=dim)
        )
        self.fc1 = nn.Conv2d(dim, hidden, 1)
        self.act = nn.GELU()
        self.fc2 = nn.Conv2d(hidden, dim, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.act(self.fc1(self.conv(x))))


class _Residual(nn.Module):
    """x + drop_path(layer_scale main(x))."""

    def __init__(self, main: nn.Module, dim: int, drop_path: float, ls_init_value: float | None) -> None:
        super().__init__()
        self.main = main
        scale = None if ls_init_value is None else nn.Parameter(ls_init_value * torch.ones(dim, 1, 1))
        self.register_parameter("layer_scale", scale)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.main(x)
        return x + self.drop_path(y if self.layer_scale is None else y * self.layer_scale)


class _Block(nn.Module):
    def __init__(
        self, dim: int, mixer_kernel: int, kernel_size: int, ratio: float, drop_path: float,
        ls_init_value: float | None, squeeze: bool,
    ) -> None:  # fmt: skip
        super().__init__()
        mixer = FFNifiedAttention(dim, mixer_kernel, mixer_kernel)
        self.token_mixer = nn.Sequential(
            _Residual(mixer, dim, drop_path, ls_init_value), SqueezeExcite(dim, 0.25) if squeeze else nn.Identity()
        )
        self.channel_mixer = _Residual(ChannelMixer(dim, kernel_size, ratio), dim, drop_path, ls_init_value)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.channel_mixer(self.token_mixer(x))


class _NormConv(nn.Sequential):
    """A BatchNorm, and a 1 x 1 convolution without bias behind it."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.add_module("bn", nn.BatchNorm2d(dim))
        self.add_module("c", nn.Conv2d(dim, dim, 1, bias=False))


class _Skip(nn.Module):
    """x + W BN(x): one 1 x 1 convolution for inference, the identity added to its matrix."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = _NormConv(dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv(x)

    @torch.no_grad()
    def fuse(self) -> nn.Conv2d:
        norm, conv = self.conv
        assert isinstance(norm, nn.BatchNorm2d)
        assert isinstance(conv, nn.Conv2d)
        scale, shift = _affine(norm)
        matrix = conv.weight.double().flatten(1)
        fused = nn.Conv2d(conv.in_channels, conv.out_channels, 1).to(conv.weight)
        whole = matrix * scale + torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
        fused.weight.copy_(whole[:, :, None, None])
        assert fused.bias is not None
        fused.bias.copy_(matrix @ shift)
        return fused.train(self.training)


class PatchMerging(nn.Module):
    """A map of half the sides, rounded up, and ``out_dim`` channels, a multiple of ``dim``:
    (B, dim, H, W) -> (B, out_dim, ceil(H / 2), ceil(W / 2)). Each channel makes out_dim / dim of its own, which a
    residual 1 x 1 convolution mixes."""

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(RepDepthwise(dim, out_dim, 7, stride=2), _Skip(out_dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x)


class FFNet(nn.Module):
    """Images (B, in_chans, H, W) to logits (B, num_classes); maps of strides 4, 8, 16 and 32, sides rounded up.

    - ``mixer_kernels``: of the two convolutions of FFNified attention, one size a stage;
    - ``kernel_size``: of the channel mixer's depthwise convolution, ``ratio`` the width of its feed-forward layer;
    - ``ls_init_value``: what the layer scales start at; None: there are none;
    - ``squeeze_excite``: one flag a stage: squeeze-and-excitation behind the token mixer of every other block, from
      the first (off in all published networks);
    - ``layer_norm_last``: a layer norm over the channels in place of the last BatchNorm;
    - ``global_pool``: ``"avg"``, or ``""`` for maps as the answer (of ``num_classes=0`` only).

    Raises ValueError where the stages' settings do not fit together.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        depths: Sequence[int] = (2, 2, 8, 2),
        dims: Sequence[int] = (80, 160, 320, 640),
        stem_dim: int = 64,
        mixer_kernels: Sequence[int] = (3, 3, 7, 7),
        kernel_size: int = 7,
        ratio: float = 3.0,
        ls_init_value: float | None = None,
        squeeze_excite: Sequence[bool] = (False, False, False, False),
        layer_norm_last: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if not len(depths) == len(dims) == len(mixer_kernels) == len(squeeze_excite) or not depths:
            raise ValueError(
                f"{len(depths)} depths, {len(dims)} dims, {len(mixer_kernels)} kernels and {len(squeeze_excite)} flags "
                "of squeeze-and-excitation differ"
            )
        self.num_classes, self.in_chans, self.drop_rate = num_classes, in_chans, drop_rate
        self.grad_checkpointing = False
        self.patch_embed = nn.Sequential(
            ConvNorm(in_chans, stem_dim, 3, 2), nn.GELU(), ConvNorm(stem_dim, dims[0], 3, 2)
        )
        self.stages = nn.ModuleList()
        self.feature_info: list[dict[str, Any]] = []
        rates = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        for i, (depth, dim) in enumerate(zip(depths, dims, strict=True)):
            layers: list[nn.Module] = [PatchMerging(dims[i - 1], dim)] if i else []
            layers += [
                _Block(
                    dim, mixer_kernels[i], kernel_size, ratio, rates[i][j], ls_init_value,
                    squeeze_excite[i] and j % 2 == 0,
                )
                for j in range(depth)
            ]  # fmt: skip
            self.stages.append(nn.Sequential(*layers))
            self.feature_info.append({"num_chs": dim, "reduction": 4 * 2**i, "module": f"stages.{i}"})
        self.num_features = self.head_hidden_size = dims[-1]
        self.norm: nn.Module = (LayerNorm2d if layer_norm_last else nn.BatchNorm2d)(self.num_features)
        self.head: nn.Module = nn.Identity()
        self.reset_classifier(num_classes, global_pool)
        self.apply(_init)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Names of the parameters by depth, as timm asks for them."""
        return {
            "stem": r"^patch_embed",
            "blocks": r"^stages\.(\d+)" if coarse else [(r"^stages\.(\d+)\.(\d+)", None), (r"^norm\.", (99999,))],
        }

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute blocks anew in the backward pass instead of keeping their intermediate maps."""
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """The last linear layer."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new last layer of ``num_classes`` outputs; 0: none. ``global_pool`` None keeps the pooling."""
        pool = getattr(self, "global_pool", "avg") if global_pool is None else global_pool
        if pool not in ("avg", "") or (num_classes and not pool):
            raise ValueError(f"the pooling {pool!r} is not 'avg', nor '' without classes")
        self.num_classes, self.global_pool = num_classes, pool
        self.head = nn.Identity()
        if num_classes:
            self.head = nn.Linear(self.num_features, num_classes).to(next(self.parameters()))
            _init(self.head)

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[torch.Tensor] | tuple[torch.Tensor, list[torch.Tensor]]:
        """The answer of ``forward_features``, and the maps (B, C, H', W') of the stages ``indices``, all by default.

        ``norm`` normalises the last stage's map. Raises ValueError for another ``output_fmt`` than NCHW.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"maps come as NCHW, not {output_fmt}")
        taken, last = feature_take_indices(len(self.stages), indices)
        maps = []
        x = self.patch_embed(x)
        end = len(self.stages) - 1
        for i in range(last + 1 if stop_early else end + 1):
            x = self._stage(i, x)
            if i in taken:
                maps.append(self.norm(x) if norm and i == end else x)
        if intermediates_only:
            return maps
        return (self.norm(x) if i == end else x), maps

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what the maps of the stages ``indices`` do not need; returns these indices."""
        taken, last = feature_take_indices(len(self.stages), indices)
        pruned = last < len(self.stages) - 1
        self.stages = self.stages[: last + 1]
        if pruned:
            self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
        if prune_norm or pruned:
            self.norm = nn.Identity()
        if prune_head or pruned:
            self.reset_classifier(0, "")
        return taken

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Images to the last map, normalised, (B, C, H / 32, W / 32)."""
        x = self.patch_embed(x)
        for i in range(len(self.stages)):
            x = self._stage(i, x)
        return self.norm(x)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """The last map to logits, or with ``pre_logits`` to what the last layer reads."""
        if not self.global_pool:
            return x
        x = nn.functional.dropout(x.mean((2, 3)), self.drop_rate, self.training)
        return x if pre_logits else self.head(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))

    def _stage(self, i: int, x: torch.Tensor) -> torch.Tensor:
        if self.grad_checkpointing and self.training and not torch.jit.is_scripting():
            return checkpoint_seq(self.stages[i], x)
        return self.stages[i](x)


class FFNetSR(nn.Module):
    """Images (B, 3, H, W) to larger ones (B, 3, scale H, scale W), of any size.

    Convolution to ``dim`` channels; ``depth`` blocks x + mixer(x), the token mixer 1 x 1 -> depthwise 3 x 3 -> GELU ->
    depthwise 3 x 3, the channel mixer depthwise 3 x 3 -> 1 x 1 (``expansion_ratio`` times as wide) -> GELU -> 1 x 1;
    convolution to 3 scale^2 channels, added to the input repeated; pixel shuffle. ``norm``: ``"LN"`` in front of each
    mixer, ``"BN"`` behind its first convolution, or None. Where the last convolution is zero the answer is the input
    with its pixels repeated. Raises ValueError for another norm, and for classes or channels other than 3: it
    answers with images.
    """

    def __init__(
        self,
        scale: int = 2,
        dim: int = 96,
        depth: int = 36,
        expansion_ratio: float = 2.0,
        norm: str | None = None,
        in_chans: int = 3,
        num_classes: int = 0,
    ) -> None:
        super().__init__()
        if norm not in (None, "LN", "BN"):
            raise ValueError(f"the norm {norm!r} is none of 'LN', 'BN' and None")
        if num_classes or in_chans != 3:
            raise ValueError("the answer is an image of 3 channels, as the input is; it has no classes")
        self.scale, self.num_classes, self.in_chans = scale, 0, in_chans
        self.grad_checkpointing = False
        self.proj = nn.Conv2d(3, dim, 3, 1, 1)
        self.body = nn.Sequential(*(_EnlargingBlock(dim, int(dim * expansion_ratio), norm) for _ in range(depth)))
        self.conv_bef_up = nn.Conv2d(dim, 3 * scale**2, 3, 1, 1)
        self.up = nn.PixelShuffle(scale)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute blocks anew in the backward pass instead of keeping their intermediate maps."""
        self.grad_checkpointing = enable

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.proj(x)
        y = checkpoint_seq(self.body, y) if self.grad_checkpointing and self.training else self.body(y)
        return self.up(self.conv_bef_up(y) + x.repeat_interleave(self.scale**2, dim=1))


class _EnlargingBlock(nn.Module):
    def __init__(self, dim: int, hidden: int, norm: str | None) -> None:
        super().__init__()
        self.token_mixer = _mixer(
            dim, norm, nn.Conv2d(dim, dim, 1), _depthwise(dim), nn.GELU(), _depthwise(dim)
        )  # fmt: skip
        self.channel_mixer = _mixer(
            dim, norm, _depthwise(dim), nn.Conv2d(dim, hidden, 1), nn.GELU(), nn.Conv2d(hidden, dim, 1)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.token_mixer(x)
        return x + self.channel_mixer(x)


def _mixer(dim: int, norm: str | None, first: nn.Module, *rest: nn.Module) -> nn.Sequential:
    if norm == "LN":
        return nn.Sequential(LayerNorm2d(dim, eps=1e-6), first, *rest)
    return nn.Sequential(first, *([nn.BatchNorm2d(dim)] if norm == "BN" else []), *rest)


def _depthwise(dim: int) -> nn.Conv2d:
    return nn.Conv2d(dim, dim, 3, padding=1, groups=dim)


def _init(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def checkpoint_filter_fn(state_dict: Mapping[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """A checkpoint of either form, in its own names, which are the network's.

    One of the fused form makes ``model`` take that form, in place: nothing leads back to the trained one.
    """
    state_dict = inner_state(state_dict)
    fused = "patch_embed.0.weight" in state_dict
    if fused and isinstance(model, FFNet) and isinstance(model.patch_embed[0], ConvNorm):
        reparameterize_model(model, inplace=True)
        model.pretrained_cfg = {**getattr(model, "pretrained_cfg", {}), "first_conv": "patch_embed.0"}
        model.default_cfg = model.pretrained_cfg
    return dict(state_dict)


RELEASE = "https://github.com/ysj9909/FFNet/releases/download/v1.0/"  # the publisher's


def _cfg(file: str, size: int, crop: float) -> dict[str, Any]:
    return {
        "url": f"{RELEASE}{file}.pth.tar",
        "num_classes": 1000,
        "input_size": (3, size, size),
        "pool_size": (size // 32, size // 32),
        "crop_pct": crop,
        "interpolation": "bicubic",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": "patch_embed.0.c",
        "classifier": "head",
        "license": "apache-2.0",
    }


def _enlarging_cfg(url: str = "") -> dict[str, Any]:
    """Images from 0 to 1, of any size; the size here is that of the publisher's training."""
    return {
        "url": url,
        "num_classes": 0,
        "input_size": (3, 96, 96),
        "pool_size": None,
        "mean": (0.0, 0.0, 0.0),
        "std": (1.0, 1.0, 1.0),
        "first_conv": "proj",
        "license": "apache-2.0",
    }


default_cfgs = generate_default_cfgs(
    {
        "ffnet_1.in1k": _cfg("ffnet_1", 256, 0.9),
        "ffnet_1.dist_in1k": _cfg("ffnet_1_distillation", 256, 0.9),
        "ffnet_2.in1k": _cfg("ffnet_2", 256, 0.9),
        "ffnet_2.dist_in1k": _cfg("ffnet_2_distillation", 256, 0.9),
        "ffnet_3.in1k": _cfg("ffnet_3", 256, 0.95),
        "ffnet_3.dist_in1k": _cfg("ffnet_3_distillation", 256, 0.95),
        "ffnet_3.in1k_384": _cfg("ffnet_3_384", 384, 0.95),
        "ffnet_4.in1k_384": _cfg("ffnet_4_384", 384, 0.95),
        "ffnetsr_light_x2": _enlarging_cfg(f"{RELEASE}FFNetSR_light_DIV2K_2.pth"),
        "ffnetsr_base_x2": _enlarging_cfg(),
    }
)


@register_model
def ffnet_1(pretrained: bool = False, **kwargs: Any) -> FFNet:
    """13 775 656 parameters, 13 660 152 fused. Input (B, 3, 256, 256), output (B, 1000)."""
    sizes = {"depths": (2, 2, 8, 2), "dims": (80, 160, 320, 640), "kernel_size": 3}
    return _built("ffnet_1", pretrained, {**sizes, **kwargs})


@register_model
def ffnet_2(pretrained: bool = False, **kwargs: Any) -> FFNet:
    """27 208 408 parameters, 26 908 440 fused. Input (B, 3, 256, 256), output (B, 1000)."""
    sizes = {"depths": (3, 3, 15, 3), "dims": (88, 176, 352, 704)}
    return _built("ffnet_2", pretrained, {**sizes, **kwargs})


@register_model
def ffnet_3(pretrained: bool = False, **kwargs: Any) -> FFNet:
    """48 817 896 parameters, 48 330 632 fused. Input (B, 3, 256, 256), output (B, 1000); published at 384 too."""
    sizes = {"depths": (4, 4, 22, 5), "dims": (96, 192, 384, 768), "ls_init_value": 1e-6}
    return _built("ffnet_3", pretrained, {**sizes, **kwargs})


@register_model
def ffnet_4(pretrained: bool = False, **kwargs: Any) -> FFNet:
    """79 868 968 parameters, 79 200 360 fused. Input (B, 3, 384, 384), output (B, 1000)."""
    sizes = {"depths": (4, 4, 27, 3), "dims": (128, 256, 512, 1024), "ls_init_value": 1e-6}
    return _built("ffnet_4", pretrained, {**sizes, **kwargs})


@register_model
def ffnetsr_light_x2(pretrained: bool = False, **kwargs: Any) -> FFNetSR:
    """Twice the sides, 36 blocks of 96 channels. Input (B, 3, H, W), output (B, 3, 2 H, 2 W)."""
    return _enlarging("ffnetsr_light_x2", pretrained, {"depth": 36, **kwargs})


@register_model
def ffnetsr_base_x2(pretrained: bool = False, **kwargs: Any) -> FFNetSR:
    """Twice the sides, 48 blocks of 96 channels. Input (B, 3, H, W), output (B, 3, 2 H, 2 W)."""
    return _enlarging("ffnetsr_base_x2", pretrained, {"depth": 48, **kwargs})


def _built(name: str, pretrained: bool, arguments: dict[str, Any]) -> FFNet:
    return build_model_with_cfg(
        FFNet,
        name,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": (0, 1, 2, 3), "feature_cls": "getter"},
        **arguments,
    )


def _enlarging(name: str, pretrained: bool, arguments: dict[str, Any]) -> FFNetSR:
    return build_model_with_cfg(FFNetSR, name, pretrained, pretrained_filter_fn=checkpoint_filter_fn, **arguments)
