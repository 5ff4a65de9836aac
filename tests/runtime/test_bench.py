"""The measuring command: one JSON document, fresh processes without torch, strict turns, and no orphans."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lissom.errors import LissomError
from lissom.runtime import bench as module
from lissom.runtime.bench import bench, command, environment

# Blocks torch, and prints on stdout when the runtime is imported, as some runtimes do.
SITE = """
import sys
for name in ("torch", "timm", "nncf", "PIL"):
    sys.modules[name] = None
class Noise:
    def find_spec(self, name, path=None, target=None):
        if name == "openvino":
            print("noise on stdout", flush=True)
sys.meta_path.insert(0, Noise())
"""


def run(*arguments: str, site: Path | None = None, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    env = environment()
    if site is not None:
        (site / "sitecustomize.py").write_text(SITE)
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(site), env.get("PYTHONPATH")]))
    return subprocess.run(command(*arguments), capture_output=True, text=True, env=env, cwd=cwd, timeout=120)


def test_numpy_and_the_runtime_are_enough_and_stdout_holds_the_document_only(tmp_path: Path, make) -> None:  # type: ignore[no-untyped-def]
    one, two = make("one"), make("two", batch=4)
    (tmp_path / "site").mkdir()
    (tmp_path / "random.py").write_text("raise SystemExit('the working directory is no place of modules')")
    result = run(
        *(str(one.path), "--against", str(two.path), "--threads", "1", "--seconds", "0", "--memory"),
        site=tmp_path / "site",
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("\n") == 1
    document = json.loads(result.stdout)
    assert document["threads"] == 1
    assert document["rounds"] == 5
    first, second = document["artifacts"]
    assert (first["speedup"], first["speedup_ci"]) == (1, [1, 1])
    assert second["speedup_ci"][0] <= second["speedup"] <= second["speedup_ci"][1]
    for row, batch in ((first, 1), (second, 4)):
        assert row["batch"] == batch
        assert 0 < row["latency_ms"] <= row["p95_ms"]
        assert row["throughput"] > 0
        assert row["runs"] >= 5
        if sys.platform == "linux":
            assert row["memory_mb"] >= row["steady_mb"] > 10
            assert abs(row["memory_above_empty_mb"]) < row["memory_mb"]
        assert (row["energy_mj"] is None) == (row["energy_source"] == "not available")


def test_capabilities_need_no_artifact() -> None:
    result = run("--capabilities", "openvino")
    found = json.loads(result.stdout)["capabilities"]
    assert found["processors"] >= 1
    assert found["runtime"] == "openvino"
    assert found["runtime_version"]
    assert {"fp32"} <= set(found["precisions"])


def test_bad_input_is_one_sentence_and_exit_code_2(tmp_path: Path, make, capsys: pytest.CaptureFixture[str]) -> None:  # type: ignore[no-untyped-def]
    damaged, altered = make("damaged"), make("altered")
    for artifact in (damaged, altered):
        artifact.graphs[0].write_text("<net>")
    files = {**damaged.plan["files"], "stage0.xml": hashlib.sha256(b"<net>").hexdigest()}
    (damaged.path / "plan.json").write_text(json.dumps({**damaged.plan, "files": files}))
    for arguments, words in (
        ([str(tmp_path / "none")], "is no artifact"),
        ([str(altered.path)], "stage0.xml was altered since its export"),
        ([str(damaged.path)], "damaged does not run here: OpenVINO cannot open"),
        ([str(make("batch").path), "--batch", "8"], "was exported for batch 1, not 8"),
        ([], "name an artifact"),
    ):
        assert module.main([*arguments, "--threads", "1", "--seconds", "0"]) == 2
        out, err = capsys.readouterr()
        assert words in json.loads(out)["error"]
        assert words in err
        assert err.count("\n") == 1
    for arguments in (["--seconds", "nan"], ["--threads", "0"], ["--capabilities", "abacus"]):
        with pytest.raises(SystemExit) as ended:
            module.main(arguments)
        assert ended.value.code == 2


def test_a_worker_that_crashes_says_how(make, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    crash = (
        "import os, sys; sys.stdin.readline()\n"
        "print('illegal hardware', file=sys.stderr, flush=True); os.kill(os.getpid(), 4)"
    )
    monkeypatch.setattr(module, "command", lambda *_: [sys.executable, "-c", crash])
    with pytest.raises(LissomError, match=r"does not run here: .* signal SIGILL \(illegal hardware\)"):
        bench([make()], threads=1, seconds=0)


class Scripted:
    """A worker whose runs take ``seconds`` times the slowness of the moment."""

    log: list[str] = []  # noqa: RUF012

    def __init__(self, name: str, seconds: float, slowness: Callable[[int], float] = lambda _: 1.0) -> None:
        self.name, self.seconds, self.slowness, self.blocks = name, seconds, slowness, 0

    def ask(self, do: str, runs: int = 0) -> dict[str, object]:
        if do == "warm":
            return {"seconds": self.seconds}
        self.log.append(self.name)
        self.blocks += 1
        seconds = self.seconds * self.slowness(self.blocks)
        return {"times": [seconds] * runs, "exits": [[seconds]] * runs}


def test_workers_take_turns_in_rotating_order() -> None:
    Scripted.log.clear()
    workers = [Scripted("A", 0.01), Scripted("B", 0.02), Scripted("C", 0.1)]
    times = module._interleave(workers, seconds=0.6)  # type: ignore[arg-type]
    # One run of C takes 0.1 s, so every block does; six of them make 0.6 s.
    assert "".join(Scripted.log) == "ABCBCACAB" * 2
    assert [len(rounds) for rounds in times] == [6, 6, 6]
    assert [len(rounds[0].times) for rounds in times] == [10, 5, 1]


def test_the_percentile_of_samples_that_leave_early() -> None:
    exits = np.array([[1.0, 3.0], [2.0, 4.0]])
    # Nine of ten leave first: the samples' times are 45 % 1, 45 % 2, 5 % 3, 5 % 4.
    shares = np.array([0.9, 0.1])
    assert [module._percentile(exits, shares, p) for p in (40, 50, 92, 97)] == [1, 2, 3, 4]
    assert module._percentile(exits[:, :1], np.array([1.0]), 50) == 1.5


def test_what_slows_all_changes_no_ratio() -> None:
    rng = np.random.default_rng(0)
    slow = rng.uniform(1, 5, 100)
    reference = [0.03 * np.full(3, s) for s in slow]
    half = [0.015 * np.full(6, s) for s in slow]
    speedup, (low, high) = module.paired(reference, half)
    assert speedup == pytest.approx(2)
    assert (low, high) == pytest.approx((2, 2))
    # Unpaired noise widens the interval, which still holds the truth; the same seed gives the same interval.
    noisy = [r * n for r, n in zip(half, rng.lognormal(0, 0.2, 100), strict=True)]
    speedup, (low, high) = module.paired(reference, noisy)
    assert low < 2 < high
    assert high - low > 0.01
    assert module.paired(reference, noisy) == (speedup, (low, high))


def test_warm_up_goes_on_until_times_settle(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = module._Bench()
    clock = [0.0]
    times = iter([0.1, 0.09, 0.08, 0.07, 0.06, 0.05, 0.04, 0.03, 0.02, 0.02, 0.02, 0.02, 0.02, 0.02, 0.02, 0.02, 0.02])

    def fake() -> tuple[float, list[float]]:
        taken = next(times)
        clock[0] += taken
        return taken, [taken]

    monkeypatch.setattr(worker, "_time", fake)
    monkeypatch.setattr(module.time, "perf_counter", lambda: clock[0])
    assert worker.warm() == {"seconds": 0.02}
    assert clock[0] == pytest.approx(0.1 + 0.09 + 0.08 + 0.07 + 0.06 + 0.05 + 0.04 + 0.03 + 8 * 0.02)


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _until(condition: Callable[[], object], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("how", ["kill", "interrupt", "stdin"])
def test_workers_end_with_their_coordinator(how: str, make) -> None:  # type: ignore[no-untyped-def]
    artifact = str(make().path)
    coordinator = subprocess.Popen(
        command(artifact, "--against", artifact, "--threads", "1", "--seconds", "600", "--end-with-stdin"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
    )
    assert coordinator.stdin is not None
    try:
        _until(lambda: len(_children(coordinator.pid)) == 2)
        workers = _children(coordinator.pid)
        if how == "kill":
            coordinator.kill()
        elif how == "interrupt":
            coordinator.send_signal(signal.SIGINT)
        else:
            coordinator.stdin.close()
        code = coordinator.wait(timeout=60)
        assert code == (-signal.SIGKILL if how == "kill" else 130)
        _until(lambda: not any(map(_alive, workers)))
    finally:
        coordinator.kill()
        coordinator.wait()
