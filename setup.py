"""Builds the compiled libraries. Everything else about the package is in pyproject.toml.

Switches, all from the environment:
    FLOWKERNELS_SKIP_EXT=1   install pure Python: every op runs its reference
    FLOWKERNELS_SKIP_CUDA=1  build no CUDA library
    FORCE_CUDA=1             fail where the CUDA library cannot be built, instead of leaving it out
    TORCH_CUDA_ARCH_LIST     GPU architectures, "8.0;9.0+PTX" by default
    MAX_JOBS                 compiler processes at a time (with ninja)
    FLOWKERNELS_WERROR=1     compiler warnings are errors
    FLOWKERNELS_TESTS=1      with build_ext --inplace: also python_tests/_C_tests.so, what the tests alone call (csrc/tests), and
                             _C_emulated.so, the CUDA kernels for a CPU (csrc/tests/emulated)
"""

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import setuptools

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
TARGET_VERSION = "0x020b000000000000"  # the stable ABI of torch 2.11
DEFAULT_ARCH_LIST = "8.0;9.0+PTX"
BUILDING = {"bdist_wheel", "build", "build_ext", "develop", "dist_info", "editable_wheel", "install"}


def fail(message: str) -> None:
    raise SystemExit(f"flowkernels: {message}")


if int(setuptools.__version__.split(".")[0]) < 77:
    fail(f'setuptools 77 or newer is needed to build, this is {setuptools.__version__}: pip install --upgrade "setuptools>=77"')

from setuptools.command.bdist_wheel import bdist_wheel  # noqa: E402
from setuptools.command.build import build  # noqa: E402
from setuptools.command.build_py import build_py  # noqa: E402


def switch(name: str) -> bool:
    return os.environ.get(name, "").lower() not in ("", "0", "off", "no", "false")


def sources(pattern: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in CSRC.glob(pattern))


def import_torch():
    try:
        import torch
    except ImportError as error:
        broken = "" if isinstance(error, ModuleNotFoundError) and error.name == "torch" else f" ({error})"
        fail(f"torch is needed to build flowkernels{broken}: install torch and use pip install --no-build-isolation .")
    if tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2]) < (2, 11):
        fail(f"torch 2.11 or newer is needed, this is {torch.__version__}: install a newer torch, then pip install --no-build-isolation .")
    return torch


def find_compiler() -> str:
    """The C++ compiler, also put into CXX, so that compiling and linking use the same one."""
    named = os.environ.get("CXX")
    candidates = [named] if named else ["c++", "g++", "clang++"]
    for compiler in candidates:
        if shutil.which(shlex.split(compiler)[0]):
            os.environ["CXX"] = compiler
            return compiler
    fail(
        f"no C++ compiler found ({', '.join(candidates)}): install g++ or clang++ or name one in CXX, "
        "or set FLOWKERNELS_SKIP_EXT=1 for a pure-Python install"
    )


def nvcc_version(cuda_home: str | None) -> str | None:
    nvcc = Path(cuda_home or "", "bin", "nvcc")
    if not cuda_home or not nvcc.exists():
        return None
    found = re.search(r"release (\d+\.\d+)", subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout)
    return found and found[1]


def why_no_cpu() -> str | None:
    if platform.machine().lower() not in ("x86_64", "amd64", "aarch64", "arm64"):
        return f"there are no CPU kernels for {platform.machine()}"
    return None


def why_no_cuda(torch, cuda_home: str | None) -> str | None:
    """Why the CUDA library is left out; None where it is built. A toolkit of another CUDA major ends the build."""
    reason = None
    if not sources("cuda/*.cu"):
        reason = "this version has no CUDA sources"
    elif switch("FLOWKERNELS_SKIP_CUDA"):
        reason = "FLOWKERNELS_SKIP_CUDA was set"
    elif torch.version.cuda is None:
        reason = f"torch {torch.__version__} was built without CUDA: install a torch with CUDA"
    elif (nvcc := nvcc_version(cuda_home)) is None:
        reason = f"nvcc was not found: install the CUDA {torch.version.cuda} toolkit or set CUDA_HOME to it"
    elif nvcc.split(".")[0] != torch.version.cuda.split(".")[0]:
        fail(
            f"nvcc is of CUDA {nvcc}, but torch {torch.__version__} is of CUDA {torch.version.cuda}: "
            "set CUDA_HOME to a toolkit of torch's major version, or FLOWKERNELS_SKIP_CUDA=1"
        )
    if reason and switch("FORCE_CUDA"):
        fail(f"FORCE_CUDA was set, but {reason}")
    return reason


def host_flags() -> list[str]:
    # No -march and no -ffast-math: kernels choose their instruction set at run time, and NaN, infinity and the order of a sum count.
    flags = ["-std=c++20", "-O3", "-fno-math-errno", "-ffp-contract=off", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-psabi"]
    flags += ["-Werror"] if switch("FLOWKERNELS_WERROR") else []
    flags += [] if "-g" in os.environ.get("CFLAGS", "") else ["-g0"]  # Python's own flags ask for it, and it is most of the file
    return flags


def arch_list() -> str:
    """The architectures to compile for; left alone, torch would ask the visible GPUs, and fail where there is none."""
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_ARCH_LIST
    if older := [arch for arch in re.findall(r"\d+\.\d+", wanted) if float(arch) < 8.0]:
        fail(f"TORCH_CUDA_ARCH_LIST must name architectures from 8.0 on, which copy asynchronously; got {', '.join(older)}")
    return wanted


def plan() -> tuple[list, dict, dict]:
    """The extensions to build, the commands that build them, and the record that the package keeps of it (flowkernels/_build.json)."""
    if switch("FLOWKERNELS_SKIP_EXT"):
        reason = "FLOWKERNELS_SKIP_EXT was set when flowkernels was installed"
        return [], {}, {"cpu": reason, "cuda": reason}
    torch = import_torch()
    if sys.platform == "win32":
        fail("the compiled library is not supported on Windows: set FLOWKERNELS_SKIP_EXT=1 for a pure-Python install")

    os.environ["PATH"] += os.pathsep + str(Path(sys.executable).parent)  # a ninja that pip put beside this Python
    compiler = find_compiler()
    from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension, include_paths

    common = [f"-DTORCH_TARGET_VERSION={TARGET_VERSION}", f"-ffile-prefix-map={ROOT}/="]
    # torch's headers as system headers: their warnings are not ours
    system = [flag for path in include_paths() for flag in ("-isystem", path)]
    options = {  # copied for each use: torch's helpers extend the lists that they are given
        "include_dirs": [str(CSRC)],
        "depends": sources("**/*.h") + sources("**/*.cuh") + ["setup.py"],
        "py_limited_api": True,  # links no Python library; there is no Python in ours
        # before torch's libraries, which by accident export copies of the standard library's symbols
        "libraries": ["stdc++"] if sys.platform == "linux" else [],
    }
    record = {
        "cpu": why_no_cpu(),
        "cuda": why_no_cuda(torch, CUDA_HOME),
        "torch": torch.__version__,
        "compiler": compiler,
        "cuda_version": None,
    }
    extensions = []
    if record["cpu"] is None:
        flags = common + system + host_flags()
        files = sources("*.cpp") + sources("cpu/*.cpp")
        extensions.append(CppExtension("flowkernels._C_cpu", files, extra_compile_args=flags, **deepcopy(options)))
        if switch("FLOWKERNELS_TESTS") and "build_ext" in sys.argv:  # never part of a wheel
            probes = sources("tests/*.cpp")
            extensions.append(CppExtension("python_tests._C_tests", probes, extra_compile_args=[*flags, "-O1"], **deepcopy(options)))
            if sys.platform == "linux":
                # Every access calls a function of the emulator. Where CFLAGS name sanitizers, these look at them instead.
                told = [] if "-fsanitize=" in os.environ.get("CFLAGS", "") else ["-fsanitize=thread"]
                emulated = deepcopy(options)
                emulated["include_dirs"].insert(0, str(CSRC / "tests" / "emulated"))  # whose headers take the place of CUDA's
                emulated["depends"] += sources("cuda/*.cu")
                flags = [*flags, "-O1", *told]
                extensions.append(
                    CppExtension("python_tests._C_emulated", sources("tests/emulated/*.cpp"), extra_compile_args=flags, **emulated)
                )
    if record["cuda"] is None:
        record["cuda_version"] = nvcc_version(CUDA_HOME)
        # torch would ask the visible GPUs instead, and fail where there is none
        record["arch_list"] = os.environ["TORCH_CUDA_ARCH_LIST"] = arch_list()
        nvcc = [
            *common[:1],
            *system,
            "-std=c++20",
            "-DUSE_CUDA",
            "-O3",
            "-fmad=false",
            "-Xcompiler=-fvisibility=hidden",
            "-Xcompiler=-ffp-contract=off",
        ]
        nvcc += ["-Werror=all-warnings"] if switch("FLOWKERNELS_WERROR") else []
        flags = {"cxx": [*common, "-DUSE_CUDA", *system, *host_flags()], "nvcc": nvcc}
        extensions.append(CUDAExtension("flowkernels._C_cuda", sources("cuda/*.cu"), extra_compile_args=flags, **deepcopy(options)))

    for extension in extensions:  # the stable ABI is in torch_cpu and torch_cuda; the others might be absent in a later torch
        extension.libraries = [name for name in extension.libraries if name not in ("c10", "torch", "c10_cuda")]

    class BuildLibraries(BuildExtension):
        """Builds shared libraries without the Python tag in their names; objects stay in build/, also for editable installs."""

        def get_ext_filename(self, ext_name):
            return os.path.join(*ext_name.split(".")) + ".so"

        def build_extension(self, ext):
            self.build_temp = str(ROOT / "build" / "objects" / ext.name)
            try:
                super().build_extension(ext)
            except Exception as error:  # the compiler has said what it did not like; a traceback of ours would bury it
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                fail(f"{ext.name} was not built ({reason}), see above: mend that, or set FLOWKERNELS_SKIP_EXT=1 for a pure-Python install")

        def run(self):
            super().run()
            if self.inplace:
                remove_others(ROOT / "flowkernels", record)
                write_record(ROOT / "flowkernels", record)

    return extensions, {"build_ext": BuildLibraries}, record


def remove_others(folder: Path, record: dict) -> None:
    """Libraries of an earlier build that this one left out, and would be loaded all the same."""
    for name in ("cpu", "cuda"):
        if record.get(name) is not None:
            (folder / f"_C_{name}.so").unlink(missing_ok=True)


def write_record(folder: Path, record: dict) -> None:
    (folder / "_build.json").write_text(json.dumps(record, indent=1) + "\n")


def main() -> None:
    extensions, commands, record = [], {}, {}
    if BUILDING & set(sys.argv):  # a source distribution needs no torch
        extensions, commands, record = plan()

    class Build(build):
        def run(self):
            shutil.rmtree(
                Path(self.build_lib, "flowkernels"), ignore_errors=True
            )  # an earlier build may have left files that are not of this one
            super().run()

    class BuildPython(build_py):
        def run(self):
            super().run()
            folder = ROOT / "flowkernels" if self.editable_mode else Path(self.build_lib, "flowkernels")
            if self.editable_mode:
                remove_others(folder, record)
            write_record(folder, record)

    class Wheel(bdist_wheel):
        def get_tag(self):
            python, abi, system = super().get_tag()
            return (python, abi, system) if self.root_is_pure else ("py3", "none", system)

    setuptools.setup(
        ext_modules=extensions,
        cmdclass={**commands, "build": Build, "build_py": BuildPython, "bdist_wheel": Wheel},
    )


if __name__ == "__main__":
    main()
