"""Numbers that say how large a module is."""

from collections.abc import Iterable
from numbers import Integral


def parse_count(name: str, value: int) -> int:
    """How many there are of something.

    Raises:
        ValueError: it is no whole number, or less than 1.
    """
    if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1; got {value!r}")
    return int(value)


def parse_sizes(name: str, shape: Iterable[int]) -> tuple[int, ...]:
    """The shape of one row.

    Raises:
        ValueError: it is no sequence, or something in it is no whole number or less than 1.
    """
    sizes = () if isinstance(shape, Integral) else tuple(shape)
    if not sizes or not all(isinstance(size, Integral) and size >= 1 for size in sizes):
        raise ValueError(f"{name} must be a shape, such as (3, 32, 32), of whole numbers of at least 1; got {shape!r}")
    return tuple(map(int, sizes))


def parse_widths(hidden_features: Iterable[int]) -> tuple[int, ...]:
    """The widths of hidden layers.

    Raises:
        ValueError: they are no sequence, or none, or one of them is no whole number or less than 1.
    """
    if isinstance(hidden_features, Integral):
        raise ValueError(
            f"hidden_features must be a sequence of widths; got {hidden_features}, which for one layer is ({hidden_features},)"
        )
    widths = tuple(hidden_features)
    if not widths or not all(isinstance(width, Integral) and width >= 1 for width in widths):
        raise ValueError(f"hidden_features must be widths, whole numbers of at least 1; got {widths}")
    return tuple(map(int, widths))


def parse_context_features(context_features: int) -> int:
    """The width of a context; 0 is none.

    Raises:
        ValueError: it is less than 0, or no integer.
    """
    if not isinstance(context_features, Integral) or context_features < 0:
        raise ValueError(f"context_features must be a whole number of at least 0; got {context_features!r}")
    return context_features
