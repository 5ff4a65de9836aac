"""What a user meets when a command ends: the exit code, one sentence on stderr, no traceback."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys

import pytest
import typer

import lissom.registry
from lissom import LissomError, NotApplicable
from lissom.cli import main

LISSOM = [sys.executable, "-m", "lissom"]


def run_with(monkeypatch, error: BaseException) -> int:
    """The exit code of ``lissom list`` when what it calls raises ``error``."""

    def fail(kind=None):
        raise error

    monkeypatch.setattr(lissom.registry, "parts", fail)
    return main(["list"])


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    ("error", "code", "sentence"),
    [
        (LissomError("the folder has no val/; make one"), 2, "the folder has no val/; make one"),
        (NotApplicable("needs bf16"), 2, "needs bf16"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (typer.Abort(), 130, "interrupted"),
        (FULL, 2, "the disk is full"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), 2, "the disk is full"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), 2, "the disk is full"),
        (caused(RuntimeError("writing failed"), FULL), 2, "the disk is full"),
        (PermissionError(errno.EACCES, "Permission denied", "/out/run"), 2, "/out/run: permission denied"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", b"/a"), 2, "/a: no such file or directory"),
        (typer.BadParameter("nonsense"), 2, "Invalid value: nonsense (see lissom list --help)"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_an_error_of_the_users_is_one_sentence(monkeypatch, capsys, error, code, sentence):
    assert run_with(monkeypatch, error) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"lissom: {sentence}")
    assert err.count("\n") == 1


@pytest.mark.parametrize("error", [ValueError("a\nb"), EOFError("torn"), OSError(errno.EIO, "I/O"), AssertionError()])
def test_a_fault_of_ours_is_named_and_says_how_to_see_more(monkeypatch, capsys, error):
    assert run_with(monkeypatch, error) == 1
    err = capsys.readouterr().err.strip()  # Typer ends the line of a prompt before it passes on an end of file
    assert err.startswith(f"lissom: a fault of lissom's own, {type(error).__name__}")
    assert "LISSOM_DEBUG=1" in err
    assert "\n" not in err


def test_debug_shows_the_traceback(monkeypatch, capsys):
    monkeypatch.setenv("LISSOM_DEBUG", "1")
    assert run_with(monkeypatch, ValueError("deep down")) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert "test_exit_codes.py" in err


@pytest.mark.parametrize("code", [0, 1, 3])
def test_a_commands_own_exit_code_passes(monkeypatch, capsys, code):
    assert run_with(monkeypatch, typer.Exit(code)) == code
    assert capsys.readouterr().err == ""


def test_a_hostile_name_does_not_steer_the_terminal(monkeypatch, capsys):
    assert run_with(monkeypatch, LissomError("bad \x1b[2Jname\r")) == 2
    assert capsys.readouterr().err == "lissom: bad ?[2Jname?\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nonsense"], "'nonsense'"),
        (["list", "--nonsense"], "--nonsense"),
        (["list", "network", "proof"], "one kind"),
        (["list", "nonsense"], "technique, method"),
        (["slim", "--batch", "many"], "--batch"),
        (["predict"], "predict"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_command_that_cannot_be_read(capsys, arguments, words):
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith("lissom: ")
    assert words in err
    assert "Traceback" not in err


def test_ctrl_c_ends_a_process_with_130():
    command = subprocess.Popen([*LISSOM, "doctor"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert command.stderr.readline()  # it says that it has begun, and then waits for the runtimes
    command.send_signal(signal.SIGINT)
    _, err = command.communicate(timeout=60)
    assert command.returncode == 130
    assert err == "lissom: interrupted\n"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="the system has no /dev/full")
def test_a_full_disk_under_stdout():
    with open("/dev/full", "w") as full:
        done = subprocess.run([*LISSOM, "list"], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("lissom: the disk is full")
    assert done.stderr.count("\n") == 1


def test_a_reader_that_leaves_is_no_reason_to_complain():
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([*LISSOM, "list"], stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert done.returncode == 1
    assert done.stderr == ""
