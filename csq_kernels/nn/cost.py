"""What a set of active bits costs. Paper bits count the active gates; stored bits count the planes that the file
spends.

Digits are ternary, so a run of ``r`` adjacent active bits spans ``-(2^r - 1) .. 2^r - 1`` and is stored as ``r + 1``
planes of two's complement; a gap starts a new run. Filling a gap of one bit is therefore free.
"""

from collections.abc import Collection

SCALE_BYTES = 4


def runs(active: Collection[int]) -> int:
    """Number of runs of adjacent exponents in ``active``.

    >>> runs({0, 1, 4})
    2
    """
    chosen = set(active)
    return sum(1 for bit in chosen if bit + 1 not in chosen)


def stored_bits(active: Collection[int]) -> int:
    """Stored planes of a layer whose active exponents are ``active``: one a bit and one more a run.

    >>> stored_bits({0, 1, 4}), stored_bits({2}), stored_bits(())
    (5, 2, 0)
    """
    return len(set(active)) + runs(active)


def weight_bytes(active: Collection[int], weights: int, scales: int) -> int:
    """Bytes of a layer's planes and scales.

    >>> weight_bytes({2}, weights=100, scales=1)
    30
    """
    return stored_bits(active) * ((weights + 7) // 8) + SCALE_BYTES * scales
