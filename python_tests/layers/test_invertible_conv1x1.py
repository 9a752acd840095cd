import copy
import pickle

import pytest
import torch

from flowkernels.flows import Flow, Glow
from flowkernels.layers import ActNormConv1x1, InvertibleConv1x1
from flowkernels.layers._fold import fold
from flowkernels.layers.invertible_conv1x1 import conv1x1
from flowkernels.ops import slogdet_inverse

PARAMETRIZATIONS = ["lu", "plain"]
SHAPES = [(3, 4), (3, 4, 5), (2, 4, 3, 2), (2, 4, 2, 3, 2), (1, 1, 2), (0, 4, 3, 2)]


def shaken(layer):
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=g, dtype=p.dtype))
    return layer


def make(kind, channels, parametrization):
    torch.manual_seed(channels)
    layer = shaken(kind(channels, parametrization=parametrization).double())
    if kind is ActNormConv1x1:
        layer.actnorm.initialise(torch.randn(30, channels, dtype=torch.float64) * 3 + 20)
    return layer


@pytest.fixture(
    params=[(k, p) for k in (InvertibleConv1x1, ActNormConv1x1) for p in PARAMETRIZATIONS], ids=lambda v: f"{v[0].__name__} {v[1]}"
)
def kind(request):
    return request.param


def by_definition(layer, x):
    """Site by site, from actnorm's and the convolution's own formulas."""
    if isinstance(layer, ActNormConv1x1):
        x, outer = layer.actnorm(x)[0], layer.conv
    else:
        outer = layer
    return torch.einsum("oc,bc...->bo...", outer.weight(), x)


@pytest.mark.parametrize("shape", SHAPES)
def test_map_and_round_trip(kind, shape):
    layer = make(kind[0], shape[1], kind[1])
    x = torch.randn(shape, dtype=torch.float64)
    z, logabsdet = layer(x)
    torch.testing.assert_close(z, by_definition(layer, x))
    back, opposite = layer.inverse(z)
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(opposite, -logabsdet)
    assert logabsdet.shape == opposite.shape == shape[:1]


@pytest.mark.parametrize("shape", SHAPES[1:-1])
@pytest.mark.parametrize("inverse", [False, True])
def test_logabsdet_is_the_jacobians(kind, shape, inverse):
    layer = make(kind[0], shape[1], kind[1])
    f = layer.inverse if inverse else layer.forward
    x = torch.randn(shape, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda v: f(v.view(1, *shape[1:]))[0].flatten(), x[0].flatten())
    torch.testing.assert_close(f(x)[1][0], torch.linalg.slogdet(jacobian)[1])


@pytest.mark.parametrize("inverse", [False, True])
def test_gradients(kind, inverse):
    layer = make(kind[0], 3, kind[1])
    f = layer.inverse if inverse else layer.forward
    x = torch.randn(2, 3, 2, dtype=torch.float64, requires_grad=True)
    inputs = [x, *layer.parameters()]
    assert torch.autograd.gradcheck(lambda *a: f(x), inputs) and torch.autograd.gradgradcheck(lambda *a: f(x), inputs, fast_mode=True)


@pytest.mark.parametrize("dims", [4, 5])
def test_memory_format_does_not_matter_and_stays(kind, dims):
    layer = make(kind[0], 6, kind[1])
    memory_format = torch.channels_last if dims == 4 else torch.channels_last_3d
    x = torch.randn((3, 6, 4, 5, 2)[:dims], dtype=torch.float64)
    for f in (layer.forward, layer.inverse):
        z, last = f(x)[0], f(x.to(memory_format=memory_format))[0]
        torch.testing.assert_close(last, z)
        assert last.is_contiguous(memory_format=memory_format) and z.is_contiguous()
    torch.testing.assert_close(layer(x[..., ::2])[0], z_of(layer, x[..., ::2]))
    torch.testing.assert_close(layer(x.transpose(-1, -2))[0], z_of(layer, x.transpose(-1, -2)))


def z_of(layer, x):
    return layer(x.contiguous())[0]


@pytest.mark.parametrize("parametrization", PARAMETRIZATIONS)
@pytest.mark.parametrize("channels", [1, 2, 12, 48])
def test_starts_as_a_random_rotation(parametrization, channels):
    a, b = (InvertibleConv1x1(channels, parametrization=parametrization) for _ in range(2))
    weight = a.weight().detach().double()
    torch.testing.assert_close(weight @ weight.T, torch.eye(channels, dtype=torch.float64), atol=1e-5, rtol=0)
    assert torch.linalg.det(weight) > 0 and (channels == 1 or not torch.equal(a.weight(), b.weight()))
    assert a.weight_logabsdet().abs() < 1e-4


def test_lu_form_keeps_permutation_and_signs():
    layer = InvertibleConv1x1(6)
    assert {name for name, _ in layer.named_parameters()} == {"factors", "log_diagonal"}
    sign, row = layer.sign.clone(), layer.row.clone()
    shaken(layer)
    lower, upper = layer.factors.tril(-1) + torch.eye(6), layer.factors.triu(1) + torch.diag(sign * layer.log_diagonal.exp())
    torch.testing.assert_close(layer.weight(), (lower @ upper)[row])
    torch.testing.assert_close(layer.weight_logabsdet(), torch.linalg.slogdet(layer.weight())[1])
    assert torch.equal(layer.sign, sign) and torch.equal(layer.row, row)


@pytest.mark.parametrize("inverse", [False, True])
def test_many_layers_are_folded_in_one_call_for_each_size(monkeypatch, inverse):
    from flowkernels.layers import _fold as module

    layers = [make(ActNormConv1x1, c, p) for c, p in [(4, "plain"), (6, "plain"), (4, "lu"), (4, "plain"), (6, "plain"), (4, "lu")]]
    x = [torch.randn(2, layer.actnorm.channels, 3, dtype=torch.float64) for layer in layers]
    way = ActNormConv1x1.inverse if inverse else ActNormConv1x1.forward
    parameters = [p for layer in layers for p in layer.parameters()]
    loss = lambda outputs: sum(z.square().sum() + logabsdet.sum() for z, logabsdet in outputs)
    alone = [way(layer, rows) for layer, rows in zip(layers, x, strict=True)]
    name, sizes = "slogdet_inverse" if inverse else "slogdet", []
    computed = getattr(module, name)
    monkeypatch.setattr(module, name, lambda w, **options: sizes.append(tuple(w.shape)) or computed(w, **options))
    of_factors, counts = module.lu_fold, []
    monkeypatch.setattr(module, "lu_fold", lambda factors, *a, **options: counts.append(len(factors)) or of_factors(factors, *a, **options))
    folded = fold(layers, inverse=inverse)
    together = [way(layer, rows, folded=folded, at=i) for i, (layer, rows) in enumerate(zip(layers, x, strict=True))]
    assert sizes == [(2, 4, 4), (2, 6, 6)] and counts == [2]
    torch.testing.assert_close(together, alone)
    torch.testing.assert_close(torch.autograd.grad(loss(together), parameters), torch.autograd.grad(loss(alone), parameters))


@pytest.mark.parametrize("mean", [1, 10, 100])
def test_the_folded_pair_is_as_exact_as_its_two_layers(mean):
    """Folding the bias too would cost 7 times the error at a mean of 10 standard deviations."""
    torch.manual_seed(0)
    step = ActNormConv1x1(24)
    x = torch.randn(8, 24, 16, 16) + mean
    step(x)
    exact = copy.deepcopy(step).double()(x.double())[0]
    rms = lambda z: (z - exact).square().mean().sqrt()
    with torch.no_grad():
        one_by_one = step.conv(step.actnorm(x)[0])[0]
        folded = step(x)[0]
        weight = step.conv.weight() * step.actnorm.log_scale.exp()
        bias_too = conv1x1(x, weight, after=weight @ step.actnorm.bias)
    assert rms(folded) <= 1.5 * rms(one_by_one)
    assert mean < 10 or rms(bias_too) > 4 * rms(folded), "then the bias could be folded as well"


class TestFreeze:
    def flow(self):
        torch.manual_seed(0)
        layers = [InvertibleConv1x1(4), InvertibleConv1x1(6, parametrization="plain"), InvertibleConv1x1(4, parametrization="plain")]
        return Flow([shaken(InvertibleConv1x1(4)), shaken(layers[2]), shaken(layers[0])], 4)

    def test_keeps_the_same_maps(self):
        flow, z = self.flow(), torch.randn(5, 4)
        with torch.no_grad():
            want = (*flow(z), *flow.inverse(z))
            flow.freeze()
            torch.testing.assert_close((*flow(z), *flow.inverse(z)), want)
            assert all(layer.kept() is not None for layer in flow.layers)

    def test_one_call_inverts_all_weights_of_one_size(self, monkeypatch):
        from flowkernels.layers import _fold as module

        shapes, original = [], module.slogdet_inverse
        monkeypatch.setattr(module, "slogdet_inverse", lambda w, **o: (shapes.append((tuple(w.shape), w.dtype)), original(w, **o))[1])
        flow = self.flow().freeze()
        assert shapes == [((3, 4, 4), torch.float64)]
        with torch.no_grad():
            flow.inverse(torch.randn(2, 4))
        assert len(shapes) == 1

    @pytest.mark.parametrize(
        "drop",
        [
            lambda flow: flow.train(),
            lambda flow: flow.load_state_dict(flow.state_dict()),
            lambda flow: flow.double(),
            lambda flow: flow.to("cpu"),
        ],
    )
    def test_is_dropped(self, drop):
        flow = self.flow().freeze()
        drop(flow)
        with torch.no_grad():
            assert all(layer.kept() is None for layer in flow.layers)

    def test_evaluation_and_copies_keep_it(self):
        flow = self.flow().freeze().eval()
        with torch.no_grad():
            for twin in (flow, copy.deepcopy(flow), pickle.loads(pickle.dumps(flow))):
                assert all(layer.kept() is not None for layer in twin.layers)
        assert set(flow.state_dict()) == set(self.flow().state_dict())

    def test_gradients_are_never_lost(self):
        flow, z = self.flow().freeze(), torch.randn(5, 4)
        sum(t.sum() for t in (*flow(z), *flow.inverse(z))).backward()
        assert all(p.grad is not None and p.grad.ne(0).any() for p in flow.parameters())

    def test_again_after_a_write_that_torch_does_not_count(self):
        flow, z = self.flow().freeze(), torch.randn(5, 4)
        for p in flow.parameters():
            p.data.add_(0.1)
        thawed = copy.deepcopy(flow).train()
        flow.freeze()
        with torch.no_grad():
            torch.testing.assert_close((*flow(z), *flow.inverse(z)), (*thawed(z), *thawed.inverse(z)))

    def test_a_singular_weight_is_named(self):
        flow = self.flow()
        with torch.no_grad():
            flow.layers[1].plain_weight[0] = flow.layers[1].plain_weight[2]
        with pytest.raises(
            ValueError, match=r"layers\.1 cannot be frozen: its weight is singular, with condition number (inf|[0-9.]+e\+\d+)"
        ):
            flow.freeze()
        with torch.no_grad():
            assert all(layer.kept() is None for layer in flow.layers)


def test_inverse_is_computed_in_float64():
    torch.manual_seed(0)
    layer = InvertibleConv1x1(24, parametrization="plain")
    with torch.no_grad():
        u, _, v = torch.linalg.svd(layer.plain_weight.double())
        layer.plain_weight.copy_(u @ torch.diag(torch.logspace(0, -5, 24, dtype=torch.float64)) @ v)
        exact = torch.linalg.inv(layer.plain_weight.double())
        _, inverse = layer.logabsdet_and_inverse()
    assert inverse.dtype == torch.float32 and (inverse - exact).abs().max() <= 1e-6 * exact.abs().max()


def test_state_and_dtypes(kind):
    layer = make(kind[0], 5, kind[1]).float()
    x = torch.randn(4, 5, 3)
    with torch.no_grad():
        want = layer(x)
        other = kind[0](5, parametrization=kind[1])
        other.load_state_dict(layer.state_dict())
        for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), other):
            torch.testing.assert_close(twin(x), want, rtol=0, atol=0)
        half = copy.deepcopy(layer).bfloat16()
        z, logabsdet = half(x.bfloat16())
        assert z.dtype == torch.bfloat16 and logabsdet.dtype == torch.float32
        assert half.inverse(z)[0].dtype == torch.bfloat16
        torch.testing.assert_close(logabsdet, copy.deepcopy(half).float()(x)[1])  # what is rounded are the parameters alone
        with torch.autocast("cpu", dtype=torch.bfloat16):
            z, logabsdet = layer(x)
        assert logabsdet.dtype == torch.float32
        torch.testing.assert_close(logabsdet, want[1])


def test_compiles_without_graph_breaks(kind):
    layer = make(kind[0], 4, kind[1])
    x = torch.randn(3, 4, 2, 2, dtype=torch.float64)
    torch._dynamo.reset()
    for f in (layer.forward, layer.inverse):
        torch.testing.assert_close(torch.compile(f, fullgraph=True, backend="aot_eager")(x), f(x))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: InvertibleConv1x1(0), "channels must be a whole number of at least 1; got 0"),
        (lambda: InvertibleConv1x1(4, parametrization="qr"), "parametrization must be 'lu' or 'plain'; got 'qr'"),
        (lambda: InvertibleConv1x1(4)(torch.zeros(2, 5, 3)), r"x must have shape \[batch, 4, \*sites\]; got \[2, 5, 3\]"),
        (lambda: InvertibleConv1x1(4).inverse(torch.zeros(4)), r"z must have shape \[batch, 4, \*sites\]; got \[4\]"),
        (lambda: ActNormConv1x1(4)(torch.zeros(2, 5)), r"x must have shape \[batch, 4, \*sites\]; got \[2, 5\]"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_weight_frozen_in_inference_mode_serves_gradients():
    flow = Glow((1, 4, 4), levels=1, steps=2, hidden_channels=4)
    flow(torch.randn(8, 1, 4, 4))
    with torch.inference_mode():
        flow.freeze()
    x = torch.randn(2, 1, 4, 4, requires_grad=True)
    flow.requires_grad_(False).log_prob(x).sum().backward()
    assert x.grad.isfinite().all()


def test_a_write_while_the_weight_is_frozen_is_noticed(monkeypatch):
    from flowkernels.layers import _fold

    layer, z = InvertibleConv1x1(3), torch.randn(5, 3)

    def meanwhile(*args, **options):
        with torch.no_grad():
            layer.log_diagonal.add_(0.5)
        return slogdet_inverse(*args, **options)

    monkeypatch.setattr(_fold, "slogdet_inverse", meanwhile)
    layer.eval().freeze()
    with torch.no_grad():
        torch.testing.assert_close(layer.inverse(z), copy.deepcopy(layer).train().inverse(z))


def test_a_weight_that_is_thawed_between_two_looks(monkeypatch):
    """As another thread may, which trains."""
    layers = [ActNormConv1x1(3) for _ in range(2)]
    for layer in layers:
        layer(torch.randn(5, 3))
    with torch.no_grad():
        want = fold(layers)
        for layer in layers:
            layer.eval().conv.freeze()
        kept = [layer.conv.kept() for layer in layers] * 2
        monkeypatch.setattr(InvertibleConv1x1, "kept", lambda self: kept.pop(0) if len(kept) > 2 else None)
        got = fold(layers)
    torch.testing.assert_close((*got.weights, got.logabsdets), (*want.weights, want.logabsdets))


def test_rotations_are_uniform():  # LAPACK's q alone has diagonals of one sign
    torch.manual_seed(0)
    rotations = torch.stack([InvertibleConv1x1(4, parametrization="plain").plain_weight.detach() for _ in range(400)])
    assert rotations.mean(0).abs().max() < 0.15  # 6 standard errors: entries have variance 1 / 4
    torch.testing.assert_close(torch.linalg.det(rotations), torch.ones(400))


@pytest.mark.parametrize("parametrization", ["lu", "plain"])
def test_a_bare_weight_frozen_in_inference_mode_serves_gradients(parametrization):  # without actnorm's scale, which makes new tensors
    layer = InvertibleConv1x1(4, parametrization=parametrization).requires_grad_(False)
    with torch.inference_mode():
        layer.eval().freeze()
    for call in (layer, layer.inverse):
        x = torch.randn(2, 4, 3, 3, requires_grad=True)
        call(x)[0].sum().backward()
        assert x.grad.isfinite().all()


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("written", [0, 1])
def test_layers_of_which_one_is_no_longer_frozen(written, inverse):
    torch.manual_seed(0)
    layers = [ActNormConv1x1(4).eval() for _ in range(2)]
    for layer in layers:
        layer.actnorm.initialise(torch.randn(30, 4) * 3 + 1)
        layer.conv.freeze()
    with torch.no_grad():
        layers[written].conv.log_diagonal.add_(0.3)
        got = fold(layers, inverse=inverse)
        for layer in layers:
            layer.conv.train()
        want = fold(layers, inverse=inverse)
    torch.testing.assert_close(list(got.weights), list(want.weights))
    torch.testing.assert_close(got.logabsdets, want.logabsdets)


def test_a_nearly_singular_weight_cannot_be_frozen():  # an exactly singular one has a NaN for its condition
    layer = InvertibleConv1x1(3, parametrization="plain").double()
    with torch.no_grad():
        layer.plain_weight.copy_(torch.diag(torch.tensor([1.0, 1.0, 1e-17], dtype=torch.float64)))
    with pytest.raises(ValueError, match="singular, with condition number 1.0e[+]17"):
        layer.freeze()
    with torch.no_grad():
        layer.plain_weight.zero_()
    with pytest.raises(ValueError, match="singular, with condition number inf"):
        layer.freeze()
