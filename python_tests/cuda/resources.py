"""Compiles every csrc/cuda/*.cu without a GPU and reports what each kernel takes: registers, spills, static shared memory.

    python -m python_tests.cuda.resources     # writes resources.json, which CI compares with

Warnings are errors. Dynamic shared memory is decided at launch and is not in here.
"""

import json
import os
import re
import runpy
import shutil
import subprocess
import tempfile
from pathlib import Path

from torch.utils.cpp_extension import include_paths

ROOT = Path(__file__).resolve().parents[2]
RECORD = Path(__file__).with_name("resources.json")
ARCHITECTURES = ("80", "90")

Resources = dict[str, dict[str, dict[str, int]]]  # architecture, kernel, quantity


def sources() -> list[Path]:
    return sorted((ROOT / "csrc" / "cuda").glob("*.cu"))


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=f"{home}/bin" if home else None) or shutil.which("nvcc")


def nvcc_version(nvcc: str) -> str:
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"release (\d+\.\d+)", text)[1]


def compile_source(nvcc: str, source: Path) -> Resources:
    """What the kernels of a source take.

    Raises:
        RuntimeError: it does not compile, or not without a warning.
    """
    version = runpy.run_path(str(ROOT / "setup.py"), run_name="setup")["TARGET_VERSION"]
    flags = ["-std=c++20", "-O3", "-fmad=false", "-DUSE_CUDA", f"-DTORCH_TARGET_VERSION={version}", f"-I{ROOT / 'csrc'}"]
    flags += [flag for path in include_paths() for flag in ("-isystem", path)]
    flags += ["-Werror=all-warnings", "-Xcompiler=-Wall,-Wextra,-Werror,-fvisibility=hidden,-ffp-contract=off", "-Xptxas=-v"]
    flags += [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
    with tempfile.TemporaryDirectory() as folder:
        run = subprocess.run([nvcc, *flags, "-c", str(source), "-o", f"{folder}/out.o"], capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"{source.name} does not compile:\n{run.stdout}{run.stderr}")
    return parse(run.stdout + run.stderr)


def parse(listing: str) -> Resources:
    """From the listing of ptxas -v."""
    found: Resources = {}
    for block in listing.split("Compiling entry function ")[1:]:
        symbol, architecture = re.match(r"'(\S+)' for '(\w+)'", block).groups()
        spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", block)
        shared = re.search(r"(\d+) bytes smem", block)
        found.setdefault(architecture, {})[kernel_name(symbol)] = {
            "registers": int(re.search(r"Used (\d+) registers", block)[1]),
            "spilled_bytes": int(spills[1]) + int(spills[2]),
            "static_shared_bytes": int(shared[1]) if shared else 0,
        }
    return found


def kernel_name(symbol: str) -> str:
    """Without namespaces, return type and arguments."""
    name = subprocess.run(["c++filt", symbol], capture_output=True, text=True, check=True).stdout.strip()
    name = re.sub(r"\((?:anonymous namespace|.*_GLOBAL__N_[^)]*)\)::|_GLOBAL__N_\w+::|flowkernels::|^void ", "", name)
    return name.partition("(")[0]


def main() -> None:
    nvcc = find_nvcc()
    if nvcc is None:
        raise SystemExit("nvcc was not found: install a CUDA toolkit or set CUDA_HOME to it")
    record = {"nvcc": nvcc_version(nvcc), "sources": {source.name: compile_source(nvcc, source) for source in sources()}}
    RECORD.write_text(json.dumps(record, indent=1) + "\n")
    print(f"wrote {RECORD}")


if __name__ == "__main__":
    main()
