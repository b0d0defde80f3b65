"""The house: rooms by subject, stacked; imports only go up the list, through a room's doors, and never in a circle.

Every import counts, also one inside a function or under TYPE_CHECKING: moving an import is no way out.
"""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "raypar"

ROOMS = [
    "errors", "storage", "tree", "randomness",  # modules that every room may use
    "planning", "observe", "data", "checkpoint", "transport", "splitting", "stages", "replicas", "engine", "loop",
    "workers", "cluster",
    "trainer", "cli", "__init__",
]  # fmt: skip
"""A room may use those before it. `trainer` and what follows is the roof."""

DOORS = {
    "planning": {"place", "plan", "schedule", "schedules", "program", "simulate", "partition"},
    "observe": {"actor_info", "timeline", "bubble", "progress"},
    "data": {"sources"},
    "checkpoint": {"manifest", "saver", "shards", "contents", "weights"},
    "transport": {"interface", "channel", "memory_links", "process_links"},
    "splitting": {"model", "choose", "split", "stage_code", "trace", "wired"},
    "stages": {"stage", "model_part", "learner", "optimizer_state", "precision", "dtensors", "measure"},
    "replicas": {"strategies", "sync", "ties"},
    "engine": {"build", "engine", "step", "actor_state", "microbatch", "faults", "clock"},
    "loop": {"parallelize", "batches", "replica", "session", "local", "in_process", "actors"},
    "workers": {"train_worker", "stage_actor", "ray_errors", "ray_private"},
    "cluster": {"launch", "placement", "shipping"},
}
"""The modules of a room that others may import; the rest is the room's own."""

WITHOUT_TORCH = {"errors", "storage", "planning", "observe"}
WITH_RAY = {"workers", "cluster", "trainer", "cli", "__init__"}
MODULES_OF_A_ROOM = 10


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


def room_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def violations(imports: dict[str, set[str]]) -> list[str]:
    root = next(iter(imports), "raypar").split(".")[0]
    found = []
    for module, targets in imports.items():
        room = room_of(module)
        if room not in ROOMS:
            found.append(f"{module} stands in no room; rooms: {', '.join(ROOMS)}")
            continue
        for target in sorted(targets):
            top = target.split(".")[0]
            if (top == "torch" and room in WITHOUT_TORCH) or (top == "ray" and room not in WITH_RAY):
                found.append(f"{module} imports {target}, but {room} imports no {top}")
            if top == root and room_of(target) in ROOMS:
                found += _wrong_way(module, room, target)
    return found


def _wrong_way(module: str, room: str, target: str) -> list[str]:
    other = room_of(target)
    if ROOMS.index(other) > ROOMS.index(room):
        return [f"{module} imports {target}, but {room} stands before {other}"]
    if other != room and other in DOORS and target.split(".")[-1] not in DOORS[other]:
        return [f"{module} imports {target}, which is no door of {other}; doors: {', '.join(sorted(DOORS[other]))}"]
    return []


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


def modules_of(room: str) -> set[str]:
    return {path.stem for path in (PACKAGE / room).glob("*.py") if path.stem != "__init__"}


def test_imports_only_go_up():
    imports = read_imports(PACKAGE)
    assert "raypar.planning.plan" in imports, "the test reads no module: has the package moved?"
    assert violations(imports) == []


def test_no_module_imports_itself_in_a_circle():
    assert circle(read_imports(PACKAGE)) == []


@pytest.mark.parametrize("room", DOORS)
def test_a_room_has_at_most_ten_modules(room: str):
    assert 0 < len(modules_of(room)) <= MODULES_OF_A_ROOM


@pytest.mark.parametrize("room", DOORS)
def test_each_door_is_used(room: str):
    """A door that nobody enters is a module that the room could keep to itself."""
    used = {
        target.split(".")[-1]
        for module, targets in read_imports(PACKAGE).items()
        for target in targets
        if room_of(target) == room and room_of(module) != room
    }
    assert modules_of(room) >= DOORS[room] == used & modules_of(room)


@pytest.mark.parametrize("room", DOORS)
def test_a_room_names_its_doors(room: str):
    doc = ast.get_docstring(ast.parse((PACKAGE / room / "__init__.py").read_text(encoding="utf-8"))) or ""
    said, _, doors = doc.partition("Enter by: ")
    assert said.strip()
    assert set(doors.strip(". \n").split(", ")) == DOORS[room]


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
        ("stages/stage.py", "import ray", "imports no ray"),
        ("stages/stage.py", "from raypar.cluster.fleet import Fleet", "stands before"),
        ("stages/stage.py", "from ..cluster import fleet", "stands before"),
        ("planning/plan.py", "from raypar import Plan", "stands before"),
        ("cluster/launch.py", "import raypar.trainer", "stands before"),
        ("trainer.py", "from raypar.cluster.fleet import Fleet", "no door of cluster"),
        ("helpers.py", "", "stands in no room"),
    ],
)
def test_a_breach_is_found(tmp_path: Path, file: str, text: str, named: str):
    files = {"__init__.py": "", "trainer.py": "", "cluster/__init__.py": "", "cluster/fleet.py": "", file: text}
    (found,) = violations(read_imports(write_tree(tmp_path, files)))
    assert named in found


def test_what_is_allowed_is_not_found(tmp_path: Path):
    files = {
        "__init__.py": "from raypar.trainer import Trainer",
        "trainer.py": "import ray\nfrom raypar.cluster.launch import run",
        "cluster/__init__.py": "",
        "cluster/launch.py": "import ray, torch\nfrom raypar.planning import plan\nfrom raypar.cluster import fleet",
        "cluster/fleet.py": "",
        "stages/stage.py": "import torch\nfrom . import learner",
        "stages/learner.py": "import raytracer",
        "planning/plan.py": "",
    }
    imports = read_imports(write_tree(tmp_path, files))
    assert violations(imports) == []
    assert circle(imports) == []


def test_a_circle_is_found(tmp_path: Path):
    files = {
        "stages/a.py": "from raypar.stages import b",
        "stages/b.py": "def f():\n    from raypar.stages.a import x",
    }
    assert set(circle(read_imports(write_tree(tmp_path, files)))) == {"raypar.stages.a", "raypar.stages.b"}
