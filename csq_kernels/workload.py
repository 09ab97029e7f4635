"""What one forward pass of a model does: multiplications, bit operations, and the time it takes on this machine."""

import copy
import dataclasses
import math
import statistics
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from csq_kernels.nn.layer import CSQLayer
from csq_kernels.nn.pack import check_precision
from csq_kernels.nn.packed import PACKED_CLASSES, PackedLayer
from csq_kernels.nn.prepare import csq_layers

# Bits of an input that no quantizer has made small.
_FLOAT_BITS = 32
# Rounds of a layer at each width, of which the median counts, and nanoseconds that one lasts at least.
_ROUNDS, _ROUND_NANOSECONDS = 7, 300_000
# Scale of the random codes' weights; any that is finite takes the same time.
_SCALE = 1e-3


@dataclass(frozen=True)
class Workload:
    """One forward pass of a model, by CSQ layer; tied layers count under the first of them, added up.

    Attributes:
        macs: ``{layer: multiplications with a weight}``; an embedding has none.
        operations: ``{layer: bit operations for each stored bit}``, the multiplications times the bits of the input.
        nanoseconds: ``{layer: time with 0, 1, 2, ... stored bits}``, strictly increasing; ``None``: not measured.
        rest_nanoseconds: time of everything else, so that a pass takes this and one entry of each layer.
    """

    macs: dict[str, int]
    operations: dict[str, int]
    nanoseconds: dict[str, tuple[int, ...]] | None = None
    rest_nanoseconds: int = 0

    def milliseconds(self, stored_bits: Mapping[str, int]) -> float:
        """Promised time of a pass with so many stored bits in each layer.

        Raises:
            ValueError: latency was not measured.
        """
        if self.nanoseconds is None:
            raise ValueError("expected a workload measured with latency=True, got one without")
        return (self.rest_nanoseconds + sum(row[stored_bits[name]] for name, row in self.nanoseconds.items())) / 1e6

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "Workload":
        """What ``to_dict`` wrote."""
        rows = content["nanoseconds"]
        nanoseconds = None if rows is None else {name: tuple(row) for name, row in rows.items()}
        return cls(content["macs"], content["operations"], nanoseconds, content["rest_nanoseconds"])


@torch.no_grad()
def workload(model: nn.Module, *example_inputs: Any, latency: bool = False, precision: str = "exact") -> Workload:
    """Count what one forward pass of ``model`` on ``example_inputs`` does, in evaluation mode, for ``Search``.

    Multiplications are ``outputs x in_features`` of a Linear layer, ``outputs x (in_channels / groups) x kernel`` of a
    convolution, ``inputs x (out_channels / groups) x kernel`` of a transposed one, 0 of an Embedding, whatever padding
    would allow to skip; over the whole batch that is given. Bit operations are multiplications x stored bits x bits of
    the layer's input: ``act_bits``, or 32 where the input is float. A layer that is not called counts 0; so does a
    weight that is read without calling its layer.

    With ``latency``, each layer is timed on its part of the input as a packed layer, with random codes of every width:
    medians of rounds, in nanoseconds, made increasing in the bits; the rest is what whole networks of random codes take
    longer than their layers. This takes seconds, and holds for this machine, its threads and what else runs on it.

    Args:
        model: a prepared model at any stage; it is left as it was.
        example_inputs: what the model is called with.
        latency: measure times as well.
        precision: of the packed layers that are timed, see ``pack_``.

    Raises:
        ValueError: there is no CSQ layer, or no such precision.

    Example:
        >>> from csq_kernels import Config, prepare_
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 4, 10))
        >>> _ = prepare_(model, Config(act_bits=4, rules={"0": {"act_bits": None}}))
        >>> counted = workload(model, torch.zeros(1, 3, 4, 4))
        >>> counted.macs, counted.operations
        ({'0': 864, '2': 320}, {'0': 27648, '2': 1280})
    """
    check_precision(precision)
    layers = csq_layers(model)
    if not layers:
        raise ValueError("expected model with CSQ layers, got none; call prepare_ first")
    leaders = {id(layer.bit_logits): name for name, layer in layers.items()}
    members = {
        name: leaders[id(module.bit_logits)] for name, module in model.named_modules() if isinstance(module, CSQLayer)
    }
    macs, operations = dict.fromkeys(layers, 0), dict.fromkeys(layers, 0)
    for name, _, _, count, bits in _calls(model, list(members), example_inputs):
        macs[members[name]] += count
        operations[members[name]] += count * bits
    if not latency:
        return Workload(macs, operations)
    return Workload(macs, operations, *_Latency(model, members, example_inputs, precision).measure())


@contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and after it the mode that each module was in."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


_Call = tuple[str, tuple[Any, ...], dict[str, Any], int, int]


def _calls(model: nn.Module, names: list[str], example_inputs: tuple[Any, ...]) -> list[_Call]:
    """Every call of the layers ``names`` in a pass: name, arguments, multiplications, bits of the input."""
    calls: list[_Call] = []

    def note(name: str):
        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            quantizer = layer.input_quantizer
            bits = _FLOAT_BITS if quantizer is None else getattr(quantizer, "bits", _FLOAT_BITS)
            calls.append((name, args, kwargs, _macs(layer, args[0] if args else kwargs["input"], output), bits))

        return hook

    handles = [model.get_submodule(name).register_forward_hook(note(name), with_kwargs=True) for name in names]
    try:
        with _evaluation(model):
            model(*example_inputs)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _macs(layer: Any, input: Tensor, output: Tensor) -> int:
    """Multiplications with a weight in one call of a CSQ or packed layer."""
    if isinstance(layer, nn.Embedding):
        return 0
    if isinstance(layer, nn.Linear):
        return output.numel() * layer.in_features
    taps = math.prod(layer.kernel_size)
    if layer.transposed:
        return input.numel() * (layer.out_channels // layer.groups) * taps
    return output.numel() * (layer.in_channels // layer.groups) * taps


class _Latency:
    """Times a copy of a model whose CSQ layers are packed ones with random codes."""

    def __init__(self, model: nn.Module, members: Mapping[str, str], example_inputs: tuple[Any, ...], precision: str):
        self.members = members
        self.example_inputs = example_inputs
        self.precision = precision
        self.model = copy.deepcopy(model).eval()
        csq = {name: layer for name, layer in self.model.named_modules() if isinstance(layer, CSQLayer)}
        self.n_bits = {name: layer.n_bits for name, layer in csq.items()}
        self.shapes = {name: tuple(layer.bit_logits.shape[2:]) for name, layer in csq.items()}
        self.dtypes = {name: layer.dtype for name, layer in csq.items()}
        self.device = next(iter(csq.values())).bit_logits.device
        self.layers: dict[str, PackedLayer] = {}
        for name, layer in csq.items():
            layer.strip_()
            module: nn.Module = layer
            module.__class__ = PACKED_CLASSES[layer.float_class]
            assert isinstance(module, PackedLayer)
            self.layers[name] = module

    @torch.inference_mode()
    def measure(self) -> tuple[dict[str, tuple[int, ...]], int]:
        """``Workload.nanoseconds`` and ``rest_nanoseconds``."""
        widest = max(self.n_bits.values()) + 1
        for name in self.layers:
            self._fill(name, widest)
        calls = _calls(self.model, list(self.layers), self.example_inputs)
        # Narrow, middle and wide networks: what they take beyond their layers is the rest.
        whole = sorted({2, (widest + 1) // 2, widest})
        measured: dict[str, list[int]] = {}
        for name in self.layers:
            rows = []
            for bits in range(self.n_bits[name] + 2):
                self._fill(name, bits)
                own = [
                    self._time(self.layers[name], args, kwargs) for called, args, kwargs, *_ in calls if called == name
                ]
                rows.append(sum(own))
            measured[name] = rows
        table = {leader: [0] * (self.n_bits[leader] + 2) for leader in self.members.values()}
        for name, leader in self.members.items():
            table[leader] = [sum(pair) for pair in zip(table[leader], measured[name], strict=True)]
        increasing = {name: _increasing(row) for name, row in table.items()}
        rests = []
        for bits in whole:
            for name in self.layers:
                self._fill(name, bits)
            layers = sum(row[min(bits, len(row) - 1)] for row in increasing.values())
            rests.append(self._time(self.model, self.example_inputs, {}) - layers)
        return increasing, max(0, round(statistics.median(rests)))

    def _fill(self, name: str, bits: int) -> None:
        """Give a layer random codes of ``bits`` stored bits, or as many as it can have."""
        layer, n_bits, shape = self.layers[name], self.n_bits[name], self.shapes[name]
        generator = torch.Generator().manual_seed(bits)
        bits = min(bits, n_bits + 1)
        # One run of `bits - 1` ternary digits; a single plane holds 0 and 1.
        largest = 2 ** (bits - 1) - 1 if bits > 1 else bits
        smallest = -largest if bits > 1 else 0
        codes = torch.randint(smallest, largest + 1, shape, generator=generator, dtype=torch.int32)
        # However few weights there are, all planes are needed.
        ends = codes.view(-1)
        ends[:1], ends[1:2] = smallest, largest
        channels = shape[layer.channel_axis]
        scale = torch.full((channels,), _SCALE, device=self.device)
        active = range(max(bits - 1, min(bits, 1)))
        layer.adopt_codes_(codes.to(self.device), scale, n_bits, active, self.dtypes[name], self.precision)

    def _time(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        """Median of the nanoseconds that a call takes."""
        begin = self._now()
        module(*args, **kwargs)
        once = max(1, self._now() - begin)
        repeats = max(1, min(100, _ROUND_NANOSECONDS // once))
        rounds = []
        for _ in range(_ROUNDS):
            begin = self._now()
            for _ in range(repeats):
                module(*args, **kwargs)
            rounds.append((self._now() - begin) / repeats)
        return round(statistics.median(rounds))

    def _now(self) -> int:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter_ns()


def _increasing(row: list[int]) -> tuple[int, ...]:
    """The running maximum, and a nanosecond more where it would stand still: closing a bit must always save something.

    >>> _increasing([5, 3, 9, 9])
    (5, 6, 9, 10)
    """
    result: list[int] = []
    for value in row:
        result.append(max(value, result[-1] + 1) if result else value)
    return tuple(result)
