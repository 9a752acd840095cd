"""The CUDA kernels as they are, run on a CPU: the same bits as their twins in every order of threads, no race, and every mistake found."""

import itertools

import pytest
import torch

from python_tests.battery import assert_same_bits, needs_tests_library
from python_tests.cuda import emulated
from python_tests.cuda.emulated import A100, H200, ONE, TIGHT, Device, Order, needs_emulator, run_on
from python_tests.ops import test_autoregressive, test_autoregressive_stack
from python_tests.ops.test_autoregressive import GATED, RESIDUAL, example, widened
from python_tests.ops.test_autoregressive_schedule import LAYOUTS, not_autoregressive, stack_twin, twin, with_bfloat16_weights

pytestmark = [needs_tests_library, needs_emulator]

CASES = test_autoregressive.TestAutoregressive.cases
STACKS = test_autoregressive_stack.TestAutoregressiveStack.cases

# what a kernel of the tests' own does wrong, and what is said of it (csrc/tests/emulated/broken.cpp)
RACES = {
    "no block barrier": "without a barrier since",
    "no warp barrier": "without a barrier since",
    "a copy is not waited for": "a copy that has not landed",
    "a copy is waited for by its thread alone": "without a barrier since|a copy that has not landed",
    "a slot is refilled while it is read": "without a barrier since|a copy that has not landed",
    "beyond shared memory": "goes beyond the launch's shared memory",
    "blocks write one word": "without a barrier since",
    "a block reads another's": "without a barrier since",
    "reads ahead of shared memory": "goes beyond the launch's shared memory",
    "a vector is not aligned": "reads what is not aligned",
    "some wait for their warp": "without a barrier since|threads wait for different things",
}
OTHERS = {
    "a lane returns": "threads wait for different things",
    "too many threads": "more than a block may have",
    "too much shared memory": "of which 49152 are allowed",
    "a copy that is not aligned": "not aligned",
}


@pytest.mark.parametrize("order", Order)
def test_every_mistake_is_found(order):
    run_on(H200, order)
    x = torch.arange(192.0)
    call = lambda mistake: emulated.ops.broken(x, torch.zeros(192), mistake)
    want = x.view(3, 64).roll(-1, 1).roll(-32, 1).view(3, 2, 32).roll(-1, 2).flatten()
    assert torch.equal(call(0), want)
    for mistake, (name, said) in enumerate({**RACES, **OTHERS}.items(), 1):
        if name in RACES and not emulated.ops.looks_for_races():
            continue
        with pytest.raises(RuntimeError, match=said):
            call(mistake)
    assert torch.equal(call(0), want)  # and nothing is left of them


def schema(made):
    return made.schema(made.rows, made.parameters)


@pytest.mark.parametrize("device", [H200, ONE, TIGHT])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_loop(device, dtype):
    """Of every network of the battery."""
    for make, order in itertools.product(CASES.values(), Order):
        run_on(device, order)
        for batch in (0, 1, 19):
            made = make(batch, dtype)
            assert_same_bits(emulated.ops.autoregressive(*schema(made)), twin(made, LAYOUTS[0]))


@pytest.mark.parametrize(
    ("features", "parts", "context"),
    [
        (40, (150, 130), 0),  # several panels
        (70, (64, 64), 5),
        (20, widened(RESIDUAL, 90), 3),
        (9, widened(GATED, 40), 70),
        (150, (), 0),
    ],
)
@pytest.mark.parametrize("inverse", [False, True])
def test_loop_of_several_panels(features, parts, context, inverse):
    made = example(features, parts, context=context, activation="relu", inverse=inverse)(37, torch.float32)
    want = twin(made, LAYOUTS[0])
    for device, order in ((H200, Order.SHUFFLED), (A100, Order.BACKWARDS), (ONE, Order.FORWARDS), (TIGHT, Order.BACKWARDS)):
        run_on(device, order)
        assert_same_bits(emulated.ops.autoregressive(*schema(made)), want)


@pytest.mark.parametrize(("device", "order"), [(H200, Order.SHUFFLED), (ONE, Order.FORWARDS), (TIGHT, Order.BACKWARDS)])
def test_stacks(device, order):
    run_on(device, order)
    for make, dtype in itertools.product(STACKS.values(), (torch.float32, torch.float64)):
        for batch in (0, 19):
            *arguments, _ = schema(make(batch, dtype))
            for keep in (False, True):
                assert_same_bits(emulated.ops.autoregressive_stack(*arguments, keep), stack_twin((*arguments, keep), LAYOUTS[0]))
            rounded = with_bfloat16_weights((*arguments, False))
            assert_same_bits(emulated.ops.autoregressive_stack(*rounded), stack_twin(rounded, LAYOUTS[0]))


@pytest.mark.parametrize("inverse", [False, True])
def test_more_than_2_31_elements(inverse):
    """Whose places are no 32-bit integers; the last rows alone are computed."""
    made = example(70, (9,), context=2, activation="relu", inverse=inverse)(3, torch.float32)
    x, context, *rest = schema(made)
    n = 31_000_011
    blocks = Device(1 << 21, 227 * 1024, 228 * 1024)  # as many as tiles
    run_on(H200)
    want = emulated.ops.autoregressive(x, context, *rest)
    stack = schema(test_autoregressive_stack.stacked(*[example(70, (9,), inverse=inverse)] * 2)(3, torch.float32))[:-1]
    want_of_two = emulated.ops.autoregressive_stack(*stack, False)
    run_on(blocks, last_blocks=2)
    with emulated.unfilled_memory():
        many = emulated.last_of_many(x, n)
        assert many.numel() > 1 << 31
        got = emulated.ops.autoregressive(many, emulated.last_of_many(context, n), *rest)
        assert_same_bits(tuple(t[-3:] for t in got), want)
        del got
        got = emulated.ops.autoregressive_stack(emulated.last_of_many(stack[0], n), *stack[1:], False)
        assert_same_bits(tuple(t[-3:] for t in got[:2]), want_of_two[:2])


def test_arguments_of_many_maps():
    """More than one launch takes: 17 small maps, and maps of the most layers there may be."""
    run_on(H200)
    for parts, n in (((9,), 17), ((5,) * 31, 3)):
        made = test_autoregressive_stack.stacked(*[example(4, parts, inverse=True)] * n)(3, torch.float32)
        assert_same_bits(emulated.ops.autoregressive_stack(*schema(made)), stack_twin(schema(made), LAYOUTS[0]))


def test_a_network_that_is_not_autoregressive_gives_nan():
    n = not_autoregressive()
    run_on(H200)
    x = torch.zeros(2, 3)
    y, logabsdet = emulated.ops.autoregressive(
        x, None, n.weights, n.biases, [], [], n.visible, None, n.activations, [], 0, 0.0, 0.0, 0, True
    )
    assert y[:, 0].isfinite().all() and y[:, 1:].isnan().all() and logabsdet.isnan().all()


@pytest.mark.parametrize("order", [Order.FORWARDS, Order.BACKWARDS])
def test_more_matrices_than_blocks(order):
    """Where they lie in global memory: the last of 256 blocks take two."""
    w = torch.randn(259, 20, 20, generator=torch.Generator().manual_seed(0))
    run_on(H200)
    want = emulated.ops.slogdet_inverse(w, False)
    run_on(Device(1, 2000, 4000), order)
    assert_same_bits(emulated.ops.slogdet_inverse(w, False), want)


@pytest.mark.parametrize("order", Order)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_slogdet(order, dtype):
    g = torch.Generator().manual_seed(0)
    for n, device in ((1, H200), (2, H200), (5, TIGHT), (17, H200), (33, H200), (40, TIGHT), (90, TIGHT)):
        if n > 50 and order is not Order.BACKWARDS:
            continue  # takes long
        run_on(device, order)
        w = torch.randn(3, n, n, generator=g, dtype=torch.float64).to(dtype)
        w[1] = torch.eye(n, dtype=dtype).flip(0)
        w[2, :, 0] = 0
        sign, logabsdet, inverse = emulated.ops.slogdet_inverse(w, False)
        want = torch.linalg.slogdet(w.double())
        tolerance = 1e-9 if dtype is torch.float64 else 1e-3
        assert torch.equal(sign, want[0].to(dtype)) and logabsdet[2] == -torch.inf
        torch.testing.assert_close(logabsdet, want[1].to(dtype), rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(inverse[:2], w[:2].double().inverse().to(dtype), rtol=10 * tolerance, atol=10 * tolerance)
        assert_same_bits(emulated.ops.slogdet(w.mT.contiguous().mT, False), (sign, logabsdet))
        if dtype is torch.float32:
            exact = emulated.ops.slogdet(w.double(), False)
            assert_same_bits(emulated.ops.slogdet(w, True), tuple(t.float() for t in exact))
