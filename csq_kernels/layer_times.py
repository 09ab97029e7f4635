"""How long a packed network takes, layer by layer, beside the float one of equal weights, and with which kernels."""

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from csq_kernels import backends
from csq_kernels.nn.pack import packed_layers, unpack_
from csq_kernels.workload import Call, calls, medians, nanoseconds


def _ratio(before: float, after: float) -> float | None:
    return before / after if after else None


@dataclass(frozen=True)
class LayerTime:
    """Time of all calls of a layer in a pass; ``kernel`` is what computes them, ``None`` if there are none."""

    name: str
    kind: str
    shape: tuple[int, ...]
    stored_bits: int
    kernel: str | None
    packed_ms: float
    float_ms: float

    @property
    def ratio(self) -> float | None:
        """How many times faster than the float layer."""
        return _ratio(self.float_ms, self.packed_ms)


@dataclass(frozen=True)
class LayerTimes:
    """The packed layers of a network and the whole of it; milliseconds, medians of interleaved rounds."""

    layers: list[LayerTime]
    packed_ms: float
    float_ms: float

    @property
    def ratio(self) -> float | None:
        """How many times faster than the float network."""
        return _ratio(self.float_ms, self.packed_ms)

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        layers = [dataclasses.asdict(layer) | {"ratio": layer.ratio} for layer in self.layers]
        return {"packed_ms": self.packed_ms, "float_ms": self.float_ms, "ratio": self.ratio, "layers": layers}


class _Kernels(TorchDispatchMode):
    """Notes what computes each op of this package; eager calls, which pass the dispatcher by, come to it as well."""

    def __init__(self) -> None:
        super().__init__()
        self.names: dict[str, None] = {}  # a set in order

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        namespace, _, op = func._schema.name.partition("::")
        if namespace == "csq":
            self.names[backends.kernel(op, *args)] = None
        return func(*args, **(kwargs or {}))


def _kernel(layer: nn.Module, own: list[Call]) -> str | None:
    """Names of the kernels of these calls; PyTorch's where no op of this package takes part."""
    with _Kernels() as kernels:
        for call in own:
            layer(*call.args, **call.kwargs)
    return (", ".join(kernels.names) or "PyTorch") if own else None


@torch.inference_mode()
def layer_times(model: nn.Module, *example_inputs: Any) -> LayerTimes:
    """Time a forward pass of a packed network, and each of its packed layers on its part of the input.

    The float network has the same weights and no input quantizers. A layer is called again and again, so that small
    ones are in the caches; the network finds what it leaves there itself.

    Args:
        model: a packed model in evaluation mode; it is left as it was.
        example_inputs: what the model is called with.

    Raises:
        ValueError: there is no packed layer.

    Example:
        >>> from csq_kernels.nn import PackedLinear
        >>> layer = PackedLinear.from_codes(torch.tensor([[3, -1], [0, 2]]), torch.tensor(1.5), n_bits=2)
        >>> times = layer_times(nn.Sequential(layer), torch.ones(1, 2))
        >>> times.layers[0].shape, times.layers[0].stored_bits, times.packed_ms > 0
        ((2, 2), 3, True)
    """
    layers = packed_layers(model)
    float_model = copy.deepcopy(model)
    unpack_(float_model)
    device = next(iter(layers.values())).planes.device
    called = calls(model, list(layers), example_inputs)
    own = {name: [call for call in called if call.name == name] for name in layers}

    def timer(module: nn.Module, arguments: list[tuple[tuple[Any, ...], dict[str, Any]]]) -> Callable[[], int]:
        return lambda: sum(nanoseconds(module, *each, device) for each in arguments)

    timers: dict[tuple[str | None, str], Callable[[], int]] = {}  # no name: the whole network
    for kind, network in (("packed", model), ("float", float_model)):
        timers[None, kind] = timer(network, [(example_inputs, {})])
        for name in layers:
            timers[name, kind] = timer(network.get_submodule(name), [(call.args, call.kwargs) for call in own[name]])
    ms = {key: value / 1e6 for key, value in medians(timers).items()}
    rows = [
        LayerTime(
            name,
            type(layer).__name__,
            layer.weight_shape,
            layer.stored_bits,
            _kernel(layer, own[name]),
            ms[name, "packed"],
            ms[name, "float"],
        )
        for name, layer in layers.items()
    ]
    return LayerTimes(rows, ms[None, "packed"], ms[None, "float"])
