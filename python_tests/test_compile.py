"""torch.compile of whole layers and flows: one graph, training and evaluation, static and dynamic batch."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import functional_call, grad, hessian, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from benchmarks.case import has_python_headers
from flowkernels.flows import IAF, MAF, NICE, Flow, Glow, RealNVP, StandardLogistic, StandardNormal
from flowkernels.layers import MaskedAutoregressive


def layer(**options):
    return MaskedAutoregressive(4, (9, 9), context_features=2, order="descending", **options)


def flow():
    return MAF(4, context_features=2, transforms=2, hidden_features=(9, 8), batch_norm=True)


MODELS = {"layer": layer, "residual layer": lambda: layer(residual=True), "flow": flow}


@pytest.fixture(params=MODELS.values(), ids=MODELS)
def model(request) -> torch.nn.Module:
    torch._dynamo.reset()
    torch.manual_seed(0)
    return request.param()


def batch(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(rows)
    return torch.randn(rows, 4, generator=g), torch.randn(rows, 2, generator=g)


def step(call, model: torch.nn.Module, rows: int) -> list[torch.Tensor]:
    """One training step: the loss, all gradients and, in batch norm, the running statistics that it leaves."""
    x, context = batch(rows)
    context.requires_grad_()
    model.zero_grad()
    z, logabsdet = call(x, context)
    loss = (z.square().sum(1) / 2 - logabsdet).mean()
    loss.backward()
    return [loss.detach(), context.grad, *(p.grad.clone() for p in model.parameters()), *(b.clone() for b in model.buffers())]


@pytest.mark.parametrize("dynamic", [False, True])
def test_training(model, dynamic):
    counter = CompileCounterWithBackend("aot_eager")
    start = {name: value.clone() for name, value in model.state_dict().items()}
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend=counter)
    sizes = (8, 11, 5) if dynamic else (8,)
    got = [step(compiled, model, sizes[0])]
    graphs = counter.frame_count
    got += [step(compiled, model, rows) for rows in sizes[1:]]
    assert counter.frame_count == graphs, "another batch size was another graph"
    model.load_state_dict(start)
    torch.testing.assert_close(got, [step(model, model, rows) for rows in sizes])


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_evaluation(model, direction, dynamic):
    counter = CompileCounterWithBackend("aot_eager")
    call = getattr(model.eval(), direction)
    compiled = torch.compile(call, fullgraph=True, dynamic=dynamic, backend=counter)
    with torch.no_grad():
        for rows in (8, 11, 5) if dynamic else (8,):
            torch.testing.assert_close(compiled(*batch(rows)), call(*batch(rows)))
            assert counter.frame_count == 1


@pytest.mark.parametrize("shape", [(6,), (1, 4, 4)], ids=["RealNVP", "Glow"])
def test_half_precision(shape):
    torch._dynamo.reset()
    torch.manual_seed(0)
    flow = Glow(shape, levels=1, steps=2, hidden_channels=8) if len(shape) == 3 else RealNVP(6, transforms=2, hidden_features=(9,))
    x = torch.randn(5, *shape)
    flow(x)  # initialises
    flow, x = flow.bfloat16(), x.bfloat16()
    torch.testing.assert_close(torch.compile(flow, fullgraph=True, backend="aot_eager")(x), flow(x), rtol=0.02, atol=0.05)


@pytest.mark.slow
@pytest.mark.skipif(not has_python_headers(), reason="what torch.compile writes needs Python.h: install Python's headers (python3-dev)")
def test_inductor():
    """The default backend, which makes code of everything around the ops; dynamic, so that the batch size is a symbol."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = flow()
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    got = [step(compiled, model, rows) for rows in (8, 11)]
    model.load_state_dict(start)
    torch.testing.assert_close(got, [step(model, model, rows) for rows in (8, 11)], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("base", [StandardNormal(), StandardLogistic()], ids=["normal", "logistic"])
def test_samples_of_any_number(base):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Flow([layer()], 4, context_features=2, base=base)
    sample = torch.compile(model.sample, backend="aot_eager")
    for n, contexts in ((5, 6), (5, 7), (3, 7), (1, 1)):
        assert sample(n, batch(contexts)[1]).shape == (n, contexts, 4)


COUPLINGS = {
    "NICE": lambda: NICE(4, couplings=2, hidden_features=(6,)),
    "RealNVP": lambda: RealNVP(4, transforms=2, hidden_features=(6,), batch_norm=False),
    "Glow, additive": lambda: Glow((1, 4, 4), levels=1, steps=2, hidden_channels=4, coupling="additive"),
}


@pytest.mark.parametrize("make", COUPLINGS.values(), ids=COUPLINGS)
def test_couplings_with_a_dynamic_batch(make):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = make()
    rows = lambda n: torch.randn(n, *model.shape, generator=torch.Generator().manual_seed(n))
    model(rows(8))  # initialises actnorms
    compiled = torch.compile(model.log_prob, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (3, 5):
        got, want = compiled(rows(n)), model.log_prob(rows(n))
        torch.testing.assert_close(got, want)
        gradients = (torch.autograd.grad(value.sum(), list(model.parameters()), allow_unused=True) for value in (got, want))
        torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("make", [lambda: MAF(4, transforms=2, hidden_features=(6,)), *COUPLINGS.values()], ids=["MAF", *COUPLINGS])
def test_gradients_by_func_are_in_the_graph(make):
    """Per-sample gradients of a compiled function; second derivatives by forward mode, at which torch's compiler fails, go past it."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = make()
    x = torch.randn(3, *model.shape)
    model(x)  # initialises actnorms
    model.eval()
    density = lambda row: model.log_prob(row[None])[0]
    for call, fullgraph in ((vmap(grad(density)), True), (vmap(hessian(density)), False)):
        torch.testing.assert_close(torch.compile(call, fullgraph=fullgraph, backend="aot_eager")(x), call(x))


@pytest.mark.skipif(not has_python_headers(), reason="what torch.compile writes needs Python.h: install Python's headers (python3-dev)")
@pytest.mark.parametrize("kind", [MAF, IAF])
def test_gradients_of_each_sample_by_inductor(kind):
    """Which gets a permutation's gradient under vmap wrong where it is index_select's (torch 2.13)."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    flow, x = kind(5, transforms=2, hidden_features=(8,)), torch.randn(4, 5)

    def value(parameters, row):
        z, logabsdet = functional_call(flow, parameters, (row[None],))
        return logabsdet.sum() + z.sin().sum()

    call = vmap(grad(value, argnums=(0, 1)), (None, 0))
    parameters = {name: p.detach() for name, p in flow.named_parameters()}
    torch.testing.assert_close(torch.compile(call, fullgraph=True)(parameters, x), call(parameters, x))


@pytest.mark.parametrize("make", [lambda: MAF(4, transforms=2, hidden_features=(6,)), COUPLINGS["RealNVP"]], ids=["MAF", "RealNVP"])
def test_derivatives_can_be_recorded(make):
    """make_fx and fake tensors, where no value of a tensor can be read."""
    model = make()
    x = torch.randn(3, *model.shape)
    call = vmap(grad(lambda row: model.log_prob(row[None])[0]))
    for mode in ("real", "fake"):
        recorded = make_fx(call, tracing_mode=mode, _allow_non_fake_inputs=True)(x)
        torch.testing.assert_close(recorded(x), call(x))
