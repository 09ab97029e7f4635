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

import math
import mmap
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from csq_kernels import bitplanes
from csq_kernels.files import write_atomically
from csq_kernels.nn.activation import ActivationQuantizer
from csq_kernels.nn.layer import BUFFERS, PARAMETERS, CSQLayer
from csq_kernels.nn.pack import check_precision, leaders, packed_layers
from csq_kernels.nn.packed import PACKED_CLASSES, PackedLayer, check_scale, packed_class
from csq_kernels.packed_header import (
    DTYPE_NAMES,
    DTYPES,
    OWN,
    QUANTIZER_TENSORS,
    Contents,
    LayerEntry,
    PackedFile,
    PackedFileError,
    build,
    full_name,
    longest,
    read,
    spell,
    tied_to,
)

__all__ = ["PackedFile", "PackedFileError", "inspect", "load_packed", "rest_bytes", "save_packed"]


def _own_names(module: nn.Module) -> tuple[str, ...]:
    """Parameters and buffers that are the weight of a CSQ or packed layer."""
    if isinstance(module, PackedLayer):
        return OWN
    return (*PARAMETERS, *BUFFERS) if isinstance(module, CSQLayer) else ()


def _rest(model: nn.Module) -> dict[str, Tensor]:
    """Every persistent parameter and buffer and extra state, but for what belongs to the weight of a CSQ layer."""
    rest: dict[str, Tensor] = {}
    for prefix, module in model.named_modules():
        own = _own_names(module)
        tensors = {**module._parameters, **module._buffers}
        for name in own:
            del tensors[name]
        if isinstance(module, CSQLayer):
            # With the single-pass step, a parameter as well, but made of what is packed.
            tensors.pop("weight", None)
        for name in module._non_persistent_buffers_set:
            tensors.pop(name, None)
        if not own and type(module).get_extra_state is not nn.Module.get_extra_state:
            state = module.get_extra_state()
            if not isinstance(state, Tensor):
                raise TypeError(f"expected extra state of {prefix} as a tensor, got {type(state).__name__}")
            tensors["_extra_state"] = state
        for name, tensor in tensors.items():
            if tensor is not None:
                rest[full_name(prefix, name)] = tensor
    return rest


def _quantizer(layer: nn.Module) -> tuple[int, str] | None:
    quantizer = layer.input_quantizer
    return (quantizer.bits, quantizer.kind) if isinstance(quantizer, ActivationQuantizer) else None


def _planned(layers: dict[str, CSQLayer]) -> tuple[dict[str, LayerEntry], dict[str, Tensor]]:
    """Layers and tensors as ``pack_`` would make them if every bit were active: the largest that they can become."""
    planned: dict[str, LayerEntry] = {}
    tensors: dict[str, Tensor] = {}
    shared: dict[int, tuple[Tensor, Tensor]] = {}
    for name, layer in layers.items():
        shape = tuple(layer.bit_logits.shape[2:])
        active = tuple(range(layer.n_bits))
        coefficients = bitplanes.widest(active)
        cls = PACKED_CLASSES[layer.float_class]
        planned[name] = LayerEntry(cls, shape, layer.n_bits, active, coefficients, _quantizer(layer))
        size = (len(coefficients), bitplanes.plane_bytes(math.prod(shape)))
        made = (
            torch.empty(size, dtype=torch.uint8, device="meta"),
            torch.empty(layer.scale.shape, dtype=torch.float32, device="meta"),
        )
        planes, scale = shared.setdefault(id(layer.bit_logits), made)
        tensors |= {full_name(name, "planes"): planes, full_name(name, "scale"): scale}
    return planned, tensors


def _present(layers: dict[str, PackedLayer]) -> tuple[dict[str, LayerEntry], dict[str, Tensor]]:
    """Layers and tensors of a packed model."""
    present: dict[str, LayerEntry] = {}
    tensors: dict[str, Tensor] = {}
    for (name, layer), leader in zip(layers.items(), leaders(layers).values(), strict=True):
        shape, quantizer = layer.weight_shape, _quantizer(layer)
        present[name] = LayerEntry(type(layer), shape, layer.n_bits, layer.active, layer.coefficients, quantizer)
        # Tied layers may hold the same codes in two orders.
        planes = layer.canonical_planes() if leader == name else tensors[full_name(leader, "planes")]
        tensors |= {full_name(name, "planes"): planes, full_name(name, "scale"): layer.scale}
    return present, tensors


def _ordered(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors to store, in their order in the file, and the ties of those that are another one."""
    stored: dict[str, Tensor] = {}
    ties: dict[str, str] = {}
    first: dict[int, str] = {}
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPE_NAMES:
            raise TypeError(f"expected {name} of a dtype among {', '.join(DTYPES)}, got {tensor.dtype}")
        leader = first.setdefault(id(tensor), name)
        if leader == name:
            stored[name] = tensor
        else:
            ties[name] = leader
    return dict(sorted(stored.items(), key=lambda item: -item[1].element_size())), ties


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
    header = build(planned, stored, ties, "0" * 8 * len(stored), {})
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
    header = build(present, stored, ties, crc32, extra or {})
    size = len(header) + sum(tensor.numel() * tensor.element_size() for tensor in stored.values())
    if len(header) > longest(size):
        raise ValueError(f"expected names and extra of at most {longest(size)} bytes, got {len(header)}")

    def write(file: BinaryIO) -> None:
        file.write(header)
        for tensor in stored.values():
            file.write(_raw(tensor))

    path = Path(path)
    write_atomically(path, write)
    return inspect(path)


def inspect(path: str | Path) -> PackedFile:
    """Read and check the header of a packed file; the tensors are left alone.

    Raises:
        PackedFileError: the header is damaged or does not fit the file.
        OSError: the file cannot be read.
    """
    path = Path(path)
    with open(path, "rb") as file:
        return read(file, path).file


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
        contents = read(file, path)
        try:
            _check_model(model, contents)
            tensors = _map(file, contents)
        except ValueError as error:
            raise PackedFileError(f"{path}: {error}") from None
    for name, tensor in tensors.items():
        if zlib.crc32(_raw(tensor)) != contents.crc32[name]:
            raise PackedFileError(f"{path}: {name}: expected CRC-32 {contents.crc32[name]:08x}, got damaged data")
    for name, layer in contents.layers.items():
        full = full_name(name, "scale")
        try:
            check_scale(tensors[contents.ties.get(full, full)], layer.shape[layer.layer_class.channel_axis])
        except ValueError as error:
            raise PackedFileError(f"{path}: layer {name}: {error}") from None
    _fill(model, contents, tensors, precision)
    return contents.file


def _map(file: BinaryIO, contents: Contents) -> dict[str, Tensor]:
    """The tensors of an open file, mapped; what is written to them stays in memory.

    By the file and not by its path, as ``safetensors.safe_open`` does it: another process may just have replaced it.
    """
    mapped = mmap.mmap(file.fileno(), contents.file.file_bytes, access=mmap.ACCESS_COPY)
    tensors: dict[str, Tensor] = {}
    offset = contents.file.header_bytes
    for name, (dtype, shape) in contents.specs.items():
        count = math.prod(shape)
        # frombuffer refuses to make an empty tensor.
        flat = (
            torch.frombuffer(mapped, dtype=dtype, count=count, offset=offset) if count else torch.empty(0, dtype=dtype)
        )
        tensors[name] = flat.view(shape)
        offset += count * dtype.itemsize
    return tensors


def _check_model(model: nn.Module, contents: Contents) -> None:
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
        expected.pop(full_name(name, "weight"), None)
        for key in QUANTIZER_TENSORS:
            expected.pop(full_name(name, f"input_quantizer.{key}"), None)
        if layer.quantizer is not None:
            expected |= {full_name(name, f"input_quantizer.{key}"): spec for key, spec in QUANTIZER_TENSORS.items()}
    for name, module in modules.items():
        if isinstance(module, (CSQLayer, PackedLayer)) and name not in contents.layers:
            raise ValueError(f"layer {name}: expected a packed layer like the model's, got none")
    own = {full_name(name, key) for name in contents.layers for key in OWN}
    found = (contents.specs.keys() | contents.ties.keys()) - own
    for name in sorted(expected.keys() ^ found):
        raise ValueError(f"{name}: expected the model's tensors, got one {'less' if name in expected else 'more'}")
    for name, (dtype, shape) in expected.items():
        found_dtype, found_shape = contents.spec(name)
        castable = dtype == found_dtype or (dtype.is_floating_point and found_dtype.is_floating_point)
        if found_shape != shape or not castable:
            raise ValueError(f"{name}: expected {spell((dtype, shape))}, got {spell((found_dtype, found_shape))}")


def _weight_shape(module: nn.Module) -> tuple[int, ...]:
    if isinstance(module, PackedLayer):
        return module.weight_shape
    if isinstance(module, CSQLayer):
        return tuple(module.bit_logits.shape[2:])
    weight = module._parameters["weight"]
    assert weight is not None
    return tuple(weight.shape)


@torch.no_grad()
def _fill(model: nn.Module, contents: Contents, tensors: dict[str, Tensor], precision: str) -> None:
    """Change ``model``; nothing of this can fail any more for a reason that lies in the file."""
    modules = dict(model.named_modules())
    filled: dict[str, list[PackedLayer]] = {}
    for name, layer in contents.layers.items():
        module = modules[name]
        if isinstance(module, (CSQLayer, PackedLayer)):
            device, quantizer = module.scale.device, module.input_quantizer
            dtype = module.dtype
            quantizer = quantizer if _quantizer(module) == layer.quantizer else None
            module.strip_()
        else:
            weight = module._parameters.pop("weight")
            assert weight is not None
            device, dtype, quantizer = weight.device, weight.dtype, None
        device = torch.device("cpu") if device.type == "meta" else device
        module.__class__ = layer.layer_class
        assert isinstance(module, PackedLayer)
        module._modules["input_quantizer"] = None
        if layer.quantizer is not None:
            quantizer = quantizer or ActivationQuantizer(*layer.quantizer, device=device)
            module.input_quantizer = quantizer.train(module.training)
        leader = tied_to(name, contents.ties)
        if leader is None:
            planes, scale = (tensors[full_name(name, key)].to(device) for key in OWN)
            scheme = (layer.coefficients, layer.n_bits, layer.active)
            module.become_packed_(layer.shape, planes, scale, *scheme, dtype, precision)
        else:
            module.become_like_(filled[leader], dtype)
        filled.setdefault(leader or name, []).append(module)
    _leave_meta(model)
    for prefix, module in model.named_modules():
        for name, tensor in {**module._parameters, **module._buffers}.items():
            full = full_name(prefix, name)
            source = tensors.get(contents.ties.get(full, full))
            packed = isinstance(module, PackedLayer) and name in OWN
            if tensor is not None and source is not None and not packed:
                tensor.copy_(source)
        state = tensors.get(full_name(prefix, "_extra_state"))
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
