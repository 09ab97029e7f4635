"""What the Triton step has to satisfy, on the processor, with ``TRITON_INTERPRET=1`` in the environment.

``test_triton.py`` runs this file in a process of its own.
"""

import math

import pytest
import torch
from helpers import BFLOAT16, FLOAT64, Case, assert_within, pool
from step_layers import REFERENCE, Backend, StepCase, assert_step, closed_plane, exact, small_scales

from csq_kernels.backends import triton_reconstruct, triton_step

# As in interpreted_triton.py; and numpy warns of the overflow that the random numbers are made of.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero):RuntimeWarning")

TRITON = Backend(triton_step.step_sums, triton_step.step_update, triton_reconstruct.reconstruct)
PER_CHANNEL = {"gates_per_channel": True, "scale_per_channel": True}
# One of each kind that the kernels treat differently: an interpreted kernel is slow.
CASES = [
    *(StepCase(Case((37, 29), (0, 2, 3), 4), rule) for rule in ("plain", "sgd", "nesterov", "adam")),
    *(StepCase(Case((37, 29), (0, 2, 3), 4), rule, narrow=True) for rule in ("sgd", "adam")),
    *(StepCase(Case((37, 29), (0, 1, 2), 3, dtype=BFLOAT16), rule, narrow=True) for rule in ("nesterov", "adam")),
    *(StepCase(Case((37, 29), (0, 1), 2, dtype=BFLOAT16), rule) for rule in ("plain", "adam")),
    StepCase(Case((37, 29), (0, 1), 2, dtype=BFLOAT16), "sgd", weight_dtype=BFLOAT16),
    StepCase(Case((37, 29), (0, 1), 2), "adam", weight_dtype=BFLOAT16),
    StepCase(Case((), (0, 1), 2), "adam", narrow=True),
    StepCase(Case((1,), (0,), 1, 1.0, scale_per_channel=True)),
    StepCase(Case((255,), tuple(range(8)), 8, 200.0), narrow=True),
    StepCase(Case((257,), (15,), 16, 200.0), narrow=True),
    StepCase(Case((17, 31), (), 4)),
    StepCase(Case((0, 5))),
    *(
        StepCase(Case((7, 31), (1, 2), 4, gates_per_channel=gates, scale_per_channel=scale, channel_axis=axis))
        for gates, scale in ((True, False), (False, True), (True, True))
        for axis in (0, 1)
    ),
    StepCase(Case((11, 13, 3, 3), (0, 2), 3, 200.0, **PER_CHANNEL, channel_axis=1), "adam", narrow=True),
    StepCase(Case((7, 31), (1, 2), 4, **PER_CHANNEL, vector_dtype=FLOAT64)),
    StepCase(Case((13, 70), (1, 2), 4, hard_gates=True), "nesterov"),
    StepCase(Case((13, 70), (1, 2), 4, hard_gates=True, **PER_CHANNEL)),
    StepCase(Case((13, 70), (1, 2), 4, hard_gates=True, gates_per_channel=True, channel_axis=1)),
    StepCase(Case((13, 70), (1, 2), 4, hard_gates=True, dtype=BFLOAT16), weight_dtype=BFLOAT16),
    StepCase(Case((13, 70), (1, 2), 4, layout="permuted")),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_within_the_error_of_pytorch(case: StepCase, poisoned: None) -> None:
    assert_step(TRITON, case, seeds=8 if math.prod(case.weight.shape) < 600 else 2)


@pytest.mark.parametrize("scale_per_channel", [False, True])
def test_gradient_of_a_scale_too_small_to_divide_by(scale_per_channel: bool) -> None:
    layers = small_scales(scale_per_channel, 130)
    every = [
        [backend.step_sums(layer)[1:] for layer in inputs]
        for backend, inputs in ((TRITON, layers), (REFERENCE, [exact(layer) for layer in layers]), (REFERENCE, layers))
    ]
    assert_within(*(pool(found)[0] for found in every), name="grad_scale")


def test_planes_behind_closed_gates_move_by_their_momentum() -> None:
    layer = closed_plane()
    own, eager = (backend.step([layer])[0] for backend in (TRITON, REFERENCE))
    assert torch.isfinite(own.weight).all()
    assert own.bit_logits.isnan().nonzero().tolist() == [[0, 1, 3, 7], [1, 1, 3, 7]]
    torch.testing.assert_close(own.bit_logits[:, 1], eager.bit_logits[:, 1], equal_nan=True)
