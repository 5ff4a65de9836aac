"""token_clustering: from some block on, a transformer runs on centres of its tokens, untrained; Expedit (2210.01035).

No weight changes and nothing is trained: after ``after`` blocks the grid of patch tokens is replaced by a smaller grid
of centres, the rest of the network runs on those, and where the answer is a map the tokens are rebuilt behind the last
block (``lissom.layers.token_clustering``). Attached by hooks: modules and their paths stay. A block on n tokens of
width d costs 12 d^2 n + 2 d n^2 multiplications, the clustering itself up to 2 iterations N M d.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import nn

from lissom.errors import NotApplicable
from lissom.export.capture import clone
from lissom.export.plan import Plan
from lissom.layers.token_clustering import (
    AUTO,
    NAME,
    TokenBlocks,
    attach_token_clusters,
    find_token_blocks,
    token_clusters_of,
)
from lissom.registry import register
from lissom.runtime.target import Target
from lissom.tasks.task import Task
from lissom.techniques.base import Technique

__all__ = ["ClusterTokens"]

DEPTHS = (1 / 6, 1 / 3, 1 / 2, 2 / 3)
SHARES = (0.25, 0.36, 0.5, 0.75)
# Names under which attention keeps what belongs to places of one grid.
POSITIONS = ("rel_pos", "relative_position", "relative_coords", "shared_rel_pos", "rel_indices", "rope", "rotary")


@register("technique", "token_clustering")
@dataclass(frozen=True)
class ClusterTokens(Technique):
    """Run the later blocks of a vision transformer on fewer tokens.

    ``after``: how many blocks see all tokens (None: a third of them, at least one). ``grid``: (rows, columns) of the
    centres (None: about half as many as tokens, in the same proportions). ``iterations`` and ``window`` (centres
    across, odd) of the clustering, ``temperature`` of both layers: a number for features as the model has them, or
    "auto", from each image's own spread. ``k``: how many centres a rebuilt token is made of at most (0: all, which is
    cheaper on a processor). ``reconstruct``: whether tokens are rebuilt behind the last block; a module's path: its
    output is rebuilt instead, as the published Segmenter does with its decoder's logits; None: behind the last block
    where the task is segmentation, else not. Rebuilt tokens are weighted means: weights sum to 1, and their L2 norm is
    not 1 as in the published code, so that magnitudes stay.
    """

    name: ClassVar[str] = "token_clustering"
    stage: ClassVar[str] = "tokens"

    after: int | None = None
    grid: tuple[int, int] | None = None
    iterations: int = 5
    window: int = 5
    temperature: float | str = AUTO
    k: int = 20
    reconstruct: bool | str | None = None

    def __post_init__(self) -> None:
        pair = isinstance(self.grid, tuple) and len(self.grid) == 2 and all(_count(side, 1) for side in self.grid)
        for wrong, sentence in (
            (self.after is not None and not _count(self.after, 1), f"after is a number of blocks, not {self.after!r}"),
            (self.grid is not None and not pair, f"grid is (rows, columns), as in grid=(10, 10), not {self.grid!r}"),
            (not _count(self.iterations, 0), f"iterations is 0 or more, not {self.iterations!r}"),
            (not _count(self.window, 1) or self.window % 2 == 0, f"window is an odd number, not {self.window!r}"),
            (not _count(self.k, 0), f"k is 0 (all centres) or more, not {self.k!r}"),
            (
                self.temperature != AUTO and not (_number(self.temperature) and float(self.temperature) > 0),
                f"temperature is a number above 0 or 'auto', not {self.temperature!r}",
            ),
            (
                not (self.reconstruct is None or isinstance(self.reconstruct, bool | str)),
                f"reconstruct is True, False or a module's path, not {self.reconstruct!r}",
            ),
        ):
            if wrong:
                raise ValueError(sentence)

    def check(self, plan: Plan, target: Target) -> None:
        if len(plan.stages) != 1 or plan.decisions:
            raise NotApplicable("token_clustering comes before exits and cascades: it changes one whole model")
        self._fitting(plan)

    def apply(self, plan: Plan, task: Task) -> Plan:
        """The plan with a clustered copy of the model, run once on zeros of the task's shape.

        Raises NotApplicable where the tokens are no grid at that shape, or the model's answer changes its shape.
        """
        blocks = self._fitting(plan)
        model = clone(plan.model)
        seen: list[torch.Size] = []
        first = model.get_submodule(blocks.paths(model)[0])
        handle = first.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape))
        try:
            before = _shape_of_answer(model, task.shape)
        finally:
            handle.remove()
        blocks = _at(blocks, seen[0] if seen else torch.Size(()), task.shape)
        after, grid = self._knobs(blocks)
        wanted = task.kind == "segmentation" if self.reconstruct is None else self.reconstruct
        try:
            attach_token_clusters(
                model, after, grid, iterations=self.iterations, window=self.window, temperature=self.temperature,
                k=self.k, reconstruct=wanted, blocks=blocks,
            )  # fmt: skip
            changed = _shape_of_answer(model, task.shape)
        except Exception as error:  # a user's forward fails in its own way on fewer tokens
            line = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise NotApplicable(
                f"token_clustering: the model does not run on {grid[0]} x {grid[1]} tokens ({line}){_hint(wanted)}"
            ) from error
        if changed != before:
            raise NotApplicable(
                f"token_clustering: the model's answer would be {changed} and not {before}{_hint(wanted)}"
            )
        (rows, columns), where = blocks.grid, ""
        if wanted:
            where = ", rebuilt " + (f"in the output of {wanted}" if wanted is not True else "behind the last block")
        # Distances of raw features, and their softmax, have no ranges that 8 bits could serve.
        precision = replace(plan.precision, bits={**plan.precision.bits, NAME: 32})
        return plan.with_precision(precision).with_model(
            model,
            f"token_clustering: {rows} x {columns} tokens become {grid[0]} x {grid[1]} after {after} of "
            f"{blocks.count} blocks{where}",
        )

    def training_form(self, places: tuple[str, ...] = ()) -> None:
        """It changes no weight: what is trained is trained on all tokens, once for every clustering."""

    @classmethod
    def space(cls, plan: Plan, target: Target) -> Mapping[str, Sequence[Any]]:
        blocks = find_token_blocks(plan.model)
        if blocks is None or blocks.count < 2:
            return {}
        blocks = _sized(blocks, plan.shape)
        depths = {min(max(1, round(share * blocks.count)), blocks.count - 1) for share in DEPTHS}
        grids = {_smaller(blocks.grid, share) for share in SHARES} - {blocks.grid}
        return {"after": tuple(sorted(depths)), "grid": tuple(sorted(grids))}

    def _fitting(self, plan: Plan) -> TokenBlocks:
        """The model's blocks; NotApplicable where they cannot run on centres."""
        model = plan.model
        blocks = find_token_blocks(model)
        if blocks is None:
            raise NotApplicable(
                "token_clustering needs a vision transformer with a list of blocks over a grid of patch tokens, as "
                f"timm's, transformers' ViT and DINOv2 and torchvision's have; {type(model).__name__} has none that is "
                "known"
            )
        if token_clusters_of(model) is not None:
            raise NotApplicable("the model's tokens are clustered already; once is enough")
        blocks = _sized(blocks, plan.shape)
        after, _ = self._knobs(blocks)
        for reason in _obstacles(model, blocks, after):
            raise NotApplicable(f"token_clustering: {reason}")
        if isinstance(self.reconstruct, str) and self.reconstruct not in dict(model.named_modules()):
            raise NotApplicable(
                f"token_clustering is to rebuild the output of {self.reconstruct!r}, and the model has no such module; "
                "reconstruct=True takes the last block"
            )
        return blocks

    def _knobs(self, blocks: TokenBlocks) -> tuple[int, tuple[int, int]]:
        after = max(1, blocks.count // 3) if self.after is None else self.after
        if not 1 <= after < blocks.count:
            raise NotApplicable(
                f"token_clustering after {after} of {blocks.count} blocks leaves nothing to save; after=1 to "
                f"{blocks.count - 1} would do"
                if blocks.count > 1
                else "the model has one block, and none after it could run on fewer tokens"
            )
        grid = self.grid or _smaller(blocks.grid, 0.5)
        (rows, columns), (h, w) = blocks.grid, grid
        if h > rows or w > columns or h * w == rows * columns:
            raise NotApplicable(
                f"token_clustering to {h} x {w} centres: the model has {rows} x {columns} tokens; give a smaller grid"
            )
        return after, grid


def _count(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _smaller(grid: tuple[int, int], share: float) -> tuple[int, int]:
    """The grid of the same proportions with about ``share`` of the places."""
    rows, columns = (max(1, round(side * math.sqrt(share))) for side in grid)
    return rows, columns


def _hint(reconstructed: bool | str) -> str:
    return "" if reconstructed is True else "; reconstruct=True rebuilds all tokens behind the last block"


def _obstacles(model: nn.Module, blocks: TokenBlocks, after: int) -> Iterator[str]:
    """Why the blocks from ``after`` on could not run on another grid than the patches'."""
    paths = blocks.paths(model)[after:]
    inside = (
        (f"{path}.{name}".rstrip("."), m) for path in paths for name, m in model.get_submodule(path).named_modules()
    )
    for path, module in ((blocks.owner, model.get_submodule(blocks.owner)), *inside):
        for name in _tensors_and_modules(module):
            if name.startswith(POSITIONS):
                yield (
                    f"attention has positions that belong to the {blocks.grid[0]} x {blocks.grid[1]} grid "
                    f"({f'{path}.{name}'.lstrip('.')}), which centres have none of; a model whose positions are added "
                    "to the tokens at the input would do"
                )
    for path in paths:
        block = model.get_submodule(path)
        window = getattr(block, "window_size", 0)
        if isinstance(window, int) and window > 0:
            yield f"{path} attends within windows of {window} x {window} tokens of the grid; global attention would do"
        try:
            arguments = list(inspect.signature(block.forward).parameters.values())
        except (TypeError, ValueError):
            continue
        needed = [
            a.name for a in arguments if a.default is a.empty and a.kind in (a.POSITIONAL_ONLY, a.POSITIONAL_OR_KEYWORD)
        ]
        if len(needed) != 1:
            yield (
                f"{path} takes {', '.join(needed) or 'nothing by position'}; blocks that take the tokens (B, N, C) "
                "alone would do"
            )


def _tensors_and_modules(module: nn.Module) -> Iterator[str]:
    """The names of a module's own tensors and modules, whatever way it keeps them."""
    for store in (vars(module), module._parameters, module._buffers, module._modules):
        yield from (name for name, value in store.items() if isinstance(value, torch.Tensor | nn.Module))


def _sized(blocks: TokenBlocks, shape: tuple[int, ...]) -> TokenBlocks:
    """``blocks`` with the grid for inputs of ``shape`` (C, H, W); as built where nobody said a shape."""
    if len(shape) != 3:
        return blocks
    return replace(blocks, grid=(shape[1] // blocks.patch[0], shape[2] // blocks.patch[1]))


def _at(blocks: TokenBlocks, tokens: torch.Size, shape: tuple[int, ...]) -> TokenBlocks:
    """``blocks`` as they are for inputs of ``shape``, where the first of them sees ``tokens``.

    A model that resizes its position embeddings has another grid than it was built for, and a model may join its class
    token behind its blocks.
    """
    if len(tokens) != 3:
        raise NotApplicable(
            f"token_clustering: the first block sees a tensor of shape {tuple(tokens)}; tokens (B, N, C) would do"
        )
    grids = [blocks.grid]
    if len(shape) == 3:
        height, width = shape[1:]
        down, across = blocks.patch
        grids += [(height // down, width // across), (math.ceil(height / down), math.ceil(width / across))]
    for rows, columns in grids:
        for prefix in (blocks.prefix, 0):
            if tokens[1] == prefix + rows * columns:
                return replace(blocks, grid=(rows, columns), prefix=prefix)
    raise NotApplicable(
        f"token_clustering: {tokens[1]} tokens, {blocks.prefix} of them special, are not one for each patch of "
        f"{grids[-1][0]} x {grids[-1][1]}"
    )


@torch.no_grad()
def _shape_of_answer(model: nn.Module, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    answer = model(torch.zeros(1, *shape))
    return tuple(answer.shape) if isinstance(answer, torch.Tensor) else None
