"""The package as a whole: who imports whom, what an import touches, what is left without the native module."""

import ast
import doctest
import json
import re
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import csq_kernels
from csq_kernels import backends, bitplanes, functional, reference, table
from csq_kernels._ops import CHECKS, SCHEMAS
from csq_kernels.nn import pack, packed

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "csq_kernels"

# Who stands on whom, lowest first; a module may import its own rank and those below. ``__init__`` is the shop window.
RANKS = [
    {"bitplanes", "_interpreter", "_native", "files", "table"},
    {"_ops", "step"},
    {"reference", "reference_step", "backends"},
    {"functional"},
    {"nn"},
    {"workload"},
    {"budget", "layer_times", "optim", "report", "packed", "packed_header"},
    {"search"},
    {"train", "commands", "cli", "integrations", "__init__"},
]
RANK = {name: rank for rank, names in enumerate(RANKS) for name in names}
# info() reports the choices of the backends: it looks upward when it is called, never at import.
UPWARD_WHEN_CALLED = {("_native", "backends")}
MODULES = sorted(PACKAGE.rglob("*.py"))
INSTALLED = Path(csq_kernels.__file__).parent


def part_of(path: Path) -> str:
    """The first name below ``csq_kernels``: what ``RANKS`` orders."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(tree: ast.AST, path: Path) -> Iterator[tuple[str, ast.stmt]]:
    """Absolute dotted names that a file imports, wherever in it; ``from a import b`` counts as ``a.b``."""
    package = ("csq_kernels", *path.relative_to(PACKAGE).parts[:-1])
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = [*package[: len(package) - node.level + 1]] if node.level else []
            base += node.module.split(".") if node.module else []
            yield from ((".".join([*base, alias.name]), node) for alias in node.names)


def test_every_part_has_a_rank() -> None:
    assert {part_of(path) for path in MODULES} <= set(RANK)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_imports_upward(path: Path) -> None:
    tree = ast.parse(path.read_text())
    importer = part_of(path)
    for name, statement in imports(tree, path):
        top, _, below = name.partition(".")
        if top != "csq_kernels":
            continue
        imported = below.split(".")[0]
        if imported not in RANK:  # ``import csq_kernels`` or a public name from it
            imported = "__init__"
        if (importer, imported) in UPWARD_WHEN_CALLED and statement not in tree.body:
            continue
        assert RANK[imported] <= RANK[importer], f"line {statement.lineno}: {importer} imports {name}"


@pytest.mark.parametrize("path", sorted((PACKAGE / "nn").rglob("*.py")), ids=lambda path: path.name)
def test_nn_names_no_backend(path: Path) -> None:
    for name, statement in imports(ast.parse(path.read_text()), path):
        assert not {"backends", "_native", "_C", "triton"} & set(name.split(".")), f"line {statement.lineno}: {name}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_environment_is_read_in_two_places(path: Path) -> None:
    if path in (PACKAGE / "_native.py", PACKAGE / "backends" / "__init__.py"):
        return
    names = {"environ", "environb", "getenv", "getenvb"}
    for node in ast.walk(ast.parse(path.read_text())):
        used = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else None
        assert used not in names, f"line {node.lineno} reads the environment"
    assert not names & {name.split(".")[-1] for name, _ in imports(ast.parse(path.read_text()), path)}


SOURCES = sorted(path for path in (ROOT / "csrc").rglob("*") if path.suffix in {".h", ".cpp", ".cu", ".cuh"})


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT / "csrc")))
def test_csrc_knows_neither_torch_nor_python(path: Path) -> None:
    included = re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)', path.read_text(), flags=re.MULTILINE)
    assert not [name for name in included if re.match(r"(torch|ATen|c10|pybind11|numpy)/|Python\.h", name)]


def test_python_folder_holds_nothing_importable() -> None:
    assert not list((ROOT / "python").rglob("*.py"))


def run(program: str) -> str:
    """What ``program`` prints in an interpreter of its own."""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=INSTALLED.parent)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_touches_no_gpu_and_no_network() -> None:
    run("""
import socket

def refuse(*args, **kwargs):
    raise AssertionError("the import opened a socket")

socket.socket.__init__ = socket.getaddrinfo = refuse

import csq_kernels, sys, torch
assert not torch.cuda.is_initialized()
assert "triton" not in sys.modules, "the import loads Triton"
csq_kernels.info()
assert not torch.cuda.is_initialized()
""")


def test_without_the_native_module_the_reference_serves() -> None:
    printed = run("""
import sys
sys.modules["csq_kernels._C"] = None
import torch
import csq_kernels
from csq_kernels import backends, reference

logits, vectors = torch.randn(2, 3, 5), (torch.randn(3), torch.tensor(0.7), torch.tensor(30.0))
weight = csq_kernels.functional.reconstruct(logits.requires_grad_(), *vectors)
weight.sum().backward()
assert torch.equal(weight, reference.reconstruct(logits, *vectors, [0, 1, 2], 3, 0, False))
assert logits.grad.isfinite().all()

info = csq_kernels.info()
assert info["isa"] is None and "native module" in info["native"], info
for op in info["ops"]:
    if op["device"] == "cpu":
        assert op["backend"] == "reference", op
        assert any("native module" in reason for reason in op["missing"]), op
print("served")
""")
    assert printed == "served\n"


def test_forcing_a_backend_that_is_missing_fails() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from csq_kernels import backends; backends.choices()"],
        capture_output=True,
        text=True,
        cwd=INSTALLED.parent,
        env={"CSQ_BACKEND": "nonsense"},
    )
    assert done.returncode != 0 and "expected CSQ_BACKEND" in done.stderr and "got 'nonsense'" in done.stderr


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_forced_backend_serves_where_it_can(backend: str) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
    program = "import json; from csq_kernels import info; print(json.dumps(info()))"
    environment = {"CSQ_BACKEND": backend}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=INSTALLED.parent, env=environment
    )
    info = json.loads(done.stdout)
    assert info["forced_backend"] == backend
    served = {choice["backend"] for choice in info["ops"] if choice["device"] == "cuda"}
    assert served == {backend}
    on_the_cpu = {choice["backend"] for choice in info["ops"] if choice["device"] == "cpu"}
    assert (on_the_cpu == {"reference"}) == (backend == "reference" or info["isa"] is None)


@pytest.mark.parametrize("op", SCHEMAS)
def test_every_op_is_complete(op: str) -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"csq::{op}", "Meta"), "no fake"
    assert callable(CHECKS[op]) and callable(getattr(reference, op))
    assert {(choice.op, choice.device) for choice in backends.choices()} >= {(op, "cpu"), (op, "cuda")}
    assert all(argument.alias_info is None for argument in getattr(torch.ops.csq, op).default._schema.arguments)


def test_no_check_is_without_an_op() -> None:
    assert CHECKS.keys() == SCHEMAS.keys()


def test_public_names_exist_and_say_what_they_are() -> None:
    for name in csq_kernels.__all__:
        assert getattr(csq_kernels, name).__doc__, name


@pytest.mark.parametrize("module", [functional, bitplanes, table, pack, packed], ids=lambda module: module.__name__)
def test_examples_in_the_docstrings_run(module: types.ModuleType) -> None:
    results = doctest.testmod(module)
    assert results.attempted > 0 and results.failed == 0
