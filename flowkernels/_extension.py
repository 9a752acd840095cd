"""Finds and loads the compiled libraries, and says why when it cannot.

The libraries hold no Python: `torch.ops.load_library` loads them, and their ops appear in `torch.ops.flowkernels`. Nothing here
fails where they are missing: every op then runs its reference.
"""

import functools
import json
import os
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from . import _torch

_FOLDER = Path(__file__).parent
_BUILD = "pip install --no-build-isolation ."
_REBUILD = "pip install --no-build-isolation --no-deps --force-reinstall ."


class ExtensionError(RuntimeError):
    """A compiled library that cannot serve; the message says why and what to do."""


class NotBuiltError(ExtensionError):
    """The library was left out when the package was installed."""


class CannotLoadError(ExtensionError):
    """The library is there, but this process cannot load it."""


@dataclass(frozen=True)
class Status:
    """What was loaded, and for each library that was not, why."""

    cpu_library: Path | None
    cuda_library: Path | None
    cpu_error: ExtensionError | None
    cuda_error: ExtensionError | None

    @property
    def reason(self) -> str:
        """Why libraries are missing, in one line; empty where both are loaded."""
        return "; ".join(str(error) for error in (self.cpu_error, self.cuda_error) if error is not None)

    def why_not(self, op: str, device: str) -> str | None:
        """Why flowkernels::`op` has no compiled kernel on "CPU" or "CUDA"; None where it has one."""
        if has_kernel(op, device):
            return None
        if device == "CUDA" and op in CPU_ALONE:
            return f"{op} has a kernel for CPU alone"
        error = {"CPU": self.cpu_error, "CUDA": self.cuda_error}[device]
        if error is not None:
            return str(error)
        if device == "CPU" and build_info().get("instruction set of this CPU") == "none":
            return "this CPU has none of AVX2+FMA, AVX-512 and NEON"
        return f"{op} has no compiled {device} kernel in this version"


# what no build has a CUDA kernel for, neither compiled nor in Triton; there these ops are composed of others
CPU_ALONE = ("channel_normalize", "conv_net", "glow_steps", "lu_fold")


@functools.cache
def load() -> Status:
    """Load what was built, once. Never raises; the status says what could not be loaded and why."""
    record = build_record()
    cpu, cpu_error = _load("cpu", record)
    cuda, cuda_error = _load("cuda", record)
    return Status(cpu, cuda, cpu_error, cuda_error)


def status() -> Status:
    """What `import flowkernels` loaded."""
    return load()


def has_kernel(op: str, device: str) -> bool:
    """Whether flowkernels::`op` has a kernel of its own on "CPU" or "CUDA", the reference not counted."""
    return _torch.has_kernel(op, device)


def cuda_ops() -> list[str]:
    """The ops with a CUDA kernel and a reference for all other devices."""
    names = (name.removeprefix("flowkernels::") for name in _torch.op_names() if name.startswith("flowkernels::"))
    return [op for op in names if has_kernel(op, "CUDA") and has_kernel(op, "CompositeExplicitAutograd")]


def find_unserved_gpus() -> dict[int, str]:
    """GPUs that the CUDA library holds no code for, and why, from now on in `unserved_gpus`. Asks CUDA, which it starts."""
    archs = build_record().get("arch_list", "")
    for index in range(torch.cuda.device_count() if archs and status().cuda_library else 0):
        major, minor = torch.cuda.get_device_capability(index)
        if not _runs_on(archs, (major, minor)):
            again = f"build it again: TORCH_CUDA_ARCH_LIST={major}.{minor} {_REBUILD}" if major >= 8 else "it needs 8.0 or newer"
            unserved_gpus[index] = (
                f"the CUDA library was built for {archs} and cuda:{index}, {torch.cuda.get_device_name(index)}, is {major}.{minor}; {again}"
            )
    return unserved_gpus


unserved_gpus: dict[int, str] = {}


def _runs_on(archs: str, capability: tuple[int, int]) -> bool:
    """Whether code for TORCH_CUDA_ARCH_LIST runs: machine code within its major version, PTX on all that came later."""
    for arch in re.split(r"[;\s]+", archs.strip()):
        found = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", arch)
        if found is None:
            return True  # a name, such as Hopper: left to the driver
        built = (int(found[1]), int(found[2]))
        later = built <= capability and found[3] != "a" and (found[4] or built[0] == capability[0])
        if later or built == capability:
            return True
    return False


def build_record() -> dict[str, Any]:
    """What the build wrote down: the versions it saw, and why a library was left out. Empty where nothing was built."""
    try:
        return json.loads((_FOLDER / "_build.json").read_text())
    except (OSError, ValueError):
        return {}


def check_instruction_set() -> None:
    """Say at once what is wrong with FLOWKERNELS_ISA: what a kernel throws in one of its threads does not reach anybody."""
    used = build_info().get("instruction set used", "") if os.environ.get("FLOWKERNELS_ISA") else ""
    if used.startswith("FLOWKERNELS_ISA"):
        warnings.warn(f"flowkernels: {used}. Until then every compiled op fails", stacklevel=3)


def build_info() -> dict[str, str]:
    """What the CPU library says about itself; empty where it is not loaded."""
    if status().cpu_library is None:
        return {}
    return dict(line.split(": ", 1) for line in torch.ops.flowkernels._build_info().splitlines())


def _load(name: str, record: dict[str, Any]) -> tuple[Path | None, ExtensionError | None]:
    path = _FOLDER / f"_C_{name}.so"
    title = f"the {name.upper()} library"
    if not path.exists():
        left_out = record.get(name)
        if left_out is None:
            return None, NotBuiltError(f"{title} was not built: {_BUILD}")
        return None, NotBuiltError(f"{title} was not built: {left_out}")
    if _torch_version() < (2, 11):
        return None, CannotLoadError(f"{title} needs torch 2.11 or newer; this is {torch.__version__}")
    try:
        torch.ops.load_library(str(path))
    except (OSError, RuntimeError) as error:
        # torch's own message names the file alone; the loader's is its cause
        detail = str(error.__cause__ or error).strip().splitlines()[0]
        return None, CannotLoadError(f"{title} does not load: {detail} ({_versions(record)}); build it again: {_REBUILD}")
    return path, None


def _versions(record: dict[str, Any]) -> str:
    built = f"built with torch {record.get('torch', 'unknown')}, CUDA {record.get('cuda_version')}"
    return f"{built}; this is torch {torch.__version__}, CUDA {torch.version.cuda}"


def _torch_version() -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
