"""What hangs fails and ends, by the settings in pyproject.toml."""

import os
import subprocess
import sys
from pathlib import Path

CONFIGURATION = Path(__file__).parents[1] / "pyproject.toml"


def test_a_test_that_hangs_in_c_with_the_interpreter_locked_ends_its_process(tmp_path):
    """No signal handler and no thread of Python's could run there."""
    (tmp_path / "test_hang.py").write_text(
        "import ctypes\ndef test_hang():\n    ctypes.PyDLL(None).sleep(100)\ndef test_next():\n    pass\n"
    )
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-c",
        str(CONFIGURATION),
        "--rootdir",
        str(tmp_path),
        "-p",
        "no:cacheprovider",
    ]
    done = subprocess.run(
        [*command, "-o", "faulthandler_timeout=1", "test_hang.py"],
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if not name.startswith("PYTEST")},
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert done.returncode not in (0, 5), done.stdout
    assert "Timeout (0:00:01)!" in done.stderr
    assert 'test_hang.py", line 3 in test_hang' in done.stderr
