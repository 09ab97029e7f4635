"""Sets of small images that are held in memory, augmented there, and split where they have no split of their own."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from csq_kernels.train.data.base import Batch, Dataset, Request


class Images(Dataset):
    """A classification set in memory. Images are uint8 ``(N, C, H, W)``, labels int64 ``(N,)``.

    Batches are float32 of zero mean and unit variance per channel, as measured on the training images.
    """

    def __init__(
        self,
        name: str,
        train_images: Tensor,
        train_labels: Tensor,
        test_images: Tensor,
        test_labels: Tensor,
        classes: int,
        flip: bool = False,
        crop: int = 0,
    ):
        self.name = name
        self.train_images, self.train_labels = train_images, train_labels
        self.test_images, self.test_labels = test_images, test_labels
        self.flip, self.crop = flip, crop
        self.sizes = (train_images.shape[1], train_images.shape[-1], classes)
        self.options: dict[str, Any] = {}
        self.train_size = len(train_labels)
        pixels = train_images.double()
        self._mean = pixels.mean((0, 2, 3)).float().view(1, -1, 1, 1)
        self._std = pixels.std((0, 2, 3)).float().clamp_min(1e-6).view(1, -1, 1, 1)

    def to(self, device: torch.device) -> "Images":
        for name in ("train_images", "train_labels", "test_images", "test_labels", "_mean", "_std"):
            setattr(self, name, getattr(self, name).to(device))
        return self

    def normalize(self, images: Tensor) -> Tensor:
        return images.float().sub_(self._mean).div_(self._std)

    def train_batches(self, requests: Iterable[Request]) -> Iterator[Batch]:
        for index, generator in requests:
            index = index.to(self.train_images.device)
            images = self.train_images.index_select(0, index)
            if generator is not None:
                images = augment(images, generator, self.flip, self.crop)
            yield self.normalize(images), self.train_labels.index_select(0, index)

    def test_batches(self, size: int) -> Iterator[Batch]:
        for images, labels in zip(self.test_images.split(size), self.test_labels.split(size), strict=True):
            yield self.normalize(images), labels


def augment(images: Tensor, generator: torch.Generator, flip: bool, crop: int) -> Tensor:
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


def split(name: str, images: Tensor, labels: Tensor, test_per_class: int, seed: int, flip: bool, crop: int) -> Images:
    """Draw ``test_per_class`` images of each class for testing and keep the rest for training."""
    generator = torch.Generator().manual_seed(seed)
    test = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        members = (labels == label).nonzero().flatten()
        test[members[torch.randperm(len(members), generator=generator)[:test_per_class]]] = True
    classes = int(labels.max()) + 1
    return Images(name, images[~test], labels[~test], images[test], labels[test], classes, flip, crop)
