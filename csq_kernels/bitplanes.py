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
    padded = torch.nn.functional.pad(bits.to(torch.uint8), (0, -bits.numel() % 8))
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return (padded.view(-1, 8) << shifts).sum(1, dtype=torch.uint8)


def unpack_bits(plane: Tensor, weights: int) -> Tensor:
    """The bits of one plane, uint8 of shape ``(weights,)``."""
    shifts = torch.arange(8, dtype=torch.uint8, device=plane.device)
    return ((plane[:, None] >> shifts) & 1).flatten()[:weights]


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
    rest = codes.reshape(-1).to(torch.int64)
    if active is None:
        largest = int(rest.abs().max()) if rest.numel() else 0
        active = range(largest.bit_length())
    planes: list[tuple[int, Tensor]] = []
    for low, length in _runs(active):
        # The other runs are multiples of twice this run's span, so the centred remainder is this run's part.
        span = 1 << (length + 1)
        value = (((rest >> low) + span // 2) & (span - 1)) - span // 2
        rest = rest - (value << low)
        least, most = (int(value.min()), int(value.max())) if value.numel() else (0, 0)
        width = max(most.bit_length(), (-least - 1).bit_length() if least < 0 else 0)
        for bit in range(width):
            planes.append((1 << (low + bit), (value >> bit) & 1 == 1))
        if least < 0:
            planes.append((-1 << (low + width), value < 0))
    if bool(rest.any()):
        raise ValueError(f"expected codes with digits -1, 0, 1 at the exponents {sorted(set(active))}, got others")
    kept = [(k, bits) for k, bits in reversed(planes) if bool(bits.any())]
    coefficients = tuple(k for k, _ in kept)
    if any(abs(k) >= 1 << MAX_PLANES for k in coefficients):
        raise ValueError(f"expected codes of magnitude below 2^{MAX_PLANES - 1}, got coefficients {coefficients}")
    if not kept:
        return torch.empty((0, plane_bytes(codes.numel())), dtype=torch.uint8, device=codes.device), ()
    return torch.stack([pack_bits(bits) for _, bits in kept]), coefficients


def decode(planes: Tensor, coefficients: Sequence[int], shape: Sequence[int]) -> Tensor:
    """The codes that ``encode`` was given, int32 of ``shape``.

    Example:
        >>> decode(*encode(torch.tensor([[-3, 0], [3, 5]])), (2, 2)).tolist()
        [[-3, 0], [3, 5]]
    """
    weights = math.prod(shape)
    codes = torch.zeros(weights, dtype=torch.int32, device=planes.device)
    for plane, coefficient in zip(planes, coefficients, strict=True):
        codes += unpack_bits(plane, weights).to(torch.int32) * coefficient
    return codes.view(*shape)
