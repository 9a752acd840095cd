"""`python -m flowkernels demo`: a class-conditional MAF on real handwritten digits, from training to pictures."""

import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import _extension, backend
from .baseline import ClassGaussian, fit_gaussian
from .data import Split, atomic_write, load_digits, one_hot
from .data.digits import CLASSES, SIDE
from .flows import Flow
from .plots import require_matplotlib, save_comparison, save_history
from .training import FLOWS, DataModel, Trainer, TrainingSettings, make_config, train_run
from .training.loop import VALIDATION_DRAWS
from .training.progress import TerminalProgress

FLOW, TRAINING = FLOWS["maf"].choose(digits=True)
QUICK_FLOW = FLOW | {"transforms": 3, "hidden": [128]}
QUICK_TRAINING = TrainingSettings(epochs=25, learning_rate=1.5e-2, weight_decay=1.0)
TEST_DRAWS = 10  # dequantisations of each test image
TIMED_SAMPLES = 1000


def run_demo(folder: str | Path, *, quick: bool = False) -> dict[str, Any]:
    """Train on the digits, compare with a Gaussian, draw pictures, time sampling; write all into a folder.

    Args:
        folder: where the run and the pictures go; a second call goes on with the training there.
        quick: a smaller flow and fewer epochs, to see that everything works.

    Returns:
        The figures that are printed, which are also kept in results.json.

    Raises:
        ModuleNotFoundError: scikit-learn or matplotlib is missing; the message names the extra.
        RunError, OSError: as `training.train_run`.
    """
    require_matplotlib()
    split = load_digits()
    out = Path(folder) / "quick" if quick else Path(folder)
    print(
        f"digits: {len(split.train)} images to train on, {len(split.validation)} held out, {len(split.test)} to test; 8 x 8, 17 grey levels"
    )
    flow_settings, training = (QUICK_FLOW, QUICK_TRAINING) if quick else (FLOW, TRAINING)
    progress, began = TerminalProgress(), time.perf_counter()
    with _one_thread():
        trainer = train_run(out / "run", make_config("maf", flow_settings, split, training), split, progress=progress)
    seconds = time.perf_counter() - began
    sizes = f"{flow_settings['transforms']} transforms, hidden {flow_settings['hidden']}"
    now = f"{progress.epochs} of them now, in {seconds:.0f} s" if progress.epochs else "all before"
    print(f"MAF of {sizes}: {trainer.epoch} epochs, {now}; the best is epoch {trainer.best_epoch}")
    gaussian = fit_gaussian(trainer.model.preprocess, split.train, split.validation, VALIDATION_DRAWS)
    results = {"quick": quick, "epochs": trainer.epoch, "best_epoch": trainer.best_epoch}
    results |= {"epochs_now": progress.epochs, "seconds_now": seconds}
    results["test"] = compare(trainer.model, gaussian, split)
    draw(out, trainer, gaussian, split)
    with _one_thread():
        results["sampling_seconds"] = time_sampling(trainer.model.flow, flow_settings)
    atomic_write(out / "results.json", (json.dumps(results, indent=2) + "\n").encode())
    print(f"\nin {out}: samples.png, training.png, results.json; the run itself in {out / 'run'}")
    return results


@contextmanager
def _one_thread() -> Iterator[None]:
    """One thread, so that a busy machine distorts neither training nor times, and any number of cores gives the same bits.

    A network this small gains little from a second thread, and waits for it at every step where another program has the core.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def compare(model: DataModel, gaussian: ClassGaussian, split: Split) -> dict[str, dict[str, float]]:
    """Print the test log-likelihoods of the flow and the Gaussian, on the same dequantised images.

    log p is the density of x + U per grey level, the preprocessing's log-determinant counted: a lower bound of log P(x).
    """
    noise = lambda: torch.Generator().manual_seed(2)
    scores = {
        "MAF": model.log_prob(split.test, noise(), TEST_DRAWS),
        "Gaussian": gaussian.log_prob(split.test, noise(), TEST_DRAWS),
    }
    print(f"\ntest log-likelihood of {len(split.test)} images, {TEST_DRAWS} dequantisations each, per grey level")
    print(f"{'':36}{'nats per image':>16}{'standard error':>16}{'bits per dim':>14}")
    figures = {}
    names = {"MAF": "MAF, class-conditional", "Gaussian": f"Gaussian, {gaussian.name}"}
    for key, log_prob in scores.items():
        mean, error = log_prob.mean().item(), log_prob.std().item() / len(log_prob) ** 0.5
        figures[key] = {"nats": mean, "standard_error": error, "bits_per_dim": model.bits_per_dim(mean)}
        print(f"{names[key]:36}{mean:16.2f}{error:16.2f}{figures[key]['bits_per_dim']:14.4f}")
    gain = scores["MAF"] - scores["Gaussian"]
    mean, error = gain.mean().item(), gain.std().item() / len(gain) ** 0.5
    figures["difference"] = {"nats": mean, "standard_error": error}
    print(f"{'difference, image by image':36}{mean:16.2f}{error:16.2f}")
    return figures


def draw(out: Path, trainer: Trainer, gaussian: ClassGaussian, split: Split, each: int = 8) -> None:
    """Save samples beside real digits, a row for each class, and the training curve."""
    contexts = one_hot(torch.arange(CLASSES))
    samples = trainer.model.sample(each, contexts, generator=torch.Generator().manual_seed(0))
    labels = split.test.context.argmax(1)
    real = torch.cat([split.test.x[labels == k][:each] for k in range(CLASSES)])
    save_comparison(out / "samples.png", real.view(-1, 1, SIDE, SIDE), samples.view(-1, 1, SIDE, SIDE), columns=each)
    held_out = gaussian.log_prob(split.validation, torch.Generator().manual_seed(0), VALIDATION_DRAWS).mean().item()
    save_history(out / "training.png", trainer.history, trainer.best_epoch, held_out, trainer.model.flow.features)


def time_sampling(flow: Flow, settings: dict[str, Any], repeats: int = 5) -> dict[str, float]:
    """Print how long the inverse of the flow takes: fused, as the D-pass loop, and in nflows with the same sizes. Medians, in seconds."""
    context = one_hot(torch.arange(TIMED_SAMPLES) % CLASSES).float()
    z = torch.randn(TIMED_SAMPLES, flow.features, generator=torch.Generator().manual_seed(0))
    fused = _extension.has_kernel("autoregressive", "CPU")

    def loop() -> Tensor:
        with backend("reference"):
            return flow.inverse(z, context)[0]

    runs: dict[str, Callable[[], Tensor]] = {"fused inverse": lambda: flow.inverse(z, context)[0]} if fused else {}
    runs["D-pass loop"] = loop
    peer = _nflows_maf(flow.features, settings)
    if peer is not None:
        runs["nflows"] = lambda: peer.inverse(z, context)[0]
    print(f"\nsampling {TIMED_SAMPLES} images on {torch.get_num_threads()} thread")
    seconds = {}
    with torch.no_grad():
        for name, run in runs.items():
            seconds[name] = _median_seconds(run, repeats)
            ratio = f"{seconds[name] / seconds['fused inverse']:10.1f} times the fused inverse" if fused and len(seconds) > 1 else ""
            print(f"{name:16}{1000 * seconds[name]:12.1f} ms{ratio}")
        if fused:
            x = flow.inverse(z, context)[0]
            print(f"round trip: f(g(z)) differs from z by at most {(flow(x, context)[0] - z).abs().max().item():.1e}")
    if not fused:
        print(f"the fused inverse is not here: {_extension.status().reason}")
    if peer is None:
        print("nflows is not installed, so it is not timed")
    return seconds


def _median_seconds(run: Callable[[], Tensor], repeats: int, budget: float = 5.0) -> float:
    """Median over at most so many runs after a first one, which counts only if it is slow enough to use the budget up."""
    times: list[float] = []
    while len(times) <= repeats and sum(times) < budget:
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:] or times)


def _nflows_maf(features: int, settings: dict[str, Any]) -> torch.nn.Module | None:
    """nflows' flow of the same sizes, in evaluation mode; None where nflows is not installed."""
    try:
        from nflows.transforms import CompositeTransform, MaskedAffineAutoregressiveTransform, ReversePermutation
    except ModuleNotFoundError:
        return None
    width, *rest = settings["hidden"]
    layers: list[torch.nn.Module] = []
    for _ in range(settings["transforms"]):
        layers.append(
            MaskedAffineAutoregressiveTransform(
                features, width, context_features=CLASSES, num_blocks=len(rest), use_residual_blocks=False, activation=torch.tanh
            )
        )
        layers.append(ReversePermutation(features))
    return CompositeTransform(layers).eval()
