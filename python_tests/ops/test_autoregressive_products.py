"""Forward maps with a gradient as lists of launches, which serve on a GPU. The same ops take CPU tensors, for which there is a kernel to
compare with."""

import copy
import itertools

import pytest
import torch

from flowkernels import _extension, backend
from flowkernels.flows import MAF
from flowkernels.ops import Activation, Conditioner
from flowkernels.ops.autoregressive import training
from flowkernels.ops.autoregressive.loop import Lists, Map
from flowkernels.ops.autoregressive.products import backward_by_products, training_by_products
from flowkernels.ops.scale_map import parse_form
from python_tests.ops.test_autoregressive import FORMS, SCALES, example

pytestmark = pytest.mark.skipif(not _extension.status().cpu_library, reason="the CPU library was not built")


def forward_map(scale=None, form="scale_shift", **options):
    made = example(5, (11, 8), scale=scale or SCALES[0], form=form, **options)(7, torch.float64)
    x, context, weights, biases, context_weights, context_biases, visible, order, activations, wiring, *_ = made.schema(
        made.rows, made.parameters
    )
    network = Conditioner(weights, biases, visible, activations, context_weights, order, wiring, context_biases)
    return Map(network, scale or SCALES[0], parse_form(form)), x, context


def assert_are_the_kernels(maps, x, context):
    *tensors, orders, _, activations, wiring, stages, packed = Lists.of(maps)
    lists = (*tensors, orders, activations, wiring, stages, packed)
    with torch.no_grad():
        *want, kept = torch.ops.flowkernels.autoregressive_training(x, context, *lists)
        *got, own_kept = training_by_products(x, context, *lists)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
        g = torch.Generator().manual_seed(0)
        dy, dlogabsdet = (torch.randn(t.shape, dtype=t.dtype, generator=g) for t in got)
        for needs in itertools.product((True, False), repeat=2):  # dx, parameters
            rest = context, *lists, [0] * len(maps), *needs
            gradients = torch.ops.flowkernels.autoregressive_backward(dy, dlogabsdet, kept, *rest)
            torch.testing.assert_close(backward_by_products(dy, dlogabsdet, own_kept, *rest), gradients, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("context", [0, 2])
@pytest.mark.parametrize("activation", Activation, ids=lambda a: a.name)
def test_every_activation(activation, context):
    one, x, given = forward_map(activation=activation.name.lower(), context=context)
    assert_are_the_kernels([one], x, given)
    assert_are_the_kernels([one, one, one], x, given)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scale", SCALES, ids=repr)
def test_maps_and_forms(scale, form):
    one, x, _ = forward_map(scale, form, order=[3, 1, 4, 0, 2])
    assert_are_the_kernels([one, one], x, None)


def test_batches():
    one, x, _ = forward_map()
    for rows in (x[:0], x[:1], x.mT.contiguous().mT):
        assert_are_the_kernels([one, one], rows, None)


@pytest.fixture
def by_products(monkeypatch):
    monkeypatch.setattr(training, "_training", training_by_products)
    monkeypatch.setattr(training, "_backward", backward_by_products)


def flow_with_inputs(with_x, contexts, **options):
    """A MAF away from its first parameters, rows for it, and all whose gradients are asked for."""
    g = torch.Generator().manual_seed(0)
    flow = MAF(6, transforms=3, hidden_features=(16, 16), context_features=contexts, **options).double()
    for p in flow.parameters():
        p.data.add_(torch.randn(p.shape, dtype=p.dtype, generator=g), alpha=0.1)
    x = torch.randn(9, 6, dtype=torch.float64, generator=g, requires_grad=with_x)
    context = torch.randn(9, contexts, dtype=torch.float64, generator=g, requires_grad=True) if contexts else None
    return flow, x, context, [t for t in (x, context, *flow.parameters()) if t is not None and t.requires_grad]


@pytest.mark.parametrize(("with_x", "contexts"), list(itertools.product((False, True), (0, 3))))
def test_gradients_of_a_flow(with_x, contexts, by_products):
    """What autograd makes of them: several maps, saved in any number of tensors, with a gradient by the input and without."""
    flow, x, context, inputs = flow_with_inputs(with_x, contexts)

    def gradients():
        return torch.autograd.grad(flow.log_prob(x, context).square().sum(), inputs, create_graph=True)

    got = gradients()
    torch.autograd.backward([t.square().sum() for t in got], inputs=inputs)
    second = [t.grad.clone() for t in inputs]
    with backend("reference"):
        want = gradients()
        for t in inputs:
            t.grad = None
        torch.autograd.backward([t.square().sum() for t in want], inputs=inputs)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(second, [t.grad for t in inputs], rtol=1e-8, atol=1e-8)


@pytest.mark.gpu
@pytest.mark.parametrize("contexts", [0, 3])
def test_gpu_trains_as_a_cpu_does(contexts):
    flow = MAF(20, transforms=3, hidden_features=(64, 64), context_features=contexts)
    x, context = torch.randn(300, 20), torch.randn(300, contexts) if contexts else None
    found = []
    for device in ("cpu", "cuda"):
        own = copy.deepcopy(flow).to(device)  # a module that moves takes its gradients along
        given = (x.to(device),) if context is None else (x.to(device), context.to(device))
        loss = -own.log_prob(*given).mean()
        loss.backward()
        found.append([loss.detach().cpu(), *(p.grad.cpu() for p in own.parameters())])
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)
