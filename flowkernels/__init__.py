"""flowkernels: the fast backend for normalizing flows in PyTorch.

Fused kernels behind drop-in layers: `flowkernels.flows` are whole models, `flowkernels.layers` their parts, `flowkernels.ops` the
kernels themselves. `with flowkernels.backend("reference"):` chooses an implementation by hand.
"""

from ._version import __version__

# isort: split
from . import _extension

_extension.load()

from . import flows, layers, ops  # noqa: E402
from ._backend import backend, look_at_gpus_later  # noqa: E402
from .ops import ScaleMap  # noqa: E402

look_at_gpus_later()

__all__ = ["ScaleMap", "__version__", "backend", "flows", "layers", "ops"]
