"""Degrees of MADE units and the staircases that they make (Germain et al. 2015, section 3).

A hidden unit of degree k sees units of degree <= k; an output of degree d sees units of degree < d. Units are kept sorted by
degree, so that a mask is a staircase: unit j sees the first `visible[j]` units below it, and `visible` ascends.
"""

import torch
from torch import Tensor

# with a context, this many hidden units see no feature where the width allows, so that the context reaches every output
CONTEXT_UNITS = 8


def hidden_degrees(
    units: int, features: int, *, rule: str = "even", context: bool = False, generator: torch.Generator | None = None
) -> Tensor:
    """Degrees of one hidden layer, sorted.

    Args:
        units: width of the layer.
        features: number of features; feature degrees are 1..features.
        rule: "even" spreads the units evenly over all degrees, so that a narrow layer still sees the last features. "cycling"
            counts 1, 2, ..., features - 1, 1, 2, ... as other libraries do: with fewer than features - 1 units the last
            features are seen by nothing. "random" draws uniformly.
        context: whether a context enters the layer that every output shall see. Then degrees begin at 0: without units that see
            no feature, the first feature's outputs could see no hidden unit that sees the context.
        generator: source of the random rule.

    Returns:
        Degrees between 0 and features - 1, int64 [units], ascending.
    """
    check_rule("rule", rule)
    top = features - 1
    if top == 0:
        return torch.zeros(units, dtype=torch.int64)
    lowest = 0 if context else 1
    if rule == "cycling":
        return (torch.arange(units) % (features - lowest) + lowest).sort().values
    if rule == "random":
        return torch.randint(lowest, features, (units,), generator=generator).sort().values
    free = min(max(CONTEXT_UNITS, units // features), units // 2) if context else 0
    rest = units - free
    if rest > 1 and rest < top:
        spread = 1 + torch.arange(rest) * (top - 1) // (rest - 1)  # few units: from the first degree to the last
    else:
        spread = 1 + torch.arange(rest) * top // max(rest, 1)
    return torch.cat([torch.zeros(free, dtype=torch.int64), spread])


def check_rule(name: str, rule: str) -> None:
    """Raises ValueError where it is no rule of `hidden_degrees`."""
    if rule not in ("even", "cycling", "random"):
        raise ValueError(f"{name} must be 'even', 'cycling' or 'random'; got {rule!r}")


def staircase(below: Tensor, above: Tensor, *, strict: bool) -> Tensor:
    """How many of the sorted units `below` each of the sorted units `above` sees: int32 [len(above)], ascending.

    strict: an output (sees degrees < its own) rather than a hidden unit (sees degrees <= its own).
    """
    for name, degrees in (("below", below), ("above", above)):
        if (degrees.diff() < 0).any():
            raise ValueError(f"degrees of the units {name} must ascend; got {degrees.tolist()}")
    return torch.searchsorted(below, above, right=not strict).to(torch.int32)


def check_staircase(visible: Tensor, inputs: int, where: str = "") -> list[int]:
    """Check what a masked layer is given, and return it: reads the values. `where` begins the message.

    Raises:
        ValueError: visible does not ascend, or exceeds the inputs.
    """
    counts = visible.tolist()
    if counts != sorted(counts) or (counts and not 0 <= counts[0] <= counts[-1] <= inputs):
        raise ValueError(f"{where}visible must ascend from 0 to at most {inputs}; got {counts}")
    return counts
