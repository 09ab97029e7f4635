"""Data sets, found on disk or inside installed packages; nothing is downloaded. One file a source."""

from pathlib import Path
from typing import Any

from csq_kernels.train.data.base import DataError, DataNotFoundError, Dataset, Request
from csq_kernels.train.data.cifar10 import CIFAR10
from csq_kernels.train.data.digits import DIGITS, MNIST5K
from csq_kernels.train.data.fashion_mnist import FASHION_MNIST
from csq_kernels.train.data.imagenet import IMAGENET
from csq_kernels.train.data.text import TEXT

__all__ = [
    "SOURCES",
    "DataError",
    "DataNotFoundError",
    "Dataset",
    "Request",
    "check_name",
    "check_options",
    "find",
    "load",
    "missing",
    "places",
]

SOURCES = {
    "digits": DIGITS,
    "mnist5k": MNIST5K,
    "fashion-mnist": FASHION_MNIST,
    "cifar10": CIFAR10,
    "imagenet": IMAGENET,
    "text": TEXT,
}


def check_name(name: str) -> None:
    """Raise ``ValueError`` unless there is a data set ``name``."""
    if name not in SOURCES:
        raise ValueError(f"expected data.name of {', '.join(SOURCES)}, got {name!r}")


def check_options(name: str, options: dict[str, Any]) -> None:
    """Raise ``ValueError`` unless the data set ``name`` takes ``options``, with values of these types."""
    check_name(name)
    known = SOURCES[name].options
    for key, value in options.items():
        if key not in known:
            raise ValueError(f"expected options of data set {name} among {', '.join(sorted(known))}, got {key!r}")
        if key in ("size", "workers") and (type(value) is not int or value < 1):
            raise ValueError(f"expected {key} of data set {name} as a positive integer, got {value!r}")


def _path(root: Path | str | None) -> Path | None:
    return None if root is None else Path(root).expanduser()


def find(name: str, root: Path | str | None = None) -> Path | None:
    """The file or folder that holds the data set ``name``, or ``None``."""
    return SOURCES[name].find(_path(root))


def places(name: str, root: Path | str | None = None) -> list[str]:
    """Where the data set ``name`` is looked for."""
    return SOURCES[name].places(_path(root))


def missing(name: str, root: Path | str | None = None) -> str:
    """The message for a data set that was not found."""
    lines = [f"data set {name} was not found; looked in " + ", ".join(places(name, root))]
    return "\n".join(lines + ["to get it:"] + [f"  - {way}" for way in SOURCES[name].ways])


def load(name: str, root: Path | str | None = None, **options: Any) -> Dataset:
    """Load a data set by name.

    Args:
        name: one of ``SOURCES``.
        root: the file or folder that holds it, instead of the usual places.
        options: ``flip`` and ``crop``, augmentation in training; ``size``, pixels a side or characters a block;
            ``workers``, threads that decode; ``seed``, of the split where the set has none of its own;
            ``vocabulary``, the characters that a network for text knows. Each set takes those that its source names.

    Raises:
        ValueError: no such data set, or one that does not take these options.
        DataNotFoundError: not on this machine; the message says how to get it.
        DataError: a file is damaged.
    """
    check_options(name, options)
    found = find(name, root)
    if found is None:
        raise DataNotFoundError(missing(name, root))
    return SOURCES[name].load(found, **options)
