"""`raypar …`: what a person does with checkpoints from a shell.

raypar inspect runs/digits                     what a checkpoint contains; of a run's folder the newest one
raypar export runs/digits digits.safetensors   its weights as a file that can be read without raypar

Each command imports what it needs, so that `raypar --help` and a mistyped command answer at once.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from raypar.errors import CheckpointError, RayparError, UsageError

if TYPE_CHECKING:
    import torch
    from rich.table import Table

    from raypar.checkpoint.shards import Path, SavedTensors
    from raypar.storage import Storage


def main(arguments: Sequence[str] | None = None) -> int:
    """The command `raypar`; returns its exit status: 0, or 1 after an error that it has printed."""
    options = _parser().parse_args(arguments)
    run: Callable[[argparse.Namespace], None] = options.run
    try:
        run(options)
    except RayparError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)  # noqa: T201
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="raypar", description="Inspect and export raypar's checkpoints.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    checkpoint = "a checkpoint, or the folder of a run, whose newest checkpoint is taken; a path or URI"
    export = commands.add_parser("export", help="write a checkpoint's weights as .safetensors or .pt")
    export.add_argument("checkpoint", help=checkpoint)
    export.add_argument("out", help="the file to write: NAME.safetensors or NAME.pt, a plain state dict")
    export.set_defaults(run=_export)
    inspect = commands.add_parser("inspect", help="show what a checkpoint contains: plan, step, sizes")
    inspect.add_argument("checkpoint", help=checkpoint)
    inspect.add_argument("--tensors", action="store_true", help="list each tensor of the model, not each module")
    inspect.set_defaults(run=_inspect)
    return parser


def _checkpoint(path_or_uri: str) -> Storage:
    """The folder of the checkpoint that the user named, or of the newest one of the run that they named."""
    import pyarrow.fs as pafs

    from raypar.checkpoint.manifest import MANIFEST, newest_checkpoint
    from raypar.storage import Storage

    folder = Storage.open(path_or_uri, label=path_or_uri, error=CheckpointError)
    newest = newest_checkpoint(folder)
    if newest is not None:
        return Storage(newest, folder.filesystem)
    if folder.filesystem.get_file_info(f"{folder.path}/{MANIFEST}").type == pafs.FileType.NotFound:
        raise CheckpointError(
            f"{folder.path} is not a complete checkpoint and contains none; needed: a checkpoint, or the folder of a "
            "run that has saved one"
        )
    return folder


# ---------------------------------------------------------------- export


def _export(options: argparse.Namespace) -> None:
    from rich.console import Console

    from raypar.checkpoint.weights import read_state_dict

    checkpoint = _checkpoint(options.checkpoint)
    out: str = options.out
    if not out.endswith((".safetensors", ".pt")):
        raise UsageError(f"raypar export: found {out!r}, needed a name that ends in .safetensors or .pt")
    state = read_state_dict(checkpoint)
    _write(state, out)
    size = sum(tensor.nbytes for tensor in state.values())
    line = f"{out}: {len(state)} tensors, {_bytes(size)}, from {checkpoint.path}"
    Console().print(line, soft_wrap=True, highlight=False)


def _write(state: Mapping[str, torch.Tensor], out: str) -> None:
    """Write a state dict under another name first, so that the file `out` is complete at any time."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    unfinished = f"{out}.unfinished"
    try:
        if out.endswith(".pt"):
            with open(unfinished, "wb") as file:
                torch.save(dict(state), file)
        else:
            save_file({name: tensor.contiguous() for name, tensor in state.items()}, unfinished, {"format": "pt"})
        os.replace(unfinished, out)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{out} could not be written: {error}") from error
    finally:
        if os.path.exists(unfinished):
            os.remove(unfinished)


# ---------------------------------------------------------------- inspect


def _inspect(options: argparse.Namespace) -> None:
    from rich.console import Console

    from raypar.checkpoint.manifest import verify
    from raypar.checkpoint.shards import SavedTensors

    checkpoint = _checkpoint(options.checkpoint)
    manifest = verify(checkpoint.path, checkpoint.filesystem)
    saved = SavedTensors(checkpoint.path, checkpoint.filesystem)
    console = Console(highlight=False)
    for line in _summary(checkpoint.path, manifest):
        console.print(line, soft_wrap=True)
    console.print(_table("what", ["tensors", "size"], _by_kind(saved)))
    names: list[str] = manifest["names"]
    console.print(_by_tensor(saved, names) if options.tensors else _by_module(saved, names))


def _summary(path: str, manifest: Mapping[str, Any]) -> list[str]:
    position, plan = manifest["position"], manifest["plan"]
    trained = ", ".join(f"{count} batches of {name!r}" for name, count in position.get("trained", {}).items())
    fields = ", ".join(f"{name}={value!r}" for name, value in plan.items() if value is not None)
    size = sum(file["bytes"] for file in manifest["files"].values())
    lines = [
        path,
        f"step {manifest['step']}; continues in epoch {position.get('epoch', 0) + 1}"
        + (f" after {trained}" if trained else ""),
        f"written by Plan({fields})",
        f"{len(manifest['files'])} files, {_bytes(size)}, none damaged",
    ]
    if manifest["history"]:
        numbers = {name: value for name, value in manifest["history"][-1].items() if isinstance(value, int | float)}
        lines.append("metrics: " + ", ".join(f"{name} {value:.6g}" for name, value in numbers.items()))
    return lines


def _table(first: str, others: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    from rich.table import Table

    table = Table(first)
    for name in others:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*row)
    return table


def _by_kind(saved: SavedTensors) -> list[list[str]]:
    from raypar.checkpoint.contents import KINDS

    rows = []
    for kind, words in KINDS.items():
        paths = saved.below(kind)
        if paths:
            rows.append([words, str(len(paths)), _bytes(sum(map(saved.nbytes, paths)))])
    return rows


def _by_module(saved: SavedTensors, names: Sequence[str]) -> Table:
    from raypar.checkpoint.contents import MODEL, OPTIMIZER

    modules: dict[str, list[str]] = {}
    for name in names:
        modules.setdefault(name.rpartition(".")[0], []).append(name)
    rows = []
    for module, names_inside in modules.items():
        paths: list[Path] = [(MODEL, name) for name in names_inside]
        types = dict.fromkeys(_type(saved, path) for path in paths)
        values = sum(math.prod(saved.shapes[path]) for path in paths)
        state = sum(saved.nbytes(path) for name in names_inside for path in saved.below(OPTIMIZER, name))
        size = sum(map(saved.nbytes, paths))
        rows.append([module or "(the model itself)", f"{values:,}", ", ".join(types), _bytes(size), _bytes(state)])
    return _table("module", ["values", "type", "size", "optimizer"], rows)


def _by_tensor(saved: SavedTensors, names: Sequence[str]) -> Table:
    from raypar.checkpoint.contents import MODEL

    rows = []
    for name in names:
        path: Path = (MODEL, name)
        shape = " × ".join(map(str, saved.shapes[path])) or "1 number"
        rows.append([name, shape, _type(saved, path), _bytes(saved.nbytes(path))])
    return _table("tensor", ["shape", "type", "size"], rows)


def _type(saved: SavedTensors, path: Path) -> str:
    return str(saved.dtype(path)).removeprefix("torch.")


def _bytes(count: int) -> str:
    value, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


if __name__ == "__main__":
    sys.exit(main())
