"""Plots of lines that no committed result has."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

BENCH = Path(__file__).parent.parent / "bench"


def scaling_line(mode: str, sweep: str, weights: int, bits: int, threads: int, provider: str) -> dict[str, Any]:
    row = {"op": "scaling", "mode": mode, "sweep": sweep, "shape": [1 << weights], "threads": threads}
    row |= {"provider": provider, "seconds": {"median": 1e-9 * bits * 2**weights / threads}}
    row |= {"machine": {"cpu": "some", "isa": "avx2"}}
    if mode == "step":
        return row | {"n_bits": bits, "peak_bytes_per_weight": 16.5 * bits}
    return row | {"stored_bits": bits, "batch": 1, "weight_bytes": bits * 2**weights / 8, "peak_bytes": 64}


def test_plot_of_the_scaling(tmp_path: Path) -> None:
    rows = []
    for mode, provider in (("step", "eager"), ("step", "single-pass"), ("product", "csq int8")):
        rows += [scaling_line(mode, "weights", weights, 8, 2, provider) for weights in (12, 16, 20)]
        rows += [scaling_line(mode, "bits", 20, bits, 2, provider) for bits in (1, 4, 16)]
        rows += [scaling_line(mode, "threads", 20, 8, 1, provider)]
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    plot = [sys.executable, BENCH / "plot.py", "scaling", "--results", tmp_path / "lines.jsonl", "--out", tmp_path]
    subprocess.run(plot, check=True, capture_output=True)
    assert {path.name for path in tmp_path.glob("*.png")} == {"scaling-step.png", "scaling-product.png"}
    text = (tmp_path / "scaling-step.svg").read_text()
    assert all(f"<!-- {label} -->" in text for label in ("weights", "bits", "threads", "eager", "single-pass"))
    assert "<!-- batch -->" not in text, "a column was drawn that nobody swept"
