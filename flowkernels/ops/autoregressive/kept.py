"""A stack whose lists stay in C++ from call to call. Handing them over takes longer than the loop of a small flow: 25 us of torch's for
five maps of three layers, where a tensor and a number take 4."""

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from ... import _extension
from ..._library import library, register_fake
from ..._torch import dispatch_mode, tracing_state
from ..scale_map import PoweredMap
from .loop import Lists, Map

library.define(
    "_keep_stack(Tensor[] weights, Tensor[] biases, Tensor[] context_weights, Tensor[] context_biases, Tensor[] visible, "
    "Tensor[] orders, Tensor[] affines, int[] activations, int[] wiring, int[] stages, float[] scales, Tensor[] factors) -> int"
)
library.define("_release_stack(int stack) -> int")  # how many are left
library.define("autoregressive_kept(Tensor x, Tensor? context, int stack) -> (Tensor, Tensor)")
_keep, _release = torch.ops.flowkernels._keep_stack.default, torch.ops.flowkernels._release_stack.default
_autoregressive_kept = torch.ops.flowkernels.autoregressive_kept.default

CAN_KEEP = _extension.has_kernel("autoregressive_kept", "CPU")


@register_fake("autoregressive_kept")
def _(x: Tensor, *_) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[:1])


class KeptStack:
    """`autoregressive_stack` of maps that do not change, for float32 or float64 on a CPU, without gradient: stack(x, context).

    What is written into the maps' tensors is seen, a learned scale's too; other tensors are another stack. C++ holds them as long as this
    object lives. Arguments that do not fit raise RuntimeError.
    """

    def __init__(self, maps: Sequence[Map]) -> None:
        none = maps[0].conditioner.weights[-1].new_empty(0)
        factors = [m.scale.a if isinstance(m.scale, PoweredMap) else none for m in maps]
        plain = [m._replace(scale=m.scale.scale) if isinstance(m.scale, PoweredMap) else m for m in maps]
        while _late:
            _release(_late.pop())
        self.number = _keep(*Lists.of(plain), factors)
        weakref.finalize(self, _let_go, self.number).atexit = False

    def __call__(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return _autoregressive_kept(x, context, self.number)


_late: list[int] = []  # stacks that went while somebody recorded the ops that are called


def _let_go(number: int) -> None:
    if tracing_state() is not None or dispatch_mode() is not None:
        _late.append(number)
    else:
        _release(number)
