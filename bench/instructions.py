"""Instructions of the CPU kernels, counted by valgrind's callgrind, which a busy machine does not disturb.

``python bench/instructions.py`` counts what each call of ``native_calls.py`` executes of the native module and compares
with ``results/instructions.json``. Exit code 1: a count is off by more than ``TOLERANCE``; ``--write`` accepts the new
ones. Counts of another compiler are not comparable: exit code 2, as without valgrind.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import native_calls

from csq_kernels import _native

COMMITTED = Path(__file__).parent / "results" / "instructions.json"
TOLERANCE = 0.02
# Where counting begins and ends; none of these calls another. The backward pass is counted below its entry, to which
# the step's sums jump: valgrind sees calls alone.
ENTRY_POINTS = (
    "csq::cpu::reconstruct_forward(*)",
    "csq::cpu::Reconstruct<*>::backward(*)",
    "csq::cpu::step_scale_sums(*)",
    "csq::cpu::step_update(*)",
    "csq::cpu::tile_planes(*)",
    "csq::cpu::bitserial_weight(*)",
    "csq::cpu::bitserial_linear(*)",
    "csq::cpu::bitserial_conv2d(*)",
)
# Called after each call, where a profile ends and the next begins.
MARK = "csq::cpu::read_pass(*)"

Counts = dict[str, int]


def compiler() -> str:
    """What made the kernels' instructions: the C++ compiler, its version, and the kind of processor."""
    return f"{_native.module.compiler.partition(',')[0]}, {platform.machine()}"


def missing(committed: dict[str, Any]) -> str | None:
    """Why no counts can be compared here."""
    if _native.module is None:
        return _native.reason
    if shutil.which("valgrind") is None:
        return "valgrind is not on PATH"
    if absent := set(native_calls.ISAS) - set(_native.module.supported_isas()):
        return f"this processor lacks {', '.join(absent)}"
    if compiler() != committed["compiler"]:
        return f"the committed counts are of {committed['compiler']}, the kernels of {compiler()}"
    return None


def count() -> Counts:
    """Instructions by instruction set and call."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["valgrind", "--tool=callgrind", f"--callgrind-out-file={folder}/calls", f"--dump-before={MARK}"]
        command += ["--compress-strings=no", "--compress-pos=no"]
        command += [f"--toggle-collect={entry}" for entry in ENTRY_POINTS]
        command += [sys.executable, "-S", "-E", native_calls.__file__, _native.module.__file__]
        done = subprocess.run(command, env=os.environ | {"LD_BIND_NOW": "1"}, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"expected the calls to end well under valgrind, got:\n{done.stderr}")
        names = done.stdout.splitlines()
        # calls.1, calls.2, ...: what was counted up to each mark, two of which belong to a name.
        dumps = sorted(Path(folder).glob("calls.*"), key=lambda path: int(path.suffix[1:]))
        if len(dumps) != 2 * len(names):
            raise RuntimeError(
                f"expected {2 * len(names)} profiles, got {len(dumps)}: has the module lost its symbols?"
            )
        return {name: instructions(dump) for name, dump in zip(names, dumps[1::2], strict=True)}


def instructions(profile: Path) -> int:
    """Those of the native module itself: what the C library and OpenMP take depends on the state of the heap."""
    total, ours, lines = 0, False, iter(profile.read_text().splitlines())
    for line in lines:
        if line.startswith("ob="):
            ours = line == f"ob={_native.module.__file__}"
        elif line.startswith("calls="):
            next(lines)  # the costs of the callee
        elif ours and line[:1].isdigit():
            total += int(line.split()[1])
    return total


def complaints(found: Counts, committed: Counts) -> list[str]:
    """A line for each count that is new, gone, or off by more than ``TOLERANCE``."""
    lines = []
    for name in dict.fromkeys([*committed, *found]):
        before, now = committed.get(name), found.get(name)
        if before is None or now is None:
            lines.append(f"{name}: expected {before or 'none'}, got {now or 'none'}")
        elif abs(now / before - 1) > TOLERANCE:
            lines.append(f"{name}: expected {before:,} instructions, got {now:,}, {now / before - 1:+.1%}")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write what is counted, to be committed")
    options = parser.parse_args()
    committed = json.loads(COMMITTED.read_text()) if COMMITTED.exists() else {}
    if options.write:
        COMMITTED.write_text(json.dumps({"compiler": compiler(), "counts": count()}, indent=1) + "\n")
        return 0
    if reason := missing(committed):
        print(reason)
        return 2
    found = complaints(count(), committed["counts"])
    print("\n".join(found) or f"{len(committed['counts'])} counts are as committed")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
