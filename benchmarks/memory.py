"""Peak memory of one call beyond what is there before it and its outputs, measured in a fresh process.

On the CPU this is the kernel's own high-water mark of resident memory (VmHWM in /proc/self/status, reset through
/proc/self/clear_refs just before the call), so that nothing is missed between two samples. It is the process's first call at this
size, so working memory that an implementation keeps for later calls is counted, and so are the code pages it touches: about 1 MB. What
torch sets up once for all calls is not: its threads, its autograd, and what its first error reads on the way to Python.
The malloc thresholds are left alone there, and what the heap holds free is given back first. On a GPU it is the allocator's peak.
"""

import contextlib
import ctypes
import importlib
import json
import subprocess
import sys
from typing import Any

import torch
from torch import Tensor

from .case import Call


def measure_in_process(benchmark: str, case: str, competitor: str, *, quick: bool, device: torch.device) -> int | None:
    """Bytes; None where the system does not tell."""
    command = [sys.executable, "-m", "benchmarks.memory", json.dumps([benchmark, case, competitor, quick, str(device)])]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"measuring the memory of {competitor} in {case!r} failed: {done.stderr.strip()[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def peak_bytes(call: Call, device: torch.device) -> int | None:
    """Bytes beyond what is allocated now and the outputs, in this process."""
    with torch.inference_mode(not call.grad):
        if device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            outputs = call.run()
            torch.cuda.synchronize()
            return torch.cuda.max_memory_allocated() - before - _bytes(outputs)
        _start_threads(call.grad)
        try:
            ctypes.CDLL(None).malloc_trim(0)
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")
            before = _resident("VmRSS")
        except (AttributeError, OSError):
            return None
        outputs = call.run()
        return max(0, _resident("VmHWM") - before - _bytes(outputs))


def _start_threads(grad: bool) -> None:
    """What torch sets up once for all calls: its threads; autograd where there are gradients (35 MB of modules at the first call); and what
    its first error reads on the way to Python, 1.5 MB of code and tables: the engine's answer to whether a leaf is wanted is one.
    """
    with contextlib.suppress(RuntimeError):
        torch.ones(1) @ torch.ones(2)
    a = torch.ones(512, 512, requires_grad=grad)
    for _ in range(3):
        result = torch.exp(a @ a).sum()
        if grad:
            torch.autograd.grad(result, a, torch.ones(()))


def _resident(field: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field + ":"))


def _bytes(outputs: Any) -> int:
    if isinstance(outputs, Tensor):
        return outputs.untyped_storage().nbytes()
    return sum(map(_bytes, outputs)) if isinstance(outputs, (tuple, list)) else 0


def _main() -> None:
    benchmark, case_name, competitor_name, quick, device_name = json.loads(sys.argv[1])
    device = torch.device(device_name)
    cases = importlib.import_module(f"benchmarks.bench_{benchmark}").cases(quick, device)
    case = next(case for case in cases if case.name == case_name)
    competitor = next(competitor for competitor in case.competitors if competitor.name == competitor_name)
    print(json.dumps(peak_bytes(competitor.build(), device)))


if __name__ == "__main__":
    _main()
