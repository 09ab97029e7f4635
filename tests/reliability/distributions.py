"""The sdist and the wheel as users get them: ``python tests/reliability/distributions.py``.

Both are built by ``python -m build`` from what git holds at HEAD, checked by ``twine check --strict``, and must hold
exactly the files that they should. Then a clean virtual environment receives, in turn, the wheel, the sdist with
``CSQ_CUDA=0`` and the sdist where there is no C++ compiler, and each installation has to pass ``SMOKE``.
"""

import io
import os
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

import record

ROOT = Path(__file__).parents[2]
TOOLS = ("build", "twine")
# For what pip installs and, under one name or the other, for what it builds with.
PINS = dict.fromkeys(("PIP_CONSTRAINT", "PIP_BUILD_CONSTRAINT"), (ROOT / "constraints.txt").as_uri())
# What an installation builds itself from, beside the folders of sources.
SDIST_FILES = {"CMakeLists.txt", "LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.py"}
SDIST_FOLDERS = ("csq_kernels", "csrc", "python")
# What setuptools writes.
SDIST_METADATA = {"PKG-INFO", "setup.cfg"}
# Its argument says whether the native module is expected.
SMOKE = """
import sys
import torch
import csq_kernels
from csq_kernels import functional, reference

assert "site-packages" in csq_kernels.__file__, csq_kernels.__file__
native = csq_kernels.info()["isa"] is not None
assert native == (sys.argv[1] == "native"), csq_kernels.info()
torch.manual_seed(0)
inputs = torch.randn(2, 5, 37, 29), torch.randn(5), torch.tensor(0.7), torch.tensor(3.0)
weight = functional.reconstruct(*inputs)
exact = reference.reconstruct(*(tensor.double() for tensor in inputs), list(range(5)), 5, 0, False)
torch.testing.assert_close(weight.double(), exact, rtol=1e-5, atol=1e-6)
model = torch.nn.Sequential(torch.nn.Linear(29, 7))
csq_kernels.prepare_(model)
csq_kernels.finalize_(model)
expected = model(torch.ones(1, 29))
csq_kernels.pack_(model)
torch.testing.assert_close(model(torch.ones(1, 29)), expected)
"""


def tracked() -> set[str]:
    """The files that git tracks."""
    listed = subprocess.run(["git", "-C", str(ROOT), "ls-files"], check=True, capture_output=True, text=True)
    return set(listed.stdout.split("\n")) - {""}


def check_sdist(path: Path, files: set[str]) -> int:
    """Raise unless the sdist holds exactly what it needs of the tracked ``files``; how many files it holds."""
    with tarfile.open(path) as archive:
        found = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    found = {name for name in found - SDIST_METADATA if not name.startswith("csq_kernels.egg-info/")}
    _check_equal(path, found, SDIST_FILES | {name for name in files if name.startswith(_in(SDIST_FOLDERS))})
    return len(found)


def check_wheel(path: Path, files: set[str]) -> int:
    """Raise unless the wheel holds exactly the package and its native module; how many files it holds."""
    found = {name for name in zipfile.ZipFile(path).namelist() if ".dist-info/" not in name}
    natives = {name for name in found if name.startswith("csq_kernels/_C.") and name.endswith(".so")}
    if len(natives) != 1:
        raise AssertionError(f"expected {path.name} with one native module, got {sorted(natives)}")
    _check_equal(path, found - natives, {name for name in files if name.startswith("csq_kernels/")})
    return len(found)


def _in(folders: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"{folder}/" for folder in folders)


def _check_equal(path: Path, found: set[str], expected: set[str]) -> None:
    if found != expected:
        missing, surplus = sorted(expected - found), sorted(found - expected)
        raise AssertionError(f"{path.name} lacks {missing or 'nothing'} and holds {surplus or 'nothing'} by accident")


class Environment:
    """A new virtual environment."""

    def __init__(self, folder: Path):
        venv.create(folder, with_pip=True)
        self.folder = folder
        self.bin = folder / "bin"
        # Neither the compiled files of packages nor what this process inherited belong to the question.
        self.variables = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "CSQ_CUDA")}

    def run(self, *command: str, **variables: str) -> None:
        """Run a program of the environment, away from the sources."""
        environment = {**self.variables, **variables}
        subprocess.run([str(self.bin / command[0]), *command[1:]], check=True, cwd=self.folder, env=environment)

    def pip(self, *arguments: str, **variables: str) -> None:
        self.run("python", "-m", "pip", "--disable-pip-version-check", "-q", *arguments, **PINS, **variables)

    def smoke(self, expected: str) -> None:
        self.run("python", "-c", SMOKE, expected)
        self.run("csq", "info")


def build(tools: Environment, source: Path) -> tuple[Path, Path]:
    """The sdist of a folder, and the wheel made of that sdist."""
    tools.run("python", "-m", "build", str(source), **PINS)
    [sdist], [wheel] = (source / "dist").glob("*.tar.gz"), (source / "dist").glob("*.whl")
    tools.run("twine", "check", "--strict", str(sdist), str(wheel))
    return sdist, wheel


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        archive = subprocess.run(["git", "-C", str(ROOT), "archive", "HEAD"], check=True, capture_output=True).stdout
        with tarfile.open(fileobj=io.BytesIO(archive)) as clone:
            clone.extractall(work / "source", filter="data")
        tools = Environment(work / "tools")
        tools.pip("install", *TOOLS)
        sdist, wheel = build(tools, work / "source")
        files = tracked()
        counts = check_sdist(sdist, files), check_wheel(wheel, files)

        user = Environment(work / "user")
        user.pip("install", "--no-compile", f"{wheel}[train]")
        user.smoke("native")
        for expected, variables in (("native", {"CSQ_CUDA": "0"}), ("none", {"CXX": str(work / "no-compiler")})):
            user.pip("uninstall", "-y", "csq_kernels")
            user.pip("install", "--no-deps", str(sdist), **variables)
            user.smoke(expected)
    tried = f"sdist of {counts[0]} files, wheel of {counts[1]}, 3 installations in clean environments"
    print(tried)
    record.record("distributions", tried, failures=0)


if __name__ == "__main__":
    sys.exit(main())
