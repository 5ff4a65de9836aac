"""The command line: one file a command, and what exit codes and errors look like to a user.

Exit codes: 0 done; 1 a fault of lissom's own; 2 bad input, in one sentence; 3 the budget is not met; 130 interrupted.
A command's file imports nothing but Typer at its top, so that ``lissom --help`` answers at once.
"""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from lissom import __version__
from lissom.cli import convert, doctor, fit, listing, measure, predict, profile, reproduce, slim
from lissom.cli.console import clean
from lissom.errors import LissomError

__all__ = ["app", "main"]

BUG, BAD_INPUT, INTERRUPTED = 1, 2, 130
# Typer keeps its usage errors in a private module that moves between its versions; their place above this one stays.
_USAGE: type[BaseException] = typer.BadParameter.__mro__[2]


class _QuickHelp:
    """Gives ``--help`` the value of a flag, False. Its own, None, makes Typer import pydantic: half a second a call."""

    def get_help_option(self, context: Any) -> Any:
        option = super().get_help_option(context)  # type: ignore[misc]
        if option is not None:
            option.default = False
        return option


class _Group(_QuickHelp, TyperGroup):
    pass


class _Command(_QuickHelp, TyperCommand):
    pass


app = typer.Typer(
    cls=_Group,
    help="Makes a vision or long-sequence model cheaper on your device, and proves it.",
    add_completion=False,
    pretty_exceptions_enable=False,
    # Plain help: Rich's formatting alone would cost a third of the half second that an answer may take.
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"lissom {__version__}")
        raise typer.Exit()


@app.callback(invoke_without_command=True)
def _start(
    context: typer.Context,
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


app.command("slim", help="Make a model cheaper within a budget, with a report.")(slim.slim)
app.command("measure", help="Measure models or artifacts beside each other on this device.")(measure.measure)
app.command("profile", help="Show where a model's time goes, layer by layer.")(profile.profile)
app.command("predict", help="Classify images with an artifact.")(predict.predict)
app.command("fit", help="Train a model.")(fit.fit)
app.command("convert", help="Read published weights, and write them in safe form.")(convert.convert)
app.command("reproduce", help="Run the small proof of a published claim.")(reproduce.reproduce)
app.command(
    "list",
    cls=_Command,
    short_help="List techniques, methods, proofs, back ends and networks.",
    options_metavar="[KIND] [--json]",
    context_settings={"allow_extra_args": True},
)(listing.list_parts)
app.command("doctor", help="Say what works here, and what to install for the rest.")(doctor.doctor)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line with ``argv`` (the process's own arguments: None) and return the exit code."""
    try:
        # Not standalone: Typer would print its own errors, and end an aborted run with the code of a fault.
        code = typer.main.get_command(app).main(
            args=None if argv is None else list(argv), prog_name="lissom", standalone_mode=False
        )
        sys.stdout.flush()
    except (Exception, KeyboardInterrupt) as error:
        return _fail(error)
    if code == INTERRUPTED:
        _say("interrupted")
    return code if isinstance(code, int) else 0


def _fail(error: BaseException) -> int:
    if os.environ.get("LISSOM_DEBUG") == "1":
        traceback.print_exception(error)
    code, sentence = explain(error)
    # Where the reader of our output has gone, as in `lissom list | head`, nobody needs to be told.
    if not isinstance(error, BrokenPipeError):
        _say(sentence)
    try:
        sys.stdout.flush()
    except OSError:
        # What cannot be written would be tried again when Python ends, and change the exit code.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return code


def explain(error: BaseException) -> tuple[int, str]:
    """The exit code and the one sentence for an error that ended a command."""
    if isinstance(error, LissomError):
        return BAD_INPUT, str(error)
    if isinstance(error, _USAGE):
        usage: Any = error
        command = usage.ctx.command_path if getattr(usage, "ctx", None) else "lissom"
        return BAD_INPUT, f"{usage.format_message().rstrip('.')} (see {command} --help)"
    # An end of file inside a command reaches us as Abort too: that is a fault, no user's wish.
    if isinstance(error, typer.Abort) and isinstance(error.__cause__, EOFError):
        error = error.__cause__
    if isinstance(error, KeyboardInterrupt | typer.Abort):
        return INTERRUPTED, "interrupted"
    if any(_disk_is_full(link) for link in _chain(error)):
        where = f" while writing {error.filename}" if isinstance(error, OSError) and error.filename else ""
        return BAD_INPUT, f"the disk is full{where}; free some space, then start again (slim: with --resume)"
    if isinstance(error, OSError) and error.filename is not None:
        return BAD_INPUT, f"{_text(error.filename)}: {(error.strerror or 'cannot be used').lower()}"
    message = " ".join(str(error).split())
    message = f": {message[:300]}" if message else ""
    return BUG, f"a fault of lissom's own, {type(error).__name__}{message} (LISSOM_DEBUG=1 shows where)"


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error, and those that led to it."""
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ or link.__context__


def _disk_is_full(error: BaseException) -> bool:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    # Libraries that write by themselves (safetensors, torch) report it as text only.
    return "No space left on device" in str(error)


def _text(path: str | bytes | int) -> str:
    return os.fsdecode(path) if isinstance(path, str | bytes) else f"file {path}"


def _say(sentence: str) -> None:
    # A message may quote a hostile file's name.
    print(f"lissom: {clean(sentence)}", file=sys.stderr)
