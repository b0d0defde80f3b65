"""Freed memory stays with a process that asks for it: taking it up again faults no page."""

from __future__ import annotations

import subprocess
import sys

import pytest

from raypar.workers import malloc as memory

FAULTS = """
import resource, runpy
keep_freed_memory = runpy.run_path({path!r})["keep_freed_memory"]
{setting}
for step in range(20):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    held = [bytearray(b"x") * (1 << 22) for _ in range(16)]
    del held
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def run(setting: str, **variables: str) -> list[str]:
    """In a process of its own, which imports nothing else: its memory is only what the code takes."""
    code = FAULTS.format(setting=setting, path=memory.__file__)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=variables, check=True)
    return done.stdout.split()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mallopt is glibc's")
def test_memory_freed_by_a_step_is_reused_without_page_faults():
    _, faults = run("kept = None")
    kept, none = run("kept = keep_freed_memory()")
    assert kept == "True"
    assert int(none) < int(faults) / 2


def test_the_users_own_settings_of_the_allocator_hold():
    assert run("kept = keep_freed_memory()", MALLOC_ARENA_MAX="4", MALLOC_TRIM_THRESHOLD_="1000")[0] == "False"
