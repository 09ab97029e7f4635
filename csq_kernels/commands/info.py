"""``csq info``."""

from __future__ import annotations

import json
from typing import Annotated

import typer


def info(as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False):
    """Say what this installation consists of and which backend serves each operation, and why.

    Examples:

      csq info

      csq info --json
    """
    import csq_kernels

    content = csq_kernels.info()
    if as_json:
        print(json.dumps(content, indent=2))
        return
    operations = content.pop("ops")
    width = max(map(len, content))
    for key, value in content.items():
        shown = ", ".join(map(str, value)) if isinstance(value, list) else value
        print(f"{key:<{width}}  {'none' if shown in (None, '') else shown}")
    for choice in operations:
        why = f" ({'; '.join(choice['missing'])})" if choice["missing"] else ""
        print(f"{choice['op']} on {choice['device']}: {choice['backend']}{why}")
