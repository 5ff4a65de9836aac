"""FIT: transformers that attend inside groups of tokens, and among a few latents a group (arXiv 2305.12689).

Tokens stand in t groups of n. Local layers attend inside a group; latents, m a group, read their group's tokens, attend
among all latents of all groups, and are read by their group's tokens in turn. With n near L^(1/3) of L tokens the cost
of attention grows as L^(4/3). ``FIT`` encodes, ``FITDenoiser`` predicts with a time and a condition, ``FITAR`` predicts
the next token. A string such as "(2)4(2)4(1)" says how many local and (latent) layers follow one another.

Positions inside a group are the same in all groups: only latents know which group is which. There are no published
sizes and no published weights; the registered networks' sizes are those of the small published examples.
``checkpoint_filter_fn`` reads the names and layouts of the publisher's TensorFlow layers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from timm.models import register_model
from torch import nn
from torch.nn import functional

__all__ = [
    "FIT", "FITAR", "FITDenoiser", "chunk_causal", "group_images", "parse_layers", "position_code", "ungroup_images",
]  # fmt: skip

EPS = 1e-6  # of every LayerNorm
NORMALISED = 1000.0  # where the last position of a sine code stands


def parse_layers(text: str) -> list[tuple[int, int]]:
    """ "(2)4(2)" as [(2, 4), (2, 0)]: local and latent layers of each stage.

    Raises ValueError for another form, and for a stage before the last without latent layers.
    """
    stages = re.findall(r"\((\d+)\)(\d*)", text)
    if not stages or "".join(f"({a}){b}" for a, b in stages) != text:
        raise ValueError(f"layers are written as '(2)4(2)4(1)', local ones in brackets, not as {text!r}")
    parsed = [(int(local), int(latent or 0)) for local, latent in stages]
    if any(latent == 0 for _, latent in parsed[:-1]):
        raise ValueError(f"only the last stage of {text!r} may be without latent layers")
    return parsed


def chunk_causal(groups: int, size: int) -> torch.Tensor:
    """bool (groups * size, groups * size): True where a row may attend, to its own group whole and to earlier ones."""
    group = torch.arange(groups * size) // size
    return group[:, None] >= group[None]


def position_code(length: int, dim: int, most: float | None = NORMALISED) -> torch.Tensor:
    """Sines and cosines of 1-D positions, (length, dim): sines of the even rates in one half, cosines of the odd in the
    other. Positions run from 0 to ``most`` (None: to length - 1); a single one stands at 0."""
    places = torch.arange(length, dtype=torch.float32)
    if most is not None:
        places = places * (most / max(length - 1, 1))
    return _waves(places, dim)


def _waves(places: torch.Tensor, dim: int) -> torch.Tensor:
    """places (...,) -> (..., dim)."""
    rates = 10000.0 ** -(2 * (torch.arange(dim, device=places.device) // 2).to(places.dtype) / dim)
    angles = places[..., None] * rates
    return torch.cat([angles[..., 0::2].sin(), angles[..., 1::2].cos()], -1)


def _grid_code(rows: int, columns: int, dim: int) -> torch.Tensor:
    """(rows * columns, dim): the code of the row in one half, of the column in the other."""
    down = position_code(rows, dim // 2)[:, None].expand(-1, columns, -1)
    across = position_code(columns, dim // 2)[None].expand(rows, -1, -1)
    return torch.cat([down, across], -1).flatten(0, 1)


class _Attention(nn.Module):
    """Queries from one sequence, keys and values from another, ``width`` wide in all heads together."""

    def __init__(self, dim: int, source_dim: int, heads: int, width: int) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"{heads} heads do not divide a width of {width}")
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(d, width) for d in (dim, source_dim, source_dim))
        self.output = nn.Linear(width, dim)

    def forward(self, x: torch.Tensor, source: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        query, key, value = (
            layer(s).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer, s in ((self.query, x), (self.key, source), (self.value, source))
        )
        mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.output(mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class _MLP(nn.Module):
    """x + MLP(LN x), exact GELU."""

    def __init__(self, dim: int, ratio: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=EPS)
        self.dense1, self.dense2 = nn.Linear(dim, ratio * dim), nn.Linear(ratio * dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.dense2(functional.gelu(self.dense1(self.norm(x))))


class _Layer(nn.Module):
    """x + attention(LN x), then ``_MLP``. (B, N, dim) -> (B, N, dim); ``attend`` False leaves the first out."""

    def __init__(self, dim: int, heads: int, ratio: int, attend: bool = True) -> None:
        super().__init__()
        self.attend = attend
        if attend:
            self.norm = nn.LayerNorm(dim, eps=EPS)
            self.attention = _Attention(dim, dim, heads, dim)
        self.mlp = _MLP(dim, ratio)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        if self.attend:
            own = self.norm(x)
            x = x + self.attention(own, own, mask)
        return self.mlp(x)  # type: ignore[no-any-return]


class _Cross(nn.Module):
    """x + attention(LN x to LN source), and where ``ratio`` is above 0 ``_MLP`` behind it."""

    def __init__(self, dim: int, source_dim: int, heads: int, width: int, ratio: int = 0) -> None:
        super().__init__()
        self.norm, self.source_norm = nn.LayerNorm(dim, eps=EPS), nn.LayerNorm(source_dim, eps=EPS)
        self.attention = _Attention(dim, source_dim, heads, width)
        self.mlp = _MLP(dim, ratio) if ratio else nn.Identity()

    def forward(self, x: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        return self.mlp(x + self.attention(self.norm(x), self.source_norm(source)))  # type: ignore[no-any-return]


class _Interleaved(nn.Module):
    """What the three share: stages of local and latent layers, and the position tables."""

    def __init__(
        self, layers: str, groups: int, group_size: int, latents: int, dim: int, latent_dim: int, heads: int,
        latent_heads: int, mlp_ratio: int, position: str, latent_position: str, *, local_attention: bool = True,
        cross_mlp: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        for name, value in (("groups", groups), ("group_size", group_size), ("latents", latents)):
            if value < 1:
                raise ValueError(f"{name} is {value}; it is at least 1")
        self.groups, self.group_size, self.latents = groups, group_size, latents
        self.dim, self.latent_dim = dim, latent_dim
        self.stages = parse_layers(layers)
        self._add_positions("position", position, (group_size, 1), dim)
        self._add_positions("latent_position", latent_position, (groups, latents), latent_dim)
        least, width, ratio = min(heads, latent_heads), min(dim, latent_dim), mlp_ratio if cross_mlp else 0
        self.local, self.latent = nn.ModuleList(), nn.ModuleList()
        self.to_latents, self.to_tokens = nn.ModuleList(), nn.ModuleList()
        for number, (local, latent) in enumerate(self.stages):
            self.local.append(nn.ModuleList(_Layer(dim, heads, mlp_ratio, local_attention) for _ in range(local)))
            if latent:
                self.to_latents.append(_Cross(latent_dim, dim, least, width, ratio))
                self.latent.append(nn.ModuleList(_Layer(latent_dim, latent_heads, mlp_ratio) for _ in range(latent)))
            if number < len(self.stages) - 1:
                self.to_tokens.append(_Cross(dim, latent_dim, least, width, ratio))

    def _add_positions(self, name: str, kind: str, grid: tuple[int, int], dim: int) -> None:
        length = grid[0] * grid[1]
        if kind == "learned":
            setattr(self, name, nn.Parameter(nn.init.trunc_normal_(torch.empty(length, dim), std=0.02)))
            return
        if kind == "sin_cos2d":
            side = math.isqrt(length)
            if side * side != length:
                raise ValueError(f"'sin_cos2d' wants a square number of tokens a group, not {length}")
            grid = (side, side)
        elif kind != "sin_cos":
            raise ValueError(f"positions are 'learned', 'sin_cos' or 'sin_cos2d', not {kind!r}")
        code = position_code(length, dim) if 1 in grid else _grid_code(*grid, dim)
        self.register_buffer(name, code, persistent=False)

    def _check(self, x: torch.Tensor) -> None:
        if tuple(x.shape[1:3]) != (self.groups, self.group_size):
            raise ValueError(
                f"tokens of shape (B, {self.groups}, {self.group_size}, ...) are wanted, not {tuple(x.shape)}"
            )

    def _first_latents(self, count: int) -> torch.Tensor:
        """(count * groups, latents, latent_dim)."""
        table: torch.Tensor = self.latent_position  # type: ignore[assignment]
        return table.unflatten(0, (self.groups, -1)).repeat(count, 1, 1)

    def _joined(self, latents: torch.Tensor) -> torch.Tensor:
        """(B groups, m, d) -> (B, groups m, d)."""
        return latents.unflatten(0, (-1, self.groups)).flatten(1, 2)

    def _parted(self, latents: torch.Tensor) -> torch.Tensor:
        """(B, groups m, d) -> (B groups, m, d)."""
        return latents.unflatten(1, (self.groups, -1)).flatten(0, 1)


class FIT(_Interleaved):
    """Tokens (B, groups, group_size, in_dim) -> tokens (B, groups, group_size, dim) and (B, groups, m, latent_dim).

    ``latents`` m is their number a group. ``mask`` "causal": latents attend to their own and earlier groups. Positions
    are "learned", "sin_cos" or, of tokens in a square, "sin_cos2d". With ``second_dim`` every group takes further
    tokens (B, groups, k, second_dim) as the second argument; they come first, without positions, and are answered too.
    Read the latents where the layers end with latent ones, else the tokens. Raises ValueError for sizes that do not
    fit.
    """

    def __init__(
        self, layers: str = "(2)4(2)4(1)", groups: int = 4, group_size: int = 16, latents: int = 4, dim: int = 32,
        latent_dim: int = 48, heads: int = 4, latent_heads: int = 6, in_dim: int = 12, mlp_ratio: int = 4,
        position: str = "learned", latent_position: str = "learned", mask: str | None = None, second_dim: int = 0,
    ) -> None:  # fmt: skip
        super().__init__(layers, groups, group_size, latents, dim, latent_dim, heads, latent_heads, mlp_ratio, position,
                         latent_position)  # fmt: skip
        if mask not in (None, "causal"):
            raise ValueError(f"mask is None or 'causal', not {mask!r}")
        self.stem, self.stem_norm = nn.Linear(in_dim, dim), nn.LayerNorm(dim, eps=EPS)
        if second_dim:
            self.second, self.second_norm = nn.Linear(second_dim, dim), nn.LayerNorm(dim, eps=EPS)
        causal = chunk_causal(groups, latents) if mask else None
        self.register_buffer("mask", causal, persistent=False)
        self.norm, self.latent_norm = nn.LayerNorm(dim, eps=EPS), nn.LayerNorm(latent_dim, eps=EPS)

    def forward(self, x: torch.Tensor, second: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        self._check(x)
        count = len(x)
        x = self.stem_norm(self.stem(x)) + self.position
        if second is not None:
            x = torch.cat([self.second_norm(self.second(second)), x], 2)
        x, latents = x.flatten(0, 1), self._first_latents(count)
        for number, (_, latent) in enumerate(self.stages):
            for layer in self.local[number]:  # type: ignore[attr-defined]
                x = layer(x)
            if latent:
                latents = self._joined(self.to_latents[number](latents, x))
                for layer in self.latent[number]:  # type: ignore[attr-defined]
                    latents = layer(latents, self.mask)
                latents = self._parted(latents)
            if number < len(self.stages) - 1:
                x = self.to_tokens[number](x, latents)
        by_group = (count, self.groups)
        return self.norm(x).unflatten(0, by_group), self.latent_norm(latents).unflatten(0, by_group)


class FITDenoiser(_Interleaved):
    """Noisy tokens, a time and a condition -> prediction (B, groups, group_size, out_dim), latents.

    Time (B,) in [0, 1]; the condition (B, cond_dim) or (B, k, cond_dim). Latents read both before each row of latent
    layers. The latents come back without a norm, (B, groups, m, latent_dim), for the next step's ``previous``
    (``self_condition``: through an MLP and a norm whose weight starts at 0). ``local_attention`` False leaves the
    attention out of local layers, ``cross_mlp`` puts MLPs behind the two cross-attentions.
    """

    def __init__(
        self, layers: str = "(1)2(1)2(1)", groups: int = 4, group_size: int = 16, latents: int = 4, dim: int = 32,
        latent_dim: int = 48, heads: int = 4, latent_heads: int = 4, in_dim: int = 12, out_dim: int = 12,
        cond_dim: int = 10, mlp_ratio: int = 4, position: str = "learned", latent_position: str = "learned",
        mask: str | None = None, self_condition: bool = True, local_attention: bool = True, cross_mlp: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(layers, groups, group_size, latents, dim, latent_dim, heads, latent_heads, mlp_ratio, position,
                         latent_position, local_attention=local_attention, cross_mlp=cross_mlp)  # fmt: skip
        if mask not in (None, "causal"):
            raise ValueError(f"mask is None or 'causal', not {mask!r}")
        self.register_buffer("mask", chunk_causal(groups, latents) if mask else None, persistent=False)
        self.stem, self.stem_norm = nn.Linear(in_dim, dim), nn.LayerNorm(dim, eps=EPS)
        self.time1 = nn.Linear(latent_dim // 4, latent_dim // 4 * 4)
        self.time2 = nn.Linear(latent_dim // 4 * 4, latent_dim // 4 * 4)
        self.condition = nn.Linear(cond_dim, latent_dim)
        self.to_condition = nn.ModuleList(
            _Cross(latent_dim, latent_dim, latent_heads, latent_dim) for _, latent in self.stages if latent
        )
        self.self_condition = self_condition
        if self_condition:
            self.previous, self.previous_norm = _MLP(latent_dim, mlp_ratio), nn.LayerNorm(latent_dim, eps=EPS)
            nn.init.zeros_(self.previous_norm.weight)
        self.norm, self.head = nn.LayerNorm(dim, eps=EPS), nn.Linear(dim, out_dim)

    def _time(self, time: torch.Tensor) -> torch.Tensor:
        """(B,) -> (B, 1, latent_dim)."""
        code = _waves(1000 * time, self.time1.in_features)
        code = (code - code.mean(-1, keepdim=True)) / code.std(-1, correction=0, keepdim=True)
        return self.time2(functional.silu(self.time1(code)))[:, None]  # type: ignore[no-any-return]

    def forward(
        self, x: torch.Tensor, time: torch.Tensor, condition: torch.Tensor, previous: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``previous`` (B, groups, m, latent_dim): what the step before returned, zeros where there was none."""
        self._check(x)
        count = len(x)
        x = (self.stem_norm(self.stem(x)) + self.position).flatten(0, 1)
        latents = self._first_latents(count)
        if self.self_condition:
            if previous is None:
                previous = latents.new_zeros(count, self.groups, self.latents, self.latent_dim)
            latents = latents + self.previous_norm(self.previous(previous)).flatten(0, 1)
        given = self.condition(condition)
        given = torch.cat([self._time(time), given[:, None] if given.ndim == 2 else given], 1)
        for number, (_, latent) in enumerate(self.stages):
            for layer in self.local[number]:  # type: ignore[attr-defined]
                x = layer(x)
            if latent:
                latents = self._joined(self.to_latents[number](latents, x))
                latents = self.to_condition[number](latents, given)
                for layer in self.latent[number]:  # type: ignore[attr-defined]
                    latents = layer(latents, self.mask)
                latents = self._parted(latents)
            if number < len(self.stages) - 1:
                x = self.to_tokens[number](x, latents)
        by_group = (count, self.groups)
        return self.head(self.norm(x)).unflatten(0, by_group), latents.unflatten(0, by_group)


class FITAR(_Interleaved):
    """Token numbers (B, groups, group_size) -> logits of the next token (B, groups, group_size, vocabulary).

    The logits at a place depend on the tokens up to it: feed the targets shifted by one over the flattened sequence, a
    0 before them. Local layers are causal inside the group, latent ones from group to group, and a group's tokens read
    the latents of the group before. ``shared`` uses one table for tokens in and out.
    """

    def __init__(
        self, vocabulary: int = 50, layers: str = "(2)2(2)2(1)", groups: int = 4, group_size: int = 12,
        latents: int = 3, dim: int = 24, latent_dim: int = 32, heads: int = 3, latent_heads: int = 4,
        mlp_ratio: int = 4, position: str = "learned", latent_position: str = "learned", shared: bool = True,
        bias: bool = True,
    ) -> None:  # fmt: skip
        super().__init__(layers, groups, group_size, latents, dim, latent_dim, heads, latent_heads, mlp_ratio, position,
                         latent_position)  # fmt: skip
        self.register_buffer("mask", chunk_causal(groups, latents), persistent=False)
        self.register_buffer("local_mask", chunk_causal(group_size, 1), persistent=False)
        self.embedding = nn.Parameter(nn.init.trunc_normal_(torch.empty(vocabulary, dim), std=0.02))
        if not shared:
            self.out_embedding = nn.Parameter(nn.init.trunc_normal_(torch.empty(vocabulary, dim), std=0.02))
        self.shared = shared
        self.bias = nn.Parameter(torch.zeros(vocabulary)) if bias else None
        self.norm = nn.LayerNorm(dim, eps=EPS)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        self._check(tokens)
        count = len(tokens)
        x = (functional.embedding(tokens, self.embedding) + self.position).flatten(0, 1)
        latents = self._first_latents(count)
        for number, (_, latent) in enumerate(self.stages):
            for layer in self.local[number]:  # type: ignore[attr-defined]
                x = layer(x, self.local_mask)
            if latent:
                latents = self._joined(self.to_latents[number](latents, x))
                for layer in self.latent[number]:  # type: ignore[attr-defined]
                    latents = layer(latents, self.mask)
                latents = self._parted(latents)
            if number < len(self.stages) - 1:
                # A group's own latents have read all of it; its tokens may read those of the group before only.
                earlier = latents.unflatten(0, (count, self.groups))
                earlier = torch.cat([torch.zeros_like(earlier[:, :1]), earlier[:, :-1]], 1)
                x = self.to_tokens[number](x, earlier.flatten(0, 1))
        table = self.embedding if self.shared else self.out_embedding
        return functional.linear(self.norm(x), table, self.bias).unflatten(0, (count, self.groups))


def group_images(images: torch.Tensor, groups: int, patch: int) -> torch.Tensor:
    """images (B, C, H, W) -> tokens (B, groups^2, n, C patch^2): groups x groups sub-images, cut into patches.

    Rows first, for groups, patches and the pixels in them; channels last among a patch's numbers. Raises ValueError
    where sides are not divisible.
    """
    batch, channels, height, width = images.shape
    if height % (groups * patch) or width % (groups * patch):
        raise ValueError(
            f"{height} x {width} pixels are not divisible into {groups} x {groups} groups of {patch}-patches"
        )
    rows, columns = height // (groups * patch), width // (groups * patch)
    x = images.reshape(batch, channels, groups, rows, patch, groups, columns, patch)
    return x.permute(0, 2, 5, 3, 6, 4, 7, 1).reshape(batch, groups**2, rows * columns, patch * patch * channels)


def ungroup_images(tokens: torch.Tensor, groups: int, patch: int, height: int, width: int) -> torch.Tensor:
    """The images (B, C, height, width) that ``group_images`` made ``tokens`` of."""
    rows, columns = height // (groups * patch), width // (groups * patch)
    channels = tokens.shape[-1] // patch**2
    x = tokens.reshape(len(tokens), groups, groups, rows, columns, patch, patch, channels)
    return x.permute(0, 7, 1, 3, 5, 2, 4, 6).reshape(len(tokens), channels, height, width)


_TOP = {
    "latent_pos_emb.kernel.vis_pos_embedding": "latent_position", "x_pos_emb.kernel.vis_pos_embedding": "position",
    "token_embedding": "embedding", "inp_token_embedding": "embedding", "outp_token_embedding": "out_embedding",
    "outp_bias": "bias",
}  # fmt: skip
_PARTS = (
    (r"^(x|l)_network(?:_(\d+))?\.transformer_(?:encoder|decoder_layer)(?:_(\d+))?\.",
     lambda m: f"{'local' if m[1] == 'x' else 'latent'}.{m[2] or 0}.{m[3] or 0}."),
    (r"^(l2x|x2l|l2c)_cross_attn(?:_(\d+))?\.",
     lambda m: {"l2x": "to_latents", "x2l": "to_tokens", "l2c": "to_condition"}[m[1]] + f".{m[2] or 0}."),
    (r"(?:^|(?<=\.))(?:cross_|self_)?mha\.enc_ln\.", lambda m: "source_norm."),
    (r"(?:^|(?<=\.))(?:cross_|self_)?mha\.ln\.", lambda m: "norm."),
    (r"(?:^|(?<=\.))(?:cross_|self_)?mha\.(query|key|value)\.", lambda m: f"attention.{m[1]}."),
    (r"(?:^|(?<=\.))(?:cross_|self_)?mha\.attention_output\.", lambda m: "attention.output."),
    (r"\bffn\.ln\.", lambda m: "norm."),
    (r"\bffn\.", lambda m: ""),
    (r"^stem_y_ln\.", lambda m: "second_norm."),
    (r"^stem_y\.", lambda m: "second."),
    (r"^stem_ln\.", lambda m: "stem_norm."),
    (r"^x_output_ln\.", lambda m: "norm."),
    (r"^l_output_ln\.", lambda m: "latent_norm."),
    (r"^x_output_linear\.", lambda m: "head."),
    (r"^time_emb\.dense(\d)\.", lambda m: f"time{int(m[1]) + 1}."),
    (r"^cond_proj\.", lambda m: "condition."),
    (r"^latent_prev_proj\.", lambda m: "previous."),
    (r"^latent_prev_ln\.", lambda m: "previous_norm."),
)  # fmt: skip


def checkpoint_filter_fn(state_dict: Mapping[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """The publisher's TensorFlow layers in the networks' names: kernels transposed, the axes of heads joined."""
    if not any(key.endswith(".kernel") for key in state_dict):
        return dict(state_dict)
    state = {}
    for key, value in state_dict.items():
        if key in _TOP:
            state[_TOP[key]] = value
            continue
        name = key
        for pattern, new in _PARTS:
            name = re.sub(pattern, new, name)
        if key.endswith(".kernel"):
            joined = value.flatten(0, 1) if "attention_output" in key else value.flatten(1)
            state[name.removesuffix("kernel") + "weight"] = joined.T.contiguous()
        else:
            stem, _, leaf = name.rpartition(".")
            state[f"{stem}.{ {'gamma': 'weight', 'beta': 'bias'}.get(leaf, leaf) }"] = value.flatten()
    return state


@register_model
def fit_encoder(pretrained: bool = False, **kwargs: Any) -> FIT:
    """An encoder of tokens (B, 4, 16, 12) by default: 313,280 parameters."""
    return FIT(**_own(kwargs))


@register_model
def fit_denoiser(pretrained: bool = False, **kwargs: Any) -> FITDenoiser:
    """A denoiser of tokens (B, 4, 16, 12) by default: 216,652 parameters."""
    return FITDenoiser(**_own(kwargs))


@register_model
def fit_ar(pretrained: bool = False, **kwargs: Any) -> FITAR:
    """Next tokens of (B, 4, 12) out of 50 by default: 100,506 parameters."""
    return FITAR(**_own(kwargs))


def _own(arguments: dict[str, Any]) -> dict[str, Any]:
    """The network's own arguments, without those that timm hands to every network."""
    timms = ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")
    return {name: value for name, value in arguments.items() if name not in timms}
