"""`import raypar`: light, and every public name where the table says it is."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path
from typing import get_type_hints

import pytest

import raypar

HEAVY = ("torch", "ray", "numpy", "pandas", "pyarrow", "rich")
WHAT_TRAINS = ("torch.distributed.checkpoint", "torch.distributed.tensor", "sympy", "raypar.engine", "raypar.loop")


def modules_after(code: str, names: tuple[str, ...]) -> list[str]:
    """Which of some modules a fresh interpreter has imported after some code."""
    script = f"{code}\nimport sys; print([name for name in {names} if name in sys.modules])"
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    modules: list[str] = ast.literal_eval(answer.splitlines()[-1])
    return modules


@pytest.mark.parametrize(
    "code",
    [
        "import raypar",
        "import raypar; raypar.Plan(data=2), raypar.errors.PlanError, raypar.schedule_of, dir(raypar)",
        "import contextlib\nwith contextlib.suppress(SystemExit): import raypar.cli; raypar.cli.main(['--help'])",
    ],
    ids=["import", "plan", "help"],
)
def test_what_is_light_imports_nothing_heavy(code: str) -> None:
    assert modules_after(code, HEAVY) == []


def test_a_trainer_is_made_before_what_trains_is_imported() -> None:
    code = "import raypar; raypar.Trainer(print, plan=raypar.Plan(data=2, pipeline=2))"
    assert modules_after(code, WHAT_TRAINS) == []


@pytest.mark.parametrize("name", raypar.__all__)
def test_each_public_name_resolves(name: str) -> None:
    assert getattr(raypar, name) is not None
    assert name in dir(raypar)


@pytest.mark.parametrize("name", sorted({*raypar.__all__} - {"errors"}))
def test_type_hints_of_public_names_resolve(name: str) -> None:
    """As libraries do that make a command line of a dataclass. `typing` looks names up in the module that `__module__`
    says: for Plan that was `raypar`, where there is no `os`, and it raised NameError."""
    assert isinstance(get_type_hints(getattr(raypar, name)), dict)


def test_mypy_sees_the_same_table() -> None:
    """The imports under TYPE_CHECKING are the table that `__getattr__` reads."""
    tree = ast.parse(Path(raypar.__file__).read_text(encoding="utf-8"))
    (block,) = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    assert {alias.name: node.module for node in imports for alias in node.names} == raypar._MODULE_OF
    assert set(raypar._MODULE_OF) < set(raypar.__all__)


def test_a_misspelt_name_is_refused() -> None:
    with pytest.raises(AttributeError, match="module 'raypar' has no attribute 'Plam'"):
        raypar.Plam  # type: ignore[attr-defined]  # noqa: B018
    with pytest.raises(ImportError, match="Plam"):
        importlib.import_module("raypar.Plam")
