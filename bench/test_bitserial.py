"""pytest-benchmark entries of two packed linear layers in the cache. ``run.py`` compares, with weights from memory."""

import peers
import pytest
import torch
from peers import csq, ort, pytorch

SHAPE = (1024, 1024)
PROVIDERS = [*csq.providers(), *pytorch.providers()]


@pytest.mark.parametrize("batch", (1, 8))
@pytest.mark.parametrize("provider", PROVIDERS, ids=lambda provider: f"{provider.name} {provider.bits} bit")
def test_bitserial(benchmark, monkeypatch, provider: peers.Provider, batch: int) -> None:
    monkeypatch.setattr(peers, "COLD_BYTES", 0)
    walk = provider.walk(SHAPE, batch, torch.get_num_threads())
    benchmark.group = f"bitserial batch {batch}"
    benchmark.pedantic(walk.run, rounds=20, warmup_rounds=2)


@pytest.mark.skipif(ort.available() is not None, reason=str(ort.available()))
@pytest.mark.parametrize("bits", csq.WIDTHS)
def test_the_int8_yardstick_is_onnx_runtime(bits: int) -> None:
    codes = csq.random_codes((256, 1024), bits)
    x = torch.randn(8, 1024, generator=torch.Generator().manual_seed(0))
    exact = x.double() @ codes.double().T
    theirs = csq.relative_error(torch.from_numpy(ort.int8_product(codes.numpy(), 1.0, x.numpy())), exact)
    ours = csq.relative_error(csq.rounded_to_int8(x) @ codes.double().T, exact)
    assert theirs == pytest.approx(ours, rel=0.005)
