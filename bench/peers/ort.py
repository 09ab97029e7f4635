"""ONNX Runtime's MatMulNBits: 2, 4 and 8 bits, scales for blocks of 128 columns."""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from peers import Provider, Shape, Walk, chain

BLOCK = 128
FP32, INT8 = 0, 4  # accuracy_level: what the input may be rounded to


def available() -> str | None:
    missing = [name for name in ("onnxruntime", "onnx") if importlib.util.find_spec(name) is None]
    return f"{' and '.join(missing)} not installed" if missing else None


def version() -> dict[str, str]:
    import onnxruntime

    return {"onnxruntime": onnxruntime.__version__}


def session(weights: Sequence[np.ndarray], scales: Sequence[float], bits: int, level: int, threads: int, lut: bool):
    """One MatMulNBits after another, input ``x``; weights uint8 (N, K bits / 8), their codes offset by 2^(bits - 1)."""
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    initializers, nodes = [], []
    for i, (weight, scale) in enumerate(zip(weights, scales, strict=True)):
        outputs, inputs = weight.shape[0], weight.shape[1] * 8 // bits
        blocks = inputs // BLOCK
        initializers += [
            numpy_helper.from_array(weight.reshape(outputs, blocks, BLOCK * bits // 8), f"weight{i}"),
            numpy_helper.from_array(np.full(outputs * blocks, scale, np.float32), f"scale{i}"),
        ]
        attributes = {"K": inputs, "N": outputs, "bits": bits, "block_size": BLOCK, "accuracy_level": level}
        names = [f"y{i - 1}" if i else "x", f"weight{i}", f"scale{i}"]
        nodes.append(helper.make_node("MatMulNBits", names, [f"y{i}"], domain="com.microsoft", **attributes))
    ends = [("x", weights[0].shape[1] * 8 // bits), (f"y{len(weights) - 1}", weights[-1].shape[0])]
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", size]) for name, size in ends)
    graph = helper.make_graph(nodes, "chain", [x], [y], initializers)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Threads wait actively inside a run, where it helps, and stop with it, so that no other session is slowed.
    options.add_session_config_entry("session.intra_op.allow_spinning", "1")
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if lut:
        options.add_session_config_entry("mlas.use_lut_gemm", "1")
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def int8_product(codes: np.ndarray, step: float, x: np.ndarray) -> np.ndarray:
    """``x @ (step * codes).T`` as the int8 mode computes it, codes within -128..127."""
    weight = (codes + 128).astype(np.uint8)
    return session([weight], [step], 8, INT8, 1, lut=False).run(None, {"x": x})[0]


def balanced(random: np.random.Generator, shape: tuple[int, int], bits: int) -> np.ndarray:
    """Random bytes without a field of 0: codes from ``1 - 2^(bits - 1)``, of mean 0, so that no chain overflows."""
    fields = np.arange(256)[:, None] >> np.arange(0, 8, bits) & (1 << bits) - 1
    allowed = np.flatnonzero(fields.all(1)).astype(np.uint8)
    return allowed[random.integers(0, len(allowed), shape, dtype=np.uint8)]


@dataclass(frozen=True)
class MatMulNBits:
    name: str
    bits: int
    activation: str
    level: int
    lut: bool = False

    def walk(self, shape: Shape, batch: int, threads: int) -> Walk:
        random = np.random.default_rng(0)
        shapes = chain(shape, self.bits, batch)
        weights = [balanced(random, (n, k * self.bits // 8), self.bits) for n, k in shapes]
        deviation = np.sqrt(((2**self.bits - 1) ** 2 - 1) / 12)
        scales = [1 / (deviation * np.sqrt(k)) for n, k in shapes]
        layers = session(weights, scales, self.bits, self.level, threads, self.lut)
        x = random.standard_normal((batch, shapes[0][1]), dtype=np.float32)
        weight_bytes = sum(n * k * self.bits // 8 + n * k // BLOCK * 4 for n, k in shapes)
        return Walk(
            lambda: layers.run(None, {"x": x})[0],
            inputs=(torch.from_numpy(x),),  # the same memory
            outputs=lambda y: [torch.from_numpy(y)],
            layers=len(shapes),
            weight_bytes=weight_bytes,
        )


def providers() -> list[Provider]:
    return [
        MatMulNBits("ort fp32 4 bit", 4, "fp32", FP32),
        *(MatMulNBits(f"ort int8 {bits} bit", bits, "int8", INT8) for bits in (2, 4, 8)),
        MatMulNBits("ort int8 2 bit LUT", 2, "int8", INT8, lut=True),
    ]
