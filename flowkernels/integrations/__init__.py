"""Layers and flows of other libraries, taken over: the same function, from their parameters, through our kernels.

    flow = flowkernels.integrations.from_nflows(flow)

The other library is imported when one of its modules is taken over, not before.
"""

from .nflows import from_nflows
from .normflows import from_normflows
from .pyro import from_pyro
from .pyro_distribution import to_pyro
from .zuko import from_zuko

__all__ = ["from_nflows", "from_normflows", "from_pyro", "from_zuko", "to_pyro"]
