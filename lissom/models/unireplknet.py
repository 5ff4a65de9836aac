"""UniRepLKNet: convolutional networks of few large kernels, which small dilated ones help to train (arXiv 2311.15599).

A block is a depthwise convolution (3 x 3, or 13 x 13 as a Dilated Reparam Block), squeeze-and-excitation, and a
feed-forward layer with global response normalisation; BatchNorm everywhere, so that the trained network merges into
one of convolutions and linear layers (``deploy=True``, timm's ``reparameterize_model``). Sizes a, f, p, n, t, s, b, l
and xl; the journal version is arXiv 2410.08049. Parameters bear the published names, in both forms.

The same networks read sound, video, series and clouds of points, made into images by ``lissom.ops.as_images`` and
``lissom.layers.point_projection``. Published for sound is s with ``in_chans=1``, for video b and for series s with
``kernel_sizes=(3, 13, (13, 3, 3), 11)``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.layers import DropPath, LayerNorm2d, calculate_drop_path_rates, trunc_normal_
from timm.models import (
    build_model_with_cfg,
    checkpoint_seq,
    generate_default_cfgs,
    register_model,
)
from timm.models._features import feature_take_indices
from timm.utils.model import reparameterize_model
from torch import nn

from lissom.layers.conv_norm import _affine
from lissom.layers.dilated_reparam import DilatedReparamBlock
from lissom.layers.grn import GRN
from lissom.models.weights import inner_state

__all__ = ["UniRepLKNet", "UniRepLKNetBlock", "checkpoint_filter_fn"]


class _SqueezeExcite(nn.Module):
    """Channels scaled by what the image's mean says of them: (B, C, H, W) to the same shape."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.down = nn.Conv2d(channels, hidden, 1)
        self.up = nn.Conv2d(hidden, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean = x.mean((2, 3), keepdim=True)
        return x * self.up(self.down(mean).relu()).sigmoid()


class _Permute(nn.Module):
    def __init__(self, *order: int) -> None:
        super().__init__()
        self.order = order

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.permute(self.order)


class UniRepLKNetBlock(nn.Module):
    """x + gamma FFN(SE(BN(dw(x)))), (B, C, H, W) to the same shape.

    ``kernel_size`` 0: no spatial convolution; 3 or 5: a plain depthwise one; from 7 on a Dilated Reparam Block. The
    feed-forward layer is ``ffn_ratio`` times as wide, runs with channels last, and ends in BatchNorm and a layer scale
    that starts at ``ls_init_value``. ``deploy`` builds the merged form, which ``reparameterize`` turns into, in place:
    no norm, no layer scale, no bias in the GRN.
    """

    dwconv: nn.Module
    norm: nn.Module
    gamma: nn.Parameter | None

    def __init__(
        self, dim: int, kernel_size: int, drop_path: float = 0.0, ls_init_value: float = 1e-6, ffn_ratio: int = 4,
        deploy: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.deploy = deploy
        hidden = ffn_ratio * dim
        if kernel_size == 0:
            self.dwconv = nn.Identity()
        elif kernel_size >= 7:
            self.dwconv = DilatedReparamBlock(dim, kernel_size, deploy=deploy)
        elif kernel_size in (3, 5):
            self.dwconv = nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim, bias=deploy)
        else:
            raise ValueError(f"a kernel size of {kernel_size} is none of 0, 3, 5 and the odd ones from 7 on")
        self.norm = nn.Identity() if deploy or kernel_size == 0 else nn.BatchNorm2d(dim)
        self.se = _SqueezeExcite(dim, dim // 4)
        self.pwconv1 = nn.Sequential(_Permute(0, 2, 3, 1), nn.Linear(dim, hidden))
        self.act = nn.Sequential(nn.GELU(), GRN(hidden, bias=not deploy))
        self.pwconv2 = nn.Sequential(nn.Linear(hidden, dim, bias=deploy), _Permute(0, 3, 1, 2))
        if not deploy:
            self.pwconv2.append(nn.BatchNorm2d(dim))
        self.register_parameter("gamma", None if deploy else nn.Parameter(ls_init_value * torch.ones(dim)))
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.se(self.norm(self.dwconv(x)))
        y = self.pwconv2(self.act(self.pwconv1(y)))
        if self.gamma is not None:
            y = y * self.gamma[:, None, None]
        return x + self.drop_path(y)

    @torch.no_grad()
    def reparameterize(self) -> None:
        """Become the merged form, in place, with the norms' running statistics; in float64 in between."""
        if self.deploy:
            return
        if isinstance(self.norm, nn.BatchNorm2d):
            scale, shift = _affine(self.norm)
            if isinstance(self.dwconv, DilatedReparamBlock):
                self.dwconv.reparameterize()
                conv = self.dwconv.lk_origin
            else:
                assert isinstance(self.dwconv, nn.Conv2d)
                conv = nn.Conv2d(
                    self.dwconv.in_channels, self.dwconv.out_channels, self.dwconv.kernel_size,
                    padding=self.dwconv.padding, groups=self.dwconv.groups,
                ).to(self.dwconv.weight)  # fmt: skip
                conv.weight.copy_(self.dwconv.weight)
                conv.bias.zero_()  # type: ignore[union-attr]
                self.dwconv = conv.train(self.training)
            assert conv.bias is not None
            conv.weight.copy_(conv.weight.double() * scale[:, None, None, None])
            conv.bias.copy_(conv.bias.double() * scale + shift)
            self.norm = nn.Identity()
        # The GRN's bias passes the second linear layer, then its norm and the layer scale.
        linear, permute, norm = self.pwconv2
        activation, grn = self.act
        assert isinstance(linear, nn.Linear)
        assert isinstance(norm, nn.BatchNorm2d)
        assert isinstance(grn, GRN)
        assert grn.beta is not None
        assert self.gamma is not None
        scale, shift = _affine(norm)
        weight, layer_scale = linear.weight.double(), self.gamma.double()
        merged = nn.Linear(linear.in_features, linear.out_features).to(linear.weight)
        merged.weight.copy_(weight * (scale * layer_scale)[:, None])
        merged.bias.copy_((weight @ grn.beta.double().flatten() * scale + shift) * layer_scale)
        plain = GRN(grn.channels, bias=False, eps=grn.eps).to(grn.gamma)
        plain.gamma.copy_(grn.gamma)
        self.pwconv2 = nn.Sequential(merged, permute).train(self.training)
        self.act = nn.Sequential(activation, plain).train(self.training)
        self.gamma = None
        self.deploy = True


class UniRepLKNet(nn.Module):
    """Images (B, in_chans, H, W) to logits (B, num_classes); maps of strides 4, 8, 16 and 32, sides rounded up.

    - ``kernel_sizes``: one entry a stage, a size or sizes that its blocks take in turn (see ``UniRepLKNetBlock``);
    - ``deploy``: the merged form, for inference;
    - ``feature_norms``: a layer norm ``norm0`` ... ``norm3`` behind each stage, applied to the maps that
      ``features_only`` and ``forward_intermediates`` give, as the published networks for dense tasks have them;
    - ``global_pool``: ``"avg"``, or ``""`` for maps as the answer (of ``num_classes=0`` only).

    Raises ValueError where the stages' settings do not fit together.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        depths: Sequence[int] = (3, 3, 27, 3),
        dims: Sequence[int] = (96, 192, 384, 768),
        kernel_sizes: Sequence[int | Sequence[int]] = (3, 13, (13, 3, 3), 13),
        ls_init_value: float = 1e-6,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        deploy: bool = False,
        feature_norms: bool = False,
    ) -> None:
        super().__init__()
        if not len(depths) == len(dims) == len(kernel_sizes) or not depths:
            raise ValueError(f"{len(depths)} depths, {len(dims)} dims and {len(kernel_sizes)} kernel sizes differ")
        self.num_classes, self.in_chans, self.drop_rate = num_classes, in_chans, drop_rate
        self.grad_checkpointing = False
        self.downsample_layers = nn.ModuleList()
        self.stages = nn.ModuleList()
        self.feature_info: list[dict[str, Any]] = []
        rates = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        before = in_chans
        for i, (depth, dim, sizes) in enumerate(zip(depths, dims, kernel_sizes, strict=True)):
            layers: list[nn.Module] = []
            if i == 0:
                layers = [nn.Conv2d(before, dim // 2, 3, 2, 1), LayerNorm2d(dim // 2, eps=1e-6), nn.GELU()]
                before = dim // 2
            layers += [nn.Conv2d(before, dim, 3, 2, 1), LayerNorm2d(dim, eps=1e-6)]
            self.downsample_layers.append(nn.Sequential(*layers))
            turns = (sizes,) if isinstance(sizes, int) else tuple(sizes)
            self.stages.append(
                nn.Sequential(
                    *(
                        UniRepLKNetBlock(dim, turns[j % len(turns)], rates[i][j], ls_init_value, deploy=deploy)
                        for j in range(depth)
                    )
                )
            )
            if feature_norms:
                self.add_module(f"norm{i}", LayerNorm2d(dim, eps=1e-6))
            self.feature_info.append({"num_chs": dim, "reduction": 4 * 2**i, "module": f"stages.{i}"})
            before = dim
        self.feature_norms = feature_norms
        self.num_features = self.head_hidden_size = dims[-1]
        self.norm: nn.Module = nn.LayerNorm(self.num_features, eps=1e-6)
        self.head: nn.Module = nn.Identity()
        self.reset_classifier(num_classes, global_pool)
        self.apply(_init)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Names of the parameters by depth, as timm asks for them."""
        return {
            "stem": r"^downsample_layers\.0",
            "blocks": r"^stages\.(\d+)|^downsample_layers\.(\d+)"
            if coarse
            else [
                (r"^downsample_layers\.(\d+)", (0,)),
                (r"^stages\.(\d+)\.(\d+)", None),
                (r"^norm\d?\.", (99999,)),
            ],
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
        reference = next(self.parameters(), torch.empty(0))
        self.head = nn.Identity()
        if num_classes:
            self.head = nn.Linear(self.num_features, num_classes).to(reference)
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

        ``norm`` asks for the stages' own norms, which are applied anyway in a network built with them
        (``feature_norms``). Raises ValueError where it has none, and for another ``output_fmt`` than NCHW.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"maps come as NCHW, not {output_fmt}")
        if norm and not self.feature_norms:
            raise ValueError("this network has no norms behind its stages; build it with feature_norms=True")
        taken, last = feature_take_indices(len(self.stages), indices)
        maps = []
        for i in range(last + 1 if stop_early else len(self.stages)):
            x = self._stage(i, x)
            if i in taken:
                maps.append(self.get_submodule(f"norm{i}")(x) if self.feature_norms else x)
        return maps if intermediates_only else (x, maps)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what the maps of the stages ``indices`` do not need; returns these indices."""
        taken, last = feature_take_indices(len(self.stages), indices)
        pruned = last < len(self.stages) - 1
        for i in range(len(self.stages)):
            if self.feature_norms and i not in taken:
                delattr(self, f"norm{i}")
        self.stages = self.stages[: last + 1]
        self.downsample_layers = self.downsample_layers[: last + 1]
        if pruned:
            self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
        if prune_norm or pruned:
            self.norm = nn.Identity()
        if prune_head or pruned:
            self.reset_classifier(0, "")
        return taken

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Images to the last map, (B, C, H / 32, W / 32)."""
        for i in range(len(self.stages)):
            x = self._stage(i, x)
        return x

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """The last map to logits, or with ``pre_logits`` to what the last layer reads."""
        if not self.global_pool:
            return x
        x = self.norm(x.mean((2, 3)))
        x = nn.functional.dropout(x, self.drop_rate, self.training)
        return x if pre_logits else self.head(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))

    def _stage(self, i: int, x: torch.Tensor) -> torch.Tensor:
        x = self.downsample_layers[i](x)
        if self.grad_checkpointing and self.training and not torch.jit.is_scripting():
            return checkpoint_seq(self.stages[i], x)
        return self.stages[i](x)


def _init(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def checkpoint_filter_fn(state_dict: Mapping[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """A checkpoint of either form, in its own names, which are the network's.

    One of the merged form makes ``model`` take that form, in place: nothing leads back to the trained one.
    """
    state_dict = inner_state(state_dict)
    merged = any(key.endswith("pwconv2.0.bias") for key in state_dict)
    if merged and any(isinstance(m, UniRepLKNetBlock) and not m.deploy for m in model.modules()):
        reparameterize_model(model, inplace=True)
    return dict(state_dict)


def _cfg(file: str, size: int = 224) -> dict[str, Any]:
    """The publisher crops 224 pixels from a shorter side of 256, and from 384 on squeezes the whole image in."""
    return {
        "hf_hub_id": "DingXiaoH/UniRepLKNet",  # the publisher's
        "hf_hub_filename": file,
        "num_classes": 1000,
        "input_size": (3, size, size),
        "pool_size": (size // 32, size // 32),
        "crop_pct": 0.875 if size < 384 else 1.0,
        "crop_mode": "center" if size < 384 else "squash",
        "interpolation": "bicubic",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": "downsample_layers.0.0",
        "classifier": "head",
        "license": "apache-2.0",
    }


# The accuracies stand in the files' names.
IN1K = {"a": "77.03", "f": "78.58", "p": "80.23", "n": "81.64", "t": "83.21", "s": "83.91"}
IN22K_TO_IN1K = {"s": "86.44", "b": "87.40", "l": "87.88", "xl": "87.96"}
default_cfgs = generate_default_cfgs(
    {
        **{
            f"unireplknet_{size}.in1k": _cfg(f"unireplknet_{size}_in1k_224_acc{accuracy}.pth")
            for size, accuracy in IN1K.items()
        },
        **{
            f"unireplknet_{size}.in22k_ft_in1k_384": _cfg(
                f"unireplknet_{size}_in22k_to_in1k_384_acc{accuracy}.pth", 384
            )
            for size, accuracy in IN22K_TO_IN1K.items()
        },
    }
)


@register_model
def unireplknet_a(pretrained: bool = False, **kwargs: Any) -> UniRepLKNet:
    """4 649 060 parameters, 4 437 300 merged. Input (B, 3, 224, 224), output (B, 1000)."""
    return _built("unireplknet_a", pretrained, 40, (2, 2, 6, 2), 13, kwargs)


@register_model
def unireplknet_f(pretrained: bool = False, **kwargs: Any) -> UniRepLKNet:
    """6 489 328 parameters, 6 235 216 merged. Input (B, 3, 224, 224), output (B, 1000)."""
    return _built("unireplknet_f", pretrained, 48, (2, 2, 6, 2), 13, kwargs)


@register_model
def unireplknet_p(pretrained: bool = False, **kwargs: Any) -> UniRepLKNet:
    """11 080 520 parameters, 10 741 704 merged. Input (B, 3, 224, 224), output (B, 1000)."""
    return _built("unireplknet_p", pretrained, 64, (2, 2, 6, 2), 13, kwargs)


@register_model
def unireplknet_n(pretrained: bool = False, **kwargs: Any) -> UniRepLKNet:
    """18 818 880 parameters, 18 318 560 merged. Input (B, 3, 224, 224), output (B, 1000)."""
    return _built("unireplknet_n", pretrained, 80, (2, 2, 8, 2), 13, kwargs)


@register_model
def unireplknet_t(pretrained: bool = False, **kwargs: Any) -> UniRepLKNet:
    """31 693 420 parameters, 31 037 980 merged. Input (B, 3, 224, 224), output (B, 1000)."""
    return _built("unireplknet_t", pretrained, 80, (3, 3, 18, 3), (13, 3), kwargs)


@register_model
def unireplknet_s(pretrained: bool = False, **kwargs: Any) -> UniRepLKNet:
    """56 456 704 parameters, 55 645 984 merged. Input (B, 3, 224, 224), output (B, 1000)."""
    return _built("unireplknet_s", pretrained, 96, (3, 3, 27, 3), (13, 3, 3), kwargs)


@register_model
def unireplknet_b(pretrained: bool = False, **kwargs: Any) -> UniRepLKNet:
    """99 089 416 parameters, 98 008 456 merged. Input (B, 3, 384, 384), output (B, 1000)."""
    return _built("unireplknet_b", pretrained, 128, (3, 3, 27, 3), (13, 3, 3), kwargs)


@register_model
def unireplknet_l(pretrained: bool = False, **kwargs: Any) -> UniRepLKNet:
    """220 076 056 parameters, 218 454 616 merged. Input (B, 3, 384, 384), output (B, 1000)."""
    return _built("unireplknet_l", pretrained, 192, (3, 3, 27, 3), (13, 3, 3), kwargs)


@register_model
def unireplknet_xl(pretrained: bool = False, **kwargs: Any) -> UniRepLKNet:
    """388 690 984 parameters, 386 529 064 merged. Input (B, 3, 384, 384), output (B, 1000)."""
    return _built("unireplknet_xl", pretrained, 256, (3, 3, 27, 3), (13, 3, 3), kwargs)


def _built(
    name: str, pretrained: bool, width: int, depths: Sequence[int], third: int | Sequence[int], kwargs: dict[str, Any]
) -> UniRepLKNet:
    """``third`` are the kernels of the third stage; 3 x 3 in the first and 13 x 13 in the others are common to all."""
    arguments = {
        "depths": depths,
        "dims": tuple(width * 2**i for i in range(4)),
        "kernel_sizes": (3, 13, third, 13),
        **kwargs,
    }
    return build_model_with_cfg(
        UniRepLKNet,
        name,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": (0, 1, 2, 3), "feature_cls": "getter"},
        **arguments,
    )
