"""Folders of photos: what is decoded, that threads and interruptions change nothing, that damage is named."""

import random
import sys
import threading

import numpy as np
import pytest
import torch

pytest.importorskip("PIL")

from PIL import Image

from csq_kernels.train import data
from csq_kernels.train.data import imagenet

SIZE = 16


def write_folders(root, classes=("cat", "dog"), train=5, test=2, suffix=".JPEG"):
    """Photos of many shapes, each class in a colour of its own."""
    shapes = np.random.default_rng(0)
    for part, count in (("train", train), ("val", test)):
        for label, name in enumerate(classes):
            folder = root / part / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = shapes.integers(0, 90, (*shapes.integers(20, 40, 2), 3), np.uint8)
                pixels[..., label % 3] += 140
                Image.fromarray(pixels).save(folder / f"{name}_{number}{suffix}", format="PNG", compress_level=1)


@pytest.fixture
def root(tmp_path):
    write_folders(tmp_path)
    return tmp_path


def load(root, workers=2, flip=True):
    return data.load("imagenet", root, size=SIZE, flip=flip, workers=workers)


def requests(count=4, first=0):
    """Batches of three of the ten images, as a function of the step."""
    for step in range(first, count):
        yield (torch.arange(3) + 3 * step) % 10, torch.Generator().manual_seed(step)


def test_classes_and_sizes(root):
    dataset = load(root)
    assert dataset.sizes == (3, SIZE, 2) and dataset.train_size == 10 and dataset.options == {"size": SIZE}
    assert data.load("imagenet", root).sizes == (3, 224, 2)
    batches = list(dataset.train_batches(requests()))
    assert [labels.tolist() for _, labels in batches] == [[0, 0, 0], [0, 0, 1], [1, 1, 1], [1, 0, 0]]
    inputs, labels = batches[1]
    assert inputs.shape == (3, 3, SIZE, SIZE) and inputs.dtype == torch.float32
    # Decoded from the folder of the label: its colour is the strongest.
    strongest = (inputs * dataset._std + dataset._mean).mean((2, 3)).argmax(1)
    assert torch.equal(strongest, labels)
    assert [len(labels) for _, labels in dataset.test_batches(3)] == [3, 1]


def test_batches_depend_on_their_requests_alone(root):
    once = list(load(root, workers=1).train_batches(requests()))
    for workers in (1, 4):
        for first in (0, 2):
            again = list(load(root, workers).train_batches(requests(first=first)))
            assert len(again) == 4 - first
            for batch, other in zip(once[first:], again, strict=True):
                assert all(map(torch.equal, batch, other))
    index = next(requests())[0]
    other = next(load(root).train_batches([(index, torch.Generator().manual_seed(9))]))
    assert not torch.equal(other[0], once[0][0])


def test_reads_a_little_ahead_and_stops_when_left(root):
    asked = []

    def watched():
        for request in requests(count=100):
            asked.append(request)
            yield request

    before = threading.active_count()
    batches = load(root).train_batches(watched())
    next(batches)
    assert len(asked) == 1 + imagenet._AHEAD
    next(batches)
    assert len(asked) == 2 + imagenet._AHEAD and threading.active_count() == before + 2
    batches.close()
    assert threading.active_count() == before


def test_the_test_view_is_the_middle_of_the_image():
    # A ramp keeps its values where an image is resized and cut.
    ramp = np.repeat(np.linspace(0, 255, 64).round().astype(np.uint8)[None], 32, 0)
    view = imagenet._test_view(Image.fromarray(np.stack([ramp] * 3, -1)), 28)
    assert view.size == (28, 28)
    # The shorter side becomes 32, so the image stays 64 x 32, and the columns 18 to 45 are left.
    assert np.array_equal(np.asarray(view)[0, :, 0], ramp[0, 18:46])


def test_without_random_numbers_training_sees_the_test_view(root):
    dataset = load(root)
    ((inputs, _),) = dataset.train_batches([(torch.tensor([7]), None)])
    with Image.open(root / "train" / "dog" / "dog_2.JPEG") as image:
        view = np.asarray(imagenet._test_view(image, SIZE)).transpose(2, 0, 1)
    mean, std = (np.reshape(values, (3, 1, 1)) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    assert np.allclose(inputs[0].numpy(), (view / 255 - mean) / std, atol=1e-5)


def test_random_boxes_have_the_published_areas_and_shapes():
    draw = random.Random(0)
    boxes = np.array([imagenet._random_box(300, 300, draw) for _ in range(2000)])
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    assert boxes.min() >= 0 and boxes.max() <= 300
    area, aspect = width * height / 90_000, width / height
    assert 0.075 < area.min() < 0.1 and area.max() > 0.9 and 0.4 < area.mean() < 0.6
    assert 0.7 < aspect.min() < 0.78 and 1.3 < aspect.max() < 1.38 and abs(np.log(aspect).mean()) < 0.03
    # Far too long for any box: the largest allowed shape from its middle.
    assert imagenet._random_box(1000, 3, draw) == (498, 0, 502, 3)


def test_flip_mirrors_half_of_the_images():
    image = Image.fromarray(np.tile(np.arange(32, dtype=np.uint8)[None, :, None] * 8, (32, 1, 3)))
    views = [np.asarray(imagenet._training_view(image, 8, random.Random(seed), flip=True)) for seed in range(200)]
    mirrored = sum(view[0, 0, 0] > view[0, -1, 0] for view in views)
    assert 70 < mirrored < 130
    plain = [np.asarray(imagenet._training_view(image, 8, random.Random(seed), flip=False)) for seed in range(50)]
    assert all(view[0, 0, 0] <= view[0, -1, 0] for view in plain)


def test_grey_transparent_and_palette_images_become_coloured(tmp_path):
    write_folders(tmp_path, train=1, test=1)
    for name, mode in (("grey", "L"), ("transparent", "RGBA"), ("palette", "P")):
        Image.new(mode, (20, 30)).save(tmp_path / "train" / "cat" / f"{name}.png")
    dataset = load(tmp_path)
    ((inputs, _),) = dataset.train_batches([(torch.arange(dataset.train_size), None)])
    assert inputs.shape[0] == 5


def damage_missing(root):
    (root / "val").rename(root / "test")
    return "expected .*/val to be a folder"


def damage_flat(root):
    for part in ("cat", "dog"):
        for path in (root / "val" / part).iterdir():
            path.rename(root / "val" / path.name)
        (root / "val" / part).rmdir()
    return "expected .*/val with a folder of images for each class, found no folder"


def damage_empty(root):
    for path in (root / "train" / "dog").iterdir():
        path.unlink()
    return "expected .*/train/dog with images .*found none"


def damage_class(root):
    (root / "val" / "dog").rename(root / "val" / "horse")
    return "same classes in .*, got dog in one of them"


@pytest.mark.parametrize("damage", [damage_missing, damage_flat, damage_empty, damage_class])
def test_a_wrong_folder_is_named(root, damage):
    message = damage(root)
    with pytest.raises(data.DataError, match=message):
        load(root)


@pytest.mark.parametrize("damage", [lambda content: content[: len(content) // 2], lambda _: b"", lambda _: b"text"])
def test_a_damaged_image_is_named(root, damage):
    path = root / "train" / "dog" / "dog_2.JPEG"
    path.write_bytes(damage(path.read_bytes()))
    threads = threading.active_count()
    with pytest.raises(data.DataError, match=f"expected {path} to be an image"):
        list(load(root).train_batches(requests()))
    assert threading.active_count() == threads


def test_a_forged_size_is_refused(root, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(data.DataError, match="to be an image, got .*decompression bomb"):
        list(load(root).train_batches(requests()))


def test_missing_pillow_is_said(root, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(data.DataError, match="expected Pillow.* pip install pillow"):
        load(root)
