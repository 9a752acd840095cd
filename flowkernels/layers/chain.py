"""Layers one after another, as one layer."""

from collections.abc import Iterable

from torch import Tensor, nn

from ._programs import KeepsPrograms, Step
from ._stack import run


class Chain(KeepsPrograms):
    """z = layer_n(... layer_1(x)); logabsdet is the sum of theirs. The inverse goes back through them.

    Autoregressive layers that follow one another, with permutations and with batch norms in evaluation between them, run as one call
    of `ops.autoregressive_stack`, and so do, on a CPU, couplings of vectors whose conditioner is an `MLP`; layers of a subclass and
    layers with hooks are called one by one. Without gradient, on a CPU, what was found of the layers is kept from call to call, unless
    there are permutations between autoregressive ones.

    Args:
        layers: modules with `forward(x, context)` and `inverse(z, context)`, each returning (output, logabsdet [batch]).

    Raises:
        ValueError: there is no layer.
    """

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        if not self.layers:
            raise ValueError("layers must hold at least one layer; got none")

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._run(x, context, inverse=False)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._run(z, context, inverse=True)

    def _by_modules(self, x: Tensor, context: Tensor | None, *, inverse: bool, steps: list[Step] | None) -> tuple[Tensor, Tensor]:
        layers = list(self.layers._modules.values())  # a module list finds each by its number, at a microsecond and more
        return run(layers[::-1] if inverse else layers, x, context, inverse=inverse, steps=steps)
