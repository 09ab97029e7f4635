"""Linear layers with few bits a weight, from this library and from others, behind one interface.

A family is a module with ``available()``, None or the reason why its library cannot run, ``version()``, ``providers()``
"""

import math
from dataclasses import dataclass
from typing import Protocol

from accuracy import Verdict
from trust import Entry

# Four times the last-level cache of common servers, so that batch 1 reads every weight from memory.
COLD_BYTES = 144_000_000
FAMILIES = {"csq": "peers.csq", "torch": "peers.pytorch", "onnxruntime": "peers.ort", "ggml": "peers.ggml"}

Shape = tuple[int, int]  # of a weight: outputs, inputs


@dataclass(frozen=True)
class Walk(Entry):
    """One call of each of several layers; ``weight_bytes`` is what they store, scales included.

    One without ``inputs`` keeps them and its results to itself, and cannot be inspected.
    """

    layers: int = 1
    weight_bytes: int = 0
    verdict: Verdict | None = None


class Provider(Protocol):
    """One kernel. ``bits`` is its nominal width; ``activation`` what the input becomes before it is multiplied."""

    name: str
    bits: int
    activation: str

    def walk(self, shape: Shape, batch: int, threads: int) -> Walk: ...


def chain(shape: Shape, bits: float, batch: int) -> list[Shape]:
    """The layers of a walk, each weight shape followed by its transpose, so that outputs fit the next layer.

    A walk stores ``COLD_BYTES``, less in proportion above 8 inputs, where a walk takes long enough with fewer layers.
    """
    pair = [shape, shape[::-1]]
    pair_bytes = 2 * math.prod(shape) * bits / 8
    return pair * max(1, math.ceil(COLD_BYTES / max(1, batch / 8) / pair_bytes))
