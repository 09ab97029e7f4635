"""Mutated arguments against everything that reaches C++: ``python tests/reliability/fuzz_arguments.py --sets 200000``.

A set is a valid call with up to three of its arguments spoiled: dtypes, shapes, strides, devices, values, aliases,
lists, integers. It must raise one of ``ERRORS`` with a message, or give what the plain PyTorch reference gives; leave
its inputs and the memory around them as they were; and end. Half of the tensors, inputs and results alike, lie against
a page that cannot be touched, so that a kernel of any instruction set that reads or writes past them dies; the rest lie
where the allocator puts them, which is what AddressSanitizer watches. A process that dies names its set.
"""

import argparse
import contextlib
import ctypes
import dataclasses
import faulthandler
import functools
import inspect
import math
import mmap
import multiprocessing
import random
import resource
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import record
import torch
from torch import Tensor

from csq_kernels import _native, _ops, backends, bitplanes, functional, reference, reference_step, step
from csq_kernels.nn import packed

# IndexError and MemoryError are what PyTorch and C++ say to axes that are not there and sizes that nothing can hold.
ERRORS = (ValueError, TypeError, RuntimeError, IndexError, MemoryError)
SECONDS = 120  # for a set, before it counts as endless
MEMORY = 12 << 30  # address space of a process
LARGE = 1 << 24  # elements; without a plane, zeros of any shape can be asked for, which take memory once they are read
GROWTH = 512 << 20  # resident memory that all sets together may add
_SENTINEL = 0x4D
_INTEGERS: list[Any] = [0, 1, -1, 2, 3, 16, 17, 2**31 - 1, 2**31, 2**32, 2**62, 2**63 - 1, 2**63, -(2**63), 0.5]
_VALUES = [math.nan, math.inf, -math.inf, 0.0, -0.0, -1.0, 1e-45, 3e38, 1e300]
_DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.uint8, torch.int64, torch.bool]
_DTYPES += [torch.complex64]


class Arena:
    """Pages between two that cannot be touched; what lies in them and is not a tensor keeps its value."""

    SIZE = 1 << 16

    def __init__(self) -> None:
        page = mmap.PAGESIZE
        self._memory = mmap.mmap(-1, self.SIZE + 2 * page)
        start = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        protect = ctypes.CDLL(None, use_errno=True).mprotect
        for address in (start, start + page + self.SIZE):
            if protect(ctypes.c_void_p(address), ctypes.c_size_t(page), 0) != 0:
                raise OSError(ctypes.get_errno(), "mprotect failed")
        self._bytes = torch.frombuffer(self._memory, dtype=torch.uint8)[page : page + self.SIZE]
        self._slack: list[Tensor] = []

    def place(self, nbytes: int, at_end: bool) -> Tensor:
        """So many bytes against the page after or before."""
        start = self.SIZE - nbytes if at_end else 0
        self._slack = [self._bytes[max(0, start - 256) : start], self._bytes[start + nbytes : start + nbytes + 256]]
        for slack in self._slack:
            slack.fill_(_SENTINEL)
        return self._bytes[start : start + nbytes]

    def intact(self) -> bool:
        return all(bool((slack == _SENTINEL).all()) for slack in self._slack)


class Memory:
    """Where the tensors of a set lie."""

    def __init__(self) -> None:
        self._arenas = [Arena() for _ in range(40)]
        self._used = 0
        self.chance = random.Random()
        self.guards_results = False
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
            setattr(owner, name, self._guarded(getattr(owner, name)))

    def begin(self, chance: random.Random) -> None:
        self._used, self.chance = 0, chance

    def placed(self, tensor: Tensor) -> Tensor:
        """A copy with the same strides, in an arena or, half of the time, where the allocator puts it."""
        if self.chance.random() < 0.5:
            return tensor.clone()
        return self._room(tensor).copy_(tensor)

    def _room(self, like: Tensor) -> Tensor:
        nbytes = like.untyped_storage().nbytes() if like.numel() else 0
        nbytes -= nbytes % like.element_size()
        if nbytes > Arena.SIZE or self._used == len(self._arenas):
            return like.clone()
        arena = self._arenas[self._used]
        self._used += 1
        room = arena.place(nbytes, self.chance.random() < 0.7).view(like.dtype)
        return room.as_strided(like.shape, like.stride(), room.storage_offset())

    def _guarded(self, allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @functools.wraps(allocate)
        def guarded(*args: Any, **kwargs: Any) -> Tensor:
            tensor = allocate(*args, **kwargs)
            caller = sys._getframe(1).f_globals.get("__name__", "")
            if not self.guards_results or tensor.device.type != "cpu" or not caller.startswith("csq_kernels"):
                return tensor
            room = self._room(tensor) if tensor.is_contiguous() and self.chance.random() < 0.5 else tensor
            if tensor.nbytes > Arena.SIZE:
                return tensor
            return room.fill_(torch.nan if room.is_floating_point() else 0x2A)

        return guarded

    def intact(self) -> bool:
        return all(arena.intact() for arena in self._arenas[: self._used])


# --- Valid calls --------------------------------------------------------------------------------------------------


def _sizes(chance: random.Random, axes: int) -> tuple[int, ...]:
    return tuple(chance.choice((1, 1, 2, 3, 4, 5, 7, 8, 9, 17, 33)) for _ in range(axes))


def _reconstruct(chance: random.Random) -> dict[str, Any]:
    shape = _sizes(chance, chance.choice((0, 1, 1, 2, 2, 3)))
    if chance.random() < 0.1:
        shape = (chance.choice((127, 1031, 1500)),)
    n_bits = chance.randint(1, 16)
    bits = sorted(chance.sample(range(n_bits), chance.randint(0, min(n_bits, 5))))
    axis = chance.randrange(len(shape)) if shape else 0
    channels = [shape[axis]] if shape else []
    per_gate, per_scale = chance.random() < 0.4, chance.random() < 0.4
    dtype = chance.choice(_DTYPES[:4])
    return {
        "bit_logits": (torch.randn(2, len(bits), *shape) / 8).to(dtype),
        "gate_logits": torch.randn(len(bits), *channels * per_gate),
        "scale": 0.5 + torch.rand(channels * per_scale),
        "temperature": torch.tensor(chance.choice((1.0, 30.0, 200.0))),
        "bits": bits,
        "n_bits": n_bits,
        "channel_axis": axis,
        "hard_gates": chance.random() < 0.3,
    }


def _reconstruct_backward(chance: random.Random) -> dict[str, Any]:
    arguments = _reconstruct(chance)
    logits = arguments["bit_logits"]
    return {"grad_weight": torch.randn(logits.shape[2:]).to(logits.dtype), **arguments}


def _coefficients(chance: random.Random) -> tuple[int, ...]:
    exponents = sorted(chance.sample(range(17), chance.choice((0, 1, 2, 3, 4, 8))), reverse=True)
    return tuple(chance.choice((1, -1)) << exponent for exponent in exponents)


def _packed(chance: random.Random, shape: tuple[int, ...], axis: int = 0) -> dict[str, Any]:
    coefficients = _coefficients(chance)
    planes = torch.randint(0, 256, (len(coefficients), bitplanes.plane_bytes(math.prod(shape))), dtype=torch.uint8)
    per_channel = chance.random() < 0.5
    step = (0.5 + torch.rand([shape[axis]] * per_channel)) / 65536
    return {"planes": planes, "step": step, "coefficients": coefficients, "weight_shape": shape}


def _tiled(chance: random.Random, op: str, arguments: dict[str, Any]) -> None:
    """Most of the planes in the order of the kernels, as layers hold them."""
    if chance.random() < 0.8:
        weight = (arguments["coefficients"], arguments["weight_shape"])
        arguments["planes"] = backends.tile(op, arguments["planes"], *weight)


def _bitserial_linear(chance: random.Random) -> dict[str, Any]:
    rows, columns = _sizes(chance, 2)
    if chance.random() < 0.2:
        rows, columns = chance.choice((1, 64, 65, 130)), chance.choice((127, 128, 129, 300))
    arguments = _packed(chance, (rows, columns))
    _tiled(chance, "bitserial_linear", arguments)
    batch = chance.choice(((), (1,), (1,), (2,), (3,), (2, 3), (17,)))
    arguments["input"] = torch.randn(*batch, columns).to(chance.choice(_DTYPES[:4]))
    arguments["bias"] = torch.randn(rows) if chance.random() < 0.5 else None
    arguments["precision"] = chance.choice(_ops.PRECISIONS)
    return arguments


def _bitserial_conv2d(chance: random.Random) -> dict[str, Any]:
    groups = chance.choice((1, 1, 1, 2))
    rows, channels = groups * chance.choice((1, 3, 8, 33)), chance.choice((1, 3, 4, 7, 9))
    kernel = (chance.randint(1, 3), chance.randint(1, 3))
    arguments = _packed(chance, (rows, channels, *kernel))
    if groups == 1:
        _tiled(chance, "bitserial_conv2d", arguments)
    dilation, padding = (chance.randint(1, 2), 1), (chance.randint(0, 2), chance.randint(0, 1))
    size = [d * (k - 1) + 1 + chance.randint(0, 7) for d, k in zip(dilation, kernel, strict=True)]
    arguments |= {
        "input": torch.randn(chance.randint(1, 3), channels * groups, *size).to(chance.choice(_DTYPES[:4])),
        "bias": torch.randn(rows) if chance.random() < 0.5 else None,
        "stride": (chance.randint(1, 2), chance.randint(1, 3)),
        "padding": padding,
        "dilation": dilation,
        "groups": groups,
        "precision": chance.choice(_ops.PRECISIONS),
    }
    return arguments


def _bitserial_weight(chance: random.Random) -> dict[str, Any]:
    op, axes = chance.choice((("bitserial_linear", 2), ("bitserial_conv2d", 4), (None, 1), (None, 3)))
    shape = _sizes(chance, axes)
    axis = 0 if op else chance.randrange(axes)
    arguments = _packed(chance, shape, axis)
    if op and math.prod(shape) < 10000:
        _tiled(chance, op, arguments)
    return {**arguments, "channel_axis": axis}


def _order(chance: random.Random) -> dict[str, Any]:
    op, axes = chance.choice((("bitserial_linear", 2), ("bitserial_conv2d", 4)))
    arguments = _packed(chance, tuple(min(size, 17) for size in _sizes(chance, axes)))
    del arguments["step"]
    return {"op": op, **arguments}


def _tiles(chance: random.Random) -> dict[str, Any]:
    arguments = _order(chance)
    return {**arguments, "planes": backends.tile(*arguments.values())}


def _step(chance: random.Random) -> dict[str, Any]:
    arguments = _reconstruct(chance)
    logits = arguments["bit_logits"] = arguments["bit_logits"].to(chance.choice((torch.float32, torch.bfloat16)))
    vectors = [1.1 * arguments[name] for name in step.Vectors._fields]
    weight = reference.reconstruct(logits.float(), *vectors, *list(arguments.values())[4:])
    weight = weight.to(chance.choice((torch.float32, torch.float32, torch.bfloat16)))
    rule = chance.choice(
        (
            step.Rule.sgd(1, 0.1, 0.0, 0.0, False, False),
            step.Rule.sgd(2, 0.1, 0.9, 0.1, True, True),
            step.Rule.adam(3, 0.1, (0.9, 0.99), 1e-8, False),
        )
    )
    narrow = chance.random() < 0.4
    momenta = {
        f"momenta.{i}": torch.rand(logits.shape).to(step.NARROW if narrow else torch.float32)
        for i in range(rule.momenta)
    }
    scales = torch.rand(step.momentum_scale_shape(logits))
    arguments |= {"weight": weight, "grad_weight": torch.randn(weight.shape).to(weight.dtype), "rule": rule}
    arguments |= {f"{name} before": vector for name, vector in zip(step.Vectors._fields, vectors, strict=True)}
    return arguments | momenta | {f"momentum_scales.{i}": scales.clone() for i in range(len(momenta) * narrow)}


def _codes(chance: random.Random) -> dict[str, Any]:
    bits = chance.randint(0, 16)
    shape = _sizes(chance, chance.randint(0, 3))
    codes = torch.randint(-(1 << bits) + 1, 1 << bits, shape, dtype=chance.choice((torch.int32, torch.int64)))
    return {"codes": codes, "active": chance.choice((None, list(range(bits))))}


def _planes(chance: random.Random) -> dict[str, Any]:
    arguments = _packed(chance, _sizes(chance, chance.randint(1, 3)))
    return {
        "planes": arguments["planes"],
        "coefficients": arguments["coefficients"],
        "shape": arguments["weight_shape"],
    }


# Packed layers with an input that suits each.
@functools.cache
def _layers() -> list[tuple[torch.nn.Module, tuple[int, ...]]]:
    generator = torch.Generator().manual_seed(0)

    def codes(*shape: int) -> Tensor:
        return torch.randint(-7, 8, shape, generator=generator)

    scale = torch.tensor(0.5)
    kinds: list[tuple[Any, tuple[int, ...], tuple[int, ...], dict[str, Any]]] = [
        (packed.PackedLinear, (65, 70), (2, 70), {"bias": torch.ones(65)}),
        (packed.PackedConv1d, (5, 8, 3), (2, 8, 9), {"padding": "same"}),
        (packed.PackedConv2d, (5, 8, 3, 3), (2, 8, 6, 6), {"padding": 1}),
        (packed.PackedConv2d, (6, 2, 3, 3), (1, 4, 6, 6), {"groups": 2}),
        (packed.PackedConv3d, (2, 3, 1, 2, 2), (1, 3, 3, 3, 3), {}),
        (packed.PackedConvTranspose2d, (4, 3, 2, 2), (1, 4, 3, 3), {}),
    ]
    return [(cls.from_codes(codes(*shape), scale, 4, **options), size) for cls, shape, size, options in kinds]


def _forward(chance: random.Random) -> dict[str, Any]:
    layer, shape = chance.choice(_layers())
    return {"layer": layer, "input": torch.randn(shape)}


def _embed(chance: random.Random) -> dict[str, Any]:
    return {"index": torch.randint(0, 17, _sizes(chance, chance.randint(0, 3)))}


def _native_sizes(chance: random.Random) -> dict[str, Any]:
    name = chance.choice(("reconstruct_scratch_size", "step_scratch_size", "BitserialLinear", "BitserialConv2d"))
    pair = [1, 1]
    arguments: dict[str, list[Any]] = {
        "reconstruct_scratch_size": [1, 8, 100, 3],
        "step_scratch_size": [1, 8, 100],
        "BitserialLinear": [8, 8, [4, 2, 1], True],
        "BitserialConv2d": [8, 8, pair, pair, pair, pair, [4, 2], True],
    }
    return {"name": name, **{str(i): value for i, value in enumerate(arguments[name])}}


# --- Calls and what they should give ------------------------------------------------------------------------------


class Unjudged(Exception):
    """There is nothing to compare a result with."""


def _in_order(op: str, arguments: dict[str, Any]) -> list[Any]:
    return [arguments[name] for name in inspect.signature(getattr(reference, op)).parameters]


def _plainly(op: str, arguments: dict[str, Any]) -> Any:
    """What the reference makes of it."""
    if None in (arguments.get("bits", ()), arguments.get("n_bits", 0)):
        raise Unjudged("defaults that only the documented function has")
    if "planes" in arguments:
        weight = (arguments["coefficients"], arguments["weight_shape"])
        family = "bitserial_conv2d" if len(arguments["weight_shape"]) == 4 else "bitserial_linear"
        if arguments["planes"].is_meta and arguments["planes"].ndim > 2:
            raise Unjudged("tiles without bytes")
        planes = backends.untile(family, arguments["planes"], *weight)
        if planes is not arguments["planes"] and not torch.equal(
            backends.tile(family, planes, *weight), arguments["planes"]
        ):
            raise Unjudged("bits beside the weight, which no planes have")
        arguments = {**arguments, "planes": planes}
    with torch.no_grad():
        return getattr(reference, op)(*_in_order(op, arguments))


def _dispatched(op: str, arguments: dict[str, Any]) -> Any:
    return getattr(torch.ops.csq, op).default(*_in_order(op, arguments))


def _function(op: str, arguments: dict[str, Any]) -> Any:
    """The documented function, and its backward pass if something wants a gradient."""
    names = [name for name in inspect.signature(getattr(functional, op)).parameters if name in arguments]
    first = {name: arguments[name] for name in names if isinstance(arguments[name], Tensor) or name == "bias"}
    positional = op == "bitserial_weight"
    rest = {name: arguments[name] for name in names if name not in first}
    result = getattr(functional, op)(
        *first.values(), *rest.values() if positional else (), **{} if positional else rest
    )
    if result.requires_grad:
        result.sum().backward()
    return result


def _step_layer(arguments: dict[str, Any]) -> step.StepLayer:
    def several(name: str) -> tuple[Any, ...]:
        return tuple(value for key, value in arguments.items() if key.startswith(name + "."))

    fields = step.Vectors._fields
    names = ("weight", "grad_weight", "bit_logits", "bits", "n_bits", "channel_axis", "hard_gates", "rule")
    return step.StepLayer(
        **{name: arguments[name] for name in names},
        before=step.Vectors(*(arguments[f"{name} before"] for name in fields)),
        after=step.Vectors(*(arguments[name] for name in fields)),
        momenta=several("momenta"),
        momentum_scales=several("momentum_scales"),
        key=1,
    )


def _stepped(arguments: dict[str, Any], sums: Callable, update: Callable) -> Any:
    """As the optimizer does it: checks, sums, update in place."""
    layer = _step_layer(arguments)
    step.check_step(layer)
    gradients = sums(layer)
    update([layer])
    # With hard gates (6) comes from the weight, which need not be the one of the logits any more.
    sums = () if layer.hard_gates else gradients
    return (*sums, layer.weight, layer.bit_logits.float(), *(m.float() for m in layer.momenta))


def _step_native(arguments: dict[str, Any]) -> Any:
    device = arguments["weight"].device.type
    return _stepped(arguments, *(backends.step_function(op, device) for op in step.STEP_OPS))


def _step_plainly(arguments: dict[str, Any]) -> Any:
    return _stepped(arguments, reference_step.step_sums, reference_step.step_update)


def _decoded(planes: Tensor, arguments: dict[str, Any]) -> Tensor:
    return bitplanes.decode(planes, arguments["coefficients"], arguments["weight_shape"])


def _untiled_twice(arguments: dict[str, Any]) -> Tensor:
    op, planes, *weight = arguments.values()
    if op not in ("bitserial_linear", "bitserial_conv2d"):
        raise Unjudged("an op that reads no tiles")
    return functional.untile(op, functional.tile(op, functional.untile(op, planes, *weight), *weight), *weight)


def _encode(arguments: dict[str, Any]) -> Tensor:
    planes, coefficients = bitplanes.encode(arguments["codes"], arguments["active"])
    return bitplanes.decode(planes, coefficients, arguments["codes"].shape).to(torch.int64)


def _layer_plainly(arguments: dict[str, Any]) -> Tensor:
    """The float layer with the same weight."""
    layer, x = arguments["layer"], arguments["input"]
    dtype = torch.promote_types(x.dtype, torch.float32)
    float_layer = layer.float_class.__new__(layer.float_class)
    float_layer.__dict__.update(layer.__dict__)
    bias = None if layer.bias is None else layer.bias.detach().to(dtype)
    float_layer._buffers, float_layer._parameters = {}, {"weight": layer.weight.to(dtype), "bias": bias}
    return float_layer(x.to(dtype))


def _embed_layer() -> Any:
    return packed.PackedEmbedding.from_codes(torch.arange(17 * 9).view(17, 9) % 15 - 7, torch.tensor(0.5), 4)


@dataclasses.dataclass(frozen=True)
class Target:
    """A call: how its valid arguments are drawn, what it is, what should come of it; what it writes, in place."""

    draw: Callable[[random.Random], dict[str, Any]]
    call: Callable[[dict[str, Any]], Any]
    expected: Callable[[dict[str, Any]], Any]
    writes: tuple[str, ...] = ()


def _op_targets(op: str, draw: Callable[[random.Random], dict[str, Any]]) -> dict[str, Target]:
    expected = functools.partial(_plainly, op)
    targets = {f"op {op}": Target(draw, functools.partial(_dispatched, op), expected)}
    if hasattr(functional, op):
        targets[f"functional.{op}"] = Target(draw, functools.partial(_function, op), expected)
    return targets


_EMBEDDING = functools.cache(_embed_layer)
TARGETS = {
    **_op_targets("reconstruct", _reconstruct),
    **_op_targets("reconstruct_backward", _reconstruct_backward),
    **_op_targets("bitserial_linear", _bitserial_linear),
    **_op_targets("bitserial_conv2d", _bitserial_conv2d),
    **_op_targets("bitserial_weight", _bitserial_weight),
    "step": Target(_step, _step_native, _step_plainly, ("weight", "bit_logits", "momenta", "momentum_scales")),
    "functional.tile": Target(
        _order,
        lambda a: _decoded(functional.untile(a["op"], functional.tile(*a.values()), *list(a.values())[2:]), a),
        lambda a: _decoded(a["planes"], a),
    ),
    "functional.untile": Target(_tiles, lambda a: functional.untile(*a.values()), _untiled_twice),
    "bitplanes.encode": Target(_codes, _encode, lambda a: a["codes"].to(torch.int64)),
    "bitplanes.decode": Target(
        _planes,
        lambda a: bitplanes.decode(*a.values()),
        lambda a: bitplanes.decode(a["planes"].clone(), *list(a.values())[1:]),
    ),
    "packed layers": Target(_forward, lambda a: a["layer"](a["input"]), _layer_plainly),
    "packed embedding": Target(
        _embed, lambda a: _EMBEDDING()(a["index"]), lambda a: _EMBEDDING().weight[a["index"].long()]
    ),
    "native sizes": Target(
        _native_sizes, lambda a: getattr(_native.module, a["name"])(*list(a.values())[1:]), lambda a: None
    ),
}


# --- Mutations ----------------------------------------------------------------------------------------------------


def _other_strides(tensor: Tensor, chance: random.Random) -> Tensor:
    kind = chance.randrange(5)
    if kind == 0:
        backwards = list(range(tensor.ndim))[::-1]
        return tensor.permute(backwards).contiguous().permute(backwards)
    if kind == 1:
        return torch.stack([tensor, tensor], -1)[..., 0]
    if kind == 2 and tensor.numel() and tensor.ndim:
        return tensor[:1].expand(tensor.shape)
    if kind == 3 and tensor.numel():
        # Elements that overlap.
        return tensor.flatten().as_strided(tensor.shape, [min(1, s) for s in tensor.stride()])
    # Begins in the middle of a vector.
    return torch.cat([tensor.flatten()[:1], tensor.flatten()])[1:].view(tensor.shape) if tensor.numel() else tensor


def _spoil_tensor(tensor: Tensor, others: list[Tensor], chance: random.Random) -> Any:
    kind = chance.choice(("dtype", "shape", "shape", "strides", "strides", "meta", "values", "values", "alias", "odd"))
    if kind == "dtype":
        return tensor.to(chance.choice(_DTYPES))
    if kind == "strides":
        return _other_strides(tensor, chance)
    if kind == "meta":
        return tensor.to("meta")
    if kind == "values" and tensor.numel() and tensor.is_floating_point():
        value = torch.tensor(chance.choice(_VALUES), dtype=torch.float64).to(tensor.dtype)
        tensor = tensor.clone()
        if chance.random() < 0.5:
            return tensor.fill_(value)
        tensor.view(-1)[chance.randrange(tensor.numel())] = value
        return tensor
    if kind == "alias":
        other = chance.choice(others)
        fits = other.numel() >= tensor.numel() and other.dtype == tensor.dtype and other.is_contiguous()
        return other.view(-1)[: tensor.numel()].view(tensor.shape) if fits else other
    if kind == "odd":
        odd = chance.randrange(3)
        if odd == 0 and tensor.dtype in _DTYPES[:4]:
            return torch._neg_view(tensor)
        if odd == 1 and tensor.is_floating_point():
            return tensor.requires_grad_()
        return tensor.to_sparse() if tensor.ndim else tensor
    if tensor.ndim == 0 or chance.random() < 0.3:
        return tensor.unsqueeze(chance.randint(0, tensor.ndim))
    axis = chance.randrange(tensor.ndim)
    change = chance.randrange(4)
    if change == 0:
        return tensor.narrow(axis, 0, 0)
    if change == 1:
        return tensor.narrow(axis, 0, max(0, tensor.shape[axis] - 1))
    if change == 2:
        return torch.cat([tensor, tensor], axis)
    return tensor.flatten() if chance.random() < 0.5 else tensor.select(axis, 0)


def _spoil(value: Any, others: list[Tensor], chance: random.Random) -> Any:
    if isinstance(value, Tensor):
        return _spoil_tensor(value, others, chance)
    if isinstance(value, str):
        return chance.choice(("", "Exact", "exact ", "int8\0", "bitserial_linear", "reconstruct", "x" * 1000, 0, None))
    if isinstance(value, (list, tuple)):
        values = list(value)
        kind = chance.randrange(7)
        if kind == 0:
            values = values[:-1]
        elif kind == 1:
            values = values * 2
        elif kind == 2:
            values = values[::-1]
        elif kind == 3:
            values.append(chance.choice(_INTEGERS))
        elif kind == 4:
            values = [chance.choice(_INTEGERS[:10])] * 1000
        elif values:
            values[chance.randrange(len(values))] = chance.choice(_INTEGERS)
        return type(value)(values)
    if isinstance(value, int):
        return chance.choice([*_INTEGERS, value + 1, value - 1, -value, None, math.nan])
    return chance.choice((None, value))


def _owns_memory(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided and value.device.type == "cpu"


def _place(value: Any, memory: Memory) -> Any:
    """A tensor as it is, elsewhere; a view that shares, overlaps or is negated keeps what makes it odd."""
    if not _owns_memory(value) or value.is_neg() or value.is_conj():
        return value
    base = torch.empty(0, dtype=value.dtype).set_(value.untyped_storage())
    if base.numel() == 0:
        return value
    placed = memory.placed(base)
    placed = placed.as_strided(value.shape, value.stride(), placed.storage_offset() + value.storage_offset())
    return placed.requires_grad_(value.requires_grad)


# --- Judging ------------------------------------------------------------------------------------------------------


def _tensors(value: Any) -> list[Tensor]:
    values = value if isinstance(value, (list, tuple)) else [value]
    return [tensor for tensor in values if isinstance(tensor, Tensor)]


def _usual(arguments: dict[str, Any]) -> bool:
    """Whether the inputs are numbers with which two orders of summation agree."""
    for name, value in arguments.items():
        if _owns_memory(value) and value.is_floating_point() and value.numel():
            size = value.detach().to(torch.float32).abs()
            least = 1e-3 if name.startswith(("temperature", "scale")) else 0.0
            if not bool(((size <= 1e3) & (size >= least)).all()):
                return False
    return True


def _overflow_is_largest(tensor: Tensor) -> Tensor:
    """In float64; what overflowed the dtype becomes its largest number, which is one rounding away from it."""
    wide = tensor.detach().to_dense().double()
    if not tensor.is_floating_point():
        return wide
    most = torch.finfo(tensor.dtype).max
    return wide.clamp(-most, most)


def _equal(actual: Tensor, wanted: Tensor, arguments: dict[str, Any], largest: float) -> str | None:
    """What differs by more than roundings next to the largest of all results."""
    if actual.shape != wanted.shape:
        return f"shape {tuple(actual.shape)} instead of {tuple(wanted.shape)}"
    if actual.is_meta or wanted.is_meta or not actual.numel() or not _usual(arguments):
        return None
    if not actual.is_floating_point():
        return None if torch.equal(actual, wanted) else "other integers"
    floats = [value.dtype for value in arguments.values() if _owns_memory(value) and value.is_floating_point()]
    epsilon = max(torch.finfo(dtype).eps for dtype in (*floats, actual.dtype))
    wide, expected = _overflow_is_largest(actual), _overflow_is_largest(wanted)
    allowed = (64 if epsilon < 1e-6 else 4) * epsilon * max(1e-3, largest)
    allowed += torch.finfo(actual.dtype).tiny
    error = (wide - expected).abs().max().item()
    return None if error <= allowed else f"an error of {error:.3g} where {allowed:.3g} is allowed"


def _describe(value: Any) -> str:
    if not isinstance(value, Tensor):
        return repr(value)[:200]
    where = f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)} on {value.device}"
    return f"{where} strides {value.stride()} at {value.storage_offset()}" if _owns_memory(value) else where


class Failure(AssertionError):
    """A set of arguments that did what it must not."""


def draw(seed: int, number: int) -> tuple[str, dict[str, Any], random.Random]:
    """The set of this number: the call, its arguments, and what the rest of it is drawn from."""
    chance = random.Random(seed * 1_000_003 + number)
    # The function of torch also looks at every device, which takes longer than the rest.
    torch.default_generator.manual_seed(chance.getrandbits(32))
    name = chance.choice(list(TARGETS))
    arguments = TARGETS[name].draw(chance)
    kept = ("name", "layer", "rule")
    spoilable = [key for key in arguments if key not in kept]
    for key in chance.sample(spoilable, min(len(spoilable), chance.choice((0, 1, 1, 1, 2, 2, 3)))):
        others = [value for value in arguments.values() if isinstance(value, Tensor)]
        # PyTorch cannot make every tensor of every dtype.
        with contextlib.suppress(RuntimeError, TypeError, IndexError):
            arguments[key] = _spoil(arguments[key], others, chance)
    return name, arguments, chance


def try_set(seed: int, number: int, memory: Memory) -> str:
    """Call with one set; ``"computed"`` or the name of its error. ``Failure`` if it did anything else."""
    name, arguments, chance = draw(seed, number)
    target = TARGETS[name]
    memory.begin(chance)
    isas = _native.module.supported_isas()
    _native.module.set_isa(isas[number % len(isas)])
    torch.set_num_threads(2 if number % 8 == 0 else 1)
    arguments = {key: _place(value, memory) for key, value in arguments.items()}
    untouched = {key: value.detach().clone() for key, value in arguments.items() if _owns_memory(value)}

    def failure(what: str) -> Failure:
        listed = "\n".join(f"  {key}: {_describe(value)}" for key, value in arguments.items())
        return Failure(f"set {number} of seed {seed}, {name}: {what}\n{listed}")

    memory.guards_results = True
    try:
        result = target.call(arguments)
    except ERRORS as error:
        if not str(error).strip():
            raise failure(f"{type(error).__name__} without a message") from error
        return type(error).__name__
    except Exception as error:
        raise failure(f"{type(error).__name__}: {error}") from error
    finally:
        memory.guards_results = False
        intact = memory.intact()
        if not intact:
            raise failure("memory beside a tensor was written")
        for key, value in untouched.items():
            now = arguments[key]
            if not key.startswith(target.writes or ("-",)) and not _same_bits(now.detach(), value):
                raise failure(f"{key} was written")
    if any(tensor.numel() > LARGE for tensor in _tensors(result)):
        return "computed"
    try:
        plain = {
            key: value.clone() if key in untouched else arguments[key] for key, value in (arguments | untouched).items()
        }
        wanted = target.expected(plain)
    except Unjudged:
        return "computed"
    except Exception as error:
        # PyTorch has no kernel of its own for a sparse tensor; without a plane there was nothing to compute.
        if any(isinstance(value, Tensor) and value.is_sparse for value in arguments.values()):
            return "computed"
        raise failure(f"computed what the reference refuses: {type(error).__name__}: {error}") from error
    largest = max(
        (_overflow_is_largest(w).abs().max().item() for w in _tensors(wanted) if w.numel() and not w.is_meta),
        default=0.0,
    )
    for actual, expected in zip(_tensors(result), _tensors(wanted), strict=True):
        difference = _equal(actual, expected, plain, largest)
        if difference:
            raise failure(f"another result than the reference: {difference}")
    return "computed"


def _same_bits(now: Tensor, before: Tensor) -> bool:
    return torch.equal(now, before) or torch.equal(torch.nan_to_num(now.float()), torch.nan_to_num(before.float()))


# --- Processes ----------------------------------------------------------------------------------------------------


def run(sets: range, seed: int, progress: str | None = None, show: bool = False) -> Counter[str]:
    """Call with these sets; the counts of what they came to. ``progress`` is a file that holds the number at work."""
    memory, counts = Memory(), Counter[str]()
    begun = time.monotonic()
    with open(progress, "r+b") if progress else tempfile.TemporaryFile() as file:
        file.truncate(8)
        place = mmap.mmap(file.fileno(), 8)
        for number in sets:
            place[:] = struct.pack("<q", number)
            if number % 64 == 0:
                faulthandler.dump_traceback_later(SECONDS, exit=True)
            counts[try_set(seed, number, memory)] += 1
            if show and (number + 1 - sets.start) % 5000 == 0:
                print(f"{number + 1:,} sets, {time.monotonic() - begun:.0f} s, {dict(counts)}", flush=True)
    faulthandler.cancel_dump_traceback_later()
    return counts


def _worker(sets: range, seed: int, progress: str, answer: Any, limit: bool) -> None:
    if limit:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    run(range(sets.start, min(sets.start + 200, sets.stop)), seed, progress)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    counts = run(sets, seed, progress, show=True)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10
    # AddressSanitizer keeps what was freed for a while, on purpose.
    if limit and grown > GROWTH:
        raise Failure(f"{grown:,} bytes of memory more after {len(sets):,} sets")
    answer.send(counts)


def run_in_processes(sets: int, seed: int, processes: int) -> Counter[str]:
    """Share the sets; ``Failure`` with the number of the set at which a process died."""
    # AddressSanitizer reserves all address space there is.
    limit = not record.sanitized()
    context = multiprocessing.get_context("spawn")
    share = -(-sets // processes)
    counts = Counter[str]()
    with tempfile.TemporaryDirectory() as folder:
        workers = []
        for index in range(processes):
            progress = Path(folder) / str(index)
            progress.touch()
            mine = range(index * share, min(sets, (index + 1) * share))
            reader, writer = context.Pipe(duplex=False)
            worker = context.Process(target=_worker, args=(mine, seed, str(progress), writer, limit))
            worker.start()
            writer.close()
            workers.append((worker, reader, progress))
        wait([worker.sentinel for worker, _, _ in workers])
        for worker, reader, progress in workers:
            try:
                counts += reader.recv()
            except EOFError:
                worker.join()
                at = struct.unpack("<q", progress.read_bytes())[0]
                raise Failure(f"a process ended with {worker.exitcode} at set {at} of seed {seed}") from None
            worker.join()
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", type=int, default=200_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--no-record", dest="record", action="store_false")
    parser.add_argument("--only", type=int, help="this set alone, in this process")
    options = parser.parse_args()
    if options.only is not None:
        print(run(range(options.only, options.only + 1), options.seed))
        return
    counts = run_in_processes(options.sets, options.seed, options.processes)
    refused = counts.total() - counts["computed"]
    tried = (
        f"{counts.total():,} sets of arguments: {counts['computed']:,} computed as the reference, {refused:,} refused"
    )
    print(tried, dict(counts))
    if options.record:
        record.record("native arguments", tried, failures=0)


if __name__ == "__main__":
    sys.exit(main())
