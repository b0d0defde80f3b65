"""`ray job submit` as a user does it: a real head node, the main job as a script, its log, its outcome.

The head node is a cluster of its own beside any other on this machine: its ports are free ones, its files lie in a
folder of its own, and its token is its own too. It ends with its own processes and no others.
"""

from __future__ import annotations

import asyncio
import os
import re
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from ray.job_submission import JobStatus, JobSubmissionClient

from support.waiting import LIMIT

ROOT = Path(__file__).parents[2]
CPUS = 12


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def processes_of(folder: str) -> list[int]:
    """The processes that name `folder` in their command line, this one not."""
    found = []
    for entry in Path("/proc").iterdir():
        with suppress(OSError):
            if entry.name.isdigit() and folder.encode() in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
    return [pid for pid in found if pid != os.getpid()]


@pytest.fixture(scope="module")
def client() -> Iterator[JobSubmissionClient]:
    folder = tempfile.mkdtemp(prefix="raypar-head-")  # short: sockets lie in it, whose paths may have 107 bytes
    token, dashboard = secrets.token_hex(32), free_port()
    ports = {
        "port": free_port(),
        "dashboard-port": dashboard,
        "ray-client-server-port": free_port(),
        "dashboard-agent-listen-port": free_port(),  # takes the jobs; the default belongs to whoever came first
        "min-worker-port": 0,
        "max-worker-port": 0,
    }
    command = [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"),
        *("--temp-dir", folder, "--num-cpus", str(CPUS), "--object-store-memory", str(100 * 2**20)),
        *("--dashboard-host", "127.0.0.1", *(f"--{name}={port}" for name, port in ports.items())),
    ]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment["RAY_worker_niceness"] = "0"
    # Ray hides the GPUs from processes that ask for none; these jobs are about submitting, not about GPUs.
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token, "CUDA_VISIBLE_DEVICES": ""}
    log = Path(folder, "head.log")
    with log.open("w") as file:
        head = subprocess.Popen(command, env=environment, stdout=file, stderr=file, start_new_session=True)
    try:
        address = f"http://127.0.0.1:{dashboard}"
        wait_for(address, head, log)
        yield JobSubmissionClient(address, headers={"Authorization": f"Bearer {token}"})
    finally:
        head.send_signal(signal.SIGTERM)  # with --block it ends its processes before itself
        with suppress(subprocess.TimeoutExpired):
            head.wait(20)
        for pid in processes_of(folder):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        head.wait()
        shutil.rmtree(folder, ignore_errors=True)


def wait_for(address: str, head: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + LIMIT
    while True:
        try:
            with urllib.request.urlopen(f"{address}/api/version", timeout=5):
                return
        except urllib.error.HTTPError:
            return  # it answers
        except OSError:
            assert head.poll() is None, f"ray start ended:\n{log.read_text()}"
            assert time.monotonic() < deadline, f"no head node after {LIMIT:g} s:\n{log.read_text()}"
            time.sleep(0.1)


@dataclass
class Outcome:
    status: JobStatus
    chunks: list[str]  # the log in the pieces in which it came
    message: str

    @property
    def log(self) -> str:
        return "".join(self.chunks)


def submit(client: JobSubmissionClient, working_dir: Path, home: Path, command: str) -> str:
    """`ray job submit --working-dir … -- python …`; returns the job's id."""
    entrypoint = shlex.join([sys.executable, *command.split()])
    runtime_env = {"working_dir": str(working_dir), "env_vars": {"HOME": str(home)}}
    deadline = time.monotonic() + LIMIT
    while True:
        try:
            return client.submit_job(entrypoint=entrypoint, runtime_env=runtime_env)
        except RuntimeError as error:  # the dashboard answers before the agent that runs jobs has called it
            if "agent" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.1)


async def followed(client: JobSubmissionClient, job: str) -> Outcome:
    """`ray job logs --follow`, to the end of the job."""
    chunks = [chunk async for chunk in client.tail_job_logs(job)]
    deadline = time.monotonic() + LIMIT
    while not (info := client.get_job_info(job)).status.is_terminal() and time.monotonic() < deadline:
        await asyncio.sleep(0.05)  # the log ends a moment before the job does
    return Outcome(info.status, chunks, info.message or "")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("jobs")


@pytest.fixture(scope="module")
def jobs(client: JobSubmissionClient, folder: Path) -> dict[str, Outcome]:
    """All jobs at once, since most of a job's time is spent on starting."""
    (folder / "example").mkdir()
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    example = readme.partition("```python\n")[2].partition("```\n")[0]
    (folder / "example" / "sine.py").write_text(example, encoding="utf-8")
    digits = f"jobs/train_digits.py --model mlp --epochs 1 --storage {folder}"
    ids = {
        "digits": submit(client, ROOT, folder, f"{digits} --pipeline 2 --name digits"),
        "too big": submit(client, ROOT, folder, f"{digits} --data 4 --pipeline 3"),
        "example": submit(client, folder / "example", folder, "sine.py"),
    }

    async def follow() -> list[Outcome]:
        return await asyncio.gather(*(followed(client, job) for job in ids.values()))

    return dict(zip(ids, asyncio.run(follow()), strict=True))


@pytest.mark.slow
def test_the_main_job_succeeds_and_its_log_ends_with_the_table(jobs: dict[str, Outcome], folder: Path):
    outcome = jobs["digits"]
    assert outcome.status == JobStatus.SUCCEEDED, outcome.log
    assert "Starting 2 stage actors and 1 train worker on Ray" in outcome.log
    first_progress = next(i for i, chunk in enumerate(outcome.chunks) if "epoch 1/1 " in chunk)
    table = next(i for i, chunk in enumerate(outcome.chunks) if "test accuracy" in chunk)
    assert first_progress < table, "progress is to be seen while the job runs"
    assert re.search(r"│ +1 │ \d\.\d{4} │ +\d\d\.\d\d% │ +[\d,]+ │", outcome.log), outcome.log
    assert re.search(r"test accuracy \d\d\.\d\d% after 1 epoch, loss \d\.\d{4}", outcome.log), outcome.log
    assert (folder / "digits" / "checkpoint_00000023" / "checkpoint.json").exists()


@pytest.mark.slow
def test_a_job_that_cannot_work_fails_with_the_reason_in_its_log(jobs: dict[str, Outcome]):
    outcome = jobs["too big"]
    assert outcome.status == JobStatus.FAILED, outcome.log
    message = " ".join(outcome.log.split())
    assert "InfeasiblePlanError: " in message
    assert "16 CPUs" in message  # twelve stages and four workers
    assert f"the cluster has {CPUS} " in message, message
    assert "Traceback" not in message
    assert "exit code 1" in outcome.message


@pytest.mark.slow
def test_the_example_of_readme_runs_as_it_stands(jobs: dict[str, Outcome], folder: Path):
    outcome = jobs["example"]
    assert outcome.status == JobStatus.SUCCEEDED, outcome.log
    assert "Starting 4 stage actors and 2 train workers on Ray" in outcome.log
    loss = re.search(r"^4 +160 +4 +([\d.e-]+)$", outcome.log, re.MULTILINE)
    assert loss is not None, outcome.log
    assert float(loss[1]) < 0.01
    assert len(list(folder.glob("ray_results/*/checkpoint_*/checkpoint.json"))) == 5
