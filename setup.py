"""Builds csq_kernels._C with CMake and Ninja; everything else about the package is in pyproject.toml.

Environment: ``CSQ_CUDA`` = auto (default: compile the CUDA kernels if nvcc is found and works), 0 (never) or 1 (fail
without them); ``CSQ_CUDA_ARCHS`` = architectures, default ``80;90a;100``; ``CSQ_SANITIZE`` = sanitizers for tests of
the module, ``address,undefined`` or ``thread``; ``tests/reliability/sanitize.py`` builds and runs both.
"""

import os
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
CUDA = os.environ.get("CSQ_CUDA", "auto")
if CUDA not in ("auto", "0", "1"):
    raise SystemExit(f"expected CSQ_CUDA as auto, 0 or 1, got {CUDA!r}")


class CMakeBuild(build_ext):
    """Run CMake in a new folder each time: an old one remembers the ninja of an isolated environment that is gone."""

    def build_extension(self, ext: Extension) -> None:
        if CUDA == "auto":
            try:
                return self.run_cmake(ext, "auto")
            except (CompileError, subprocess.CalledProcessError) as error:
                print(f"csq_kernels: building with CUDA failed, trying without: {error}", flush=True)
        self.run_cmake(ext, "0" if CUDA == "auto" else CUDA)

    def run_cmake(self, ext: Extension, cuda: str) -> None:
        """Configure, which fails with ``CompileError`` where there is no compiler; then build, which has to succeed."""
        # cmake and ninja may be installed in a virtual environment that is not active.
        path = os.pathsep.join((sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)))
        environment = {**os.environ, "PATH": path}
        Path(self.build_temp).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=Path(self.build_temp).resolve()) as folder:
            configure = [
                *("cmake", "-G", "Ninja", "-S", str(ROOT), "-B", folder),
                f"-DPython_EXECUTABLE={sys.executable}",
                f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
                f"-DCMAKE_INSTALL_PREFIX={Path(self.get_ext_fullpath(ext.name)).resolve().parent}",
                f"-DCSQ_CUDA={cuda}",
                f"-DCSQ_CUDA_ARCHS={os.environ.get('CSQ_CUDA_ARCHS', '')}",
                f"-DCSQ_SANITIZE={os.environ.get('CSQ_SANITIZE', '')}",
            ]
            try:
                subprocess.run(configure, check=True, env=environment)
            except FileNotFoundError as error:
                raise CompileError("the native module was not built: cmake was not found") from error
            except subprocess.CalledProcessError as error:
                raise CompileError("the native module was not built: cmake says above what it lacks") from error
            subprocess.run(["cmake", "--build", folder, "--target", "install"], check=True, env=environment)


setup(
    # Without a compiler the package still installs: the reference implementation then serves every op, and says why.
    ext_modules=[Extension("csq_kernels._C", sources=[], optional=CUDA != "1")],
    cmdclass={"build_ext": CMakeBuild},
)
