"""Integer buffers that say what a module computes, and how it is noticed that somebody has averaged them."""

from collections.abc import Iterator
from typing import Self

import torch
from torch import Tensor, nn

from .._torch import dispatch_mode


class Structured(nn.Module):
    """A module with integer buffers, made by `register_integers`.

    Averages of weights must leave them alone. torch's `AveragedModel(use_buffers=True)` does not, and cuts off what it gets: 3 becomes 2,
    and the module computes another function, whose log-determinant may not be its own. `eval()` and `state_dict()` ask whether they are
    whole, by their sum. They stay buffers all the same: random ones have to be those of rank 0 under DistributedDataParallel.
    Who averages floating-point buffers alone does no harm, but rounding may leave 14.999999 of 15: a sum is kept as its binary digits.
    """

    _integers: tuple[str, ...] = ()

    def register_integers(self, name: str, numbers: Tensor) -> None:
        """A buffer, and beside it its sum in floating-point numbers, which no average of equal ones changes. NaN: not known."""
        self.register_buffer(name, numbers)
        self.register_buffer(f"_{name}_sum", _sum(numbers), persistent=False)
        self._integers += (name,)

    def _changed(self) -> Iterator[str]:
        """Names of the buffers that are not what they were."""
        for name in self._integers:
            numbers, known = self._buffers[name], self._buffers[f"_{name}_sum"]
            if not numbers.is_meta and not torch.isnan(known).any() and not torch.equal(_sum(numbers), known.round()):
                yield name

    def _check_whole(self) -> None:
        if torch.compiler.is_compiling() or dispatch_mode() is not None:  # no numbers to look at
            return
        for name in self._changed():
            raise ValueError(
                f"{name} of {type(self).__name__} must be what it was when the module was made or loaded; got other numbers: averages of "
                "weights must leave integer buffers alone, as torch's AveragedModel does with use_buffers=False"
            )

    def train(self, mode: bool = True) -> Self:
        if not mode:  # some loops say train() at every step
            self._check_whole()
        return super().train(mode)

    def _save_to_state_dict(self, *arguments) -> None:
        self._check_whole()
        super()._save_to_state_dict(*arguments)

    def _load_from_state_dict(self, *arguments) -> None:
        super()._load_from_state_dict(*arguments)
        for name in self._integers:
            self._buffers[f"_{name}_sum"] = _sum(self._buffers[name])

    def _apply(self, *arguments, **options) -> Self:
        integers = {name: self._buffers[name] for name in self._integers}
        sums = {f"_{name}_sum": self._buffers[f"_{name}_sum"] for name in integers}
        super()._apply(*arguments, **options)
        for name, before in integers.items():
            now = self._buffers[name]
            if now.is_floating_point():  # by `type`, which casts all buffers
                self._buffers[name] = before.to(now.device)
        for name, before in sums.items():  # whatever the module was cast to, they stay exact; new memory holds anything
            now = self._buffers[name]
            moved = not before.is_meta and not now.is_meta and torch.equal(now, before.to(now))
            self._buffers[name] = before.to(now.device) if moved else torch.full_like(before, torch.nan, device=now.device)
        return self


def _sum(numbers: Tensor) -> Tensor:
    """The last digits of the sum, each 0 or 1, which no dtype rounds."""
    return ((numbers.sum().long() >> torch.arange(24, device=numbers.device)) & 1).float()
