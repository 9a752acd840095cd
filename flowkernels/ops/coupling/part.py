"""Which part of a tensor a coupling transforms, from coordinates alone."""

import enum

import torch
from torch import Tensor


class Part(enum.IntEnum):
    """The transformed part; the rest conditions it and passes unchanged.

    Halves, even and odd are over the channels, dimension 1; with an odd number of channels the half that passes has the fewer, C // 2.
    Even channels are 0, 2, 4, ... The checkerboards are over height and width: even are the sites where (h + w) % 2 == 0.
    """

    FIRST_HALF = 0
    SECOND_HALF = 1
    EVEN = 2
    ODD = 3
    CHECKERBOARD_EVEN = 4
    CHECKERBOARD_ODD = 5

    @property
    def is_checkerboard(self) -> bool:
        return self >= Part.CHECKERBOARD_EVEN

    def channels(self, total: int) -> tuple[int, int, int]:
        """(start, stop, step) of the transformed channels among `total`; all of them for a checkerboard."""
        if self == Part.FIRST_HALF:
            return 0, total - total // 2, 1
        if self == Part.SECOND_HALF:
            return total // 2, total, 1
        if self.is_checkerboard:
            return 0, total, 1
        return int(self == Part.ODD), total, 2

    def count(self, total: int) -> int:
        """How many of `total` channels are transformed; all of them, at half of the sites, for a checkerboard."""
        if self >= Part.CHECKERBOARD_EVEN:
            return total
        return total // 2 if self == Part.ODD else total - total // 2

    def transformed(self, x: Tensor) -> Tensor:
        """A view of the transformed channels."""
        start, stop, step = self.channels(x.shape[1])
        return x[:, start:stop:step]

    def untouched(self, x: Tensor) -> Tensor:
        """What a conditioner sees: a view of the channels that pass, or for a checkerboard x with the transformed sites zeroed."""
        if self.is_checkerboard:
            return torch.where(self.mask(x), 0, x)
        total = x.shape[1]
        if self == Part.FIRST_HALF:
            return x[:, total - total // 2 :]
        if self == Part.SECOND_HALF:
            return x[:, : total // 2]
        return x[:, int(self == Part.EVEN) :: 2]

    def mask(self, x: Tensor) -> Tensor:
        """Where a checkerboard transforms, [height, width]."""
        h, w = (torch.arange(n, device=x.device) for n in x.shape[-2:])
        return (h[:, None] + w) % 2 == self - Part.CHECKERBOARD_EVEN

    def replace(self, x: Tensor, transformed: Tensor) -> Tensor:
        """x with its transformed channels (or sites, `transformed` being full size then) replaced."""
        if self.is_checkerboard:
            return torch.where(self.mask(x), transformed, x)
        if self == Part.FIRST_HALF:
            return torch.cat([transformed, self.untouched(x)], 1)
        if self == Part.SECOND_HALF:
            return torch.cat([self.untouched(x), transformed], 1)
        return x.slice_scatter(transformed, 1, *self.channels(x.shape[1]))


_BY_NAME = {part.name.lower(): part for part in Part}


def parse_part(name: "str | Part") -> Part:
    """The part of that name.

    Raises:
        ValueError: there is no such part.
    """
    if isinstance(name, Part):
        return name
    try:
        return _BY_NAME[name]
    except (KeyError, TypeError):
        raise ValueError(f"part must be one of {', '.join(map(repr, _BY_NAME))}; got {name!r}") from None
