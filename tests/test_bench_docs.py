"""The numbers in README.md and docs/benchmarks.md are those of the committed results."""

import importlib
from pathlib import Path
from types import ModuleType

import pytest

BENCH = Path(__file__).parent.parent / "bench"
REWRITE = "the results say something else: python bench/docs.py"


@pytest.fixture
def docs(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCH)
    return importlib.import_module("docs")


def test_text_and_results_agree(docs: ModuleType) -> None:
    for path in docs.FILES:
        text = path.read_text()
        assert docs.MARKED.search(text) and docs.rendered(text) == text, f"{path.name}: {REWRITE}"


def test_a_changed_number_is_found_and_put_right(docs: ModuleType, tmp_path: Path, monkeypatch, capsys) -> None:
    whole = docs.FILES[0].read_text()
    changed = tmp_path / "README.md"
    changed.write_text(whole.replace(" ms, ", " us, ", 1))
    monkeypatch.setattr(docs, "ROOT", tmp_path)
    monkeypatch.setattr(docs, "FILES", (changed,))
    monkeypatch.setattr("sys.argv", ["docs.py", "--check"])
    assert docs.main() == 1 and "README.md" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["docs.py"])
    assert docs.main() == 0 and changed.read_text() == whole


def test_the_latest_line_counts_and_says_where_it_is_from(docs: ModuleType, monkeypatch) -> None:
    row = next(row for row in docs.lines("reconstruct") if row["device"] == "cpu")
    ours = row | {"provider": "csq", "shape": [8, 8], "mode": "forward", "share_of_floor": 0.5, "speedup_over": {}}
    slower = ours | {"seconds": {"median": 0.25}, "commit": "abc", "speedup_over": {"eager": 0.5}}
    monkeypatch.setattr(docs, "lines", lambda op: [ours | {"seconds": {"median": 1e-3}}, slower])
    (line,) = docs.reconstruct().splitlines()[3:]
    assert line.startswith("| 8x8 forward | 250 ms | 50% | - | - | 0.50x | - |") and "commit abc" in line


def test_networks(docs: ModuleType, monkeypatch, tmp_path: Path) -> None:
    row = next(row for row in docs.lines("reconstruct") if row["device"] == "cpu") | {
        "network": "mlp",
        "batch": 4,
        "threads": 2,
        "mode": "infer",
    }
    rows = [row | {"provider": name, "seconds": {"median": time}} for name, time in (("float", 9.0), ("csq int8", 0.5))]
    rows += [row | {"provider": "float", "mode": "train"}, rows[0] | {"seconds": {"median": 2.0}}]
    monkeypatch.setattr(docs, "RESULTS", tmp_path)
    assert docs.networks("infer") == "not measured yet"
    (tmp_path / "model.jsonl").write_text("".join(docs.json.dumps(row) + "\n" for row in rows))
    head, _, line = docs.networks("infer").splitlines()[1:]
    assert head == "|  | float | csq int8 | measured on |"
    assert line.startswith("| mlp, batch 4 | 2000 ms | 500 ms | 2 threads, ")


def test_figures_are_there(docs: ModuleType) -> None:
    for path in docs.FILES:
        for figure in docs.re.findall(r"!\[[^]]*]\(([^)]*)\)", path.read_text()):
            assert (path.parent / figure).exists(), f"{path.name}: {figure}"
