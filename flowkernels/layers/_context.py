"""The context that layers of networks add to their sums."""

from torch import Tensor


def check_context(weight: Tensor | None, x: Tensor, context: Tensor | None) -> None:
    """weight: [context features, outputs] of the layer that is given x, [..., inputs]; None where it takes no context.

    Raises:
        ValueError: the context is missing or was not expected, or it has not a row for each of x, or another width.
    """
    if weight is None:
        if context is not None:
            raise ValueError(f"context was given, {list(context.shape)}, but the network takes none")
        return
    if context is None:
        raise ValueError(f"context is missing: the network takes [batch, {weight.shape[0]}]")
    wanted = (*x.shape[:-1], weight.shape[0])
    if context.shape != wanted:
        raise ValueError(f"context must have shape {list(wanted)}, one row per row of x; got {list(context.shape)}")
