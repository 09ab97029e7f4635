"""Calls every CPU kernel twice on small fixed inputs: what ``instructions.py`` runs under valgrind.

``python native_calls.py PATH_OF_C`` prints the name of each call. Only the native module is loaded, since everything is
slow in valgrind; memory comes from ctypes.
"""

import ctypes
import importlib.util
import itertools
import random
import sys
from array import array
from collections.abc import Callable, Iterator
from functools import partial
from types import ModuleType

ISAS = ("scalar", "avx2")  # valgrind knows no AVX-512
TRAINED = {"outer": 1, "channels": 1, "inner": 8000}  # a weight that fills neither vectors nor tiles
N_BITS = 8
ROWS, COLUMNS = 128, 500  # of a packed layer
WIDTHS = (1, 2, 4, 8)
BATCHES = (1, 16)
PRECISIONS = ("int8", "high", "exact")
RULES = {
    "sgd": {"momenta": 1, "decay": 0.9, "gain": 1.0, "kept": 1.0},
    "adamw": {"momenta": 2, "gain": 0.1, "second_decay": 0.999, "second_gain": 1e-3, "root": 1.0, "epsilon": 1e-8},
}
NO_RULE = dict.fromkeys(("decay", "gain", "kept", "direct", "second_decay", "second_gain", "root", "epsilon"), 0.0)

Calls = Iterator[tuple[str, Callable[[], object]]]
_generator = random.Random(0)
_kept: list[object] = []


def copied(data: bytes) -> int:
    """The address of a copy at a multiple of 64 bytes, so that no count hangs on where memory lies."""
    buffer = ctypes.create_string_buffer(len(data) + 64)
    _kept.append(buffer)
    address = (ctypes.addressof(buffer) + 63) // 64 * 64
    ctypes.memmove(address, data, len(data))
    return address


def zeros(size: int) -> int:
    return copied(bytes(size))


def floats(*values: float) -> int:
    return copied(array("f", values).tobytes())


def normal(count: int, deviation: float = 1.0, dtype: str = "float32") -> int:
    """Random numbers, about a thousand of them over and over."""
    few = array("f", (_generator.gauss(0, deviation) for _ in range(997)))
    many = array("H", (few * (count // len(few) + 1))[:count].tobytes())
    return copied((many if dtype == "float32" else many[1::2]).tobytes())  # bfloat16: the upper halves


def training(native: ModuleType) -> Calls:
    """Reconstruction, forward and backward, and the parts of a single-pass step."""
    weights = TRAINED["inner"]
    logits = 2 * N_BITS * weights
    layout = {**TRAINED, "bits": list(range(N_BITS)), "n_bits": N_BITS}
    layout |= {"gates_per_channel": False, "scale_per_channel": False}
    vectors = [normal(N_BITS, 0.03), floats(0.7), floats(30.0)]
    grad_gates, grad_scale = zeros(4 * N_BITS), zeros(4)
    scratch = zeros(8 * native.reconstruct_scratch_size(*TRAINED.values(), N_BITS))
    for dtype, size in (("float32", 4), ("bfloat16", 2)):
        planes, grad, weight = normal(logits, 2 / 30, dtype), normal(weights, 1.0, dtype), zeros(size * weights)
        rest = layout | {"dtype": dtype, "hard_gates": False, "threads": 1}
        yield (
            f"reconstruct_forward {dtype}",
            partial(native.reconstruct_forward, planes, *vectors, weight, **rest),
        )
        gradients = (zeros(size * logits), grad_gates, grad_scale, scratch)
        yield (
            f"reconstruct_backward {dtype}",
            partial(native.reconstruct_backward, grad, planes, *vectors, *gradients, **rest),
        )

    layer = partial(native.StepLayer, before=vectors, after=vectors, weight_dtype="float32", key=1, **layout)
    grad = normal(weights)
    for (rule, arguments), narrow in itertools.product(RULES.items(), (False, True)):
        momenta = arguments["momenta"]
        dtype, size = ("bfloat16", 1) if narrow else ("float32", 4)
        blocks = 2 * N_BITS * -(-weights // native.momentum_block)
        state = {
            "bit_logits": normal(logits, 2 / 30, dtype),
            "dtype": dtype,
            "momenta": [zeros(size * logits) for _ in range(momenta)],
            "momentum_scales": [zeros(4 * blocks) for _ in range(momenta)] if narrow else [],
            "rule": native.StepRule(**NO_RULE | {"sign": 1.0, "lr": 1e-3} | arguments),
        }
        made = layer(**state, grad_weight=grad, weight=normal(weights), hard_gates=False)
        yield f"step_update {rule} {'narrow' if narrow else dtype}", partial(native.step_update, [made], 1)
        if rule == "sgd":
            name = f"step_sums {'narrow' if narrow else dtype}"
            yield name, partial(native.step_sums, made, grad_gates, grad_scale, scratch, 1)
    fixed = layer(**state, grad_weight=grad, weight=normal(weights), hard_gates=True)
    small = zeros(8 * native.step_scratch_size(*TRAINED.values()))
    yield "step_scale_sums", partial(native.step_scale_sums, fixed, grad_scale, small, 1)


def signed(planes: int) -> list[int]:
    """Coefficients of two's complement."""
    return [-1 << (planes - 1), *(1 << bit for bit in reversed(range(planes - 1)))]


def random_tiles(native: ModuleType, rows: int, columns: int, planes: int) -> int:
    tiles = -(-rows // native.tile_rows) * -(-columns // native.tile_columns)
    return copied(_generator.randbytes(tiles * planes * native.tile_rows * native.tile_columns // 8))


def packed(native: ModuleType) -> Calls:
    """Packing into tiles, unpacking, and products with what is packed."""
    step, bias = floats(*(0.01 * (row + 1) for row in range(ROWS))), normal(ROWS)
    for bits in WIDTHS:
        coefficients = signed(bits)
        tiles = random_tiles(native, ROWS, COLUMNS, bits)
        linear = native.BitserialLinear(ROWS, COLUMNS, coefficients, True)
        for precision, batch in itertools.product(PRECISIONS, BATCHES):
            input, output = normal(batch * COLUMNS), zeros(4 * batch * ROWS)
            call = partial(linear, input, tiles, step, bias, output, batch, precision, 1)
            yield f"bitserial_linear {bits} bits {precision} batch {batch}", call
        planes = copied(_generator.randbytes(bits * ROWS * COLUMNS // 8))
        call = partial(native.bitserial_tile, planes, ROWS, COLUMNS, [], coefficients, tiles, 1)
        yield f"bitserial_tile {bits} bits", call
        call = partial(native.bitserial_weight, linear, tiles, step, zeros(4 * ROWS * COLUMNS), 1)
        yield f"bitserial_weight {bits} bits", call

    bits, channels, size = 4, 16, 8
    tiles = random_tiles(native, ROWS, 9 * channels, bits)
    conv = native.BitserialConv2d(ROWS, channels, (3, 3), (1, 1), (1, 1), (1, 1), signed(bits), True)
    for precision in PRECISIONS:
        input, output = normal(channels * size**2), zeros(4 * ROWS * size**2)
        call = partial(conv, input, tiles, step, bias, output, 1, (size, size), precision, 1)
        yield f"bitserial_conv2d {bits} bits {precision}", call


def load(path: str) -> ModuleType:
    """The native module by itself: its package would import torch."""
    spec = importlib.util.spec_from_file_location("_C", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> None:
    native = load(sys.argv[1])
    mark = zeros(1)
    for isa in ISAS:
        native.set_isa(isa)
        for name, call in itertools.chain(training(native), packed(native)):
            for _ in range(2):  # what happens but once is in the first
                call()
                native.read_bandwidth_pass(mark, 1, 1)
            print(f"{isa} {name}")


if __name__ == "__main__":
    main()
