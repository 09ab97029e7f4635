"""Loads the native module ``csq_kernels._C``, or keeps the reason why it is missing. ``info()``: what runs where."""

import importlib
import importlib.metadata
import os
import types
import warnings
from pathlib import Path
from typing import Any

import torch  # first: its libgomp is then the one that _C finds, and the process has one thread pool

# The threads of an OpenMP pool do not survive a fork, and a child that waits for them hangs. Data loaders do the same.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))

module: types.ModuleType | None = None
reason: str | None = None
try:
    module = importlib.import_module("csq_kernels._C")
except ModuleNotFoundError as error:
    reason = f"the native module was not built: {error}; pip install -v shows why"
    source = Path(__file__).resolve().parents[1]
    if (source / "setup.py").exists():
        reason += f"; {source} holds sources: start Python elsewhere, or build in place with pip install -e ."
except ImportError as error:
    reason = f"the native module cannot be loaded: {error}"
if reason is not None:
    warnings.warn(f"csq_kernels computes with plain PyTorch on the CPU: {reason}", RuntimeWarning, stacklevel=2)


def _version_or_reason(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def info() -> dict[str, Any]:
    """Return versions, how the native module was built or why it is missing, and which backend serves each op and why.

    Example:
        >>> import csq_kernels
        >>> sorted(csq_kernels.info())[:3]
        ['compiler', 'cuda_architectures', 'forced_backend']
    """
    from csq_kernels import backends

    return {
        "version": _version_or_reason("csq_kernels"),
        "torch": torch.__version__,
        "triton": _version_or_reason("triton"),
        "native": "built" if module is not None else reason,
        "compiler": module.compiler if module is not None else None,
        "cuda_architectures": module.cuda_architectures if module is not None else [],
        "isa": module.isa() if module is not None else None,
        "supported_isas": module.supported_isas() if module is not None else [],
        "threads": torch.get_num_threads(),
        "forced_backend": backends.FORCED,
        "ops": [
            {"op": choice.op, "device": choice.device, "backend": choice.backend, "missing": list(choice.missing)}
            for choice in backends.choices()
        ],
    }
