"""Children of a process that has imported and warmed up everything: they start at once, and may come to harm."""

import contextlib
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from csq_kernels import cli

CRASHED = 70


def fork(function: Callable[[], object], errors: Path) -> int:
    """Call ``function`` in a child whose standard error goes to the file ``errors``; its process id.

    The child ends with the code of ``SystemExit``, 0 where the function returns, ``CRASHED`` after any other exception.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    code = CRASHED
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        function()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        os._exit(code)


def wait(child: int) -> int:
    """The exit code of a child, or the negative number of the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill(child: int) -> int:
    """SIGKILL; the exit code, which is another one where the child ended before."""
    os.kill(child, signal.SIGKILL)
    return wait(child)


def csq(*arguments: object) -> None:
    """The command ``csq``, in this process."""
    sys.argv = ["csq", *map(str, arguments)]
    cli.main()


def announce(folder: Path, announced: int) -> None:
    """Write a byte to the file descriptor ``announced`` whenever this process does something to a file in ``folder``:
    opens it for writing, brings it to the disk, renames it.
    """
    start, fsync = str(folder), os.fsync

    def hook(event: str, arguments: tuple) -> None:
        for_writing = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax")
        if (for_writing or event == "os.rename") and str(arguments[0]).startswith(start):
            os.write(announced, b".")

    def announced_fsync(file: int) -> None:
        os.write(announced, b".")
        fsync(file)

    sys.addaudithook(hook)
    os.fsync = announced_fsync
