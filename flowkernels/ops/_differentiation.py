"""Whether a call may go straight to its op, or autograd, torch.func or forward mode has to see it; and what gradients by hand share."""

import functools
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from .._library import library
from .._torch import forward_mode, is_batched, is_vmapped, transform_level, transforms_active


def transformed() -> bool:
    """Whether a torch.func transform or forward mode looks on: then the call has to be made of parts that know all derivatives."""
    if forward_mode():
        transform_level()  # torch.compile, which cannot read it, stops here: at vmap over forward mode it fails (torch 2.13)
        return True
    return transforms_active()


def needs_autograd(tensors: Iterable[Tensor | None]) -> bool:
    """True where a gradient, a torch.func transform or forward mode has to see the call; the bare op is several times cheaper."""
    if transformed():
        return True
    if torch.is_grad_enabled():
        for t in tensors:  # a loop, as any() of a generator takes 0.8 us longer
            if t is not None and t.requires_grad:
                return True
    return False


library.define("_each_cotangent(Tensor dy, Tensor dlogabsdet, int job) -> Tensor")
_jobs: dict[int, Callable[[Tensor, Tensor], Tensor]] = {}
library.impl("_each_cotangent", lambda dy, dlogabsdet, job: _jobs[job](dy, dlogabsdet), "CompositeExplicitAutograd")


def each_cotangent(op: Callable[..., list[Tensor]], dy: Tensor, dlogabsdet: Tensor, *args) -> list[Tensor]:
    """op(dy, dlogabsdet, *args), also where autograd goes back for several cotangents at once (is_grads_batched,
    torch.autograd.functional.jacobian with vectorize=True, torch.func.vmap over torch.autograd.grad). There it runs an op once for each, if
    the op takes and returns single tensors.
    """
    if torch.compiler.is_compiling() or not any([is_batched(t) or is_vmapped(t) for t in (dy, dlogabsdet)]):
        return op(dy, dlogabsdet, *args)
    shapes: list[torch.Size] = []

    def flat(dy: Tensor, dlogabsdet: Tensor) -> Tensor:
        results = op(dy, dlogabsdet, *args)
        shapes[:] = [t.shape for t in results]
        return torch.cat([t.flatten() for t in results])

    _jobs[id(flat)] = flat
    try:
        results = torch.ops.flowkernels._each_cotangent(dy, dlogabsdet, id(flat))
    finally:
        del _jobs[id(flat)]
    parts = results.split([shape.numel() for shape in shapes])
    return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]


def apply_function(function: type[torch.autograd.Function], *args):
    """function.apply(*args). Outside of torch.func and torch.compile it skips apply's Python part, which looks up the signature of
    forward on every call: 25 of 40 microseconds. There are no default arguments to fill in here.
    """
    if torch.compiler.is_compiling() or transforms_active():
        return function.apply(*args)
    return super(torch.autograd.Function, function).apply(*args)


def as_dtype(t: Tensor, dtype: torch.dtype) -> Tensor:
    """t.to(dtype). torch 2.11's compiler loses the gradient of an autograd function whose result comes from a `to` that changes nothing."""
    return t if t.dtype == dtype else t.to(dtype)


def vmap_one_by_one(op: Callable, info, in_dims: Sequence[int | None], *args) -> tuple:
    """The result of a vmap rule where batches cannot be joined: the op runs once for each."""
    select = lambda i: (a if d is None else a.select(d, i) for a, d in zip(args, in_dims, strict=True))
    results = [op(*select(i)) for i in range(info.batch_size)]
    if isinstance(results[0], Tensor):
        return torch.stack(results), 0
    return tuple(torch.stack(outputs) for outputs in zip(*results, strict=True)), (0,) * len(results[0])


_one_by_one = functools.partial(vmap_one_by_one, torch.ops.flowkernels._each_cotangent.default)
torch.library.register_vmap("flowkernels::_each_cotangent", _one_by_one, lib=library)


def pulled_back(outputs: Sequence[Tensor], cotangents: Sequence[Tensor], inputs: Sequence[Tensor], **options) -> list[Tensor]:
    """Vector-Jacobian products. An output may depend on none of the inputs, as the log|det| of an additive map does."""
    pairs = [(o, v) for o, v in zip(outputs, cotangents, strict=True) if o.requires_grad]
    outputs, cotangents = zip(*pairs, strict=True)
    return list(torch.autograd.grad(outputs, inputs, cotangents, allow_unused=True, materialize_grads=True, **options))
