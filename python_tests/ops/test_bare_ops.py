"""What the CPU's ops refuse, called without the checks of their public functions: whatever would have them read beyond a tensor's end."""

import pytest
import torch

from flowkernels import ScaleMap, _extension
from flowkernels.ops import Conditioner, Form, Map
from flowkernels.ops.autoregressive.loop import Lists
from python_tests.ops.test_autoregressive import RESIDUAL, example

if not _extension.status().cpu_library:
    pytest.skip("the CPU library was not built", allow_module_level=True)


def randn(*shapes):
    return [torch.randn(shape) for shape in shapes]


def maps(parts, inverse):
    """x, context, and the lists of two maps of one network; inverse: of the second."""
    rows, parameters, *_, schema, _ = example(5, parts, context=3)(4, torch.float32)
    _, _, weights, biases, contexts, context_biases, visible, order, activations, wiring, *_ = schema(rows, parameters)
    network = Conditioner(weights, biases, visible, activations, contexts, order, wiring, context_biases)
    return *rows, list(Lists.of([Map(network, ScaleMap.softclip(), Form.SCALE_SHIFT, i > 0 and inverse) for i in range(2)]))


def calls_of_maps():
    for name, parts in (("", (7, 6)), (", wired", RESIDUAL)):
        x, context, lists = maps(parts, True)
        yield f"autoregressive_stack{name}", (x, context, *lists, True)
        x, context, lists = maps(parts, False)
        given = (*lists[:6], *lists[7:])  # without affine maps
        yield f"autoregressive_training{name}", (x, context, *given)
        kept = torch.ops.flowkernels.autoregressive_training(x, context, *given)[2]
        yield f"autoregressive_backward{name}", (x + 1, torch.ones(4), kept, context, *given, [0, 0], True, True)
        rows, parameters, *_, schema, _ = example(5, parts, context=3, inverse=True)(4, torch.float32)
        x, context, *network, inverse = schema(rows, parameters)
        yield f"autoregressive{name}", (x, context, *network, inverse)
        yield f"autoregressive_inverse_backward{name}", (x + 1, torch.ones(4), x, context, *network)


def calls():
    """The name of an op, with a remark, and arguments that it takes."""
    ints = lambda *values: torch.tensor(values, dtype=torch.int32)
    x, net, net2, a, dlogabsdet = randn((2, 8, 3, 5), (2, 4, 3, 5), (2, 4, 3, 5), (4,), (2,))
    options = (1, int(ScaleMap.exp_tanh(1.0).kind), *ScaleMap.exp_tanh(1.0).packed, 0, False)
    yield "coupling", (x, net, net2, a, *options)
    yield "coupling_backward", (x, dlogabsdet, x + 1, net, net2, a, *options, False)
    of_channels = randn(*[(8,)] * 3)
    vectors = x[:, :, 0, 0].contiguous()
    yield "channel_affine", (x, *of_channels, False)
    yield "channel_affine_backward", (x, dlogabsdet, x + 1, *of_channels, False, False)
    yield "channel_affine_backward, vectors", (vectors, dlogabsdet, vectors + 1, *of_channels, False, False)
    yield "channel_normalize", (x, *of_channels[:2], 1e-4)
    yield "channel_normalize_backward", (x, dlogabsdet, x + 1, of_channels[0], of_channels[1].abs(), of_channels[2], 1e-4)
    x, weight, bias, dy = randn((2, 4), (4, 5), (5,), (2, 5))
    visible = ints(0, 1, 2, 3, 4)
    yield "masked_linear", (x, weight, bias, visible)
    yield "masked_linear_dx", (dy, weight, visible)
    yield "masked_linear_dweight", (x, dy, visible)
    each = lambda *shape: list(randn(*[shape] * 2))
    lists = (each(4, 4), each(4), each(4), each(4), [torch.tensor([1, 0, 3, 2])] * 2)
    yield "lu_fold", (*lists, True)
    yield "lu_fold_backward", (*randn((2, 4, 4), (2,), (2, 4, 4)), *lists, False)
    x, *network = randn((2, 3, 4, 5), (7, 5, 3, 3), (7,), (8, 7, 1, 1), (8,), (6, 8, 3, 3), (6,), (6,))
    yield "conv_net", (x, *network)
    yield "conv_net_training", (x, *network)
    kept = randn((2, 3, 4, 6), (2, 3, 4, 7), (2, 3, 4, 8))
    yield "conv_net_backward", (kept[0], x, *kept[1:], network[0], network[2], *network[4:], True)
    x, raw, weight, bias, dpassing = randn((2, 3, 6), (2, 3, 6), (6, 6), (6,), (2, 3, 3))
    yield "glow_step", (x, raw, weight, bias, False, True)
    yield "glow_step_backward", (x + 1, dlogabsdet, dpassing, x, raw, weight, bias, False)
    x, context, *network = randn((2, 3, 4, 6), (2, 2), (7, 5, 3, 3), (7,), (8, 7, 1, 1), (8,), (6, 8, 3, 3), (6,), (6,))
    for op in ("glow_steps", "glow_steps_training"):
        yield op, (x, context, network * 2, [weight] * 2, [bias] * 2, False)
    yield from calls_of_maps()


def spoilt(t):
    """A tensor in ways that no kernel may take for itself."""
    for d in range(t.dim()):  # by two: the last feature is one that no unit of a first layer sees, nor need it have weights
        yield f"a smaller dimension {d}", t.narrow(d, 0, max(t.shape[d] - 2, 0)).contiguous()
    yield "one more dimension", t[None]
    yield "another dtype", t.double() if t.is_floating_point() else t.short()


def changes(arguments, first):
    """Arguments of which one, from number `first` on, does not fit the others."""
    for i, given in enumerate(arguments):
        put = lambda new, i=i: (*arguments[:i], new, *arguments[i + 1 :])
        if isinstance(given, torch.Tensor) and i >= first:
            for how, t in spoilt(given):
                yield f"argument {i} with {how}", put(t)
        if isinstance(given, list) and given:
            yield f"argument {i} without its last entry", put(given[:-1])
            for j, t in enumerate(given):
                for how, changed in spoilt(t) if isinstance(t, torch.Tensor) and t.numel() > 0 and i + j >= first else ():
                    yield f"entry {j} of argument {i} with {how}", put([*given[:j], changed, *given[j + 1 :]])


@pytest.mark.parametrize(("name", "arguments"), [pytest.param(*call, id=call[0]) for call in calls()])
def test_what_does_not_fit_is_refused(name, arguments):
    op = getattr(torch.ops.flowkernels, name.split(",")[0]).default
    op(*arguments)
    # a map's first tensor says what the others must be, and channel_normalize's gradient takes one of any dtype
    first = 0 if "backward" in name and name != "channel_normalize_backward" else 1
    for change, changed in changes(arguments, first):
        try:
            op(*changed)
        except RuntimeError as error:
            assert "flowkernels" in str(error), (change, error)
        else:
            pytest.fail(change)


def misshapen():
    """The name of an op, and arguments of which the first has a shape, or all have a layout, that no kernel is made for."""
    zeros = torch.zeros
    deep = [1] * 11
    yield "coupling", (zeros(1, 2, *deep), zeros(1, 1, *deep), None, None, 1, 0, 0.0, 0.0, 0, False)
    yield "coupling", (zeros(2, 2, 0), zeros(2, 1, 0), None, None, 1, 0, 0.0, 0.0, 0, False)
    yield "coupling", (zeros(2, 1), zeros(2, 0), None, None, 3, 0, 0.0, 0.0, 0, False)
    yield "coupling", (zeros(2, 2, 4), zeros(2, 2, 4), None, None, 4, 0, 0.0, 0.0, 0, False)
    yield "coupling", (zeros(2, 2).int(), zeros(2, 1).int(), None, None, 1, 0, 0.0, 0.0, 0, False)
    yield "channel_affine", (zeros(1, 2, *deep), None, zeros(2), None, False)
    yield "channel_affine", (zeros(2, 0), None, zeros(0), None, False)
    yield "channel_affine_backward", (zeros(1, 2, *deep), zeros(1), zeros(1, 2, *deep), None, zeros(2), None, False, False)
    yield "channel_normalize", (zeros(0, 2), None, None, 1e-4)
    yield "channel_normalize_backward", (zeros(0, 2), zeros(0), zeros(0, 2), None, zeros(2), zeros(2), 1e-4)
    yield "slogdet", (zeros(2, 3), False)
    yield "slogdet_inverse", (zeros(2, 3), False)
    yield "slogdet", (zeros(3, 3).half(), False)
    square, vector, row = [zeros(3, 3)], [zeros(3)], [torch.arange(3)]
    yield "lu_fold", ([], vector, [], vector, row, False)
    yield "lu_fold", (square, vector, [], vector, [torch.arange(1, 4)], False)
    yield "lu_fold", (square, vector, [], vector, [torch.arange(-1, 2)], False)
    yield "lu_fold", ([zeros(3, 6)[:, ::2]], vector, [], vector, row, False)
    network = lambda channels, outputs: (
        zeros(5, channels, 3, 3),
        zeros(5),
        zeros(5, 5, 1, 1),
        zeros(5),
        zeros(outputs, 5, 3, 3),
        zeros(outputs),
    )
    yield "conv_net", (zeros(2, 3, 4, 0), *network(0, 4), zeros(4))
    yield "conv_net", (zeros(3, 4, 2), *network(2, 4), zeros(4))
    yield "conv_net", (zeros(2, 2, 3, 4).movedim(1, -1), *network(2, 4), zeros(4))
    yield "conv_net", (zeros(2, 3, 4, 2), zeros(5, 4, 3, 3)[:, ::2], *network(2, 4)[1:], zeros(4))
    weight_in, _, weight_mid, _, *out = network(0, 4)
    hidden = zeros(2, 3, 4, 5)
    yield "conv_net_backward", (zeros(2, 3, 4, 4), zeros(2, 3, 4, 0), hidden, hidden, weight_in, weight_mid, *out, zeros(4), True)
    yield "glow_step", (zeros(2, 3, 5), None, None, None, False, True)
    yield "glow_step", (zeros(2, 3, 8)[..., ::2], None, None, None, False, True)
    yield "glow_steps", (zeros(2, 3, 4, 5), None, [*network(2, 5), zeros(5)], [zeros(5, 5)], [zeros(5)], False)
    yield "glow_steps", (zeros(2, 3, 4, 8)[..., ::2], None, [*network(2, 4), zeros(4)], [zeros(4, 4)], [zeros(4)], False)
    yield "glow_steps", (zeros(2, 3, 4, 4), None, [*network(2, 6), zeros(4)], [zeros(4, 4)], [zeros(4)], False)
    ints = lambda *values: torch.tensor(values, dtype=torch.int32)
    masked = [zeros(2, 3), zeros(3, 4)], [zeros(3), zeros(4)], [], [], [ints(1, 1, 1), ints(0, 0, 3, 3)]
    for order, activation in ((None, 9), (None, -1), (torch.tensor([0, 0]), 1), (torch.tensor([1, 2]), 1)):
        yield "autoregressive", (zeros(2, 2), None, *masked, order, [activation, 0], [], 0, 0.0, 0.0, 0, False)
    wide = [zeros(6, 2, 3, 3), zeros(6), zeros(5, 6, 1, 1), *network(2, 4)[3:]]
    networks = [*network(2, 4), zeros(4), *wide, zeros(4)]
    yield "glow_steps_training", (zeros(2, 3, 4, 4), None, networks, [zeros(4, 4)] * 2, [zeros(4)] * 2, False)


@pytest.mark.parametrize(("name", "arguments"), list(misshapen()))
def test_what_no_kernel_is_made_for_is_refused(name, arguments):
    with pytest.raises(RuntimeError, match="flowkernels"):
        getattr(torch.ops.flowkernels, name).default(*arguments)
