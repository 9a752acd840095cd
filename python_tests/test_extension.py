"""The compiled library: what it links, how it is loaded, and what is said where it cannot be."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import flowkernels
from flowkernels import _backend, _extension, _triton, info

PACKAGE = Path(flowkernels.__file__).parent


@pytest.fixture
def library() -> Path:
    path = _extension.status().cpu_library
    if path is None:
        if isinstance(_extension.status().cpu_error, _extension.NotBuiltError):
            pytest.skip(_extension.status().reason)
        pytest.fail(_extension.status().reason)
    return path


def python(code: str, folder: Path, **environment: str) -> str:
    """What `code` prints in a new process that imports flowkernels from `folder`."""
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder), **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch) -> Path:
    """An empty folder that stands for the installed package."""
    monkeypatch.setattr(_extension, "_FOLDER", tmp_path)
    return tmp_path


def status_of_folder() -> _extension.Status:
    return _extension.load.__wrapped__()  # past the cache, which holds this process's own


def symbols(library: Path, which: str) -> list[str]:
    """Names as the linker knows them, with the version of those that have one."""
    if shutil.which("nm") is None:
        pytest.skip("nm is not installed")
    listing = subprocess.run(["nm", "-D", which, library], capture_output=True, text=True, check=True).stdout
    return [re.sub(r"^[0-9a-f ]*[a-zA-Z] ", "", line) for line in listing.splitlines()]


# the C and C++ runtimes version their symbols; torch's stable ABI is C functions with these prefixes
STABLE = re.compile(r"\w+@(GLIBC|GLIBCXX|CXXABI|GCC)_[\d.]+|(aoti_)?torch_[a-z0-9_]+|__gmon_start__|_ITM_\w+|__cxa_finalize")


def test_uses_only_the_stable_abi(library):
    undefined = symbols(library, "--undefined-only")
    assert "torch_call_dispatcher" in undefined  # the listing is not empty for another reason
    assert [name for name in undefined if not STABLE.fullmatch(name)] == []
    assert not STABLE.fullmatch("_ZN2at4_ops5addmm4callERKNS_6TensorE") and not STABLE.fullmatch("PyObject_Call")


def test_exports_nothing_of_its_own(library):
    assert not [name for name in symbols(library, "--defined-only") if "flowkernels" in name]


def test_file_name_carries_no_python(library):
    assert library.name == "_C_cpu.so"


def test_build_info(library):
    about = _extension.build_info()
    assert about["torch stable ABI"] == "2.11"
    assert about["compiler"]
    used, hardware = about["instruction set used"], about["instruction set of this CPU"]
    assert used == os.environ.get("FLOWKERNELS_ISA", hardware)
    assert hardware == "none" or hardware in about["instruction sets compiled in"].split()


def test_instruction_set_chosen_by_hand(library):
    code = "from flowkernels import _extension; print(_extension.build_info()['instruction set used'])"
    hardware = _extension.build_info()["instruction set of this CPU"]
    lesser = "avx2" if hardware == "avx512" else hardware
    assert python(code, PACKAGE.parent, FLOWKERNELS_ISA=lesser) == lesser
    assert hardware in python(code, PACKAGE.parent, FLOWKERNELS_ISA="sse9")  # the error, which names what there is
    caught = (
        "import warnings\nwith warnings.catch_warnings(record=True) as said:\n    import flowkernels\nprint(*(w.message for w in said))"
    )
    assert "FLOWKERNELS_ISA must name an instruction set that this machine has" in python(caught, PACKAGE.parent, FLOWKERNELS_ISA="sse9")
    assert not python(caught, PACKAGE.parent, FLOWKERNELS_ISA=lesser)


def test_loads_once_and_names_its_file(library):
    assert _extension.load() is _extension.load() is _extension.status()
    assert library.is_file()


def test_has_kernel_does_not_count_the_reference():
    probe = torch.library.Library("flowkernels", "FRAGMENT")
    probe.define("_probe(Tensor x) -> Tensor")
    probe.impl("_probe", lambda x: x, "CompositeExplicitAutograd")
    assert not _extension.has_kernel("_probe", "CPU")
    assert "_probe has no compiled CUDA kernel" in (_extension.Status(None, None, None, None).why_not("_probe", "CUDA") or "")
    probe.impl("_probe", lambda x: x, "CPU")
    assert _extension.has_kernel("_probe", "CPU")


def test_works_without_a_library(tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "flowkernels", ignore=shutil.ignore_patterns("*.so", "_build.json", "__pycache__"))
    code = (
        "import flowkernels; s = flowkernels._extension.status(); print(s.cpu_library, s.cuda_library, s.cpu_error, sep='|');"
        "from flowkernels import info; assert 'was not built' in info.report()"
    )
    assert python(code, tmp_path) == "None|None|the CPU library was not built: pip install --no-build-isolation ."


def test_says_why_a_library_was_left_out(folder):
    (folder / "_build.json").write_text(json.dumps({"cpu": "no time", "cuda": "no card"}))
    status = status_of_folder()
    assert status.reason == "the CPU library was not built: no time; the CUDA library was not built: no card"
    assert isinstance(status.cpu_error, _extension.NotBuiltError)


def test_says_why_a_library_does_not_load(folder):
    (folder / "_C_cpu.so").write_bytes(b"not a library")
    status = status_of_folder()
    assert status.cpu_library is None and isinstance(status.cpu_error, _extension.CannotLoadError)
    message = str(status.cpu_error)
    assert "does not load: " in message and "_C_cpu.so" in message and f"this is torch {torch.__version__}" in message
    assert "--force-reinstall" in message and "\n" not in message


def test_says_when_torch_is_too_old(folder, monkeypatch):
    (folder / "_C_cpu.so").write_bytes(b"not a library")
    monkeypatch.setattr(torch, "__version__", "2.10.1+cpu")
    assert str(status_of_folder().cpu_error) == "the CPU library needs torch 2.11 or newer; this is 2.10.1+cpu"


@pytest.mark.parametrize(
    ("archs", "capability", "runs"),
    [
        ("8.0;9.0+PTX", (8, 0), True),
        ("8.0;9.0+PTX", (8, 9), True),
        ("8.0;9.0+PTX", (12, 0), True),
        ("8.0;9.0+PTX", (7, 5), False),
        ("8.0 9.0", (10, 0), False),
        ("9.0a", (9, 0), True),
        ("9.0a+PTX", (10, 0), False),
        ("8.6", (8, 0), False),
        ("Hopper", (7, 0), True),
    ],
)
def test_which_gpus_a_build_runs_on(archs, capability, runs):
    assert _extension._runs_on(archs, capability) is runs


@pytest.fixture
def other_gpu(monkeypatch):
    """A second GPU, too old for the library; nothing of it is real but the questions that are asked."""
    monkeypatch.setattr(_extension, "unserved_gpus", {})
    monkeypatch.setattr(_extension, "build_record", lambda: {"arch_list": "8.0;9.0+PTX"})
    monkeypatch.setattr(_extension, "status", lambda: _extension.Status(None, Path("_C_cuda.so"), None, None))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: [(9, 0), (7, 5)][index])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"card {index}")


def test_a_gpu_that_the_library_was_not_built_for_gets_the_reference(other_gpu, monkeypatch):
    probe = torch.library.Library("flowkernels", "FRAGMENT")
    probe.define("_gpu_probe(Tensor x) -> Tensor")
    probe.impl("_gpu_probe", lambda x: x + 1, "CompositeExplicitAutograd")
    probe.impl("_gpu_probe", lambda x: x + 2, "CUDA")
    monkeypatch.setattr(_extension, "cuda_ops", lambda: ["_gpu_probe"])
    with pytest.warns(UserWarning) as said:
        _backend._look_at_gpus()
    (warning,) = said
    assert "built for 8.0;9.0+PTX and cuda:1, card 1, is 7.5; it needs 8.0 or newer" in str(warning.message)
    assert list(_extension.unserved_gpus) == [1]
    kernel, x = torch.library.get_kernel("flowkernels::_gpu_probe", "CUDA"), torch.zeros(1)
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    assert kernel.call_boxed(keys, x).item() == 2  # as on cuda:0
    _extension.unserved_gpus[x.device.index] = "too old"
    assert kernel.call_boxed(keys, x).item() == 1
    with flowkernels.backend("cuda"), pytest.raises(RuntimeError, match="'cuda' was chosen, but .*cuda:1, card 1, is 7.5"):
        monkeypatch.setattr(_extension.Status, "why_not", lambda *_: None)
        _backend.wants_reference("_gpu_probe", torch.device("cuda", 1))


def test_a_library_that_does_not_load_says_so_when_cuda_is_used(monkeypatch):
    error = _extension.CannotLoadError("the CUDA library does not load: libcudart.so.99; build it again")
    monkeypatch.setattr(_extension, "status", lambda: _extension.Status(None, None, None, error))
    waiting = []
    monkeypatch.setattr(_backend, "when_cuda_starts", waiting.append)
    _backend.look_at_gpus_later()
    with pytest.warns(UserWarning, match=r"flowkernels: the CUDA library does not load: libcudart.so.99; .* the reference serves"):
        waiting.pop()()


def test_import_is_quick_and_touches_nothing():
    heavy = ("triton", "sklearn", "matplotlib", "nflows", "torch._dynamo")
    code = (
        "import sys, time, torch; start = time.perf_counter(); import flowkernels; print(time.perf_counter() - start);"
        f"print(torch.cuda.is_initialized(), *[name for name in {heavy} if name in sys.modules])"
    )
    for _ in range(4):  # the first may have to compile our sources; others may be using the machine: one quick import is proof enough
        seconds, touched = python(code, PACKAGE.parent, PYTHONDONTWRITEBYTECODE="").splitlines()
        assert touched == "False"
        if float(seconds) < 0.2:
            return
    pytest.fail(f"import flowkernels took {seconds} s beyond import torch")


def test_submodules_are_imported_when_asked_for():
    code = (
        "import sys, flowkernels as fk; print({'data', 'integrations', 'training'} <= {*dir(fk)}, 'flowkernels.training' in sys.modules);"
        "print(fk.training.log_normalizer.__name__, fk.integrations.from_nflows.__name__, fk.data.load_table.__name__);"
        "print(hasattr(fk, 'no_such'))"
    )
    assert python(code, PACKAGE.parent).splitlines() == ["True False", "log_normalizer from_nflows load_table", "False"]


def test_report_names_every_op_and_device():
    text = info.report()
    for name in ("flowkernels", "python", "torch", "triton", "CPU library", "CUDA library", "GPU"):
        assert re.search(rf"^{name}", text, re.MULTILINE), name
    for op in info.OPS:
        for device in ("CPU", "CUDA"):
            (row,) = re.findall(rf"^{op} +{device} +(.*)$", text, re.MULTILINE)
            served, _, why_not = row.partition(" ")
            assert served in ("cpp", "cuda", "triton", "reference")
            assert (served == "reference") == bool(why_not.strip())


def test_ops_for_cpu_alone_are_those_without_a_cuda_kernel():
    sources = (Path(__file__).parents[1] / "csrc" / "cuda").glob("*.cu")
    compiled = {op for source in sources for op in re.findall(r'm\.impl\("(\w+)"', source.read_text())}
    assert set(info.OPS) - compiled - set(_triton.ops()) == set(_extension.CPU_ALONE)
    assert re.search(r"^conv_net +CUDA +reference +conv_net has a kernel for CPU alone$", info.report(), re.MULTILINE)
