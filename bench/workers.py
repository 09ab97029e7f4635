"""A process for each family of providers: the idle threads of one library, which may spin, cannot slow another's."""

import dataclasses
import importlib
import math
import multiprocessing
from collections.abc import Collection
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from accuracy import Verdict
from harness import steady_seconds
from peers import FAMILIES, Shape, Walk
from trust import UntrustedError, observe

from csq_kernels import _native


def inspected(walk: Walk) -> Walk:
    """The walk, with a verdict that lets nothing pass if it cannot be trusted."""
    try:
        if walk.inputs:
            observe(walk, "cpu", walk.run)
    except UntrustedError as error:
        return dataclasses.replace(walk, verdict=Verdict(math.inf, str(error)))
    return walk


@dataclass(frozen=True)
class Ready:
    """What the parent knows of a walk that waits in a worker; ``missing`` says why there is none."""

    name: str
    bits: int
    activation: str
    layers: int = 0
    weight_bytes: int = 0
    verdict: Verdict | None = None
    missing: str | None = None

    @property
    def key(self) -> tuple[str, int]:
        return self.name, self.bits


def serve(
    connection: Connection, family: str, widths: Collection[int], names: Collection[str], isa: str | None
) -> None:
    """The child: answers each request until it is told to stop."""
    module = importlib.import_module(FAMILIES[family])
    if isa is not None:
        _native.module.set_isa(isa)
    reason = module.available()
    connection.send((reason, {} if reason else module.version()))
    kept = [p for p in module.providers() if p.bits in widths and (not names or p.name in names)] if not reason else []
    walks: dict[tuple[str, int], Walk] = {}

    def prepare(shape: Shape, batch: int, threads: int) -> list[Ready]:
        walks.clear()
        answers = []
        for provider in kept:
            about = (provider.name, provider.bits, provider.activation)
            try:
                walk = inspected(provider.walk(shape, batch, threads))
            except Exception as error:
                if family == "csq":
                    raise
                answers.append(Ready(*about, missing=f"{type(error).__name__}: {error}".splitlines()[0]))
                continue
            walks[provider.name, provider.bits] = walk
            answers.append(Ready(*about, walk.layers, walk.weight_bytes, walk.verdict))
        return answers

    def time(key: tuple[str, int]) -> float:
        return steady_seconds(walks[key].run) / walks[key].layers

    while (request := connection.recv()) is not None:
        name, *arguments = request
        connection.send({"prepare": prepare, "time": time}[name](*arguments))


class Worker:
    """The parent's side: ``ask`` starts a piece of work, ``answer`` waits for its result."""

    def __init__(self, family: str, widths: Collection[int], names: Collection[str], isa: str | None) -> None:
        context = multiprocessing.get_context("spawn")
        self.family = family
        self.connection, child = context.Pipe()
        self.process = context.Process(target=serve, args=(child, family, widths, names, isa), daemon=True)
        self.process.start()
        child.close()
        self.missing: str | None
        self.version: dict[str, str]
        self.missing, self.version = self.answer()

    def ask(self, *request: Any) -> None:
        self.connection.send(request)

    def answer(self) -> Any:
        try:
            return self.connection.recv()
        except EOFError:
            raise RuntimeError(f"expected an answer of the {self.family} process, got its end") from None

    def stop(self) -> None:
        self.connection.send(None)
        self.process.join()
