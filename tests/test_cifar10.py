"""CIFAR-10: both versions of its files give the same images, damage is named, and pickles cannot run anything."""

import pickle
import pickletools

import numpy as np
import pytest
import torch

from csq_kernels.train import data
from csq_kernels.train.data import cifar10

COUNT = 4
NAMES = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]


def batch(name: str) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(NAMES.index(name))
    return random.integers(0, 10, COUNT, np.uint8), random.integers(0, 256, (COUNT, 3072), np.uint8)


def binary(name: str) -> bytes:
    labels, pixels = batch(name)
    return np.concatenate([labels[:, None], pixels], 1).tobytes()


def python2_pickle(labels: list[int], pixels: bytes, shape: tuple[int, int], code: bytes = b"u1") -> bytes:
    """A batch as Python 2 pickled it in 2009, with protocol 2 and strings of bytes."""

    def text(value: bytes) -> bytes:
        return b"T" + len(value).to_bytes(4, "little") + value

    def number(value: int) -> bytes:
        return b"J" + value.to_bytes(4, "little", signed=True)

    dtype = b"cnumpy\ndtype\n" + text(code) + number(0) + number(1) + b"\x87R"
    dtype += b"(" + number(3) + text(b"|") + b"NNN" + number(-1) + number(-1) + number(0) + b"tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n" + number(0) + b"\x85" + text(b"b") + b"\x87R"
    array += b"(" + number(1) + number(shape[0]) + number(shape[1]) + b"\x86" + dtype + b"\x89" + text(pixels) + b"tb"
    values = b"](" + b"".join(map(number, labels)) + b"e"
    content = text(b"batch_label") + text(b"training batch 1 of 5") + text(b"labels") + values + text(b"data") + array
    return b"\x80\x02}(" + content + b"u."


def pickled(name: str) -> bytes:
    labels, pixels = batch(name)
    return python2_pickle(labels.tolist(), pixels.tobytes(), pixels.shape)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(cifar10, "IMAGES_PER_BATCH", COUNT)


@pytest.fixture(params=["bin", "py"])
def root(request, tmp_path):
    folder = tmp_path / f"cifar-10-batches-{request.param}"
    folder.mkdir()
    for name in NAMES:
        is_binary = request.param == "bin"
        (folder / (f"{name}.bin" if is_binary else name)).write_bytes(binary(name) if is_binary else pickled(name))
    return tmp_path


def test_both_versions_give_the_same_images(root):
    dataset = data.load("cifar10", root, flip=True, crop=4)
    assert dataset.sizes == (3, 32, 10) and dataset.train_size == 5 * COUNT and len(dataset.test_labels) == COUNT
    labels, pixels = batch("data_batch_2")
    assert dataset.train_labels[COUNT : 2 * COUNT].tolist() == labels.tolist()
    # Red, green, blue planes, each row by row.
    assert dataset.train_images[COUNT + 1, 2, 3, 5] == pixels[1, 2 * 1024 + 3 * 32 + 5]
    assert torch.equal(dataset.test_images.view(COUNT, -1), torch.from_numpy(batch("test_batch")[1]))


def test_the_pickles_of_this_test_are_real(root):
    """Python and numpy read them as ours does; torchvision reads the real ones so."""
    pickletools.dis(pickled("test_batch"), out=open("/dev/null", "w"))
    content = pickle.loads(pickled("test_batch"), encoding="bytes")
    labels, pixels = batch("test_batch")
    assert content[b"labels"] == labels.tolist() and np.array_equal(content[b"data"], pixels)


def test_found_in_the_usual_places(root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert data.find("cifar10") is None
    (tmp_path / "data").symlink_to(root)
    assert data.find("cifar10").name.startswith("cifar-10-batches-")
    assert data.find("cifar10", root) == data.find("cifar10", next(root.glob("cifar-10*")))


def test_a_missing_file_is_named(root):
    next(root.glob("*/data_batch_3*")).unlink()
    with pytest.raises(data.DataError, match="data_batch_3.*one of the six files of CIFAR-10, found neither"):
        data.load("cifar10", root)


@pytest.mark.parametrize("damage", [lambda content: content[:-1], lambda content: b"", lambda content: content[:700]])
def test_a_damaged_file_is_named(root, damage):
    path = next(root.glob("*/data_batch_2*"))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(data.DataError, match=f"expected {path} "):
        data.load("cifar10", root)


def test_impossible_labels_are_refused(root):
    path = next(root.glob("*/test_batch*"))
    labels, pixels = [0, 1, 2, 10], batch("test_batch")[1]
    records = np.concatenate([np.array(labels, np.uint8)[:, None], pixels], 1).tobytes()
    path.write_bytes(records if path.suffix else python2_pickle(labels, pixels.tobytes(), pixels.shape))
    with pytest.raises(data.DataError, match="labels from 0 to 9, got 0 to 10"):
        data.load("cifar10", root)


class Call:
    """Writes a file when it is unpickled the usual way."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_pickle_that_calls_something_is_refused_and_not_run(tmp_path, protocol):
    for name in NAMES:
        (tmp_path / name).write_bytes(pickled(name))
    mark = tmp_path / "mark"
    content = pickle.dumps({"data": Call(mark)}, protocol)
    (tmp_path / "data_batch_1").write_bytes(content)
    with pytest.raises(data.DataError, match="data_batch_1 .*a call of _?io.open, .*the binary version"):
        data.load("cifar10", tmp_path)
    assert not mark.exists()
    pickle.loads(content)
    assert mark.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (python2_pickle([0] * COUNT, bytes(COUNT * 3072), (COUNT, 3072), b"O8"), "an array of type b'O8'"),
        (python2_pickle([0] * COUNT, bytes(COUNT * 3071), (COUNT, 3072)), "cannot reshape"),
        (python2_pickle([0] * COUNT, bytes(COUNT * 1536 * 2), (2 * COUNT, 1536)), r"shape \(8, 1536\)"),
        (python2_pickle([0] * 3, bytes(COUNT * 3072), (COUNT, 3072)), "got 3 and"),
        (pickle.dumps({b"labels": [0] * COUNT, b"data": [1, 2]}), "'list' object"),
        (pickle.dumps([1, 2]), "list indices"),
    ],
    ids=["objects", "short", "shape", "labels", "no array", "no dict"],
)
def test_other_content_is_refused(tmp_path, content, message):
    (tmp_path / "data_batch_1").write_bytes(content)
    with pytest.raises(data.DataError, match=f"data_batch_1 .*{message}"):
        data.load("cifar10", tmp_path)
