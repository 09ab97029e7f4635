"""Files that are either whole or not there."""

import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def remove_left_over(folder: Path) -> None:
    """Remove what processes killed in ``write_atomically`` left in ``folder``, where no other may be writing."""
    for path in folder.glob(f"*.{'[0-9a-f]' * 12}.tmp"):
        path.unlink(missing_ok=True)


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Call ``write(file)`` on a temporary file next to ``path`` and put it in place once it is safely on the disk.

    Several processes may write one path at once: the last to finish wins, and no reader ever sees a mixture.
    """
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        with open(temporary, "xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text_atomically(path: Path, text: str) -> None:
    """``write_atomically`` of a text in UTF-8."""
    write_atomically(path, lambda file: file.write(text.encode()))
