"""`check`: the kernels of this machine against plain PyTorch."""

import argparse


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "check",
        help="compare the kernels of this machine with plain PyTorch",
        description="Run every flow, both directions and their gradients, on the kernels that serve here and in plain PyTorch in float64, "
        "and print the largest relative differences. For hardware that nobody has run the tests on; it takes under a minute.",
    )
    parser.add_argument("--device", metavar="DEVICE", help="such as cuda (default: the CPU, and a GPU where there is one)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    import torch

    from .. import check
    from .common import check_device

    devices = [check_device(options.device)] if options.device else ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    wrong = []
    for device in devices:
        found = list(check.results(device))
        for dtype in check.dtypes(device):
            print(f"\n{device}, {dtype}: largest difference from plain PyTorch in float64 ({check.LARGEST_ERROR[dtype]:.0e} passes)")
            width = max(map(len, check.FLOWS))
            print("  ".join([" " * width, *check.TASKS]))
            for flow in check.FLOWS:
                errors = [check.worst(r.error for r in found if (r.flow, r.task, r.dtype) == (flow, task, dtype)) for task in check.TASKS]
                cells = (f"{error:>{len(task)}.1e}" for task, error in zip(check.TASKS, errors, strict=True))
                print("  ".join([f"{flow:{width}}", *cells]))
        wrong += [f"{r.flow}, {r.task}, batch {r.batch}, {r.dtype} on {device}: {r.error:.1e}" for r in found if not r.right]
    if wrong:
        raise ValueError(f"kernels differ from plain PyTorch: {'; '.join(wrong)}. FLOWKERNELS_BACKEND=reference goes without them")
