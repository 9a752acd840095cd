"""`infer RUN`: z = f(x)."""

import argparse

from ..data import save_array
from .common import add_data, add_output, add_run, counted, load_rows, noise, open_run, output_path


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "infer",
        help="find the noise behind data: z = f(x)",
        description="Write z = f(x) of every row. Where the flow fits the data, z is the noise that the run was trained for: standard "
        "normal, or for NICE standard logistic unless --base was another.",
    )
    add_run(parser)
    add_data(parser)
    add_output(parser, "z.npy")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    model, config = open_run(options)
    path = output_path(options, "z.npy")
    table = load_rows(options, model, config)
    z = model.encode(table, noise(options))
    save_array(path, z)
    print(f"z of {counted(len(z), 'row')}, {counted(z.shape[1], 'feature')}, in {path}")
    spread = z.std(correction=0).item()
    print(f"mean {z.mean().item():.4f}, standard deviation {spread:.4f}; 0 and {model.flow.base.std:.4g} where the flow fits the data")
