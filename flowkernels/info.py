"""What `python -m flowkernels info` prints: versions, what was built with what, and which implementation serves each op."""

import os
import platform
from importlib import metadata

import torch

from . import _extension, _triton
from ._version import __version__

OPS = (
    "autoregressive",
    "autoregressive_stack",
    "channel_affine",
    "channel_normalize",
    "conv_net",
    "coupling",
    "glow_step",
    "glow_steps",
    "lu_fold",
    "masked_linear",
    "slogdet",
    "slogdet_inverse",
)
_COMPILED = {"CPU": "cpp", "CUDA": "cuda"}


def report() -> str:
    """The state of this installation, as text: it begins every bug report."""
    return "\n".join([*_pairs(_versions()), "", *_pairs(_libraries()), "", *_pairs(_machine()), "", *_table(_implementations())])


def _versions() -> list[tuple[str, str]]:
    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
    return [
        ("flowkernels", __version__),
        ("python", platform.python_version()),
        ("torch", f"{torch.__version__} ({cuda})"),
        ("triton", _installed("triton")),
        ("numpy", _installed("numpy")),
        ("system", f"{platform.system()} {platform.machine()}"),
    ]


def _libraries() -> list[tuple[str, str]]:
    status, record = _extension.status(), _extension.build_record()
    rows = [("CPU library", str(status.cpu_library or status.cpu_error))]
    rows += [(f"  {name}", value) for name, value in _extension.build_info().items() if name in ("compiler", "torch stable ABI")]
    rows += [("  built with torch", record["torch"])] if status.cpu_library and "torch" in record else []
    rows += [("CUDA library", str(status.cuda_library or status.cuda_error))]
    if status.cuda_library:
        rows += [("  built with", f"nvcc {record.get('cuda_version')} for {record.get('arch_list')}")]
    return rows


def _machine() -> list[tuple[str, str]]:
    rows = [("CPU threads", str(torch.get_num_threads()))]
    rows += [(name, value) for name, value in _extension.build_info().items() if name.startswith("instruction set")]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(index)
            rows.append((f"GPU {index}", f"{torch.cuda.get_device_name(index)}, sm_{major}{minor}"))
    else:
        rows.append(("GPU", "none that torch can use"))
    rows += [(name, os.environ[name]) for name in ("FLOWKERNELS_BACKEND", "FLOWKERNELS_ISA", "TRITON_INTERPRET") if name in os.environ]
    return rows


def _implementations() -> list[tuple[str, str, str, str]]:
    rows = [("op", "device", "served by", "why not by a kernel")]
    for op in OPS:
        for device, compiled in _COMPILED.items():
            if device == "CUDA" and op in _triton.ops():
                kernel, why_not = "triton", _triton.why_not(op, torch.device("cuda", 0))
            else:
                kernel, why_not = compiled, _extension.status().why_not(op, device)
            rows.append((op, device, "reference" if why_not else kernel, why_not or ""))
        kernels = "CPU" if op in _extension.CPU_ALONE else "CPU and CUDA"
        rows.append((op, "others", "reference", f"kernels exist for {kernels}"))
    return rows


def _installed(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _pairs(rows: list[tuple[str, str]]) -> list[str]:
    width = max(len(name) for name, _ in rows)
    return [f"{name:<{width}}  {value}" for name, value in rows]


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
