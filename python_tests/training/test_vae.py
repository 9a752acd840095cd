"""The VAE: its likelihood is a probability, its posterior's density is right, and the command line trains one."""

import json

import pytest
import torch

from flowkernels.cli import main
from flowkernels.training.vae import POSTERIORS, VAE, VAESettings, train_vae

SMALL = {"latent": 2, "steps": 2, "hidden": (16,), "iaf_hidden": (8,), "context": 4}


@pytest.fixture(params=POSTERIORS)
def vae(request):
    torch.manual_seed(0)
    return VAE(5, 17, VAESettings(posterior=request.param, **SMALL)).double()


def test_the_likelihood_of_a_pixel_sums_to_one(vae):
    z = torch.randn(3, 1, 2, dtype=torch.float64)
    each = torch.stack([vae.log_likelihood(torch.full((1, 1), k), z.expand(3, 1, 2)) for k in range(17)])  # one level for all pixels
    with torch.no_grad():
        mean, s = vae._decode(z)
        edges = torch.sigmoid((torch.arange(16) + 0.5 - mean[..., None]) / s[..., None])
    cdf = torch.cat([torch.zeros_like(edges[..., :1]), edges, torch.ones_like(edges[..., :1])], -1)
    torch.testing.assert_close(each.exp().squeeze(-1), cdf.diff(dim=-1).prod(-2).movedim(-1, 0).squeeze(-1), rtol=1e-7, atol=1e-300)


def test_the_posteriors_density_is_that_of_its_samples(vae):
    """Self-normalised over a grid: exp(log q) integrates to 1 where z is two-dimensional, by importance sampling from a wide Gaussian."""
    x = torch.randint(0, 17, (1, 5))
    z, log_q = vae.posterior(x, 20_000)
    kernel = torch.distributions.Normal(torch.tensor([0.2, -0.1], dtype=torch.float64), 0.5)
    ratio = (kernel.log_prob(z).sum(-1) - log_q).exp().squeeze(1)  # E_q[N / q] = 1
    assert abs(ratio.mean() - 1) < 5 * ratio.std() / 20_000**0.5 < 0.5


def test_more_importance_samples_do_not_lower_the_bound(vae):
    x = torch.randint(0, 17, (40, 5))
    torch.manual_seed(1)
    reconstruction, kl = vae.elbo(x)
    assert vae.log_prob(x, 200).mean() > vae.log_prob(x, 1).mean() - 0.1
    assert vae.log_prob(x, 200).mean() > (reconstruction - kl).mean()


@pytest.mark.parametrize("posterior", POSTERIORS)
def test_training_raises_the_bound(posterior):
    torch.manual_seed(0)
    x = (8 + 3 * torch.randn(200, 1) + torch.randn(200, 5)).round().clamp(0, 16)
    bounds = []
    vae = train_vae(x[:150], x[150:], 17, VAESettings(posterior=posterior, epochs=15, **SMALL), lambda epoch, nats: bounds.append(nats))
    assert len(bounds) == 3 and max(bounds) > bounds[0] and abs(vae.log_prob(x[150:], 20).mean().item() - max(bounds)) < 0.2
    assert vae.iaf is None or any(p.abs().sum() > 0 for p in vae.iaf.parameters())


def test_the_weights_of_the_best_bound_are_kept(monkeypatch):
    found = []

    def falling(vae, x, samples):
        found.append({name: p.detach().clone() for name, p in vae.named_parameters()})
        return torch.tensor([-1.0 * len(found)])

    monkeypatch.setattr(VAE, "log_prob", falling)
    x = torch.randint(0, 17, (20, 5))
    vae = train_vae(x, x, 17, VAESettings(posterior="diagonal", epochs=10, **SMALL))
    assert len(found) == 2 and all(torch.equal(p, found[0][name]) for name, p in vae.named_parameters())


def test_the_command_line(tmp_path, capsys):
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    out = tmp_path / "vae"
    command = ["train", "vae", "--out", str(out), "--epochs", "1", "--latent", "2", "--importance-samples", "2"]
    assert main(command) == 0
    assert {path.name for path in out.iterdir()} == {"weights.pt", "results.json", "samples.png", "reconstructions.png"}
    results = json.loads((out / "results.json").read_text())
    assert abs(results["elbo"] - (results["reconstruction"] - results["kl"])) < 1e-9 and results["settings"]["posterior"] == "iaf"
    assert main(command) == 2 and "--out must be a new or empty folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"posterior": "full"}, "posterior must be one of diagonal, iaf; got 'full'"),
        ({"latent": 0}, "latent must be at least 1; got 0"),
        ({"free_bits": -1.0}, "free_bits must be at least 0; got -1.0"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        VAESettings(**settings)
