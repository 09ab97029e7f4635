"""Folders of photos in the manner of ImageNet, far too many for memory: decoded in threads, a few batches ahead.

The crop and the mirroring of a training image are functions of the request that names it. So neither the number of
threads nor an interruption changes what is seen.
"""

import itertools
import math
import os
import random
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from csq_kernels.train.data.base import DEFAULT_ROOT, Batch, DataError, Dataset, Request, Source

if TYPE_CHECKING:
    from PIL.Image import Image

_SUFFIXES = (".jpeg", ".jpg", ".png", ".bmp", ".webp")
_PARTS = ("train", "val")
# Of ImageNet, per channel, for values from 0 to 1: what published weights are made for.
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Random crops: share of the area, and width over height.
_AREA, _ASPECT = (0.08, 1.0), (3 / 4, 4 / 3)
# At test time the shorter side is made so much longer than the crop: 256 for 224.
_MARGIN = 256 / 224
# Batches that are being decoded while one is used.
_AHEAD = 2


def _random_box(width: int, height: int, draw: random.Random) -> tuple[int, int, int, int]:
    """A box of random area, shape and place; the whole image, or most of a long one, if none fits in ten draws."""
    for _ in range(10):
        area = width * height * draw.uniform(*_AREA)
        aspect = math.exp(draw.uniform(math.log(_ASPECT[0]), math.log(_ASPECT[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = draw.randint(0, width - w), draw.randint(0, height - h)
            return left, top, left + w, top + h
    w, h = min(width, round(height * _ASPECT[1])), min(height, round(width / _ASPECT[0]))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def _training_view(image: "Image", size: int, draw: random.Random, flip: bool) -> "Image":
    """A random crop, resized to a square of ``size``, mirrored with probability 1/2 if ``flip``."""
    from PIL import Image

    box = _random_box(*image.size, draw)
    image = image.crop(box).resize((size, size), Image.Resampling.BILINEAR)
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip and draw.random() < 0.5 else image


def _test_view(image: "Image", size: int) -> "Image":
    """The central square of ``size``, once the shorter side is 8/7 of it."""
    from PIL import Image

    factor = round(size * _MARGIN) / min(image.size)
    width, height = (max(size, round(side * factor)) for side in image.size)
    left, top = round((width - size) / 2), round((height - size) / 2)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    return image.crop((left, top, left + size, top + size))


class _Part:
    """Paths and labels of the images below ``folder``, sorted; each folder in it is a class."""

    def __init__(self, folder: Path):
        try:
            self.classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
        except OSError as error:
            raise DataError(f"expected {folder} to be a folder, got {error.strerror}") from error
        if not self.classes:
            raise DataError(f"expected {folder} with a folder of images for each class, found no folder in it")
        self.paths: list[str] = []
        labels: list[int] = []
        for label, name in enumerate(self.classes):
            files = sorted(e.path for e in os.scandir(folder / name) if e.name.lower().endswith(_SUFFIXES))
            if not files:
                raise DataError(f"expected {folder / name} with images ({', '.join(_SUFFIXES)}), found none")
            self.paths += files
            labels += [label] * len(files)
        self.labels = torch.tensor(labels)


class ImageFolders(Dataset):
    """The images of ``root/train/CLASS`` and ``root/val/CLASS`` as normalized float32 ``(N, 3, size, size)``.

    Training takes random crops, mirrored at random if ``flip``; testing, and training without augmentation, the middle.
    """

    def __init__(self, root: Path, size: int = 224, flip: bool = False, workers: int | None = None):
        self._train, self._test = (_Part(root / part) for part in _PARTS)
        for name in sorted(set(self._train.classes) ^ set(self._test.classes)):
            raise DataError(f"expected the same classes in {root}/train and {root}/val, got {name} in one of them")
        self.name = "imagenet"
        self.sizes = (3, size, len(self._train.classes))
        self.options = {"size": size}
        self.train_size = len(self._train.paths)
        self._flip = flip
        self._workers = workers or os.cpu_count() or 1
        self.to(torch.device("cpu"))

    def to(self, device: torch.device) -> "ImageFolders":
        self._mean, self._std = (255 * torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (_MEAN, _STD))
        return self

    def _decode(self, path: str, seed: int | None) -> np.ndarray:
        """One image as bytes ``(size, size, 3)``, augmented as ``seed`` says."""
        from PIL import Image

        size = self.sizes[1]
        try:
            with Image.open(path) as image:
                colours = image.convert("RGB")
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise DataError(f"expected {path} to be an image, got {error}") from error
        if seed is None:
            return np.asarray(_test_view(colours, size))
        return np.asarray(_training_view(colours, size, random.Random(seed), self._flip))

    def _batches(self, part: _Part, requests: Iterable[Request]) -> Iterator[Batch]:
        waiting: deque[tuple[list[Future[np.ndarray]], Tensor]] = deque()
        requests = iter(requests)
        pool = ThreadPoolExecutor(self._workers)
        try:
            while True:
                for index, generator in itertools.islice(requests, _AHEAD + 1 - len(waiting)):
                    seeds = itertools.repeat(None) if generator is None else _seeds(len(index), generator)
                    jobs = zip(index.tolist(), seeds, strict=False)
                    images = [pool.submit(self._decode, part.paths[sample], seed) for sample, seed in jobs]
                    waiting.append((images, part.labels[index]))
                if not waiting:
                    return
                images, labels = waiting.popleft()
                # Bytes travel to the device, a quarter of what they become there.
                pixels = torch.from_numpy(np.stack([image.result() for image in images])).to(self._mean.device)
                yield pixels.permute(0, 3, 1, 2).float().sub_(self._mean).div_(self._std), labels.to(pixels.device)
        finally:
            pool.shutdown(cancel_futures=True)

    def train_batches(self, requests: Iterable[Request]) -> Iterator[Batch]:
        return self._batches(self._train, requests)

    def test_batches(self, size: int) -> Iterator[Batch]:
        return self._batches(self._test, ((index, None) for index in torch.arange(len(self._test.paths)).split(size)))


def _seeds(count: int, generator: torch.Generator) -> list[int]:
    return torch.randint(0, 2**63 - 1, (count,), generator=generator).tolist()


def _folder(root: Path | None) -> Path:
    return DEFAULT_ROOT / "imagenet" if root is None else root


def _find(root: Path | None) -> Path | None:
    folder = _folder(root)
    return folder if any((folder / part).is_dir() for part in _PARTS) else None


def _load(found: Path, size: int = 224, flip: bool = False, workers: int | None = None) -> ImageFolders:
    try:
        import PIL.Image  # noqa: F401
    except ImportError as error:
        raise DataError(
            f"expected Pillow, which reads the images of {found}, to be installed: pip install pillow"
        ) from error
    return ImageFolders(found, size, flip, workers)


IMAGENET = Source(
    description="photos in folders, one for each class: ImageNet (ILSVRC 2012), or any set of that form",
    ways=[
        "https://image-net.org, after registration; data/imagenet/train/CLASS/*.JPEG, data/imagenet/val/CLASS/*.JPEG",
        "data.root=DIR names another folder with train and val in it",
    ],
    options=frozenset({"size", "flip", "workers"}),
    places=lambda root: [str(_folder(root) / part) for part in _PARTS],
    find=_find,
    load=_load,
)
