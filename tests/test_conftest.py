"""``--resume``: a run that was cut off goes on, and any change begins anew."""

import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def run(folder: Path) -> str:
    command = [sys.executable, "-m", "pytest", "--resume", "tests"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    return done.stdout.strip().splitlines()[-1]


def test_what_passed_is_left_out_until_a_file_changes(tmp_path: Path) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    shutil.copy(HERE / "conftest.py", tmp_path / "tests")
    tests = tmp_path / "tests" / "test_two.py"
    two = (
        "import pathlib\n\ndef test_one():\n    pass\n\ndef test_other():\n    assert pathlib.Path('ready').exists()\n"
    )
    tests.write_text(two)
    assert "1 failed, 1 passed" in run(tmp_path)
    (tmp_path / "ready").touch()
    assert "1 passed, 1 deselected" in run(tmp_path)
    assert "2 deselected" in run(tmp_path)
    tests.write_text(f"{two}\n")
    assert "2 passed" in run(tmp_path)
