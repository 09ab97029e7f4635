"""What a finished run left in its folder, read and checked: report, metrics, recipe, environment."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from csq_kernels.train.running import METRICS
from csq_kernels.train.runs import RunError

REPORT, RECIPE, ENVIRONMENT = "report.json", "recipe.yaml", "environment.json"


class _Part(BaseModel):
    """A part of a file, of which other versions may hold more."""

    model_config = ConfigDict(extra="ignore", frozen=True, protected_namespaces=())


class Layer(_Part):
    """As ``csq_kernels.report.LayerReport``."""

    name: str
    shape: tuple[int, ...]
    paper_bits: int
    stored_bits: int
    active: tuple[int, ...]
    bytes: int
    float_bytes: int
    gap: float | None = None
    undecided: float | None = None

    @property
    def weights(self) -> int:
        return math.prod(self.shape)


class BudgetUse(_Part):
    """As ``csq_kernels.report.BudgetReport``."""

    budget: str
    cost: float
    met: bool


class Scheme(_Part):
    """As ``csq_kernels.report.Report``. Runs of older versions have no list of budgets, only the one."""

    paper_bits: float
    stored_bits: float
    bytes: int
    float_bytes: int
    rest_bytes: int
    cost: float | None = None
    budget_met: bool | None = None
    budget: str = ""
    budgets: list[BudgetUse] = Field(default_factory=list)
    layers: list[Layer] = Field(min_length=1)

    @property
    def asked(self) -> str:
        """All budgets, as the recipe asks for them."""
        return ", ".join(budget.budget for budget in self.budgets) or self.budget


class Report(_Part):
    """report.json. A run of method ``float`` has no scheme."""

    recipe: str
    seconds: float
    method: str = "csq"
    seed: int | None = None
    float_accuracy: float | None = None
    soft_accuracy: float | None = None
    hard_accuracy: float | None = None
    float_loss: float | None = None
    soft_loss: float | None = None
    hard_loss: float | None = None
    file_bytes: int | None = Field(default=None, gt=0)
    scheme: Scheme | None = None


class Bits(_Part):
    paper: int
    stored: int


class Record(_Part):
    """A line of metrics.jsonl. What ``measure`` adds once an epoch is empty elsewhere, and in old runs."""

    epoch: float
    phase: str
    loss: float
    train_accuracy: float
    test_accuracy: float | None = None
    test_loss: float | None = None
    stored_bits: float | None = None
    layer_bits: dict[str, Bits] = {}
    warnings: list[str] | None = None
    hard_accuracy: float | None = None
    gates: dict[str, list[float]] = {}
    weight_gap: dict[str, float] = {}
    undecided: dict[str, float] = {}


class _Data(_Part):
    name: str


class _Model(_Part):
    name: str
    options: dict[str, Any] = {}


class _Recipe(_Part):
    """What a page says of a recipe; the whole of it stays a mapping, since other versions have other keys."""

    name: str
    seed: int = 0
    data: _Data
    model: _Model


class Machine(_Part):
    """environment.json."""

    python: str = ""
    platform: str = ""
    device: str = ""
    device_name: str = ""
    csq_kernels: dict[str, Any] = {}


_RECORDS = TypeAdapter(list[Record])


@dataclass(frozen=True)
class Results:
    """A finished run: ``recipe`` is the content of recipe.yaml, the rest is checked and typed."""

    folder: Path
    report: Report
    records: list[Record]
    recipe: dict[str, Any]
    chosen: _Recipe
    machine: Machine

    @property
    def seed(self) -> int:
        return self.chosen.seed if self.report.seed is None else self.report.seed

    @property
    def hard_accuracy(self) -> float | None:
        """Of exact integers, which a run of method ``float`` has none of, whatever it reports."""
        return None if self.report.method == "float" else self.report.hard_accuracy

    @property
    def accuracy(self) -> float | None:
        """Of the network that the run is about: the exact integers, or the float network of method ``float``."""
        return self.report.float_accuracy if self.hard_accuracy is None else self.hard_accuracy

    @property
    def size(self) -> int | None:
        """Bytes of the file, as promised where none was written."""
        if self.report.file_bytes is None and self.report.scheme is not None:
            return self.report.scheme.bytes
        return self.report.file_bytes

    @property
    def ratio(self) -> float | None:
        """How many times smaller the file is than the same network in float32."""
        if self.report.scheme is None or not self.size:
            return None
        return self.report.scheme.float_bytes / self.size

    @property
    def epochs(self) -> list[Record]:
        """The records at the ends of epochs."""
        return [record for record in self.records if record.test_accuracy is not None]


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except FileNotFoundError:
        if path.name == REPORT:
            raise RunError(
                f"expected a finished run, got {path.parent} without {REPORT}; finish it with csq train ... --resume"
            ) from None
        raise RunError(f"expected {path} of a finished run, found none") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"cannot read {path}: {getattr(error, 'strerror', None) or 'not text'}") from None


def _json(path: Path, text: str, line: str = "") -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise RunError(f"expected {path} to be JSON{line}, got damaged text: {error}") from None


def _yaml(path: Path) -> Any:
    try:
        return yaml.safe_load(_text(path))
    except (yaml.YAMLError, RecursionError) as error:
        raise RunError(f"expected {path} to be YAML, got {' '.join(str(error).split())}") from None


def _checked(path: Path, kind: Any, content: Any) -> Any:
    try:
        return kind.validate_python(content) if isinstance(kind, TypeAdapter) else kind.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "its content"
        got = repr(first["input"])[:60]
        raise RunError(f"expected {path} as csq train writes it, got {where} = {got}: {first['msg']}") from None


def _check_layers(path: Path, scheme: Scheme | None, records: list[Record]) -> None:
    """Metrics and scheme are of the same layers, and a layer has as many gates in every record."""
    names = set() if scheme is None else {layer.name for layer in scheme.layers}
    bits: dict[str, int] = {}
    for record in records:
        for values in (record.layer_bits, record.gates, record.weight_gap, record.undecided):
            if values and values.keys() != names:
                other = sorted(values.keys() ^ names)[0]
                raise RunError(f"expected {path} to be of the layers of {REPORT}, got {other} in one of them alone")
        for name, gates in record.gates.items():
            if len(gates) != bits.setdefault(name, len(gates)):
                raise RunError(f"expected {path} with {bits[name]} gates of {name} in every line, got {len(gates)}")


def read(folder: Path) -> Results:
    """Read the folder of a finished run; neither its checkpoint nor its data set is needed.

    Raises:
        RunError: the run is not finished, or a file is missing or damaged; the message names the file.
    """
    if not folder.is_dir():
        raise RunError(f"expected the folder of a run of csq train, got {folder}, which is none")
    report = _checked(folder / REPORT, Report, _json(folder / REPORT, _text(folder / REPORT)))
    metrics, recipe, environment = (folder / name for name in (METRICS, RECIPE, ENVIRONMENT))
    lines = [_json(metrics, line, f" in line {n}") for n, line in enumerate(_text(metrics).splitlines(), 1)]
    records = _checked(metrics, _RECORDS, lines)
    _check_layers(metrics, report.scheme, records)
    content = _yaml(recipe)
    chosen = _checked(recipe, _Recipe, content)
    machine = _checked(environment, Machine, _json(environment, _text(environment)))
    return Results(folder, report, records, content, chosen, machine)
