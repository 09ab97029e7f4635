"""CIFAR-10: six batches of 10,000 images, in the binary version or the one for Python, whose pickles are never run."""

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch

from csq_kernels.train.data.base import DEFAULT_ROOT, DataError, Source, read_bytes
from csq_kernels.train.data.images import Images

IMAGES_PER_BATCH = 10_000
_PIXELS = 3 * 32 * 32
_FOLDERS = ("cifar-10-batches-bin", "cifar-10-batches-py")
_TRAIN, _TEST = [f"data_batch_{number}" for number in range(1, 6)], "test_batch"


class _Array:
    """Stands in for ``numpy.ndarray`` in a pickle: becomes an array of bytes or fails, and can do nothing else."""

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, content = state
        if not isinstance(dtype, _DType) or not isinstance(content, bytes):
            raise ValueError("an array that is not of bytes")
        self.values = np.frombuffer(content, np.uint8).reshape(shape, order="F" if fortran else "C")


class _DType:
    """Stands in for ``numpy.dtype``, of unsigned bytes alone."""

    def __init__(self, code: Any, *_: Any):
        if code not in (b"u1", "u1"):
            raise ValueError(f"an array of type {code!r}")

    def __setstate__(self, state: Any) -> None:
        """Byte order and the like, which bytes have not."""


class _Unpickler(pickle.Unpickler):
    """Reads lists, dicts, numbers, bytes and arrays of bytes; whatever else a pickle asks for, it does not get."""

    def find_class(self, module: str, name: str) -> Any:
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return lambda *_: _Array()
        if module == "numpy" and name in ("ndarray", "dtype"):
            return _Array if name == "ndarray" else _DType
        raise pickle.UnpicklingError(f"a call of {module}.{name}, which no CIFAR-10 file needs")


def _read_binary(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Labels and pixels of a file of records, each a label and 3,072 bytes."""
    content, expected = read_bytes(path), IMAGES_PER_BATCH * (1 + _PIXELS)
    if len(content) != expected:
        raise DataError(f"expected {path} of {expected:,} bytes, got {len(content):,}")
    records = np.frombuffer(content, np.uint8).reshape(IMAGES_PER_BATCH, 1 + _PIXELS)
    return records[:, 0], records[:, 1:]


def _read_pickled(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """The same of a file of the version for Python, a dictionary with ``labels`` and ``data``."""
    content = read_bytes(path)
    try:
        batch = _Unpickler(io.BytesIO(content), encoding="bytes").load()
        labels, pixels = np.asarray(batch[b"labels"], np.int64), batch[b"data"].values
    # A damaged pickle surfaces as almost any exception.
    except Exception as error:
        raise DataError(
            f"expected {path} to be a batch of CIFAR-10 for Python, got {error or type(error).__name__}; "
            "the binary version is read as well"
        ) from error
    if pixels.shape != (IMAGES_PER_BATCH, _PIXELS) or labels.shape != (IMAGES_PER_BATCH,):
        raise DataError(
            f"expected {path} with {IMAGES_PER_BATCH} labels and images of {_PIXELS} bytes, "
            f"got {len(labels)} and shape {pixels.shape}"
        )
    return labels, pixels


def _read(folder: Path, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Images and labels of one batch, from whichever version the folder holds."""
    binary, pickled = folder / f"{name}.bin", folder / name
    if not binary.is_file() and not pickled.is_file():
        raise DataError(f"expected {binary} or {pickled}, one of the six files of CIFAR-10, found neither")
    path = binary if binary.is_file() else pickled
    labels, pixels = _read_binary(path) if path == binary else _read_pickled(path)
    if labels.min() < 0 or labels.max() > 9:
        raise DataError(f"expected {path} with labels from 0 to 9, got {labels.min()} to {labels.max()}")
    return torch.from_numpy(pixels.copy()).view(-1, 3, 32, 32), torch.from_numpy(labels.astype(np.int64))


def _folders(root: Path | None) -> list[Path]:
    if root is not None:
        return [root, *(root / folder for folder in _FOLDERS)]
    return [DEFAULT_ROOT / folder for folder in _FOLDERS]


def _find(root: Path | None) -> Path | None:
    """The folder that holds any of the six files: one that lacks the others is worth a message of its own."""
    files = [name + suffix for name in (*_TRAIN, _TEST) for suffix in (".bin", "")]
    return next((folder for folder in _folders(root) if any((folder / file).is_file() for file in files)), None)


def _load(found: Path, flip: bool = False, crop: int = 0) -> Images:
    batches = [_read(found, name) for name in _TRAIN]
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    return Images("cifar10", images, labels, *_read(found, _TEST), 10, flip, crop)


CIFAR10 = Source(
    description="60,000 coloured 32x32 pictures of 10 kinds of things; 10,000 for testing",
    ways=[
        "https://www.cs.toronto.edu/~kriz/cifar.html, the binary version: tar -xzf cifar-10-binary.tar.gz -C data",
        "torchvision: torchvision.datasets.CIFAR10('data', download=True) makes data/cifar-10-batches-py",
        "data.root=DIR names another folder",
    ],
    options=frozenset({"flip", "crop"}),
    places=lambda root: [str(folder) for folder in _folders(root)],
    find=_find,
    load=_load,
)
