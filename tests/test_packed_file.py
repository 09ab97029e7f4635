"""The packed file: what goes in comes out, its size is what was promised, and no damage gets past the reader."""

import errno
import hashlib
import json
import multiprocessing
import random
import resource
import struct
import subprocess
import sys

import pytest
import safetensors.torch
import torch
from helpers import harden
from torch import nn

import csq_kernels as csq
from csq_kernels import packed
from csq_kernels.nn import CSQLayer
from csq_kernels.train import models

CONFIG = csq.Config(n_bits=6)


class Network(nn.Module):
    """Every kind of tensor a file may have to hold."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.conv = nn.Conv2d(1, 5, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(5)
        self.head = nn.Linear(30, 6)
        self.out = nn.Linear(6, 11, bias=False)
        self.out.weight = self.embedding.weight
        self.free = nn.Parameter(torch.randn(3).to(torch.bfloat16))
        self.again = self.free
        self.register_buffer("mask", torch.tensor([True, False, True]))
        self.register_buffer("empty", torch.zeros(0, 4))
        self.register_buffer("fleeting", torch.randn(2), persistent=False)

    def forward(self, tokens):
        features = self.norm(self.conv(self.embedding(tokens).unsqueeze(1)))
        return self.out(self.head(features.transpose(1, 2).flatten(2)))


TOKENS = torch.tensor([[1, 10, 3], [0, 5, 7]])
EXTRA = {"model": "é", "numbers": [1, 2.5]}


def prepared(act_bits=None):
    model = Network()
    csq.prepare_(model, csq.Config(n_bits=6, act_bits=act_bits))
    return model


def packed_network(act_bits=None, seed=0):
    torch.manual_seed(seed)
    model = prepared(act_bits)
    model(TOKENS)
    layers = [module for module in model.modules() if isinstance(module, CSQLayer)]
    for number, layer in enumerate(layers[:-1]):
        harden(layer, ((0, 1), (2,), (0, 4, 5))[number], seed)
    layers[-1].follow_(layers[0])
    csq.pack_(model)
    return model.eval()


@pytest.fixture
def saved(tmp_path):
    model = packed_network()
    csq.save_packed(model, tmp_path / "model.safetensors", EXTRA)
    return model, tmp_path / "model.safetensors"


def on_meta():
    with torch.device("meta"):
        model = Network()
    # A file does not hold what is not persistent.
    model.fleeting = torch.zeros(2)
    return model


def hard():
    model = prepared()
    csq.finalize_(model)
    return model


@pytest.mark.parametrize("make", [Network, prepared, hard, packed_network, on_meta])
def test_a_file_fills_every_kind_of_model(saved, make):
    model, path = saved
    other = make().eval()
    buffers = {name: tensor for name, tensor in other.named_buffers() if not tensor.is_meta}
    described = csq.load_packed(other, path, "high")
    assert described.extra == EXTRA and other.head.precision == "high"
    csq.set_precision_(other, "exact")
    assert torch.equal(other(TOKENS), model(TOKENS))
    assert other.state_dict().keys() == model.state_dict().keys()
    for name, tensor in other.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]) and not tensor.is_meta, name
    assert other.again is other.free and other.out.scale is other.embedding.scale
    if "norm.running_mean" in buffers:
        assert other.norm.running_mean is buffers["norm.running_mean"]


def test_any_safetensors_reader_reads_it(saved):
    model, path = saved
    tensors = safetensors.torch.load_file(path)
    assert torch.equal(tensors["conv.planes"], model.conv.canonical_planes())
    assert torch.equal(tensors["norm.running_var"], model.norm.running_var)
    # Once each, however many names they have.
    assert {"embedding.planes", "free"} <= tensors.keys() and not {"out.planes", "again", "fleeting"} & tensors.keys()


def test_input_quantizers_come_back(tmp_path):
    model = packed_network(act_bits=4)
    csq.save_packed(model, tmp_path / "file")
    for other in (Network(), prepared(act_bits=4), prepared(act_bits=8), prepared(), on_meta()):
        csq.load_packed(other.eval(), tmp_path / "file")
        assert other.head.input_quantizer.calibrated and other.embedding.input_quantizer is None
        assert torch.equal(other(TOKENS), model(TOKENS))


@pytest.mark.parametrize("precision", ["exact", "high", "int8"])
def test_saving_and_loading_again_changes_no_byte(saved, tmp_path, precision):
    _, path = saved
    other = Network()
    csq.load_packed(other, path, precision)
    csq.save_packed(other, tmp_path / "again", EXTRA)
    assert (tmp_path / "again").read_bytes() == path.read_bytes()


def test_inspect_shows_the_layers(saved):
    model, path = saved
    described = packed.inspect(path)
    shown = str(described)
    for part in ("embedding", "PackedConv2d", "5x1x3x3", "tied to embedding", f"{path.stat().st_size:,} bytes"):
        assert part in shown
    content = json.loads(json.dumps(described.to_dict()))
    assert content["file_bytes"] == path.stat().st_size == described.file_bytes
    assert content["packed"]["layers"][1]["active"] == list(model.conv.active)
    assert described.file_bytes == described.header_bytes + described.rest_bytes + described.summary.bytes
    # What pack_ says of a model is what the file says of itself.
    torch.manual_seed(0)
    other = hard()
    shown = csq.pack_(other)
    assert csq.save_packed(other, path).summary == shown


@pytest.mark.parametrize(
    ("name", "size", "options"),
    [("cnn", 28, {}), ("resnet20", 32, {}), ("vit", 28, {"depth": 2}), ("mlp", 8, {})],
    ids=["cnn", "resnet20", "vit", "mlp"],
)
@pytest.mark.parametrize("active", [(6, 7), (2, 3, 4, 7)], ids=str)
def test_the_size_is_what_the_report_promised(name, size, options, active, tmp_path):
    model = models.build(name, 1, size, 10, **options)
    csq.prepare_(model)
    for layer in (module for module in model.modules() if isinstance(module, CSQLayer)):
        harden(layer, active)
    promised = csq.report(model)
    csq.pack_(model)
    extra = {"model": name, "options": options, "sizes": [1, size, 10], "data": "mnist5k"}
    file = csq.save_packed(model, tmp_path / "file", extra)
    assert file.file_bytes == (tmp_path / "file").stat().st_size
    dropped = sum(row.bytes for row in promised.layers) - file.summary.bytes
    assert dropped >= 0 and abs(file.file_bytes + dropped - promised.bytes) <= 0.02 * promised.bytes


def test_a_budget_in_megabytes_is_that_of_the_file(tmp_path):
    model = models.build("cnn", 1, 28, 10)
    csq.prepare_(model)
    report = csq.finalize_(model, budget="0.015 MB")
    csq.pack_(model)
    assert report.budget_met
    assert 0.0145e6 < csq.save_packed(model, tmp_path / "file").file_bytes <= 0.015e6


def assert_refused(path, *parts, make=Network):
    model = make()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(csq.PackedFileError) as caught:
        csq.load_packed(model, path)
    for part in (str(path), *parts):
        assert part in str(caught.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.state_dict().keys() == before.keys()


def test_every_flipped_byte_of_the_header_is_found(saved):
    _, path = saved
    content = path.read_bytes()
    length = 8 + struct.unpack("<Q", content[:8])[0]
    with open(path, "r+b") as file:
        for position in range(length):
            for mask in (0x01, 0x20, 0x80):
                file.seek(position)
                file.write(bytes([content[position] ^ mask]))
                file.flush()
                with pytest.raises(csq.PackedFileError):
                    packed.inspect(path)
            file.seek(position)
            file.write(content[position : position + 1])
    assert packed.inspect(path).file_bytes == len(content)


def test_flipped_bits_of_the_tensors_are_found(saved):
    _, path = saved
    content = path.read_bytes()
    length = 8 + struct.unpack("<Q", content[:8])[0]
    draw = random.Random(0)
    for _ in range(40):
        damaged = bytearray(content)
        damaged[draw.randrange(length, len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        assert_refused(path, "expected CRC-32")


@pytest.mark.parametrize("keep", [0, 7, 8, 60, 500, -1])
def test_truncated_and_extended_files(saved, keep):
    _, path = saved
    content = path.read_bytes()
    path.write_bytes(content[:keep])
    assert_refused(path)
    path.write_bytes(content + b"\0")
    assert_refused(path)


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "file"
    safetensors.torch.save_file({"weight": torch.zeros(3, 40)}, path)
    assert_refused(path, "expected a file written by save_packed")
    path.write_bytes(bytes(random.Random(0).randrange(256) for _ in range(4096)))
    assert_refused(path)
    with pytest.raises(FileNotFoundError):
        csq.load_packed(Network(), tmp_path / "none")


def forge(path, change):
    """Apply ``change(entries, metadata)`` to the header and sign it anew: an attacker can do that as well."""
    content = path.read_bytes()
    length = 8 + struct.unpack("<Q", content[:8])[0]
    entries = json.loads(content[8:length])
    metadata = json.loads(entries["__metadata__"]["csq"])
    entries, metadata = change(entries, metadata) or (entries, metadata)
    metadata["sha256"] = "0" * 64
    entries["__metadata__"]["csq"] = json.dumps(metadata, separators=(",", ":"))
    text = json.dumps(entries, separators=(",", ":")).encode()
    header = struct.pack("<Q", len(text)) + text
    digest = hashlib.sha256(header).hexdigest().encode()
    path.write_bytes(header.replace(b"0" * 64, digest, 1) + content[length:])


def at(*keys, value):
    """A change that sets one value, of the metadata if the first key is ``csq``."""

    def change(entries, metadata):
        target = metadata if keys[0] == "csq" else entries
        *path, last = keys[1:] if keys[0] == "csq" else keys
        for key in path:
            target = target[key]
        target[last] = value

    return change


def without(name):
    return lambda entries, metadata: entries.pop(name) and None


def renamed(old, new):
    def change(entries, metadata):
        return {new if name == old else name: entry for name, entry in entries.items()}, metadata

    return change


def layer(name, position, value):
    return at("csq", "layers", name, position, value=value)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (at("csq", "version", value=2), "expected version 1, got 2"),
        (at("csq", "version", value="1"), "expected version 1, got 1"),
        (at("csq", "surplus", value=1), "expected metadata"),
        (at("csq", "ties", value=[]), "expected metadata"),
        (at("csq", "crc32", value="00"), "expected crc32 of"),
        (at("csq", "ties", "out.planes", value="nowhere"), "out.planes: expected a tie to a stored tensor"),
        (at("csq", "ties", "out.planes", value="conv.planes"), "layer out: expected planes"),
        (at("csq", "ties", "out.planes", value=[1]), "out.planes: expected a tie"),
        (at("csq", "ties", "again", value="head.bias"), "again: expected BF16[3], got F32[6]"),
        (at("head.planes", "shape", value=[1 << 40, 1 << 40]), "head.planes: expected offsets"),
        (at("head.planes", "shape", value=[-1, 23]), "head.planes: expected a dtype"),
        (at("head.planes", "shape", value=[1] * 9), "head.planes: expected a dtype"),
        (at("head.planes", "dtype", value="F99"), "head.planes: expected a dtype"),
        (at("head.planes", "data_offsets", value=[0, 10]), "head.planes: expected offsets"),
        (at("head.planes", "data_offsets", value=[0, 1 << 62]), "head.planes: expected offsets"),
        (at("head.planes", "extra", value=1), "head.planes: expected dtype, shape and data_offsets"),
        (without("head.scale"), "expected offsets"),
        (renamed("head.scale", "head.scala"), "layer head: expected scale as F32[] or F32[6], got none"),
        (renamed("norm.weight", "norm.wait"), "norm.wait: expected the model's tensors, got one more"),
        (at("csq", "ties", "again", value="mask"), "again: expected BF16[3], got BOOL[3]"),
        (renamed("mask", "conv.input_quantizer.range"), "expected the model's tensors"),
        (layer("conv", 0, "PackedConv9d"), "layer conv: expected [class, shape"),
        (layer("conv", 0, "PackedConv1d"), "layer conv: expected Conv2d of the model, got PackedConv1d"),
        (layer("conv", 1, [5, 1, 9]), "layer conv: expected weight of shape (5, 1, 3, 3), got (5, 1, 9)"),
        (layer("conv", 1, [5, 1, 3, 4]), "layer conv: expected planes"),
        (layer("conv", 1, [1] * 10000), "layer conv: expected a weight shape"),
        (layer("conv", 1, []), "layer conv: expected a weight shape with axis 0"),
        (layer("conv", 2, 17), "layer conv: expected n_bits from 1 to 16"),
        (layer("conv", 3, 1 << 20), "layer conv: expected n_bits from 1 to 16 and active exponents"),
        (layer("conv", 4, 1), "layer conv: expected exponents below 17"),
        (layer("conv", 4, 1.5), "layer conv: expected a weight shape and sets of exponents as integers"),
        (layer("conv", 5, 1), "layer conv: expected exponents below 17, the negative ones among them"),
        (at("csq", "layers", "conv", value="PackedConv2d"), "layer conv: expected [class, shape"),
        (at("csq", "layers", "conv", value=["PackedConv2d", [5, 1, 3, 3], 6, 4, 12, 8, [99, "lsq"]]), "act_bits"),
        (at("csq", "layers", "conv", value=["PackedConv2d", [5, 1, 3, 3], 6, 4, 12, 8, 3]), "layer conv"),
        (lambda entries, metadata: metadata["layers"].update(ghost=metadata["layers"]["out"]), "layer ghost"),
        (lambda entries, metadata: metadata["layers"].pop("conv") and None, "expected a packed layer like"),
        (lambda entries, metadata: entries.update(__metadata__={"csq": "", "more": ""}), "expected metadata as one"),
    ],
)
def test_forged_headers_name_the_place(saved, change, part):
    _, path = saved
    forge(path, change)
    make = prepared if part == "expected a packed layer like" else Network
    assert_refused(path, part, make=make)


def test_overlapping_tensors(saved):
    _, path = saved

    def overlap(entries, metadata):
        names = [name for name in entries if name != "__metadata__"]
        entries[names[1]]["data_offsets"] = entries[names[0]]["data_offsets"]

    forge(path, overlap)
    assert_refused(path, "expected offsets")


def test_deep_and_repeated_json(saved):
    _, path = saved

    def deep(entries, metadata):
        nested = []
        for _ in range(900):
            nested = [nested]
        metadata["extra"] = {"deep": nested}

    forge(path, deep)
    packed.inspect(path)
    content = path.read_bytes()
    length = 8 + struct.unpack("<Q", content[:8])[0]
    for old, new in ((b"[" * 900, b"[" * 200000), (b'"mask":', b'"free":')):
        text = content[8:length].replace(old, new)
        header = struct.pack("<Q", len(text)) + text
        digest = hashlib.sha256(header.replace(header[45:109], b"0" * 64, 1)).hexdigest().encode()
        path.write_bytes(header.replace(header[45:109], digest, 1) + content[length:])
        assert_refused(path, "expected")


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_scale_that_is_not_finite_is_refused(tmp_path, value):
    model = packed_network()
    model.conv.scale[2] = value
    csq.save_packed(model, tmp_path / "file")
    assert_refused(tmp_path / "file", "layer conv: expected scale to be finite")


def test_a_file_of_another_network_is_refused(saved):
    _, path = saved
    wider = Network()
    wider.head = nn.Linear(30, 7)
    with pytest.raises(csq.PackedFileError, match=r"layer head: expected weight of shape \(7, 30\), got \(6, 30\)"):
        csq.load_packed(wider, path)
    missing = Network()
    missing.norm = nn.Identity()
    with pytest.raises(csq.PackedFileError, match="norm.bias: expected the model's tensors, got one more"):
        csq.load_packed(missing, path)
    more = Network()
    more.extra = nn.LayerNorm(3)
    with pytest.raises(csq.PackedFileError, match="extra.bias: expected the model's tensors, got one less"):
        csq.load_packed(more, path)


def test_huge_lengths_allocate_nothing(saved):
    _, path = saved
    content = path.read_bytes()
    paths = []
    for number, length in enumerate((1 << 31, (1 << 63) - 1, (1 << 64) - 1)):
        paths.append(str(path.with_name(f"huge-{number}")))
        with open(paths[-1], "wb") as file:
            file.write(struct.pack("<Q", length) + content[8:])
            # Sparse, so that the length alone is not what gives it away.
            file.truncate(1 << 33)
    program = f"""
import resource
import csq_kernels as csq
from csq_kernels import packed
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), used + (64 << 20)))
for path in {paths!r}:
    try:
        packed.inspect(path)
    except csq.PackedFileError as error:
        print("refused", error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.count("refused") == len(paths), done.stderr


def test_what_cannot_be_saved(tmp_path):
    path = tmp_path / "file"
    with pytest.raises(ValueError, match="expected model with its CSQ layers packed, got none; call pack_ first"):
        csq.save_packed(Network(), path)
    with pytest.raises(ValueError, match="got embedding unpacked"):
        csq.save_packed(hard(), path)
    model = packed_network()
    for extra in ({"tensor": torch.ones(1)}, {"number": float("nan")}):
        with pytest.raises((TypeError, ValueError)):
            csq.save_packed(model, path, extra)
    with pytest.raises(ValueError, match="expected names and extra of at most 1048576 bytes"):
        csq.save_packed(model, path, {"text": "x" * (1 << 21)})
    model.register_buffer("wave", torch.zeros(2, dtype=torch.complex64))
    with pytest.raises(TypeError, match="expected wave of a dtype among F64"):
        csq.save_packed(model, path)
    del model.wave
    model.norm.weight = nn.Parameter(torch.empty(5, device="meta"))
    with pytest.raises(ValueError, match="expected norm.weight with values"):
        csq.save_packed(model, path)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_the_old_file(saved, tmp_path):
    _, path = saved
    content = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError) as caught:
            csq.save_packed(packed_network(seed=1), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.errno == errno.EFBIG
    assert path.read_bytes() == content and list(tmp_path.iterdir()) == [path]


def _save_often(path, seed, done):
    model = packed_network(seed=seed)
    for _ in range(30):
        csq.save_packed(model, path)
    done.put(seed)


def test_two_processes_save_one_path_while_a_third_reads(tmp_path):
    path = tmp_path / "file"
    models = [packed_network(seed=seed) for seed in (0, 1)]
    csq.save_packed(models[0], path)
    context = multiprocessing.get_context("fork")
    done = context.Queue()
    torch.set_num_threads(1)
    writers = [context.Process(target=_save_often, args=(path, seed, done)) for seed in (0, 1)]
    for writer in writers:
        writer.start()
    expected = [model(TOKENS) for model in models]
    reader, read = Network().eval(), 0
    while read < 20 or any(writer.is_alive() for writer in writers):
        csq.load_packed(reader, path)
        read += 1
        assert any(torch.equal(reader(TOKENS), outcome) for outcome in expected)
    for writer in writers:
        writer.join()
    assert {done.get(timeout=10), done.get(timeout=10)} == {0, 1} and list(tmp_path.iterdir()) == [path]


def test_loading_needs_no_training_code(saved):
    _, path = saved
    program = f"""
import sys
import csq_kernels.nn, csq_kernels.packed
from torch import nn
loaded = set(sys.modules)
assert not [name for name in loaded if name.startswith(("csq_kernels.train", "csq_kernels.commands"))]
assert not loaded & {{"yaml", "pydantic", "typer"}}
print(csq_kernels.packed.inspect({str(path)!r}).producer)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.startswith("csq_kernels "), done.stderr
