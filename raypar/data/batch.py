"""What `raypar.batches` yields for rows with named columns."""

from __future__ import annotations

from typing import Any

from raypar.errors import DataError, near_names
from raypar.tree import like_dict


class Batch(dict[str, Any]):
    """One batch: a tensor for each column, rows first. Asking for another column raises DataError."""

    def __missing__(self, column: str) -> Any:
        raise DataError(f"the batch has no column {column!r}; {near_names(column, self)}")


like_dict(Batch)
