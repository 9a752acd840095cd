"""How modules are built that look at the numbers they make."""

import functools
from collections.abc import Callable

import torch


def built_on_cpu(init: Callable[..., None]) -> Callable[..., None]:
    """An `__init__` that works under `with torch.device(...)` too, the meta device included: what it makes is made on the CPU and moved."""

    @functools.wraps(init)
    def run(self, *args, **kwargs) -> None:
        device = torch.get_default_device()
        if device.type == "cpu":
            return init(self, *args, **kwargs)
        with torch.device("cpu"):
            init(self, *args, **kwargs)
        self.to(device)

    return run
