"""A joint program of torch.export, cut at its boundaries into one program a stage; weights that several stages read lie
in one file beside them."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec, OutputKind, OutputSpec, TensorArgument
from torch.utils import _pytree as pytree

from lissom.errors import NotApplicable
from lissom.export.joint import JointOutputs
from lissom.export.walking import needed

__all__ = ["SHARED", "SMALL", "cut_program", "save_stages"]

SHARED = "shared.safetensors"
SMALL = 1024  # bytes: what is smaller may lie in several stages
HELD = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)


def cut_program(
    program: ExportedProgram, outputs: JointOutputs, nodes: Mapping[str, str]
) -> tuple[list[ExportedProgram], list[list[str]], dict[str, torch.Tensor]]:
    """The stages of a joint program, in order, as programs of their own, with the joint program's very nodes; for each
    stage the names of the weights that it shares with another; and those weights by name.

    Stage 0 takes the input, a later one what its predecessor carried over, one input a tensor; behind them come the
    shared weights. Each stage but the last gives (answer, score, carried...), the last its answer. ``nodes``: node
    name -> module path, for the words of an error. ``program`` must be functional (``run_decompositions``): a cut does
    not see what is written into a tensor in place. Raises NotApplicable where a stage would still need something from
    before its cut, and for a model that changes its own buffers while it answers.
    """
    kinds = {spec.kind for spec in program.graph_signature.output_specs}
    if OutputKind.BUFFER_MUTATION in kinds or OutputKind.PARAMETER_MUTATION in kinds:
        raise NotApplicable("the model changes its own buffers while it answers, which its stages cannot do for it")
    stages = [_Stage(program, stage, outputs, nodes) for stage in range(outputs.exits + 1)]
    weights = [stage.weights() for stage in stages]
    digests = [{name: _digest(tensor) for name, tensor in each.items()} for each in weights]
    counts = Counter(digest for each in digests for digest in set(each.values()))
    shared: dict[str, torch.Tensor] = {}
    names: dict[bytes, str] = {}  # under which a tensor is kept: that of the first stage that reads it
    programs, lists = [], []
    for stage, own, found in zip(stages, weights, digests, strict=True):
        lifted = [name for name, digest in found.items() if counts[digest] > 1]
        for name in lifted:
            shared.setdefault(names.setdefault(found[name], name), own[name])
        programs.append(stage.program(lifted))
        lists.append([names[found[name]] for name in lifted])
    return programs, lists, shared


def save_stages(
    stages: Sequence[ExportedProgram], lists: Sequence[Sequence[str]], shared: dict[str, torch.Tensor], folder: Path
) -> list[dict[str, Any]]:
    """Write what ``cut_program`` gives: ``stage0.pt2``, ``stage1.pt2``, ..., and ``shared.safetensors`` where there is
    something to share. Returns each stage's graph and options for the artifact's plan."""
    written = []
    for number, (stage, names) in enumerate(zip(stages, lists, strict=True)):
        torch.export.save(stage, folder / f"stage{number}.pt2")
        options = {"compile": False, **({"shared": list(names)} if names else {})}
        written.append({"graph": f"stage{number}.pt2", "options": options})
    if shared:
        save_file({name: tensor.detach().clone().contiguous() for name, tensor in shared.items()}, folder / SHARED)
    return written


def _digest(tensor: torch.Tensor) -> bytes:
    plain = tensor.detach().cpu().contiguous()
    raw = plain.view(torch.uint8) if plain.ndim else plain.reshape(1).view(torch.uint8)
    return hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode() + raw.numpy().tobytes()).digest()


class _Stage:
    """The part of a joint program that one stage needs."""

    def __init__(self, program: ExportedProgram, stage: int, outputs: JointOutputs, nodes: Mapping[str, str]) -> None:
        self.joint, self.stage = program, stage
        (end,) = (node for node in program.graph.nodes if node.op == "output")
        specs = program.graph_signature.output_specs
        answers = [node for node, spec in zip(end.args[0], specs, strict=True) if spec.kind == OutputKind.USER_OUTPUT]
        self.wanted = [answers[outputs.answer(stage)]]
        if stage < outputs.exits:
            self.wanted += [answers[outputs.score(stage)], *(answers[place] for place in outputs.boundary(stage))]
        self.held = {spec.arg.name: spec for spec in program.graph_signature.input_specs if spec.kind in HELD}
        inputs = [node for node in program.graph.nodes if node.op == "placeholder" and node.name not in self.held]
        self.given = [answers[place] for place in outputs.boundary(stage - 1)] if stage else inputs
        found = needed(
            self.wanted,
            lambda node: node.all_input_nodes,
            set(self.given) if stage else (),
            set(inputs),
            stage,
            lambda node: nodes.get(node.name, ""),
        )
        places = {node: place for place, node in enumerate(program.graph.nodes)}
        self.own = sorted(found - set(self.given), key=places.__getitem__)

    def weights(self) -> dict[str, torch.Tensor]:
        """The tensors that count as weights, by name, of those this stage reads."""
        targets = [str(self.held[node.name].target) for node in self.own if node.name in self.held]
        found = {name: self._tensor(name) for name in targets}
        return {name: tensor for name, tensor in found.items() if tensor.numel() * tensor.element_size() >= SMALL}

    def _tensor(self, name: str) -> torch.Tensor:
        found = self.joint.state_dict.get(name)
        return self.joint.constants[name] if found is None else found

    def program(self, lifted: Sequence[str]) -> ExportedProgram:
        """The stage alone. The weights of the names ``lifted`` are inputs of it, in this order, behind all others."""
        graph = torch.fx.Graph()
        copies: dict[torch.fx.Node, torch.fx.Node] = {}
        inputs: list[InputSpec] = []
        targets: dict[str, torch.fx.Node] = {}
        for node in self.own:
            spec = self.held.get(node.name)
            if spec is not None and spec.target not in lifted:
                copies[node] = graph.node_copy(node)
                argument = TensorArgument(copies[node].name)
                inputs.append(InputSpec(spec.kind, argument, spec.target, spec.persistent))
            elif spec is not None:
                targets[str(spec.target)] = node
        for number, node in enumerate([*self.given, *(targets[name] for name in lifted)]):
            name = node.name
            if self.stage and number < len(self.given):
                name = f"carried_{self.stage}_{number}"
            fresh = graph.placeholder(name)
            fresh.meta = {"val": node.meta["val"]}
            # Two places of a boundary that are one tensor: it comes twice, and is read once.
            copies.setdefault(node, fresh)
            inputs.append(InputSpec(InputKind.USER_INPUT, TensorArgument(fresh.name), None))
        for node in self.own:
            if node not in copies:
                copies[node] = graph.node_copy(node, copies.__getitem__)
        graph.output(tuple(copies[node] for node in self.wanted))
        outputs = [OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(copies[n].name), None) for n in self.wanted]
        signature = torch.export.ExportGraphSignature(inputs, outputs)
        kept = {spec.target for spec in inputs if spec.target is not None}
        return ExportedProgram(
            root=self.joint.graph_module,
            graph=graph,
            graph_signature=signature,
            state_dict={name: tensor for name, tensor in self.joint.state_dict.items() if name in kept},
            range_constraints={},
            module_call_graph=[_call(signature)],
            example_inputs=(tuple(_example(node) for node in graph.nodes if node.name in signature.user_inputs), {}),
            constants={name: tensor for name, tensor in self.joint.constants.items() if name in kept},
            verifiers=self.joint.verifiers,
        )


def _example(node: torch.fx.Node) -> torch.Tensor:
    """An input as torch.export keeps one: noughts, of which a single one is stored."""
    value = node.meta["val"]
    return torch.zeros(1, dtype=value.dtype).expand(value.shape)


def _call(signature: torch.export.ExportGraphSignature) -> torch.export.ModuleCallEntry:
    """How a stage is called: tensors one by one, and a tuple of them back."""
    inputs = [spec.arg for spec in signature.input_specs if spec.kind == InputKind.USER_INPUT]
    call = torch.export.ModuleCallSignature(
        inputs=list(inputs),
        outputs=[spec.arg for spec in signature.output_specs],
        in_spec=pytree.tree_structure(((0,) * len(inputs), {})),
        out_spec=pytree.tree_structure((0,) * len(signature.output_specs)),
    )
    return torch.export.ModuleCallEntry(fqn="", signature=call)
