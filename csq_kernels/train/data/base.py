"""What a data set is to the training loop, and what a source of one has to say about itself."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Where torchvision's examples and this package's own advice put data that is no installed package.
DEFAULT_ROOT = Path("data")

# The samples of a batch, and the random numbers of their augmentation; without them there is none.
Request = tuple[Tensor, torch.Generator | None]
Batch = tuple[Tensor, Tensor]


class DataNotFoundError(FileNotFoundError):
    """A data set is nowhere to be found; the message says where it was looked for and how to get it."""


class DataError(ValueError):
    """A file of a data set is not what it should be; the message names it."""


class Dataset(ABC):
    """Inputs and labels to train and test a network on.

    ``unit`` is what one sample is called. ``sizes`` are what ``models.build`` takes: channels, pixels a side (or
    characters a block), classes. ``options`` are what ``load`` takes, besides the name, to make inputs and labels mean
    the same again.
    """

    name: str
    unit: str = "image"
    sizes: tuple[int, int, int]
    options: dict[str, Any]
    train_size: int

    @abstractmethod
    def to(self, device: torch.device) -> "Dataset":
        """Deliver batches on ``device`` from now on; returns itself."""

    @abstractmethod
    def train_batches(self, requests: Iterable[Request]) -> Iterator[Batch]:
        """Inputs and labels for each of ``requests``, in their order; a set on disk reads some requests ahead."""

    @abstractmethod
    def test_batches(self, size: int) -> Iterator[Batch]:
        """All test samples in a fixed order, ``size`` at once."""


@dataclass(frozen=True)
class Source:
    """Where a data set comes from. Functions take the ``root`` that the user gave, or ``None``.

    ``load`` takes what ``find`` found, and of the keyword options those that ``options`` names.
    """

    description: str
    ways: list[str]
    options: frozenset[str]
    places: Callable[[Path | None], list[str]]
    find: Callable[[Path | None], Path | None]
    load: Callable[..., Dataset]


def read_bytes(path: Path) -> bytes:
    """The content of a file of a data set; ``DataError`` names the one that cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"expected {path} to be a readable file, got {error.strerror or error}") from error
