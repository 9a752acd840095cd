"""What each Triton kernel takes of a GPU: compiled without one, by its own launcher, for sm_80 and sm_90.

python -m python_tests.triton.resources > python_tests/triton/resources.json    after a change of a kernel or of Triton
"""

import importlib
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "0"  # before the first import of Triton

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from flowkernels.ops.coupling.part import Part
from flowkernels.ops.scale_map import Form, ScaleMap

ARCHITECTURES = (80, 90)
FIELDS = {"registers": r"REG:(\d+)", "spilled bytes": r"STACK:(\d+)", "local bytes": r"LOCAL:(\d+)"}


def kernels(op: str):
    return importlib.import_module(f"flowkernels.ops.{op}.kernels")


def masked_linear(dtype: torch.dtype, batch: int, precision: str = "highest") -> None:
    torch.set_float32_matmul_precision(precision)
    x, weight, bias = torch.empty(batch, 1024, dtype=dtype), torch.empty(1024, 1024, dtype=dtype), torch.empty(1024, dtype=dtype)
    visible = torch.empty(1024, dtype=torch.int32)
    module = kernels("masked_linear")
    module.masked_linear_triton(x, weight, bias, visible)
    module.masked_linear_dx_triton(x, weight, visible)
    module.masked_linear_dweight_triton(x, x, visible)


def coupling(shape: tuple[int, ...], dtype: torch.dtype, part: Part, scale: ScaleMap, form: Form, parameter: bool = False) -> None:
    x = torch.empty(shape, dtype=dtype)
    x = x.to(memory_format=torch.channels_last) if x.dim() == 4 and part == Part.EVEN else x
    shift, raw_scale = torch.empty_like(part.transformed(x)), torch.empty_like(part.transformed(x))
    a, dlogabsdet = torch.empty(1) if parameter else None, torch.empty(len(x))
    options = int(part), int(scale.kind), *scale.packed, int(form), False
    module = kernels("coupling")
    module.coupling_triton(x, shift, raw_scale, a, *options)
    module.coupling_backward_triton(x, dlogabsdet, x, shift, raw_scale, a, *options, False)


def channel_affine(dtype: torch.dtype) -> None:
    x, shift, dlogabsdet = torch.empty((32, 48, 32, 32), dtype=dtype), torch.empty(48), torch.empty(32)
    module = kernels("channel_affine")
    module.channel_affine_triton(x, shift, shift, shift, False)
    module.channel_affine_backward_triton(x, dlogabsdet, x, shift, shift, shift, False, False)


def glow_step(
    channels: int,
    dtype: torch.dtype,
    precision: str = "highest",
    *,
    layout: str = "channels first",
    raw: bool = True,
    sites: tuple[int, ...] = (16, 16),
) -> None:
    torch.set_float32_matmul_precision(precision)
    x = torch.empty((32, channels, *sites), dtype=dtype)
    x = x.to(memory_format=torch.channels_last) if layout == "channels last" else x
    x, weight, bias = x.movedim(1, -1), torch.empty(channels, channels, dtype=dtype), torch.empty(channels, dtype=dtype)
    module = kernels("glow_step")
    arguments = x, x if raw else None, weight, bias, False
    y, logabsdet, passing = module.glow_step_triton(*arguments, raw)
    module.glow_step_backward_triton(y, logabsdet, passing if raw else None, *arguments)


GLOW, IMAGE = ScaleMap.sigmoid(bias=2.0), (32, 48, 32, 32)
CASES: dict[str, Callable[[], None]] = {
    "masked_linear float32": lambda: masked_linear(torch.float32, 4096),
    "masked_linear float32, small tiles": lambda: masked_linear(torch.float32, 256),
    "masked_linear tf32": lambda: masked_linear(torch.float32, 4096, "high"),
    "masked_linear bfloat16": lambda: masked_linear(torch.bfloat16, 4096),
    "coupling float32, Glow": lambda: coupling(IMAGE, torch.float32, Part.SECOND_HALF, GLOW, Form.SHIFT_SCALE),
    "coupling bfloat16, Glow, channels-last": lambda: coupling(IMAGE, torch.bfloat16, Part.EVEN, GLOW, Form.SHIFT_SCALE),
    "coupling float32, vectors": lambda: coupling((4096, 8), torch.float32, Part.SECOND_HALF, ScaleMap.softclip(), Form.SCALE_SHIFT),
    "coupling float32, RealNVP": lambda: coupling(
        (64, 3, 32, 32), torch.float32, Part.CHECKERBOARD_EVEN, ScaleMap.exp_tanh(1.0), Form.SHIFT_SCALE, True
    ),
    "glow_step float32, 12 channels": lambda: glow_step(12, torch.float32),
    "glow_step float32, 24 channels": lambda: glow_step(24, torch.float32),
    "glow_step float32, 48 channels": lambda: glow_step(48, torch.float32),
    "glow_step float32, 48 channels last": lambda: glow_step(48, torch.float32, layout="channels last"),
    "glow_step float32, 48 channels, no coupling": lambda: glow_step(48, torch.float32, raw=False),
    "glow_step float32, 64 channels, vectors": lambda: glow_step(64, torch.float32, sites=()),
    "glow_step float64, 12 channels": lambda: glow_step(12, torch.float64),
    "glow_step float32, 96 channels": lambda: glow_step(96, torch.float32),
    "glow_step float32, 192 channels": lambda: glow_step(192, torch.float32),
    "glow_step tf32, 48 channels": lambda: glow_step(48, torch.float32, "high"),
    "glow_step float64, 48 channels": lambda: glow_step(48, torch.float64),
    "channel_affine float32": lambda: channel_affine(torch.float32),
    "channel_affine bfloat16": lambda: channel_affine(torch.bfloat16),
}


class NoGpu:
    """Stands where Triton looks for the GPU's driver, and says what to compile for."""

    def __init__(self, architecture: int) -> None:
        self.target = GPUTarget("cuda", architecture, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch  # Triton keeps what it compiled, and for what, by device

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_case(job: tuple[str, int]) -> dict[str, dict[str, int]]:
    """What every kernel that the case launches takes, by name."""
    case, architecture = job
    triton.runtime.driver.set_active(NoGpu(architecture))
    compiled, run = [], JITFunction.run
    JITFunction.run = lambda self, *args, warmup, **kwargs: compiled.append(run(self, *args, warmup=True, **kwargs))
    try:
        CASES[case]()
    finally:
        JITFunction.run = run
    return {f"sm_{architecture} {case} {kernel.name}": resources(kernel) for kernel in compiled}


def resources(kernel: triton.compiler.CompiledKernel) -> dict[str, int]:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = {name: int(re.search(pattern, usage)[1]) for name, pattern in FIELDS.items()}
    return found | {"shared bytes": kernel.metadata.shared}


def report() -> dict[str, object]:
    jobs = [(case, architecture) for case in CASES for architecture in ARCHITECTURES]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        kernels = {name: taken for part in pool.map(compile_case, jobs) for name, taken in part.items()}
    return {"triton": triton.__version__, "kernels": kernels}


def as_text(found: dict[str, object]) -> str:
    """JSON with one kernel a line."""
    lines = [f"  {json.dumps(name)}: {json.dumps(taken)}" for name, taken in sorted(found["kernels"].items())]
    return f'{{\n "triton": {json.dumps(found["triton"])},\n "kernels": {{\n' + ",\n".join(lines) + "\n }\n}"


if __name__ == "__main__":
    print(as_text(report()))
