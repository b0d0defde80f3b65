"""`raypar.batches`: a data set as batches of tensors, the same global batches under every plan.

Which rows form global batch b of epoch e depends only on the data and the seed (see raypar.data.row_order). Each
replica takes its contiguous share of these rows, as equal as possible; of a short batch, the last replicas may get no
row.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from typing import Any

from raypar.data.sources import Reading, Source, open_source
from raypar.errors import DataError, near_names
from raypar.loop.position import Loop
from raypar.loop.session import Session, current

logger = logging.getLogger("raypar")


def batches(
    name: str,
    *,
    batch_size: int,
    shuffle: bool = True,
    drop_last: bool = False,
    columns: Sequence[str] | None = None,
    seed: int = 0,
    window: int | None = None,
) -> Iterator[Any]:
    """This replica's share of each batch of a data set that is still to do in this epoch: an iterator.

    name:       a key of Trainer(datasets=…).
    batch_size: rows of a global batch, over all replicas; each replica gets its share of them.
    shuffle:    True (the default): in every epoch another order of the rows, drawn from (seed, epoch). False: the order
                in which they are stored.
    drop_last:  whether to leave out a last batch that is not full. Default False.
    columns:    Parquet only: the names of the columns to read. Default None: all.
    seed:       of the shuffling. Default 0.
    window:     Parquet only: how many rows are shuffled together. Default None: as many as fill 256 MiB.

    What a batch is, depending on the data set; its tensors are on the CPU, rows first:

    - **Parquet** (path or URI of a file or folder): a dict of tensors by column. A fixed-shape tensor column keeps its
      shape; a list of fixed size becomes one dimension (also inside another list), and so does a list column if all its
      lists have the same length.
    - **torch.utils.data.Dataset**: what torch's default_collate makes of its samples: a dict of tensors if a sample is
      a dict, a tuple of tensors if it is a tuple. Each replica fetches only its own samples, in the thread of the loop,
      so that random transforms are repeatable. If they are slow, apply them once and write Parquet.
    - **a function** that returns a fresh iterable of samples, or an IterableDataset: the same. Needs shuffle=False: the
      order is that of the iterable, which must be the same at each call and on each replica; every replica iterates
      over all of it.
    - **ray.data.Dataset**: a dict of tensors by column. Ray Train splits it into equal shards, one per replica (a few
      rows may be left over), and a batch takes equally many rows of each; so batch_size must be a multiple of the
      number of replicas. Needs shuffle=False: shuffle it with Ray Data. A resumed run repeats its epoch, and logs that.

    **How Parquet is shuffled.** A data set of at most `window` rows is permuted as a whole and stays in memory. A
    larger one is read in windows: its row groups are permuted, then as many of them as fit into `window` (at least one)
    are read and their rows permuted. So each row appears exactly once per epoch and may appear anywhere, but rows of
    one row group appear near each other, within one window. If neighbouring rows are alike (sorted by class or time),
    shuffle them once before you write them, or make `window` larger and the row groups smaller. Whatever the size of
    the data set, a replica holds its rows of two windows (the next one is read while the batches of the current one are
    trained on) and two row groups as they are stored.

    **After a resume within an epoch**, loops over a data set skip the batches that steps have trained on, until a step
    trains on that data set again; skipped rows are not read. So within an epoch, evaluate on a data set after training
    on it, not before. A step trains on the newest batch of each loop around it: of both loops in
    `for a, b in zip(batches("a", …), batches("b", …))`. So train on each batch before you take the next one: batches
    that were fetched ahead count as trained on, and a resumed run leaves them out.

    Raises DataError for an unknown name or column, and for a column that holds nulls, values other than numbers, or
    lists of several lengths: at the call if the files' footers tell, else when the rows are read. Raises UsageError
    outside a train loop, for arguments that the data set does not take, and if a resumed epoch would continue with
    another batch_size, shuffle, seed or window, or with other rows.
    """
    session = current("batches")
    if name not in session.run.datasets:
        raise DataError(
            f"batches({name!r}): Trainer(datasets=…) has no such data set; {near_names(name, session.run.datasets)}"
        )
    reading = Reading(
        name=name,
        batch_size=batch_size,
        shuffle=bool(shuffle),
        drop_last=drop_last,
        columns=columns,
        seed=seed,
        window=window,
        epoch=session.data.position.epoch,
        replica=session.replica,
        replicas=session.size,
    )
    source = open_source(session.run.datasets[name], reading, session.tables)
    batching = {"batch_size": batch_size, "shuffle": bool(shuffle), "seed": int(seed), **source.layout}
    return _batches(session, Loop(name, source.count, batching), source)


def _batches(session: Session, loop: Loop, source: Source) -> Generator[Any]:
    """What `batches` returns: the batches of a source, counted by the session as a loop."""
    if source.only_whole_epochs and (done := session.data.forget_progress(loop.name)):
        logger.warning(
            "batches(%r): this data set resumes by epoch only, so epoch %d begins again, of which %d batches were "
            "trained on before.",
            loop.name,
            session.data.position.epoch,
            done,
        )
    start = index = session.data.begin_loop(loop)
    try:
        with closing(source.read(start)) as read:
            for batch, is_last in (
                _with_the_last_known(read) if loop.count is None else ((share, False) for share in read)
            ):
                if is_last:
                    loop.count = index + 1
                session.restore_random()
                session.data.next_batch(loop, index)
                index += 1
                yield batch
        if index == 0:
            raise DataError(
                f"batches({loop.name!r}): the data set gave no sample, or too few for a full batch; a function must "
                "return a fresh iterable at each call"
            )
        loop.count = index
        if session.data.finish_loop(loop) and session.replica == 0:
            warnings.warn(
                f"found a second pass over raypar.batches({loop.name!r}) outside raypar.epochs: every pass has the "
                "same order of rows, and a resumed run starts again with the first pass; needed: for epoch in "
                "raypar.epochs(…), or shuffle=False",
                stacklevel=2,  # the line of the user's loop
            )
    finally:
        session.data.end_loop(loop)


def _with_the_last_known(items: Iterator[Any]) -> Iterator[tuple[Any, bool]]:
    """Each item with whether it is the last one; to know that, the next one is fetched first."""
    end: Any = object()
    item = next(items, end)
    while item is not end:
        following = next(items, end)
        yield item, following is end
        item = following
