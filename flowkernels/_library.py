"""The torch.library handle that every op defines its schema on."""

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

library = torch.library.Library("flowkernels", "FRAGMENT")


def register_fake(op: str) -> Callable[[Callable], Callable]:
    """Decorates what makes the results of flowkernels::`op` for tensors without data.

    The dispatcher goes there where one argument alone is on the meta device: what it made would pass as a result that nobody has written.
    """

    def decorate(implementation: Callable) -> Callable:
        @functools.wraps(implementation)
        def run(*args):
            for tensor in _tensors(args):
                if type(tensor) in (Tensor, torch.nn.Parameter) and not tensor.is_meta:
                    raise RuntimeError(
                        f"flowkernels::{op} got tensors on {tensor.device} and tensors on the meta device, which have no data: give them "
                        "theirs with load_state_dict(..., assign=True), or to_empty(device=...) and load_state_dict(...)"
                    )
            return implementation(*args)

        torch.library.register_fake(f"flowkernels::{op}", run, lib=library)
        return implementation

    return decorate


def _tensors(args: tuple | list) -> Iterator[Tensor]:
    for arg in args:
        if isinstance(arg, Tensor):
            yield arg
        elif isinstance(arg, (tuple, list)):
            yield from _tensors(arg)
