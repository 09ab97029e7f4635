"""The native module under sanitizers: ``python tests/reliability/sanitize.py address`` or ``thread``.

It is built for the processor alone, with ``CSQ_SANITIZE``, into a folder that comes before the installed package:

- ``address``: AddressSanitizer and UndefinedBehaviorSanitizer; runs the tests of the kernels on every instruction set
  that the processor has, then the fuzz of arguments and of packed files. What they cannot see: reads and writes by the
  intrinsics that take a mask, which GCC does not instrument. For these ``fuzz_arguments.py`` lays tensors against pages
  that cannot be touched. Leaks are not looked for: CPython and PyTorch keep what they made until the process ends.
- ``thread``: ThreadSanitizer; runs ``threads.py``, in which Python's threads share inputs and each has a team for its
  loops. The teams are threads of ``openmp_threads.cpp``, since libgomp's own look like races to it. What it cannot see:
  accesses by PyTorch and CPython themselves, which are not instrumented, and those by intrinsics with a mask.

``--short`` is what ``make sanitize`` and CI run. A command after ``--`` runs in the place of all, such as
``python tests/reliability/fuzz_packed.py`` under AddressSanitizer, which is a line of its own in the records.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import record

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
SANITIZERS = {"address": "address,undefined", "thread": "thread"}
LIBRARIES = {"address": "libasan.so", "thread": "libtsan.so"}
OPTIONS = {
    # A size that no machine has is an error of the allocator and no finding, as without the sanitizer.
    "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1:max_allocation_size_mb=8192",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "history_size=4",
}
# The loader frees the thread-local memory of a thread that ended, and of this end ThreadSanitizer knows nothing.
SUPPRESSIONS = "race:_dl_deallocate_tls"
# What each must find, or it sees nothing at all: a weight written past its end, and one written by two threads at once.
CONTROL = """
import threading, torch
from csq_kernels import _native
kind, size = {kind!r}, 1 << 14
logits, gates, one, weight = torch.zeros(2, 4, size), torch.ones(4), torch.ones(()), torch.empty(size)
places = [t.data_ptr() for t in (logits, gates, one, one, weight[size // 2 if kind == "address" else 0 :])]
rest = (1, 1, size, [0, 1, 2, 3], 4, "float32", False, False, False, 1)
call = lambda: _native.module.reconstruct_forward(*places, *rest)
threads = [threading.Thread(target=lambda: [call() for _ in range(50)]) for _ in range(2)]
for thread in threads: thread.start()
for thread in threads: thread.join()
"""
TRIED = {
    "address": "tests of the kernels on every instruction set, 20,000 sets of arguments, 20,000 packed files",
    "thread": "2,880 calls by 8 threads, each with a team of 3, on every instruction set",
}
CHECKS = {"address": "address and undefined behaviour", "thread": "threads"}
NATIVE_TESTS = ("test_native", "test_ops", "test_bitserial", "test_step", "test_bitplanes")
# What compiles code of its own, or asks which libraries the process has.
LEFT_OUT = "compile or opcheck or openmp_runtime or without_the_module"


def build(kind: str, folder: Path) -> None:
    """The package with its native module under sanitizers."""
    environment = os.environ | {"CSQ_CUDA": "0", "CSQ_SANITIZE": SANITIZERS[kind]}
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder), str(ROOT)]
    subprocess.run(command, check=True, env=environment, cwd=folder)


def run(kind: str, folder: Path, command: list[str], **options: Any) -> int:
    """Run a command with the package of ``folder``; a finding ends it with an error."""
    (folder / "suppressions").write_text(SUPPRESSIONS)
    # The second one too: what it throws goes through the sanitizer, which looks for it at the start.
    names = (LIBRARIES[kind], "libstdc++.so.6")
    libraries = [subprocess.check_output(["gcc", f"-print-file-name={name}"], text=True).strip() for name in names]
    environment = os.environ | OPTIONS | {"PYTHONPATH": str(folder), "LD_PRELOAD": " ".join(libraries)}
    # ThreadSanitizer wants the memory map of a process without random addresses.
    plain = ["setarch", "-R"] if kind == "thread" else []
    environment["TSAN_OPTIONS"] += f":suppressions={folder / 'suppressions'}"
    return subprocess.run([*plain, *command], env=environment, cwd=folder, **options).returncode


def check_control(kind: str, folder: Path) -> None:
    """Raise ``RuntimeError`` unless the sanitizer finds an error that is there."""
    command = [sys.executable, "-c", CONTROL.format(kind=kind)]
    if run(kind, folder, command, stderr=subprocess.DEVNULL) == 0:
        raise RuntimeError(f"expected the {kind} sanitizer to find an error that was put there, got no finding")


def commands(kind: str, short: bool) -> list[list[str]]:
    python = sys.executable
    if kind == "thread":
        return [[python, str(HERE / "threads.py"), "--rounds", "1" if short else "10"]]
    tests = [str(ROOT / "tests" / f"{name}.py") for name in (NATIVE_TESTS[:1] if short else NATIVE_TESTS)]
    options = [
        "-q",
        "-x",
        "--capture=sys",
        "-p",
        "no:cacheprovider",
        "-c",
        str(ROOT / "pyproject.toml"),
        "-k",
        f"not ({LEFT_OUT})",
    ]
    sets, files = ("1000", "500") if short else ("20000", "20000")
    return [
        [python, "-m", "pytest", *options, *tests],
        [python, str(HERE / "fuzz_arguments.py"), "--sets", sets, "--no-record"],
        [python, str(HERE / "fuzz_packed.py"), "--files", files, "--no-record"],
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        usage="%(prog)s [-h] [--short] [--folder FOLDER] {address,thread} [-- COMMAND ...]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("kind", choices=SANITIZERS)
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--folder", type=Path, help="with a package that was built before; default: a new one")
    words = sys.argv[1:]
    before = words.index("--") if "--" in words else len(words)
    options, command = parser.parse_args(words[:before]), words[before + 1 :]
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        if options.folder is None:
            build(options.kind, folder)
        check_control(options.kind, folder)
        # It runs in another folder.
        given = [os.path.abspath(word) if os.path.exists(word) else word for word in command]
        for words in [given] if given else commands(options.kind, options.short):
            status = run(options.kind, folder, words)
            if status:
                sys.exit(status)
    if not options.short and not command:
        record.record(CHECKS[options.kind], TRIED[options.kind], failures=0)


if __name__ == "__main__":
    main()
