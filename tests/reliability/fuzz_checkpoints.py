"""Mutated checkpoints against the reader: ``python tests/reliability/fuzz_checkpoints.py --files 30000 [--seed N]``.

A checkpoint is an archive with a pickle in it. Blind mutations change, cut and insert bytes anywhere; the others take
the archive apart, change the bytes of one entry, drop it or take another's, and put it together with its checksums
right, so that they reach the unpickler and the tensors behind it. Every file must give a state with all of its keys or
end in ``CheckpointError`` with one line, within ``ROOM`` of address space, and the file must stay as it was.
"""

import argparse
import io
import multiprocessing
import random
import resource
import sys
import time
import warnings
import zipfile
from collections import Counter
from pathlib import Path

import record
import torch
from fuzz_packed import folder, spoil

from csq_kernels.train import checkpoint

ROOM = 1 << 30


def valid_file() -> bytes:
    """What a small run writes: tensors of several dtypes, the state of an optimizer, random numbers, results."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.randn(5, 4)).sum().backward()
    optimizer.step()
    state = {
        "phase": "search",
        "step": 7,
        "model": model.state_dict() | {"half": torch.ones(3, dtype=torch.bfloat16)},
        "optimizer": optimizer.state_dict(),
        "search": {"beta": 3.0, "history": [1.0, 2.0]},
        "rng": {"torch": torch.get_rng_state()},
        "results": {"accuracy": 0.5, "best": None},
        "seconds": 1.5,
        "recipe": {"name": "digits", "lr": 0.1},
    }
    with folder() as name:
        checkpoint.save(Path(name), state)
        return (Path(name) / checkpoint.NAME).read_bytes()


def mutate(content: bytes, chance: random.Random) -> bytes:
    if chance.random() < 0.3:
        return spoil(content, chance)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    for _ in range(chance.choice((1, 1, 2))):
        name = chance.choice(list(entries))
        if chance.random() < 0.5:
            name = next(key for key in entries if key.endswith("data.pkl"))
        deed = chance.random()
        if deed < 0.8:
            entries[name] = spoil(entries[name], chance)
        elif deed < 0.9:
            entries[name] = chance.choice(list(entries.values()))
        elif len(entries) > 1:
            del entries[name]
        if not any(key.endswith("data.pkl") for key in entries):
            break
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    return file.getvalue()


def run(files: int, seed: int, show: bool = True) -> Counter[str]:
    """Read so many mutated files; raise where one does what it must not. The counts of what they came to."""
    torch.manual_seed(0)
    valid, counts, chance = valid_file(), Counter[str](), random.Random(seed)
    started = time.monotonic()
    with folder() as name, warnings.catch_warnings():
        # PyTorch warns of archives that are not its own.
        warnings.simplefilter("ignore")
        path = Path(name) / checkpoint.NAME
        path.write_bytes(valid)
        assert checkpoint.load(Path(name)).keys() >= checkpoint.KEYS
        for number in range(files):
            content = mutate(valid, chance)
            path.write_bytes(content)
            try:
                state = checkpoint.load(Path(name))
                assert state.keys() >= checkpoint.KEYS
                counts["loaded"] += 1
            except checkpoint.CheckpointError as error:
                assert len(str(error).splitlines()) == 1, f"file {number} of seed {seed}: {error}"
                counts["refused"] += 1
            except BaseException as error:
                raise AssertionError(f"file {number} of seed {seed}: {type(error).__name__}: {error}") from error
            assert path.read_bytes() == content, f"file {number} of seed {seed}: it was changed"
            if show and (number + 1) % 5000 == 0:
                seconds = time.monotonic() - started
                print(f"seed {seed}: {number + 1:,} files, {dict(counts)}, {seconds:.0f} s", flush=True)
    return counts


def _limit() -> None:
    torch.set_num_threads(1)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ROOM,) * 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=30_000)
    parser.add_argument("--seed", type=int, default=0, help="of the first process; the next have the next")
    parser.add_argument("--processes", type=int, default=1)
    options = parser.parse_args()
    share = -(-options.files // options.processes)
    seeds = range(options.seed, options.seed + options.processes)
    with multiprocessing.get_context("spawn").Pool(options.processes, _limit) as pool:
        counts = sum(pool.starmap(run, [(share, seed) for seed in seeds], chunksize=1), Counter[str]())
    tried = f"{counts.total():,} mutated files: {counts['loaded']:,} loaded, {counts['refused']:,} refused"
    print(tried)
    record.record("checkpoints", tried, failures=0)


if __name__ == "__main__":
    sys.exit(main())
