"""One table: (op, device) -> implementation, and why a better one is missing. Nothing above names a backend."""

import functools
import importlib
import math
import os
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from csq_kernels import _native, reference
from csq_kernels._ops import CHECKS, SCHEMAS, library

DEVICES = ("cpu", "cuda")
PREFERENCE = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}
BACKENDS = ("cpu", "cuda", "triton", "reference")
FORCED = os.environ.get("CSQ_BACKEND") or None
if FORCED is not None and FORCED not in BACKENDS:
    raise ValueError(f"expected CSQ_BACKEND as one of {', '.join(BACKENDS)}, got {FORCED!r}")


# Position of the temperature among the arguments.
_TEMPERATURE = {"reconstruct": 3, "reconstruct_backward": 4}


class Unavailable(RuntimeError):
    """A backend cannot serve an op here; the message says why."""


@dataclass(frozen=True)
class Choice:
    """Which backend serves ``op`` on ``device``, and why each one that would be preferred does not."""

    op: str
    device: str
    backend: str
    missing: tuple[str, ...]


def implementation(op: str, backend: str) -> Callable:
    """Return the function of ``backend`` that computes ``op``; it has the signature of its twin in ``reference``.

    Raises:
        Unavailable: the backend does not exist on this machine; the message says why.
    """
    if backend == "reference":
        return getattr(reference, op)
    if backend in ("cpu", "cuda"):
        if _native.module is None:
            raise Unavailable(_native.reason)
        if backend == "cuda" and not _native.module.cuda_architectures:
            raise Unavailable("the native module was built without CUDA")
    name = "triton_reconstruct" if backend == "triton" else backend
    try:
        module = importlib.import_module(f"csq_kernels.backends.{name}")
    except ModuleNotFoundError as error:
        raise Unavailable(f"backend {backend} needs the package {error.name}, which is not installed") from error
    if not hasattr(module, op):
        raise Unavailable(f"backend {backend} does not implement {op}")
    return getattr(module, op)


@functools.cache
def choose(op: str, device: str) -> tuple[Choice, Callable]:
    """Return the choice for ``(op, device)`` and its function; a forced backend that is unavailable is an error."""
    missing = []
    for backend in (FORCED,) if FORCED in (*PREFERENCE[device], "reference") else PREFERENCE[device]:
        try:
            function = implementation(op, backend)
        except Unavailable as reason:
            missing.append(f"{backend}: {reason}")
            continue
        return Choice(op, device, backend, tuple(missing)), function
    raise Unavailable(f"CSQ_BACKEND={FORCED} cannot serve {op} on {device}: {'; '.join(missing)}")


def choices() -> list[Choice]:
    """Return the choice for every op and device; what ``csq info`` prints."""
    return [choose(op, device)[0] for op in SCHEMAS for device in DEVICES]


def _check_temperature(temperature: Tensor) -> None:
    """Only where reading it costs nothing: on a GPU the watchdog of the search looks at it."""
    value = temperature.item()
    if not 0 < value < math.inf:
        raise ValueError(f"expected temperature to be positive and finite, got {value}")


def _serve(op: str, device: str | None) -> Callable:
    """Check, then compute with what was chosen for ``device``, or with the reference on any other device."""
    check = CHECKS[op]

    def serve(*args):
        check(*args)
        if device == "cpu":
            _check_temperature(args[_TEMPERATURE[op]])
        function = getattr(reference, op) if device is None else choose(op, device)[1]
        return function(*args)

    return serve


for _op in SCHEMAS:
    for _device, _key in (("cpu", "CPU"), ("cuda", "CUDA"), (None, "CompositeExplicitAutograd")):
        library.impl(_op, _serve(_op, _device), _key)
