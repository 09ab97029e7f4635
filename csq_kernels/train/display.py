"""What ``csq train`` shows: a progress bar on a terminal, plain lines elsewhere."""

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from csq_kernels.train.running import Display

# Without a terminal, a line at the end of every epoch, and at least this often in long ones.
_SECONDS_BETWEEN_LINES = 10.0


def describe(record: dict[str, Any]) -> str:
    """Phase, losses, accuracies, bits and distance from the budget of a line of metrics.jsonl."""
    parts = [f"{record['phase']:<8}", f"loss {record['loss']:.4f}", f"train {record['train_accuracy']:.2%}"]
    if "test_accuracy" in record:
        parts.append(f"test {record['test_accuracy']:.2%} loss {record['test_loss']:.4f}")
    if "hard_accuracy" in record:
        parts.append(f"hard {record['hard_accuracy']:.2%}")
    if "stored_bits" in record:
        unit = record["budget"].partition(" ")[2]
        parts.append(f"bits {record['paper_bits']:.2f} paper {record['stored_bits']:.2f} stored")
        parts.append(f"budget gap {record['gap']:+.2f} {unit}")
    return "  ".join(parts)


class PlainDisplay(Display):
    """One line an epoch."""

    def __init__(self, console: Console):
        self._console = console
        self._printed = 0.0
        self._warned: set[str] = set()

    def __enter__(self):
        return self

    def __exit__(self, *exception) -> None:
        pass

    def note(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def update(self, record: dict[str, Any]) -> None:
        self._warn(record)
        if "test_accuracy" in record or time.monotonic() - self._printed > _SECONDS_BETWEEN_LINES:
            self._printed = time.monotonic()
            position = f"{record['iteration']:>6}/{record['total_iterations']}"
            self.note(f"{position}  {record['seconds']:7.1f} s  {describe(record)}")

    def _warn(self, record: dict[str, Any]) -> None:
        for warning in record.get("warnings", []):
            # The numbers in a warning change from epoch to epoch; one line a layer is enough.
            layer = warning.partition(":")[0]
            if layer not in self._warned:
                self._warned.add(layer)
                self.note(f"warning: {warning}")


class LiveDisplay(PlainDisplay):
    """A bar with the newest figures."""

    def __init__(self, console: Console):
        super().__init__(console)
        columns = (BarColumn(20), TaskProgressColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
        self._progress = Progress(*columns, console=console)
        self._task = self._progress.add_task("starting", total=None)

    def __enter__(self):
        self._progress.start()
        return self

    def __exit__(self, *exception) -> None:
        self._progress.stop()

    def update(self, record: dict[str, Any]) -> None:
        self._warn(record)
        self._progress.update(
            self._task, completed=record["iteration"], total=record["total_iterations"], description=describe(record)
        )


def make(console: Console) -> PlainDisplay:
    """The display that suits the console."""
    return LiveDisplay(console) if console.is_terminal else PlainDisplay(console)
