"""One table: (op, device) -> implementation, and why a better one is missing. Nothing above names a backend."""

import functools
import importlib
import math
import os
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from csq_kernels import _native, reference, reference_step
from csq_kernels._ops import CHECKS, SCHEMAS, check_planes, library
from csq_kernels.step import STEP_OPS

DEVICES = ("cpu", "cuda")
PREFERENCE = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}
BACKENDS = ("cpu", "cuda", "triton", "reference")
FORCED = os.environ.get("CSQ_BACKEND") or None
if FORCED is not None and FORCED not in BACKENDS:
    raise ValueError(f"expected CSQ_BACKEND as one of {', '.join(BACKENDS)}, got {FORCED!r}")


# Position of the temperature among the arguments of the ops that have one.
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


def _module(op: str, backend: str) -> types.ModuleType:
    """The module of ``backend`` for the family of ``op``, such as ``cpu_reconstruct``."""
    if backend == "reference":
        return reference_step if op in STEP_OPS else reference
    if backend in ("cpu", "cuda"):
        if _native.module is None:
            raise Unavailable(_native.reason)
        if backend == "cuda" and not _native.module.cuda_architectures:
            raise Unavailable("the native module was built without CUDA")
    name = f"{__name__}.{backend}_{op.partition('_')[0]}"
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name == name:
            raise Unavailable(f"backend {backend} does not implement {op}") from None
        raise Unavailable(f"backend {backend} needs the package {error.name}, which is not installed") from error


def implementation(op: str, backend: str) -> Callable:
    """Return the function of ``backend`` that computes ``op``; it has the signature of its twin in ``reference``.

    Raises:
        Unavailable: the backend does not exist on this machine; the message says why.
    """
    function = getattr(_module(op, backend), op, None)
    if function is None:
        raise Unavailable(f"backend {backend} does not implement {op}")
    return function


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


def tile(op: str, planes: Tensor, coefficients: Sequence[int], weight_shape: Sequence[int]) -> Tensor:
    """Canonical planes in the order that ``op`` reads on their device; themselves where it reads them as they are."""
    if planes.ndim != 2:
        raise ValueError(f"expected canonical planes, which have 2 axes, got shape {tuple(planes.shape)}")
    return _reorder("tile", op, planes, coefficients, weight_shape)


def untile(op: str, planes: Tensor, coefficients: Sequence[int], weight_shape: Sequence[int]) -> Tensor:
    """The canonical planes of which ``tile`` made ``planes``."""
    return planes if planes.ndim == 2 else _reorder("untile", op, planes, coefficients, weight_shape)


def _reorder(direction: str, op: str, planes: Tensor, *weight) -> Tensor:
    if op not in SCHEMAS:
        raise ValueError(f"expected op as one of {', '.join(SCHEMAS)}, got {op!r}")
    check_planes(planes, *weight)
    device, function = planes.device.type, None
    if device in DEVICES:
        function = getattr(_module(op, choose(op, device)[0].backend), f"{op}_{direction}", None)
    if function is not None:
        return function(planes, *weight)
    if planes.ndim != 2:
        raise ValueError(f"expected canonical planes for {op} on {device}, got shape {tuple(planes.shape)}")
    return planes


def kernel(op: str, *arguments) -> str:
    """Name what computes this call of ``op``: the kernel where its backend tells several apart, else the backend.

    Example:
        >>> import torch
        >>> kernel("bitserial_weight", torch.empty(1, 1, dtype=torch.uint8, device="meta"))
        'reference'
    """
    device = next(argument for argument in arguments if isinstance(argument, Tensor)).device.type
    if device not in DEVICES:
        return "reference"
    backend = choose(op, device)[0].backend
    name = getattr(_module(op, backend), f"{op}_kernel", None)
    return backend if name is None else name(*arguments)


def choices() -> list[Choice]:
    """Return the choice for every op and device; what ``csq info`` prints."""
    return [choose(op, device)[0] for op in (*SCHEMAS, *STEP_OPS) for device in DEVICES]


def step_function(op: str, device: str) -> Callable:
    """The function of ``step.STEP_OPS`` that serves ``device``; the reference where no backend knows it."""
    return choose(op, device)[1] if device in DEVICES else getattr(reference_step, op)


def _check_temperature(temperature: Tensor) -> None:
    """Only where reading it costs nothing: on a GPU the watchdog of the search looks at it."""
    value = temperature.item()
    if not 0 < value < math.inf:
        raise ValueError(f"expected temperature to be positive and finite, got {value}")


@functools.cache
def serve(op: str, device: str | None) -> Callable:
    """The function that checks, then computes with what was chosen for ``device``, or with the reference on any other.

    It is what the dispatcher calls; an eager caller may call it at once.
    """
    check = CHECKS[op]

    def served(*args):
        check(*args)
        if device == "cpu" and op in _TEMPERATURE:
            _check_temperature(args[_TEMPERATURE[op]])
        function = getattr(reference, op) if device is None else choose(op, device)[1]
        return function(*args)

    return served


for _op in SCHEMAS:
    for _device, _key in (("cpu", "CPU"), ("cuda", "CUDA"), (None, "CompositeExplicitAutograd")):
        library.impl(_op, serve(_op, _device), _key)
