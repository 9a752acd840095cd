"""`train vae`: a variational autoencoder of the digits, its posterior a diagonal Gaussian or an IAF."""

import argparse
import json
import math
from dataclasses import asdict, fields
from pathlib import Path

import torch

from ..data import DIGITS, atomic_write, load_digits
from ..data.digits import LEVELS, SIDE
from ..plots import require_matplotlib, save_comparison, save_images
from ..training import RunError
from ..training.vae import POSTERIORS, VAESettings, train_vae
from .common import positive_float, positive_int, seed

_DEFAULTS = {field.name: field.default for field in fields(VAESettings)}
_OPTIONS = (
    ("latent", positive_int, "dimensions of z"),
    ("steps", positive_int, "gated IAF steps of the posterior"),
    ("free_bits", float, "nats of KL that are free"),
    ("epochs", positive_int, "passes over the training images"),
    ("learning_rate", positive_float, "of AdamW, falling to 0"),
    ("seed", seed, "of the weights, the batches and the noise"),
)


def add_parser(flows: argparse._SubParsersAction) -> None:
    parser = flows.add_parser(
        "vae",
        help="variational autoencoder of the digits with a diagonal or an IAF posterior (Kingma et al. 2016)",
        description="Train a variational autoencoder on the digits and draw samples and reconstructions. Its log p(x) of the test images "
        "is importance-weighted. It takes under a minute, so there is nothing to go on from; `sample` and `density` are for flows.",
    )
    parser.add_argument("--data", choices=(DIGITS,), default=DIGITS, help="the digits are all it is for")
    parser.add_argument("--posterior", choices=POSTERIORS, default="iaf", help="q(z | x) (default: iaf)")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder, new or empty: weights.pt, results.json, two pictures")
    for name, kind, text in _OPTIONS:
        flag, metavar = "--" + name.replace("_", "-"), "N" if kind in (positive_int, seed) else "X"
        parser.add_argument(flag, type=kind, default=_DEFAULTS[name], metavar=metavar, help=f"{text} (default: {_DEFAULTS[name]})")
    parser.add_argument("--importance-samples", type=positive_int, default=1000, metavar="N", help="of log p(x) (default: 1000)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    require_matplotlib()
    settings = VAESettings(posterior=options.posterior, **{name: getattr(options, name) for name, *_ in _OPTIONS})
    out = Path(options.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RunError(f"--out must be a new or empty folder; got {out}")
    out.mkdir(parents=True, exist_ok=True)
    split = load_digits()
    print(f"vae, {settings.posterior} posterior: {len(split.train)} images to train on, {len(split.validation)} held out")
    say = lambda epoch, nats: None if epoch % 50 else print(f"epoch {epoch}: held-out log p(x) {nats:.2f} nats or more", flush=True)
    vae = train_vae(split.train.x, split.validation.x, LEVELS, settings, say)
    torch.manual_seed(0)
    x = split.test.x
    log_prob = vae.log_prob(x, options.importance_samples).double()
    with torch.no_grad():
        reconstruction, kl = (part.double().mean().item() for part in vae.elbo(x))
    nats = log_prob.mean().item()
    results = {
        "log_prob": nats,
        "standard_error": log_prob.std().item() / len(x) ** 0.5,
        "bits_per_dim": -nats / (x.shape[1] * math.log(2)),
        "elbo": reconstruction - kl,
        "reconstruction": reconstruction,
        "kl": kl,
        "importance_samples": options.importance_samples,
        "settings": asdict(settings),
    }
    shape = (1, SIDE, SIDE)
    shown = x[:: len(x) // 80][:80]
    save_images(out / "samples.png", vae.sample(100, torch.Generator().manual_seed(0)).view(-1, *shape), 10, levels=LEVELS, ink=True)
    titles = ("real digits (test images)", "reconstructions")
    save_comparison(out / "reconstructions.png", shown.view(-1, *shape), vae.reconstruct(shown).view(-1, *shape), 8, titles)
    torch.save(vae.state_dict(), out / "weights.pt")
    atomic_write(out / "results.json", (json.dumps(results, indent=2) + "\n").encode())
    print(
        f"test images: log P(x) {nats:.2f} nats ({results['bits_per_dim']:.4f} bits per dimension) by {options.importance_samples} samples"
    )
    print(f"ELBO {results['elbo']:.2f}: reconstruction {reconstruction:.2f}, KL {kl:.2f}")
    print(f"kept in {out}: weights.pt, results.json, samples.png, reconstructions.png")
