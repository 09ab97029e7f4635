"""Integer weights as bit-planes: the canonical, lossless form that files hold; every kernel's own order is made of it.

A plane is one bit of every weight, a bit stream in row-major order of the weight, least significant bit of a byte
first::

    weight (flattened)   0 1 2 3 4 5 6 7   8 9 ...
    byte                 [      0       ]  [   1
    bit of the byte      0 1 2 3 4 5 6 7   0 1 ...      the last byte is filled up with zeros

    planes[0]  coefficient k_0, the most significant        z = sum_j k_j * planes[j]
    planes[1]  coefficient k_1, |k_1| < |k_0|

Digits of equation (7) are -1, 0 or 1, so a run of ``r`` adjacent active bits spans ``-(2^r - 1) .. 2^r - 1`` and needs
at most ``r + 1`` planes of two's complement: only the coefficient of its top plane is negative. A gap of two or more
bits starts a new run; a gap of one costs the same either way and is filled. A plane that holds no 1 is dropped. Every
coefficient is plus or minus a power of two and no power occurs twice, hence ``z = sum_j |k_j| b_j - offset`` with the
negative planes inverted and ``offset`` the sum of their ``|k_j|``: one unsigned number with some of its bits missing.
"""

import functools
import itertools
import math
from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor

# 16 bits and the sign plane of the topmost run.
MAX_PLANES = 17
# Weights encoded or decoded at a time, a multiple of 8: what comes in between stays in the caches.
_BLOCK = 1 << 18


def plane_bytes(weights: int) -> int:
    """Bytes of one plane of so many weights."""
    return (weights + 7) // 8


@functools.lru_cache(maxsize=1024)
def check_coefficients(coefficients: tuple[int, ...]) -> None:
    """Raise ``ValueError`` unless these are coefficients of planes: powers of two with a sign, in falling magnitude."""
    magnitudes = [abs(k) for k in coefficients]
    powers = all(0 < m < 1 << MAX_PLANES and m & (m - 1) == 0 for m in magnitudes)
    if not powers or any(a <= b for a, b in itertools.pairwise(magnitudes)):
        raise ValueError(
            f"expected coefficients as plus or minus powers of two below 2^{MAX_PLANES}, in falling magnitude, "
            f"got {list(coefficients)}"
        )


def to_masks(coefficients: Sequence[int]) -> tuple[int, int]:
    """The coefficients as two sets of exponents, bit ``b`` for ``2^b``: all of them, and the negative ones.

    >>> to_masks((-8, 4, 1))
    (13, 8)
    """
    return sum(abs(k) for k in coefficients), sum(-k for k in coefficients if k < 0)


def from_masks(stored: int, negative: int) -> tuple[int, ...]:
    """The coefficients of which ``to_masks`` made the sets; ``ValueError`` if these are none."""
    if not 0 <= stored < 1 << MAX_PLANES or negative & ~stored:
        raise ValueError(f"expected exponents below {MAX_PLANES}, the negative ones among them, got {stored, negative}")
    powers = (1 << bit for bit in reversed(range(MAX_PLANES)))
    return tuple(-power if power & negative else power for power in powers if power & stored)


def pack_bits(bits: Tensor) -> Tensor:
    """A flat tensor of bits as the bytes of a plane."""
    padded = torch.zeros(8 * plane_bytes(bits.numel()), dtype=torch.uint8, device=bits.device)
    padded[: bits.numel()] = bits
    # Of eight bytes read as one little-endian number, the product's top byte has bit i of byte i.
    return (padded.view(torch.int64) * 0x0102040810204080 >> 56).to(torch.uint8)


def unpack_bits(plane: Tensor, weights: int) -> Tensor:
    """The bits of one plane, uint8 of shape ``(weights,)``."""
    values = torch.arange(256, dtype=torch.uint8, device=plane.device)
    bits_of_bytes = (values[:, None] >> values[:8] & 1).view(torch.int64).flatten()
    return bits_of_bytes.index_select(0, plane.to(torch.int32)).view(torch.uint8)[:weights]


def _runs(active: Collection[int]) -> Iterator[tuple[int, int]]:
    """Lowest exponent and length of each run, lowest first; a gap of one bit is filled."""
    low = length = 0
    for bit in sorted(set(active)):
        if length and bit <= low + length + 1:
            length = bit - low + 1
        else:
            if length:
                yield low, length
            low, length = bit, 1
    if length:
        yield low, length


def widest(active: Collection[int]) -> tuple[int, ...]:
    """The coefficients that codes with digits at the ``active`` exponents need at most.

    >>> widest({0, 1, 4})
    (-32, 16, -4, 2, 1)
    """
    rising: list[int] = []
    for low, length in _runs(active):
        rising += [1 << (low + bit) for bit in range(length)] + [-1 << (low + length)]
    return tuple(reversed(rising))


def encode(codes: Tensor, active: Collection[int] | None = None) -> tuple[Tensor, tuple[int, ...]]:
    """Split integer weights into planes and their coefficients, as the head of this file describes.

    Args:
        codes: integers of any shape, ``z`` of equation (7).
        active: exponents of the bits that the digits use; default: as many adjacent ones as the codes need.

    Returns:
        planes, uint8 ``(k, ceil(weights / 8))``, and their ``k`` coefficients, most significant first.

    Raises:
        ValueError: a code is no sum of digits -1, 0, 1 at the active exponents.

    Example:
        >>> planes, coefficients = encode(torch.tensor([-3, 0, 3]))
        >>> coefficients, planes.tolist()
        ((-4, 2, 1), [[1], [4], [5]])
    """
    flat = codes.reshape(-1)
    if active is not None and any(not 0 <= bit < MAX_PLANES - 1 for bit in active):
        raise ValueError(f"expected active exponents from 0 to {MAX_PLANES - 2}, got {sorted(active)}")
    if active is None:
        least, most = map(int, flat.aminmax()) if flat.numel() else (0, 0)
        active = range(max(-least, most).bit_length())
    coefficients = list(widest(active))
    planes = torch.empty((len(coefficients), plane_bytes(flat.numel())), dtype=torch.uint8, device=codes.device)
    for start in range(0, flat.numel(), _BLOCK):
        rest = flat[start : start + _BLOCK].to(torch.int64)
        block = reversed(planes[:, start // 8 : (start + _BLOCK) // 8].unbind())
        for low, length in _runs(active):
            for bit in range(low, low + length + 1):
                next(block).copy_(pack_bits(rest >> bit & 1))
            # The other runs are multiples of twice this run's span, so the centred remainder is this run's part.
            span = 1 << (length + 1)
            rest = rest - ((((rest >> low) + span // 2) & (span - 1)) - span // 2 << low)
        if bool(rest.any()):
            raise ValueError(f"expected codes with digits -1, 0, 1 at the exponents {sorted(set(active))}, got others")
    for j in range(len(coefficients) - 1):
        # A plane that equals the sign's above it takes its place.
        if coefficients[j] < 0 < coefficients[j + 1] and torch.equal(planes[j], planes[j + 1]):
            coefficients[j : j + 2] = 0, -coefficients[j + 1]
    kept = [j for j, holds in enumerate(planes.any(1).tolist()) if holds and coefficients[j] != 0]
    chosen = tuple(coefficients[j] for j in kept)
    if any(abs(k) >= 1 << MAX_PLANES for k in chosen):
        raise ValueError(f"expected codes of magnitude below 2^{MAX_PLANES - 1}, got coefficients {chosen}")
    return planes[kept], chosen


def decode(planes: Tensor, coefficients: Sequence[int], shape: Sequence[int]) -> Tensor:
    """The codes that ``encode`` was given, int32 of ``shape``.

    Raises:
        ValueError: the planes are not as many, or not as long, as the coefficients and the shape say.
        TypeError: they are not uint8.

    Example:
        >>> decode(*encode(torch.tensor([[-3, 0], [3, 5]])), (2, 2)).tolist()
        [[-3, 0], [3, 5]]
    """
    weights = math.prod(shape)
    # Before anything is allocated for a shape that may come from anywhere.
    expected = (len(coefficients), plane_bytes(weights))
    if planes.shape != expected:
        raise ValueError(f"expected planes of shape {expected}, got {tuple(planes.shape)}")
    if planes.dtype != torch.uint8:
        raise TypeError(f"expected planes of dtype uint8, got {planes.dtype}")
    codes = torch.zeros(weights, dtype=torch.int32, device=planes.device)
    for start in range(0, weights, _BLOCK):
        block = codes[start : start + _BLOCK]
        rows = planes[:, start // 8 : (start + _BLOCK) // 8]
        for plane, coefficient in zip(rows, coefficients, strict=True):
            block.add_(unpack_bits(plane, block.numel()), alpha=coefficient)
    return codes.view(*shape)
