"""Checkpoints that are whole or not there: a folder ``step-00000100`` each, of which the last good ones are kept."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from logpe.files import naming, sync

MANIFEST = "checkpoint.json"


def save(root: Path, step: int, write: Callable[[Path], object], about: dict[str, Any], keep: int) -> Path:
    """Write a new checkpoint, after which all but the ``keep`` newest go.

    Args:
        root: folder of the checkpoints.
        step: which one; one of the same step is replaced.
        write: puts the files into the folder that it is given.
        about: goes into the manifest, beside the step and the digest of each file.

    Returns:
        The folder, ``root / "step-..."``. A process that dies on the way leaves those before as they were.
    """
    root.mkdir(parents=True, exist_ok=True)
    tidy(root, keep)
    path = root / f"step-{step:08d}"
    temporary = root / f".{path.name}.tmp"
    temporary.mkdir()
    with naming(path):
        write(temporary)
        files = {file.name: _digest(file) for file in sorted(temporary.iterdir())}
        manifest = dict(step=step, **about, files=files)
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
        for file in (*temporary.iterdir(), temporary):
            sync(file)
    if path.exists():
        _remove(path)
    os.rename(temporary, path)
    sync(root)
    tidy(root, keep)
    return path


def tidy(root: Path, keep: int) -> None:
    """Remove all but the ``keep`` newest checkpoints, and what a process that died left half written or removed."""
    for old in _list(root)[keep:]:
        _remove(old)
    for leftover in root.glob(".*.tmp"):
        shutil.rmtree(leftover)


def newest(root: Path, aside: bool = True) -> tuple[Path, dict[str, Any]] | None:
    """Return the newest good checkpoint and its manifest; None where there is none.

    A warning names the file at fault of a damaged one, which is renamed to ``step-....damaged`` unless ``aside`` is
    False: where the folder is another program's.
    """
    for path in _list(root):
        damage = damaged(path)
        if damage is None:
            return path, json.loads((path / MANIFEST).read_text())
        warnings.warn(f"checkpoint left out: {damage}", stacklevel=2)
        if aside:
            other = path.with_name(path.name + ".damaged")
            if other.exists():
                shutil.rmtree(other)
            os.rename(path, other)
    return None


def damaged(path: Path) -> str | None:
    """Return what is wrong with a checkpoint, or None."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        files = dict(manifest["files"]).items()
        if manifest["step"] != int(path.name.removeprefix("step-")):
            raise ValueError(f"it is of step {manifest['step']}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{path / MANIFEST} cannot be read ({type(error).__name__}: {error})"
    for name, digest in files:
        try:
            if _digest(path / name) != digest:
                return f"{path / name} is not what was written (its SHA-256 differs)"
        except OSError as error:
            return f"{path / name} cannot be read ({error.strerror})"
    return None


def _list(root: Path) -> list[Path]:
    """Return the checkpoints, the newest first."""
    steps = [path for path in root.glob("step-*") if path.name.removeprefix("step-").isdigit()]
    return sorted(steps, key=lambda path: int(path.name.removeprefix("step-")), reverse=True)


def _remove(path: Path) -> None:
    """Remove a checkpoint in one moment: half of one never stands under a checkpoint's name."""
    trash = path.with_name(f".{path.name}.old.tmp")
    os.rename(path, trash)
    shutil.rmtree(trash)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
