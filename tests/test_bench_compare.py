"""What ``bench/compare.py`` makes of two runs: drift is the machine's, a kernel slowed by a tenth is ours."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

COMPARE = Path(__file__).parent.parent / "bench" / "compare.py"
MACHINE = {"cpu": "some", "cores": 2, "isa": "avx2", "threads": 2, "gpu": None}


def lines(
    path: Path, ours: float = 1.0, drift: float = 1.0, noise: float = 0.01, seed: int = 0, rounds: int = 9
) -> Path:
    generator = random.Random(seed)
    rows = []
    for shape in ([256, 256], [1024, 1024]):
        for provider, seconds in (("csq", 1e-3 * ours), ("eager", 2e-2), ("compiled", 8e-3)):
            median = seconds * drift * (1 + generator.gauss(0, noise * 1.25 / rounds**0.5))
            spread = {"median": median, "p20": median * (1 - 0.84 * noise), "p80": median * (1 + 0.84 * noise)}
            row = {"op": "reconstruct", "provider": provider, "shape": shape, "seconds": spread, "rounds": rounds}
            rows.append(row | {"machine": MACHINE})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def compare(old: Path, new: Path) -> tuple[int, str]:
    done = subprocess.run([sys.executable, COMPARE, old, new], capture_output=True, text=True)
    assert not done.stderr
    return done.returncode, done.stdout


@pytest.mark.parametrize("seed", range(3))
def test_same_speed_on_a_machine_that_drifts(tmp_path, seed):
    old = lines(tmp_path / "old.jsonl", seed=seed)
    code, text = compare(old, lines(tmp_path / "new.jsonl", drift=1.3, seed=seed + 100))
    assert code == 0 and "0 slower" in text and "drift is 1.3" in text and "come apart by 0%" in text


def test_a_tenth_slower_is_called(tmp_path):
    old = lines(tmp_path / "old.jsonl")
    code, text = compare(old, lines(tmp_path / "new.jsonl", ours=1.1, drift=0.8, seed=1))
    assert code == 1 and text.count("SLOWER") == 2
    code, text = compare(old, lines(tmp_path / "fast.jsonl", ours=0.5, seed=1))
    assert code == 0 and text.count("faster") == 2


def test_a_tenth_within_the_noise_is_not(tmp_path):
    old = lines(tmp_path / "old.jsonl", noise=0.2, rounds=4)
    new = lines(tmp_path / "new.jsonl", noise=0.2, rounds=4)
    rows = [json.loads(line) for line in new.read_text().splitlines()]
    for row in rows:
        if row["provider"] == "csq":
            row["seconds"] = {name: 1.1 * value for name, value in row["seconds"].items()}
    new.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert compare(old, new)[0] == 0


def test_of_repeated_runs_of_a_commit_the_fastest_counts(tmp_path):
    old, new = lines(tmp_path / "old.jsonl"), lines(tmp_path / "new.jsonl", ours=1.1, seed=1)
    disturbed = lines(tmp_path / "disturbed.jsonl", drift=1.5, noise=0.1).read_text()
    for path, ours in ((old, 1.0), (new, 1.1)):
        earlier = (
            lines(tmp_path / "earlier.jsonl", ours=0.5 * ours)
            .read_text()
            .replace('"rounds"', '"commit": "1", "rounds"')
        )
        path.write_text(earlier + path.read_text() + disturbed)
    code, text = compare(old, new)
    assert code == 1 and text.count("SLOWER") == 2


def test_what_a_copy_lost_is_not_held_against_a_kernel(tmp_path):
    old, new = lines(tmp_path / "old.jsonl"), lines(tmp_path / "new.jsonl", ours=1.2, seed=1)
    for path in (old, new):
        path.write_text(path.read_text().replace('"rounds"', '"copy_bytes_per_second": 50e9, "rounds"'))
    assert compare(old, new)[0] == 1
    new.write_text(new.read_text().replace("50e9", "34e9"))
    code, text = compare(old, new)
    assert code == 0 and "two runs come apart by 3" in text


def test_our_kernels_in_an_opponent_say_nothing_of_the_machine(tmp_path):
    old, new = lines(tmp_path / "old.jsonl"), lines(tmp_path / "new.jsonl", ours=1.1, seed=1)
    for path, slowdown in ((old, 1.0), (new, 1.5)):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        for row in [row for row in rows if row["provider"] == "csq"]:
            seconds = {name: slowdown * value for name, value in row["seconds"].items()}
            rows.append(row | {"provider": "separate", "seconds": seconds})
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, text = compare(old, new)
    assert code == 1 and text.count("SLOWER") == 2 and "separate" not in text


def test_folders(tmp_path):
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        lines(tmp_path / name / "reconstruct.jsonl")
    code, text = compare(tmp_path / "old", tmp_path / "new")
    assert code == 0 and "2 measurements, 0 slower" in text


def test_nothing_in_common(tmp_path):
    other = lines(tmp_path / "new.jsonl")
    other.write_text(other.read_text().replace('"isa": "avx2"', '"isa": "avx512"'))
    assert compare(lines(tmp_path / "old.jsonl"), other)[0] == 2
