"""README says nothing that is not so: its code runs, its output is the real one, what it names exists."""

from __future__ import annotations

import contextlib
import doctest
import inspect
import io
import re
import shlex
from pathlib import Path
from typing import Any

import click
import pytest
import ray.train
from ray.scripts.scripts import cli as ray_cli

import raypar
import train_digits

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
PROSE = re.sub(r"^```.*?^```$", "", TEXT, flags=re.MULTILINE | re.DOTALL)
CODE = re.findall(r"(?<!`)`([^`\n]+)`(?!`)", PROSE)  # what stands in single backticks
SHELL = [
    *(line.partition("#")[0] for kind, block in BLOCKS if not kind for line in block.replace("\\\n", "").splitlines()),
    *CODE,
]


def blocks(kind: str) -> list[str]:
    return [block for found, block in BLOCKS if found == kind]


def test_it_is_about_200_lines():
    lines = TEXT.splitlines()
    assert 180 <= len(lines) <= 220
    assert [line for line in lines if len(line) > 120 and not line.startswith(("|", "raypar.errors"))] == []


# ---------------------------------------------------------------- code


@pytest.fixture
def namespace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))  # where Ray Train puts a run without a storage path
    return {"__name__": "__main__"}


def run(code: str, namespace: dict[str, Any]) -> str:
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        exec(compile(code, "README.md", "exec"), namespace)
    return shown.getvalue()


@pytest.mark.filterwarnings("ignore:the stages are far from balanced")  # microseconds, measured on a busy machine
def test_the_python_blocks_run_one_after_the_other(namespace: dict[str, Any]):
    """Without Ray; tests/cluster/test_jobs.py runs the first one on it, as it stands."""
    first, second = blocks("python")
    assert len(first.splitlines()) <= 25
    assert "local=True" not in first
    assert "local=True" in second
    assert "loss" in run(first.replace(").fit()", ", local=True).fit()"), namespace)
    shown = run(second, namespace)
    found = re.search(r"tensor\(\[\[([\d.]+)\]\]", shown)
    assert found is not None, shown
    assert float(found[1]) == pytest.approx(0.997, abs=0.05)


def test_the_sessions_show_what_python_shows():
    session = "\n".join(blocks("pycon"))
    shown = io.StringIO()
    test = doctest.DocTestParser().get_doctest(session, {}, "README", "README.md", 0)
    assert len(test.examples) == 4
    failed, _ = doctest.DocTestRunner().run(test, out=shown.write)
    assert not failed, shown.getvalue()


def test_the_dots_of_the_table_are_the_bubble_that_it_names():
    (table,) = (block for block in blocks("pycon") if "actor 3" in block)
    rows = [line.split()[2:] for line in table.splitlines() if line.startswith("actor")]
    dots, cells = sum(row.count(".") for row in rows), sum(map(len, rows))
    named = re.search(r"The dots are the bubble, (\d+)/(\d+) of the time", PROSE)
    assert named is not None
    assert dots * int(named[2]) == cells * int(named[1])


# ---------------------------------------------------------------- what it names


def test_every_plan_it_names_has_a_schedule():
    plans = [code for code in CODE if re.fullmatch(r"Plan\([^…]*\)", code)]
    assert len(plans) >= 6
    for code in plans:
        assert raypar.schedule_of(eval(code, {"Plan": raypar.Plan})).rows, code


def test_every_file_it_links_to_exists():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", TEXT) if "://" not in link]
    assert len(links) > 15
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_every_name_of_raypar_exists():
    everywhere = TEXT.replace("raypar.errors", "raypar.errors")
    for name in set(re.findall(r"\braypar\.([a-zA-Z_]+)", everywhere)):
        assert name in raypar.__all__, name
    for name in set(re.findall(r"\breplica\.([a-z_]+)(?=\()", TEXT)):
        assert callable(getattr(raypar.Replica, name)), name


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("Plan", raypar.Plan.__init__),
        ("Timeouts", raypar.Timeouts.__init__),
        ("Trainer", raypar.Trainer.__init__),
        ("parallelize", raypar.parallelize),
        ("RunConfig", ray.train.RunConfig.__init__),
        ("FailureConfig", ray.train.FailureConfig.__init__),
    ],
)
def test_every_argument_exists(name: str, function: Any):
    known = inspect.signature(function).parameters
    found = re.findall(rf"\b{name}\((?:[^()\n]*, )?(\w+)=", TEXT)
    assert found, f"README names no argument of {name}"
    assert set(found) <= set(known)


def test_the_fields_of_failures_are_those_of_ray_train():
    known = inspect.signature(ray.train.FailureConfig.__init__).parameters
    named = {code for code in CODE if code.startswith("max_")}
    assert named == {"max_failures", "max_preemption_failures"}
    assert {name: known[name].default for name in named} == {"max_failures": 0, "max_preemption_failures": -1}


def test_every_target_of_make_exists():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    named = {word for line in SHELL for word in re.findall(r"^make (\w+)", line)}
    assert named == {"demo", "test"}
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in named)


def test_every_option_of_the_main_job_exists():
    commands = [line.partition("jobs/train_digits.py ")[2] for line in SHELL if "jobs/train_digits.py " in line]
    assert len(commands) >= 4
    for arguments in commands:
        train_digits.parse(shlex.split(arguments))


def test_every_command_of_ray_exists_with_its_options():
    named = set()
    for line in SHELL:
        if not re.match(r"ray [a-z]", line):
            continue
        words = shlex.split(line.partition(" -- ")[0])[1:]
        command: click.Command = ray_cli
        while isinstance(command, click.Group):
            word = words.pop(0)
            assert word in command.commands, line
            command = command.commands[word]
        known = {option for parameter in command.params for option in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= known, line
        named.add(command.name)
    assert {"up", "dashboard", "submit", "logs", "exec", "down", "start", "get-auth-token"} <= named


def test_the_versions_are_the_pinned_ones():
    pinned = dict(re.findall(r"^(\S+)==(\S+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE))
    for name in ("torch", "ray", "pyarrow"):
        assert f"{name} {pinned[name]}" in TEXT


def test_cluster_yaml_offers_what_the_commands_use():
    cluster = (ROOT / "cluster.yaml").read_text(encoding="utf-8")
    for named in ("/home/ray/data/digits", "ray get-auth-token --generate", "RAY_AUTH_MODE=token", "pip install boto3"):
        assert named in TEXT
        assert named in cluster
