"""What cannot be taken over is refused with the reason, and what can keeps its place in training, copies and orders."""

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn

from flowkernels.flows import Flow
from flowkernels.integrations import from_nflows, from_normflows, from_zuko
from flowkernels.layers import MaskedAutoregressive
from python_tests.integrations.foreign_layers import nflows_layer, zuko_layer

nflows = pytest.importorskip("nflows.flows")
nflows_nets = pytest.importorskip("nflows.nn.nets")
distributions = pytest.importorskip("nflows.distributions")
transforms = pytest.importorskip("nflows.transforms")
autoregressive = pytest.importorskip("nflows.transforms.autoregressive")
normflows = pytest.importorskip("normflows")
zuko = pytest.importorskip("zuko")


def test_batch_statistics_and_dropout_are_refused():
    message = r"blocks.0.batch_norm_layers.0 normalises by the batch it sees, which mixes its rows; call eval\(\) on the network"
    module = nflows_layer(use_batch_norm=True)
    with pytest.raises(ValueError, match=message):
        from_nflows(module)
    from_nflows(module.eval())
    with pytest.raises(ValueError, match="blocks.1.batch_norm normalises by the batch"):
        module = nflows_layer(use_batch_norm=True, use_residual_blocks=False).eval()
        module.autoregressive_net.blocks[1].batch_norm.train()
        from_nflows(module)
    with pytest.raises(ValueError, match=r"blocks.0.dropout drops units at random while it trains; call eval\(\) on the network"):
        from_normflows(normflows.flows.MaskedAffineAutoregressive(3, 8, dropout_probability=0.1))
    from_nflows(nflows_layer(dropout_probability=0.0))


def spoilt(edit):
    module = nflows_layer(use_residual_blocks=False, num_blocks=1)
    made = module.autoregressive_net
    edit(made.initial_layer.mask, made.blocks[0].linear.mask, made.final_layer.mask)
    return module


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda first, inner, last: last.fill_(1.0), "the masks are not autoregressive: the output of feature 0 sees input 0"),
        (
            lambda first, inner, last: (
                (first.fill_(0.0), first[0].copy_(torch.tensor([0.0, 1, 0])), first[1].copy_(torch.tensor([1.0, 0, 0])))
                and (inner.copy_(torch.eye(8)), last.zero_(), last[0:2, 0].fill_(1.0), last[2:4, 1].fill_(1.0))
            ),
            "the output of feature 0 sees input 1, and the output of feature 1 sees input 0",
        ),
        (
            lambda first, inner, last: (
                (first.zero_(), first[0, 0].fill_(1.0), first[1, 1].fill_(1.0))
                and (inner.copy_(torch.eye(8)), last.zero_(), last[2:4, 0].fill_(1.0), last[4:6, 1].fill_(1.0))
            ),
            "no order of degrees expresses these masks: the output of feature 1 sees input 0 and not input 1, "
            "and the output of feature 2 sees input 1 and not input 0",
        ),
        (
            lambda first, inner, last: inner[1, 0::2].zero_(),
            "no order of degrees expresses the mask of blocks.0.linear: its output 1 sees input 1, but not all",
        ),
    ],
)
def test_masks_that_are_no_staircase_are_refused(edit, message):
    with pytest.raises(ValueError, match=message):
        from_nflows(spoilt(edit))


def test_adjacencies_that_are_not_nested_are_refused():
    adjacency = torch.eye(4, dtype=torch.bool)
    adjacency[1, 0] = adjacency[3, 2] = True
    with pytest.raises(ValueError, match="the output of feature 1 sees input 0 and not input 2, and the output of feature 3 sees input 2"):
        from_zuko(zuko_layer(adjacency=adjacency))
    adjacency = torch.ones(4, 5, dtype=torch.bool).tril()
    adjacency[0, 4] = True
    with pytest.raises(ValueError, match="every unit must see the whole context; in hyper.0, output 1 does not see context feature 0"):
        from_zuko(zuko_layer(adjacency=adjacency, context=1))


@pytest.mark.parametrize(
    ("take_over", "module", "error", "message"),
    [
        (
            from_nflows,
            lambda: nn.Linear(2, 2),
            TypeError,
            "module must be an nflows MaskedAffineAutoregressiveTransform, MADE, CompositeTransform or Flow; got Linear",
        ),
        (
            from_normflows,
            lambda: nn.Linear(2, 2),
            TypeError,
            "module must be a normflows MaskedAffineAutoregressive, MADE or NormalizingFlow; got Linear",
        ),
        (from_zuko, lambda: nn.Linear(2, 2), TypeError, "module must be a zuko MaskedAutoregressiveTransform or Flow; got Linear"),
        (
            from_zuko,
            lambda: zuko.flows.GF(4),
            TypeError,
            "transform 0 of the flow must be a MaskedAutoregressiveTransform, a GeneralCouplingTransform or an Uncondition",
        ),
        (from_nflows, lambda: nflows_layer(activation=torch.sin), ValueError, "activation must be one of"),
        (
            from_nflows,
            lambda: autoregressive.made_module.MADE(3, 8, output_multiplier=3),
            ValueError,
            "the MADE must have output_multiplier 2, scale and shift of each feature; got 3",
        ),
        (
            from_normflows,
            lambda: normflows.nets.MADE(3, 8, output_multiplier=2, preprocessing=nn.Tanh()),
            ValueError,
            "preprocessing must be None; got Tanh",
        ),
        (from_zuko, lambda: zuko.flows.NSF(4).transform.transforms[0], ValueError, "univariate must be MonotonicAffineTransform"),
    ],
)
def test_other_modules_are_refused(take_over, module, error, message):
    with pytest.raises(error, match=message):
        take_over(module().eval())


def test_a_subclass_with_another_map_is_refused():
    class Shifted(autoregressive.MaskedAffineAutoregressiveTransform):
        def _elementwise_forward(self, inputs, autoregressive_params):
            z, logabsdet = super()._elementwise_forward(inputs, autoregressive_params)
            return z + 0.1, logabsdet

    class Squared(normflows.nets.MADE):
        def forward(self, inputs, context=None):
            return super().forward(inputs, context).square()

    class Stretched(zuko.flows.MAF):
        def forward(self, c=None):
            flow = super().forward(c)
            return type(flow)(
                zuko.transforms.ComposedTransform(flow.transform, zuko.transforms.MonotonicAffineTransform(*torch.tensor([0.0, 0.5]))),
                flow.base,
            )

    with pytest.raises(ValueError, match=r"Shifted does not compute what this version .* differs by up to 1.0e-01"):
        from_nflows(Shifted(3, 8))
    with pytest.raises(ValueError, match="Squared does not compute"):
        from_normflows(Squared(3, 8, output_multiplier=2))
    with pytest.raises(ValueError, match="Stretched does not compute"):
        from_zuko(Stretched(3, transforms=1))


def test_the_floor_of_the_scale_is_that_of_the_transform():
    module = nflows_layer().double()
    module._epsilon = 0.1
    x = torch.randn(5, 3, dtype=torch.float64)
    for got, want in zip(from_nflows(module)(x), module(x), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_a_base_that_is_not_standard_normal_is_refused():
    flow = zuko.flows.MAF(3, transforms=1)
    assert isinstance(from_zuko(flow), Flow)
    next(flow.base.buffers()).add_(1.0)
    with pytest.raises(ValueError, match="base must be a standard normal"):
        from_zuko(flow)


def test_a_layer_taken_over_trains_copies_and_is_independent():
    module = nflows_layer(context_features=2, use_batch_norm=True).eval()
    layer = from_nflows(module)
    assert isinstance(layer, MaskedAutoregressive) and not layer.training and layer.context_features == 2
    x, context = torch.randn(5, 3), torch.randn(5, 2)
    with torch.no_grad():
        want = layer(x, context)
        for p in module.parameters():
            p.zero_()
        for twin in (layer, copy.deepcopy(layer)):
            assert all(torch.equal(g, w) for g, w in zip(twin(x, context), want, strict=True))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    layer(x, context)[0].square().sum().backward()
    assert all(p.grad is not None for p in layer.parameters())
    optimizer.step()
    layer.layers[-1].bias.data.zero_()
    z, logabsdet = layer(x, context)
    back, opposite = layer.inverse(z, context)
    torch.testing.assert_close(back, x, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(opposite, -logabsdet, rtol=1e-3, atol=1e-3)


def test_other_libraries_are_not_imported_with_the_package():
    code = "import sys, flowkernels.integrations as i; print([m for m in ('nflows', 'normflows', 'zuko') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_another_map_is_refused_beside_a_nan_too():
    class Stretched(autoregressive.MaskedAffineAutoregressiveTransform):
        def _elementwise_forward(self, inputs, autoregressive_params):
            z, logabsdet = super()._elementwise_forward(inputs, autoregressive_params)
            return 7 * z, logabsdet

    plain, stretched = (kind(3, 8) for kind in (autoregressive.MaskedAffineAutoregressiveTransform, Stretched))
    for module in (plain, stretched):
        with torch.no_grad():
            module.autoregressive_net.final_layer.bias[0] = torch.nan
    assert isinstance(from_nflows(plain), MaskedAutoregressive)
    with pytest.raises(ValueError, match="Stretched does not compute"):
        from_nflows(stretched)


def test_a_map_to_nothing_but_nan_is_refused():
    class Lost(autoregressive.MaskedAffineAutoregressiveTransform):
        def _elementwise_forward(self, inputs, autoregressive_params):
            z, logabsdet = super()._elementwise_forward(inputs, autoregressive_params)
            return torch.nan * z, logabsdet

    with pytest.raises(ValueError, match="Lost does not compute"):
        from_nflows(Lost(3, 8))


def test_flows_whose_layers_take_other_contexts_are_refused():
    layers = [zuko.flows.MaskedAutoregressiveTransform(3, context, hidden_features=(8,)) for context in (0, 2)]
    base = zuko.flows.MAF(3, transforms=1).base
    for transforms in (layers, layers[::-1]):
        with pytest.raises(ValueError, match=r"all transforms must take the same context; theirs have \[[02], [02]\] features"):
            from_zuko(zuko.flows.Flow(transforms, base))
    with pytest.raises(ValueError, match="module must have at least one transform; got none"):
        from_zuko(zuko.flows.Flow([], base))
