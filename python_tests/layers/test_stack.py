"""Chains whose autoregressive layers run as one call, against the same layers called one by one."""

import pytest
import torch

import flowkernels.layers._stack as stack
from flowkernels.flows import MAF
from flowkernels.layers import Chain, DiagonalScale, FlowBatchNorm, Inverse, MaskedAutoregressive, Permute


def autoregressive(features, context=0, **options):
    layer = MaskedAutoregressive(features, (12, 9), context_features=context, **options)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return layer


def norm(features):
    layer = FlowBatchNorm(features)
    for tensor in (layer.log_gain, layer.bias, layer.running_mean):
        torch.nn.init.normal_(tensor)
    torch.nn.init.uniform_(layer.running_var, 0.5, 2.0)
    return layer.eval()


def layers_of(kind, features, context):
    first, second, third = (autoregressive(features, context, order=order) for order in ("ascending", "descending", "ascending"))
    shuffle = lambda: Permute.random(features)
    return {
        "one": [first],
        "plain": [first, second, third],
        "both directions": [first, Inverse(second), Inverse(Inverse(third))],
        "permuted": [shuffle(), first, shuffle(), shuffle(), second, third, shuffle()],
        "normalised": [norm(features), first, norm(features), second, norm(features), norm(features), third, norm(features)],
        "all": [first, shuffle(), norm(features), shuffle(), Inverse(second), shuffle(), third, norm(features), shuffle()],
    }[kind]


def one_by_one(chain, x, context, inverse):
    total = 0
    for layer in reversed(chain.layers) if inverse else chain.layers:
        x, logabsdet = (layer.inverse if inverse else layer)(x, context)
        total = total + logabsdet
    return x, total


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("context", [0, 3])
@pytest.mark.parametrize("kind", ["one", "plain", "both directions", "permuted", "normalised", "all"])
def test_equals_the_layers_one_by_one(kind, context, inverse):
    torch.manual_seed(0)
    chain = Chain(layers_of(kind, 5, context)).double()
    x, c = torch.randn(11, 5, dtype=torch.float64), torch.randn(11, 3, dtype=torch.float64) if context else None
    run = chain.inverse if inverse else chain
    with torch.no_grad():
        torch.testing.assert_close(run(x, c), one_by_one(chain, x, c, inverse), rtol=1e-12, atol=1e-12)
    x.requires_grad_()
    got, want = (
        torch.autograd.grad(sum(o.sin().sum() for o in f), [x, *chain.parameters()]) for f in (run(x, c), one_by_one(chain, x, c, inverse))
    )
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-11)


def calls_of_the_stack(monkeypatch, chain, x, *, inverse=False):
    """How many maps each call of the op had."""
    calls = []
    real = stack.autoregressive_stack
    monkeypatch.setattr(stack, "autoregressive_stack", lambda x, maps, context: calls.append(len(maps)) or real(x, maps, context))
    chain.inverse(x) if inverse else chain(x)
    return calls


def test_one_call_for_a_whole_flow(monkeypatch):
    x = torch.randn(4, 5)
    for kind in ("plain", "permuted", "all"):
        assert calls_of_the_stack(monkeypatch, Chain(layers_of(kind, 5, 0)), x) == [3]
        assert calls_of_the_stack(monkeypatch, Chain(layers_of(kind, 5, 0)), x, inverse=True) == [3]
    # two normalisations in a row are not one affine map of the op
    assert calls_of_the_stack(monkeypatch, Chain(layers_of("normalised", 5, 0)), x) == [2, 1]


def test_batch_norm_in_training_stands_alone(monkeypatch):
    chain = Chain([autoregressive(5), FlowBatchNorm(5), autoregressive(5)]).train()
    before = chain.layers[1].running_mean.clone()
    assert calls_of_the_stack(monkeypatch, chain, torch.randn(4, 5)) == [1, 1]
    assert not torch.equal(chain.layers[1].running_mean, before)
    assert calls_of_the_stack(monkeypatch, chain, torch.randn(4, 5), inverse=True) == [2]  # which takes the running statistics


def test_hooks_and_subclasses_are_called(monkeypatch):
    class Doubled(MaskedAutoregressive):
        def forward(self, x, context=None):
            return super().forward(2 * x, context)

    chain = Chain([autoregressive(5), Doubled(5, (8,)), autoregressive(5), autoregressive(5), autoregressive(5)])
    seen = []
    chain.layers[3].register_forward_hook(lambda *_: seen.append(1))
    x = torch.randn(4, 5)
    assert calls_of_the_stack(monkeypatch, chain, x) == [1, 1, 1] and seen == [1]
    torch.testing.assert_close(chain(x), one_by_one(chain, x, None, inverse=False))


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_a_context_that_one_layer_does_not_take(inverse, grad):
    chain = Chain([MaskedAutoregressive(4, (8,), context_features=2), MaskedAutoregressive(4, (8,))])
    call = chain.inverse if inverse else chain
    for hook in (False, True):
        if hook:
            chain.layers[0].register_forward_hook(lambda *_: None)
        with torch.set_grad_enabled(grad), pytest.raises(ValueError, match=r"context was given, \[5, 2\], but"):
            call(torch.randn(5, 4), torch.randn(5, 2))


@pytest.mark.parametrize("context", [0, 2])
@pytest.mark.parametrize("inverse", [False, True])
def test_batch_norms_between_layers_keep_half_precision(context, inverse):
    flow = MAF(4, context_features=context, batch_norm=True, transforms=2, hidden_features=(8,)).eval()
    given = (torch.randn(3, context).bfloat16(),) if context else ()
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            y, logabsdet = (flow.inverse if inverse else flow)(torch.randn(3, 4).bfloat16(), *given)
        assert y.dtype == torch.bfloat16 and logabsdet.dtype == torch.float32


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("between", [FlowBatchNorm(5), FlowBatchNorm(1), Permute("descending", 5), Permute("descending", 3)])
def test_a_layer_between_of_another_width(between, inverse):
    chain = Chain([MaskedAutoregressive(4, (8,)), between, MaskedAutoregressive(4, (8,))]).eval()
    for grad in (False, True):
        with torch.set_grad_enabled(grad), pytest.raises(ValueError, match=r"[xz] must have shape \[batch, [135], \*sites\]; got \[6, 4\]"):
            (chain.inverse if inverse else chain)(torch.randn(6, 4))


@pytest.mark.parametrize("inverse", [False, True])
def test_a_subclass_or_a_hook_of_inverse_is_called(inverse):
    class Counting(Inverse):
        def forward(self, x, context=None):
            seen.append("subclass")
            return super().forward(x, context)

        def inverse(self, z, context=None):
            seen.append("subclass")
            return super().inverse(z, context)

    seen = []
    made = lambda: MaskedAutoregressive(4, (8,))
    hooked = Inverse(made())
    hooked.register_forward_hook(lambda *_: seen.append("hook"))
    chain = Chain([made(), Counting(made()), hooked, DiagonalScale(4)])  # one that is no map, so that layers are looked at one by one
    (chain.inverse if inverse else chain)(torch.randn(5, 4))
    assert seen == (["subclass"] if inverse else ["subclass", "hook"])


@pytest.mark.parametrize("inverse", [False, True])
def test_permutations_between_are_made_anew_for_every_call(inverse):
    chain, x = Chain([MaskedAutoregressive(4, (8,)), Permute([2, 0, 3, 1]), MaskedAutoregressive(4, (8,))]), torch.randn(5, 4)
    call = chain.inverse if inverse else chain
    want = call(x)
    with torch.no_grad():
        for _ in range(6):
            torch.testing.assert_close(call(x), want)
