"""`raypar …`: what a person does with checkpoints from a shell.

raypar inspect runs/digits                     what a checkpoint holds; of a run's folder the newest one
raypar export runs/digits digits.safetensors   its weights as a file that needs no raypar
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import pyarrow.fs as pafs
import torch
from rich.console import Console
from rich.table import Table
from safetensors import SafetensorError
from safetensors.torch import save_file

from raypar.checkpoint.contents import KINDS
from raypar.checkpoint.manifest import MANIFEST, newest_checkpoint, verify
from raypar.checkpoint.shards import Path, SavedTensors
from raypar.checkpoint.weights import read_state_dict
from raypar.errors import CheckpointError, RayparError, UsageError
from raypar.storage import Storage


def main(arguments: Sequence[str] | None = None) -> int:
    """The command `raypar`; returns its exit status: 0, or 1 after an error that it has told."""
    given = _parser().parse_args(arguments)
    run: Callable[[argparse.Namespace], None] = given.run
    try:
        run(given)
    except RayparError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)  # noqa: T201
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="raypar", description="What to do with raypar's checkpoints from a shell.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    where = "a checkpoint, or the folder of a run, of which the newest one is taken; a path or URI"
    export = commands.add_parser("export", help="write a checkpoint's weights as .safetensors or .pt")
    export.add_argument("checkpoint", help=where)
    export.add_argument("out", help="the file to write: NAME.safetensors or NAME.pt, a plain state dict")
    export.set_defaults(run=_export)
    inspect = commands.add_parser("inspect", help="tell what a checkpoint holds: plan, step, sizes")
    inspect.add_argument("checkpoint", help=where)
    inspect.add_argument("--tensors", action="store_true", help="list each tensor of the model, not each module")
    inspect.set_defaults(run=_inspect)
    return parser


def _checkpoint(given: str) -> Storage:
    """The folder of the checkpoint that was meant."""
    storage = Storage.open(given, label=given, error=CheckpointError)
    newest = newest_checkpoint(storage)
    if newest is not None:
        return Storage(newest, storage.filesystem)
    if storage.filesystem.get_file_info(f"{storage.path}/{MANIFEST}").type == pafs.FileType.NotFound:
        raise CheckpointError(
            f"{storage.path} is no whole checkpoint, and holds none; needed: a checkpoint, or the folder of a run that "
            "has saved one"
        )
    return storage


# ---------------------------------------------------------------- export


def _export(given: argparse.Namespace) -> None:
    found = _checkpoint(given.checkpoint)
    out: str = given.out
    if not out.endswith((".safetensors", ".pt")):
        raise UsageError(f"raypar export: found {out!r}, needed a name that ends in .safetensors or .pt")
    state = read_state_dict(found)
    unfinished = f"{out}.unfinished"  # what is there under the name is whole at any time
    try:
        if out.endswith(".pt"):
            with open(unfinished, "wb") as file:
                torch.save(state, file)
        else:
            save_file({name: tensor.contiguous() for name, tensor in state.items()}, unfinished, {"format": "pt"})
        os.replace(unfinished, out)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{out} could not be written: {error}") from error
    finally:
        if os.path.exists(unfinished):
            os.remove(unfinished)
    size = sum(tensor.nbytes for tensor in state.values())
    Console().print(f"{out}: {len(state)} tensors, {_bytes(size)}, from {found.path}", soft_wrap=True, highlight=False)


# ---------------------------------------------------------------- inspect


def _inspect(given: argparse.Namespace) -> None:
    found = _checkpoint(given.checkpoint)
    manifest = verify(found.path, found.filesystem)
    saved = SavedTensors(found.path, found.filesystem)
    console = Console(highlight=False)
    for line in _summary(found.path, manifest):
        console.print(line, soft_wrap=True)
    console.print(_table("what", ["tensors", "size"], _by_kind(saved)))
    of_model = _by_tensor(saved, manifest["names"]) if given.tensors else _by_module(saved, manifest["names"])
    console.print(of_model)


def _summary(path: str, manifest: dict[str, Any]) -> list[str]:
    position, plan = manifest["position"], manifest["plan"]
    trained = ", ".join(f"{count} batches of {name!r}" for name, count in position.get("trained", {}).items())
    fields = ", ".join(f"{name}={value!r}" for name, value in plan.items() if value is not None)
    size = sum(file["bytes"] for file in manifest["files"].values())
    lines = [
        path,
        f"step {manifest['step']}; goes on in epoch {position.get('epoch', 0) + 1}"
        + (f" behind {trained}" if trained else ""),
        f"written by Plan({fields})",
        f"{len(manifest['files'])} files, {_bytes(size)}, each as it was written",
    ]
    if manifest["history"]:
        numbers = {name: value for name, value in manifest["history"][-1].items() if isinstance(value, int | float)}
        lines.append("metrics: " + ", ".join(f"{name} {value:.6g}" for name, value in numbers.items()))
    return lines


def _table(first: str, others: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(first)
    for name in others:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*row)
    return table


def _by_kind(saved: SavedTensors) -> list[list[str]]:
    rows = []
    for kind, what in KINDS.items():
        inside = saved.below(kind)
        if inside:
            rows.append([what, str(len(inside)), _bytes(sum(map(saved.nbytes, inside)))])
    return rows


def _by_module(saved: SavedTensors, names: Sequence[str]) -> Table:
    modules: dict[str, list[str]] = {}
    for name in names:
        modules.setdefault(name.rpartition(".")[0], []).append(name)
    rows = []
    for module, inside in modules.items():
        paths: list[Path] = [("model", name) for name in inside]
        types = dict.fromkeys(_type(saved, where) for where in paths)
        values = sum(math.prod(saved.shapes[where]) for where in paths)
        state = sum(saved.nbytes(where) for name in inside for where in saved.below("optimizer", name))
        size = sum(map(saved.nbytes, paths))
        rows.append([module or "(the model itself)", f"{values:,}", ", ".join(types), _bytes(size), _bytes(state)])
    return _table("module", ["values", "type", "size", "optimizer"], rows)


def _by_tensor(saved: SavedTensors, names: Sequence[str]) -> Table:
    rows = []
    for name in names:
        where: Path = ("model", name)
        shape = " × ".join(map(str, saved.shapes[where])) or "1 number"
        rows.append([name, shape, _type(saved, where), _bytes(saved.nbytes(where))])
    return _table("tensor", ["shape", "type", "size"], rows)


def _type(saved: SavedTensors, where: Path) -> str:
    return str(saved.dtype(where)).removeprefix("torch.")


def _bytes(count: int) -> str:
    value, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
