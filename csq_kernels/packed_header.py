"""The header of a packed file, which ``packed.py`` draws: built, and read with every claim in it checked.

Nothing here allocates what a header asks for: sizes are compared with the file and with each other, as integers.
"""

import hashlib
import json
import math
import os
import struct
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from csq_kernels import bitplanes
from csq_kernels.nn.activation import ActivationQuantizer
from csq_kernels.nn.pack import PackedSummary, summarize
from csq_kernels.nn.packed import PACKED_CLASSES, PackedLayer, check_scheme, exponents

VERSION = 1
_PREFIX = rb'{"__metadata__":{"csq":"{\"sha256\":\"'
_DIGEST = slice(8 + len(_PREFIX), 8 + len(_PREFIX) + 64)
DTYPES = {
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
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_CLASSES = {cls.__name__: cls for cls in PACKED_CLASSES.values()}
_KEYS = {"sha256": str, "version": int, "producer": str, "layers": dict, "ties": dict, "crc32": str, "extra": dict}
_MOST_AXES = 8
# Tensors of a packed layer, and of an input quantizer with what they are.
OWN = ("planes", "scale")
_NUMBER = (torch.float32, ())
QUANTIZER_TENSORS = {"range": _NUMBER, "low": _NUMBER, "high": _NUMBER, "_extra_state": (torch.bool, (1,))}


class PackedFileError(ValueError):
    """A packed file is damaged, of another version, or of another network; the message names the file and the place."""


@dataclass(frozen=True)
class LayerEntry:
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
        scheme = (self.n_bits, active, *bitplanes.to_masks(self.coefficients))
        value = [self.layer_class.__name__, self.shape, *scheme]
        return value if self.quantizer is None else [*value, self.quantizer]

    @classmethod
    def from_json(cls, value: Any) -> "LayerEntry":
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


def full_name(prefix: str, name: str) -> str:
    """Of a tensor or module inside the module ``prefix``, which is empty for the model itself."""
    return f"{prefix}.{name}" if prefix else name


def build(
    layers: dict[str, LayerEntry], tensors: dict[str, Tensor], ties: dict[str, str], crc32: str, extra: dict[str, Any]
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
            "dtype": DTYPE_NAMES[tensor.dtype],
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


def longest(file_bytes: int) -> int:
    """A header takes memory many times its size once it is parsed: more than this no network needs."""
    return max(1 << 20, file_bytes // 16)


@dataclass(frozen=True)
class Contents:
    """A header that was found to be consistent in itself and with the size of its file."""

    file: PackedFile
    layers: dict[str, LayerEntry]
    specs: dict[str, tuple[torch.dtype, tuple[int, ...]]]
    ties: dict[str, str]
    crc32: dict[str, int]

    def spec(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        """Dtype and shape of a tensor, also of one that is another."""
        return self.specs[self.ties.get(name, name)]


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


def read(file: BinaryIO, path: Path) -> Contents:
    """Read the header and check all of it before anything else is read or allocated."""
    size = os.fstat(file.fileno()).st_size
    first = file.read(8)
    length = struct.unpack("<Q", first)[0] if len(first) == 8 else None
    if length is None or length > min(size - 8, longest(size)):
        raise PackedFileError(f"{path}: expected a header that fits a file of {size} bytes, got length {length}")
    header = first + file.read(length)
    if header[8 : _DIGEST.start] != _PREFIX or len(header) < _DIGEST.stop:
        raise PackedFileError(f"{path}: expected a file written by save_packed, got another header")
    if _digest(header) != header[_DIGEST]:
        raise PackedFileError(f"{path}: expected a header of the SHA-256 that it states, got a damaged one")
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
        scale = full_name(name, "scale")
        scales, stored_bits = math.prod(specs[ties.get(scale, scale)][1]), len(layer.coefficients)
        leader = tied_to(name, ties)
        rows.append(summarize(name, layer.layer_class, layer.shape, layer.active, stored_bits, scales, leader))
    described = PackedFile(path, PackedSummary(rows), len(header), size, content["producer"], content["extra"])
    return Contents(described, layers, specs, ties, crc32)


def _check_entries(entries: dict[str, Any], data_bytes: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    specs = {}
    offset = 0
    for name, entry in entries.items():
        if not isinstance(entry, dict) or list(entry) != ["dtype", "shape", "data_offsets"]:
            raise ValueError(f"{name}: expected dtype, shape and data_offsets")
        dtype, shape, offsets = entry.values()
        if dtype not in DTYPES or not _are_sizes(shape) or len(shape) > _MOST_AXES or not _are_sizes(offsets):
            raise ValueError(f"{name}: expected a dtype among {', '.join(DTYPES)}, a shape and offsets, got {entry}")
        end = offset + math.prod(shape) * DTYPES[dtype].itemsize
        if offsets != [offset, end] or end > data_bytes:
            raise ValueError(f"{name}: expected offsets [{offset}, {end}] within {data_bytes} bytes, got {offsets}")
        specs[name] = (DTYPES[dtype], tuple(shape))
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


def _check_layers(layers: dict[str, Any], specs: dict[str, Any], ties: dict[str, str]) -> dict[str, LayerEntry]:
    checked: dict[str, LayerEntry] = {}
    for name, value in layers.items():
        try:
            layer = LayerEntry.from_json(value)
            axis = layer.layer_class.channel_axis
            if len(layer.shape) <= axis:
                raise ValueError(f"expected a weight shape with axis {axis}, got {layer.shape}")
            planes = (torch.uint8, (len(layer.coefficients), bitplanes.plane_bytes(math.prod(layer.shape))))
            scales = [(torch.float32, ()), (torch.float32, (layer.shape[axis],))]
            for key, expected in (("planes", [planes]), ("scale", scales)):
                full = full_name(name, key)
                found = specs.get(ties.get(full, full))
                if found not in expected:
                    raise ValueError(f"expected {key} as {' or '.join(map(spell, expected))}, got {spell(found)}")
            leader = tied_to(name, ties)
            if leader is not None and (leader not in checked or checked[leader].scheme() != layer.scheme()):
                raise ValueError(f"expected a tie to an earlier layer with the same codes, got {leader!r}")
        except (ValueError, TypeError) as error:
            raise ValueError(f"layer {name}: {error}") from None
        checked[name] = layer
    return checked


def tied_to(name: str, ties: dict[str, str]) -> str | None:
    """The layer whose planes and scale the layer ``name`` shares."""
    leaders = {ties[full_name(name, key)].removesuffix(key) for key in OWN if full_name(name, key) in ties}
    if not leaders:
        return None
    if len(leaders) == 1 and all(full_name(name, key) in ties for key in OWN):
        return leaders.pop().removesuffix(".")
    raise ValueError(f"expected planes and scale of one layer, got those of {', '.join(sorted(leaders))}")


def spell(spec: tuple[torch.dtype, tuple[int, ...]] | None) -> str:
    """Dtype and shape for a message, such as ``F32[5, 3]``."""
    return "none" if spec is None else f"{DTYPE_NAMES[spec[0]]}{list(spec[1])}"
