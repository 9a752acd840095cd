"""clang takes every C++ source without a warning, for Linux and for macOS, whose compiler it is. No code is made of them here.

The clang is that of the package ziglang, which has the headers of both systems. What g++ makes of the sources is what all other tests run.
"""

import importlib.util
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils.cpp_extension import include_paths

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted([*ROOT.glob("csrc/*.cpp"), *ROOT.glob("csrc/cpu/*.cpp")])

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not SOURCES, reason="needs the source tree"),
    pytest.mark.skipif(importlib.util.find_spec("ziglang") is None, reason="needs clang: pip install ziglang"),
]


@pytest.mark.parametrize("target", ["x86_64-linux-gnu", "aarch64-macos"])
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_clang_takes_it(source, target, tmp_path):
    run = compile_with_clang(source, target, tmp_path)
    assert run.returncode == 0, run.stderr
    assert "warning" not in run.stderr, run.stderr


@pytest.mark.parametrize("target", ["x86_64-linux-gnu", "aarch64-macos"])
def test_it_would_say_what_clang_does_not_take(target, tmp_path):
    wrong = tmp_path / "wrong.cpp"
    wrong.write_text('#include "cpu/for_each_target.h"\nint unused(int x) { int y; return x; }\n')
    run = compile_with_clang(wrong, target, tmp_path)
    assert run.returncode != 0
    assert "unused variable 'y'" in run.stderr


def compile_with_clang(source: Path, target: str, folder: Path) -> subprocess.CompletedProcess:
    build = runpy.run_path(str(ROOT / "setup.py"), run_name="setup")
    flags = [*build["host_flags"](), "-Werror", f"-DTORCH_TARGET_VERSION={build['TARGET_VERSION']}", f"-I{ROOT / 'csrc'}"]
    flags += [flag for path in include_paths() for flag in ("-isystem", path)]
    flags += ["-S", "-emit-llvm", "-Xclang", "-disable-llvm-passes", "-Wno-unused-command-line-argument"]
    command = [sys.executable, "-m", "ziglang", "c++", "-target", target, *flags, str(source), "-o", str(folder / "out.ll")]
    caches = dict.fromkeys(("ZIG_GLOBAL_CACHE_DIR", "ZIG_LOCAL_CACHE_DIR"), str(folder / "cache"))  # where it would wait for other tests
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **caches})
