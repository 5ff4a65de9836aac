"""``lissom convert``: what it says, what it refuses in one sentence, and that no file is ever half written."""

from __future__ import annotations

import argparse
import builtins
import contextlib
import functools
import json
import os
import pickle
import shutil
import subprocess
import sys
import types
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lissom.cli import main
from lissom.errors import LissomError
from lissom.models.factory import create_model, load_model
from lissom.models.weights import INERT, read_checkpoint, read_weights, sha256

NAME = "light_cnn"  # 14,862 parameters


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return create_model(NAME).state_dict()


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def convert(*arguments: str) -> int:
    return main(["convert", *arguments])


def same(a: Any, b: Any) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one sentence that a refused command says."""
    assert convert(*arguments) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert "Traceback" not in err
    assert len(err) < 600
    return err.removeprefix("lissom: ").strip()


# What it says


def test_what_was_read_is_said(state: Any, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"model": {f"module.{k}": v for k, v in state.items()}, "epoch": 3, "optimizer": {}}, "w.pth")
    assert convert("w.pth", "--arch", NAME) == 0
    assert capsys.readouterr().out.splitlines() == [
        "network     light_cnn: 14,862 parameters, 10 classes, 1 input channel",
        "read        w.pth, model",
        "            module. removed from every key",
        "left out    beside the weights: epoch, optimizer",
        f"written     w.safetensors, {(here / 'w.safetensors').stat().st_size / 1e6:.4f} MB",
    ]
    assert sorted(os.listdir()) == ["w.pth", "w.safetensors"]
    assert (here / "w.safetensors").stat().st_mode & 0o777 == 0o644
    assert same(load_file("w.safetensors"), state)


def test_as_json(state: Any, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file(state, "w.safetensors")
    assert convert("w.safetensors", "--arch", NAME, "--out", "new/folder/out.safetensors", "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert said == {
        "network": NAME, "classes": 10, "in_chans": 1, "parameters": 14862, "nesting": [], "averaged": False,
        "choice": False, "prefix": "", "beside": [], "dropped": [], "made": [],
        "source_sha256": sha256("w.safetensors"), "out": "new/folder/out.safetensors",
        "bytes": (here / "new/folder/out.safetensors").stat().st_size,
    }  # fmt: skip
    assert same(load_model("new/folder/out.safetensors").model.state_dict(), state)


def test_a_counter_that_the_file_lacks_is_made(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = create_model("test_resnet")
    torch.save({k: v for k, v in model.state_dict().items() if not k.endswith("num_batches_tracked")}, "w.pth")
    assert convert("w.pth", "--arch", "test_resnet") == 0
    said = capsys.readouterr().out
    assert "that the network made itself: " in said
    assert ".num_batches_tracked" in said
    assert load_file("w.safetensors").keys() == model.state_dict().keys()


@pytest.mark.parametrize(
    ("flags", "taken", "averaged"),
    [((), 2, True), (("--ema",), 2, True), (("--no-ema",), 1, False)],
)
def test_the_average_or_the_weights(
    state: Any, here: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], taken: int, averaged: bool
) -> None:
    torch.save({"model": {k: v * 0 + 1 for k, v in state.items()}, "ema": {"module": {k: v * 0 + 2 for k, v in
                state.items()}, "updates": 7}}, "w.pth")  # fmt: skip
    assert convert("w.pth", "--arch", NAME, *flags) == 0
    said = capsys.readouterr().out
    assert ("the average of the weights (EMA) (--no-ema takes the other)" in said) is averaged
    assert ("read        w.pth, model (--ema takes the other)" in said) is not averaged
    assert all((value == taken).all() for value in load_file("w.safetensors").values())
    assert read_checkpoint("w.pth", ema=averaged).nesting == (("ema", "module") if averaged else ("model",))


def test_an_average_that_is_not_there(state: Any, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"model": state, "model_ema": None}, "one.pth")
    assert "one.pth holds one set of weights, not named as an average" in refused(
        capsys, "one.pth", "--arch", NAME, "--ema"
    )
    assert convert("one.pth", "--arch", NAME, "--no-ema") == 0
    capsys.readouterr()
    torch.save({"model_ema": state}, "ema.pth")
    assert "holds an average of the weights alone (model_ema)" in refused(capsys, "ema.pth", "--arch", NAME, "--no-ema")


# What training leaves beside the weights


def test_old_checkpoints_with_settings_and_figures(state: Any, here: Path) -> None:
    """As DeiT's and timm's programs save them, with what was in the files of NumPy before its second version too."""
    args = argparse.Namespace(
        model="x", output_dir=Path("runs"), betas=(0.9, 0.999), inner=types.SimpleNamespace(a=1), seed=np.int64(3)
    )
    held = {
        "model": OrderedDict(state), "epoch": np.int64(299), "max_accuracy": np.float64(81.25), "args": args,
        "scaler": {"scale": 65536.0}, "labels": np.array(["a", "b"]), "rates": np.linspace(0, 1, 5, dtype=np.float32),
    }  # fmt: skip
    before = set(torch.serialization.get_safe_globals())
    torch.save(held, "w.pth")
    torch.save(held, "legacy.pth", _use_new_zipfile_serialization=False)
    old = renamed("w.pth", b"numpy._core.multiarray", b"numpy.core.multiarray")
    for path in ("w.pth", "legacy.pth", old):
        found = read_checkpoint(path)
        assert same(found.state, state)
        assert found.beside == ("epoch", "max_accuracy", "args", "scaler", "labels", "rates")
    assert set(torch.serialization.get_safe_globals()) == before  # no stand-in stays behind


def renamed(path: str, old: bytes, new: bytes) -> str:
    """The file with ``new`` in the place of ``old`` in its pickle."""
    target = f"renamed_{path}"
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(target, "w") as file:
        for entry in source.infolist():
            data = source.read(entry)
            if entry.filename.endswith("data.pkl"):
                assert old in data
                data = data.replace(old, new)
            file.writestr(entry.filename, data)
    return target


def test_nothing_of_what_is_left_out_is_built(state: Any, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The constructors are not called, not even those of the harmless kinds."""

    def no(*arguments: Any, **more: Any) -> None:
        raise AssertionError("built")

    torch.save({"model": state, "args": argparse.Namespace(a=1), "best": np.float64(1)}, "w.pth")
    monkeypatch.setattr(argparse.Namespace, "__init__", no)
    monkeypatch.setattr(argparse.Namespace, "__setattr__", no)
    assert same(read_weights("w.pth"), state)
    assert not any(name.startswith(("builtins", "os.", "posix", "subprocess")) for name in INERT)


class Calls:
    """A pickle that calls ``function`` where its reader runs code."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> Any:
        return self.function, self.arguments


class Builds(Calls):
    """A pickle whose state calls ``function`` where its reader runs code."""

    def __reduce__(self) -> Any:
        return argparse.Namespace, (), Calls(self.function, *self.arguments)


def attacks(mark: Path) -> dict[str, Any]:
    write = f"open({str(mark)!r}, 'w').close()"
    return {
        "os.system": Calls(os.system, f"touch {mark}"),
        "eval": Calls(builtins.eval, write),
        "exec": Calls(builtins.exec, write),
        "getattr": Calls(getattr, Calls(__import__, "os"), "system"),
        "subprocess": Calls(subprocess.check_output, ["touch", str(mark)]),
        "state of settings": Builds(os.system, f"touch {mark}"),
        "settings": argparse.Namespace(hook=Calls(builtins.eval, write)),
        "nested settings": argparse.Namespace(a=argparse.Namespace(b=[{"c": Calls(os.system, f"touch {mark}")}])),
        "argument of a figure": Calls(np.dtype, Calls(builtins.eval, write)),
    }


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("place", ["alone", "beside", "inside", "deep"])
@pytest.mark.parametrize("kind", attacks(Path("x")))
def test_hostile_files_are_refused_and_not_run(
    state: Any, here: Path, capsys: pytest.CaptureFixture[str], kind: str, place: str, zipped: bool
) -> None:
    mark = here / "mark"
    attack = attacks(mark)[kind]
    held = {
        "alone": attack,
        "beside": {"model": state, "args": attack},
        "inside": {"model": {**state, "head.bias": attack}},
        "deep": {"optimizer": {"state": [{"a": (1, attack)}]}, "model": state},
    }[place]
    torch.save(held, "w.pth", _use_new_zipfile_serialization=zipped)
    said = refused(capsys, "w.pth", "--arch", NAME)
    assert "refused" in said or "was not read" in said
    assert "weights_only" not in said  # torch's advice on how to run it all the same
    assert "safe_globals" not in said
    assert not mark.exists()
    assert os.listdir() == ["w.pth"]


@pytest.mark.parametrize("kind", ["os.system", "eval", "exec", "subprocess", "settings", "nested settings",
                                  "state of settings", "argument of a figure"])  # fmt: skip
def test_the_attacks_work_where_code_is_run(here: Path, kind: str) -> None:
    """The test above proves something only if its files would act."""
    with contextlib.suppress(pickle.UnpicklingError):  # settings take no state of this kind, once the deed is done
        pickle.loads(pickle.dumps(attacks(here / "mark")[kind]))
    assert (here / "mark").exists()


def test_the_refused_object_is_named(here: Path, state: Any, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"model": state, "hook": Calls(shutil.rmtree, "x")}, "w.pth")
    said = refused(capsys, "w.pth", "--arch", NAME)
    assert said.startswith("w.pth holds Python objects besides weights (shutil.rmtree), which could run code")
    assert "torch.save(model.state_dict(), ...)" in said


# Other faults of a file


def test_nesting_without_end(state: Any, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    held: dict[str, Any] = {}
    held["model"] = held
    torch.save(held, "ring.pth")
    assert refused(capsys, "ring.pth", "--arch", NAME).startswith("ring.pth holds no state dict; it holds model")
    held = {"model": state}
    for _ in range(5000):
        held = {"model": held}
    Path("deep.pth").write_bytes(b"".join([b"\x80\x02", *[b"}X\x05\x00\x00\x00model"] * 100_000, b"}", b"s" * 100_000,
                                           b"."]))  # fmt: skip
    assert "deep.pth" in refused(capsys, "deep.pth", "--arch", NAME)


@pytest.mark.parametrize("ending", ["pth", "safetensors", "pt", "bin", "pth.tar"])
@pytest.mark.parametrize("share", [0, 3, 0.3, 0.99])
def test_files_cut_short(state: Any, here: Path, capsys: pytest.CaptureFixture[str], ending: str, share: float) -> None:
    path = Path(f"w.{ending}")
    save_file(state, path) if ending == "safetensors" else torch.save({"model": state}, path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share) if isinstance(share, float) else share])
    said = refused(capsys, str(path), "--arch", NAME, "--out", "out.safetensors")
    assert said.startswith(f"{path} is damaged")
    if share == 0:
        assert "it is empty" in said
    assert os.listdir() == [path.name]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n", "Git LFS's note of a file"),
        (b"\n<!DOCTYPE html><html>Download anyway?</html>", "is a web page, not weights"),
        (b"<html>", "is a web page, not weights"),
    ],
)
def test_what_a_download_may_give_instead(
    here: Path, capsys: pytest.CaptureFixture[str], content: bytes, words: str
) -> None:
    Path("w.pth").write_bytes(content)
    assert words in refused(capsys, "w.pth", "--arch", NAME)


def test_arguments_that_cannot_be(state: Any, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(state, "w.pth")
    said = refused(capsys, "w.pth", "--arch", "light_cn")
    assert said.startswith("no network is called 'light_cn'; similar names: light_cnn")
    assert "no network is called '../x'" in refused(capsys, "w.pth", "--arch", "../x")
    assert "no network is called 'hf-hub:a/b'" in refused(capsys, "w.pth", "--arch", "hf-hub:a/b")
    assert "--arch" in refused(capsys, "w.pth")
    for folder in (".", "..", "/", "photos.pth"):
        Path("photos.pth").mkdir(exist_ok=True)
        assert refused(capsys, folder, "--arch", NAME).endswith(" is a folder; name the weight file in it")
    assert refused(capsys, "no.pth", "--arch", NAME) == "there is no file no.pth"
    Path("w.onnx").write_bytes(b"x")
    assert "known endings: .safetensors, .pth, .pt, .bin, .pth.tar" in refused(capsys, "w.onnx", "--arch", NAME)
    assert ".safetensors file; name one with --out" in refused(capsys, "w.pth", "--arch", NAME, "--out", "w.bin")
    Path("f.safetensors").mkdir()
    assert "f.safetensors is a folder" in refused(capsys, "w.pth", "--arch", NAME, "--out", "f.safetensors", "--force")


def test_an_existing_file_is_kept_unless_forced(state: Any, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(state, "w.pth")
    Path("w.safetensors").write_text("mine")
    assert refused(capsys, "w.pth", "--arch", NAME) == (
        "w.safetensors exists already; name another file with --out, or replace it with --force"
    )
    torch.save({"a": torch.zeros(1)}, "bad.pth")
    refused(capsys, "bad.pth", "--arch", NAME, "--out", "w.safetensors", "--force")
    assert Path("w.safetensors").read_text() == "mine"
    assert convert("w.pth", "--arch", NAME, "--force") == 0
    assert same(load_file("w.safetensors"), state)
    capsys.readouterr()
    said = refused(capsys, "w.safetensors", "--arch", NAME, "--force")
    assert said == "w.safetensors is the checkpoint itself; name another file with --out"


def test_a_file_is_written_whole_or_not_at_all(
    state: Any, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(state, "w.pth")

    def fail_with(error: BaseException, tensors: Any, path: Any, metadata: Any) -> None:
        Path(path).write_bytes(b"half")
        raise error

    for error, code in (
        (RuntimeError("I/O error: No space left on device (os error 28)"), 2),
        (KeyboardInterrupt(), 130),
        (PermissionError(13, "Permission denied", "w.safetensors"), 2),
    ):
        monkeypatch.setattr("safetensors.torch.save_file", functools.partial(fail_with, error))
        assert convert("w.pth", "--arch", NAME) == code
        assert capsys.readouterr().err.count("\n") == 1
        assert os.listdir() == ["w.pth"]


def test_tensors_that_are_not_what_they_seem(state: Any, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    key = "trunks.0.conv1.weight"
    for value, words in (
        (torch.zeros(1).expand(12, 1 << 40, 3, 3), "has more numbers than the file has bytes"),
        (torch.zeros(12, 1, 3, 3, device="meta"), "is no plain tensor"),
        (torch.zeros(12, 9).to_sparse(), "is no plain tensor"),
    ):
        torch.save({**state, key: value}, "w.pth")
        assert f"w.pth: {key} {words}" in refused(capsys, "w.pth", "--arch", NAME)
    torch.save({**state, "a\n\x1b[2Jb": torch.zeros(1)}, "w.pth")
    assert refused(capsys, "w.pth", "--arch", NAME).endswith("1 unknown: a??[2Jb")


def test_an_archive_packed_anew_is_read_as_it_was_saved(state: Any, here: Path) -> None:
    """Its tensors do not lie in the file as they lie in memory."""
    torch.save(state, "w.pth")
    with zipfile.ZipFile("w.pth") as source, zipfile.ZipFile("z.pth", "w", zipfile.ZIP_DEFLATED) as file:
        for entry in source.infolist():
            file.writestr(entry.filename, source.read(entry))
    assert same(read_checkpoint("z.pth", mapped=True).state, state)
    assert same(read_checkpoint("w.pth", mapped=True).state, state)
    with zipfile.ZipFile("bomb.pth", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("bomb/data/0", bytes(10_000_000))
    with pytest.raises(LissomError, match="unpacks to more than 20 times its size"):
        read_weights("bomb.pth")


@pytest.mark.full
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="the system does not report VmHWM")
def test_what_is_not_wanted_of_a_file_does_not_fill_the_memory(state: Any, here: Path) -> None:
    """The optimizer's state, twice as large as everything else together, stays on the disk; the file is opened once."""
    torch.save({"model": state, "optimizer": {"state": torch.zeros(200_000_000)}}, "w.pth")
    code = (
        "import re, torch\n"
        "from lissom.cli import main\n"
        "import lissom.models.converting\n"
        "peak = lambda: int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])\n"
        "before, real, calls = peak(), torch.load, []\n"
        "torch.load = lambda *a, **k: (calls.append(a), real(*a, **k))[1]\n"
        f"assert main(['convert', 'w.pth', '--arch', '{NAME}']) == 0\n"
        "assert len(calls) == 1\n"
        "print(peak() - before)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout.splitlines()[-1]) < 200_000  # kB, of a file of 800,000
