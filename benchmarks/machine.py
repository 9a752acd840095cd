"""The machine: who it is, what it can do at best, and an allocator that does not get in anybody's way."""

import ctypes
import os
import platform
import subprocess
from datetime import UTC, datetime
from functools import partial
from importlib import metadata
from pathlib import Path

import torch

from .case import Call, Competitor
from .timing import measure

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
MATMUL_SIZE = 2048
COPY_BYTES = 400_000_000


def raise_malloc_thresholds() -> str:
    """Let glibc keep freed memory, whatever its size, and say what was done.

    By default every large temporary is mapped and unmapped again, and its page faults can double the time of a library that makes
    many of them. This is done for every competitor, before anything is timed.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return "malloc: thresholds left as they are (no mallopt here)"
    if mallopt(M_MMAP_THRESHOLD, 1 << 30) and mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1):
        return "malloc: mmap and trim thresholds raised to 1 and 2 GB, for everybody"
    return "malloc: thresholds left as they are (mallopt refused)"


def matmul(device: torch.device) -> Competitor:
    """The limit of arithmetic: a square float32 matmul."""

    def build() -> Call:
        a, b = (torch.randn(MATMUL_SIZE, MATMUL_SIZE, device=device) for _ in range(2))
        return Call(partial(torch.matmul, a, b, out=torch.empty_like(a)))

    return Competitor(f"matmul {MATMUL_SIZE}^3", build)


def copy(device: torch.device) -> Competitor:
    """The limit of memory: one pass that reads half of the bytes and writes the other half."""

    def build() -> Call:
        source = torch.ones(COPY_BYTES // 8, device=device)
        return Call(partial(torch.add, source, 1.0, out=torch.empty_like(source)))

    return Competitor("copy-like pass", build)


def measure_limits(device: torch.device, seconds: float = 1.0) -> dict[str, float]:
    """Multiply-adds and bytes a second, in units of 1e9."""
    by_matmul, by_copy = measure([matmul(device).build(), copy(device).build()], seconds=seconds, most_rounds=15, device=device)
    return {"matmul_gmac_s": MATMUL_SIZE**3 / by_matmul.median / 1e9, "copy_gb_s": COPY_BYTES / by_copy.median / 1e9}


LOAD = "FLOWKERNELS_LOAD_BEFORE"  # for a process of several: what the machine's load was before the first


def load() -> float:
    """The machine's load over the last minute."""
    return round(os.getloadavg()[0], 2)


def describe(device: torch.device) -> dict[str, str | float]:
    """What every row records: device, how busy others kept it, versions, commit, date."""
    on_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else "cpu",
        "cpu": _cpu_model(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "load_before": float(os.environ.get(LOAD, load())),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "flowkernels": version("flowkernels") or "",
        **({"cuda": torch.version.cuda or "", "triton": version("triton") or ""} if on_gpu else {}),
        "commit": _commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def version(package: str) -> str | None:
    """Version of an installed distribution; a module on the path counts."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        try:
            return __import__(package).__version__
        except (ImportError, AttributeError):
            return None


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def _commit() -> str:
    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
