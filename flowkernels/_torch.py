"""What we use of torch beside its public interface: asked for once, and with an answer in its place where a torch has it no more.

The answers are the careful ones: what might be transformed, watched or cast is computed as if it were, by the parts of a call. That is
slower, and right.
"""

from collections.abc import Callable
from functools import lru_cache, reduce, wraps
from typing import Any

import torch
from torch.autograd import forward_ad


def _find(path: str, otherwise: Callable) -> Callable:
    try:
        return reduce(getattr, path.split("."), torch)
    except AttributeError:
        return otherwise


# which transform of torch.func a call is in; None outside of all
transform_level: Callable[[], int | None] = _find("_C._functorch.maybe_current_level", lambda: 0)
transforms_active: Callable[[], bool] = _find("_C._are_functorch_transforms_active", lambda: True)
# of torch.func's tensors
is_wrapped: Callable[[torch.Tensor], bool] = _find("_C._functorch.is_functorch_wrapped_tensor", lambda t: False)
unwrapped: Callable[[torch.Tensor], torch.Tensor] = _find("_C._functorch.get_unwrapped", lambda t: t)
# of torch.func.vmap's tensors, and of those of is_grads_batched
is_vmapped: Callable[[torch.Tensor], bool] = _find("_C._functorch.is_batchedtensor", lambda t: False)
is_batched: Callable[[torch.Tensor], bool] = _find("_C._functorch.is_legacy_batchedtensor", lambda t: False)
# who records or replaces the ops that are called; None if nobody does
dispatch_mode: Callable[[], Any] = _find("utils._python_dispatch._get_current_dispatch_mode", lambda: "perhaps")
tracing_state: Callable[[], Any] = _find("_C._get_tracing_state", lambda: torch.jit.is_tracing() or None)
# for any device: asking for one costs more than all other checks of a call
any_autocast: Callable[[], bool] = _find("_C._is_any_autocast_enabled", lambda: True)
has_global_hooks: Callable[[], bool] = _find("nn.modules.module._has_any_global_hook", lambda: True)
op_names: Callable[[], list[str]] = _find("_C._dispatch_get_all_op_names", lambda: [])
# in a backward pass: whether it goes on to a node of the graph. A leaf that the pass was asked for by name is an error
_goes_on_to: Callable[[Any], bool] = _find("_C._will_engine_execute_node", lambda node: True)
_half_products: dict[torch.dtype, bool] = {  # asked for here, as torch.compile cannot
    torch.bfloat16: _find("ops.mkldnn._is_mkldnn_bf16_supported", lambda: True)(),
    torch.float16: _find("ops.mkldnn._is_mkldnn_fp16_supported", lambda: True)(),
}
when_cuda_starts: Callable[[Callable[[], None]], None] = _find("cuda._lazy_call", lambda call: None)


def has_half_products(dtype: torch.dtype) -> bool:
    """Whether torch multiplies matrices of half precision quickly on this processor, or takes many times float32's time for it."""
    return _half_products[dtype]


def forward_mode() -> bool:
    """Whether tensors may carry tangents, by torch.autograd.forward_ad or by torch.func's jvp and jacfwd."""
    return getattr(forward_ad, "_current_level", 0) >= 0


def times_written(t: torch.Tensor) -> int:
    """How often somebody has written into it; nobody counts that of inference tensors."""
    return 0 if t.is_inference() else t._version


def is_wanted(ctx: Any, tensors: slice) -> bool:
    """In a function's backward: whether this pass goes on to any of those of its inputs that are tensors.

    `needs_input_grad` says that parameters need gradients also where `autograd.grad(y, x)` asks for none of them.
    """
    if torch.compiler.is_compiling() or transform_level() is not None:
        return True
    try:
        return any(node is not None and _goes_on_to(node) for node, _ in ctx.next_functions[tensors])
    except RuntimeError:
        return True


def kept(make: Callable) -> Callable:
    """The function, whose tensors are kept from call to call, but for those that a mode or torch.func makes in their place."""
    keep = lru_cache(make)

    @wraps(make)
    def call(*args):
        plain = not torch.compiler.is_compiling() and dispatch_mode() is None and transform_level() is None and not forward_mode()
        return keep(*args) if plain else make(*args)

    return call


def has_kernel(op: str, device: str) -> bool:
    """Whether an op has a kernel of its own for a dispatch key; a composite one is none."""
    return _has_kernel(f"flowkernels::{op}", device)


def _has_kernel_of_a_device(op: str, device: str) -> bool:
    """A composite kernel serves all devices alike."""
    kernels = []
    for key in (device, "MPS"):
        try:
            kernels.append(str(torch.library.get_kernel(op, key)))
        except (AttributeError, RuntimeError):
            kernels.append(None)
    return kernels[0] is not None and kernels[0] != kernels[1]


_has_kernel: Callable[[str, str], bool] = _find("_C._dispatch_has_kernel_for_dispatch_key", _has_kernel_of_a_device)
