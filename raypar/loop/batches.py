"""`raypar.batches`: rows as batches of tensors, the same global batches whatever the plan.

Which rows form global batch b of epoch e depends on the data and the seed alone (see raypar.data.row_order). Each
replica takes its contiguous share of the batch's rows, as equal as can be; the last ones may get none of a short batch.
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
    """The batches of a data set that are still to do in this epoch, as this replica's share of each.

    name:       a key of Trainer(datasets=…).
    batch_size: rows of a global batch, over all replicas; each gets its share of them.
    shuffle:    another order of the rows in every epoch, drawn from (seed, epoch); False: as stored.
    drop_last:  leave out a last batch that is not full.
    columns:    of Parquet, the names of the columns to read; None: all.
    window:     of Parquet, how many rows are shuffled together; None: as many as fill 256 MiB.

    What a batch is, on the CPU, rows first:

    - **Parquet**: a dict of tensors by column, a fixed-shape tensor column as its shape, a list of fixed size as one
      dimension (also within another), and a list of any size where all have the same length.
    - **torch.utils.data.Dataset**: what torch's default_collate makes of its samples: a dict of tensors where a sample
      is a dict, a tuple of tensors where it is a tuple. Each replica fetches its own samples only, in the thread of the
      loop, so that random transforms repeat. Slow ones are better done once: write Parquet.
    - **a function** that returns a fresh iterable of samples, or an IterableDataset: the same. Needs shuffle=False: its
      order is its own, and must be the same at each call and on each replica, each of which goes through all of it.
    - **ray.data.Dataset**: a dict of tensors by column. Ray Train cuts it into equal shards, one a replica (a few rows
      may be left over), and a batch takes as many rows of each; so batch_size must be a multiple of the replicas.
      Needs shuffle=False: shuffle it with Ray Data. A resumed run repeats the epoch that it was in, and logs it.

    **How Parquet is shuffled.** A data set of no more rows than `window` is permuted as a whole, and stays in memory.
    A larger one is read in windows: its row groups are permuted, then as many of them as have no more than `window`
    rows together (at least one) are read and their rows permuted. So each row comes once an epoch, at a place that may
    be anywhere; but rows of one row group come near each other, within one window. Where rows that lie together are
    alike (sorted by class or by time), shuffle them once before they are written, or make the window larger and the row
    groups smaller. A replica keeps its rows of two windows, the next being read while the batches of one are trained
    on, and two row groups as they are stored, whatever the size of the data set. Nothing is read that lies before the
    batch at which a resumed run goes on.

    After a resume within an epoch, loops over a data set pass over the batches that steps have trained on, until a
    step trains on that data set again: a loop that evaluates on the same rows stands behind the one that trains.
    What a step has trained on is the newest batch of each loop around it, of both in
    `for a, b in zip(batches("a", …), batches("b", …))`. So train on each batch before the next one is taken: those
    that were fetched ahead count as trained on, and a resumed run leaves them out.

    Raises DataError for an unknown name or column, a column that holds no numbers, nulls, or lists of several lengths:
    at the call where the files' footers tell, else when they are read. UsageError for arguments that the data set does
    not take, and where a resumed epoch would go on with another batch_size, shuffle, seed or window or with other rows.
    """
    session = current("batches")
    if name not in session.run.datasets:
        raise DataError(
            f"batches({name!r}): no such data set; {near_names(name, session.run.datasets)}; see Trainer(datasets=…)"
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
    """What `batches` returns: the batches of a source, known to the session as a loop."""
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
                _with_the_last_known(read) if loop.count is None else ((each, False) for each in read)
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
                "same order of rows, and a resumed run begins with the first pass again; needed: for epoch in "
                "raypar.epochs(…), or shuffle=False",
                stacklevel=2,  # the line of the user's loop
            )
    finally:
        session.data.end_loop(loop)


def _with_the_last_known(items: Iterator[Any]) -> Iterator[tuple[Any, bool]]:
    """Each with whether it is the last, which takes the next one to know."""
    end: Any = object()
    item = next(items, end)
    while item is not end:
        following = next(items, end)
        yield item, following is end
        item = following
