"""The rules of the house: what imports what, what no file may hold, what every public name and part owes its reader."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lissom
from lissom.registry import KINDS, load_part, parts

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "lissom"
MODULES = sorted(PACKAGE.rglob("*.py"))

# Runs before the code under test: the packages named in BLOCKED cannot be imported, no connection can be opened, and
# names cannot be looked up. Sockets inside the machine are left alone. What was tried is told at the end.
GUARD = """
import atexit, os, socket, sys
tried = []
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in BLOCKED:
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Block())
def hook(event, arguments):
    if event == "socket.connect" and arguments[0].family != socket.AF_UNIX or event == "socket.getaddrinfo":
        tried.append(f"{event} {arguments[1:] if event == 'socket.connect' else arguments[:2]}")
        raise ConnectionRefusedError("no network in this test")
sys.addaudithook(hook)
def report():
    if tried:
        print("NETWORK", *tried, sep="\\n", flush=True)
        os._exit(99)
atexit.register(report)
"""


def python(code: str, home: Path, *, blocked: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Run ``code`` under the guard, in a fresh process with an empty home and none of the switches a shell may set."""
    switches = ("CI", "NNCF_CI", "NNCF_DEV", "TF_BUILD", "JENKINS_URL", "PYTEST_CURRENT_TEST")
    environment = {key: value for key, value in os.environ.items() if key not in switches}
    return subprocess.run(
        [sys.executable, "-c", f"BLOCKED = {blocked!r}\n{GUARD}\n{code}"],
        capture_output=True, text=True, cwd=ROOT, env={**environment, "HOME": str(home)},
    )  # fmt: skip


def tracked() -> list[Path]:
    """The files that git keeps, or would keep."""
    done = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return [ROOT / name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]


HEAVY = ("torch", "torchvision", "timm", "openvino", "nncf", "onnxruntime", "sklearn", "pyarrow", "matplotlib")


def test_import_lissom_needs_no_heavy_package(tmp_path):
    code = "import lissom; assert 'slim' in dir(lissom); print(lissom.__version__, lissom.LissomError.__name__)"
    done = python(code, tmp_path, blocked=HEAVY)
    assert done.stderr == ""
    assert done.stdout.split() == [lissom.__version__, "LissomError"]


def test_the_runtime_needs_numpy_and_the_back_end_only(tmp_path):
    code = (
        "import lissom; load = lissom.load; import lissom.runtime.bench\n"
        "from lissom.runtime.backends import open_graph\n"
        "import numpy; print(open_graph(None, 'openvino', threads=1).run(numpy.ones((1, 1), numpy.float32)))"
    )
    rest = tuple(name for name in HEAVY if name != "openvino")
    done = python(
        code, tmp_path, blocked=(*rest, "typer", "rich", "scipy", "jinja2", "safetensors", "lightning_fabric")
    )
    assert done.stdout.split() == ["[[1.]]"], done.stderr


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["list"], ["list", "technique", "--json"]])
def test_a_quick_answer_imports_nothing_slow(tmp_path, arguments):
    slow = (*HEAVY, "numpy", "scipy", "rich", "pydantic", "jinja2", "PIL")
    done = python(f"from lissom.cli import main; raise SystemExit(main({arguments!r}))", tmp_path, blocked=slow)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_the_guard_guards(tmp_path):
    """The tests above and below stand on it."""
    assert "torch is blocked" in python("import torch", tmp_path, blocked=HEAVY).stderr
    swallowed = "import urllib.request as u\ntry: u.urlopen('http://127.0.0.1:9')\nexcept OSError: pass"
    done = python(swallowed, tmp_path)
    assert done.returncode == 99
    assert "NETWORK" in done.stdout
    threaded = (
        "import socket, threading\nt = threading.Thread(target=lambda: socket.create_connection(('a.invalid', 1)))"
    )
    assert python(f"{threaded}\nt.start(); t.join()", tmp_path).returncode == 99


@pytest.mark.last
def test_no_import_opens_a_connection_or_writes_in_the_home(tmp_path):
    """Every module of lissom, and OpenVINO, its converter and NNCF in the way that lissom imports them."""
    names = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in MODULES
        if path.name != "__main__.py"
    ]
    code = f"""
import importlib
for name in {names!r}:
    importlib.import_module(name)
from lissom.export.telemetry import quiet
from lissom.runtime.openvino_graph import import_openvino
openvino = import_openvino()
with quiet():
    import nncf
    import torch
    openvino.convert_model(torch.nn.ReLU(), example_input=torch.ones(1, 1))
import time
time.sleep(2)  # telemetry is sent by a thread of its own
print("done")
"""
    done = python(code, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "done"
    kept = {path.relative_to(tmp_path).parts[0] for path in tmp_path.rglob("*")}
    assert kept <= {".cache", ".config"}, kept  # matplotlib's fonts; an identifier would stand in a folder "intel"


def test_every_public_name_resolves_and_explains_itself():
    assert sorted(dir(lissom)) == sorted(lissom.__all__)
    for name in lissom.__all__:
        value = getattr(lissom, name)
        assert name == "__version__" or (value.__doc__ or "").strip(), f"lissom.{name} has no docstring"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_module_explains_itself_and_its_public_parts(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    docstring = ast.get_docstring(tree)
    assert docstring, "the module has no docstring"
    # The first line is what an index shows.
    assert len(docstring.splitlines()[0]) <= 120
    public = _names_in_all(tree)
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name in public:
            assert ast.get_docstring(node), f"{node.name} is public and has no docstring"


def _names_in_all(tree: ast.Module) -> set[str]:
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets):
            return set(ast.literal_eval(node.value))
    return set()


def test_every_part_of_the_index_resolves():
    known = parts()
    assert {"technique", "method", "proof", "backend", "exporter", "network"} == set(KINDS)
    assert {part.kind for part in known} == set(KINDS)
    for part in known:
        assert part.summary, f"{part.kind} {part.name} has no summary"
        if part.kind == "network":
            assert lissom.is_model(part.name), part.name
        else:
            assert callable(load_part(part.kind, part.name)), part


def test_no_module_bears_the_name_of_a_public_function():
    """``import lissom.fit`` would put a module where the function stands. Commands are files of their own names."""
    functions = {name for name in lissom.__all__ if not isinstance(getattr(lissom, name), str | type)}
    assert {"slim", "measure", "fit", "load"} <= functions
    named = {path.stem if path.name != "__init__.py" else path.parent.name: path for path in MODULES}
    clashes = [path for name, path in named.items() if name in functions and path.parent != PACKAGE / "cli"]
    assert clashes == []


# Patterns are put together here, so that this file does not hold what it looks for.
HOSTS = [
    "py" + r"pi\.org", "python" + r"hosted\.org", "download\\.py" + r"torch\.org", "conda" + r"\.(io|org)",
    "ana" + r"conda\.(com|org)", "registry\\." + "npmjs", "index" + r"\.crates\.io", "proxy" + r"\.golang\.org",
    "--(extra-)?" + "index-url", "(?m)^--" + "find-links",
]  # fmt: skip
MACHINE = ["/wo" + "rk/", "/ro" + "ot/", "/ho" + "me/[a-z]+/", "/Us" + "ers/[A-Za-z]+/"]


@pytest.mark.parametrize("pattern", HOSTS + MACHINE)
def test_no_file_names_a_registry_or_a_folder_of_one_machine(pattern):
    found = []
    for path in tracked():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found += [f"{path.relative_to(ROOT)}: {line[:120]}" for line in text.splitlines() if re.search(pattern, line)]
    assert found == []


def test_some_files_are_tracked():
    """The test above looks at something."""
    assert {"Makefile", "pyproject.toml", "requirements.lock"} <= {path.name for path in tracked()}


# A parcel that fit() hands to the processes it has just spawned, in memory; no file's bytes reach it.
IN_MEMORY = {"training/loop.py": {"pickle.dumps", "pickle.loads"}}
EXECUTING = {"pickle", "cPickle", "dill", "joblib", "shelve", "marshal"}


def unsafe_calls(tree: ast.AST) -> list[str]:
    """Calls that execute what they read: eval, exec, pickle and those that stand on it."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            # A module under its own name is judged by what is taken from it, below.
            found += [
                f"line {node.lineno}: {a.name} as {a.asname}" for a in node.names if a.name in EXECUTING and a.asname
            ]
        if isinstance(node, ast.ImportFrom) and node.module in EXECUTING:
            names = [alias.name for alias in node.names if not alias.name.endswith("Error")]
            found += [f"line {node.lineno}: {node.module}.{name}" for name in names]
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in EXECUTING and not node.attr.endswith("Error"):
            found.append(f"line {node.lineno}: {ast.unparse(node)}")
        if not isinstance(node, ast.Call):
            continue
        call = ast.unparse(node.func)
        options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if call in ("eval", "exec", "__import__"):
            found.append(f"line {node.lineno}: {call}")
        if call.endswith("torch.load") and options.get("weights_only") != "True":
            found.append(f"line {node.lineno}: {call} without weights_only=True")
        if options.get("allow_pickle", "False") != "False":
            found.append(f"line {node.lineno}: {call} with allow_pickle")
        if options.get("shell", "False") != "False" or call == "os.system":
            found.append(f"line {node.lineno}: {call} through a shell")
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_file_is_executed_by_reading_it(path):
    allowed = IN_MEMORY.get(path.relative_to(PACKAGE).as_posix(), set())
    found = unsafe_calls(ast.parse(path.read_text(encoding="utf-8")))
    assert {call.split(": ")[1] for call in found} == allowed, found


@pytest.mark.parametrize(
    "code",
    [
        "import pickle as p",
        "pickle.loads(b)",
        "pickle.Unpickler(f).load()",
        "from joblib import load",
        "eval(x)",
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "np.load(f, allow_pickle=True)",
        "subprocess.run(c, shell=True)",
        "os.system(c)",
    ],
)
def test_unsafe_calls_are_seen(code):
    assert unsafe_calls(ast.parse(code))


@pytest.mark.parametrize(
    "code", ["torch.load(f, weights_only=True)", "np.load(f)", "model.eval()", "from pickle import UnpicklingError"]
)
def test_safe_calls_pass(code):
    assert unsafe_calls(ast.parse(code)) == []


def test_the_pages_of_the_parts_are_what_the_docstrings_say():
    done = subprocess.run([sys.executable, "docs/make.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"run make docs:\n{done.stdout}{done.stderr}"


def test_links_in_the_documentation_lead_somewhere():
    dead = []
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        for target in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
            if "://" not in target and not (page.parent / target).exists():
                dead.append(f"{page.relative_to(ROOT)}: {target}")
    assert dead == []
