"""Rules of a line each, which no other test would miss."""

import importlib.util
import threading
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

from flowkernels import _torch, backend, check
from flowkernels._backend import chosen
from flowkernels.data import Split, Table, load_digits
from flowkernels.data.preprocess import Identity
from flowkernels.flows import MAF, StandardLogistic, StandardNormal
from flowkernels.flows.networks import ConvNet
from flowkernels.integrations.foreign import batch_norm_affine
from flowkernels.layers import AffineCoupling, Chain, FlowBatchNorm, MaskedAutoregressive
from flowkernels.training import DataModel, Trainer, TrainingSettings, make_config
from flowkernels.training.start import _fingerprint
from flowkernels.training.variational import reverse_kl


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("norms", ["eps", "affine"])
def test_batch_norms_of_one_stack_may_differ(norms, inverse):
    torch.manual_seed(0)
    pair = (FlowBatchNorm(4, eps=1.0), FlowBatchNorm(4, eps=0.01)) if norms == "eps" else (FlowBatchNorm(4), FlowBatchNorm(4, affine=False))
    layers = []
    for norm in pair:
        for p in norm.parameters():
            nn.init.normal_(p)
        layers += [MaskedAutoregressive(4, (8,)), norm]
    chain = Chain([*layers, MaskedAutoregressive(4, (8,))]).eval()
    x, want, total = torch.randn(6, 4), None, 0.0
    with torch.no_grad():
        want = x
        for layer in reversed(chain.layers) if inverse else chain.layers:
            want, logabsdet = layer.inverse(want) if inverse else layer(want)
            total = total + logabsdet
        for _ in range(4):  # by modules, and by what is kept
            got = chain.inverse(x) if inverse else chain(x)
            torch.testing.assert_close(got, (want, total), rtol=1e-4, atol=1e-5)


def test_one_row_of_several_sites_has_statistics():
    z, _ = FlowBatchNorm(3)(torch.randn(1, 3, 5, 5))
    torch.testing.assert_close(z.mean((0, 2, 3)), torch.zeros(3), rtol=0, atol=1e-5)


def test_a_tensor_of_scale_parameters_is_copied():
    given = torch.tensor([0.5, 1.0])
    layer = AffineCoupling(nn.Linear(2, 4), scale_parameter=given)
    with torch.no_grad():
        layer.scale_parameter.add_(1.0)
    assert given.tolist() == [0.5, 1.0]


def test_logistic_noise_is_finite_where_a_draw_is_zero(monkeypatch):
    monkeypatch.setattr(torch, "rand", torch.zeros)
    assert StandardLogistic().sample(2, 3, like=torch.empty(0)).isfinite().all()


def test_noise_and_densities_of_half_precision_are_made_in_float32():
    torch.manual_seed(0)
    z = StandardLogistic().sample(20_000, 1, like=torch.empty(0, dtype=torch.bfloat16))
    assert z.dtype == torch.bfloat16 and z.max() > 7 and z.isfinite().all()
    for base in (StandardNormal(), StandardLogistic()):
        rows = torch.randn(5, 300).bfloat16()
        torch.testing.assert_close(base.log_prob(rows), base.log_prob(rows.float()), rtol=0, atol=0)


def test_global_hooks_see_the_convolutions():
    network, seen = ConvNet(2, 8, 4), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        network(torch.randn(1, 2, 4, 4))
    finally:
        handle.remove()
    assert seen == [network.conv_in, network.conv_mid, network.conv_out, network]


def test_a_choice_is_of_its_thread():
    seen = []
    with backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(chosen()))
        thread.start()
        thread.join()
        assert chosen() == "reference"
    assert seen == [chosen()]


def test_cpp_chosen_by_hand_runs_couplings_in_one_kernel():
    from python_tests.layers.test_coupling_map import coupling

    with backend("cpp"):
        assert coupling("softclip", 6, "odd").as_map(torch.randn(2, 6), inverse=False) is not None


def test_answers_in_the_place_of_what_torch_has_no_more_are_the_careful_ones(monkeypatch):
    monkeypatch.delattr(forward_ad, "_current_level")
    assert _torch.forward_mode()
    monkeypatch.undo()
    monkeypatch.delattr(torch._C, "_is_any_autocast_enabled")
    monkeypatch.delattr(nn.modules.module, "_has_any_global_hook")
    monkeypatch.delattr(torch.utils._python_dispatch, "_get_current_dispatch_mode")
    monkeypatch.delattr(torch._C._functorch, "maybe_current_level")
    monkeypatch.delattr(torch._C, "_are_functorch_transforms_active")
    spec = importlib.util.spec_from_file_location("flowkernels._torch_of_another_version", _torch.__file__)
    other = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(other)
    assert other.any_autocast() and other.has_global_hooks() and other.transforms_active()
    assert other.dispatch_mode() is not None and other.transform_level() is not None


def test_the_largest_error_of_all_outputs_counts():
    right, wrong = torch.ones(3, dtype=torch.float64), torch.tensor([1.0, 1.0, 2.0])
    assert check._error([right, wrong], [right, right]) == check._error([wrong, right], [right, right]) == 1.0


def test_a_batch_norm_without_running_statistics_is_refused():
    with pytest.raises(ValueError, match="norm normalises by the batch it sees"):
        batch_norm_affine(nn.BatchNorm1d(3, track_running_stats=False).eval(), "norm")


def table(rows, context=None):
    return Table(torch.randn(rows, 2, dtype=torch.float64), context, "made")


def test_the_average_is_short_at_first():
    torch.manual_seed(0)
    model = DataModel(MAF(2, transforms=1, hidden_features=(8,)), Identity())
    trainer = Trainer(model, Split(table(20), table(20)), TrainingSettings(epochs=1, batch_size=20, averaging=0.99))
    before = [p.detach().clone() for p in model.flow.parameters()]
    trainer.run_epoch()
    for b, own, mean in zip(before, model.flow.parameters(), trainer.average.flow.parameters(), strict=True):
        torch.testing.assert_close(mean, torch.lerp(b, own, 1 - 2 / 11))


def test_another_context_is_other_data():
    split = Split(table(5, torch.zeros(5, 1, dtype=torch.float64)), table(3, torch.zeros(3, 1, dtype=torch.float64)))
    other = replace(split, train=replace(split.train, context=torch.ones(5, 1, dtype=torch.float64)))
    assert _fingerprint(split) != _fingerprint(other)


def test_classes_of_the_digits_are_taken_as_they_are():
    assert make_config("maf", {}, load_digits(), TrainingSettings())["context_map"] is None


def test_free_bits_are_of_the_batchs_mean(monkeypatch):
    from flowkernels.training import vae

    seen = []

    def elbo(self, x):
        kl = torch.tensor([0.0, 3.0]) + 0 * next(self.parameters()).sum()
        kl.register_hook(lambda g: seen.append(g.clone()))
        return torch.zeros(2) * kl, kl

    monkeypatch.setattr(vae.VAE, "elbo", elbo)
    settings = vae.VAESettings(latent=1, steps=1, hidden=(2,), iaf_hidden=(2,), context=1, epochs=1, batch_size=2, free_bits=1.0)
    rows = torch.zeros(2, 4)
    vae.train_vae(rows, rows, 3, settings)
    torch.testing.assert_close(seen[0], torch.tensor([0.5, 0.5]))  # the mean, 1.5, is above: both rows pay


def test_a_fixed_flow_has_a_reverse_kl():
    flow = MAF(2, transforms=1, hidden_features=(8,)).requires_grad_(False)
    assert reverse_kl(flow, lambda x: -x.square().sum(1), 10).isfinite()


def test_the_digits_are_split_at_random():
    split = load_digits()
    whole = torch.as_tensor(pytest.importorskip("sklearn.datasets").load_digits().data).to(torch.uint8)
    first = {tuple(row.tolist()) for row in whole[:1000]}
    share = sum(tuple(row.tolist()) in first for row in split.validation.x) / len(split.validation.x)
    assert 0.4 < share < 0.7  # 1000 of 1797 rows: without a shuffle, 0 or 1
