"""Locks on folders of output."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from logpe import checkpoint

HOLDING = """
import sys, time
from pathlib import Path
from logpe import checkpoint

with checkpoint.locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_lock(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "out"
    with checkpoint.locked(folder):
        for _ in range(2):  # refusing does not free it
            with pytest.raises(checkpoint.Busy, match=f"another run writes to {folder}: .*name another folder"):
                checkpoint.locked(folder).__enter__()
        with (
            checkpoint.locked(tmp_path),
            checkpoint.locked(folder, "a file"),  # something else
            pytest.raises(checkpoint.Busy, match=f"another run writes to {folder}/a file: "),
        ):
            checkpoint.locked(folder, "a file").__enter__()
    with pytest.raises(KeyError), checkpoint.locked(folder):
        raise KeyError
    with checkpoint.locked(folder):
        pass


def test_lock_of_a_process_that_died(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLDING, str(tmp_path)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(checkpoint.Busy):
            checkpoint.locked(tmp_path).__enter__()
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        with checkpoint.locked(tmp_path):
            pass
