"""Mutated packed files against the reader: ``python tests/reliability/fuzz_packed.py --files 1000000 [--seed N]``.

Half of the mutations are blind: bits, bytes, cuts, insertions. The others take the header apart, change values in it
and put it together with its length and digest right, so that they reach the checks behind those. Every file must load
or end in ``PackedFileError``, within ``ROOM`` of address space and, of every ``SAMPLE``-th, within ``PEAK`` of Python's
memory; a file that loads must give a network that runs, and one that is refused must leave the network as it was.
"""

import argparse
import contextlib
import copy
import hashlib
import json
import multiprocessing
import os
import random
import resource
import struct
import sys
import tempfile
import time
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import record
import torch
from torch import nn

import csq_kernels as csq
from csq_kernels import packed, packed_header

# A header may take a megabyte to parse (``packed_header.longest``); the files here have a few thousand bytes.
PEAK = 2 << 20
# Tracing memory takes as long as the reader does.
SAMPLE = 16
ROOM = 256 << 20
_VALUES: list[Any] = [0, 1, -1, 2, 7, 8, 63, 64, 255, 2**31, 2**32, 2**63 - 1, 2**63, 2**200, -(2**63), 0.5, 1e308]
_VALUES += [
    True,
    False,
    None,
    "",
    "F32",
    "U8",
    "I64",
    "BOOL",
    "PackedLinear",
    "PackedConv2d",
    "\u0000",
    [],
    {},
    [0],
    "a",
]


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 4), nn.Linear(4, 2))


def inputs() -> torch.Tensor:
    return torch.zeros(1, 1, 4, 4)


def valid_file() -> bytes:
    """A small packed network with a gap in its bits, a quantized input and a bias."""
    torch.manual_seed(0)
    model = network()
    csq.prepare_(model, csq.Config(n_bits=5, rules={"3": {"act_bits": 4}}))
    with torch.no_grad():
        model[3].gate_logits[2] = -1.0
        model(inputs() + torch.randn(1, 1, 4, 4))
    csq.finalize_(model)
    csq.pack_(model.eval())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "valid"
        csq.save_packed(model, path, {"model": "mlp"})
        return path.read_bytes()


def split(content: bytes) -> tuple[dict[str, Any], dict[str, Any], bytes]:
    """The header, the metadata within it, and the tensors."""
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    return header, json.loads(header.pop("__metadata__")["csq"]), content[8 + length :]


def join(header: dict[str, Any], metadata: dict[str, Any], tensors: bytes) -> bytes:
    """A file whose length and digest are right, whatever the header says."""

    def compact(value: Any) -> str:
        return json.dumps(value, separators=(",", ":"), ensure_ascii=False)

    metadata = {"sha256": "0" * 64, **{key: value for key, value in metadata.items() if key != "sha256"}}
    text = compact({"__metadata__": {"csq": compact(metadata)}, **header}).encode("utf-8", "surrogatepass")
    text += b" " * (-len(text) % 8)
    start = struct.pack("<Q", len(text)) + text
    digest = hashlib.sha256(start).hexdigest().encode()
    at = packed_header._DIGEST
    return start[: at.start] + digest + start[at.stop :] + tensors


def change_value(tree: Any, chance: random.Random) -> Any:
    """The tree with one value in it replaced, dropped, doubled, moved a little or renamed."""
    if isinstance(tree, dict) and tree and chance.random() < 0.9:
        key = chance.choice(list(tree))
        deed = chance.random()
        if deed < 0.05:
            return {name: value for name, value in tree.items() if name != key}
        if deed < 0.1:
            return {**tree, chance.choice(["x", key + ".", "__metadata__", "0.planes", "9.scale"]): tree[key]}
        return {name: change_value(value, chance) if name == key else value for name, value in tree.items()}
    if isinstance(tree, list) and tree and chance.random() < 0.9:
        at = chance.randrange(len(tree))
        deed = chance.random()
        if deed < 0.05:
            return tree[:at] + tree[at + 1 :]
        if deed < 0.1:
            return tree[:at] + [tree[at], *tree[at:]]
        return [change_value(value, chance) if i == at else value for i, value in enumerate(tree)]
    if type(tree) is int and chance.random() < 0.7:
        return chance.choice([tree + 1, tree - 1, 2 * tree, -tree, tree ^ (1 << chance.randrange(64))])
    if isinstance(tree, str) and tree and chance.random() < 0.5:
        at = chance.randrange(len(tree))
        return tree[:at] + chance.choice("0afzF \u00e9\ud800") + tree[at + 1 :]
    return chance.choice(_VALUES)


def spoil(content: bytes, chance: random.Random) -> bytes:
    """Bits and bytes changed, cut or put in, and words that may be lengths overwritten, the first one above all."""
    changed = bytearray(content or b"\0")
    for _ in range(chance.choice((1, 1, 2, 8))):
        at = chance.randrange(len(changed))
        deed = chance.randrange(5)
        if deed == 0:
            changed[at] ^= 1 << chance.randrange(8)
        elif deed == 1:
            changed[at] = chance.randrange(256)
        elif deed == 2:
            del changed[at : at + chance.choice((1, 8, 1000))]
        elif deed == 3:
            changed[at:at] = chance.randbytes(chance.choice((1, 8, 100)))
        else:
            start = chance.choice((0, at))
            word = chance.choice((0, 1, 8, len(content), 2**31, 2**31 - 1, 2**63, 2**64 - 1))
            changed[start : start + 8] = struct.pack("<Q", word)
        if not changed:
            break
    return bytes(changed)


def mutate(content: bytes, chance: random.Random) -> bytes:
    if chance.random() < 0.5:
        header, metadata, tensors = split(content)
        for _ in range(chance.choice((1, 1, 1, 2, 4))):
            if chance.random() < 0.5:
                header = change_value(header, chance)
            else:
                metadata = change_value(metadata, chance)
            if not isinstance(header, dict) or not isinstance(metadata, dict):
                return content[: chance.randrange(len(content))]
        with contextlib.suppress(UnicodeEncodeError, ValueError):
            return join(header, metadata, tensors)
    return spoil(content, chance)


def folder() -> "tempfile.TemporaryDirectory[str]":
    """In memory where there is such a place: a disk would take longer than the reader."""
    memory = Path("/dev/shm")
    return tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None)


def run(files: int, seed: int, show: bool = True) -> Counter[str]:
    """Read so many mutated files; raise where one does what it must not. The counts of what they came to."""
    valid, counts, chance = valid_file(), Counter[str](), random.Random(seed)
    started = time.monotonic()
    model = network()
    untouched = copy.deepcopy(model.state_dict())
    with folder() as name:
        path = Path(name) / "mutated"
        for number in range(files):
            content = mutate(valid, chance)
            path.write_bytes(content)
            sampled = number % SAMPLE == 0
            if sampled:
                tracemalloc.start()
            try:
                csq.load_packed(model, path)
                outcome = "loaded"
            except packed.PackedFileError:
                outcome = "refused"
            except BaseException as error:
                raise AssertionError(f"file {number} of seed {seed}: {type(error).__name__}: {error}") from error
            finally:
                peak = tracemalloc.get_traced_memory()[1]
                if sampled:
                    tracemalloc.stop()
            if peak > PEAK:
                raise AssertionError(f"file {number} of seed {seed}: {peak:,} bytes of memory for {len(content):,}")
            if outcome == "loaded":
                model.eval()(inputs())
                model = network()
                untouched = copy.deepcopy(model.state_dict())
            elif sampled:
                torch.testing.assert_close(dict(model.state_dict()), dict(untouched), rtol=0, atol=0)
            counts[outcome] += 1
            if show and (number + 1) % 20000 == 0:
                seconds = time.monotonic() - started
                print(f"seed {seed}: {number + 1:,} files, {dict(counts)}, {seconds:.0f} s", flush=True)
    return counts


def _limit() -> None:
    torch.set_num_threads(1)
    # AddressSanitizer reserves all address space there is.
    if not record.sanitized():
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ROOM,) * 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0, help="of the first process; the next have the next")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--no-record", dest="record", action="store_false")
    options = parser.parse_args()
    share = -(-options.files // options.processes)
    seeds = range(options.seed, options.seed + options.processes)
    with multiprocessing.get_context("spawn").Pool(options.processes, _limit) as pool:
        counts = sum(pool.starmap(run, [(share, seed) for seed in seeds], chunksize=1), Counter[str]())
    tried = f"{counts.total():,} mutated files: {counts['loaded']:,} loaded, {counts['refused']:,} refused"
    print(tried)
    if options.record:
        record.record("packed files", tried, failures=0)


if __name__ == "__main__":
    sys.exit(main())
