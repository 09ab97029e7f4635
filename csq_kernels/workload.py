"""What one forward pass of a model does: multiplications, bit operations, and the time it takes on this machine."""

import copy
import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from csq_kernels.nn.layer import CSQLayer
from csq_kernels.nn.pack import check_precision
from csq_kernels.nn.packed import PACKED_CLASSES, PackedLayer
from csq_kernels.nn.prepare import csq_layers

# Bits of an input that no quantizer has made small.
_FLOAT_BITS = 32
# Rounds of which the median counts: as many as start within so many seconds, in these bounds. And nanoseconds for which
# a layer is called in one of them.
_ROUNDS, _LEAST_ROUNDS, _SECONDS, _ROUND_NANOSECONDS = 25, 3, 10.0, 100_000
# Scale of the random codes' weights; any that is finite takes the same time.
_SCALE = 1e-3
_Key = TypeVar("_Key", bound=Hashable)


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
    for call in calls(model, list(members), example_inputs):
        macs[members[call.name]] += call.macs
        operations[members[call.name]] += call.macs * call.input_bits
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


class Call(NamedTuple):
    """One call of a layer in a forward pass."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    macs: int
    input_bits: int


def calls(model: nn.Module, names: Sequence[str], example_inputs: tuple[Any, ...]) -> list[Call]:
    """Every call of the CSQ or packed layers ``names`` in a pass in evaluation mode."""
    found: list[Call] = []

    def note(name: str):
        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            quantizer = layer.input_quantizer
            bits = _FLOAT_BITS if quantizer is None else getattr(quantizer, "bits", _FLOAT_BITS)
            found.append(Call(name, args, kwargs, _macs(layer, args[0] if args else kwargs["input"], output), bits))

        return hook

    handles = [model.get_submodule(name).register_forward_hook(note(name), with_kwargs=True) for name in names]
    try:
        with _evaluation(model):
            model(*example_inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found


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


def nanoseconds(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], device: torch.device) -> int:
    """Time of a call, the mean of a few in a row after one that warms the caches."""

    def now() -> int:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter_ns()

    begin = now()
    module(*args, **kwargs)
    once = max(1, now() - begin)
    repeats = max(1, min(20, _ROUND_NANOSECONDS // once))
    begin = now()
    for _ in range(repeats):
        module(*args, **kwargs)
    return round((now() - begin) / repeats)


def medians(timers: Mapping[_Key, Callable[[], int]]) -> dict[_Key, int]:
    """The median of what each timer says, in rounds over all of them.

    What disturbs the machine for a while falls into one round of each, not into all of one.
    """
    times: dict[_Key, list[int]] = {key: [] for key in timers}
    start = time.monotonic()
    for done in range(_ROUNDS):
        if done >= _LEAST_ROUNDS and time.monotonic() - start > _SECONDS:
            break
        for key, timer in timers.items():
            times[key].append(timer())
    return {key: round(statistics.median(rounds)) for key, rounds in times.items()}


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
        networks = []
        for bits in range(max(self.n_bits.values()) + 2):
            for name in self.layers:
                self._fill(name, bits)
            networks.append(copy.deepcopy(self.model))
        called = calls(self.model, list(self.layers), self.example_inputs)

        def layer_timer(name: str, network: nn.Module) -> Callable[[], int]:
            layer = network.get_submodule(name)
            own = [(call.args, call.kwargs) for call in called if call.name == name]
            return lambda: sum(nanoseconds(layer, *arguments, self.device) for arguments in own)

        def network_timer(network: nn.Module) -> Callable[[], int]:
            return lambda: nanoseconds(network, self.example_inputs, {}, self.device)

        timers: dict[tuple[str | None, int], Callable[[], int]] = {}  # no name: the whole network
        for bits, network in enumerate(networks):
            for name in self.layers:
                if bits < self.n_bits[name] + 2:
                    timers[name, bits] = layer_timer(name, network)
            timers[None, bits] = network_timer(network)
        times = medians(timers)
        table = {leader: [0] * (self.n_bits[leader] + 2) for leader in self.members.values()}
        for (layer, bits), value in times.items():
            if layer is not None:
                table[self.members[layer]][bits] += value
        increasing = {name: _increasing(row) for name, row in table.items()}
        # What a network takes beyond its layers, whatever the width.
        rests = [
            times[None, bits] - sum(row[min(bits, len(row) - 1)] for row in increasing.values())
            for bits in range(len(networks))
        ]
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


def _increasing(row: list[int]) -> tuple[int, ...]:
    """The running maximum, and a nanosecond more where it would stand still: closing a bit must always save something.

    >>> _increasing([5, 3, 9, 9])
    (5, 6, 9, 10)
    """
    result: list[int] = []
    for value in row:
        result.append(max(value, result[-1] + 1) if result else value)
    return tuple(result)
