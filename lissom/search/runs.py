"""Run: one search on disk. One fsynced line a finished trial; locked while it is written; resumable after a kill."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lissom.errors import LissomError
from lissom.runtime.artifact import write_atomic
from lissom.search.trials import Trial

__all__ = ["Run"]


class Run:
    """A folder with ``run.json`` (the settings), ``trials.jsonl`` and ``artifacts/``.

    Use as a context manager: inside, no other process can write to the folder. Raises LissomError where the folder
    holds a run and ``resume`` is False, where another process holds it, or where the settings differ. ``fits``, how
    many trials a promise is shared among, is what it was when the run began, whatever a resumed one says.
    """

    def __init__(self, folder: str | Path, settings: Mapping[str, Any], resume: bool = False, *, fits: int = 1) -> None:
        self.folder = Path(folder)
        self.settings = json.loads(json.dumps(settings))
        self.resume, self.fits = resume, fits
        self.trials: list[Trial] = []

    def __enter__(self) -> Run:
        try:
            (self.folder / "artifacts").mkdir(parents=True, exist_ok=True)
            self._lock = open(self.folder / "run.lock", "a")
        except OSError as error:
            raise LissomError(
                f"the folder {self.folder} cannot be written: {error.strerror}; give another --out"
            ) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            raise LissomError(f"another run is writing to {self.folder}; wait for it, or give another --out") from error
        try:
            for left in (*self.folder.glob("artifacts/.*"), *self.folder.glob(".best.*")):  # half-written when killed
                shutil.rmtree(left, ignore_errors=True)
            self._settle()
            self.trials = self._read()
        except BaseException:
            self._lock.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.close()

    def _settle(self) -> None:
        path = self.folder / "run.json"
        if not path.exists():
            write_atomic(path, json.dumps({**self.settings, "fits": self.fits}, indent=1))
            return
        if not self.resume:
            raise LissomError(f"{self.folder} already holds a run; continue it with --resume, or give another --out")
        before = json.loads(path.read_text(encoding="utf-8"))
        self.fits = before.pop("fits", self.fits)
        for key in sorted(before.keys() | self.settings.keys()):
            old, new = before.get(key), self.settings.get(key)
            if old != new:
                raise LissomError(
                    f"{self.folder} was begun with {key} = {old!r}, not {new!r}; resume with the same settings"
                )

    def _read(self) -> list[Trial]:
        """The finished trials. A last line that a kill cut short is no finished trial, and is cut off."""
        path = self.folder / "trials.jsonl"
        if not path.exists():
            return []
        data = path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):
            with open(path, "r+b") as file:
                file.truncate(len(whole))
                os.fsync(file.fileno())
        try:
            return [Trial.from_json(json.loads(line)) for line in whole.splitlines()]
        except (ValueError, TypeError, KeyError) as error:
            raise LissomError(f"{path} is damaged: {error}; begin a new run with another --out") from error

    def add(self, trial: Trial) -> None:
        """Append a finished trial: on the disk when this returns, or not there at all."""
        path = self.folder / "trials.jsonl"
        line = (json.dumps(trial.to_json()) + "\n").encode()
        with open(path, "ab") as file:
            size = file.tell()
            try:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
            except OSError:
                os.truncate(path, size)
                raise
        self.trials.append(trial)

    def artifact(self, name: str) -> Path:
        """Where the artifact ``name`` of this run lies."""
        return self.folder / "artifacts" / name
