"""`info`: what is installed and which implementation serves each op."""

import argparse


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("info", help="versions, and which kernels run where, and why not", description=__doc__)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    from ..info import report

    print(report())
