"""What a provider is not trusted with: results that are stale, zero, lazy or late, and inputs that it writes to.

Every timed call follows one with other inputs, and the results of both are looked at: they must be tensors that are
there, change with the inputs, stay as they are once the call has returned, and be near those of a yardstick that met
the same inputs. How far exactly they may err is for each suite to judge, before anything is timed.
"""

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

# Times this, and then times its inverse, floats are what they were, to the bit.
FLIP = -0.5
SAMPLED = 4096  # elements of a tensor that are compared
# Relative distance from the yardstick. bfloat16 errs 0.4 %; a result for other inputs is wrong by more than 100 %.
FAR = 0.1
# On a GPU inputs change so late after a call was launched, on its stream, that work on another one meets the old ones.
DELAY_CYCLES = 20_000_000

Key = TypeVar("Key", bound=Hashable)


class UntrustedError(Exception):
    """A provider did what it must not; the message says what."""


def tensors(result: object) -> Iterable[Tensor]:
    """The tensors that a call returned: one, or a sequence of them."""
    return result if isinstance(result, (list, tuple)) else [result]


@dataclass(frozen=True)
class Entry:
    """One thing to time: ``prepare`` runs before each call, outside the clock.

    ``inputs`` are the floating tensors that a call reads and must leave as they are; ``outputs`` finds what it computed
    from what it returned.
    """

    run: Callable[[], object]
    prepare: Callable[[], object] = lambda: None
    inputs: tuple[Tensor, ...] = ()
    outputs: Callable[[Any], Iterable[Tensor]] = tensors


@dataclass(frozen=True)
class Observation:
    """Samples of the results of two calls: with the inputs changed, and with the inputs as given."""

    changed: list[Tensor]
    given: list[Tensor]


def sample(outputs: Iterable[Tensor], device: str) -> list[Tensor]:
    """Some elements of each tensor, in float64."""
    samples = []
    for output in outputs:
        if type(output) not in (Tensor, nn.Parameter):
            raise UntrustedError(f"lazy: expected a tensor that holds its values, got {type(output).__name__}")
        if output.device.type != device or output.layout is not torch.strided:
            raise UntrustedError(f"lazy: expected a dense tensor on {device}, got {output.layout} on {output.device}")
        flat = output.detach().reshape(-1)
        samples.append(flat[:: max(1, flat.numel() // SAMPLED)].double().cpu())
    if not samples:
        raise UntrustedError("lazy: expected results, got none")
    return samples


def _sums(inputs: Iterable[Tensor]) -> list[int]:
    """A number for the bits of each tensor."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return [int(each.detach().view(integers[each.element_size()]).sum(dtype=torch.int64)) for each in inputs]


@torch.no_grad()
def _scale(inputs: Iterable[Tensor], factor: float) -> None:
    for each in inputs:
        each.mul_(factor)


def _equal(some: list[Tensor], others: list[Tensor]) -> bool:
    return all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(some, others, strict=True))


def observe(entry: Entry, device: str, call: Callable[[], object]) -> Observation:
    """Run ``entry`` with its inputs changed, then ``call``, which runs it with the inputs as given, and look at both.

    Raises:
        UntrustedError: the results are lazy, zero, stale or late, or the inputs are others now.
    """
    before = _sums(entry.inputs)
    entry.prepare()
    if device == "cuda":
        torch.cuda._sleep(DELAY_CYCLES)
    _scale(entry.inputs, FLIP)
    changed = sample(entry.outputs(entry.run()), device)
    _scale(entry.inputs, 1 / FLIP)
    entry.prepare()
    outputs = list(entry.outputs(call()))
    given = sample(outputs, device)
    if device == "cuda":
        # The sample has waited for the call's stream alone; what is computed on another one comes now.
        torch.cuda.synchronize()
    if _sums(entry.inputs) != before:
        raise UntrustedError("it writes to its inputs")
    if not _equal(given, sample(outputs, device)):
        raise UntrustedError("late: its results change after it has returned")
    if not any(each.any() for each in given):
        raise UntrustedError("its results are zero")
    if entry.inputs and _equal(given, changed):
        raise UntrustedError("stale: other inputs give the same results")
    entry.prepare()
    return Observation(changed, given)


def far(found: Observation, yardstick: Observation) -> str | None:
    """Why ``found`` cannot be the results that ``yardstick`` are, ``None`` if it can."""
    for name in ("changed", "given"):
        mine, theirs = getattr(found, name), getattr(yardstick, name)
        if len(mine) != len(theirs):
            return f"expected {len(theirs)} results as the yardstick has, got {len(mine)}"
        for one, other in zip(mine, theirs, strict=True):
            if one.shape != other.shape:
                return "its results are not of the yardstick's size"
            distance, size = float((one - other).norm()), float(other.norm())
            if not distance <= FAR * size:
                return f"its results for inputs as {name} are off by {distance:.2e}, of {size:.2e}"
    return None


def compare(observed: Mapping[Key, Observation], yardstick: Callable[[Key], Key]) -> dict[Key, str]:
    """What is far from its yardstick, and why; an entry whose yardstick was not observed is its own."""
    reasons = {key: far(found, observed.get(yardstick(key), found)) for key, found in observed.items()}
    return {key: reason for key, reason in reasons.items() if reason is not None}
