"""What is installed, by whom and why: pyproject.toml, the Makefile, constraints.txt and docs/dependencies.md agree."""

import re
from pathlib import Path

import distributions
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

tomllib = pytest.importorskip("tomllib", reason="the standard library reads TOML from Python 3.11 on")

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = {name: [*map(Requirement, entries)] for name, entries in PROJECT["project"]["optional-dependencies"].items()}
REQUIREMENTS = [
    *map(Requirement, PROJECT["build-system"]["requires"] + PROJECT["project"]["dependencies"]),
    *(requirement for requirements in EXTRAS.values() for requirement in requirements),
]
PINS = {
    canonicalize_name(pin.name): str(pin.specifier)
    for pin in map(Requirement, re.findall(r"^[^#\n]+", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE))
}


def names(requirements: list[Requirement]) -> set[str]:
    return {canonicalize_name(requirement.name) for requirement in requirements}


def installed_by_make() -> set[str]:
    commands = re.findall(
        r"^\t\$\(PIP\) install (.*)$", (ROOT / "Makefile").read_text().replace("\\\n", ""), re.MULTILINE
    )
    words = [word for command in commands for word in command.split()]
    return {canonicalize_name(word) for word in words if re.fullmatch(r"[A-Za-z][\w-]*", word)}


DIRECT = names(REQUIREMENTS) | installed_by_make() | {canonicalize_name(name) for name in distributions.TOOLS}


def test_make_installs_what_development_needs() -> None:
    needed = names([requirement for extra in EXTRAS if extra != "peers" for requirement in EXTRAS[extra]])
    needed |= names([*map(Requirement, PROJECT["project"]["dependencies"])])
    assert needed <= installed_by_make()


def test_everything_is_pinned_to_a_version_that_pyproject_allows() -> None:
    assert DIRECT <= PINS.keys()
    assert all(re.fullmatch(r"==[\w.]+", pin) for pin in PINS.values())
    for requirement in REQUIREMENTS:
        version = PINS[canonicalize_name(requirement.name)].removeprefix("==")
        assert requirement.specifier.contains(version), f"{requirement} and {requirement.name} {version}"


def test_every_direct_dependency_has_a_reason() -> None:
    rows = re.findall(
        r"^\| ([^|]+) \| [^|]+ \| [^|]+ \|$", (ROOT / "docs" / "dependencies.md").read_text(), re.MULTILINE
    )
    assert rows[:2] == ["package", "---"]
    documented = [canonicalize_name(name.split(" (")[0]) for row in rows[2:] for name in row.split(", ")]
    assert sorted(documented) == sorted(DIRECT)
