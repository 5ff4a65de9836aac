"""The model's own end as the head of an exit: its norm and classifier, run on what an earlier block answered.

An exit behind block l of a stack of L blocks that keep the shape needs no head of its own: h_l can take the place of
h_L. What comes behind h_L is the code of somebody's ``forward``, not a module. So that code is run once more, with all
that stands before it silenced: modules that ran before the blocks answer from memory, blocks hand on what they are
given, and the last of them answers h_l. What is computed anew is the end, with the model's own modules and paths.

That holds for any model whose blocks are the children of one container; whether nothing else of what came before
reaches the end is seen in the exported graph (``lissom.export.cuts``).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lissom.errors import LissomError
from lissom.layers.exits import ExitHook, Exits, attach_exits, first_tensor, own_answer

__all__ = ["BlockStack", "OwnEnd", "attach_own_ends", "block_stacks", "first_argument", "own_end_error"]


@dataclass(frozen=True)
class BlockStack:
    """Blocks of one class that follow each other in one container and keep the shape of the tensor they hand on.

    ``paths``: theirs, in order. ``shape``: one sample's tensor. ``before``: the outermost modules that have answered
    when the first block begins. ``first``: which child of the container the first block is. ``beside``: what a block
    answers behind that tensor, no tensors, where it answers with a tuple; None where it answers with the tensor.
    """

    paths: tuple[str, ...]
    shape: tuple[int, ...]
    before: tuple[str, ...] = ()
    first: int = 0
    beside: tuple[Any, ...] | None = None

    def answer(self, h: Any) -> Any:
        """``h`` in the form that a block answers in."""
        return h if self.beside is None else (h, *self.beside)


@dataclass
class _Call:
    """A module's calls in one forward pass: when the first began and ended, how many, and what it took and gave."""

    begun: int
    ended: int = -1
    count: int = 0
    given: Any = None
    answered: Any = None

    @property
    def shape(self) -> torch.Size | None:
        """The shape of the tensor that it took and gave; None where it ran more than once, or the two differ."""
        given, answered = self.given, first_tensor(self.answered)
        if self.count != 1 or answered is None or not isinstance(given, torch.Tensor):
            return None
        return given.shape if given.shape == answered.shape and given.ndim > 1 else None

    @property
    def beside(self) -> tuple[Any, ...] | None:
        return tuple(self.answered[1:]) if isinstance(self.answered, tuple) else None


@torch.no_grad()
def block_stacks(model: nn.Module, x: torch.Tensor) -> list[BlockStack]:
    """All stacks of at least two blocks that ``model`` has for an input like ``x`` (B, C, H, W), seen in one forward
    pass in evaluation mode; of a container's runs of blocks all that are that long."""
    calls: dict[str, _Call] = {}
    clock = 0
    modules = dict(model.named_modules())
    training = {name: module.training for name, module in modules.items()}

    def begin(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            nonlocal clock
            clock += 1
            call = calls.setdefault(path, _Call(clock))
            call.count += 1
            call.given = first_argument(args, kwargs)

        return hook

    def end(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            nonlocal clock
            clock += 1
            calls[path].ended = clock if calls[path].ended < 0 else calls[path].ended
            calls[path].answered = output

        return hook

    handles = []
    try:
        model.eval()
        for path, module in modules.items():
            handles.append(module.register_forward_pre_hook(begin(path), with_kwargs=True))
            handles.append(module.register_forward_hook(end(path)))
        model(x)
    finally:
        for handle in handles:
            handle.remove()
        for name, module in modules.items():
            module.training = training[name]
    found = []
    for path, module in modules.items():
        if isinstance(module, nn.ModuleList | nn.Sequential):
            names = [f"{path}.{name}".lstrip(".") for name, _ in module.named_children()]
            for first, run in _runs(names, modules, calls):
                shape = calls[run[0]].shape
                assert shape is not None
                before = _before(calls, calls[run[0]].begun)
                found.append(BlockStack(tuple(run), tuple(shape[1:]), before, first, calls[run[-1]].beside))
    return found


def _runs(
    names: Sequence[str], modules: Mapping[str, nn.Module], calls: Mapping[str, _Call]
) -> Iterator[tuple[int, list[str]]]:
    """The longest runs of at least two children that may be one stack, each with the number of its first."""
    run: list[str] = []
    for number, name in enumerate([*names, ""]):
        fits = name in calls and calls[name].shape is not None
        if fits and run:
            last, here = calls[run[-1]], calls[name]
            fits = (
                last.shape == here.shape
                and last.ended < here.begun
                and last.beside == here.beside
                and type(modules[name]) is type(modules[run[-1]])
            )
            if not fits and len(run) > 1:
                yield number - len(run), run
            run = [*run, name] if fits else [name]
        else:
            if len(run) > 1:
                yield number - len(run), run
            run = [name] if fits else []


def _before(calls: Mapping[str, _Call], begun: int) -> tuple[str, ...]:
    done = [path for path, call in calls.items() if path and 0 <= call.ended < begun]
    return tuple(p for p in done if not any(p.startswith(f"{other}.") for other in done))


def first_argument(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What a module is called with first, by place or by name; None where it is called with nothing."""
    return args[0] if args else next(iter(kwargs.values()), None)


class _Pass:
    """One forward pass of a model, as far as its end is run again: its arguments, and what modules before the blocks
    answered. Shared by all exits of a model and by the hooks that fill it."""

    def __init__(self, model: nn.Module, stack: BlockStack) -> None:
        self.model, self.stack = model, stack
        self.clear()

    def clear(self) -> None:
        self.arguments: tuple[Any, ...] | None = None
        self.answered: dict[str, list[Any]] = {path: [] for path in self.stack.before}

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, which take nothing of a forward pass along."""
        return {**self.__dict__, "arguments": None, "answered": {path: [] for path in self.stack.before}}

    def end(self, h: torch.Tensor) -> torch.Tensor:
        """What the model answers where its last block answers ``h``."""
        if self.arguments is None:
            raise LissomError("a model's own end runs within a forward pass of the model only")
        with _silent(self.model, self.stack, self.answered, h):
            # Not the call, whose hooks are those of exits.
            output = self.model.forward(*self.arguments)
        return own_answer(self.model, output)


@contextmanager
def _silent(
    model: nn.Module, stack: BlockStack, answered: Mapping[str, Sequence[Any]], h: torch.Tensor
) -> Iterator[None]:
    """Within it no hook runs, modules before the stack answer what they answered, blocks hand on their input, and the
    last block answers ``h``."""
    modules = dict(model.named_modules())

    def handed_on(*args: Any, **kwargs: Any) -> Any:
        return stack.answer(first_argument(args, kwargs))

    forwards: dict[str, Callable[..., Any]] = dict.fromkeys(stack.paths[:-1], handed_on)
    forwards[stack.paths[-1]] = lambda *args, **kwargs: stack.answer(h)
    for path, outputs in answered.items():
        forwards[path] = _again(outputs, modules[path].forward)
    hooks = [(module, module._forward_pre_hooks, module._forward_hooks) for module in modules.values()]
    # A forward of the module's own, beside its class's, stands in its dict; ours stands there meanwhile.
    own = {path: modules[path].__dict__.get("forward") for path in forwards}
    try:
        for module, *_ in hooks:
            module._forward_pre_hooks, module._forward_hooks = OrderedDict(), OrderedDict()
        for path, forward in forwards.items():
            modules[path].__dict__["forward"] = forward
        yield
    finally:
        for path, before in own.items():
            modules[path].__dict__.pop("forward", None)
            if before is not None:
                modules[path].__dict__["forward"] = before
        for module, ahead, behind in hooks:
            module._forward_pre_hooks, module._forward_hooks = ahead, behind


def _again(outputs: Sequence[Any], forward: Callable[..., Any]) -> Callable[..., Any]:
    """Answers ``outputs`` one after the other; then, for a module that the end uses too, as ``forward`` does."""
    left = iter(outputs)
    nothing = object()

    def answer(*args: Any, **kwargs: Any) -> Any:
        output = next(left, nothing)
        return forward(*args, **kwargs) if output is nothing else output

    return answer


class OwnEnd(nn.Module):
    """The head of an exit that has no parameters of its own: a block's output (B, ...) to the model's own answer."""

    def __init__(self, running: _Pass) -> None:
        super().__init__()
        self.running = running

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return self.running.end(h)


class _Begin(ExitHook):
    """Hook before the model's forward pass."""

    def __init__(self, running: _Pass) -> None:
        self.running = running

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self.running.clear()
        self.running.arguments = inputs


class _Remember(ExitHook):
    """Forward hook of a module before the blocks."""

    def __init__(self, running: _Pass, path: str) -> None:
        self.running, self.path = running, path

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self.running.answered[self.path].append(output)


class _Forget(ExitHook):
    """Forward hook of the model, behind that of the exits: tensors of a pass that is over are let go."""

    def __init__(self, running: _Pass) -> None:
        self.running = running

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self.running.clear()


def attach_own_ends(model: nn.Module, stack: BlockStack, positions: Sequence[str]) -> nn.Module:
    """Make ``model`` answer behind the blocks ``positions`` of ``stack`` too, in place, by its own end; return it.

    The answers keep their gradients, which reach into blocks and end. ``lissom.layers.exits.remove_exits`` takes all of
    it off again. Raises ValueError for a position that is no block of the stack, or its last, which answers already.
    """
    for position in positions:
        if position not in stack.paths[:-1]:
            raise ValueError(f"{position!r} is none of the blocks that have another behind them: {stack.paths[:-1]}")
    running = _Pass(model, stack)
    ordered = [path for path in stack.paths if path in set(positions)]
    attach_exits(model, Exits(ordered, [OwnEnd(running) for _ in ordered], detached=False))
    model.register_forward_pre_hook(_Begin(running))
    for path in stack.before:
        model.get_submodule(path).register_forward_hook(_Remember(running, path))
    model.register_forward_hook(_Forget(running))
    return model


@torch.no_grad()
def own_end_error(model: nn.Module, stack: BlockStack, x: torch.Tensor) -> float:
    """How far the model's answer to ``x`` (B, C, H, W) is from its own end's on what its last block answered: largest
    difference over largest answer. The model has no exits. Raises whatever its forward pass raises in that mode."""
    running = _Pass(model, stack)
    found: dict[str, torch.Tensor] = {}
    handles = [model.register_forward_pre_hook(_Begin(running))]
    for path in stack.before:
        handles.append(model.get_submodule(path).register_forward_hook(_Remember(running, path)))

    def last(module: nn.Module, inputs: Any, output: Any) -> None:
        h = first_tensor(output)
        assert h is not None  # a block of a stack
        found["h"] = h

    def compare(module: nn.Module, inputs: Any, output: Any) -> None:
        found["answer"] = own_answer(module, output)
        found["again"] = running.end(found["h"])

    handles.append(model.get_submodule(stack.paths[-1]).register_forward_hook(last))
    handles.append(model.register_forward_hook(compare))
    try:
        model(x)
    finally:
        for handle in handles:
            handle.remove()
    difference = (found["answer"] - found["again"]).abs().max()
    return float(difference / found["answer"].abs().max().clamp_min(1e-12))
