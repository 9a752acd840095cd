"""How ops behave as CUDA calls, the same for all of them: graph capture, streams, devices, no wait on the host, layouts, empty tensors,
errors at the call. What needs no GPU runs on the CPU, so that the table of calls stays right."""

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from flowkernels import ScaleMap, _extension, _triton, backend
from flowkernels.ops import Form, Part, glow_step
from python_tests.battery import Example, assert_same_bits
from python_tests.ops.test_autoregressive import GATED, RESIDUAL, example
from python_tests.ops.test_autoregressive_schedule import with_bfloat16_weights, with_rounded_matrices
from python_tests.ops.test_autoregressive_solve import arguments as gradient_arguments
from python_tests.ops.test_autoregressive_stack import TestAutoregressiveStack

STACK = TestAutoregressiveStack.cases["both directions, wired"]
del TestAutoregressiveStack  # or it would be collected here once more
SCALE = (int(ScaleMap.softclip().kind), *ScaleMap.softclip().packed)
COUPLING = (int(Part.SECOND_HALF), *SCALE, int(Form.SCALE_SHIFT), False)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def arguments_of(made: Example) -> tuple:
    return made.schema(made.rows, made.parameters)


def loop(parts, **options) -> Callable:
    return lambda batch: arguments_of(example(6, parts, inverse=True, **options)(batch, torch.float32))


def staircase(inputs: int, outputs: int) -> Tensor:
    return torch.linspace(0, inputs, outputs).int()


def channels(batch: int) -> tuple:
    return randn(batch, 5, 3, 7), randn(5, seed=1), randn(5, seed=2), randn(5, seed=3)


def training(library: bool) -> Callable:
    """The two ops of a training step; what one keeps for the other differs from device to device. On a GPU by the CUDA library, or by
    products in Triton."""

    def step(dy: Tensor, dlogabsdet: Tensor, *arguments) -> tuple[Tensor, ...]:
        ops, first = torch.ops.flowkernels, "_" if library and dy.is_cuda else ""
        y, logabsdet, kept = getattr(ops, f"{first}autoregressive_training")(*arguments)
        maps = len(arguments[7])
        more = (True,) if first else ()
        gradients = getattr(ops, f"{first}autoregressive_backward")(dy, dlogabsdet, kept, *arguments[1:], [0] * maps, True, *more, True)
        return y, logabsdet, *gradients

    return step


def training_arguments(parts, **options) -> Callable:
    def arguments(batch: int) -> tuple:
        made = arguments_of(example(6, parts, order=[3, 1, 4, 0, 5, 2], **options)(batch, torch.float32))
        x, context, *lists, order, activations, wiring, kind, p0, p1, form, inverse = made
        stages = [len(activations), len(lists[2]), int(bool(lists[3])), int(bool(wiring)), kind, form, 0, int(inverse)]
        twice = [part * 2 for part in (*lists, [order], activations, wiring, stages, [p0, p1])]
        return randn(batch, 6, seed=6), randn(batch, seed=7), x, context, *twice

    return arguments


def stack_with_rounded_weights(*arguments) -> tuple[Tensor, ...]:
    """The stack with weights in bfloat16, which a CPU takes as they are: there it is given rounded ones."""
    made = arguments if arguments[0].is_cuda else with_rounded_matrices(arguments)
    return torch.ops.flowkernels.autoregressive_stack(*made)


def glow_step_arguments(batch: int) -> tuple:
    return randn(batch, 3, 5, 24), randn(batch, 3, 5, 24, seed=1), randn(24, 24, seed=2) / 5, randn(24, seed=3)


def glow_step_gradients(*arguments) -> tuple[Tensor, ...]:
    """The op, which a CPU gives contiguous tensors."""
    return torch.ops.flowkernels.glow_step_backward(*(t.contiguous() if isinstance(t, Tensor) else t for t in arguments))


# outputs whose bits do not follow the layout, of an op whose others are sums over the batch in an order that Triton takes from the layout
BITS_OF = {"channel_affine_backward": 1}
BY_LIBRARY, BY_PRODUCTS = training(True), training(False)
OPS_OF = {  # of what is no op itself
    BY_PRODUCTS: {"autoregressive_training", "autoregressive_backward"},
    BY_LIBRARY: set(),
    stack_with_rounded_weights: {"autoregressive_stack"},
    glow_step: {"glow_step"},
    glow_step_gradients: {"glow_step_backward"},
}

# name of a call: the op, and its arguments for a batch; 37 rows are more than a tile, and no multiple of one
CALLS: dict[str, tuple[str | Callable, Callable[[int], tuple]]] = {
    "autoregressive": ("autoregressive", loop((9, 7), context=2, order=[3, 1, 4, 0, 5, 2])),
    "autoregressive, residual": ("autoregressive", loop(RESIDUAL, context=2)),
    "autoregressive, gated": ("autoregressive", loop(GATED, context=2)),
    "autoregressive_inverse_backward": (
        "autoregressive_inverse_backward",
        lambda batch: gradient_arguments(
            example(6, (9, 7), order=[3, 1, 4, 0, 5, 2], activation="silu", inverse=True)(batch, torch.float32)
        ),
    ),
    **{
        f"autoregressive_inverse_backward, {name}": (
            "autoregressive_inverse_backward",
            lambda batch, parts=parts: gradient_arguments(example(6, parts, context=2, inverse=True)(batch, torch.float32)),
        )
        for name, parts in (("residual", RESIDUAL), ("gated", GATED))
    },
    "training": (BY_LIBRARY, training_arguments((9, 7), context=2, activation="silu")),
    "training, residual": (BY_LIBRARY, training_arguments(RESIDUAL, context=2)),
    "training, gated": (BY_LIBRARY, training_arguments(GATED, context=2)),
    # no context, whose products are a BLAS's: their bits follow the layout
    "training by products": (BY_PRODUCTS, training_arguments((9, 7))),
    "autoregressive_stack": (
        "autoregressive_stack",
        lambda batch: arguments_of(STACK(batch, torch.float32)),
    ),
    "autoregressive_stack, bfloat16 weights": (
        stack_with_rounded_weights,
        lambda batch: with_bfloat16_weights(arguments_of(STACK(batch, torch.float32))),
    ),
    "slogdet": ("slogdet", lambda batch: (randn(batch, 12, 12), False)),
    "slogdet_inverse": ("slogdet_inverse", lambda batch: (randn(batch, 37, 37), False)),
    "slogdet_inverse, in global memory": ("slogdet_inverse", lambda batch: (randn(min(batch, 2), 250, 250), False)),
    "coupling": ("coupling", lambda batch: (randn(batch, 6, 3, 5), *(randn(batch, 3, 3, 5, seed=s) for s in (1, 2)), None, *COUPLING)),
    "coupling_backward": (
        "coupling_backward",
        lambda batch: (
            randn(batch, 6, 3, 5),
            randn(batch, seed=3),
            randn(batch, 6, 3, 5, seed=4),
            *(randn(batch, 3, 3, 5, seed=s) for s in (1, 2)),
            None,
            *COUPLING,
            False,
        ),
    ),
    "channel_affine": ("channel_affine", lambda batch: (*channels(batch), False)),
    "channel_affine_backward": (
        "channel_affine_backward",
        lambda batch: (randn(batch, 5, 3, 7, seed=4), randn(batch, seed=5), *channels(batch), False, False),
    ),
    "glow_step": (glow_step, glow_step_arguments),
    "glow_step_backward": (
        glow_step_gradients,
        lambda batch: (randn(batch, 3, 5, 24, seed=4), randn(batch, seed=5), None, *glow_step_arguments(batch), False),
    ),
    "masked_linear": ("masked_linear", lambda batch: (randn(batch, 40), randn(40, 70, seed=1), randn(70, seed=2), staircase(40, 70))),
    "masked_linear_dx": ("masked_linear_dx", lambda batch: (randn(batch, 70), randn(40, 70, seed=1), staircase(40, 70))),
    "masked_linear_dweight": ("masked_linear_dweight", lambda batch: (randn(batch, 40), randn(batch, 70, seed=1), staircase(40, 70))),
}

STRIDED = {
    "every other element": lambda t: torch.stack([t, t], -1)[..., 0],
    "transposed": lambda t: t.mT.contiguous().mT if t.dim() > 1 else t,
    "shifted": lambda t: torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape),
}


def changed(arguments, change: Callable[[Tensor], Tensor]):
    """Arguments whose tensors, those in lists too, have been changed."""
    if isinstance(arguments, Tensor):
        return change(arguments)
    return type(arguments)(changed(a, change) for a in arguments) if isinstance(arguments, (tuple, list)) else arguments


def run(op: str | Callable, arguments: tuple) -> tuple[Tensor, ...]:
    with torch.no_grad():
        outputs = op(*arguments) if callable(op) else getattr(torch.ops.flowkernels, op)(*arguments)
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def on_gpu(arguments: tuple, device: str = "cuda") -> tuple:
    return changed(arguments, lambda t: t.to(device))


@pytest.fixture(params=CALLS)
def call(request) -> tuple[str | Callable, Callable[[int], tuple]]:
    return CALLS[request.param]


def test_every_op_with_a_cuda_kernel_is_called():
    named = {name.split("::")[1].split(".")[0] for name in torch._C._dispatch_get_all_op_names() if name.startswith("flowkernels::")}
    assert {"coupling", "masked_linear"} <= named
    called = set().union(*(OPS_OF[op] if callable(op) else {op} for op, _ in CALLS.values()))
    assert not {op for op in named if _extension.has_kernel(op, "CUDA") and op[0] != "_"} - called


@pytest.mark.parametrize("layout", STRIDED)
def test_layouts_on_the_cpu(call, layout):
    """The table of calls, and the strides that Triton kernels compute with, which the interpreter shows."""
    op, arguments = call
    names = OPS_OF[op] if callable(op) else {op}
    interpreted = names and not any(_triton.why_not(name, torch.device("cpu")) for name in names)
    for implementation in ("auto", "triton") if interpreted else ("auto",):
        with backend(implementation):
            for batch in (0, 3):
                made = arguments(batch)
                assert_same_bits(run(op, changed(made, STRIDED[layout])), run(op, made))


@pytest.mark.gpu
class TestOnAGpu:
    def test_gpu_sanitizer(self, call):
        """Small, and all that the sanitizer needs to see: whole and broken tiles, strides, nothing at all."""
        op, arguments = call
        for batch in (0, 1, 37):
            made = on_gpu(arguments(batch))
            got = run(op, made)
            torch.testing.assert_close(tuple(t.cpu() for t in got), run(op, arguments(batch)), rtol=1e-3, atol=1e-4)
            for layout in STRIDED.values():
                again, bits = run(op, changed(made, layout)), BITS_OF.get(op, len(got))
                assert_same_bits(again[:bits], got[:bits])
                torch.testing.assert_close(again[bits:], got[bits:], rtol=1e-5, atol=1e-5)
        torch.cuda.synchronize()

    def test_side_stream(self, call):
        op, arguments = call
        made = on_gpu(arguments(300))
        want, stream = run(op, made), torch.cuda.Stream()
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(10_000_000)  # some ms: work on another stream would be done before these inputs are there
            late = changed(made, lambda t: t.clone())
            got = run(op, late)
        stream.synchronize()
        assert_same_bits(got, want)

    def test_graph_capture(self, call):
        op, arguments = call
        made = on_gpu(arguments(37))
        run(op, made)  # compiles what is compiled at the first call
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            captured = run(op, made)
        for t, new in zip(tensors(made), tensors(on_gpu(arguments(37))), strict=True):
            if t.is_floating_point():
                t.copy_(new.flip(0))  # replays must read what is there then
        want = run(op, made)
        for t in captured:
            t.zero_()
        graph.replay()
        torch.cuda.synchronize()
        assert_same_bits(captured, want)

    def test_does_not_wait_for_the_device(self, call):
        op, arguments = call
        made = on_gpu(arguments(37))
        run(op, made)
        torch.cuda.set_sync_debug_mode("error")
        try:
            run(op, made)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def test_second_device(self, call):
        if torch.cuda.device_count() < 2:
            pytest.skip("one GPU")
        op, arguments = call
        want = run(op, on_gpu(arguments(37)))
        got = run(op, on_gpu(arguments(37), "cuda:1"))  # while cuda:0 is the current one
        assert all(t.device.index == 1 for t in got)
        assert_same_bits(tuple(t.cpu() for t in got), tuple(t.cpu() for t in want))
        assert torch.cuda.current_device() == 0

    @pytest.mark.parametrize("op", ["autoregressive", "slogdet", "masked_linear"])
    def test_an_error_of_the_device_is_reported_at_the_call(self, op):
        """In a process of its own, whose device has failed before the call."""
        code = (
            "import torch; from python_tests.cuda.test_calls import CALLS, on_gpu, run\n"
            f"op, arguments = CALLS[{op!r}]; made = on_gpu(arguments(37)); run(op, made)\n"
            "torch._assert_async(torch.zeros(1, device='cuda'))\n"
            "try: torch.cuda.synchronize()\n"
            "except RuntimeError: print('failed before')\n"
            "try: run(op, made)\n"
            "except RuntimeError as error: print('reported', error)\n"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
        assert "failed before" in done.stdout and "reported" in done.stdout, done.stdout + done.stderr


def tensors(arguments) -> list[Tensor]:
    found: list[Tensor] = []
    changed(arguments, lambda t: found.append(t) or t)
    return found
