"""Threads, processes and interpreters at once: ``python tests/reliability/concurrency.py --seconds 60``.

Many threads share packed networks, and each gets the bits that one thread alone gets; a process reads and runs a packed
file again and again while another, which trains, replaces it; processes by fork and by spawn run every kind of op after
their parent did, on several threads; a sub-interpreter works or says that it does not.
"""

import argparse
import copy
import multiprocessing
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections import Counter
from pathlib import Path

import record
import torch
from torch import Tensor, nn

import csq_kernels as csq
from csq_kernels import functional
from csq_kernels._ops import PRECISIONS

THREADS = 16
# Seconds after which a process that does not end has hung.
PATIENCE = 600


def network() -> nn.Module:
    """Packed layers of several kinds; what lies between them computes element by element, in any number of threads."""
    layers = (nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 6 * 6, 64), nn.ReLU(), nn.Linear(64, 10))
    return nn.Sequential(*layers)


def packed(seed: int, precision: str = "exact") -> nn.Module:
    torch.manual_seed(seed)
    model = network()
    csq.prepare_(model, csq.Config(n_bits=5))
    csq.finalize_(model, budget="4 bits")
    csq.pack_(model.eval())
    csq.set_precision_(model, precision)
    return model


def inputs(number: int) -> Tensor:
    generator = torch.Generator().manual_seed(number)
    return torch.randn(1 + 3 * (number % 6), 3, 8, 8, generator=generator)


@torch.inference_mode()
def share(seconds: float, threads: int = THREADS) -> tuple[int, list[str]]:
    """Forward passes of ``threads`` threads on the same networks; how many there were, and those with other bits."""
    models = {precision: packed(0, precision) for precision in PRECISIONS}
    expected = {(p, number): models[p](inputs(number)) for p in models for number in range(threads)}
    passes, failures, end = [0] * threads, [], time.monotonic() + seconds

    def work(number: int) -> None:
        own = inputs(number)
        with torch.inference_mode():
            while time.monotonic() < end and not failures:
                for precision, model in models.items():
                    if not torch.equal(model(own), expected[precision, number]):
                        failures.append(f"thread {number}: other bits in {precision} after {passes[number]} passes")
                    passes[number] += 1

    workers = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return sum(passes), failures


def _train_and_replace(path: Path, stop) -> None:
    """Train a network, and put one of two others in the place of the packed file after each step."""
    torch.set_num_threads(1)
    model, others = network(), [packed(seed) for seed in range(2)]
    csq.prepare_(model)
    optimizer = csq.optim.SGD(model, lr=0.01)
    number = 0
    while not stop.is_set():
        model(inputs(number)).square().mean().backward()
        optimizer.step()
        number += 1
        csq.save_packed(others[number % 2], path)


def replaced_file(seconds: float) -> tuple[int, list[str]]:
    """Read a file that another process replaces: it is the one network or the other, whole."""
    valid = [packed(seed)(inputs(0)) for seed in range(2)]
    context = multiprocessing.get_context("spawn")
    stop, failures, seen, loads = context.Event(), [], Counter[int](), 0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network"
        csq.save_packed(packed(0), path)
        process = context.Process(target=_train_and_replace, args=(path, stop))
        process.start()
        # The time counts from the first replacement on: starting takes long.
        first, end = path.stat().st_mtime_ns, None
        while end is None or time.monotonic() < end:
            if end is None and (path.stat().st_mtime_ns != first or not process.is_alive()):
                end = time.monotonic() + seconds
            model = network().eval()
            try:
                csq.load_packed(model, path)
            except csq.PackedFileError as error:
                failures.append(str(error))
                break
            output = model(inputs(0))
            found = [i for i, one in enumerate(valid) if torch.equal(output, one)]
            loads += 1
            if not found:
                failures.append("a network that is neither")
                break
            seen[found[0]] += 1
        stop.set()
        process.join()
        if process.exitcode or len(seen) < 2:
            failures.append(f"the process that trains ended with {process.exitcode}, seen were {dict(seen)}")
    return loads, failures


def every_op() -> list[Tensor]:
    """Reconstruction with gradients, a single-pass step, packed layers: large enough for several threads."""
    torch.manual_seed(0)
    layer = csq.CSQLinear(512, 512)
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (layer.bit_logits, layer.gate_logits, layer.scale)]
    weight = functional.reconstruct(*leaves, torch.tensor(3.0))
    weight.backward(torch.ones_like(weight))
    model = nn.Sequential(layer)
    optimizer = csq.optim.AdamW(model, lr=0.01)
    model[0].weight.grad = torch.ones(512, 512)
    optimizer.step()
    hard = copy.deepcopy(model)
    csq.finalize_(hard)
    csq.pack_(hard.eval())
    results = [weight.detach(), *(leaf.grad for leaf in leaves), model[0].weight.detach()]
    with torch.inference_mode():
        for precision in PRECISIONS:
            csq.set_precision_(hard, precision)
            results += [hard(torch.ones(batch, 512)) for batch in (1, 64)]
    return [result.clone() for result in results if result is not None]


def _child(path: Path) -> None:
    torch.save(every_op(), path)


def processes(method: str, threads: int = 4) -> list[str]:
    """Run every op on several threads, then in processes that start by ``method``."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    expected, context, failures = every_op(), multiprocessing.get_context(method), []
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / str(number) for number in range(2)]
        children = [context.Process(target=_child, args=(path,)) for path in paths]
        for child in children:
            child.start()
        for child, path in zip(children, paths, strict=True):
            child.join(PATIENCE)
            if child.is_alive():
                child.kill()
                failures.append(f"{method}: hangs")
            elif child.exitcode:
                failures.append(f"{method}: ended with {child.exitcode}")
            elif not all(map(torch.equal, torch.load(path), expected)):
                failures.append(f"{method}: other bits")
    torch.set_num_threads(before)
    return failures


def interpreters() -> list[str]:
    """Import in a sub-interpreter, alone and after the main one did: it says that it does not work."""
    script = """
        import sys
        try:
            import _interpreters as interpreters
        except ImportError:
            import _xxsubinterpreters as interpreters
        if sys.argv[1] == "after":
            import csq_kernels
        own = interpreters.create()
        try:
            error = interpreters.run_string(own, "import csq_kernels")
        except interpreters.RunFailedError as raised:
            error = raised
        print(error)
    """
    failures = []
    for when in ("alone", "after"):
        command = [sys.executable, "-c", textwrap.dedent(script), when]
        try:
            ended = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, cwd=tempfile.gettempdir())
        except subprocess.TimeoutExpired:
            failures.append(f"a sub-interpreter {when}: hangs")
            continue
        if ended.returncode or "expected the main interpreter" not in ended.stdout:
            failures.append(f"a sub-interpreter {when}: {ended.returncode}, {ended.stdout}{ended.stderr}")
    return failures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    options = parser.parse_args()
    failures = [*processes("fork"), *processes("spawn"), *interpreters()]
    print(failures, flush=True)
    passes, wrong = share(options.seconds)
    print(f"{passes:,} passes", *wrong, flush=True)
    loads, broken = replaced_file(options.seconds)
    print(f"{loads:,} loads", *broken, flush=True)
    failures += wrong + broken
    tried = (
        f"{passes:,} passes of {THREADS} threads on shared networks in {options.seconds:g} s; {loads:,} loads of a "
        "file that a training process replaced; every op after fork and spawn; two sub-interpreters"
    )
    record.record("concurrency", tried, len(failures))
    return len(failures)


if __name__ == "__main__":
    sys.exit(main())
