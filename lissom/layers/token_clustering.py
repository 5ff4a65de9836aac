"""Token clustering and reconstruction: a vision transformer's middle blocks run on fewer tokens, without training.

Expedit, "Expediting Large-Scale Vision Transformer for Dense Prediction without Fine-tuning" (arXiv 2210.01035). After
some blocks the H x W grid of tokens is replaced by h x w cluster centres (a local soft k-means that keeps the grid's
order); the next blocks run on the centres; reconstruction then makes H x W tokens again, each a weighted sum of refined
centres. Neither layer has parameters. ``attach_token_clusters`` puts both on a transformer as it stands, by hooks.

Shapes: B images, C channels, N = H W tokens and M = h w centres, both in row-major order.

What is computed here differs from the published code in how, not in what. Softmax over the centres does not see
|x|^2, so that is never computed. A token may reach only the centres of a few grid rows, so rows of tokens are compared
with those (bands), and not with all M. Measured in OpenVINO in float32 on one busy AVX2 core, five iterations, as one
product with all centres and in bands: 14 x 14 to 10 x 10 tokens of 384 channels 3.2 and 2.6 ms; 24 x 24 to 16 x 16 of
96 channels 6.1 and 2.9 ms (a transformer block on the 576 tokens: 3.7 ms); 40 x 40 to 28 x 28 of 1,024 channels 412
and 236 ms (a block on the 1,600: 805 ms). Gathering each token's own window would multiply least, but it copies
window^2 centres a token, and gathers count as reference kernels there.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional

__all__ = [
    "TokenBlocks",
    "TokenClustering",
    "TokenClusters",
    "TokenReconstruction",
    "attach_token_clusters",
    "find_token_blocks",
    "remove_token_clusters",
    "token_clusters_of",
    "token_grid",
]

Grid = tuple[int, int]

AUTO = "auto"
# temperature="auto": these over a mean squared distance (see the classes).
CLUSTERING_FACTOR = 5.0
RECONSTRUCTION_FACTOR = 5.0
FAR = -1e16  # added to the logit of a centre outside a token's window
FLOOR = 1e-5  # of the mean squared norm: a mean squared distance below it is rounding, not spread


class TokenClustering(nn.Module):
    """Tokens (B, N, C) of the grid ``grid_in`` to cluster centres (B, M, C) of the grid ``grid_out``.

    The centres start as averages (adaptive average pooling). Then ``iterations`` times, with D the squared distance:
    A = softmax over the centres of -``temperature`` D, and s_m = sum_n A_nm x_n / sum_n A_nm. Token n takes part in
    the softmax with those centres only whose row and column differ by at most (``window`` - 1) / 2 from those of its
    home, the centre that nearest interpolation of the small grid puts in its place. ``iterations=0`` is pooling.

    A larger temperature is a harder assignment. It multiplies squared distances of features as they are, so it depends
    on the model. ``"auto"``: for every image, 5 / mean_n |x_n - s_home(n)|^2 with the first centres: in the graph, no
    data needed. The factor, and the reconstruction's, were tried from 0.5 to 20 on one small segmenter of 144 tokens
    (``lissom.proofs.expedit``'s, at three depths and two grids): from 2 on nothing matters (0.2 points of mIoU lost or
    less, where pooling loses 3 to 6), and 0.5 for both loses 6. Larger models have not been tried.

    Gradients pass through the last weighted mean, and not through A, as published. Raises ValueError where a grid, the
    window or the temperature makes no sense, or the input has another number of tokens than ``grid_in``.
    """

    def __init__(
        self,
        grid_in: Grid,
        grid_out: Grid,
        iterations: int = 5,
        temperature: float | str = 0.02,
        window: int = 5,
    ) -> None:
        super().__init__()
        self.grid_in, self.grid_out = _pair(grid_in), _pair(grid_out)
        (rows_in, columns_in), (rows, columns) = self.grid_in, self.grid_out
        if not (1 <= rows <= rows_in and 1 <= columns <= columns_in):
            raise ValueError(f"a grid of {rows_in} x {columns_in} tokens has no {rows} x {columns} clusters")
        if iterations < 0:
            raise ValueError(f"{iterations} iterations; 0 (average pooling) is the least")
        if window < 1 or window % 2 == 0:
            raise ValueError(f"a window of {window} centres has no middle; give an odd one")
        self.iterations, self.window, self.temperature = iterations, window, _temperature(temperature)

        home_row, home_column = _home(rows_in, rows), _home(columns_in, columns)
        reach = window // 2
        self.bands, self.band_rows, first = _bands(home_row, rows, columns_in, columns, reach)
        # The rows of centres that each band of tokens is compared with: (bands, band_rows).
        near = first[:, None] + torch.arange(self.band_rows)
        far_rows = (home_row.view(self.bands, -1, 1, 1, 1) - near.view(self.bands, 1, 1, -1, 1)).abs() > reach
        far_columns = (home_column.view(1, 1, -1, 1, 1) - torch.arange(columns)).abs() > reach
        far = far_rows | far_columns  # (bands, token rows of a band, W, band_rows, w)
        far = far.reshape(self.bands, rows_in * columns_in // self.bands, self.band_rows * columns)
        self._constant("bias", torch.zeros(far.shape).masked_fill(far, FAR))
        self._constant("pool_rows", _pool(rows_in, rows))  # (h, H)
        self._constant("pool_columns", _pool(columns_in, columns))  # (w, W)
        if self.bands > 1:  # rows of centres to bands, and back: products, since gathers and scatters are slow
            self._constant("spread", functional.one_hot(near.flatten(), rows).float())  # (bands * band_rows, h)
        if self.temperature == AUTO:
            self._constant("home_rows", functional.one_hot(home_row, rows).float())  # (H, h)
            self._constant("home_columns", functional.one_hot(home_column, columns).float())  # (W, w)

    def _constant(self, name: str, value: torch.Tensor) -> None:
        # Not in the state dict: weights of the untouched model load, and adding the layer adds no keys.
        self.register_buffer(name, value.contiguous(), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self._check(x)
        # What decides on the affinities carries no gradient.
        frozen = x.detach()
        centres = self.first_centres(frozen if self.iterations else x)
        temperature = self._of_image(frozen, centres)
        bands = self._in_bands(frozen)
        for iteration in range(self.iterations):
            affinity = self._affinity(bands, centres, temperature)  # (B, bands, N / bands, band_rows w)
            last = iteration == self.iterations - 1
            total = affinity.transpose(-1, -2) @ (self._in_bands(x) if last else bands)
            mass = affinity.sum(-2).unsqueeze(-1)
            centres = self._joined(total) / self._joined(mass).clamp_min(1e-16)
        return centres

    def first_centres(self, x: torch.Tensor) -> torch.Tensor:
        """(B, N, C) to (B, M, C): averages over the cells of adaptive average pooling, first rows, then columns."""
        return _separable(x, self.grid_in, self.pool_rows, self.pool_columns)

    def labels(self, x: torch.Tensor, centres: torch.Tensor) -> torch.Tensor:
        """int64 (B, N): the nearest of all centres (B, M, C) to each token, in no window; the first of equal ones."""
        self._check(x)
        return _distances(x, centres).argmin(-1)

    def extra_repr(self) -> str:
        return (
            f"{self.grid_in} to {self.grid_out}, iterations={self.iterations}, temperature={self.temperature}, "
            f"window={self.window}"
        )

    def _check(self, x: torch.Tensor) -> None:
        rows, columns = self.grid_in
        if x.ndim != 3 or x.shape[1] != rows * columns:
            raise ValueError(f"tokens (B, {rows * columns}, C) of a {rows} x {columns} grid are wanted, not {x.shape}")

    def _of_image(self, x: torch.Tensor, centres: torch.Tensor) -> float | torch.Tensor:
        """The temperature: a number, or (B, 1, 1)."""
        if not isinstance(self.temperature, str):
            return self.temperature
        home = _separable(centres, self.grid_out, self.home_rows, self.home_columns)
        return CLUSTERING_FACTOR / _spread(x, (x - home).square().sum(-1, keepdim=True))

    def _in_bands(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(x.shape[0], self.bands, -1, x.shape[-1])

    def _affinity(self, bands: torch.Tensor, centres: torch.Tensor, temperature: float | torch.Tensor) -> torch.Tensor:
        # -temperature |x - s|^2 without |x|^2, which is the same for all centres.
        keys = self._near(2 * temperature * centres)  # (B, bands, band_rows w, C)
        norms = self._near(temperature * centres.square().sum(-1, keepdim=True))
        return (bands @ keys.transpose(-1, -2) - norms.transpose(-1, -2) + self.bias).softmax(-1)

    def _near(self, centres: torch.Tensor) -> torch.Tensor:
        """(B, M, K) to (B, bands, band_rows w, K): the centres that each band may reach."""
        if self.bands > 1:
            centres = self.spread @ centres.reshape(centres.shape[0], self.grid_out[0], -1)
        return centres.reshape(centres.shape[0], self.bands, self.band_rows * self.grid_out[1], -1)

    def _joined(self, parts: torch.Tensor) -> torch.Tensor:
        """(B, bands, band_rows w, K) to (B, M, K): the bands' sums for the same centre added up."""
        batch, channels = parts.shape[0], parts.shape[-1]
        if self.bands > 1:
            parts = self.spread.T @ parts.reshape(batch, self.bands * self.band_rows, -1)
        return parts.reshape(batch, self.grid_out[0] * self.grid_out[1], channels)


class TokenReconstruction(nn.Module):
    """Refined centres (B, M, K) to tokens (B, N, K), with weights from the features before and after clustering.

    W = exp(-``temperature`` |x_n - s_m|^2) over all centres, the entries below a row's ``k``-th largest set to 0 (ties
    stay; ``k=0`` keeps all), each row divided by its norm: "l2" as published, where only a label or a LayerNorm
    follows (a row then sums to between 1 and sqrt(k)), or "l1", weights that sum to 1.

    ``"auto"``: for every image, 5 / mean_n min_m |x_n - s_m|^2. Finding the ``k`` largest can be more than half of
    the time on a processor (24 x 24 tokens, 16 x 16 centres, 96 channels: 3.3 ms, with ``k=0`` 1.3 ms).

    Raises ValueError for settings that make no sense.
    """

    def __init__(self, k: int = 20, temperature: float | str = 0.02, normalize: str = "l2") -> None:
        super().__init__()
        if k < 0:
            raise ValueError(f"k is {k}; give how many centres a token is made of, or 0 for all")
        if normalize not in ("l1", "l2"):
            raise ValueError(f"normalize is 'l1' or 'l2', not {normalize!r}")
        self.k, self.temperature, self.normalize = k, _temperature(temperature), normalize

    def forward(self, refined: torch.Tensor, tokens: torch.Tensor, centres: torch.Tensor) -> torch.Tensor:
        """``tokens`` (B, N, C) and ``centres`` (B, M, C): the clustering's input and output."""
        return self.weights(tokens, centres) @ refined

    def weights(self, tokens: torch.Tensor, centres: torch.Tensor) -> torch.Tensor:
        """The matrix W (B, N, M) that ``forward`` multiplies with."""
        distances = _distances(tokens, centres)
        nearest = distances.amin(-1, keepdim=True)
        temperature: float | torch.Tensor
        if isinstance(self.temperature, str):
            least = (tokens.square().sum(-1, keepdim=True) + nearest).clamp_min(0)
            temperature = RECONSTRUCTION_FACTOR / _spread(tokens, least)
        else:
            temperature = self.temperature
        # Relative to the nearest centre: of large features all of exp(-temperature D) would underflow to 0, and the
        # row's norm takes out the difference.
        weights = (temperature * (nearest - distances)).exp()
        if 0 < self.k < centres.shape[1]:
            weights = weights * (weights >= weights.topk(self.k, -1).values.amin(-1, keepdim=True))
        norm = weights.square().sum(-1, keepdim=True).sqrt() if self.normalize == "l2" else weights.sum(-1, True)
        return weights / norm  # at least 1: the nearest centre's weight

    def extra_repr(self) -> str:
        return f"k={self.k}, temperature={self.temperature}, normalize={self.normalize!r}"


def _pair(grid: Any) -> Grid:
    try:
        rows, columns = (int(side) for side in grid)
    except (TypeError, ValueError):
        raise ValueError(f"a grid is (rows, columns), not {grid!r}") from None
    return rows, columns


def _temperature(value: float | str) -> float | str:
    if value == AUTO:
        return AUTO
    if isinstance(value, str | bool) or not value > 0:
        raise ValueError(f"the temperature is a number above 0 or 'auto', not {value!r}")
    return float(value)


def _pool(inner: int, outer: int) -> torch.Tensor:
    """(outer, inner): one axis of adaptive average pooling, as a matrix."""
    return functional.adaptive_avg_pool1d(torch.eye(inner)[None], outer)[0].T


def _home(inner: int, outer: int) -> torch.Tensor:
    """int64 (inner,): which of ``outer`` places nearest interpolation puts on each of ``inner``."""
    return functional.interpolate(torch.arange(outer).float()[None, None], size=inner, mode="nearest")[0, 0].long()


def _bands(home: torch.Tensor, rows: int, columns_in: int, columns: int, reach: int) -> tuple[int, int, torch.Tensor]:
    """Into how many bands of equal height the rows of tokens are cut; how many rows of centres each is compared with;
    and the first of those, int64 (bands,).

    Of the divisors of the number of rows, the one with the fewest multiplications: those of the two products of tokens
    and centres, and of the two that copy centres to the bands and add the bands up.
    """
    found = []
    for bands in range(1, len(home) + 1):
        if len(home) % bands:
            continue
        edges = home.view(bands, -1)
        first, last = (edges[:, 0] - reach).clamp_min(0), (edges[:, -1] + reach).clamp_max(rows - 1)
        height = int((last - first).max()) + 1 if bands > 1 else rows
        copies = bands * height * rows * columns if bands > 1 else 0
        cost = len(home) * columns_in * height * columns + copies
        found.append((cost, bands, height, first.clamp_max(rows - height)))
    _, bands, height, first = min(found, key=lambda item: item[:2])
    return bands, height, first


def _separable(x: torch.Tensor, grid: Grid, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """x (B, H W, C) to (B, h w, C): multiplied along rows by ``rows`` (h, H), along columns by ``columns`` (w, W)."""
    batch, channels = x.shape[0], x.shape[-1]
    x = rows @ x.reshape(batch, grid[0], grid[1] * channels)
    x = columns @ x.reshape(batch * rows.shape[0], grid[1], channels)
    return x.reshape(batch, rows.shape[0] * columns.shape[0], channels)


def _distances(x: torch.Tensor, centres: torch.Tensor) -> torch.Tensor:
    """(B, N, M): |x_n - s_m|^2 - |x_n|^2, which orders the centres of a token as the distance does."""
    return centres.square().sum(-1).unsqueeze(1) - x @ (2 * centres).transpose(1, 2)


def _spread(x: torch.Tensor, squared: torch.Tensor) -> torch.Tensor:
    """(B, 1, 1): the mean over the tokens of squared distances (B, N, 1), but no less than rounding makes it."""
    floor = FLOOR * x.square().sum(-1, keepdim=True).mean(1, keepdim=True)
    return torch.maximum(squared.mean(1, keepdim=True), floor).clamp_min(1e-30)


# On a transformer as it stands


@dataclass(frozen=True)
class TokenBlocks:
    """Where a model keeps its transformer blocks, and what its tokens are.

    ``path`` is that of the list of ``count`` blocks ("blocks", "encoder.layer"), ``owner`` that of the transformer it
    belongs to ("" for the model itself); ``grid`` (rows, columns) of the patches that the model was built for,
    ``patch`` the pixels of one (rows, columns); ``prefix`` tokens (class, registers) stand before the patches.
    """

    path: str
    count: int
    grid: Grid
    patch: Grid
    prefix: int
    owner: str = ""

    def paths(self, model: nn.Module) -> list[str]:
        """The paths of the blocks in ``model``, in order."""
        return [f"{self.path}.{name}" for name, _ in model.get_submodule(self.path).named_children()]


def find_token_blocks(model: nn.Module) -> TokenBlocks | None:
    """The first list of transformer blocks in the model, by public structure; None where there is none.

    Known are timm's vision transformers (``blocks`` beside a ``patch_embed`` with a ``grid_size``), transformers' ViT,
    DeiT and DINOv2 (``encoder.layer``, in newer versions ``layers``, beside ``embeddings.patch_embeddings``) and
    torchvision's (``encoder.layers`` beside an ``image_size`` and a ``patch_size``), also as a part of a larger model.
    """
    for path, module in model.named_modules():
        for look in (_as_timm, _as_transformers, _as_torchvision):
            found = look(module)
            if found is not None:
                return replace(found, path=f"{path}.{found.path}" if path else found.path, owner=path)
    return None


def _as_timm(module: nn.Module) -> TokenBlocks | None:
    embed = getattr(module, "patch_embed", None)
    grid = getattr(embed, "grid_size", None)
    prefix = getattr(module, "num_prefix_tokens", None)
    if prefix is None:
        prefix = int(isinstance(getattr(module, "cls_token", None), torch.Tensor))
    return _found(module, "blocks", grid, getattr(embed, "patch_size", None), prefix)


def _as_transformers(module: nn.Module) -> TokenBlocks | None:
    embeddings = getattr(module, "embeddings", None)
    patches = getattr(embeddings, "patch_embeddings", None)
    tokens = (getattr(embeddings, name, None) for name in ("cls_token", "distillation_token", "register_tokens"))
    prefix = sum(token.shape[1] for token in tokens if isinstance(token, torch.Tensor))
    return _of_image(module, "encoder.layer", patches, prefix) or _of_image(module, "layers", patches, prefix)


def _as_torchvision(module: nn.Module) -> TokenBlocks | None:
    return _of_image(module, "encoder.layers", module, int(hasattr(module, "class_token")))


def _of_image(module: nn.Module, path: str, described: Any, prefix: int) -> TokenBlocks | None:
    try:
        image, patch = (_sides(getattr(described, name, None)) for name in ("image_size", "patch_size"))
    except ValueError:
        return None
    return _found(module, path, (image[0] // patch[0], image[1] // patch[1]), patch, prefix)


def _sides(value: Any) -> Grid:
    return _pair((value, value) if isinstance(value, int) else value)


def _found(module: nn.Module, path: str, grid: Any, patch: Any, prefix: int) -> TokenBlocks | None:
    blocks: Any = module
    for name in path.split("."):
        blocks = getattr(blocks, name, None)
    if not isinstance(blocks, nn.ModuleList | nn.Sequential) or len(blocks) == 0:
        return None
    try:
        return TokenBlocks(path, len(blocks), _pair(grid), _sides(patch), prefix)
    except ValueError:
        return None


NAME = "token_clusters"


class TokenClusters(nn.Module):
    """What ``attach_token_clusters`` registers on a model, under ``token_clusters``.

    ``after``: how many blocks run before the clustering; ``grid_in``, ``grid_out``: the grid before it and behind;
    ``prefix``: how many tokens in front (class, registers) pass it by; ``rebuilt``: the path of the module whose output
    has all tokens again, or None.
    """

    def __init__(
        self,
        blocks: TokenBlocks,
        after: int,
        clustering: TokenClustering,
        reconstruction: TokenReconstruction | None,
        rebuilt: str | None,
    ) -> None:
        super().__init__()
        self.blocks, self.after, self.rebuilt = blocks, after, rebuilt
        self.grid_in, self.grid_out, self.prefix = clustering.grid_in, clustering.grid_out, blocks.prefix
        self.clustering, self.reconstruction = clustering, reconstruction
        self.seen: dict[str, torch.Tensor] = {}  # tokens and centres of the forward pass under way

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The input as it is: a model that calls all its children in turn (nn.Sequential) calls this one too."""
        return x

    def __getstate__(self) -> dict[str, Any]:
        # A forward pass that stopped early leaves tensors behind, which a copy of the model neither needs nor could
        # copy while they have a gradient.
        return {**self.__dict__, "seen": {}}

    def cluster(self, x: torch.Tensor) -> torch.Tensor:
        """(B, prefix + N, C) to (B, prefix + M, C)."""
        rows, columns = self.grid_in
        if x.ndim != 3 or x.shape[1] != self.prefix + rows * columns:
            raise ValueError(
                f"tokens (B, {self.prefix} + {rows} x {columns}, C) are to be clustered, and {tuple(x.shape)} came: "
                "the image has another size than the clustering was attached for"
            )
        front, tokens = self._split(x)
        centres = self.clustering(tokens)
        if self.reconstruction is not None:
            self.seen = {"tokens": tokens, "centres": centres}
        return centres if front is None else torch.cat((front, centres), 1)

    def rebuild(self, y: torch.Tensor) -> torch.Tensor:
        """(B, M, K), or with the prefix in front, to as many tokens as there were."""
        if self.reconstruction is None or not self.seen:
            raise ValueError(
                f"{self.rebuilt} ran and its tokens were not clustered before in the same forward pass; gradient "
                "checkpointing, which runs blocks again, does not go with token reconstruction"
            )
        tokens, centres = self.seen.pop("tokens"), self.seen.pop("centres")
        count = centres.shape[1]
        if y.ndim != 3 or y.shape[1] not in (count, self.prefix + count):
            raise ValueError(
                f"{self.rebuilt} answers {tuple(y.shape)}; tokens are rebuilt from (B, {count}, K), or with "
                f"{self.prefix} tokens in front"
            )
        front, refined = (None, y) if y.shape[1] == count else self._split(y)
        rebuilt = self.reconstruction(refined, tokens, centres)
        return rebuilt if front is None else torch.cat((front, rebuilt), 1)

    def _split(self, x: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor]:
        if not self.prefix:
            return None, x
        # A split, not two slices: OpenVINO runs slices on a reference kernel, and splits this axis without copying.
        front, tokens = x.split([self.prefix, x.shape[1] - self.prefix], 1)
        return front, tokens


class _Cluster:
    """Forward pre-hook of the block behind the clustering. A class, so that a copy of the model has its own hooks."""

    def __init__(self, clusters: TokenClusters) -> None:
        self.clusters = clusters

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (self.clusters.cluster(inputs[0]), *inputs[1:])


class _Rebuild:
    """Forward hook of the module whose output becomes all tokens again."""

    def __init__(self, clusters: TokenClusters) -> None:
        self.clusters = clusters

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> Any:
        if isinstance(output, tuple):  # a block of transformers may answer with its attention maps
            return (self.clusters.rebuild(output[0]), *output[1:])
        return self.clusters.rebuild(output)


def attach_token_clusters(
    model: nn.Module,
    after: int,
    grid: Grid,
    *,
    iterations: int = 5,
    window: int = 5,
    temperature: float | str = AUTO,
    k: int = 20,
    normalize: str = "l1",
    reconstruct: bool | str = False,
    blocks: TokenBlocks | None = None,
) -> nn.Module:
    """Cluster the model's tokens to ``grid`` before block number ``after`` (from 0), in place, and return the model.

    ``reconstruct``: False, the model goes on with the clusters; True, the last block's output has all tokens again; a
    module's path, that module's output has (the published Segmenter does it to its decoder's logits). Both layers have
    ``temperature``; ``k`` and ``normalize`` are the reconstruction's. ``blocks`` says where the tokens are; None:
    ``find_token_blocks``. The model keeps its class, its modules and their paths, and its state dict. A clustering it
    had is taken off first.

    Raises ValueError where the model has no list of blocks that is known, or the settings do not fit it.
    """
    remove_token_clusters(model)
    blocks = blocks or find_token_blocks(model)
    if blocks is None:
        raise ValueError(f"{type(model).__name__} has no list of transformer blocks with a grid of patches")
    if not 0 <= after < blocks.count:
        raise ValueError(f"clustering after {after} of {blocks.count} blocks; 0 to {blocks.count - 1} can be asked for")
    paths = blocks.paths(model)
    rebuilt = reconstruct if isinstance(reconstruct, str) else paths[-1] if reconstruct else None
    modules = dict(model.named_modules())
    if rebuilt is not None and rebuilt not in modules:
        raise ValueError(f"the model has no module {rebuilt!r} whose output could be rebuilt")
    clustering = TokenClustering(blocks.grid, grid, iterations, temperature, window)
    reconstruction = None if rebuilt is None else TokenReconstruction(k, temperature, normalize)
    clusters = TokenClusters(blocks, after, clustering, reconstruction, rebuilt)
    device = next((p.device for p in model.parameters()), None)
    model.add_module(NAME, clusters.to(device).train(model.training))
    modules[paths[after]].register_forward_pre_hook(_Cluster(clusters))
    if rebuilt is not None:
        modules[rebuilt].register_forward_hook(_Rebuild(clusters))
    return model


def token_clusters_of(model: nn.Module) -> TokenClusters | None:
    """The clustering attached to the model, or None."""
    found = getattr(model, NAME, None)
    return found if isinstance(found, TokenClusters) else None


def remove_token_clusters(model: nn.Module) -> nn.Module:
    """Take the clustering off again, in place: every block sees all tokens."""
    if token_clusters_of(model) is None:
        return model
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key, hook in list(hooks.items()):
                if isinstance(hook, _Cluster | _Rebuild):
                    del hooks[key]
    delattr(model, NAME)
    return model


def token_grid(model: nn.Module, path: str) -> Grid | None:
    """The grid (rows, columns) of the patch tokens that the module at ``path`` answers with, prefix left out.

    ``path`` is a block, a module inside one, or the attached clustering or reconstruction itself. Before a clustering
    that is attached to the model it is the patches' own grid, behind it the clusters'; where tokens are rebuilt, again
    the patches'. None for another path, and for a model without known blocks.
    """
    clusters = token_clusters_of(model)
    blocks = clusters.blocks if clusters is not None else find_token_blocks(model)
    if blocks is None:
        return None
    if clusters is not None and path in (clusters.rebuilt, f"{NAME}.reconstruction"):
        return clusters.grid_in
    if clusters is not None and path == f"{NAME}.clustering":
        return clusters.grid_out
    for number, block in enumerate(blocks.paths(model)):
        if path == block or path.startswith(f"{block}."):
            return blocks.grid if clusters is None or number < clusters.after else clusters.grid_out
    return None
