"""What the Triton kernels have to satisfy, on the processor: ``TRITON_INTERPRET=1 pytest tests/interpreted_triton.py``.

Triton decides at its import whether it interprets, so ``test_triton.py`` runs this file in a process of its own.
"""

import math

import pytest
import torch
import triton
from helpers import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    FLOAT64,
    OUTPUTS,
    Arguments,
    Case,
    assert_within,
    autograd_of_reference,
    exact_outputs,
    pool,
)
from torch import Tensor

from csq_kernels import reference
from csq_kernels.backends import triton_reconstruct

# numpy, which the interpreter computes with, warns where a GPU does not: exp overflows to the inf that is meant.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value):RuntimeWarning")

EIGHT = tuple(range(8))
# One of each kind that the kernels treat differently: an interpreted kernel is slow.
CASES = [
    Case(()),
    Case((1,), (0,), 1, 1.0, scale_per_channel=True),
    Case((31,), EIGHT, 8, 200.0),
    Case((4097,), EIGHT, 8, 200.0),
    Case((37, 29), (0,), 1),
    Case((37, 29), tuple(range(16)), 16),
    Case((37, 29), EIGHT, 8, 5000.0),
    Case((17, 31), (0, 3, 7), 8),
    Case((17, 31), (15,), 16, 200.0),
    Case((17, 31), (), 4),
    Case((17, 31), (), 4, gates_per_channel=True, scale_per_channel=True),
    *(
        Case((7, 31), (1, 2), 4, gates_per_channel=gates, scale_per_channel=scale, channel_axis=axis)
        for gates, scale in ((True, False), (False, True), (True, True))
        for axis in (0, 1)
    ),
    Case((13, 19, 3, 3), (0, 1, 2), 3, 200.0, gates_per_channel=True, scale_per_channel=True, channel_axis=1),
    Case((4, 6, 5, 5), (0, 1, 2), 3, gates_per_channel=True, hard_gates=True),
    Case((4, 6, 5, 5), (0, 1, 2), 3, hard_gates=True),
    Case((0, 5)),
    Case((5, 0), gates_per_channel=True, scale_per_channel=True, channel_axis=1),
    Case((5, 0), gates_per_channel=True, scale_per_channel=True, channel_axis=0),
    Case((11, 5, 3, 3), (0, 2, 5), 6, gates_per_channel=True, layout="permuted"),
    Case((19, 23), (0, 1), 2, scale_per_channel=True, layout="strided", channel_axis=1),
    Case((37, 29), (0, 1, 2), 3, 200.0, dtype=BFLOAT16),
    Case((37, 29), (0, 1, 2), 3, 200.0, dtype=FLOAT16, gates_per_channel=True, scale_per_channel=True),
    Case((37, 29), (0, 1, 2), 3, dtype=BFLOAT16, vector_dtype=BFLOAT16, scale_per_channel=True, gates_per_channel=True),
    Case((37, 29), (0, 1, 2), 3, dtype=FLOAT16, vector_dtype=FLOAT16, layout="permuted"),
    Case((37, 29), (0, 1, 2), 3, vector_dtype=FLOAT64, gates_per_channel=True),
    # Tiles that end beyond a row, beyond the last row, or both; several blocks each way.
    *(
        Case(shape, (1, 2), 3, 5.0, True, True, axis)
        for shape in ((3, 1500), (40, 30), (5, 4, 9), (70, 3), (1100, 1))
        for axis in (0, len(shape) - 1)
    ),
]


def outputs(arguments: Arguments, grad_weight: Tensor) -> tuple[Tensor, ...]:
    weight = triton_reconstruct.reconstruct(*arguments)
    return (weight, *triton_reconstruct.reconstruct_backward(grad_weight, *arguments))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_within_the_error_of_pytorch(case: Case, poisoned: None) -> None:
    # Sums are few numbers, so they are drawn several times: the error of one is luck.
    inputs = [
        (case.arguments(seed), case.grad_weight(seed)) for seed in range(8 if math.prod(case.shape) < 1100 else 2)
    ]
    every = (pool([compute(*i) for i in inputs]) for compute in (outputs, exact_outputs, autograd_of_reference))
    for name, *values in zip(OUTPUTS, *every, strict=True):
        assert_within(*values, name=name)


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("hard_gates", [False, True])
def test_decided_bits_give_the_integer_model_exactly(per_channel: bool, hard_gates: bool) -> None:
    bits, n_bits = [0, 2, 3, 7], 8
    logits = torch.randn(2, 4, 6, 35)
    logits = torch.where(logits > 0, 1.0, -1.0) * torch.tensor([1e30, torch.inf, 2.0, 50.0]).view(4, 1, 1)
    gates = torch.tensor([1e30, -1e30, 3.0, torch.inf])
    gates = gates[:, None].expand(4, 6).contiguous() if per_channel else gates
    scale = torch.rand(6) if per_channel else torch.tensor(0.7)
    arguments = Arguments(logits, gates, scale, torch.tensor(200.0), bits, n_bits, 0, hard_gates)
    weight, grad_bits, grad_gates, grad_scale = outputs(arguments, torch.randn(6, 35))
    codes = reference.integer_codes(logits, gates, bits, 0)
    assert torch.equal(weight, reference.hard_weight(codes, scale, n_bits, 0))
    assert torch.equal(grad_bits, torch.zeros_like(grad_bits))
    assert torch.equal(grad_gates, torch.zeros_like(grad_gates))
    assert torch.isfinite(grad_scale).all()


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16, FLOAT16])
@pytest.mark.parametrize("gate_logit", [-torch.inf, -1e30])
def test_plane_behind_a_closed_gate_is_not_read(dtype: torch.dtype, gate_logit: float, poisoned: None) -> None:
    case = Case((7, 300), temperature=10.0, dtype=dtype)
    arguments, grad = case.arguments(), case.grad_weight()
    arguments.gate_logits[1] = gate_logit
    arguments.bit_logits[:, 1] = torch.nan
    weight, grad_bits, grad_gates, grad_scale = outputs(arguments, grad)
    assert torch.count_nonzero(grad_bits[:, 1]) == 0
    assert grad_gates[1] == 0
    kept = [0, 2, 3]
    rest = arguments._replace(
        bit_logits=arguments.bit_logits[:, kept], gate_logits=arguments.gate_logits[kept], bits=kept
    )
    expected = outputs(rest, grad)
    for actual, wanted in zip((weight, grad_bits[:, kept], grad_gates[kept], grad_scale), expected, strict=True):
        assert torch.equal(actual, wanted)


def test_closed_gates_of_single_channels() -> None:
    case = Case((7, 300), temperature=10.0, gates_per_channel=True)
    arguments, grad = case.arguments(), case.grad_weight()
    arguments.gate_logits[1, 4] = -torch.inf
    exact = exact_outputs(arguments, grad)
    eager = autograd_of_reference(arguments, grad)
    arguments.bit_logits[:, 1, 4] = torch.nan
    for name, *values in zip(OUTPUTS, outputs(arguments, grad), exact, eager, strict=True):
        assert_within(*values, name=name)


def test_nan_stays_where_it_is() -> None:
    case = Case((5, 41))
    arguments, grad = case.arguments(), case.grad_weight()
    arguments.bit_logits[0, 2, 3, 7] = torch.nan
    weight, grad_bits, _, grad_scale = outputs(arguments, grad)
    assert weight.isnan().nonzero().tolist() == [[3, 7]]
    assert grad_bits.isnan().nonzero().tolist() == [[0, 2, 3, 7]]
    assert grad_scale.isnan()


@pytest.mark.parametrize("scale", [0.0, -1.5])
def test_scale_of_any_sign(scale: float) -> None:
    case = Case((9, 130))
    arguments, grad = case.arguments()._replace(scale=torch.tensor(scale)), case.grad_weight()
    every = outputs(arguments, grad), exact_outputs(arguments, grad), autograd_of_reference(arguments, grad)
    for name, *values in zip(OUTPUTS, *every, strict=True):
        assert_within(*values, name=name)


def test_gradient_of_another_dtype() -> None:
    case = Case((9, 130), dtype=BFLOAT16)
    inputs = [(case.grad_weight(seed).double(), case.arguments(seed)) for seed in range(8)]
    actual = pool([triton_reconstruct.reconstruct_backward(grad, *arguments) for grad, arguments in inputs])
    eager = pool([reference.reconstruct_backward(grad, *arguments) for grad, arguments in inputs])
    exact = pool([reference.reconstruct_backward(grad, *arguments.to(FLOAT64)) for grad, arguments in inputs])
    for name, *values in zip(OUTPUTS[1:], actual, exact, eager, strict=True):
        assert_within(*values, name=name)


def test_tiles_are_full() -> None:
    for rows in (1, 3, 8, 4096):
        for inner in (1, 9, 27, 64, 147, 576, 1000, 4097, 1 << 20):
            height, width = triton_reconstruct.tile_shape(rows, inner)
            assert height & (height - 1) == 0 and width & (width - 1) == 0
            assert height * width <= triton_reconstruct.TILE
            if inner > 64 and rows >= triton_reconstruct.TILE:
                assert triton.cdiv(inner, width) * width <= max(inner * 9 / 8, inner + 63)
