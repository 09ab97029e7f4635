"""Packed weights for the tests of the GPU backends: every kind of plane set, with codes drawn bit by bit."""

import torch
from torch import Tensor

from csq_kernels import bitplanes


def signed(planes: int) -> tuple[int, ...]:
    """Coefficients of two's complement."""
    return (-1 << (planes - 1), *(1 << bit for bit in reversed(range(planes - 1))))


# All widths, unsigned ones, gaps, several runs with signs of their own, codes of 8 bits that no signed byte holds, and
# more planes than one pass takes.
COEFFICIENTS = [
    *(signed(planes) for planes in range(1, 18)),
    (1,),
    (128, 64, 32, 16, 8, 4, 2, 1),
    (8, 1),
    (128, -1),
    (-128, -1),
    (-64, 32, -8, 4, 1),
    (65536, -256, 2),
    (-65536,),
]


def make_planes(coefficients: tuple[int, ...], rows: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random codes, int32 ``(rows, columns)``, and their canonical planes."""
    generator = torch.Generator().manual_seed(seed)
    bits = torch.rand(len(coefficients), rows * columns, generator=generator) < 0.5
    planes = torch.empty(len(coefficients), bitplanes.plane_bytes(rows * columns), dtype=torch.uint8)
    for plane, plane_bits in zip(planes, bits, strict=True):
        plane.copy_(bitplanes.pack_bits(plane_bits))
    return bitplanes.decode(planes, coefficients, (rows, columns)), planes
