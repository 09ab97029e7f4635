"""``pack_`` turns the hard CSQ layers of a model into packed ones, in place, and ``unpack_`` those into float ones."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from csq_kernels import table
from csq_kernels._ops import PRECISIONS
from csq_kernels.bitplanes import plane_bytes
from csq_kernels.nn.layer import CSQLayer
from csq_kernels.nn.packed import PACKED_CLASSES, PackedLayer, check_scale

SCALE_BYTES = 4


@dataclass(frozen=True)
class PackedLayerSummary:
    """One packed layer; ``bytes`` are those of its planes and scale, 0 for one that shares another's."""

    name: str
    kind: str
    shape: tuple[int, ...]
    paper_bits: int
    stored_bits: int
    active: tuple[int, ...]
    bytes: int
    tied_to: str | None = None

    @property
    def weights(self) -> int:
        """Number of weights, 0 if another layer holds them."""
        return 0 if self.tied_to is not None else math.prod(self.shape)

    @property
    def float_bytes(self) -> int:
        """Bytes of the same weight in float32."""
        return 4 * self.weights


def summarize(
    name: str,
    layer_class: type[PackedLayer],
    shape: tuple[int, ...],
    active: tuple[int, ...],
    stored_bits: int,
    scales: int,
    tied_to: str | None,
) -> PackedLayerSummary:
    """The summary of a layer, whether it lies in memory or in a file."""
    size = 0 if tied_to is not None else stored_bits * plane_bytes(math.prod(shape)) + SCALE_BYTES * scales
    return PackedLayerSummary(name, layer_class.__name__, shape, len(active), stored_bits, active, size, tied_to)


@dataclass(frozen=True)
class PackedSummary:
    """What a packed model consists of. ``print(summary)`` shows the table."""

    layers: list[PackedLayerSummary] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        """Planes and scales."""
        return sum(row.bytes for row in self.layers)

    @property
    def float_bytes(self) -> int:
        """The same weights in float32."""
        return sum(row.float_bytes for row in self.layers)

    def average(self, attribute: str) -> float:
        """``paper_bits`` or ``stored_bits`` a weight, averaged over the weights."""
        total = sum(row.weights for row in self.layers)
        return sum(getattr(row, attribute) * row.weights for row in self.layers) / total if total else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        averages = {name: self.average(name) for name in ("paper_bits", "stored_bits")}
        rows = [asdict(row) | {"float_bytes": row.float_bytes} for row in self.layers]
        return averages | {"bytes": self.bytes, "float_bytes": self.float_bytes, "layers": rows}

    def __str__(self) -> str:
        rows = [("layer", "class", "shape", "paper", "stored", "active", "bytes", "float", "ratio")]
        for row in self.layers:
            active = ",".join(map(str, row.active)) or "none"
            start = (
                row.name,
                row.kind,
                "x".join(map(str, row.shape)),
                str(row.paper_bits),
                str(row.stored_bits),
                active,
            )
            sizes = (
                (f"tied to {row.tied_to}", "", "") if row.tied_to is not None else _sizes(row.bytes, row.float_bytes)
            )
            rows.append(start + sizes)
        averages = (f"{self.average('paper_bits'):.2f}", f"{self.average('stored_bits'):.2f}")
        rows.append(("packed layers", "", "", *averages, "", *_sizes(self.bytes, self.float_bytes)))
        return "\n".join(table.lines(rows))


def _sizes(size: int, float_size: int) -> tuple[str, str, str]:
    return f"{size:,}", f"{float_size:,}", f"{float_size / size:.1f}x" if size else "-"


def packed_layers(model: nn.Module) -> dict[str, PackedLayer]:
    """``{name: layer}`` of the packed layers of a model."""
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedLayer)}


def leaders(layers: dict[str, PackedLayer]) -> dict[str, str]:
    """``{name: name of the first layer with the same codes}``: itself, where it shares nothing."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(layer.scale), name) for name, layer in layers.items()}


def summary(model: nn.Module) -> PackedSummary:
    """What the packed layers of ``model`` consist of."""
    layers = packed_layers(model)
    rows = []
    for (name, layer), leader in zip(layers.items(), leaders(layers).values(), strict=True):
        stored, scales = layer.stored_bits, layer.scale.numel()
        tied_to = None if leader == name else leader
        rows.append(summarize(name, type(layer), layer.weight_shape, layer.active, stored, scales, tied_to))
    return PackedSummary(rows)


def check_precision(precision: str) -> None:
    """Raise ``ValueError`` unless it is one of ``PRECISIONS``."""
    if precision not in PRECISIONS:
        raise ValueError(f"expected precision as one of {', '.join(PRECISIONS)}, got {precision!r}")


def set_precision_(model: nn.Module, precision: str) -> None:
    """Set how every packed layer of ``model`` reads its input: ``"exact"``, ``"high"`` or ``"int8"``.

    Conv3d, ConvTranspose2d and Embedding layers decode their weight and are exact whatever is set.

    Raises:
        ValueError: no such precision, or no packed layer.
    """
    check_precision(precision)
    layers = packed_layers(model)
    if not layers:
        raise ValueError("expected model with packed layers, got none; call pack_ first")
    for layer in layers.values():
        layer.precision = precision


@torch.no_grad()
def pack_(model: nn.Module, precision: str = "exact") -> PackedSummary:
    """Turn every hard CSQ layer of ``model`` into its packed sister, in place: planes of bits instead of codes.

    Layers keep their identity: hooks, references, training mode and input quantizers survive; tied layers share planes.

    Args:
        model: a model after ``finalize_``.
        precision: how the layers read their input, see ``functional.bitserial_linear``; ``set_precision_`` changes it.

    Returns:
        The layers with their bits and bytes.

    Raises:
        ValueError, TypeError: there is no CSQ layer, or one is not hard or cannot be packed; the message names it, and
            the model is as before.

    Example:
        >>> import csq_kernels as csq
        >>> model = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> plan, report = csq.prepare_(model, csq.Config(n_bits=3)), csq.finalize_(model)
        >>> print([layer.kind for layer in pack_(model).layers])
        ['PackedLinear', 'PackedLinear']
    """
    check_precision(precision)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, CSQLayer)}
    if not layers:
        raise ValueError("expected model with CSQ layers, got none; call prepare_ first")
    for name, layer in layers.items():
        if layer.stage != "hard":
            raise ValueError(f"expected hard layers, got {name} in the {layer.stage} stage; call finalize_ first")
        try:
            check_scale(layer.scale, layer.integer_codes().shape[layer.channel_axis])
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name}: {error}") from None
    packed: dict[int, list[PackedLayer]] = {}
    for layer in layers.values():
        key, codes, scale = id(layer.bit_logits), layer.integer_codes(), layer.scale.detach()
        n_bits, active, dtype = layer.n_bits, layer.active_bits(), layer.dtype
        layer.strip_()
        module: nn.Module = layer
        module.__class__ = PACKED_CLASSES[layer.float_class]
        assert isinstance(module, PackedLayer)
        tied = packed.setdefault(key, [])
        if tied:
            module.become_like_(tied, dtype)
        else:
            module.adopt_codes_(codes, scale, n_bits, active, dtype, precision)
        tied.append(module)
    return summary(model)


@torch.no_grad()
def unpack_(model: nn.Module) -> None:
    """Turn every packed layer of ``model`` into the float layer, in place, with the weight of equation (7).

    Input quantizers go, as in ``CSQLayer.to_float``. Tied layers share one parameter again.

    Raises:
        ValueError: there is no packed layer.
    """
    layers = packed_layers(model)
    if not layers:
        raise ValueError("expected model with packed layers, got none")
    weights: dict[str, nn.Parameter] = {}
    for name, leader in leaders(layers).items():
        layer = layers[name]
        if leader not in weights:
            weights[leader] = nn.Parameter(layer.weight)
        layer.strip_()
        layer.__class__ = layer.float_class  # type: ignore[assignment]
        layer.register_parameter("weight", weights[leader])
