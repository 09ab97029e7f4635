"""The order in which the GPU kernels read planes.

A tile holds 32 rows and 128 columns of the weight; tiles follow each other by column, then by row. It serves one warp,
whose lane ``l = 4 g + t`` owns 4 rows and one block of 32 columns::

    row 8 r + g            r = 0..3, g = 0..7
    column 32 t + 4 i + c  t = 0..3, i = 0..7, c = 0..3

One plane of the 32 columns of one row is a 32-bit word, so that an operand of a matrix instruction is what a mask
leaves of a word, and the input that goes with it lies in order::

    byte of the word   0      1      2      3
    column c           0      2      1      3        bit i of the byte: column 32 t + 4 i + c

The halves of the word hold columns 0, 1 in their low bytes and 2, 3 in their high ones. A group is up to 8 planes of
adjacent exponents. A lane's words of a group of ``k`` planes are numbered ``k r + j``, ``j = 0`` the least significant
plane; they lie in ``k`` accesses of 16 bytes a lane, each of 512 bytes a warp::

    word 4 v + w of lane l in byte 512 v + 16 l + 4 w

Groups follow each other within the tile, the most significant first. Planes with a negative coefficient are stored
inverted, so that a group is an unsigned number, less an offset. Rows and columns beyond the weight are zero bits.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from csq_kernels import bitplanes

ROWS, COLUMNS = 32, 128
PLANE_BYTES = ROWS * COLUMNS // 8
GROUP_PLANES = 8
# Rows of the input that one pass over the planes serves.
PASS_ROWS = 16
_COLUMN_OF_BYTE = (0, 2, 1, 3)
_SHAPE_OF_BITS = (4, 8, 4, 8, 4)  # rows as (r, g), columns as (t, i, c)


@dataclass(frozen=True)
class Group:
    """Planes of adjacent exponents, as one unsigned number less an offset, both in units of ``2^exponent``."""

    first: int  # of its planes, counted from the most significant of all
    planes: int
    exponent: int
    offset: int


def groups(coefficients: Sequence[int]) -> list[Group]:
    """Cut planes into groups, the most significant first.

    Example:
        >>> groups((-8, 4, 1))
        [Group(first=0, planes=2, exponent=2, offset=2), Group(first=2, planes=1, exponent=0, offset=0)]
    """
    found: list[Group] = []
    for index, coefficient in enumerate(coefficients):
        exponent = abs(coefficient).bit_length() - 1
        inverted = int(coefficient < 0)
        last = found[-1] if found else None
        if last is not None and exponent == last.exponent - 1 and last.planes < GROUP_PLANES:
            found[-1] = Group(last.first, last.planes + 1, exponent, 2 * last.offset + inverted)
        else:
            found.append(Group(index, 1, exponent, inverted))
    return found


def tile_shape(coefficients: Sequence[int], weight_shape: Sequence[int]) -> tuple[int, int, int]:
    """Shape of the tiles: along the rows, along the columns, bytes of each."""
    rows, columns = weight_shape
    return -(-rows // ROWS), -(-columns // COLUMNS), PLANE_BYTES * len(coefficients)


def tile(planes: Tensor, coefficients: Sequence[int], weight_shape: Sequence[int]) -> Tensor:
    """Canonical planes in the order above, uint8 of ``tile_shape``; torch alone, on the device of ``planes``."""
    rows, columns = weight_shape
    tall, wide, tile_bytes = shape = tile_shape(coefficients, weight_shape)
    shifts = torch.arange(8, dtype=torch.uint8, device=planes.device)
    byte_order = torch.tensor(_COLUMN_OF_BYTE, device=planes.device)
    tiles = planes.new_empty(shape)
    for group in groups(coefficients):
        words = []
        for j in reversed(range(group.first, group.first + group.planes)):
            bits = bitplanes.unpack_bits(planes[j], rows * columns).view(rows, columns) ^ int(coefficients[j] < 0)
            bits = torch.nn.functional.pad(bits, (0, wide * COLUMNS - columns, 0, tall * ROWS - rows))
            bits = bits.view(tall, *_SHAPE_OF_BITS[:2], wide, *_SHAPE_OF_BITS[2:])  # [tall, r, g, wide, t, i, c]
            bytes_of_word = (bits.movedim(-2, -1)[..., byte_order, :] << shifts).sum(-1, dtype=torch.uint8)
            words.append(bytes_of_word.permute(0, 3, 2, 4, 1, 5))  # [tall, wide, g, t, r, byte]
        lanes = torch.stack(words, -2).reshape(tall, wide, 32, group.planes, 16)
        start = PLANE_BYTES * group.first
        accesses = lanes.transpose(2, 3).reshape(tall, wide, PLANE_BYTES * group.planes)
        tiles[..., start : start + PLANE_BYTES * group.planes] = accesses
    return tiles


def untile(tiles: Tensor, coefficients: Sequence[int], weight_shape: Sequence[int]) -> Tensor:
    """The canonical planes of which ``tile`` made ``tiles``."""
    rows, columns = weight_shape
    tall, wide, _ = tile_shape(coefficients, weight_shape)
    shifts = torch.arange(8, dtype=torch.uint8, device=tiles.device)
    byte_order = torch.tensor(_COLUMN_OF_BYTE, device=tiles.device)
    planes = tiles.new_empty((len(coefficients), bitplanes.plane_bytes(math.prod(weight_shape))))
    for group in groups(coefficients):
        start = PLANE_BYTES * group.first
        accesses = tiles[..., start : start + PLANE_BYTES * group.planes].reshape(tall, wide, group.planes, 32, 16)
        lanes = accesses.transpose(2, 3).reshape(tall, wide, 8, 4, 4, group.planes, 4)  # [..., g, t, r, j, byte]
        for j in range(group.planes):
            index = group.first + group.planes - 1 - j
            words = lanes[..., j, :].permute(0, 4, 2, 1, 3, 5)[..., byte_order]  # [tall, r, g, wide, t, c]
            bits = ((words[..., None] >> shifts) & 1).movedim(-1, -2)
            bits = bits.reshape(tall * ROWS, wide * COLUMNS)[:rows, :columns] ^ int(coefficients[index] < 0)
            planes[index] = bitplanes.pack_bits(bits.flatten())
    return planes


def padded_columns(columns: int) -> int:
    """Columns of whole tiles."""
    return -(-columns // COLUMNS) * COLUMNS


def largest_code(coefficients: Sequence[int]) -> int:
    """Bound of the magnitude of the codes."""
    return max(sum(k for k in coefficients if k > 0), -sum(k for k in coefficients if k < 0))


def exact_in(dtype: torch.dtype, coefficients: Sequence[int]) -> bool:
    """Whether every code is a number of this dtype."""
    return largest_code(coefficients) * torch.finfo(dtype).eps <= 2
