"""What may go wrong around ``csq``: ``python tests/reliability/faults.py``.

Disks that fill up at different moments, folders that cannot be written or vanish, too little memory for a model or for
the thread that decodes an image, values that are not finite, images that break, clocks that jump, output that nobody
reads. Each must end in an exit code and one line that says why, leave a checkpoint that loads, and, once the fault is
gone, resume to the very bits of the undisturbed run.
"""

import argparse
import contextlib
import ctypes
import os
import random
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import children
import kills
import record
import torch

from csq_kernels.commands import FAILED, USAGE
from csq_kernels.train import checkpoint, data, display, running

SMALL = ["epochs.float=1", "epochs.search=1", "epochs.finetune=1", "batch_size=128", "log_every=5"]
SMALL += ["checkpoint.steps=2"]
# The middle of the search: checkpoints of two phases, and not all that is written has been.
MIDDLE = 15
# Of linux/capability.h.
CAPABILITY_VERSION_3, CAP_DAC_OVERRIDE = 0x20080522, 1
# Bytes: every file of a run is cut by one of the first; the others run out at different moments.
FILE_SIZES = (500, 2_000, 4_000, 10_000, 20_000, 100_000, 200_000)
DISK_SIZES = tuple(range(16 << 10, 576 << 10, 56 << 10))


class Bench:
    """A folder, an undisturbed run in it, and the means to start others that are disturbed."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.overrides = SMALL
        # Drawing the page would take longer than the run.
        sys.modules["matplotlib"] = None  # type: ignore[assignment]
        folder.chmod(0o755)
        # Imports everything, so that children need not.
        kills.train("single pass", folder / "warm")
        self.expected = self.undisturbed("whole")

    def undisturbed(self, name: str) -> dict:
        code, errors = self.csq("train", self.folder / name)
        assert code == 0, errors
        return kills.contents(self.folder / name)

    def csq(self, command: str, run: Path, disturb: Callable[[], object] = lambda: None) -> tuple[int, str]:
        """Train or pack ``run`` in a child, after ``disturb`` has been called there; exit code and standard error."""

        def deed() -> None:
            disturb()
            if command == "pack":
                return children.csq("pack", run, "--out", run / "packed.safetensors")
            resume = ["--resume"] if checkpoint.exists(run) else []
            return children.csq("train", "digits_mlp", *self.overrides, "--out", run, *resume)

        code = children.wait(children.fork(deed, self.folder / "errors"))
        return code, (self.folder / "errors").read_text()

    def fails(self, run: Path, disturb: Callable[[], object], message: str, code: int = FAILED) -> None:
        """Train with a fault: it must end with ``code`` and one line that has ``message``."""
        found, errors = self.csq("train", run, disturb)
        assert_line(found, errors, code, message)
        if run.is_dir():
            left = [path.name for path in run.iterdir() if path.suffix == ".tmp"]
            assert not left, f"{errors}left {left}"
            kills.check_whole(run)

    def recovers(self, run: Path) -> None:
        """Train without a fault: it must go on where it was and end as the undisturbed run did."""
        code, errors = self.csq("train", run)
        assert code == 0, errors
        found = kills.difference(self.expected, kills.contents(run))
        assert found is None, f"differs from the undisturbed run in {found}"


def assert_line(found: int, errors: str, code: int, message: str) -> None:
    assert errors.startswith("error: ") and errors.count("\n") == 1, f"expected one line, got {found}: {errors}"
    assert found == code and re.search(message, errors), f"expected {code} and {message}, got {found}: {errors}"


def at_iteration(number: int, deed: Callable[[], object]) -> None:
    """Do something once, in the midst of a run, as soon as ``number`` iterations are over."""
    update, pending = display.PlainDisplay.update, [deed]

    def updated(self: display.PlainDisplay, line: dict) -> None:
        update(self, line)
        if line["iteration"] >= number and pending:
            pending.pop()()

    display.PlainDisplay.update = updated  # type: ignore[method-assign]


def limit(kind: int, amount: int) -> None:
    resource.setrlimit(kind, (amount, resource.getrlimit(kind)[1]))


def limit_memory(spare: int) -> None:
    """Let this process have ``spare`` bytes more than it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit(resource.RLIMIT_AS, pages * os.sysconf("SC_PAGE_SIZE") + spare)


@contextlib.contextmanager
def disk(folder: Path, size: int) -> Iterator[None]:
    """A disk of so many bytes at ``folder``."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", folder], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)
        folder.rmdir()


def files_too_large(bench: Bench, size: int) -> None:
    """The system refuses to write beyond ``size`` bytes of a file, in the midst of a write as on a full disk."""
    run = bench.folder / f"files of {size}"
    bench.fails(run, lambda: limit(resource.RLIMIT_FSIZE, size), "cannot write .*(File too large|failed writing)")
    bench.recovers(run)


def full_disk(bench: Bench, size: int) -> None:
    folder = bench.folder / f"disk of {size}"
    with disk(folder, size):
        run = folder / "run"
        bench.fails(run, lambda: None, "cannot write .*(No space left on device|failed writing)")
        subprocess.run(["mount", "-o", "remount,size=64m", folder], check=True)
        bench.recovers(run)


def _obey_permissions() -> None:
    """Give up what lets root write everywhere, and keep what lets it read the package wherever that lies."""
    header, sets = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0), (ctypes.c_uint32 * 6)()
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.capget(header, sets) == 0, os.strerror(ctypes.get_errno())
    sets[0] &= ~(1 << CAP_DAC_OVERRIDE)  # the first word of the effective ones
    assert libc.capset(header, sets) == 0, os.strerror(ctypes.get_errno())


def read_only_parent(bench: Bench) -> None:
    folder = bench.folder / "read-only"
    folder.mkdir(mode=0o555)
    bench.fails(folder / "run", _obey_permissions, f"cannot write to {folder / 'run'}: .*Permission denied")
    assert not any(folder.iterdir())


def read_only_run(bench: Bench) -> None:
    run = bench.folder / "read-only run"
    bench.fails(run, lambda: at_iteration(MIDDLE, lambda: run.chmod(0o555) or _obey_permissions()), "Permission denied")
    run.chmod(0o555)
    bench.fails(run, _obey_permissions, f"cannot write to {run}: .*Permission denied.*checkpoint in .* stands")
    run.chmod(0o755)
    bench.recovers(run)


def removed_folder(bench: Bench) -> None:
    run = bench.folder / "removed"
    bench.fails(run, lambda: at_iteration(MIDDLE, lambda: shutil.rmtree(run)), f"cannot write {run}.*No such file")
    assert not run.exists()
    bench.recovers(run)


def folder_becomes_a_file(bench: Bench) -> None:
    run = bench.folder / "replaced"

    def replace() -> None:
        run.rename(bench.folder / "moved")
        run.write_text("")

    bench.fails(run, lambda: at_iteration(MIDDLE, replace), "cannot write .*Not a directory")
    run.unlink()
    bench.recovers(bench.folder / "moved")


def memory_for_the_model(bench: Bench) -> None:
    run = bench.folder / "large"
    bench.overrides = [*SMALL, "model.options={width: 2048}"]
    bench.fails(run, lambda: limit_memory(128 << 20), "out of memory: .*allocate")
    bench.overrides = SMALL


def not_finite(bench: Bench) -> None:
    run = bench.folder / "not finite"

    def poison() -> None:
        normalize = data.images.Images.normalize
        data.images.Images.normalize = lambda self, images: normalize(self, images) * torch.nan  # type: ignore

    bench.fails(run, lambda: at_iteration(MIDDLE, poison), "loss is not finite at step", USAGE)
    state = checkpoint.load(run)["model"]
    assert all(values.isfinite().all() for values in state.values()), "a checkpoint holds what is not finite"
    bench.recovers(run)


def weights_not_finite(bench: Bench) -> None:
    """A gradient that is not finite where the loss is."""
    run = bench.folder / "weights not finite"

    def poison() -> None:
        backward = torch.Tensor.backward
        torch.Tensor.backward = lambda self: backward(self * torch.inf)  # type: ignore[method-assign]

    bench.fails(run, lambda: at_iteration(MIDDLE, poison), "(weights are|loss is) not finite at step", USAGE)
    bench.recovers(run)


def jumping_clocks(bench: Bench) -> None:
    chance = random.Random(0)

    def jumps() -> None:
        for name, low in (("time", -1e9), ("monotonic", 0.0)):
            clock, behind = getattr(time, name), [0.0]

            def jumping(clock=clock, behind=behind, low=low) -> float:
                behind[0] += chance.uniform(low, 1e6) if chance.random() < 0.1 else 0.0
                return clock() + behind[0]

            setattr(time, name, jumping)

    run = bench.folder / "clocks"
    code, errors = bench.csq("train", run, jumps)
    assert code == 0, errors
    bench.recovers(run)


def nobody_reads(bench: Bench) -> None:
    """As in ``csq train ... | head -1``."""
    run = bench.folder / "unread"

    def close() -> None:
        reading, writing = os.pipe()
        os.dup2(writing, 1)
        os.close(reading)

    code, errors = bench.csq("train", run, close)
    assert code == FAILED and not errors, f"expected to end in silence as other commands do, got {code}: {errors}"
    bench.recovers(run)


def _images(folder: Path) -> Path:
    """A data set of images in folders."""
    import numpy as np
    from PIL import Image

    chance = np.random.default_rng(0)
    for part, count in (("train", 256), ("val", 4)):
        for label in range(2):
            (folder / part / f"class{label}").mkdir(parents=True)
            for number in range(count // 2):
                pixels = chance.integers(0, 256, (18, 18, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / part / f"class{label}" / f"{number:03}.png")
    return folder


def image_workers(bench: Bench) -> None:
    """An image that needs more memory than there is, and one that breaks: in threads, while the network trains."""
    from PIL import Image

    images = _images(bench.folder / "images")
    victim = images / "train" / "class0" / "007.png"
    whole = victim.read_bytes()
    options = ["data.name=imagenet", f"data.root={images}", "data.size=16", "data.workers=2", "model.name=mlp"]
    usual, bench.overrides = (bench.expected, bench.overrides), [*SMALL, *options, "epochs.search=4", "log_every=1"]
    bench.expected = bench.undisturbed("images whole")

    def enlarge() -> None:
        Image.new("RGB", (9000, 9000)).save(victim)
        limit_memory(96 << 20)

    run = bench.folder / "large image"
    bench.fails(run, lambda: at_iteration(3, enlarge), "out of memory")
    victim.write_bytes(whole)
    bench.recovers(run)
    run = bench.folder / "broken image"
    bench.fails(run, lambda: at_iteration(3, lambda: victim.write_bytes(whole[:200])), f"expected {victim} to", USAGE)
    victim.write_bytes(whole)
    bench.recovers(run)
    bench.expected, bench.overrides = usual


def packing(bench: Bench) -> None:
    """A packed file that cannot be written leaves the one that stands."""
    run = bench.folder / "whole"
    file = run / "packed.safetensors"
    shutil.copy(run / running.PACKED, file)
    before = file.read_bytes()
    faults: list[Callable[[], object]] = [
        lambda: limit(resource.RLIMIT_FSIZE, 2000),
        lambda: run.chmod(0o555) or _obey_permissions(),
    ]
    for fault, message in zip(faults, ("File too large", "Permission denied"), strict=True):
        assert_line(*bench.csq("pack", run, fault), FAILED, f"cannot write {file}: .*{message}")
        assert file.read_bytes() == before and not list(run.glob("*.tmp"))
    run.chmod(0o755)
    file.unlink()


FAULTS: dict[str, Callable[[Bench], None]] = {
    **{f"files of {size} bytes": lambda b, s=size: files_too_large(b, s) for size in FILE_SIZES},
    **{f"disk of {size} bytes": lambda b, s=size: full_disk(b, s) for size in DISK_SIZES},
    "read-only parent": read_only_parent,
    "read-only run": read_only_run,
    "removed folder": removed_folder,
    "folder becomes a file": folder_becomes_a_file,
    "memory for the model": memory_for_the_model,
    "data not finite": not_finite,
    "gradient not finite": weights_not_finite,
    "jumping clocks": jumping_clocks,
    "nobody reads": nobody_reads,
    "image workers": image_workers,
    "packing": packing,
}


def run(names: list[str]) -> list[str]:
    """Try the faults with these names; what went wrong."""
    torch.set_num_threads(1)
    failures = []
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        for name in names:
            started = time.monotonic()
            try:
                FAULTS[name](bench)
            except AssertionError as error:
                failures.append(f"{name}: {error}")
            print(f"{name}: {time.monotonic() - started:.0f} s, {len(failures)} failures", flush=True)
    return failures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=FAULTS, help="Try these and keep no record.")
    options = parser.parse_args()
    failures = run(options.only or list(FAULTS))
    print("\n".join(failures))
    if not options.only:
        tried = f"{len(FAULTS)} faults: full disks, folders, memory, values, images, clocks, each resumed after"
        record.record("faults", tried, len(failures))
    return len(failures)


if __name__ == "__main__":
    sys.exit(main())
