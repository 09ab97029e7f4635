r"""The packed file, version 1: a safetensors file with the planes of a network and all of it that stays float.

::

    0 ... 7        N, the length of the header, as 8 bytes, little-endian
    8 ... 8+N-1    the header: JSON, filled up with spaces to a multiple of 8
    8+N ...        the tensors without gaps, those of wide elements first

The header begins with the metadata: one text under the key ``csq``, itself JSON, whose first value is the SHA-256 of
everything before the tensors with its own 64 digits as zeros::

    {"__metadata__":{"csq":"{\"sha256\":\"<64 digits>\",\"version\":1,...}"},"<name>":{"dtype":"F32",...},...}

======================  ==========================================================================================
key                     value
======================  ==========================================================================================
``sha256, version``     as above
``producer``            package and version that wrote the file
``layers``              ``{name: [class, weight shape, n_bits, active, stored, negative]}`` for each packed layer; the
                        last three are sets of exponents, bit ``b`` for ``2^b``: paper bits, coefficients, those of
                        them that are negative. One more value, ``[bits, kind]``, where the input is quantized
``ties``                ``{name: name}`` of each tensor that is another one, to the one that is stored
``crc32``               the CRC-32 of each tensor in 8 digits, in the order of the header
``extra``               what the writer added, such as the way to build the network
======================  ==========================================================================================

A packed layer has the tensors ``<layer>.planes``, canonical as ``bitplanes.py`` draws them, and ``<layer>.scale``,
float32. All other tensors are the parameters and buffers of the model under their usual names.
"""

import hashlib
import json
import math
import os
import struct
import zlib
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from csq_kernels import bitplanes
from csq_kernels.files import write_atomically
from csq_kernels.nn.activation import ActivationQuantizer
from csq_kernels.nn.layer import BUFFERS, PARAMETERS, CSQLayer
from csq_kernels.nn.pack import (
    PackedSummary,
    check_precision,
    leaders,
    packed_layers,
    summarize,
)
from csq_kernels.nn.packed import PACKED_CLASSES, PackedLayer, check_scale, check_scheme, exponents, packed_class

VERSION = 1
_PREFIX = rb'{"__metadata__":{"csq":"{\"sha256\":\"'
_DIGEST = slice(8 + len(_PREFIX), 8 + len(_PREFIX) + 64)
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_CLASSES = {cls.__name__: cls for cls in PACKED_CLASSES.values()}
_KEYS = {"sha256": str, "version": int, "producer": str, "layers": dict, "ties": dict, "crc32": str, "extra": dict}
_MOST_AXES = 8
# Tensors of a packed layer, and of an input quantizer with what they are.
_PACKED = ("planes", "scale")
_QUANTIZER = {key: (torch.float32, ()) for key in ("range", "low", "high")} | {"_extra_state": (torch.bool, (1,))}


class PackedFileError(ValueError):
    """A packed file is damaged, of another version, or of another network; the message names the file and the place."""


@dataclass(frozen=True)
class _Layer:
    """What the file says about a packed layer."""

    layer_class: type[PackedLayer]
    shape: tuple[int, ...]
    n_bits: int
    active: tuple[int, ...]
    coefficients: tuple[int, ...]
    quantizer: tuple[int, str] | None

    def scheme(self) -> tuple[Any, ...]:
        """What tied layers have in common."""
        return self.shape, self.n_bits, self.active, self.coefficients

    def to_json(self) -> list[Any]:
        active = sum(1 << bit for bit in self.active)
        scheme = [self.n_bits, active, *bitplanes.to_masks(self.coefficients)]
        return [
            self.layer_class.__name__,
            list(self.shape),
            *scheme,
            *([list(self.quantizer)] if self.quantizer else []),
        ]

    @classmethod
    def from_json(cls, value: Any) -> "_Layer":
        if not isinstance(value, list) or len(value) not in (6, 7) or value[0] not in _CLASSES:
            raise ValueError(f"expected [class, shape, n_bits, active, stored, negative] of {', '.join(_CLASSES)}")
        name, shape, n_bits, active, stored, negative, *quantizer = value
        if not _are_sizes(shape) or len(shape) > _MOST_AXES or not _are_sizes([n_bits, active, stored, negative]):
            raise ValueError("expected a weight shape and sets of exponents as integers of at least 0")
        coefficients = check_scheme(n_bits, active, stored, negative)
        quantized = None
        if quantizer:
            bits, kind = quantizer[0]
            ActivationQuantizer(bits, kind)
            quantized = (bits, kind)
        return cls(_CLASSES[name], tuple(shape), n_bits, exponents(active), coefficients, quantized)


@dataclass(frozen=True)
class PackedFile:
    """What ``inspect`` reads: the packed layers, sizes in bytes, who wrote the file and what was added."""

    path: Path
    summary: PackedSummary
    header_bytes: int
    file_bytes: int
    producer: str
    extra: dict[str, Any]

    @property
    def rest_bytes(self) -> int:
        """Tensors that stay float."""
        return self.file_bytes - self.header_bytes - self.summary.bytes

    @property
    def float_bytes(self) -> int:
        """The file with float32 weights."""
        return self.file_bytes - self.summary.bytes + self.summary.float_bytes

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        sizes = {name: getattr(self, name) for name in ("file_bytes", "header_bytes", "rest_bytes", "float_bytes")}
        written = {"path": str(self.path), "version": VERSION, "producer": self.producer, "extra": self.extra}
        return written | sizes | {"packed": self.summary.to_dict()}

    def __str__(self) -> str:
        ratio = f"{self.float_bytes / self.file_bytes:.1f}x less than {self.float_bytes:,} with float32 weights"
        rest = f"{self.rest_bytes:,} of them stay float, {self.header_bytes:,} are the header; by {self.producer}"
        return f"{self.summary}\n\n{self.path}: {self.file_bytes:,} bytes, {ratio};\n{rest}"


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 1 << 63 for value in values)


def _producer() -> str:
    try:
        return f"csq_kernels {version('csq_kernels')}"
    except PackageNotFoundError:
        return "csq_kernels"


def _name(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _own_names(module: nn.Module) -> tuple[str, ...]:
    """Parameters and buffers that are the weight of a CSQ or packed layer."""
    if isinstance(module, PackedLayer):
        return _PACKED
    return (*PARAMETERS, *BUFFERS) if isinstance(module, CSQLayer) else ()


def _rest(model: nn.Module) -> dict[str, Tensor]:
    """Every persistent parameter and buffer and extra state, but for what belongs to the weight of a CSQ layer."""
    rest: dict[str, Tensor] = {}
    for prefix, module in model.named_modules():
        own = _own_names(module)
        tensors = {**module._parameters, **module._buffers}
        for name in own:
            del tensors[name]
        for name in module._non_persistent_buffers_set:
            tensors.pop(name, None)
        if not own and type(module).get_extra_state is not nn.Module.get_extra_state:
            state = module.get_extra_state()
            if not isinstance(state, Tensor):
                raise TypeError(f"expected extra state of {prefix} as a tensor, got {type(state).__name__}")
            tensors["_extra_state"] = state
        for name, tensor in tensors.items():
            if tensor is not None:
                rest[_name(prefix, name)] = tensor
    return rest


def _quantizer(layer: nn.Module) -> tuple[int, str] | None:
    quantizer = layer.input_quantizer
    return (quantizer.bits, quantizer.kind) if isinstance(quantizer, ActivationQuantizer) else None


def _planned(layers: dict[str, CSQLayer]) -> tuple[dict[str, _Layer], dict[str, Tensor]]:
    """Layers and tensors as ``pack_`` would make them if every bit were active: the largest that they can become."""
    planned: dict[str, _Layer] = {}
    tensors: dict[str, Tensor] = {}
    shared: dict[int, tuple[Tensor, Tensor]] = {}
    for name, layer in layers.items():
        shape = tuple(layer.bit_logits.shape[2:])
        active = tuple(range(layer.n_bits))
        coefficients = bitplanes.widest(active)
        cls = PACKED_CLASSES[layer.float_class]
        planned[name] = _Layer(cls, shape, layer.n_bits, active, coefficients, _quantizer(layer))
        size = (len(coefficients), bitplanes.plane_bytes(math.prod(shape)))
        made = (
            torch.empty(size, dtype=torch.uint8, device="meta"),
            torch.empty(layer.scale.shape, dtype=torch.float32, device="meta"),
        )
        planes, scale = shared.setdefault(id(layer.bit_logits), made)
        tensors |= {_name(name, "planes"): planes, _name(name, "scale"): scale}
    return planned, tensors


def _present(layers: dict[str, PackedLayer]) -> tuple[dict[str, _Layer], dict[str, Tensor]]:
    """Layers and tensors of a packed model."""
    present: dict[str, _Layer] = {}
    tensors: dict[str, Tensor] = {}
    for (name, layer), leader in zip(layers.items(), leaders(layers).values(), strict=True):
        shape, quantizer = layer.weight_shape, _quantizer(layer)
        present[name] = _Layer(type(layer), shape, layer.n_bits, layer.active, layer.coefficients, quantizer)
        # Tied layers may hold the same codes in two orders.
        planes = layer.canonical_planes() if leader == name else tensors[_name(leader, "planes")]
        tensors |= {_name(name, "planes"): planes, _name(name, "scale"): layer.scale}
    return present, tensors


def _ordered(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors to store, in their order in the file, and the ties of those that are another one."""
    stored: dict[str, Tensor] = {}
    ties: dict[str, str] = {}
    first: dict[int, str] = {}
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPE_NAMES:
            raise TypeError(f"expected {name} of a dtype among {', '.join(_DTYPES)}, got {tensor.dtype}")
        leader = first.setdefault(id(tensor), name)
        if leader == name:
            stored[name] = tensor
        else:
            ties[name] = leader
    return dict(sorted(stored.items(), key=lambda item: -item[1].element_size())), ties


def _header(
    layers: dict[str, _Layer], tensors: dict[str, Tensor], ties: dict[str, str], crc32: str, extra: dict[str, Any]
) -> bytes:
    """Everything before the tensors."""
    metadata = {
        "sha256": "0" * 64,
        "version": VERSION,
        "producer": _producer(),
        "layers": {name: layer.to_json() for name, layer in layers.items()},
        "ties": ties,
        "crc32": crc32,
        "extra": extra,
    }

    def compact(value: Any) -> str:
        return json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False)

    entries: dict[str, Any] = {"__metadata__": {"csq": compact(metadata)}}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + tensor.numel() * tensor.element_size()
        entries[name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = compact(entries).encode()
    text += b" " * (-len(text) % 8)
    header = struct.pack("<Q", len(text)) + text
    return header[: _DIGEST.start] + _digest(header) + header[_DIGEST.stop :]


def _digest(header: bytes) -> bytes:
    cleared = header[: _DIGEST.start] + b"0" * 64 + header[_DIGEST.stop :]
    return hashlib.sha256(cleared).hexdigest().encode()


def _raw(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, without a copy if it lies in one piece on the CPU."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def rest_bytes(model: nn.Module) -> int:
    """Bytes that the packed file of a prepared model needs besides planes and scales: the header and what stays float.

    The header is the one of every bit active, which no scheme exceeds.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, CSQLayer)}
    planned, tensors = _planned(layers)
    rest = _rest(model)
    stored, ties = _ordered(tensors | rest)
    header = _header(planned, stored, ties, "0" * 8 * len(stored), {})
    return len(header) + sum(stored[n].numel() * stored[n].element_size() for n in rest if n in stored)


def save_packed(model: nn.Module, path: str | Path, extra: dict[str, Any] | None = None) -> PackedFile:
    """Write a packed model to one safetensors file, laid out as the head of ``packed.py`` describes.

    It is written under another name first and then renamed: a failure leaves what stood at ``path`` as it was.

    Args:
        model: a model after ``pack_``.
        path: of the file.
        extra: to go along, anything that JSON can hold; ``inspect`` returns it.

    Returns:
        The description of the file.

    Raises:
        ValueError, TypeError: a CSQ layer is not packed or none is there, or a file cannot hold a tensor or ``extra``.
        OSError: the file cannot be written.
    """
    layers = packed_layers(model)
    unpacked = [name for name, module in model.named_modules() if isinstance(module, CSQLayer)]
    if not layers or unpacked:
        got = f"{unpacked[0]} unpacked" if unpacked else "none"
        raise ValueError(f"expected model with its CSQ layers packed, got {got}; call pack_ first")
    present, tensors = _present(layers)
    stored, ties = _ordered(tensors | _rest(model))
    for name, tensor in stored.items():
        if tensor.is_meta:
            raise ValueError(f"expected {name} with values, got a tensor on the meta device")
    crc32 = "".join(f"{zlib.crc32(_raw(tensor)):08x}" for tensor in stored.values())
    header = _header(present, stored, ties, crc32, extra or {})
    size = len(header) + sum(tensor.numel() * tensor.element_size() for tensor in stored.values())
    if len(header) > _longest_header(size):
        raise ValueError(f"expected names and extra of at most {_longest_header(size)} bytes, got {len(header)}")

    def write(file: BinaryIO) -> None:
        file.write(header)
        for tensor in stored.values():
            file.write(_raw(tensor))

    path = Path(path)
    write_atomically(path, write)
    return inspect(path)


def _longest_header(file_bytes: int) -> int:
    """A header takes memory many times its size once it is parsed: more than this no network needs."""
    return max(1 << 20, file_bytes // 16)


@dataclass(frozen=True)
class _Contents:
    """A header that was found to be consistent in itself and with the size of its file."""

    file: PackedFile
    layers: dict[str, _Layer]
    specs: dict[str, tuple[torch.dtype, tuple[int, ...]]]
    ties: dict[str, str]
    crc32: dict[str, int]

    def spec(self, name: str) -> tuple[torch.dtype, tuple[int, ...]] | None:
        """Dtype and shape of a tensor, also of one that is another."""
        return self.specs.get(self.ties.get(name, name))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("expected every key once")
    return result


def _parse(text: str | bytes) -> dict[str, Any]:
    try:
        value = json.loads(text, object_pairs_hook=_unique)
    except RecursionError:
        raise ValueError("expected JSON of moderate depth") from None
    if not isinstance(value, dict):
        raise ValueError("expected a JSON object")
    return value


def _read_contents(file: BinaryIO, path: Path) -> _Contents:
    """Read the header and check all of it before anything else is read or allocated."""
    size = os.fstat(file.fileno()).st_size
    first = file.read(8)
    length = struct.unpack("<Q", first)[0] if len(first) == 8 else None
    if length is None or length > min(size - 8, _longest_header(size)):
        raise PackedFileError(f"{path}: expected a header that fits a file of {size} bytes, got length {length}")
    header = first + file.read(length)
    if header[8 : _DIGEST.start] != _PREFIX or len(header) < _DIGEST.stop:
        raise PackedFileError(f"{path}: expected a file written by save_packed, got another header")
    if _digest(header) != header[_DIGEST]:
        raise PackedFileError(f"{path}: expected a header of SHA-256 {header[_DIGEST]!r}, got a damaged one")
    try:
        entries = _parse(header[8:])
        metadata = entries.pop("__metadata__")
        if list(metadata) != ["csq"] or not isinstance(metadata["csq"], str):
            raise ValueError("expected metadata as one text under csq")
        content = _parse(metadata["csq"])
        if content.get("version") != VERSION:
            raise ValueError(f"expected version {VERSION}, got {content.get('version')}")
        if {key: type(value) for key, value in content.items()} != _KEYS:
            raise ValueError(f"expected metadata {', '.join(_KEYS)} as documented, got {', '.join(content)}")
        specs = _check_entries(entries, size - len(header))
        ties = _check_ties(content["ties"], specs)
        crc32 = _check_crc32(content["crc32"], specs)
        layers = _check_layers(content["layers"], specs, ties)
    except (ValueError, TypeError) as error:
        raise PackedFileError(f"{path}: {error}") from None
    rows = []
    for name, layer in layers.items():
        scale = _name(name, "scale")
        scales, stored_bits = math.prod(specs[ties.get(scale, scale)][1]), len(layer.coefficients)
        tied_to = _tied_to(name, ties)
        rows.append(summarize(name, layer.layer_class, layer.shape, layer.active, stored_bits, scales, tied_to))
    described = PackedFile(path, PackedSummary(rows), len(header), size, content["producer"], content["extra"])
    return _Contents(described, layers, specs, ties, crc32)


def _check_entries(entries: dict[str, Any], data_bytes: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    specs = {}
    offset = 0
    for name, entry in entries.items():
        if not isinstance(entry, dict) or list(entry) != ["dtype", "shape", "data_offsets"]:
            raise ValueError(f"{name}: expected dtype, shape and data_offsets")
        dtype, shape, offsets = entry.values()
        if dtype not in _DTYPES or not _are_sizes(shape) or len(shape) > _MOST_AXES or not _are_sizes(offsets):
            raise ValueError(f"{name}: expected a dtype among {', '.join(_DTYPES)}, a shape and offsets, got {entry}")
        end = offset + math.prod(shape) * _DTYPES[dtype].itemsize
        if offsets != [offset, end] or end > data_bytes:
            raise ValueError(f"{name}: expected offsets [{offset}, {end}] within {data_bytes} bytes, got {offsets}")
        specs[name] = (_DTYPES[dtype], tuple(shape))
        offset = end
    if offset != data_bytes:
        raise ValueError(f"expected {offset} bytes of tensors, got {data_bytes}")
    return specs


def _check_ties(ties: dict[str, Any], specs: dict[str, Any]) -> dict[str, str]:
    for name, leader in ties.items():
        if not isinstance(leader, str) or name in specs or leader not in specs:
            raise ValueError(f"{name}: expected a tie to a stored tensor, got {leader!r}")
    return ties


def _check_crc32(digits: str, specs: dict[str, Any]) -> dict[str, int]:
    if len(digits) != 8 * len(specs):
        raise ValueError(f"expected crc32 of {len(specs)} tensors")
    return {name: int(digits[8 * i : 8 * i + 8], 16) for i, name in enumerate(specs)}


def _check_layers(layers: dict[str, Any], specs: dict[str, Any], ties: dict[str, str]) -> dict[str, _Layer]:
    checked: dict[str, _Layer] = {}
    for name, value in layers.items():
        try:
            layer = _Layer.from_json(value)
            axis = layer.layer_class.channel_axis
            if len(layer.shape) <= axis:
                raise ValueError(f"expected a weight shape with axis {axis}, got {layer.shape}")
            planes = (torch.uint8, (len(layer.coefficients), bitplanes.plane_bytes(math.prod(layer.shape))))
            scales = [(torch.float32, ()), (torch.float32, (layer.shape[axis],))]
            for key, expected in (("planes", [planes]), ("scale", scales)):
                full = _name(name, key)
                found = specs.get(ties.get(full, full))
                if found not in expected:
                    raise ValueError(f"expected {key} as {' or '.join(map(_spell, expected))}, got {_spell(found)}")
            leader = _tied_to(name, ties)
            if leader is not None and (leader not in checked or checked[leader].scheme() != layer.scheme()):
                raise ValueError(f"expected a tie to an earlier layer with the same codes, got {leader!r}")
        except (ValueError, TypeError) as error:
            raise ValueError(f"layer {name}: {error}") from None
        checked[name] = layer
    return checked


def _tied_to(name: str, ties: dict[str, str]) -> str | None:
    """The layer whose planes and scale the layer ``name`` shares."""
    leaders = {ties[_name(name, key)].removesuffix(key) for key in _PACKED if _name(name, key) in ties}
    if not leaders:
        return None
    if len(leaders) == 1 and all(_name(name, key) in ties for key in _PACKED):
        return leaders.pop().removesuffix(".")
    raise ValueError(f"expected planes and scale of one layer, got those of {', '.join(sorted(leaders))}")


def _spell(spec: tuple[torch.dtype, tuple[int, ...]] | None) -> str:
    return "none" if spec is None else f"{_DTYPE_NAMES[spec[0]]}{list(spec[1])}"


def inspect(path: str | Path) -> PackedFile:
    """Read and check the header of a packed file; the tensors are left alone.

    Raises:
        PackedFileError: the header is damaged or does not fit the file.
        OSError: the file cannot be read.
    """
    path = Path(path)
    with open(path, "rb") as file:
        return _read_contents(file, path).file


def load_packed(model: nn.Module, path: str | Path, precision: str = "exact") -> PackedFile:
    """Fill ``model`` from a packed file, in place: the layers of the file become packed ones, the rest is copied.

    Everything is checked before ``model`` is touched. The planes are mapped, not read, where the device reads them as
    they are in the file.

    Args:
        model: the same network, its layers float, prepared, hard or packed, on any device; ``meta`` costs no memory,
            and what lay there comes to lie on the CPU.
        path: of a file from ``save_packed``.
        precision: how the layers read their input, see ``functional.bitserial_linear``.

    Returns:
        The description of the file.

    Raises:
        PackedFileError: the file is damaged or of another network; the message names the layer or tensor.
        OSError: the file cannot be read.
    """
    check_precision(precision)
    path = Path(path)
    with open(path, "rb") as file:
        contents = _read_contents(file, path)
        try:
            _check_model(model, contents)
            with safe_open(path, "pt") as mapped:
                # Another process may just have put a new file in its place.
                if not os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                    raise ValueError("expected one file, got another while reading")
                tensors = {name: mapped.get_tensor(name) for name in contents.specs}
        except SafetensorError as error:
            raise PackedFileError(f"{path}: {error}") from None
        except ValueError as error:
            raise PackedFileError(f"{path}: {error}") from None
    for name, tensor in tensors.items():
        if zlib.crc32(_raw(tensor)) != contents.crc32[name]:
            raise PackedFileError(f"{path}: {name}: expected CRC-32 {contents.crc32[name]:08x}, got damaged data")
    for name, layer in contents.layers.items():
        full = _name(name, "scale")
        try:
            check_scale(tensors[contents.ties.get(full, full)], layer.shape[layer.layer_class.channel_axis])
        except ValueError as error:
            raise PackedFileError(f"{path}: layer {name}: {error}") from None
    _fill(model, contents, tensors, precision)
    return contents.file


def _check_model(model: nn.Module, contents: _Contents) -> None:
    """Raise ``ValueError`` unless the file is one of this network."""
    modules = dict(model.named_modules())
    expected = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in _rest(model).items()}
    for name, layer in contents.layers.items():
        module = modules.get(name)
        if module is None:
            raise ValueError(f"layer {name}: expected one of the model's layers, got a name that it lacks")
        if packed_class(module) is not layer.layer_class:
            raise ValueError(
                f"layer {name}: expected {type(module).__name__} of the model, got {layer.layer_class.__name__}"
            )
        shape = _weight_shape(module)
        if shape != layer.shape:
            raise ValueError(f"layer {name}: expected weight of shape {shape}, got {layer.shape}")
        expected.pop(_name(name, "weight"), None)
        for key in _QUANTIZER:
            expected.pop(_name(name, f"input_quantizer.{key}"), None)
        if layer.quantizer is not None:
            expected |= {_name(name, f"input_quantizer.{key}"): spec for key, spec in _QUANTIZER.items()}
    for name, module in modules.items():
        if isinstance(module, (CSQLayer, PackedLayer)) and name not in contents.layers:
            raise ValueError(f"layer {name}: expected a packed layer like the model's, got none")
    own = {_name(name, key) for name in contents.layers for key in _PACKED}
    found = (contents.specs.keys() | contents.ties.keys()) - own
    for name in sorted(expected.keys() ^ found):
        raise ValueError(f"{name}: expected the model's tensors, got one {'less' if name in expected else 'more'}")
    for name, (_, shape) in expected.items():
        spec = contents.spec(name)
        if spec is None or spec[1] != shape:
            raise ValueError(f"{name}: expected shape {shape}, got {_spell(spec)}")


def _weight_shape(module: nn.Module) -> tuple[int, ...]:
    if isinstance(module, PackedLayer):
        return module.weight_shape
    if isinstance(module, CSQLayer):
        return tuple(module.bit_logits.shape[2:])
    weight = module._parameters["weight"]
    assert weight is not None
    return tuple(weight.shape)


def _off_meta(device: torch.device) -> torch.device:
    return torch.device("cpu") if device.type == "meta" else device


@torch.no_grad()
def _fill(model: nn.Module, contents: _Contents, tensors: dict[str, Tensor], precision: str) -> None:
    """Change ``model``; nothing of this can fail any more for a reason that lies in the file."""
    modules = dict(model.named_modules())
    filled: dict[str, PackedLayer] = {}
    for name, layer in contents.layers.items():
        module = modules[name]
        if isinstance(module, (CSQLayer, PackedLayer)):
            reference = module.scale
            dtype = module.bit_logits.dtype if isinstance(module, CSQLayer) else module.dtype
            quantizer = module.input_quantizer
            module.strip_()
        else:
            weight = module._parameters.pop("weight")
            assert weight is not None
            reference, dtype, quantizer = weight, weight.dtype, None
        device = _off_meta(reference.device)
        module.__class__ = layer.layer_class
        assert isinstance(module, PackedLayer)
        module._modules["input_quantizer"] = None
        if layer.quantizer is not None:
            quantizer = quantizer or ActivationQuantizer(*layer.quantizer, device=device)
            module.input_quantizer = quantizer.train(module.training)
        leader = _tied_to(name, contents.ties)
        if leader is None:
            planes, scale = (tensors[_name(name, key)].to(device) for key in _PACKED)
            scheme = (layer.coefficients, layer.n_bits, layer.active)
            module.become_packed_(layer.shape, planes, scale, *scheme, dtype, precision)
        else:
            module.become_like_(filled[leader], dtype)
        filled[name] = module
    _leave_meta(model)
    for prefix, module in model.named_modules():
        for name, tensor in {**module._parameters, **module._buffers}.items():
            full = _name(prefix, name)
            source = tensors.get(contents.ties.get(full, full))
            packed = isinstance(module, PackedLayer) and name in _PACKED
            if tensor is not None and source is not None and not packed:
                tensor.copy_(source)
        state = tensors.get(_name(prefix, "_extra_state"))
        if state is not None:
            module.set_extra_state(state)


def _leave_meta(model: nn.Module) -> None:
    """Give parameters and persistent buffers on the meta device memory on the CPU; what is shared stays shared."""
    replaced: dict[int, tuple[Tensor, Tensor]] = {}
    for module in model.modules():
        holders: list[dict[str, Any]] = [module._parameters, module._buffers]
        for held in holders:
            for name, tensor in held.items():
                if tensor is None or not tensor.is_meta or name in module._non_persistent_buffers_set:
                    continue
                if id(tensor) not in replaced:
                    made: Tensor = torch.empty_like(tensor, device="cpu")
                    if isinstance(tensor, nn.Parameter):
                        made = nn.Parameter(made, requires_grad=tensor.requires_grad)
                    replaced[id(tensor)] = (tensor, made)
                held[name] = replaced[id(tensor)][1]
