"""Poincaré ResNet: CIFAR ResNets whose features live in the Poincaré ball (ICCV 2023, arXiv 2303.14027).

A stem, three groups of residual blocks at strides 1, 2 and 4, mean, classifier. ``hyperbolic_*``: every convolution,
norm, skip connection and the classifier are those of ``lissom.layers.poincare``; ReLU and the mean act on tangent
vectors. ``euclidean_*``: the same network of ordinary layers. ``euclideanwhypclass_*``: that with a Poincaré
classifier. The numbers in a name are three widths and the depth, 6 n + 2 for n blocks a group; ``named`` takes others.

Names of modules are the publisher's, but for ``weights`` and ``z``, (in, out) there: here ``weight``, (out, in) as
everywhere in PyTorch, and without ``.norm`` in the norms; ``checkpoint_filter_fn`` translates. Weights that were
trained in the published forms (see ``lissom.layers.poincare``) are worth nothing in others. So the forms are part of a
state dict, as ``forms``: whoever loads one gets them with it, and a checkpoint in the publisher's names is known to
have them. None was ever published. Widths and heights of images need not be multiples of 4, nor even.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.layers import SelectAdaptivePool2d
from timm.models import build_model_with_cfg, checkpoint_seq, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import nn
from torch.nn import functional as F

from lissom.layers.poincare import (
    MobiusResidual,
    PoincareBall,
    PoincareBatchNorm2d,
    PoincareConv2d,
    PoincareHead,
    set_forms_,
)
from lissom.ops import poincare

__all__ = ["GEOMETRIES", "SKIP_DIMS", "PoincareResNet", "checkpoint_filter_fn", "named"]

GEOMETRIES = ("hyperbolic", "euclidean", "euclideanwhypclass")
SKIP_DIMS = {"channel": 1, "width": -1}
FORMS = ("lambda_form", "skip_dim", "running")  # in a state dict's ``forms``, 1 stands for the published one
_NAME = re.compile(r"(hyperbolic|euclidean|euclideanwhypclass)[-_](\d+)[-_](\d+)[-_](\d+)[-_]resnet[-_](\d+)")


class _Parts:
    """How one network makes its layers."""

    def __init__(
        self, hyperbolic: bool, c: float, learn_c: bool, lambda_form: str, skip_dim: str, order: str, running: bool,
        init: str,
    ) -> None:  # fmt: skip
        if skip_dim not in SKIP_DIMS:
            raise ValueError(f"skip_dim {skip_dim!r} is none of {', '.join(SKIP_DIMS)}")
        self.hyperbolic, self.c, self.learn_c, self.running = hyperbolic, c, learn_c, running
        self.lambda_form, self.dim, self.order, self.init = lambda_form, SKIP_DIMS[skip_dim], order, init

    def ball(self) -> PoincareBall:
        return PoincareBall(self.c, self.learn_c)

    def conv(self, channels: int, out: int, kernel: int, stride: int) -> nn.Module:
        if not self.hyperbolic:
            return nn.Conv2d(channels, out, kernel, stride, kernel // 2)
        return PoincareConv2d(
            channels, out, kernel, stride, kernel // 2, ball=self.ball(), lambda_form=self.lambda_form, init=self.init
        )  # fmt: skip

    def norm(self, channels: int) -> nn.Module:
        if not self.hyperbolic:
            return nn.BatchNorm2d(channels)
        return PoincareBatchNorm2d(channels, ball=self.ball(), running=self.running)

    def skip(self) -> nn.Module:
        return MobiusResidual(self.dim, self.order, ball=self.ball()) if self.hyperbolic else _Sum()

    def head(self, features: int, classes: int, poincare: bool) -> nn.Module:
        if not classes:
            return nn.Identity()
        if not poincare:
            return nn.Linear(features, classes)
        return PoincareHead(features, classes, ball=self.ball(), lambda_form=self.lambda_form, init=self.init)


class _Sum(nn.Module):
    def forward(self, f: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return f + residual


class Block(nn.Module):
    """conv - norm - ReLU - conv - norm, the skip connection, ReLU: (B, channels, H, W) -> (B, out, H / stride, ...).

    The residual is the input, or where the shape changes a 1 x 1 convolution of it, without a norm.
    """

    def __init__(self, parts: _Parts, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = parts.conv(channels, out, 3, stride)
        self.bn1 = parts.norm(out)
        self.conv2 = parts.conv(out, out, 3, 1)
        self.bn2 = parts.norm(out)
        self.downsample = parts.conv(channels, out, 1, stride) if stride > 1 or channels != out else nn.Identity()
        self.skip = parts.skip()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        f = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(self.skip(f, self.downsample(x)))


class PoincareResNet(nn.Module):
    """Images (B, in_chans, H, W) to logits (B, num_classes).

    ``widths`` of the three groups, ``depth`` 6 n + 2. ``geometry``: one of ``GEOMETRIES``. ``c`` is minus the
    curvature; ``learn_c`` makes it a parameter, one a layer. ``init``: "identity" or "normal", see ``PoincareLinear``.
    ``order``: "fr" or "rf", see ``MobiusResidual``.

    The published network has ``lambda_form="published"``, ``skip_dim="width"`` and ``running=False`` (batch norm by the
    batch's own statistics in eval mode too); see ``lissom.layers.poincare``. ``running=False`` makes answers depend on
    the batch: export and slim such a network after ``collect_statistics_`` only.

    Raises ValueError for a depth that is not 6 n + 2, other than three widths, and an unknown form.
    """

    forms: torch.Tensor

    def __init__(
        self, widths: Sequence[int] = (8, 16, 32), depth: int = 20, geometry: str = "hyperbolic",
        num_classes: int = 10, in_chans: int = 3, global_pool: str = "avg", drop_rate: float = 0.0, *, c: float = 0.1,
        learn_c: bool = False, lambda_form: str = "correct", skip_dim: str = "channel", order: str = "fr",
        running: bool = True, init: str = "identity",
    ) -> None:  # fmt: skip
        super().__init__()
        if geometry not in GEOMETRIES:
            raise ValueError(f"geometry {geometry!r} is none of {', '.join(GEOMETRIES)}")
        if depth < 8 or depth % 6 != 2:
            raise ValueError(f"a depth of {depth} is not 6 n + 2; 8, 14, 20, 26 and 32 are")
        if len(widths) != 3:
            raise ValueError(f"widths {tuple(widths)}: one is wanted for each of the three groups")
        self.num_classes, self.in_chans, self.drop_rate = num_classes, in_chans, drop_rate
        self.geometry, self.grad_checkpointing = geometry, False
        parts = _Parts(geometry == "hyperbolic", c, learn_c, lambda_form, skip_dim, order, running, init)
        self._parts, self._poincare_head = parts, geometry != "euclidean"
        self.conv = parts.conv(in_chans, widths[0], 3, 1)
        self.bn = parts.norm(widths[0])
        self.relu = nn.ReLU()
        self.feature_info: list[dict[str, Any]] = []
        before = widths[0]
        for group, width in enumerate(widths):
            blocks = []
            for block in range((depth - 2) // 6):
                blocks.append(Block(parts, before, width, 2 if group and not block else 1))
                before = width
            self.add_module(f"group{group + 1}", nn.Sequential(*blocks))
            self.feature_info.append({"num_chs": width, "reduction": 1 << group, "module": f"group{group + 1}"})
        self.num_features = self.head_hidden_size = before
        self._pool(global_pool)
        self.fc = parts.head(before, num_classes, self._poincare_head)
        if self._poincare_head:
            self.register_buffer("forms", torch.zeros(len(FORMS), dtype=torch.uint8))
            self.register_state_dict_pre_hook(_note_forms)
            self.register_load_state_dict_post_hook(_take_forms)

    def _pool(self, kind: str) -> None:
        self.global_pool = SelectAdaptivePool2d(pool_type=kind, flatten=bool(kind)).train(self.training)

    def _groups(self) -> list[nn.Sequential]:
        return [getattr(self, info["module"]) for info in self.feature_info]

    def use_published_forms_(self) -> PoincareResNet:
        """The forms of the published code in every layer, and in classifiers made later; returns the network."""
        self._put_in([True] * len(FORMS))
        return self

    def _is_in(self) -> list[bool]:
        """Which of ``FORMS`` the layers have."""
        parts, norm, skip, head = self._parts, self.bn, self.group1[0].skip, self.fc
        form = head.lambda_form if isinstance(head, PoincareHead) else parts.lambda_form
        dim = skip.dim if isinstance(skip, MobiusResidual) else parts.dim
        running = norm.running if isinstance(norm, PoincareBatchNorm2d) else parts.running
        return [form == "published", dim == SKIP_DIMS["width"], not running]

    def _put_in(self, published: Sequence[bool]) -> None:
        form, width, of_batch = published
        parts = self._parts
        parts.lambda_form, parts.running = poincare.LAMBDA_FORMS[form], not of_batch
        parts.dim = SKIP_DIMS["width" if width else "channel"]
        set_forms_(self, parts.lambda_form, parts.dim, parts.running)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """How timm groups layers for a rate of learning by depth."""
        return {"stem": r"^(conv|bn)\.", "blocks": r"^group(\d+)" if coarse else r"^group(\d+)\.(\d+)"}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether the blocks' insides are computed anew for the backward pass, instead of kept."""
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """The last layer."""
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new, untrained classifier of ``num_classes`` outputs, of the network's own kind; none for 0."""
        self.num_classes = num_classes
        if global_pool is not None:
            self._pool(global_pool)
        head = self._parts.head(self.num_features, num_classes, self._poincare_head)
        self.fc = head.to(next(self.parameters())).train(self.training)

    def forward_intermediates(
        self, x: torch.Tensor, indices: int | list[int] | None = None, norm: bool = False, stop_early: bool = False,
        output_fmt: str = "NCHW", intermediates_only: bool = False,
    ) -> Any:  # fmt: skip
        """timm's: the last maps and those of the groups ``indices``, or these alone. They are tangent vectors at the
        origin. Raises ValueError for another ``output_fmt`` than NCHW."""
        if output_fmt != "NCHW":
            raise ValueError(f"maps come as NCHW, not {output_fmt}")
        taken, last = feature_take_indices(len(self.feature_info), indices)
        found = []
        x = self._stem(x)
        for number, group in enumerate(self._groups()):
            if stop_early and number > last:
                break
            x = self._run(group, x)
            if number in taken:
                found.append(x)
        return found if intermediates_only else (x, found)

    def _stem(self, x: torch.Tensor) -> torch.Tensor:
        return self.relu(self.bn(self.conv(x)))

    def _run(self, group: nn.Sequential, x: torch.Tensor) -> torch.Tensor:
        if self.grad_checkpointing and self.training:
            return checkpoint_seq(group, x)
        return group(x)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Images to the last maps (B, num_features, H / 4, W / 4), rounded up."""
        x = self._stem(x)
        for group in self._groups():
            x = self._run(group, x)
        return x

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Maps to logits (B, num_classes), or where ``pre_logits`` to their mean (B, num_features)."""
        x = F.dropout(self.global_pool(x), self.drop_rate, self.training)
        return x if pre_logits else self.fc(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))


def _note_forms(model: PoincareResNet, prefix: str, keep_vars: bool) -> None:
    with torch.no_grad():
        model.forms.copy_(torch.tensor(model._is_in(), dtype=torch.uint8))


def _take_forms(model: PoincareResNet, keys: Any) -> None:
    if not model.forms.is_meta and "forms" not in keys.missing_keys:
        model._put_in([bool(form) for form in model.forms.tolist()])


def named(name: str, **arguments: Any) -> PoincareResNet:
    """The network that a published name stands for, at any widths and depth: ``named("hyperbolic-4-8-16-resnet-8")``.

    ``arguments`` are PoincareResNet's. Raises ValueError for a name of another form.
    """
    found = _NAME.fullmatch(name)
    if found is None:
        raise ValueError(f"{name!r} is no name of the form hyperbolic-8-16-32-resnet-20")
    geometry, *numbers = found.groups()
    first, second, third, depth = map(int, numbers)
    return PoincareResNet((first, second, third), depth, geometry, **arguments)


def checkpoint_filter_fn(state_dict: Mapping[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """A published checkpoint in this file's names and layouts, with the note that it is in the published forms.

    A state dict in own names comes back as it is. The curvatures in a published one (``*.isp_c``) must be the network's
    own: raises ValueError where they are not. Learnt ones, which three kinds of layers shared, are not read.
    """
    if not any(key.endswith((".weights", ".z")) for key in state_dict):
        return dict(state_dict)
    c = float(next(m for m in model.modules() if isinstance(m, PoincareBall)).c)
    state: dict[str, torch.Tensor] = {}
    for key, value in state_dict.items():
        path, _, leaf = key.rpartition(".")
        if leaf == "isp_c":
            if abs(float(value) - c) > 1e-6:
                raise ValueError(f"the checkpoint has curvature {float(value):g} at {path}, the network {c:g}")
            continue
        path = path.removesuffix(".norm")
        if leaf in ("weights", "z"):
            own = model.state_dict().get(f"{path}.weight")
            flat = value.T
            fits = leaf == "weights" and own is not None and own.ndim == 4
            # Rows of a patch are channel-major, then taps.
            value = flat.reshape(len(flat), -1, *own.shape[2:]) if fits and own is not None else flat
            leaf = "weight"
        elif leaf == "running_mean" and value.ndim == 2:
            value = value[0]
        state[f"{path}.{leaf}"] = value
    if "forms" in model.state_dict():
        state["forms"] = torch.ones(len(FORMS), dtype=torch.uint8)
    return state


def _cfg() -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": 10,
        "input_size": (3, 32, 32),
        "pool_size": (8, 8),
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
        "first_conv": "conv",
        "classifier": "fc",
        "license": "apache-2.0",
    }


_SIZES = ("4_8_16_resnet_20", "8_16_32_resnet_20", "8_16_32_resnet_32", "16_32_64_resnet_20")
default_cfgs = generate_default_cfgs({f"{geometry}_{size}": _cfg() for geometry in GEOMETRIES for size in _SIZES})


@register_model
def hyperbolic_4_8_16_resnet_20(pretrained: bool = False, **kwargs: Any) -> PoincareResNet:
    """Hyperbolic throughout: 17 529 parameters. Input (B, 3, 32, 32), output (B, 10)."""
    return _built("hyperbolic_4_8_16_resnet_20", pretrained, kwargs)


@register_model
def hyperbolic_8_16_32_resnet_20(pretrained: bool = False, **kwargs: Any) -> PoincareResNet:
    """Hyperbolic throughout: 68 757 parameters. Input (B, 3, 32, 32), output (B, 10)."""
    return _built("hyperbolic_8_16_32_resnet_20", pretrained, kwargs)


@register_model
def hyperbolic_8_16_32_resnet_32(pretrained: bool = False, **kwargs: Any) -> PoincareResNet:
    """Hyperbolic throughout: 117 601 parameters. Input (B, 3, 32, 32), output (B, 10)."""
    return _built("hyperbolic_8_16_32_resnet_32", pretrained, kwargs)


@register_model
def hyperbolic_16_32_64_resnet_20(pretrained: bool = False, **kwargs: Any) -> PoincareResNet:
    """Hyperbolic throughout: 272 397 parameters. Input (B, 3, 32, 32), output (B, 10)."""
    return _built("hyperbolic_16_32_64_resnet_20", pretrained, kwargs)


@register_model
def euclidean_4_8_16_resnet_20(pretrained: bool = False, **kwargs: Any) -> PoincareResNet:
    """The Euclidean twin: 17 682 parameters. Input (B, 3, 32, 32), output (B, 10)."""
    return _built("euclidean_4_8_16_resnet_20", pretrained, kwargs)


@register_model
def euclidean_8_16_32_resnet_20(pretrained: bool = False, **kwargs: Any) -> PoincareResNet:
    """The Euclidean twin: 69 082 parameters. Input (B, 3, 32, 32), output (B, 10)."""
    return _built("euclidean_8_16_32_resnet_20", pretrained, kwargs)


@register_model
def euclidean_8_16_32_resnet_32(pretrained: bool = False, **kwargs: Any) -> PoincareResNet:
    """The Euclidean twin: 118 138 parameters. Input (B, 3, 32, 32), output (B, 10)."""
    return _built("euclidean_8_16_32_resnet_32", pretrained, kwargs)


@register_model
def euclidean_16_32_64_resnet_20(pretrained: bool = False, **kwargs: Any) -> PoincareResNet:
    """The Euclidean twin: 273 066 parameters. Input (B, 3, 32, 32), output (B, 10)."""
    return _built("euclidean_16_32_64_resnet_20", pretrained, kwargs)


@register_model
def euclideanwhypclass_4_8_16_resnet_20(pretrained: bool = False, **kwargs: Any) -> PoincareResNet:
    """The Euclidean twin with a Poincaré classifier: 17 682 parameters. Input (B, 3, 32, 32), output (B, 10)."""
    return _built("euclideanwhypclass_4_8_16_resnet_20", pretrained, kwargs)


@register_model
def euclideanwhypclass_8_16_32_resnet_20(pretrained: bool = False, **kwargs: Any) -> PoincareResNet:
    """The Euclidean twin with a Poincaré classifier: 69 082 parameters. Input (B, 3, 32, 32), output (B, 10)."""
    return _built("euclideanwhypclass_8_16_32_resnet_20", pretrained, kwargs)


@register_model
def euclideanwhypclass_8_16_32_resnet_32(pretrained: bool = False, **kwargs: Any) -> PoincareResNet:
    """The Euclidean twin with a Poincaré classifier: 118 138 parameters. Input (B, 3, 32, 32), output (B, 10)."""
    return _built("euclideanwhypclass_8_16_32_resnet_32", pretrained, kwargs)


@register_model
def euclideanwhypclass_16_32_64_resnet_20(pretrained: bool = False, **kwargs: Any) -> PoincareResNet:
    """The Euclidean twin with a Poincaré classifier: 273 066 parameters. Input (B, 3, 32, 32), output (B, 10)."""
    return _built("euclideanwhypclass_16_32_64_resnet_20", pretrained, kwargs)


def _built(name: str, pretrained: bool, kwargs: dict[str, Any]) -> PoincareResNet:
    found = _NAME.fullmatch(name)
    assert found is not None
    geometry, *numbers = found.groups()
    *widths, depth = map(int, numbers)
    return build_model_with_cfg(
        PoincareResNet,
        name,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": (0, 1, 2)},
        **{"widths": tuple(widths), "depth": depth, "geometry": geometry, **kwargs},
    )
