"""The limits of the machine that the kernels are held to: copy and matmul in each precision and, on a GPU, what one launch, one block
barrier and one multiprocessor's stream of weights cost. They decide panels and rows per block (ops/autoregressive/CUDA.md)."""

import ctypes
import functools
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch

from .case import Call, Case, Competitor, Unavailable
from .rows import Row
from .table import duration

SOURCE = Path(__file__).with_name("limits.cu")
WEIGHTS = 4 * 2**20  # bytes, about those of an autoregressive layer of D=784, H=1024x2: they stay in the L2 cache
IN_A_GRAPH = 100


def cases(quick: bool, device: torch.device) -> list[Case]:
    """All cases; `quick` has fewer turns."""
    seconds = 0.05 if quick else 0.5
    found = [*_matmuls(device), *_copies(device)]
    if device.type == "cuda":
        found += [*_launches(device), *_barriers(device), *_streams(device)]
    return [Case(name, competitors, macs, size, seconds=seconds, device=device) for name, competitors, macs, size in found]


def summary(rows: Sequence[Row]) -> str:
    """Rates, which times do not show."""
    lines = []
    for row in rows:
        if row["wrong"] or row.get("seconds") is None:
            continue
        rates = [f"{row[key] / row['seconds'] / 1e9:,.1f} {unit}" for key, unit in (("macs", "GMAC/s"), ("bytes", "GB/s")) if row[key]]
        lines.append(f"  {row['case']}, {row['competitor']}: {', '.join(rates) or duration(row['seconds'])}")
    return "\n".join(["limits", *lines])


Found = tuple[str, list[Competitor], float, float]  # name, competitors, multiply-adds, bytes


def _competitor(name: str, build: Callable[[], Call]) -> Competitor:
    return Competitor(name, build, package="torch")


def _matmuls(device: torch.device) -> Iterator[Found]:
    cuda = device.type == "cuda"
    size = 4096 if cuda else 1024
    names = ("float32", "tf32", "bfloat16", "float16", "float64") if cuda else ("float32", "float64")

    def build(name: str) -> Call:
        dtype = torch.float32 if name == "tf32" else getattr(torch, name)
        a, b = (torch.randn(size, size, generator=torch.Generator().manual_seed(s)).to(device, dtype) for s in (0, 1))
        out, settings = torch.empty_like(a), torch.backends.cuda.matmul

        def run() -> None:
            before, settings.fp32_precision = settings.fp32_precision, "tf32" if name == "tf32" else "ieee"
            try:
                torch.matmul(a, b, out=out)
            finally:
                settings.fp32_precision = before

        return Call(run)

    yield f"matmul {size}^3", [_competitor(name, partial(build, name)) for name in names], float(size**3), 0.0


def _copies(device: torch.device) -> Iterator[Found]:
    for megabytes in (8, 400):

        def build(count: int = megabytes * 125_000) -> Call:
            source = torch.ones(count, device=device)
            return Call(partial(torch.empty_like(source).copy_, source))

        yield f"copy, {megabytes} MB read and written", [_competitor("copy", build)], 0.0, megabytes * 1e6


def _launches(device: torch.device) -> Iterator[Found]:
    def eager() -> Call:
        number = torch.zeros(1, device=device)
        return Call(partial(number.add_, 1.0))

    def graph() -> Call:
        number, captured = torch.zeros(1, device=device), torch.cuda.CUDAGraph()
        number.add_(1.0)
        torch.cuda.synchronize()
        with torch.cuda.graph(captured):
            for _ in range(IN_A_GRAPH):
                number.add_(1.0)

        def run() -> float:
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            captured.replay()
            stop.record()
            stop.synchronize()
            return start.elapsed_time(stop) * 1e-3 / IN_A_GRAPH

        return Call(run, self_timed=True)

    yield "one launch", [_competitor("an eager op", eager), _competitor("in a CUDA graph", graph)], 0.0, 0.0


def _barriers(device: torch.device) -> Iterator[Found]:
    def build(threads: int) -> Call:
        out = torch.zeros(1, dtype=torch.int32, device=device)
        return _self_timed(_library().fk_barrier_chain, threads, 10_000, out.data_ptr(), keep=(out,))

    yield "one block barrier of a chain", [_competitor(f"{n} threads", partial(build, n)) for n in (64, 128, 256, 384, 512)], 0.0, 0.0


def _streams(device: torch.device) -> Iterator[Found]:
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count

    def build(blocks: int, width: int) -> Call:
        weights = torch.zeros(WEIGHTS, dtype=torch.uint8, device=device)
        out = torch.zeros(blocks, dtype=torch.int32, device=device)
        return _self_timed(_library().fk_stream, blocks, 128, width, weights.data_ptr(), WEIGHTS, out.data_ptr(), keep=(weights, out))

    for blocks, who in ((1, "one multiprocessor"), (multiprocessors, f"each of {multiprocessors} multiprocessors at once")):
        competitors = [_competitor(f"{width} bytes a copy", partial(build, blocks, width)) for width in (4, 16)]
        yield f"weights streamed into shared memory by {who}", competitors, 0.0, float(WEIGHTS)


def _self_timed(function: Callable[..., float], *arguments: int, keep: Iterable[object]) -> Call:
    def run(_keep=keep) -> float:
        seconds = function(*arguments)
        if seconds < 0:
            raise RuntimeError(f"{function.__name__} failed with CUDA error {-seconds:.0f}")
        return seconds

    return Call(run, self_timed=True)


@functools.cache
def _library() -> ctypes.CDLL:
    folder = tempfile.TemporaryDirectory()
    path = Path(folder.name, "limits.so")
    capability = "".join(map(str, torch.cuda.get_device_capability()))
    command = ["nvcc", "-O3", f"-arch=sm_{capability}", "-shared", "-Xcompiler=-fPIC", str(SOURCE), "-o", str(path)]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise Unavailable("nvcc was not found") from error
    if done.returncode:
        raise RuntimeError(f"{SOURCE.name} does not compile: {done.stderr}")
    library = ctypes.CDLL(str(path))
    folder.cleanup()  # what is loaded stays loaded
    pointer, long = ctypes.c_void_p, ctypes.c_int64
    library.fk_barrier_chain.argtypes = [ctypes.c_int, ctypes.c_int, pointer]
    library.fk_stream.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int, pointer, long, pointer]
    for function in (library.fk_barrier_chain, library.fk_stream):
        function.restype = ctypes.c_double
    return library
