"""flowkernels: the fast backend for normalizing flows in PyTorch.

Fused kernels behind drop-in layers: `flowkernels.flows` are whole models, `flowkernels.layers` their parts, `flowkernels.ops` the
kernels themselves. `with flowkernels.backend("reference"):` chooses an implementation by hand. `flowkernels.data`, `.integrations` and
`.training` are imported when they are first asked for.
"""

from importlib import import_module
from types import ModuleType

from ._version import __version__

# isort: split
from . import _extension

_extension.load()
_extension.check_instruction_set()

from . import flows, layers, ops  # noqa: E402
from ._backend import backend, look_at_gpus_later, loop_weights  # noqa: E402
from .ops import ScaleMap  # noqa: E402

look_at_gpus_later()

_LATER = ("data", "integrations", "training")


def __getattr__(name: str) -> ModuleType:
    if name in _LATER:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER})


__all__ = ["ScaleMap", "__version__", "backend", "flows", "layers", "loop_weights", "ops"]
