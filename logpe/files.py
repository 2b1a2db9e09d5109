"""Atomic writes, files of tensors, and the lock on a folder that a program writes to."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


class Busy(RuntimeError):
    """Another process writes to the folder."""


@contextlib.contextmanager
def locked(folder: Path, name: str = "", wait: bool = False) -> Iterator[None]:
    """Keep other processes from writing to ``folder``, or only to ``name`` in it, while the context lasts.

    The lock is the file ``.lock``, or ``.name.lock``, in the folder. The file stays there, and is unlocked as soon as
    the process that holds the lock has ended, however it ended.

    Args:
        folder: created if it does not exist.
        wait: for the lock, instead of raising Busy.

    Raises:
        Busy: another process, or another context of this one, holds the lock.
        OSError: the folder cannot be written.
    """
    import filelock

    folder.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder / (f".{name}.lock" if name else ".lock"))
    try:
        lock.acquire(blocking=wait)
    except filelock.Timeout:
        raise Busy(f"another run writes to {folder / name}: wait until it has ended, or name another folder") from None
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Make an OSError that is raised inside name ``path`` if it names no file, as that of a full disk does not."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Replace the file at ``path`` atomically: on the disk is the old one, or the whole new one.

    Args:
        write: writes the new file to the path it is given.

    Raises:
        OSError: names the file.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with naming(path):
        try:
            write(temporary)
            sync(temporary)
            os.replace(temporary, path)
        except Exception:  # do not leave behind what may fill the disk
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
        sync(path.parent)


def save_tensors(tensors: Any, path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write ``tensors``, by name, to a file of safetensors. Raises OSError."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(tensors, path, metadata)
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from None


def load_tensors(path: Path) -> dict[str, Any]:
    """Return the tensors of a file of safetensors by name. Raises OSError, and ValueError if it is damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from None


def sync(path: Path) -> None:
    """Wait until the file or folder is on the disk. On Windows, which cannot do this for a folder, do nothing."""
    if os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
