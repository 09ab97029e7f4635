"""Times of a packed network beside the float one, and the names of the kernels that its layers got."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import csq_kernels as csq
from csq_kernels import _native, backends
from csq_kernels.layer_times import LayerTimes, layer_times

pytestmark = pytest.mark.skipif(_native.module is None, reason="names the kernels of the native module")


class Network(nn.Module):
    """A layer of every kind, one that is called twice, and one that never is."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 32)
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.conv = nn.Conv2d(8, 32, 3, padding=1)
        self.volume = nn.Conv3d(1, 2, 1)
        self.linear = nn.Linear(32, 32)
        self.idle = nn.Linear(4, 4)

    def forward(self, tokens):
        image = self.embedding(tokens).unsqueeze(1)
        image = self.conv(self.stem(image))
        rows = self.volume(image.unsqueeze(1)).mean((1, 2, 3))
        return self.linear(self.linear(rows))


def packed_network() -> nn.Module:
    torch.manual_seed(0)
    model = Network()
    csq.prepare_(model)
    csq.finalize_(model, budget="4 bits")
    csq.pack_(model)
    return model.eval()


def kernels(model: nn.Module, tokens: torch.Tensor) -> dict[str, str | None]:
    return {row.name: row.kernel for row in layer_times(model, tokens).layers}


def test_every_layer_is_timed_and_says_what_it_got() -> None:
    model = packed_network()
    isa, scalar = _native.module.isa(), _native.module.isa() == "scalar"
    few, many = torch.zeros(1, 8, dtype=torch.int64), torch.zeros(64, 8, dtype=torch.int64)
    always = {"embedding": "PyTorch", "stem": "unpacked to PyTorch", "volume": "unpacked to PyTorch", "idle": None}
    exact = {"conv": f"{isa} float products", "linear": f"{isa} float products"}
    assert kernels(model, few) == always | exact
    # 64 x 8 x 32 positions of 32 channels.
    assert kernels(model, many) == always | exact | {"conv": "unpacked to PyTorch"}
    csq.set_precision_(model, "int8")
    way = "byte products" if scalar else "look-up"
    assert kernels(model, few) == always | {"conv": f"{isa} byte products", "linear": f"{isa} {way}"}
    products = {"conv": f"{isa} byte products", "linear": f"{isa} byte products"}
    assert kernels(model, many) == always | products
    _native.module.set_isa("scalar")
    assert kernels(model, few)["linear"] == "scalar byte products"


def test_the_model_is_left_as_it_was_and_repeated_calls_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("csq_kernels.layer_times.nanoseconds", lambda layer, args, kwargs, device: 2_000_000)
    model = packed_network()
    classes = [type(layer) for layer in model.modules()]
    times = layer_times(model, torch.zeros(1, 4, dtype=torch.int64))
    assert [type(layer) for layer in model.modules()] == classes
    rows = {row.name: row for row in times.layers}
    assert (rows["linear"].packed_ms, rows["linear"].float_ms, rows["linear"].ratio) == (4.0, 4.0, 1.0)
    assert (rows["idle"].packed_ms, rows["idle"].ratio) == (0.0, None)
    assert (times.packed_ms, times.ratio) == (2.0, 1.0)
    assert rows["conv"].shape == (32, 8, 3, 3) and rows["conv"].kind == "PackedConv2d"
    assert LayerTimes([rows["idle"]], 1.0, 3.0).to_dict()["layers"][0]["kernel"] is None


@pytest.mark.parametrize("precision", ["exact", "high", "int8"])
@pytest.mark.parametrize("shape", [(1, 8, 5, 5), (4, 8, 32, 32), (2, 2, 32, 32)])
def test_the_name_tells_whether_pytorch_convolves(monkeypatch, precision: str, shape: tuple[int, ...]) -> None:
    layer = csq.nn.PackedConv2d.from_codes(torch.randint(-7, 8, (32, shape[1], 3, 3)), torch.tensor(1.0), n_bits=3)
    layer.precision = precision
    convolved = []
    conv2d = F.conv2d
    monkeypatch.setattr(F, "conv2d", lambda *args: convolved.append(args) or conv2d(*args))
    row = layer_times(nn.Sequential(layer), torch.randn(shape)).layers[0]
    convolved.clear()
    with torch.inference_mode():
        layer(torch.randn(shape))
    assert (row.kernel == "unpacked to PyTorch") == bool(convolved)


def test_a_forced_reference_is_named() -> None:
    planes, step = torch.zeros(1, 2, dtype=torch.uint8), torch.tensor(1.0)
    arguments = (torch.zeros(1, 4), planes, step, None, (1,), (4, 4), "int8")
    assert backends.kernel("bitserial_linear", *arguments) == "reference"
    on_meta = [each.to("meta") if isinstance(each, torch.Tensor) else each for each in arguments]
    assert backends.kernel("bitserial_linear", *on_meta) == "reference"


def test_a_float_model_is_refused() -> None:
    with pytest.raises(ValueError, match="expected model with packed layers, got none"):
        layer_times(nn.Linear(2, 2), torch.zeros(1, 2))
