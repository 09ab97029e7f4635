"""What an epoch of CSQ has come to, beyond loss and bits: the hard model behind the soft one, gates, undecided bits."""

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

import csq_kernels as csq
from csq_kernels.nn import CSQLayer
from csq_kernels.nn.prepare import csq_layers

# Of what metrics.jsonl holds: enough for a picture, and a line an epoch stays short.
_DIGITS = 5


def measure(model: nn.Module, batches: Iterable[Tensor], evaluate: Callable[[nn.Module], float]) -> dict[str, Any]:
    """Measure a model in training as if it were made hard now; neither it nor any random stream is changed.

    The hard model, equation (7), shares the logits of ``model``; the rest of it is a copy while this runs.

    Args:
        model: a prepared model in the search or finetune stage.
        batches: inputs for the batch-norm statistics of the hard model; read where it has any.
        evaluate: the accuracy of a model.

    Returns:
        ``hard_accuracy``, and by the layer's name: ``gates``, G_b of (2) for ``b = 0..n-1``, the mean over channels;
        ``weight_gap``, ``|W_soft - W_hard| / |W_hard|``; ``undecided``, the share of active bits with ``sig`` between
        0.01 and 0.99.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 2))
        >>> _ = csq.prepare_(model, csq.Config(n_bits=4))
        >>> measured = measure(model, [], lambda hard: 0.5)
        >>> measured["gates"], measured["undecided"], measured["hard_accuracy"]
        ({'0': [0.73106, 0.73106, 0.73106, 0.73106]}, {'0': 1.0}, 0.5)
    """
    layers = csq_layers(model)
    device = next(iter(layers.values())).scale.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
        hard = _copy_sharing_logits(model, layers)
        scheme = csq.finalize_(hard, data=batches)
        accuracy = evaluate(hard)
    return {
        "hard_accuracy": accuracy,
        "gates": {name: _gates(layer) for name, layer in layers.items()},
        "weight_gap": {row.name: round(row.gap, _DIGITS) for row in scheme.layers},
        "undecided": {row.name: round(row.undecided, _DIGITS) for row in scheme.layers},
    }


def _copy_sharing_logits(model: nn.Module, layers: dict[str, CSQLayer]) -> nn.Module:
    """A copy whose logits, most of a model's memory, are other parameters on the same numbers.

    Hardening gives a parameter other numbers and writes to none, so that the original keeps its own.
    """
    logits = [layer.bit_logits for layer in layers.values()]
    return copy.deepcopy(model, {id(own): nn.Parameter(own.detach(), own.requires_grad) for own in logits})


def _gates(layer: CSQLayer) -> list[float]:
    """G_b for every bit: 0 for a plane that is gone, 0 or 1 once the scheme is fixed."""
    logits = layer.gate_logits.detach().float()
    soft = layer.stage == "search"
    values = torch.sigmoid(layer.temperature.float() * logits) if soft else (logits > 0).float()
    means = values if values.ndim == 1 else values.mean(1)
    gates = [0.0] * layer.n_bits
    for bit, value in zip(layer.bits, means.tolist(), strict=True):
        gates[bit] = round(value, _DIGITS)
    return gates
