"""Recipes: what one run trains, on what, for how long. YAML files checked by pydantic; every key is documented here."""

import inspect
import math
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

import csq_kernels as csq
from csq_kernels.train import data, models

_SEARCH_DEFAULTS = {name: parameter.default for name, parameter in inspect.signature(csq.Search).parameters.items()}


class RecipeError(ValueError):
    """A recipe cannot be read or holds a key or value that does not fit; the message names it."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)


class Data(_Section):
    name: str
    root: str | None = Field(default=None, description="file or folder that holds the data; default: the usual places")
    flip: bool = Field(default=False, description="mirror training images at random")
    crop: int = Field(default=0, ge=0, description="shift training images at random by up to so many pixels")
    size: int | None = Field(
        default=None,
        ge=1,
        description="of imagenet, pixels a side, default 224; of text, characters a block, default 128",
    )
    workers: int | None = Field(default=None, ge=1, description="threads that decode images; default: one a core")

    @model_validator(mode="after")
    def _known(self):
        data.check_options(self.name, self.options())
        return self

    def options(self) -> dict[str, Any]:
        """What ``data.load`` takes besides name and root."""
        return self.model_dump(exclude={"name", "root"}, exclude_defaults=True)


class Model(_Section):
    name: str
    options: dict[str, Any] = Field(default_factory=dict, description="keyword options of the model, such as width")

    @model_validator(mode="after")
    def _known(self):
        models.check_options(self.name, self.options)
        return self


class Quantization(_Section):
    """The options of ``csq_kernels.Config``."""

    n_bits: int = 8
    initial_bits: int | None = None
    gate_granularity: str = "layer"
    scale_granularity: str = "channel"
    act_bits: int | None = None
    act_quantizer: str = "lsq"
    min_bits: int = 1
    rules: dict[str, dict[str, Any] | None] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _fits(self):
        self.config()
        return self

    def config(self) -> csq.Config:
        return csq.Config(**self.model_dump())


class Epochs(_Section):
    float_: int = Field(
        default=0, ge=0, alias="float", description="of the float baseline that CSQ starts from; 0: none"
    )
    search: int = Field(ge=0, description="with moving gates, until the budget is met")
    finetune: int = Field(ge=0, description="with the scheme fixed, until the bits have decided")


class Optimizer(_Section):
    name: Literal["sgd", "adam", "adamw"] = "sgd"
    lr: float = Field(gt=0, description="of what is not named below")
    logit_lr: float | None = Field(default=None, gt=0, description="of bit logits; default: lr")
    gate_lr: float | None = Field(default=None, gt=0, description="of gate logits; default: lr")
    scale_lr: float | None = Field(default=None, gt=0, description="of scales; default: lr")
    momentum: float = Field(default=0.9, ge=0, lt=1, description="of sgd, in Nesterov's form unless 0")
    weight_decay: float = Field(
        default=0.0, ge=0, description="of weights; with sgd and adam, of those that bits make too, by way of the bits"
    )
    step: Literal["single-pass", "narrow", "separate"] = Field(
        default="single-pass",
        description="single-pass: of csq_kernels.optim; narrow: with narrow state; separate: of torch.optim",
    )


class Schedule(_Section):
    """The learning rate over each phase: float, search, finetune."""

    name: Literal["cosine", "onecycle", "constant"] = "cosine"
    warmup: float = Field(default=0.05, ge=0, lt=1, description="share of the phase in which the rate rises")


class SearchOptions(_Section):
    """The options of ``csq_kernels.Search``; its share of the steps follows from the epochs."""

    strength: float = Field(default=_SEARCH_DEFAULTS["strength"], ge=0, description="lambda of the budget term")
    search_temperature: float = Field(default=_SEARCH_DEFAULTS["search_temperature"], ge=1)
    final_temperature: float = Field(default=_SEARCH_DEFAULTS["final_temperature"], ge=1, description="beta_max")
    schedule: Literal["exponential", "linear", "cosine"] = _SEARCH_DEFAULTS["schedule"]
    decision_share: float = Field(
        default=_SEARCH_DEFAULTS["decision_share"], ge=0, lt=1, description="of the finetune stage, where bits decide"
    )
    lateness: float = Field(
        default=_SEARCH_DEFAULTS["lateness"], gt=0, description="how late the temperature rises before that; 1: as (9)"
    )
    gradient_temperature: float | None = Field(
        default=_SEARCH_DEFAULTS["gradient_temperature"], ge=1, description="the highest one of gradients"
    )


class Distillation(_Section):
    """The float model teaches: ``(1 - weight) * loss + weight * temperature^2 * KL(teacher || student)``."""

    weight: float = Field(default=0.5, gt=0, le=1)
    temperature: float = Field(default=2.0, gt=0)


class Checkpoint(_Section):
    minutes: float = Field(default=5.0, gt=0, description="save when the last one is older")
    steps: int | None = Field(default=None, ge=1, description="save every so many steps as well")


class Recipe(_Section):
    """A whole run. ``dump`` and ``to_yaml`` spell every default out."""

    name: str = Field(min_length=1, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    seed: int = Field(default=0, ge=0)
    method: Literal["csq", "lsq", "round", "float"] = Field(
        default="csq",
        description="csq; or a baseline: lsq trains uniform precision for the epochs of search and finetune, round "
        "rounds the float model, float stops there",
    )
    preset: Literal["paper"] | None = Field(
        default=None,
        description="paper: the published rules of search, initialisation and decay, see csq_kernels.train.paper",
    )
    bits: int = Field(default=3, ge=2, le=8, description="of every layer, with method lsq or round")
    data: Data
    model: Model
    init: str | None = Field(
        default=None, description="start from the float weights of this run's folder, or of a safetensors file"
    )
    search_from: str | None = Field(
        default=None,
        description="take over the search of this run's folder: only the budget is met anew, then finetune",
    )
    quantization: Quantization = Quantization()
    budget: str | list[str] = Field(
        default="3.0 bits",
        description="what Search accepts, as in [3.0 bits, 0.5 GBOPs] where several must hold; bits are stored bits",
    )
    epochs: Epochs
    batch_size: int = Field(default=128, ge=2)
    precision: Literal["float32", "bfloat16"] = Field(
        default="float32", description="bfloat16: autocast in training; every measured accuracy is of float32"
    )
    distillation: Distillation | None = None
    optimizer: Optimizer
    csq_optimizer: Optimizer | None = Field(default=None, description="of search and finetune; default: optimizer")
    schedule: Schedule = Schedule()
    search: SearchOptions = SearchOptions()
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    clip_grad_norm: float | None = Field(default=None, gt=0)
    checkpoint: Checkpoint = Checkpoint()
    log_every: int = Field(default=20, ge=1, description="steps between two lines of metrics.jsonl")

    @model_validator(mode="after")
    def _long_enough(self):
        epochs = self.epochs
        if self.method == "csq" and (epochs.finetune < 1 or (epochs.search < 1 and self.search_from is None)):
            raise ValueError(
                f"expected epochs.search and epochs.finetune of at least 1, got {epochs.search}, {epochs.finetune}"
            )
        if self.method == "lsq" and epochs.search + epochs.finetune < 1:
            raise ValueError("expected epochs of search or finetune of at least 1, got 0")
        if self.method in ("lsq", "round") and self.quantization.act_bits is not None:
            raise ValueError(f"expected act_bits null with method {self.method}, got {self.quantization.act_bits}")
        if self.distillation is not None and not (self.init or self.search_from or epochs.float_):
            raise ValueError("expected a float model to distil from, got none of init, search_from and epochs.float")
        return self

    @field_validator("budget")
    @classmethod
    def _budget(cls, budget: str | list[str]) -> str | list[str]:
        csq.Budget.parse_all(budget)
        return budget

    @model_validator(mode="after")
    def _model_reads_data(self):
        models.check_input(self.model.name, self.data.name)
        return self

    def dump(self) -> dict[str, Any]:
        return self.model_dump(by_alias=True)

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.dump(), sort_keys=False)


def names() -> list[str]:
    """Recipes that come with the package."""
    folder = resources.files("csq_kernels.train") / "recipes"
    return sorted(file.name.removesuffix(".yaml") for file in folder.iterdir() if file.name.endswith(".yaml"))


def _parse(text: str, source: str) -> dict[str, Any]:
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"expected {source} to be YAML, got {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise RecipeError(f"expected {source} to be a mapping of keys, got {type(content).__name__}")
    return content


def _override(content: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise RecipeError(f"expected an override as key=value, got {override!r}")
    *sections, last = key.split(".")
    target = content
    for section in sections:
        target = target.setdefault(section, {})
        if not isinstance(target, dict):
            raise RecipeError(f"expected override {override!r} to name a key inside sections, got {section!r}, a value")
    try:
        target[last] = _number(yaml.safe_load(text))
    except yaml.YAMLError as error:
        raise RecipeError(f"expected override {key} with a YAML value, got {text!r}") from error


def _number(value: Any) -> Any:
    """YAML 1.1 reads 1e-3 as text, because of the missing dot."""
    if isinstance(value, str):
        try:
            number = float(value)
        except ValueError:
            return value
        return number if math.isfinite(number) else value
    return value


def _explain(error: ValidationError) -> str:
    lines = []
    for item in error.errors(include_url=False):
        key = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            lines.append(f"unknown key {key}")
        elif item["type"] == "missing":
            lines.append(f"missing key {key}")
        else:
            # Messages of our own checks say what they got; those of pydantic do not.
            got = "" if item["type"] == "value_error" else f", got {item['input']!r}"
            lines.append(f"{key}: {item['msg'].removeprefix('Value error, ')}{got}")
    return "; ".join(lines)


def make(content: dict[str, Any], source: str = "recipe") -> Recipe:
    """Check a mapping and return the recipe.

    Raises:
        RecipeError: a key is unknown or missing, or a value does not fit.
    """
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        raise RecipeError(f"{source}: {_explain(error)}") from None


def load(source: str, overrides: list[str] | None = None, seed: int | None = None) -> Recipe:
    """Read a recipe.

    Args:
        source: path of a YAML file, or name of a recipe that comes with the package, also as ``recipes/NAME.yaml``.
        overrides: ``key=value`` with dotted keys and YAML values, such as ``optimizer.lr=0.1``.
        seed: replaces the recipe's.

    Raises:
        RecipeError: it cannot be found or read, or does not fit; the message names the key.
    """
    packaged = source.removeprefix("recipes/").removesuffix(".yaml")
    if packaged in names() and not Path(source).is_file():
        text = (resources.files("csq_kernels.train") / "recipes" / f"{packaged}.yaml").read_text()
    else:
        try:
            text = Path(source).read_text()
        except (OSError, UnicodeDecodeError) as error:
            known = ", ".join(names())
            reason = getattr(error, "strerror", None) or "not text"
            raise RecipeError(f"expected RECIPE as one of {known}, or a file, got {source!r} ({reason})") from None
    content = _parse(text, source)
    for override in overrides or []:
        _override(content, override)
    if seed is not None:
        content["seed"] = seed
    return make(content, source)
