"""`density RUN`: log p(x)."""

import argparse

from ..data import save_array
from .common import add_data, add_output, add_run, counted, load_rows, noise, open_run, output_path, positive_int


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "density",
        help="score data: log p(x)",
        description="Write log p(x) of every row, in nats, with the preprocessing's log-determinant counted. Grey levels are scored as "
        "log p(x + U) with uniform noise U, per grey level: its mean is a lower bound of log P(x).",
    )
    add_run(parser)
    add_data(parser)
    parser.add_argument("--draws", type=positive_int, default=1, help="noise draws to average over, for grey levels (default: 1)")
    add_output(parser, "log_prob.npy")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    model, config = open_run(options)
    path = output_path(options, "log_prob.npy")
    table = load_rows(options, model, config)
    log_prob = model.log_prob(table, noise(options), options.draws)
    save_array(path, log_prob, header=["log_prob"])
    mean = log_prob.mean().item()
    bits = model.bits_per_dim(mean)
    print(f"log p(x) of {counted(len(log_prob), 'row')} in {path}")
    spread = f", standard error {log_prob.std().item() / len(log_prob) ** 0.5:.3f}" if len(log_prob) > 1 else ""
    print(f"mean {mean:.4f} nats{spread}" + ("" if bits is None else f"; {bits:.4f} bits per dimension"))
