"""`sample RUN`: x = g(z), through the inverse."""

import argparse
from typing import Any

import torch

from ..data import DIGITS, one_hot, read_array
from ..data.digits import CLASSES
from ..training import DataModel
from .common import (
    add_output,
    add_run,
    check_columns,
    counted,
    image_shape,
    noise,
    open_run,
    output_path,
    positive_float,
    positive_int,
    save_images_or_rows,
    seed,
)


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "sample",
        help="draw samples x = g(z)",
        description="Draw samples from a trained flow and write them in the units of the data: one row each, or images as a .png or an "
        "array [n, C, H, W].",
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
    if path.suffix == ".png" and image_shape(config) is None:
        raise ValueError(f"--out must end in .npy or .csv for a run that was not trained on images; got {path}")
    n, context = _contexts(options, model, config["data"])
    samples = model.sample(n, context, options.temperature, noise(options))
    save_images_or_rows(path, samples, model, config, columns=min(len(samples), CLASSES))
    bad = int((~torch.isfinite(samples)).any(1).sum())
    print(
        f"{counted(len(samples), 'sample')} of {counted(samples.shape[1], 'feature')} in {path}"
        + (f"; {bad} of them are not finite" if bad else "")
    )


def _contexts(options: argparse.Namespace, model: DataModel, trained_on: dict[str, Any]) -> tuple[int, torch.Tensor | None]:
    """How many samples to draw for each row of which contexts."""
    digits = trained_on["source"] == DIGITS and model.flow.context_features > 0
    if options.digit is not None:
        if not digits:
            raise ValueError(f"--class is for runs trained on the digits with their classes; got {options.digit}")
        if options.context is not None:
            raise ValueError("--class and --context must not both be given")
        if not 0 <= options.digit < CLASSES:
            raise ValueError(f"--class must be 0..{CLASSES - 1}; got {options.digit}")
        return options.n, one_hot(torch.tensor([options.digit]))
    if options.context is not None:
        rows, columns = read_array(options.context, "context")
        context = torch.from_numpy(rows)
        model.check_context(context, options.context)
        check_columns(f"context file {options.context}", columns, trained_on.get("context_columns"))
        return options.n, context
    if digits:
        return 1, one_hot(torch.arange(options.n) % CLASSES)
    model.check_context(None, "the command line (--context)")
    return options.n, None
