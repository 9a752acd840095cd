"""`sample RUN`: x = g(z), through the fused inverse."""

import argparse

import torch

from ..data import DIGITS, GreyLevels, one_hot, read_array, save_array
from ..data.digits import CLASSES
from ..training import DataModel
from .common import add_output, add_run, noise, open_run, output_path, positive_float, positive_int, seed


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "sample",
        help="draw samples x = g(z)",
        description="Draw samples from a trained flow and write them, one row each, in the units of the data.",
    )
    add_run(parser)
    parser.add_argument("-n", type=positive_int, required=True, help="how many; with --context, how many for each of its rows")
    parser.add_argument("--context", metavar="FILE", help="contexts to sample under; the samples of a row follow one another")
    parser.add_argument("--class", type=int, dest="digit", metavar="K", help="digits: the class 0..9 (default: all in turn)")
    parser.add_argument("--temperature", type=positive_float, default=1.0, help="scale of the base noise (default: 1)")
    parser.add_argument("--seed", type=seed, default=0, help="seed of the noise (default: 0)")
    add_output(parser, "samples.npy", ".npy or .csv, or .png for images")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    model, config = open_run(options)
    path = output_path(options, "samples.npy", (".npy", ".csv", ".png"))
    image_shape = config["data"]["image_shape"]
    if path.suffix == ".png" and image_shape is None:
        raise ValueError(f"--out must end in .npy or .csv for a run that was not trained on images; got {path}")
    n, context = _contexts(options, model, config["data"]["source"] == DIGITS)
    samples = model.sample(n, context, options.temperature, noise(options))
    if path.suffix == ".png":
        from ..plots import save_images

        save_images(path, samples.view(-1, *image_shape), columns=min(len(samples), CLASSES))
    else:
        save_array(path, samples.to(torch.uint8) if isinstance(model.preprocess, GreyLevels) else samples)
    bad = int((~torch.isfinite(samples)).any(1).sum())
    print(f"{len(samples)} samples of {samples.shape[1]} features in {path}" + (f"; {bad} of them are not finite" if bad else ""))


def _contexts(options: argparse.Namespace, model: DataModel, digits: bool) -> tuple[int, torch.Tensor | None]:
    """How many samples to draw for each row of which contexts."""
    if options.digit is not None:
        if not digits:
            raise ValueError(f"--class is for runs trained on the digits; got {options.digit}")
        if options.context is not None:
            raise ValueError("--class and --context must not both be given")
        if not 0 <= options.digit < CLASSES:
            raise ValueError(f"--class must be 0..{CLASSES - 1}; got {options.digit}")
        return options.n, one_hot(torch.tensor([options.digit]))
    if options.context is not None:
        context = torch.from_numpy(read_array(options.context, "context"))
        model.check_context(context, options.context)
        return options.n, context
    if digits:
        return 1, one_hot(torch.arange(options.n) % CLASSES)
    model.check_context(None, "the command line (--context)")
    return options.n, None
