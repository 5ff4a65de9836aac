"""``python -m lissom.runtime.bench ARTIFACT``: what artifacts cost on this machine, as one JSON document.

A coordinator, which knows NumPy only, starts one fresh process an artifact, which loads no more than the artifact's
runtime. The workers run in turn, one at a time, in short blocks and rotating order (ABC, BCA, CAB), so that whatever
slows the machine meanwhile slows all of them: the ratio of two artifacts is taken block by block. Memory is read from
the kernel's account of each worker. On an error the document holds ``error``, one sentence, and the exit code is 2.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from lissom.errors import LissomError
from lissom.runtime.artifact import Artifact
from lissom.runtime.backends import Stages, last_stages, open_graph
from lissom.runtime.energy import NOT_AVAILABLE, energy_counter
from lissom.runtime.target import RUNTIMES, default_threads, local_capabilities

__all__ = ["bench", "capabilities", "command", "environment", "main", "paired"]

VERSION = 1  # of the document
BLOCK = 0.04  # seconds of one block: long beside a change of process, short beside what slows a machine
ROUNDS = 5  # at the least: an interval wants several blocks
SETTLED = 0.1  # a warm-up ends when the last five runs differ from the five before by no more than this share
WARM_RUNS, WARM_SECONDS, WARM_LIMIT = 10, 0.2, 2.0
ENERGY_SECONDS = 1.0  # the counters advance about every millisecond: a second makes that negligible
RESAMPLES = 2000


# The coordinator.


def command(*arguments: str) -> list[str]:
    """The command that runs this module with this interpreter. The working directory is no place of modules (-P):
    a file ``random.py`` of the user's must not replace Python's own."""
    return [sys.executable, "-P", "-m", "lissom.runtime.bench", *arguments]


def environment() -> dict[str, str]:
    """The environment in which ``command`` finds this very package, also where it runs from a source tree."""
    root = Path(__file__).resolve().parents[2]
    if root.name in ("site-packages", "dist-packages"):
        return dict(os.environ)
    paths = [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


class _Worker:
    """A fresh process that holds one graph, spoken to in lines of JSON. It ends when its stdin does."""

    def __init__(self, name: str, job: dict[str, Any]) -> None:
        self.name = name
        self.errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 closed by close()
        self.process = subprocess.Popen(
            command("--worker"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            encoding="utf-8",
            env=environment(),
        )
        self.send(do="load", **job)

    def send(self, **order: Any) -> None:
        assert self.process.stdin is not None
        # A worker that has died says why when its answer is read.
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(order) + "\n")
            self.process.stdin.flush()

    def receive(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise LissomError(f"{self.name} does not run here: its process ended with {self._last_words()}")
        answer = json.loads(line)
        if "error" in answer:
            raise LissomError(f"{self.name} does not run here: {answer['error']}")
        return answer

    def ask(self, **order: Any) -> dict[str, Any]:
        self.send(**order)
        return self.receive()

    def _last_words(self) -> str:
        code = self.process.wait()
        self.errors.seek(0, os.SEEK_END)
        self.errors.seek(max(0, self.errors.tell() - 2000))
        lines = self.errors.read().decode(errors="replace").strip().splitlines()
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return f"{how} ({lines[-1].strip()})" if lines else how

    def close(self) -> None:
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
        try:
            self.process.wait(timeout=2)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.errors.close()


@contextlib.contextmanager
def _workers(jobs: Sequence[tuple[str, dict[str, Any]]]) -> Iterator[list[_Worker]]:
    """One worker a job, loaded; all ended on leaving."""
    workers: list[_Worker] = []
    try:
        for name, job in jobs:
            workers.append(_Worker(name, job))
        for worker in workers:
            worker.receive()
        yield workers
    finally:
        for worker in workers:
            worker.close()


def bench(
    artifacts: Sequence[Artifact], *, threads: int | None = None, seconds: float = 2.0, memory: bool = False
) -> dict[str, Any]:
    """Measure ``artifacts`` interleaved, about ``seconds`` of running each; the first is the reference of ``speedup``.

    ``memory`` also measures an empty graph in each runtime. Returns the document; its ``artifacts`` have the fields
    of ``meters.measurement.Measurement``. Raises LissomError where an artifact does not run.
    """
    threads = threads or default_threads()
    jobs = [(str(a.path), {"artifact": str(a.path), "threads": threads}) for a in artifacts]
    with _workers(jobs) as workers:
        times = _interleave(workers, seconds)
        rows = [_row(a, t, times[0]) for a, t in zip(artifacts, times, strict=True)]
        for worker, row in zip(workers, rows, strict=True):
            row |= worker.ask(do="energy")
            row |= worker.ask(do="memory")
    if memory:
        empty = {runtime: _empty_peak(runtime, threads) for runtime in sorted({a.runtime for a in artifacts})}
        for artifact, row in zip(artifacts, rows, strict=True):
            if row["memory_mb"] is not None and empty[artifact.runtime] is not None:
                row["memory_above_empty_mb"] = row["memory_mb"] - empty[artifact.runtime]
    return {"lissom": VERSION, "threads": threads, "rounds": len(times[0]), "artifacts": rows}


class Block(NamedTuple):
    """The runs of one worker's turn. ``times`` (runs,): seconds of a run, the mean over where samples leave;
    ``exits`` (runs, stages): seconds until each stage's decision."""

    times: np.ndarray
    exits: np.ndarray


def _interleave(workers: Sequence[_Worker], seconds: float) -> list[list[Block]]:
    """Each worker's rounds, a round being one block."""
    single = [worker.ask(do="warm")["seconds"] for worker in workers]
    block = max(BLOCK, *single)  # where one run is longer than a block, all blocks become as long as it
    runs = [max(1, round(block / s)) for s in single]
    times: list[list[Block]] = [[] for _ in workers]
    spent = 0.0
    turn = 0
    while turn < ROUNDS or spent / len(workers) < seconds:
        for place in range(len(workers)):
            i = (place + turn) % len(workers)
            block_times = workers[i].ask(do="block", runs=runs[i])
            times[i].append(Block(np.array(block_times["times"]), np.array(block_times["exits"])))
            spent += float(times[i][-1].exits[:, -1].sum())
        turn += 1
    return times


def _row(artifact: Artifact, rounds: list[Block], reference: list[Block]) -> dict[str, Any]:
    taken = np.concatenate([block.times for block in rounds])
    exits = np.concatenate([block.exits for block in rounds])
    batch = artifact.input_shape[0]
    speedup, interval = 1.0, (1.0, 1.0)
    if rounds is not reference:
        speedup, interval = paired([b.times for b in reference], [b.times for b in rounds])
    return {
        "artifact": str(artifact.path),
        "runtime": artifact.runtime,
        "batch": batch,
        "runs": len(taken),
        "latency_ms": 1e3 * float(np.percentile(taken, 50)),
        "stages_ms": [1e3 * float(t) for t in np.median(exits, axis=0)],
        "p95_ms": 1e3 * _percentile(exits, last_stages(artifact), 95),
        "throughput": batch / float(taken.mean()),
        "speedup": speedup,
        "speedup_ci": interval,
        "memory_above_empty_mb": None,
    }


def _percentile(exits: np.ndarray, shares: np.ndarray, percent: float) -> float:
    """Percentile of a sample's time: ``exits`` (runs, stages) in seconds, ``shares`` (stages,) of where they leave."""
    if len(shares) == 1:
        return float(np.percentile(exits, percent))
    weights = np.broadcast_to(shares / len(exits), exits.shape).ravel()
    order = np.argsort(exits, axis=None)
    reached = np.cumsum(weights[order]) >= percent / 100 * weights.sum()
    return float(exits.ravel()[order[int(reached.argmax())]])


def paired(reference: list[np.ndarray], rounds: list[np.ndarray]) -> tuple[float, tuple[float, float]]:
    """The reference's time over this one's: the median over rounds of the ratio of block medians, with a 95 %
    bootstrap interval (percentile, seeded). Each is one array of times a round."""
    logs = np.array([math.log(np.median(r) / np.median(t)) for r, t in zip(reference, rounds, strict=True)])
    draws = np.random.default_rng(0).integers(len(logs), size=(RESAMPLES, len(logs)))
    low, high = np.percentile(np.median(logs[draws], axis=1), [2.5, 97.5])
    return math.exp(np.median(logs)), (math.exp(low), math.exp(high))


def _empty_peak(runtime: str, threads: int) -> float | None:
    """Peak memory in MB of a process that runs the smallest graph in ``runtime``."""
    with _workers([(f"an empty graph in {runtime}", {"empty": runtime, "threads": threads})]) as (worker,):
        worker.ask(do="warm")
        return worker.ask(do="memory")["memory_mb"]


def capabilities(runtime: str) -> dict[str, Any]:
    """What this machine offers to ``runtime``, and the installed version of it (None: not installed)."""
    try:
        version: str | None = importlib.metadata.version(runtime)
    except importlib.metadata.PackageNotFoundError:
        version = None
    return {**local_capabilities(runtime), "runtime": runtime, "runtime_version": version}


# The worker.


def _status_mb(field: str) -> float | None:
    """A size from the kernel's account of this process in MB; None where the kernel keeps none in this form."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024 / 1e6
    except OSError:
        pass
    return None


class _Bench:
    """What a worker does: one method an order."""

    def load(self, threads: int, artifact: str | None = None, empty: str | None = None) -> dict[str, Any]:
        if artifact is None:
            shape: tuple[int, ...] = (1, 1)
            self.shares: np.ndarray | None = None
            self.graph: Any = open_graph(None, empty or "", {}, threads)
        else:
            opened = Artifact.open(artifact)
            shape = opened.input_shape
            self.graph = Stages(opened, threads)
            self.shares = self.graph.shares if self.graph.thresholds else None
        self.x = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
        return {}

    def warm(self) -> dict[str, Any]:
        """Run until the times settle; the median of the last runs in seconds."""
        times: list[float] = []
        start = time.perf_counter()
        while True:
            times.append(self._time()[0])
            spent = time.perf_counter() - start
            if len(times) >= 3 and spent >= WARM_LIMIT:
                break
            if len(times) >= WARM_RUNS and spent >= WARM_SECONDS:
                last, before = np.median(times[-5:]), np.median(times[-10:-5])
                if abs(last - before) <= SETTLED * before:
                    break
        return {"seconds": float(np.median(times[-5:]))}

    def block(self, runs: int) -> dict[str, Any]:
        if runs > 1:
            self._time()  # the worker before has left its own data in the caches
        taken = [self._time() for _ in range(runs)]
        return {"times": [mean for mean, _ in taken], "exits": [exits for _, exits in taken]}

    def energy(self) -> dict[str, Any]:
        source, counter = energy_counter(self.graph.gpu)
        if counter is None:
            return {"energy_mj": None, "energy_source": NOT_AVAILABLE}
        runs = 0
        start = time.perf_counter()
        stop = counter()
        while runs == 0 or time.perf_counter() - start < ENERGY_SECONDS:
            self._run_once(runs)
            runs += 1
        return {"energy_mj": stop() / runs, "energy_source": source}

    def _run_once(self, number: int) -> None:
        """One run; where samples leave early, as far as the number's turn says. Turns by the golden ratio keep to the
        shares however few they are."""
        if self.shares is None:
            self.graph.run(self.x)
        else:
            turn = (0.5 + number * (math.sqrt(5) - 1) / 2) % 1
            self.graph.run_to(self.x, int(np.searchsorted(np.cumsum(self.shares)[:-1], turn, side="right")))

    def memory(self) -> dict[str, Any]:
        return {"memory_mb": _status_mb("VmHWM"), "steady_mb": _status_mb("VmRSS")}

    def _time(self) -> tuple[float, list[float]]:
        """Seconds of one run, and until each stage's decision.

        Where samples leave early, every stage is run and timed, and the run counts as the mean over where samples
        leave (``last_stages``): its input is noise, which would leave anywhere. Of a batch above 1 that is what one of
        many batches costs, where inputs of several run a stage together (``Stages.run_many``).
        """
        if self.shares is not None:
            exits = self.graph.time_exits(self.x)
            return float(np.dot(self.shares, exits)), exits
        start = time.perf_counter()
        self.graph.run(self.x)
        seconds = time.perf_counter() - start
        return seconds, [seconds]


def _work() -> None:
    """Obey orders from stdin until it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the coordinator too, and its end is ours
    # A runtime's own prints must not mix with the answers.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    worker = _Bench()
    for line in sys.stdin:
        order = json.loads(line)
        try:
            answer = getattr(worker, order.pop("do"))(**order)
        except LissomError as error:
            answer = {"error": str(error)}
        except Exception as error:  # whatever a runtime raises
            reason = str(error).strip().splitlines()
            answer = {"error": f"{type(error).__name__}: {reason[0] if reason else 'no reason given'}"}
        try:
            print(json.dumps(answer), file=answers, flush=True)
        except BrokenPipeError:
            break
    os._exit(0)  # some runtimes take long, or fail, to end their threads


# The command.


def _end_with_stdin() -> None:
    """End this process as soon as its stdin ends, which is when the process that started it has gone."""

    def watch() -> None:
        while os.read(0, 4096):
            pass
        os._exit(130)

    threading.Thread(target=watch, daemon=True).start()


def _number(kind: type, low: float) -> Any:
    def parse(text: str) -> Any:
        value = kind(text)
        if not low <= value < math.inf:
            raise argparse.ArgumentTypeError(f"{text} is less than {low:g}")
        return value

    parse.__name__ = "number"
    return parse


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m lissom.runtime.bench", description="Measure artifacts on this machine.")
    parser.add_argument("artifact", nargs="?", help="an artifact's folder")
    parser.add_argument("--against", action="append", default=[], metavar="ARTIFACT", help="measure beside it")
    parser.add_argument("--threads", type=_number(int, 1), help="all processors by default")
    parser.add_argument("--seconds", type=_number(float, 0), default=2.0, help="of running, for each artifact")
    parser.add_argument("--batch", type=_number(int, 1), help="refuse artifacts of another batch size")
    parser.add_argument("--memory", action="store_true", help="measure an empty graph's memory too")
    parser.add_argument("--capabilities", metavar="RUNTIME", choices=RUNTIMES, help="say what this machine offers")
    parser.add_argument("--end-with-stdin", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser


def _document(arguments: argparse.Namespace) -> dict[str, Any]:
    document: dict[str, Any] = {}
    if arguments.capabilities:
        document = {"lissom": VERSION, "capabilities": capabilities(arguments.capabilities)}
    if arguments.artifact is None:
        if not document:
            raise LissomError("name an artifact, or ask for --capabilities")
        return document
    artifacts = [Artifact.open(path) for path in (arguments.artifact, *arguments.against)]
    for artifact in {artifact.path: artifact for artifact in artifacts}.values():  # once each: workers rely on it
        artifact.verify()
    for artifact in artifacts:
        if arguments.batch not in (None, artifact.input_shape[0]):
            raise LissomError(
                f"{artifact.path} was exported for batch {artifact.input_shape[0]}, not {arguments.batch}; "
                f"export it anew with --batch {arguments.batch}"
            )
    measured = bench(artifacts, threads=arguments.threads, seconds=arguments.seconds, memory=arguments.memory)
    return document | measured


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit code is 0, 2 for bad input and 130 for an interruption."""
    arguments = _parser().parse_args(argv)
    if arguments.worker:
        _work()
    if arguments.end_with_stdin:
        _end_with_stdin()
    try:
        print(json.dumps(_document(arguments)), flush=True)
        return 0
    except LissomError as error:
        print(json.dumps({"lissom": VERSION, "error": str(error)}), flush=True)
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
