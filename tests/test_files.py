"""Locks on folders of output."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from logpe import files

HOLDING = """
import sys, time
from pathlib import Path
from logpe import files

with files.locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_lock(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "out"
    with files.locked(folder):
        for _ in range(2):  # refusing does not free it
            with pytest.raises(files.Busy, match=f"another run writes to {folder}: .*name another folder"):
                files.locked(folder).__enter__()
        with (
            files.locked(tmp_path),
            files.locked(folder, "a file"),  # something else
            pytest.raises(files.Busy, match=f"another run writes to {folder}/a file: "),
        ):
            files.locked(folder, "a file").__enter__()
    with pytest.raises(KeyError), files.locked(folder):
        raise KeyError
    with files.locked(folder):
        pass


def test_lock_of_a_process_that_died(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLDING, str(tmp_path)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(files.Busy):
            files.locked(tmp_path).__enter__()
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        with files.locked(tmp_path):
            pass
