"""Fashion-MNIST: four idx files, from a Debian package or as torchvision leaves them."""

import gzip
import hashlib
import struct
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from csq_kernels.train.data.base import DEFAULT_ROOT, DataError, Source, read_bytes
from csq_kernels.train.data.images import Images

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
_TORCHVISION_FOLDER = Path("FashionMNIST") / "raw"

# Of the content without gzip, so that every way of packing the same files passes.
SHA256 = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}


def read_idx(path: Path, ndim: int, sha256: str | None = None) -> np.ndarray:
    """Read an idx file of unsigned bytes with ``ndim`` axes, packed with gzip or not.

    Raises:
        DataError: damaged, of another kind, or not the content that ``sha256`` promises.
    """
    content = read_bytes(path)
    if content[:2] == b"\x1f\x8b":
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"expected {path} to be a readable file, got {error}") from error
    header = 4 + 4 * ndim
    if len(content) < header:
        raise DataError(f"expected {path} of at least {header} bytes, got {len(content)}")
    zero, kind, axes, *shape = struct.unpack(f">HBB{ndim}I", content[:header])
    if (zero, kind, axes) != (0, 8, ndim):
        raise DataError(f"expected {path} of magic number 0x{8 << 8 | ndim:08x}, got 0x{content[:4].hex()}")
    if len(content) - header != int(np.prod(shape, dtype=np.int64)):
        raise DataError(f"expected {path} with {shape} bytes after its header, got {len(content) - header}")
    if sha256 is not None and hashlib.sha256(content).hexdigest() != sha256:
        raise DataError(f"expected {path} of SHA-256 {sha256}, got {hashlib.sha256(content).hexdigest()}")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def _file(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def _folders(root: Path | None) -> list[Path]:
    """Where the four files may lie. An explicit ``root`` is the only place that counts."""
    if root is not None:
        unpacked_package = root / DEBIAN.relative_to("/")
        return [root, root / _TORCHVISION_FOLDER, unpacked_package]
    return [DEBIAN, DEFAULT_ROOT / _TORCHVISION_FOLDER]


def _find(root: Path | None) -> Path | None:
    return next((folder for folder in _folders(root) if all(_file(folder, name) for name in SHA256)), None)


def _load(found: Path, flip: bool = False, crop: int = 0) -> Images:
    def read(name: str, ndim: int) -> Tensor:
        path = _file(found, name)
        assert path is not None
        return torch.from_numpy(read_idx(path, ndim, SHA256[name]).copy())

    return Images(
        "fashion-mnist",
        read("train-images-idx3-ubyte", 3).unsqueeze(1),
        read("train-labels-idx1-ubyte", 1).long(),
        read("t10k-images-idx3-ubyte", 3).unsqueeze(1),
        read("t10k-labels-idx1-ubyte", 1).long(),
        10,
        flip,
        crop,
    )


FASHION_MNIST = Source(
    description="70,000 grey 28x28 pictures of clothes; 10,000 for testing",
    ways=[
        "Debian, Ubuntu: sudo apt-get install dataset-fashion-mnist",
        "the same without root: apt-get download dataset-fashion-mnist && dpkg-deb -x dataset-fashion-mnist*.deb DIR, "
        "then data.root=DIR",
        "torchvision: torchvision.datasets.FashionMNIST('data', download=True) makes data/FashionMNIST/raw; "
        "data.root=DIR names another folder",
    ],
    options=frozenset({"flip", "crop"}),
    places=lambda root: [str(folder) for folder in _folders(root)],
    find=_find,
    load=_load,
)
