"""One file with everything a run needs to go on, replaced atomically; the one before stays as ``checkpoint.prev``."""

import os
from pathlib import Path
from typing import Any

import torch

from csq_kernels.files import write_atomically

VERSION = 1
NAME = "checkpoint.pt"
PREVIOUS = "checkpoint.prev"
KEYS = frozenset({"version", "phase", "step", "model", "optimizer", "search", "rng", "results", "seconds", "recipe"})


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or read; the message names the file and says what still stands."""


def exists(folder: Path) -> bool:
    """Whether there is a checkpoint in ``folder``: one to go on from, and not to be overwritten."""
    # Killed between the two renames of save, there is the previous one alone.
    return (folder / NAME).exists() or (folder / PREVIOUS).exists()


def save(folder: Path, state: dict[str, Any]) -> None:
    """Write ``state`` to ``folder/checkpoint.pt``; the checkpoint that stood there becomes ``checkpoint.prev``.

    Raises:
        CheckpointError: it cannot be written, for example because the disk is full. The old checkpoint is untouched.
    """
    path = folder / NAME
    temporary = path.with_name(NAME + ".new")
    try:
        write(temporary, {"version": VERSION, **state})
        if path.exists():
            os.replace(path, folder / PREVIOUS)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        kept = f"; the checkpoint before it is intact: {path}" if path.exists() else ""
        raise CheckpointError(f"cannot write {path}: {error}{kept}") from error


def write(path: Path, state: dict[str, Any]) -> None:
    """Write tensors and plain values to ``path``, whole or not at all. Raises ``OSError``."""
    try:
        write_atomically(path, lambda file: torch.save(state, file))
    except RuntimeError as error:
        # torch.save reports a failed write of its archive so, with the OSError as context or lost.
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise OSError(str(error).splitlines()[0]) from error


def load(folder: Path) -> dict[str, Any]:
    """Read ``folder/checkpoint.pt``, on the CPU and without running any pickled code.

    Raises:
        CheckpointError: missing, damaged, or of another version. Nothing is changed on disk.
    """
    path, previous = folder / NAME, folder / PREVIOUS
    spare = f"; the one before is intact: to go on from it, mv {previous} {path}" if previous.exists() else ""
    if not path.exists():
        # Killed between the two renames of save: the previous one is the newest that is whole.
        path, spare = previous, ""
    if not path.exists():
        raise CheckpointError(f"expected a checkpoint {folder / NAME}, found none")
    return read(path, spare)


def read(path: Path, advice: str = "") -> dict[str, Any]:
    """Read one checkpoint file, on the CPU and without running any pickled code; ``advice`` ends every message."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    # A damaged archive surfaces as almost any exception of zipfile, pickle or torch.
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(f"cannot read {path}, it is damaged: {reason[0]}{advice}") from error
    if not isinstance(state, dict) or not KEYS <= state.keys():
        raise CheckpointError(f"expected {path} to be a checkpoint of csq train, got something else{advice}")
    if state["version"] != VERSION:
        raise CheckpointError(f"expected {path} of version {VERSION}, got {state['version']}")
    return state
