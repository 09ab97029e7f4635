"""The sub-commands of ``csq``, a module for each subject, and what they share: exit codes, one line for a failure."""

import sys

import typer

INSTALL = 'pip install "csq_kernels[train]"'
# Exit codes, besides 0.
FAILED, USAGE, TIME_UP, INTERRUPTED = 1, 2, 3, 130


def fail(message: str, code: int) -> typer.Exit:
    """Print one line and return what to raise."""
    print(f"error: {message}", file=sys.stderr)
    return typer.Exit(code)


def missing(error: ImportError) -> typer.Exit:
    """As ``fail``, for a package that is not installed."""
    return fail(f"{error}; this command needs more packages: {INSTALL}", FAILED)
