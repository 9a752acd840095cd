"""`demo`: the whole tour on the bundled handwritten digits."""

import argparse


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "demo",
        help="train a MAF on real handwritten digits, score, sample, time",
        description="Train a class-conditional MAF on scikit-learn's handwritten digits, compare its test likelihood with a Gaussian's, "
        "draw pictures, and time sampling. Ctrl-C keeps what is done; the same command again goes on.",
    )
    parser.add_argument("--quick", action="store_true", help="a smaller flow and fewer epochs, for a test of the installation")
    parser.add_argument("--out", default="demo", metavar="DIR", help="folder of the run and the pictures (default: demo)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    from ..demo import run_demo

    run_demo(options.out, quick=options.quick)
