"""README, CONTRIBUTING and docs/ say nothing that is not so: their code runs, what they name exists."""

from __future__ import annotations

import ast
import builtins
import contextlib
import doctest
import functools
import importlib
import importlib.util
import inspect
import io
import re
import shlex
import textwrap
import tomllib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click
import pytest
import ray.train
from ray.scripts.scripts import cli as ray_cli

import raypar
import train_digits
from raypar import cli, errors
from support.pages import ROOT, Block, Page, read_pages

PAGES = {page.name: page for page in read_pages()}
README = PAGES["README.md"]
LANGUAGES = {"python", "pycon", "shell", "text", "csv", "toml"}

every_page = pytest.mark.parametrize("page", PAGES.values(), ids=PAGES.keys())


# ---------------------------------------------------------------- code


@pytest.fixture
def namespace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Where the blocks of one page run, one after the other: a folder of their own, and every Trainer without Ray."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))  # where Ray Train puts a run without a storage path
    monkeypatch.setattr(raypar, "Trainer", functools.partial(raypar.Trainer, local=True))
    return {"__name__": "__main__"}


def run(page: Page, block: Block, namespace: dict[str, Any]) -> str:
    """What the block printed. Line numbers in a traceback are those of the page."""
    code = compile("\n" * (block.line - 1) + block.text, str(page.path), "exec")
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        exec(code, namespace)
    return shown.getvalue()


def check_session(page: Page, block: Block, namespace: dict[str, Any]) -> None:
    """A block as Python shows it: `>>>`, and under it what must come."""
    shown = io.StringIO()
    session = doctest.DocTestParser().get_doctest(block.text, namespace, page.name, str(page.path), block.line)
    assert session.examples, f"{page.name}:{block.line} shows no >>>"
    options = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    failed, _ = doctest.DocTestRunner(optionflags=options).run(session, out=shown.write, clear_globs=False)
    namespace |= session.globs
    assert not failed, shown.getvalue()


def run_blocks(page: Page, namespace: dict[str, Any]) -> str:
    """All blocks of a page, in their order; returns what they printed. Those that need a cluster are only compiled."""
    printed = ""
    for block in page.blocks:
        if block.language == "python" and block.needs_cluster:
            compile(block.text, f"{page.name}:{block.line}", "exec")
        elif block.language == "python":
            printed += run(page, block, namespace)
        elif block.language == "pycon":
            check_session(page, block, namespace)
    return printed


@pytest.mark.filterwarnings("ignore:the stages are far from balanced")  # microseconds, measured on a busy machine
@pytest.mark.parametrize("name", [name for name in PAGES if name != "README.md"])
def test_the_blocks_run_one_after_the_other(name: str, namespace: dict[str, Any]):
    run_blocks(PAGES[name], namespace)


@pytest.mark.filterwarnings("ignore:the stages are far from balanced")
def test_the_readme_example_learns_the_sine(namespace: dict[str, Any]):
    """In local mode; tests/cluster/test_jobs.py runs the first block on Ray, as it stands."""
    printed = run_blocks(README, namespace)
    number = re.search(r"tensor\(\[\[([\d.]+)\]\]", printed)
    assert number is not None, printed
    assert float(number[1]) == pytest.approx(0.997, abs=0.05)


@every_page
def test_every_block_says_what_it_is(page: Page):
    assert [f"{page.name}:{block.line}" for block in page.blocks if block.language not in LANGUAGES] == []


# ---------------------------------------------------------------- commands


def check_make(words: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for word in words:
        name, is_variable, value = word.partition("=")
        if is_variable:
            assert re.search(rf"^{name} \?=", makefile, re.MULTILINE), f"no variable {name} in Makefile"
            check_values(name, value)
        else:
            assert re.search(rf"^([\w -]+ )?{name}( [\w -]+)?:", makefile, re.MULTILINE), f"Makefile makes no {name}"


def check_values(name: str, value: str) -> None:
    if name == "DEMO_FLAGS":
        train_digits.parse(shlex.split(value))
    if name == "PYTEST_FLAGS":
        check_pytest(shlex.split(value))


def check_pytest(words: list[str]) -> None:
    for word in words:
        if word.startswith("tests/"):
            assert (ROOT / word.partition("::")[0]).exists(), word


def check_python(words: list[str]) -> None:
    program, *arguments = words
    if program == "jobs/train_digits.py":
        train_digits.parse(arguments)
    elif program == "-m":
        assert arguments[0] == "pytest", arguments
        check_pytest(arguments[1:])
    elif program.startswith(("jobs/", "benchmarks/")):
        source = (ROOT / program).read_text(encoding="utf-8")
        for option in (word for word in arguments if word.startswith("--")):
            assert f'"{option}"' in source, f"{program} has no {option}"
    else:
        assert program in ("…", "train.py"), f"no program {program}"


def check_ray(words: list[str]) -> None:
    """Ray's own parser knows the command and its options; a program after `--` is checked as one."""
    words, _, program = (list(part) for part in _partition(words, "--"))
    command: click.Command = ray_cli
    while isinstance(command, click.Group) and words:
        word = words.pop(0)
        assert word in command.commands, f"ray has no command {word}"
        command = command.commands[word]
    known = {option for parameter in command.params for option in parameter.opts}
    assert {word.partition("=")[0] for word in words if word.startswith("--")} <= known, words
    for word in words:
        if word.startswith("ray "):  # what `ray exec` runs on the head
            check_ray(shlex.split(word)[1:])
    if program:
        check_command(program)


def _partition(words: list[str], separator: str) -> tuple[list[str], list[str], list[str]]:
    index = words.index(separator) if separator in words else len(words)
    return words[:index], words[index : index + 1], words[index + 1 :]


def check_raypar(words: list[str]) -> None:
    if len(words) == 1:  # the text names a command without its arguments
        words = [*words, "--help"]
    with contextlib.ExitStack() as stack:
        if "--help" in words:
            stack.enter_context(pytest.raises(SystemExit, match="0"))
        cli._parser().parse_args(words)


def check_pip(words: list[str]) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    assert words[0] == "install", words
    for word in words:
        for extra in re.findall(r"^\.\[([\w,]+)\]$", word):
            assert set(extra.split(",")) <= set(extras), word


def check_nothing(words: list[str]) -> None:
    """Programs that are not ours, of which nothing can be checked without having them."""


CHECKS: dict[str, Callable[[list[str]], object]] = {
    "make": check_make,
    "python": check_python,
    "raypar": check_raypar,
    "ray": check_ray,
    "pip": check_pip,
    **dict.fromkeys(["cd", "export", "git", "mkdocs", "py-spy", "ruff", "source", "mypy", "kill"], check_nothing),
}


def check_command(words: list[str]) -> None:
    program, *arguments = words
    assert program in CHECKS, f"nothing checks the command {program!r}; add it to CHECKS"
    CHECKS[program](arguments)


@every_page
def test_every_command_is_understood(page: Page):
    for words in page.commands():
        check_command(words)


@every_page
def test_every_command_in_the_text_is_understood(page: Page):
    for code in page.code_in_text:
        if re.match(r"(make|python|raypar|ray|pip) [\w.-]", code):
            check_command(shlex.split(code))


@every_page
def test_commands_of_a_cluster_are_marked(page: Page):
    assert [words for words in page.commands(needs_cluster=False) if words[0] == "ray"] == []


@pytest.mark.parametrize(
    "command",
    [
        "make dema",
        "make demo DEMO_FLAG='--data 2'",
        "make demo DEMO_FLAGS='--date 2'",
        "make test PYTEST_FLAGS=tests/test_flors.py",
        "python jobs/train_digits.py --pipelines 2",
        "python jobs/prepare_digits.py --output x",
        "raypar exprot run out.pt",
        "ray job submitt -- python x.py",
        "ray job submit --working-directory . -- python train.py",
        "ray job submit --working-dir . -- python jobs/train_digits.py --date 2",
        "pip install '.[job]'",
        "raytrain up",
    ],
)
def test_a_wrong_command_is_found(command: str):
    with pytest.raises((AssertionError, SystemExit)):
        check_command(shlex.split(command))


# ---------------------------------------------------------------- names


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "Plan": raypar.Plan.__init__,
    "Timeouts": raypar.Timeouts.__init__,
    "Trainer": raypar.Trainer.__init__,
    "parallelize": raypar.parallelize,
    "batches": raypar.batches,
    "report": raypar.report,
    "epochs": raypar.epochs,
    "read_state_dict": raypar.read_state_dict,
    "RunConfig": ray.train.RunConfig.__init__,
    "FailureConfig": ray.train.FailureConfig.__init__,
    "CheckpointConfig": ray.train.CheckpointConfig.__init__,
    "ScalingConfig": ray.train.ScalingConfig.__init__,
}


def calls_in(code: str) -> list[tuple[str, list[str]]]:
    """The calls in a piece of code, with the names of their keyword arguments; none in what is no Python."""
    try:
        parsed = ast.parse(code.replace("…", "..."))
    except SyntaxError:
        return []
    return [
        (ast.unparse(node.func).rpartition(".")[2], [keyword.arg for keyword in node.keywords if keyword.arg])
        for node in ast.walk(parsed)
        if isinstance(node, ast.Call)
    ]


@every_page
def test_every_argument_exists(page: Page):
    pieces = [*page.code_in_text, *(block.text for block in page.blocks if block.language == "python")]
    for name, arguments in (call for piece in pieces for call in calls_in(piece)):
        if name in FUNCTIONS:
            known = inspect.signature(FUNCTIONS[name]).parameters
            assert set(arguments) <= set(known), f"{page.name}: {name}({arguments})"


@every_page
def test_every_plan_it_names_has_a_schedule(page: Page):
    for code in page.code_in_text:
        if re.fullmatch(r"Plan\([^…]*\)", code):
            with contextlib.suppress(NameError):  # it stands for any value
                assert raypar.schedule_of(eval(code, {"Plan": raypar.Plan})).rows, code


@every_page
def test_every_file_it_links_to_exists(page: Page):
    assert [link for link in page.links if not (page.path.parent / link).exists()] == []


@every_page
def test_every_path_it_names_exists(page: Page):
    text = re.sub(r"\]\([^)]*\)", "]", page.text)
    paths = re.findall(r"(?<![\w/.-])((?:raypar|tests|jobs|benchmarks|docs|deploy)/[\w/.-]*\w)", text)
    assert [path for path in paths if not (ROOT / path).exists()] == []


def exists(dotted: str) -> bool:
    """Whether `raypar.x.y` is a module, or something in one."""
    parts = dotted.split(".")
    for end in range(len(parts), 0, -1):
        try:
            value: Any = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        return functools.reduce(lambda held, part: getattr(held, part, None), parts[end:], value) is not None
    return False


@every_page
def test_every_name_of_raypar_exists(page: Page):
    names = set(re.findall(r"(?<![\w./-])(raypar(?:\.[a-zA-Z_]\w*)+)", page.text))
    assert [name for name in sorted(names) if not exists(name)] == []
    for name in set(re.findall(r"\breplica\.([a-z_]+)(?=\()", page.text)):
        assert callable(getattr(raypar.Replica, name)), name


def names_in(path: Path) -> set[str]:
    """What a file defines: functions and classes, methods as Class.method, and the names that it assigns."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef)}
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return names


@every_page
def test_every_name_beside_a_path_is_in_that_file(page: Page):
    """As in `raypar/engine/engine.py`: `Engine`, `pairs`."""
    for path, names in re.findall(r"`([\w/]+\.py)`: ((?:`[\w.]+`(?:, )?)+)", page.prose):
        missing = set(re.findall(r"`([\w.]+)`", names)) - names_in(ROOT / path)
        assert not missing, f"{page.name}: {path} has no {missing}"


@every_page
def test_every_error_it_names_exists(page: Page):
    names = {name for code in page.code_in_text for name in re.findall(r"^(?:raypar\.)?(?:errors\.)?(\w+Error)$", code)}
    assert [name for name in names if not hasattr(errors, name) and not hasattr(builtins, name)] == []


def test_the_tree_of_errors_is_the_one_in_the_code():
    def branches(texts: Iterable[str]) -> list[tuple[str, str]]:
        (tree,) = (textwrap.dedent(text) for text in texts if "├──" in text)
        return re.findall(r"^([│ ]*[├└]──) (\w+Error)", tree, re.MULTILINE)

    page = branches(block.text for block in PAGES["docs/failures.md"].blocks)
    assert page == branches((errors.__doc__ or "").split("\n\n"))


def test_the_api_page_shows_every_public_name():
    shown = re.findall(r"^::: raypar\.(?:\w+\.)*(\w+)$", PAGES["docs/api.md"].text, re.MULTILINE)
    assert sorted(set(shown)) == sorted(raypar.__all__)


# ---------------------------------------------------------------- numbers


def test_the_dots_of_the_schedule_are_the_bubble_it_names():
    page = PAGES["docs/plans.md"]
    (table,) = (block.text for block in page.blocks if block.language == "pycon" and "actor 3" in block.text)
    rows = [line.split()[2:] for line in table.splitlines() if line.startswith("actor")]
    dots, cells = sum(row.count(".") for row in rows), sum(map(len, rows))
    bubble = re.search(r"idle ticks \(the bubble\): (\d+)/(\d+) of the time", page.prose)
    assert bubble is not None
    assert dots * int(bubble[2]) == cells * int(bubble[1])


def test_the_retry_limits_have_ray_trains_defaults():
    fields = inspect.signature(ray.train.FailureConfig.__init__).parameters
    for page in (README, PAGES["docs/failures.md"]):
        assert "`max_failures` times (default 0)" in page.text
        assert "`max_preemption_failures` (default: no limit)" in page.text
    assert fields["max_failures"].default == 0
    assert fields["max_preemption_failures"].default == -1


def test_the_versions_are_the_pinned_ones():
    pinned = dict(re.findall(r"^(\S+)==(\S+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE))
    for name in ("torch", "ray", "pyarrow"):
        assert f"{name} {pinned[name]}" in README.text


def test_cluster_yaml_offers_what_the_commands_use():
    cluster, text = (ROOT / "cluster.yaml").read_text(encoding="utf-8"), PAGES["docs/clusters.md"].text
    for named in ("/home/ray/data/digits", "ray get-auth-token --generate", "RAY_AUTH_MODE=token", "pip install boto3"):
        assert named in text
        assert named in cluster


def test_docstrings_become_lists_of_names():
    pytest.importorskip("griffe", reason="the extra docs builds the site")
    path = ROOT / "docs" / "docstrings.py"
    spec = importlib.util.spec_from_file_location("docstrings", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    docstring = "data:   replicas of\n        the model\na, b:  two: names\n\n    drawn: here\n\nRaises: no\nlist"
    shown = "- **`data`**: replicas of the model\n- **`a`, `b`**: two: names\n\n    drawn: here\n\nRaises: no\nlist"
    assert module.as_markdown(docstring) == shown
