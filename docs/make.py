"""Write docs/parts/: a page for every registered part, from its file's docstring and its knobs.

``python docs/make.py`` writes; ``python docs/make.py --check`` writes nothing and ends with 1 where a page is stale,
missing or left over. The files are read as text, never imported: this needs no torch, and a page does not depend on
the versions installed.
"""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Sequence
from pathlib import Path

from lissom.cli.listing import TITLES
from lissom.registry import KINDS, Part, parts

PAGES = Path(__file__).parent / "parts"
ROOT = Path(__file__).parent.parent


def pages() -> dict[Path, str]:
    """What docs/parts/ should hold: path below it -> text."""
    found = {Path(part.kind, f"{part.name}.md"): page(part) for part in parts()}
    return {Path("README.md"): index(parts()), **found}


def index(known: Sequence[Part]) -> str:
    """The list of all parts with links."""
    lines = ["# Parts", "", "Written by `make docs` from the parts' own docstrings; edit those.", ""]
    for kind in KINDS:
        rows = [part for part in known if part.kind == kind]
        if rows:
            lines += [f"## {TITLES[kind]}", "", *(f"- [{p.name}]({kind}/{p.name}.md): {p.summary}" for p in rows), ""]
    return "\n".join(lines)


def page(part: Part) -> str:
    """One part's page: what its file says, what the part itself says, its knobs or arguments, how it is used."""
    source = ROOT.joinpath(*part.module.split("."))
    source = source / "__init__.py" if source.is_dir() else source.with_suffix(".py")
    tree = ast.parse(source.read_text(encoding="utf-8"))
    node = _registered(tree, part)
    lines = [f"# {part.name}", "", f"{TITLES[part.kind]} · `{source.relative_to(ROOT).as_posix()}`", ""]
    lines += [_prose(ast.get_docstring(tree)), ""]
    own = _prose(ast.get_docstring(node))
    if own:
        lines += [f"## {node.name}", "", own, ""]
    rows = _fields(node) if isinstance(node, ast.ClassDef) else _arguments(node)
    if rows:
        heading = "Knobs" if part.kind in ("technique", "method") else "Arguments"
        lines += [f"## {heading}", "", "| name | type | default |", "| --- | --- | --- |"]
        lines += [f"| `{name}` | {_cell(kind)} | {_cell(default)} |" for name, kind, default in rows]
        lines += [""]
    usage = _usage(part)
    if usage:
        lines += ["## Use", "", "```", usage, "```", ""]
    return "\n".join(lines)


def _usage(part: Part) -> str:
    if part.kind == "technique":
        return f'lissom slim MODEL --data DATA --recipe "{part.name}()"'
    if part.kind == "proof":
        return f"lissom reproduce {part.name}"
    if part.kind == "network":
        return f'lissom.create_model("{part.name}")'
    return ""


def _registered(tree: ast.Module, part: Part) -> ast.ClassDef | ast.FunctionDef:
    """The class or function that the part's decorator stands on."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            for decorator in node.decorator_list:
                if part.kind == "network":
                    if ast.unparse(decorator) == "register_model" and node.name == part.name:
                        return node
                elif ast.unparse(decorator) == f"register({part.kind!r}, {part.name!r})":
                    return node
    raise SystemExit(f"{part.module} holds no {part.kind} {part.name!r} at its top level")


def _fields(node: ast.ClassDef) -> list[tuple[str, str, str]]:
    """Name, type and default of a dataclass's own fields; class variables and private names are none."""
    rows = []
    for item in node.body:
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
            kind = ast.unparse(item.annotation)
            if not kind.startswith("ClassVar") and not item.target.id.startswith("_"):
                rows.append((item.target.id, kind, ast.unparse(item.value) if item.value else ""))
    return rows


def _arguments(node: ast.FunctionDef) -> list[tuple[str, str, str]]:
    """Name, type and default of a function's arguments."""
    plain = [*node.args.posonlyargs, *node.args.args]
    defaults: list[ast.expr | None] = [*[None] * (len(plain) - len(node.args.defaults)), *node.args.defaults]
    every = [*zip(plain, defaults, strict=True), *zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)]
    return [
        (arg.arg, ast.unparse(arg.annotation) if arg.annotation else "", ast.unparse(default) if default else "")
        for arg, default in every
    ]


def _prose(docstring: str | None) -> str:
    """A docstring as Markdown: a line that announces a block of code ends with one colon."""
    lines = inspect.cleandoc(docstring or "").splitlines()
    return "\n".join(line[:-1] if line.endswith("::") else line for line in lines)


def _cell(code: str) -> str:
    return "`" + code.replace("|", "\\|") + "`" if code else ""


def main(arguments: Sequence[str]) -> int:
    wanted = pages()
    there = {path.relative_to(PAGES): path for path in PAGES.rglob("*.md")}
    stale = sorted(
        {p for p, text in wanted.items() if p not in there or there[p].read_text(encoding="utf-8") != text}
        | there.keys() - wanted.keys()
    )
    if list(arguments) == ["--check"]:
        for path in stale:
            print(f"docs/parts/{path.as_posix()} is not what the docstrings say: make docs")
        return 1 if stale else 0
    if arguments:
        print("usage: python docs/make.py [--check]", file=sys.stderr)
        return 2
    for path in stale:
        if path not in wanted:
            there[path].unlink()
            continue
        (PAGES / path).parent.mkdir(parents=True, exist_ok=True)
        (PAGES / path).write_text(wanted[path], encoding="utf-8")
    print(f"{len(wanted)} pages in docs/parts/, {len(stale)} of them written anew or removed")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
