"""Which rows train, and which are held out."""

import torch
from torch import Tensor


def split_rows(rows: int, held_out: float, seed: int) -> tuple[Tensor, Tensor]:
    """Shuffle the row numbers with a seed and hold a fraction of them out (at least one row).

    Returns:
        Row numbers of the training and of the held-out part, each ascending.

    Raises:
        ValueError: fewer than 2 rows would be left to train on.
    """
    if not 0 < held_out < 1:
        raise ValueError(f"validation must be a fraction between 0 and 1; got {held_out}")
    count = max(1, round(held_out * rows))
    if rows - count < 2:
        raise ValueError(f"data must have at least 2 rows to train on beside the held-out ones; got {rows} rows, {count} held out")
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    return order[count:].sort().values, order[:count].sort().values
