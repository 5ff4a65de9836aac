"""The branch of latent tokens beside a CNN, and how it is put beside one as it stands; Dyn-Perceiver (2306.11248).

A few learned tokens z run through self-attention. In front of each of a CNN's four stages the two meet: the map x reads
z, and z reads x. Classifiers look at z in front of stage 3's run (early) and of stage 4's (late), at x (maps), and at
both (merged), so that no low map of the CNN has to be linearly separable for an exit's sake.

``attach_latent_branch`` puts it beside a user's trained CNN by hooks: the CNN keeps its class, its modules, their paths
and its weights, and its own classifier answers for the maps. Its answer becomes the merged one.

Legend of the shapes: B batch, C channels of a stage's input, n tokens (a share of ``latents``), H W a map's size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from lissom.layers.exits import OwnExit, own_answer

__all__ = [
    "Attention",
    "CrossAttention",
    "Exchange",
    "LatentBranch",
    "SelfAttention",
    "TokenMean",
    "attach_latent_branch",
    "latent_branch_of",
    "read_tokens",
    "remove_latent_branch",
]

STAGES = 4
DEPTHS = (3, 3, 9, 3)  # layers of self-attention in front of each stage; published sizes multiply them
HEADS = (1, 2, 4, 8)
POOL = 7
NAME = "perceiver"


class Attention(nn.Module):
    """Queries (B, N, ``dim``) and what they read (B, M, ``kv_dim``) to (B, N, ``dim``).

    softmax(q k^T / sqrt(``qk_dim`` / ``num_heads``)) v, projected back. Queries, keys and values have no bias.
    ``positions`` M gives every position of what is read a learned vector, (1, M, ``qk_dim``), that is added to its key
    (not to the logits). Raises ValueError where ``num_heads`` does not divide ``qk_dim``.
    """

    def __init__(self, dim: int, kv_dim: int, qk_dim: int, num_heads: int = 1, positions: int = 0) -> None:
        super().__init__()
        if qk_dim < 1 or qk_dim % num_heads:
            raise ValueError(f"{num_heads} heads do not divide {qk_dim} channels; give other num_heads or widths")
        self.num_heads = num_heads
        self.relative_position_bias = nn.Parameter(torch.zeros(1, positions, qk_dim)) if positions else None
        self.q_proj = nn.Linear(dim, qk_dim, bias=False)
        self.k_proj = nn.Linear(kv_dim, qk_dim, bias=False)
        self.v_proj = nn.Linear(kv_dim, qk_dim, bias=False)
        self.o_proj = nn.Linear(qk_dim, dim)

    def forward(self, x: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
        q, k, v = self.q_proj(x), self.k_proj(kv), self.v_proj(kv)
        if self.relative_position_bias is not None:
            k = k + self.relative_position_bias
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in (q, k, v))
        return self.o_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Norm, two linear layers with a GELU between them: (..., ``dim``) -> (..., ``dim``)."""

    def __init__(self, dim: int, ratio: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, int(ratio * dim))
        self.fc2 = nn.Linear(int(ratio * dim), dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(self.norm(x))))


class CrossAttention(nn.Module):
    """Tokens (B, N, ``dim``) read others (B, M, ``kv_dim``): attention, then an MLP, each with a residual."""

    def __init__(
        self, dim: int, kv_dim: int, qk_dim: int | None = None, num_heads: int = 1, ratio: float = 1.0,
        positions: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.q_norm, self.kv_norm = nn.LayerNorm(dim), nn.LayerNorm(kv_dim)
        self.attention = Attention(dim, kv_dim, dim if qk_dim is None else qk_dim, num_heads, positions)
        self.mlp = Mlp(dim, ratio)

    def forward(self, x: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.q_norm(x), self.kv_norm(kv))
        return x + self.mlp(x)


class SelfAttention(nn.Module):
    """Tokens (B, N, ``dim``) read each other: attention, then an MLP, each with a residual."""

    def __init__(self, dim: int, num_heads: int, ratio: float = 4.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.attention = Attention(dim, dim, dim, num_heads)
        self.mlp = Mlp(dim, ratio)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed = self.norm(x)
        x = x + self.attention(normed, normed)
        return x + self.mlp(x)


class Exchange(nn.Module):
    """What happens in front of a stage: x (B, ``dim``, H, W) and z (B, n', C') to x, and z (B, n, ``dim``).

    z is mixed over its tokens (n' to n) and widened (C' to ``dim``); x reads z; z reads x, averaged to ``pool`` x
    ``pool`` places behind a depthwise convolution; z reads itself. In front of the first stage (``before`` None) z is
    as wide as x already, and x does not read it.
    """

    def __init__(
        self, dim: int, tokens: int, before: tuple[int, int] | None, depth: int, num_heads: int, ratio: float, pool: int
    ) -> None:
        super().__init__()
        self.mixer = self.expander = self.z2x = None
        if before is not None:
            old_dim, old_tokens = before
            self.mixer = nn.Sequential(nn.LayerNorm(old_tokens), nn.Linear(old_tokens, tokens))
            self.expander = nn.Sequential(nn.LayerNorm(old_dim), nn.Linear(old_dim, dim))
            self.z2x = CrossAttention(dim, dim, max(1, dim // 8))
        self.pool = pool
        self.dwc = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.x2z = CrossAttention(dim, dim, positions=pool * pool)
        self.self_attention = nn.Sequential(*(SelfAttention(dim, num_heads, ratio) for _ in range(depth)))

    def forward(self, x: torch.Tensor, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.mixer is not None and self.expander is not None and self.z2x is not None:
            z = self.expander(self.mixer(z.transpose(1, 2)).transpose(1, 2))
            x = read_tokens(self.z2x, x, z)
        pooled = F.adaptive_avg_pool2d(self.dwc(x) + x, self.pool)
        z = self.x2z(z, pooled.flatten(2).transpose(1, 2))
        return x, self.self_attention(z)


class TokenMean(nn.Module):
    """Tokens (B, n, C) to their mean (B, C)."""

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return z.mean(1)


class Hand(nn.Module):
    """Hands a map on, as a module by whose path it is known."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.clone()  # an operation of its own: in a graph, a module without any has no output


def read_tokens(attention: nn.Module, x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """Every pixel of x (B, C, H, W) reads the tokens z (B, n, C'); the map keeps its shape."""
    return attention(x.flatten(2).transpose(1, 2), z).transpose(1, 2).unflatten(2, x.shape[2:])


def check_sizes(latents: int, depths: Sequence[int], num_heads: Sequence[int] = HEADS) -> None:
    """Raise ValueError for numbers that a branch cannot have."""
    if len(depths) != STAGES or len(num_heads) != STAGES or min(depths) < 1:
        raise ValueError(f"depths and num_heads are {STAGES} numbers each, at least 1: {depths}, {num_heads}")
    if latents < 1 << (STAGES - 1) or latents % (1 << (STAGES - 1)):
        raise ValueError(f"latents are halved three times, so that their number is a multiple of 8, not {latents}")


def latent(latents: int, dim: int) -> nn.Parameter:
    """The learned tokens (n, C), as they begin."""
    return nn.Parameter(torch.empty(latents, dim).normal_(std=0.02).clamp_(-2, 2))


def exchanges(
    dims: Sequence[int], latents: int, depths: Sequence[int], num_heads: Sequence[int], ratio: float,
    pools: Sequence[int],
) -> nn.ModuleList:  # fmt: skip
    """What happens in front of each stage; ``dims`` are the channels of the stages' inputs."""
    tokens = [latents >> number for number in range(STAGES)]
    before = [None, *zip(dims, tokens, strict=True)]
    return nn.ModuleList(
        Exchange(dims[n], tokens[n], before[n], depths[n], num_heads[n], ratio, pools[n]) for n in range(STAGES)
    )


def knowledge(classes: int, dim: int) -> nn.ModuleDict:
    """What hands the logits of the early and of the late exit on to the exit behind: (B, classes) -> (B, ``dim``).

    Empty where ``dim`` is 0.
    """
    parts = nn.ModuleDict()
    for name in ("early", "late") if dim else ():
        parts[name] = nn.Sequential(nn.Linear(classes, dim), nn.BatchNorm1d(dim), nn.ReLU())
    return parts


def told(parts: nn.ModuleDict, name: str, features: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Features with what the exit ``name`` answered beside them, where ``knowledge`` hands that on."""
    return torch.cat((features, parts[name](logits)), 1) if parts else features


# Beside a CNN as it stands


class LatentBranch(nn.Module):
    """What ``attach_latent_branch`` registers on a model, under ``perceiver``.

    ``places``: the paths of the modules that give the input of each stage and the last stage's map, five. ``widths``:
    the channels of those maps. ``heads.maps`` stands for the CNN's own classifier and hands its answer on.
    """

    def __init__(
        self, places: Sequence[str], widths: Sequence[int], pools: Sequence[int], classes: int, latents: int,
        depths: Sequence[int], ratio: float,
    ) -> None:  # fmt: skip
        super().__init__()
        check_sizes(latents, depths)
        self.places = tuple(places)
        *dims, last = widths
        num_heads = [max(n for n in range(1, most + 1) if dim % n == 0) for most, dim in zip(HEADS, dims, strict=True)]
        self.latent = latent(latents, dims[0])
        self.exchanges = exchanges(dims, latents, depths, num_heads, ratio, pools)
        self.last_z2x = CrossAttention(last, dims[-1], max(1, last // 8))
        self.means = nn.ModuleDict({"early": TokenMean(), "late": TokenMean()})
        self.hand = Hand()
        self.knowledge = knowledge(classes, dims[3])
        merged = last + 2 * dims[3]
        self.heads = nn.ModuleDict(
            {
                "early": nn.Linear(dims[2], classes),
                "late": nn.Linear(2 * dims[3], classes),
                "maps": nn.Identity(),
                "merged": nn.Sequential(nn.BatchNorm1d(merged), nn.Linear(merged, classes)),
            }
        )
        # At first the maps are what the CNN was trained to see: what they read from tokens begins at nothing.
        for reading in (*(exchange.z2x for exchange in self.exchanges), self.last_z2x):
            if isinstance(reading, CrossAttention):
                for layer in (reading.attention.o_proj, reading.mlp.fc2):
                    nn.init.zeros_(layer.weight)
                    nn.init.zeros_(layer.bias)
        self.seen: dict[str, torch.Tensor] = {}  # of the forward pass under way

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The input as it is: a model that calls all its children in turn (nn.Sequential) calls this one too."""
        return x

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, which take nothing of a forward pass along."""
        return {**self.__dict__, "seen": {}}

    def host_exits(self) -> tuple[OwnExit, ...]:
        """The exits in front of the merged answer, and what is carried on behind each (lissom.layers.exits)."""
        # As in the ready networks, the mean of z is carried: OpenVINO's int8 kernels need it.
        fourth = tuple(f"{NAME}.{path}" for path in ("exchanges.3.self_attention", "means.late", "heads.late"))
        third = tuple(f"{NAME}.{path}" for path in ("exchanges.2.z2x", "exchanges.2.self_attention", "heads.early"))
        return (
            OwnExit(f"{NAME}.heads.early", third),
            OwnExit(f"{NAME}.heads.late", (f"{NAME}.exchanges.3.z2x", *fourth)),
            OwnExit(f"{NAME}.heads.maps", (f"{NAME}.hand", *fourth)),
        )

    def meet(self, number: int, x: torch.Tensor) -> torch.Tensor:
        """The map (B, C, H, W) that a stage reads, having met the tokens."""
        seen = self.seen
        z = self.latent.expand(len(x), -1, -1) if number == 0 else seen["z"]
        x, seen["z"] = self.exchanges[number](x, z)
        if number == 2:
            seen["early"] = self.heads["early"](self.means["early"](seen["z"]))
        elif number == 3:
            seen["mean"] = self.means["late"](seen["z"])
            seen["late"] = self.heads["late"](told(self.knowledge, "early", seen["mean"], seen["early"]))
        return x

    def merge(self, answer: torch.Tensor) -> torch.Tensor:
        """The merged answer, and the CNN's own, ``answer``, handed on."""
        seen = self.seen
        self.heads["maps"](answer)
        x = read_tokens(self.last_z2x, seen["map"], seen["z"])
        both = torch.cat((x.mean((2, 3)), seen["mean"]), 1)
        return self.heads["merged"](told(self.knowledge, "late", both, seen["late"]))


class _Begin:
    """Hook before the model's forward pass: what is left of a pass that failed, or of a module run alone, is gone."""

    def __init__(self, branch: LatentBranch) -> None:
        self.branch = branch

    def __call__(self, module: nn.Module, inputs: Any) -> None:
        self.branch.seen.clear()


class _Meet:
    """Forward hook of the module whose output a stage reads. A class, so that a copy of the model has its own hooks."""

    def __init__(self, branch: LatentBranch, number: int) -> None:
        self.branch, self.number = branch, number

    def __call__(self, module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        if self.number < STAGES:
            return self.branch.meet(self.number, output)
        self.branch.seen["map"] = self.branch.hand(output)
        return output


class _Merge:
    """Forward hook of the model: its answer becomes the merged one."""

    def __init__(self, branch: LatentBranch) -> None:
        self.branch = branch

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> torch.Tensor:
        answer = self.branch.merge(own_answer(module, output))
        self.branch.seen.clear()
        return answer


def attach_latent_branch(
    model: nn.Module,
    places: Sequence[str],
    shapes: Sequence[Sequence[int]],
    classes: int,
    *,
    latents: int = 128,
    depths: Sequence[int] = DEPTHS,
    ratio: float = 4.0,
) -> nn.Module:
    """Put an untrained branch beside the model's stages, in place, and return the model; one it had goes first.

    ``places``: paths of the modules that give the inputs of the four stages, and of the one that gives the last
    stage's map; each answers with a map (B, C, H, W) of the sizes in ``shapes``, once a pass, and all of the model's
    computation goes through it. ``classes`` is how many logits the model answers with. Sizes of the branch are as in
    ``lissom.models.dyn_perceiver``; tokens read a map averaged to 7 x 7, or to its own sides where it is smaller.
    Raises ValueError where the model has no such module, something else called ``perceiver``, or sizes do not fit.
    """
    remove_latent_branch(model)
    if hasattr(model, NAME):
        raise ValueError(f"{type(model).__name__} has something else called {NAME!r}; the branch goes by that name")
    modules = dict(model.named_modules())
    if len(set(places)) != STAGES + 1 or len(shapes) != len(places) or not all(len(shape) == 3 for shape in shapes):
        raise ValueError(f"a branch meets the model at {STAGES + 1} places with maps (C, H, W), not at {tuple(places)}")
    for place in places:
        if place not in modules:
            raise ValueError(f"the model has no module {place!r} for the branch to read")
    pools = [min(POOL, height, width) for _, height, width in shapes[:STAGES]]
    branch = LatentBranch(places, [shape[0] for shape in shapes], pools, classes, latents, depths, ratio)
    weight = next(model.parameters(), torch.empty(0))
    model.add_module(NAME, branch.to(weight).train(model.training))
    for number, place in enumerate(places):
        modules[place].register_forward_hook(_Meet(branch, number))
    model.register_forward_pre_hook(_Begin(branch))
    model.register_forward_hook(_Merge(branch))
    return model


def latent_branch_of(model: nn.Module) -> LatentBranch | None:
    """The branch attached to the model, or None."""
    found = getattr(model, NAME, None)
    return found if isinstance(found, LatentBranch) else None


def remove_latent_branch(model: nn.Module) -> nn.Module:
    """Take the branch off again, in place: the model computes what it did."""
    if latent_branch_of(model) is None:
        return model
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key, hook in list(hooks.items()):
                if isinstance(hook, _Begin | _Meet | _Merge):
                    del hooks[key]
    delattr(model, NAME)
    return model
