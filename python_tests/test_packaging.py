"""Building and installing: what a distribution holds, and the one line that each failure ends in."""

import os
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import flowkernels

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("benchmarks", "csrc", "examples", "flowkernels", "python_tests")
SWITCHES = ("FLOWKERNELS_SKIP_EXT", "FLOWKERNELS_SKIP_CUDA", "FORCE_CUDA", "CXX")

pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs the source tree")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the source tree to build in."""
    ignore = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "runs")
    return shutil.copytree(ROOT, tmp_path / "tree", ignore=ignore)


def inherited() -> dict[str, str]:
    """This process's environment without what changes a build."""
    return {name: value for name, value in os.environ.items() if name not in SWITCHES}


def setup(tree: Path, *command: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "setup.py", *command],
        cwd=tree,
        env={**inherited(), **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def last_line(run: subprocess.CompletedProcess) -> str:
    """The line that a failed build ends in, which is also the only one that it writes to standard error."""
    assert run.returncode != 0
    (line,) = [line for line in run.stderr.splitlines() if line.startswith("flowkernels:")]
    assert "Traceback" not in run.stderr
    return line


def test_version_has_one_source():
    assert flowkernels.__version__ == metadata.version("flowkernels")


def test_source_distribution_is_complete_and_needs_no_torch(tree):
    (tree / "flowkernels" / "_C_cpu.so").touch()
    (tree / "torch.py").write_text("raise ImportError('a source distribution must not import torch')")
    run = setup(tree, "-q", "sdist", PYTHONPATH=str(tree))
    assert run.returncode == 0, run.stderr
    (archive,) = (tree / "dist").iterdir()
    with tarfile.open(archive) as tar:
        held = {name.partition("/")[2] for name in tar.getnames()}
    wanted = {str(path.relative_to(ROOT)) for folder in SOURCES for path in (ROOT / folder).rglob("*.*")}
    wanted = {
        name for name in wanted if name.endswith((".py", ".typed", ".cpp", ".h", ".cu", ".cuh", ".sh", ".md", ".json", ".jsonl", ".png"))
    }
    wanted -= {"flowkernels/_build.json"}
    assert wanted | {"setup.py", "pyproject.toml", "LICENSE", "Makefile"} <= held
    assert not [name for name in held if name.endswith((".so", ".pyc", "_build.json"))]


SMOKE = """
import torch, flowkernels as fk
from flowkernels import _extension, info
from importlib.metadata import version
torch.manual_seed(0)
flow = fk.flows.MAF(5, context_features=2, transforms=2, hidden_features=(16, 16))
context = torch.randn(7, 2)
x, log_prob = flow.sample_and_log_prob(1, context)
torch.testing.assert_close(flow.log_prob(x[0], context), log_prob[0], rtol=1e-4, atol=1e-4)
flow.log_prob(x[0], context).mean().backward()
assert all(p.grad.isfinite().all() for p in flow.parameters())
assert version("flowkernels") == fk.__version__ and info.report() and not torch.cuda.is_initialized()
print(fk.__file__, _extension.status().cpu_library, sep="\\n")
"""


def smoke(wheel: Path, folder: Path) -> list[str]:
    """Install a wheel in a fresh virtual environment, use it there, and return the files of the package and of its library.

    The environment borrows this one's torch by its path, which brings the installed packages and none of the editable ones.
    """
    environment = folder / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    python = environment / "bin" / "python"
    site = Path(sysconfig.get_path("purelib", vars={"base": str(environment)}))
    (site / "torch.pth").write_text(str(Path(torch.__file__).parents[1]))
    pip = [sys.executable, "-m", "pip", "-q", "--python", str(python), "install", "--no-deps", "--no-index", "--ignore-installed"]
    subprocess.run([*pip, wheel], check=True)
    run = subprocess.run([python, "-I", "-c", SMOKE], cwd=folder, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert sorted(path.name for path in site.iterdir() if path.is_dir() and path.suffix != ".dist-info") == ["flowkernels"]
    files = run.stdout.split()
    assert all(Path(file).is_relative_to(environment) for file in files if file != "None")
    return files


@pytest.mark.slow
def test_wheel_of_the_source_distribution(tree, tmp_path):
    """What a user gets who has nothing but the archive: it builds, installs and works far from any source tree."""
    assert setup(tree, "-q", "sdist").returncode == 0
    (archive,) = (tree / "dist").iterdir()
    shutil.move(archive, tmp_path)
    shutil.rmtree(tree)
    pip = [sys.executable, "-m", "pip", "-q", "wheel", "--no-deps", "--no-index", "--no-build-isolation", "-w", tmp_path / "wheels"]
    build = subprocess.run([*pip, tmp_path / archive.name], env=inherited(), capture_output=True, text=True, timeout=1200)
    assert build.returncode == 0, build.stderr
    (wheel,) = (tmp_path / "wheels").iterdir()
    assert wheel.name.startswith(f"flowkernels-{flowkernels.__version__}-py3-none-") and "any" not in wheel.name
    _, library = smoke(wheel, tmp_path)
    assert Path(library).name == "_C_cpu.so"


def test_pure_python_wheel(tree, tmp_path):
    (tree / "build" / "lib" / "flowkernels").mkdir(parents=True)
    (tree / "build" / "lib" / "flowkernels" / "_C_cpu.so").touch()  # what an earlier build left
    (tree / "flowkernels" / "_C_cpu.so").touch()
    run = setup(tree, "-q", "bdist_wheel", FLOWKERNELS_SKIP_EXT="1", CXX="no-such-compiler")
    assert run.returncode == 0, run.stderr
    (wheel,) = (tree / "dist").iterdir()
    assert wheel.name == f"flowkernels-{flowkernels.__version__}-py3-none-any.whl"
    shutil.unpack_archive(wheel, tree / "unpacked", "zip")
    assert (tree / "unpacked" / "flowkernels" / "py.typed").exists()
    assert "FLOWKERNELS_SKIP_EXT" in (tree / "unpacked" / "flowkernels" / "_build.json").read_text()
    assert not list((tree / "unpacked").rglob("*.so"))
    assert smoke(wheel, tmp_path)[1] == "None"


def test_a_build_leaves_no_library_that_it_left_out(script, tmp_path):
    for name in ("cpu", "cuda"):
        (tmp_path / f"_C_{name}.so").touch()
    script.remove_others(tmp_path, {"cpu": None, "cuda": "FLOWKERNELS_SKIP_CUDA was set"})
    assert [path.name for path in tmp_path.iterdir()] == ["_C_cpu.so"]


def test_a_build_folder_keeps_what_is_others(tree):
    (tree / "lib").mkdir()
    (tree / "lib" / "notes").touch()
    assert setup(tree, "-q", "build", "--build-lib", "lib", FLOWKERNELS_SKIP_EXT="1").returncode == 0
    assert {path.name for path in (tree / "lib").iterdir()} == {"notes", "flowkernels"}


def test_no_torch(tree):
    (tree / "torch.py").write_text("raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')")
    line = last_line(setup(tree, "dist_info", PYTHONPATH=str(tree)))
    assert line == "flowkernels: torch is needed to build flowkernels: install torch and use pip install --no-build-isolation ."


def test_old_torch(tree):
    (tree / "torch.py").write_text("__version__ = '2.10.0+cpu'")
    assert "torch 2.11 or newer is needed, this is 2.10.0+cpu" in last_line(setup(tree, "dist_info", PYTHONPATH=str(tree)))


def test_no_compiler(tree):
    line = last_line(setup(tree, "build_ext", CXX="no-such-compiler"))
    assert "no C++ compiler found (no-such-compiler)" in line and "FLOWKERNELS_SKIP_EXT=1" in line


@pytest.fixture
def script() -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(ROOT / "setup.py"), run_name="setup"))


def fake_torch(cuda: str | None) -> SimpleNamespace:
    return SimpleNamespace(__version__="2.13.0", version=SimpleNamespace(cuda=cuda))


def toolkit(folder: Path, version: str) -> str:
    nvcc = folder / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {version}, V{version}.1'\n")
    nvcc.chmod(0o755)
    return str(folder)


@pytest.fixture
def why_no_cuda(script, monkeypatch):
    """`why_no_cuda` of setup.py, for a tree that has CUDA sources, and no switch set."""
    for name in SWITCHES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setitem(script.why_no_cuda.__globals__, "sources", lambda pattern: ["csrc/cuda/op.cu"])
    return script.why_no_cuda


def test_cuda_is_decided_from_torch_and_toolkit(why_no_cuda, tmp_path, monkeypatch):
    home = toolkit(tmp_path, "13.0")
    assert why_no_cuda(fake_torch("13.2"), home) is None
    assert "torch 2.13.0 was built without CUDA" in why_no_cuda(fake_torch(None), home)
    assert "nvcc was not found: install the CUDA 13.0 toolkit or set CUDA_HOME" in why_no_cuda(fake_torch("13.0"), None)
    monkeypatch.setenv("FLOWKERNELS_SKIP_CUDA", "1")
    assert "FLOWKERNELS_SKIP_CUDA was set" in why_no_cuda(fake_torch("13.0"), home)


def test_toolkit_of_another_major(why_no_cuda, tmp_path, monkeypatch):
    home = toolkit(tmp_path, "12.8")
    with pytest.raises(
        SystemExit, match=r"nvcc is of CUDA 12\.8, but torch 2\.13\.0 is of CUDA 13\.0: .*CUDA_HOME.*FLOWKERNELS_SKIP_CUDA=1"
    ):
        why_no_cuda(fake_torch("13.0"), home)
    monkeypatch.setenv("FLOWKERNELS_SKIP_CUDA", "1")
    assert why_no_cuda(fake_torch("13.0"), home)


def test_force_cuda_fails_loudly(why_no_cuda, monkeypatch):
    monkeypatch.setenv("FORCE_CUDA", "1")
    with pytest.raises(SystemExit, match=r"FORCE_CUDA was set, but torch 2\.13\.0 was built without CUDA"):
        why_no_cuda(fake_torch(None), None)


def test_architectures_that_the_kernels_do_not_run_on_are_refused(script, monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.5;8.0 9.0a+PTX")
    with pytest.raises(SystemExit, match=r"TORCH_CUDA_ARCH_LIST must name architectures from 8\.0 on, .*; got 7\.5"):
        script.arch_list()
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0 9.0a+PTX 10.0")
    assert script.arch_list() == "8.0 9.0a+PTX 10.0"
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST")
    assert script.arch_list() == script.DEFAULT_ARCH_LIST


def test_warnings_are_errors_on_demand_only(script, monkeypatch):
    monkeypatch.delenv("FLOWKERNELS_WERROR", raising=False)
    flags = script.host_flags()
    assert "-Werror" not in flags
    assert not [flag for flag in flags if flag.startswith(("-march", "-ffast-math", "-Ofast"))]
    monkeypatch.setenv("FLOWKERNELS_WERROR", "1")
    assert "-Werror" in script.host_flags()
