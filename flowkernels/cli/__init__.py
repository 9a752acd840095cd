"""The command line: the four tasks of a flow, and what is installed. Each sub-command is one small file."""

import argparse
import os
import sys
from collections.abc import Sequence

import torch

from .. import __version__
from ..training import Interrupted, RunError
from . import check, demo, density, infer, info, interpolate, sample, train

COMMANDS = (train, sample, density, infer, interpolate, info, check, demo)
_EPILOG = """examples:
  python -m flowkernels train realnvp --data digits --out runs/digits
  python -m flowkernels sample runs/digits -n 40 --temperature 0.8 --out digits.png
  python -m flowkernels density runs/digits --data digits
  python -m flowkernels interpolate runs/digits --data digits
  python -m flowkernels train maf --data table.csv --out runs/table --hidden 128 128
"""


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = argparse.ArgumentParser(
        prog="python -m flowkernels",
        description="Normalizing flows on fused kernels: train one, sample it, score data, find the noise behind data.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"flowkernels {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add_parser(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        The exit code: 0; 2 after one line on standard error that says what was wrong; 130 after Ctrl-C; 141 where nobody reads the output.
    """
    options = build_parser().parse_args(arguments)
    try:
        options.run(options)
        if sys.stdout is not None:  # closed by whoever started this
            sys.stdout.flush()
    except Interrupted as interruption:
        return _say(f"interrupted: {interruption}", 130)
    except KeyboardInterrupt:
        return _say("interrupted", 130)
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains as it ends
        return 128 + 13  # as if by SIGPIPE
    except (ValueError, OSError, RunError, ModuleNotFoundError, NotImplementedError) as error:
        return _say(f"error: {_text(error)}", 2)
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        return _say(f"error: there is not enough memory for this: {_text(error)}", 2)
    return 0


def _is_out_of_memory(error: Exception) -> bool:
    told = ("can't allocate memory", "not enough memory", "Storage size calculation overflowed")  # by torch's allocator on a CPU
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(text in str(error) for text in told)


def _text(error: Exception) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    if isinstance(error, OSError) and error.filename and str(error.filename) not in text:
        text = f"{error.filename}: {text}"
    return " ".join(text.split())


def _say(text: str, code: int) -> int:
    print(f"flowkernels: {text}", file=sys.stderr)
    return code
