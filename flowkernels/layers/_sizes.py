"""Numbers that say how large a module is, and whether what it is given is as large."""

from collections.abc import Iterable, Sequence
from numbers import Integral

from torch import Tensor


def is_count(value: int, least: int = 1) -> bool:
    """Whether it is a whole number that is large enough; True and False are none."""
    return isinstance(value, Integral) and not isinstance(value, bool) and value >= least


def parse_count(name: str, value: int, least: int = 1) -> int:
    """How many there are of something.

    Raises:
        ValueError: it is no whole number, or less than the least.
    """
    if not is_count(value, least):
        raise ValueError(f"{name} must be a whole number of at least {least}; got {value!r}")
    return int(value)


def parse_sizes(name: str, shape: Iterable[int]) -> tuple[int, ...]:
    """The shape of one row.

    Raises:
        ValueError: it is no sequence, or something in it is no whole number or less than 1.
    """
    sizes = tuple(shape) if isinstance(shape, Iterable) else ()
    if not sizes or not all(map(is_count, sizes)):
        raise ValueError(f"{name} must be a shape, such as (3, 32, 32), of whole numbers of at least 1; got {shape!r}")
    return tuple(map(int, sizes))


def parse_shape(shape: int | Sequence[int], sites: int | None = 2) -> tuple[int, ...]:
    """The shape of one row of x: (D,) or (C, H, W); or (C, *sites) with another number of sites, or with any.

    Raises:
        ValueError: it is neither, or something in it is no whole number or less than 1.
    """
    numbers = tuple(shape) if isinstance(shape, Sequence) else (shape,)
    fits = len(numbers) == 1 or (len(numbers) > 1 if sites is None else len(numbers) == 1 + sites)
    if not fits or not all(map(is_count, numbers)):
        image = "(C, H, W)" if sites == 2 else "(C, *sites)"
        raise ValueError(f"shape must be a number of features or {image}, whole numbers of at least 1; got {shape!r}")
    return tuple(map(int, numbers))


def parse_image_shape(name: str, shape: Iterable[int], halvings: int, at: str) -> tuple[int, int, int]:
    """The shape of an image whose sides are halved so many times; `at` says where.

    Raises:
        ValueError: it is no shape of an image, or height or width cannot be halved so often.
    """
    sizes = tuple(shape) if isinstance(shape, Iterable) else ()
    if len(sizes) != 3 or not all(map(is_count, sizes)):
        raise ValueError(f"{name} must be (C, H, W), each a whole number of at least 1; got {shape!r}")
    channels, height, width = map(int, sizes)
    if height % 2**halvings or width % 2**halvings:
        fewer = max(n for n in range(halvings) if not (height % 2**n or width % 2**n))
        advice = f"these can be halved {'once' if fewer == 1 else f'{fewer} times'}" if fewer else "these cannot be halved"
        raise ValueError(
            f"{name} must have height and width divisible by {2**halvings}, to be halved {at}; got {height} x {width}: {advice}"
        )
    return channels, height, width


def parse_widths(hidden_features: Iterable[int]) -> tuple[int, ...]:
    """The widths of hidden layers.

    Raises:
        ValueError: they are no sequence, or none, or one of them is no whole number or less than 1.
    """
    if is_count(hidden_features):
        raise ValueError(
            f"hidden_features must be a sequence of widths; got {hidden_features}, which for one layer is ({hidden_features},)"
        )
    widths = tuple(hidden_features) if isinstance(hidden_features, Iterable) else (hidden_features,)
    if not widths or not all(map(is_count, widths)):
        raise ValueError(f"hidden_features must be widths, whole numbers of at least 1; got {widths}")
    return tuple(map(int, widths))


def parse_context_features(context_features: int) -> int:
    """The width of a context; 0 is none.

    Raises:
        ValueError: it is less than 0, or no whole number.
    """
    return parse_count("context_features", context_features, 0)


def check_channels(name: str, x: Tensor, channels: int) -> None:
    """Raises ValueError where x is not [batch, channels, *sites]."""
    if x.dim() < 2 or x.shape[1] != channels:
        raise ValueError(f"{name} must have shape [batch, {channels}, *sites]; got {list(x.shape)}")


def check_rows(name: str, x: Tensor, shape: tuple[int, ...]) -> None:
    """Raises ValueError where x is not [batch, *shape]."""
    if x.shape[1:] != shape:
        raise ValueError(f"{name} must have shape [batch, {', '.join(map(str, shape))}]; got {list(x.shape)}")
