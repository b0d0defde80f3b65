"""The floors of the house: imports only go down, the lower floors stay light, and nothing turns in a circle.

    __init__, cli                the roof
    trainer                      the driver's side
    cluster                      processes (ray)
    compute                      tensors (torch), no ray
    planning                     decisions, neither torch nor ray

Every import counts, also one inside a function or under TYPE_CHECKING: moving an import is no way out.
"""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "raypar"

FLOORS = {"planning": 0, "compute": 1, "cluster": 2, "trainer": 3, "cli": 4, "__init__": 4}
FORBIDDEN = {"planning": {"torch", "ray"}, "compute": {"ray"}}


def read_imports(package: Path) -> dict[str, set[str]]:
    """All modules under `package`, by their dotted names, each with the modules that it imports."""
    sources = {_dotted_name(path, package): path for path in sorted(package.rglob("*.py"))}
    return {
        name: {
            _longest_known(target, sources)
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path)))
            for target in _targets(node, name, is_package=path.stem == "__init__")
        }
        for name, path in sources.items()
    }


def _dotted_name(path: Path, package: Path) -> str:
    parts = path.relative_to(package.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _targets(node: ast.AST, module: str, *, is_package: bool) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        base = [node.module] if node.module else []
        if node.level:
            parts = module.split(".")
            base = parts[: len(parts) - node.level + is_package] + base
        return [".".join([*base, alias.name]) for alias in node.names]
    return []


def _longest_known(target: str, known: dict[str, Path]) -> str:
    """`raypar.planning.plan.Plan` is the module `raypar.planning.plan`; what is not ours stays as it is."""
    parts = target.split(".")
    ours = (".".join(parts[:end]) for end in range(len(parts), 0, -1))
    return next((name for name in ours if name in known), target)


def floor_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def violations(imports: dict[str, set[str]]) -> list[str]:
    root = next(iter(imports), "raypar").split(".")[0]
    found = []
    for module, targets in imports.items():
        floor = floor_of(module)
        if floor not in FLOORS:
            found.append(f"{module} stands on no floor; floors: {', '.join(FLOORS)}")
            continue
        for target in sorted(targets):
            top = target.split(".")[0]
            if top in FORBIDDEN.get(floor, ()):
                found.append(f"{module} imports {target}, but {floor} imports no {top}")
            if top == root and FLOORS.get(floor_of(target), 0) > FLOORS[floor]:
                found.append(f"{module} ({floor}) imports {target} ({floor_of(target)}), which is above it")
    return found


def circle(imports: dict[str, set[str]]) -> list[str]:
    """The modules of one circle, in order, or an empty list. That a package's __init__ names its modules is none."""
    graph = {
        module: {target for target in targets if target in imports and target != module}
        for module, targets in imports.items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_imports_only_go_down():
    imports = read_imports(PACKAGE)
    assert "raypar.planning.plan" in imports, "the test reads no module: has the package moved?"
    assert violations(imports) == []


def test_no_module_imports_itself_in_a_circle():
    assert circle(read_imports(PACKAGE)) == []


def write_tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / "raypar" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root / "raypar"


@pytest.mark.parametrize(
    ("file", "text", "named"),
    [
        ("planning/plan.py", "import torch.nn as nn", "imports no torch"),
        ("planning/plan.py", "def f():\n    from ray import train", "imports no ray"),
        ("compute/stage.py", "import ray", "imports no ray"),
        ("compute/stage.py", "from raypar.cluster.fleet import Fleet", "above it"),
        ("compute/stage.py", "from ..cluster import fleet", "above it"),
        ("planning/plan.py", "from raypar import Plan", "above it"),
        ("cluster/fleet.py", "import raypar.trainer", "above it"),
        ("helpers.py", "", "stands on no floor"),
    ],
)
def test_a_breach_is_found(tmp_path: Path, file: str, text: str, named: str):
    files = {"__init__.py": "", "trainer.py": "", "cluster/__init__.py": "", "cluster/fleet.py": "", file: text}
    (found,) = violations(read_imports(write_tree(tmp_path, files)))
    assert named in found


def test_what_is_allowed_is_not_found(tmp_path: Path):
    files = {
        "__init__.py": "from raypar.trainer import Trainer",
        "trainer.py": "import ray\nfrom raypar.cluster.fleet import Fleet",
        "cluster/__init__.py": "",
        "cluster/fleet.py": "import ray, torch\nfrom raypar.planning import plan",
        "compute/stage.py": "import torch\nfrom . import channel",
        "compute/channel.py": "import raytracer",
        "planning/plan.py": "",
    }
    imports = read_imports(write_tree(tmp_path, files))
    assert violations(imports) == []
    assert circle(imports) == []


def test_a_circle_is_found(tmp_path: Path):
    files = {
        "compute/a.py": "from raypar.compute import b",
        "compute/b.py": "def f():\n    from raypar.compute.a import x",
    }
    assert set(circle(read_imports(write_tree(tmp_path, files)))) == {"raypar.compute.a", "raypar.compute.b"}
