"""Every CUDA source compiles for sm_80 and sm_90 without a warning, spills nothing, and takes what is on record."""

import json
import re
import subprocess

import pytest

from python_tests.cuda import resources

NVCC = resources.find_nvcc()
RECORDED = json.loads(resources.RECORD.read_text())

pytestmark = pytest.mark.skipif(not (resources.ROOT / "setup.py").exists(), reason="needs the source tree")


@pytest.mark.slow
@pytest.mark.skipif(NVCC is None, reason="nvcc was not found: install a CUDA toolkit or set CUDA_HOME to it")
@pytest.mark.parametrize("source", resources.sources(), ids=lambda path: path.name)
def test_compiles_and_takes_what_is_on_record(source):
    found = resources.compile_source(NVCC, source)
    assert set(found) == {f"sm_{a}" for a in resources.ARCHITECTURES} and all(found.values())
    for architecture, kernels in found.items():
        for name, taken in kernels.items():
            assert taken["spilled_bytes"] == 0, (architecture, name)
    if resources.nvcc_version(NVCC) == RECORDED["nvcc"]:  # another compiler takes other registers
        assert found == RECORDED["sources"][source.name], "if this is meant: python -m python_tests.cuda.resources"


@pytest.mark.slow
@pytest.mark.skipif(NVCC is None, reason="nvcc was not found: install a CUDA toolkit or set CUDA_HOME to it")
def test_the_benchmark_of_the_limits_compiles(tmp_path):
    source = resources.ROOT / "benchmarks" / "limits.cu"
    for architecture in resources.ARCHITECTURES:
        command = [
            NVCC,
            "-arch",
            f"sm_{architecture}",
            "-Werror=all-warnings",
            "-shared",
            "-Xcompiler=-fPIC",
            source,
            "-o",
            tmp_path / "limits.so",
        ]
        subprocess.run(command, check=True)


def test_every_source_is_on_record_without_spills():
    assert set(RECORDED["sources"]) == {path.name for path in resources.sources()}
    for source in RECORDED["sources"].values():
        for kernels in source.values():
            assert kernels and all(taken["spilled_bytes"] == 0 for taken in kernels.values())


def threads_of(kernel: str) -> int:
    """Of a block, at most: as csrc/cuda launches it."""
    name, _, arguments = kernel.partition("<")
    if name.endswith("_loop"):
        has_more_registers = arguments.startswith("double") or (name == "autoregressive_loop" and arguments.split(", ")[2] == "false")
        return 320 if has_more_registers else 512  # set_warps in csrc/autoregressive_plan.h
    if "TileShape" in arguments:
        rows, columns, _, thread_rows, thread_columns = map(int, re.findall(r" (\d+)", arguments))
        return rows // thread_rows * (columns // thread_columns)
    return {"schedule": 512, "pack": 256, "kernel": 512, "sum": 1024, "parts": 256, "unit": 256}.get(name.rpartition("_")[2], 128)


def test_every_block_fits_a_multiprocessor():
    """With the registers of all its threads, and its static shared memory, of which a kernel that may be given all there is has none."""
    for source in RECORDED["sources"].values():
        for kernels in source.values():
            for name, taken in kernels.items():
                assert threads_of(name) * up_to_multiple(taken["registers"], 8) <= 65536, name
                asks = name.partition("<")[0]
                if asks.endswith(("_loop", "lu_kernel")):
                    assert taken["static_shared_bytes"] == 0, name
                else:
                    asked = 40 * 1024 if asks.endswith("_schedule") else 0  # chain_bytes in csrc/cuda/autoregressive_loop.cuh
                    assert taken["static_shared_bytes"] + asked <= 48 * 1024, name


def up_to_multiple(n: int, of: int) -> int:
    return -(-n // of) * of


def test_the_listing_is_read():
    listing = (
        "ptxas info    : Compiling entry function '_ZN11flowkernels12_GLOBAL__N_19lu_kernelIffEEvNS0_4ArgsE' for 'sm_90'\n"
        "ptxas info    : Function properties for x\n    8 bytes stack frame, 12 bytes spill stores, 16 bytes spill loads\n"
        "ptxas info    : Used 40 registers, used 1 barriers, 96 bytes smem, 432 bytes cmem[0]\n"
    )
    taken = {"registers": 40, "spilled_bytes": 28, "static_shared_bytes": 96}
    assert resources.parse(listing) == {"sm_90": {"lu_kernel<float, float>": taken}}
