"""Integers as bit-planes: the bytes are those of the diagram, and codes come back whatever their gates and widths."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from csq_kernels import bitplanes
from csq_kernels.budget import stored_bits

EXPONENTS = st.frozensets(st.integers(0, 15))


def random_codes(active, shape, seed=0) -> torch.Tensor:
    """Codes with a random digit -1, 0, 1 at each active exponent, both extremes among them where there is room."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.zeros(shape, dtype=torch.int32)
    for bit in active:
        codes += torch.randint(-1, 2, shape, generator=generator, dtype=torch.int32) << bit
    span = sum(1 << bit for bit in active)
    codes.view(-1)[:2] = torch.tensor([span, -span], dtype=torch.int32)[: codes.numel()]
    return codes


def test_the_bytes_are_those_of_the_diagram():
    codes = torch.tensor([[1, 0, 2, 3, -4], [0, -1, 0, 0, 3]])
    planes, coefficients = bitplanes.encode(codes)
    assert coefficients == (-4, 2, 1)
    # Weights 4 and 6 are negative; weight 8 and 9 are the two lowest bits of the second byte.
    assert planes.tolist() == [[0b01010000, 0b00], [0b01001100, 0b10], [0b01001001, 0b10]]
    assert planes.dtype == torch.uint8


@settings(deadline=None)
@given(EXPONENTS, st.integers(1, 70), st.integers(0, 1000))
def test_codes_come_back(active, weights, seed):
    codes = random_codes(active, (weights,), seed)
    planes, coefficients = bitplanes.encode(codes, active)
    assert torch.equal(bitplanes.decode(planes, coefficients, codes.shape), codes)
    bitplanes.check_coefficients(coefficients)
    assert all(bool(plane.any()) for plane in planes)
    assert planes.shape == (len(coefficients), bitplanes.plane_bytes(weights))
    # What the budget counts is enough, and no plane lies outside of what the exponents can need.
    assert len(coefficients) <= stored_bits(active) == len(bitplanes.widest(active))
    assert set(map(abs, coefficients)) <= set(map(abs, bitplanes.widest(active)))


@settings(deadline=None)
@given(st.lists(st.integers(-65535, 65535), max_size=40))
def test_any_codes_come_back_without_naming_their_exponents(values):
    codes = torch.tensor(values, dtype=torch.int32)
    planes, coefficients = bitplanes.encode(codes)
    assert torch.equal(bitplanes.decode(planes, coefficients, codes.shape), codes)


def test_planes_do_not_depend_on_the_blocks_they_are_made_in(monkeypatch):
    codes = random_codes({0, 1, 5}, (1003,))
    expected, coefficients = bitplanes.encode(codes, {0, 1, 5})
    monkeypatch.setattr(bitplanes, "_BLOCK", 64)
    planes, found = bitplanes.encode(codes, {0, 1, 5})
    assert torch.equal(planes, expected) and found == coefficients
    assert torch.equal(bitplanes.decode(planes, coefficients, codes.shape), codes)
    codes[70] = 4
    with pytest.raises(ValueError, match="expected codes with digits"):
        bitplanes.encode(codes, {0, 1, 5})


@settings(deadline=None)
@given(EXPONENTS, st.integers(0, 1000))
def test_masks_hold_the_coefficients(active, seed):
    _, coefficients = bitplanes.encode(random_codes(active, (9,), seed), active)
    assert bitplanes.from_masks(*bitplanes.to_masks(coefficients)) == coefficients


@pytest.mark.parametrize("masks", [(1 << 17, 0), (2, 1), (-1, 0)])
def test_masks_that_are_none(masks):
    with pytest.raises(ValueError, match="expected exponents below 17"):
        bitplanes.from_masks(*masks)


@pytest.mark.parametrize(
    ("codes", "coefficients"),
    [
        ([0, 0, 0], ()),
        ([], ()),
        ([4, 0, 4], (4,)),
        ([-4, 0], (-4,)),
        ([3, 1, 2], (2, 1)),
        ([-4, 3], (-4, 2, 1)),
        ([5, 1], (4, 1)),
    ],
)
def test_planes_that_hold_nothing_are_dropped(codes, coefficients):
    codes = torch.tensor(codes, dtype=torch.int32)
    planes, found = bitplanes.encode(codes)
    assert found == coefficients and torch.equal(bitplanes.decode(planes, found, codes.shape), codes)


def test_a_wide_gap_stores_two_runs():
    _, coefficients = bitplanes.encode(random_codes({0, 1, 6, 7}, (64,)), {0, 1, 6, 7})
    assert coefficients == (-256, 128, 64, -4, 2, 1)


@pytest.mark.parametrize(("codes", "active"), [([1], [1]), ([8], [0, 1, 2]), ([3, 4], [0, 1]), ([1], [])])
def test_codes_with_other_digits_are_refused(codes, active):
    with pytest.raises(ValueError, match="expected codes with digits -1, 0, 1 at the exponents"):
        bitplanes.encode(torch.tensor(codes), active)


@pytest.mark.parametrize("coefficients", [(3,), (1, 2), (2, 2), (0,), (1 << 17,), (4, -4)])
def test_coefficients_that_are_none(coefficients):
    with pytest.raises(ValueError, match="expected coefficients as plus or minus powers of two"):
        bitplanes.check_coefficients(coefficients)


def test_decode_refuses_planes_of_another_weight() -> None:
    planes, coefficients = bitplanes.encode(torch.tensor([-3, 0, 3, 5]))
    for shape in ((9,), (1 << 40,), (-4,)):
        with pytest.raises(ValueError, match=r"expected planes of shape \(\d, -?\d+\), got \(4, 1\)"):
            bitplanes.decode(planes, coefficients, shape)
    with pytest.raises(ValueError, match=r"expected planes of shape \(3, 1\), got \(4, 1\)"):
        bitplanes.decode(planes, coefficients[1:], (4,))
    with pytest.raises(TypeError, match="expected planes of dtype uint8, got torch.int32"):
        bitplanes.decode(planes.int(), coefficients, (4,))
