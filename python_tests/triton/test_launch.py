"""Launches from plans: they are those that Triton itself would make. Where there is no GPU, kernels are compiled and a driver is played."""

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from flowkernels import _launch
from flowkernels._launch import Launch, Plans
from flowkernels.ops import channel_affine, coupling, masked_linear
from python_tests.triton import launch_probe
from python_tests.triton.device import randn

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

# Triton's interpreter replaces members of these, and leaves them so where a kernel calls one of Triton's own functions, as tl.sum: what is
# compiled later in this process would run into them. Kept before any test runs.
LANGUAGE = [(part, dict(vars(part))) for part in (tl, tl.math, tl.core, tl.core.tensor, tl.core.tensor_descriptor_base, tl.core.dtype)]


@pytest.fixture(autouse=True)
def language() -> None:
    for part, members in LANGUAGE:
        for name in [name for name in vars(part) if name not in members]:
            delattr(part, name)
        for name, member in members.items():
            if vars(part).get(name) is not member:
                setattr(part, name, member)


class Driver:
    """Where Triton looks for a GPU: keeps every launch, and what was compiled for it."""

    def __init__(self) -> None:
        self.launches: list[tuple] = []
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": 1 << 17}, load_binary=lambda *_: (1, 2, 32, 0, 1024)
        )

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return -1  # that of tensors on the CPU

    def get_current_stream(self, device: int) -> int:
        return 7

    def launcher_cls(self, source, metadata):
        def launch(x, y, z, stream, function, packed, launch_metadata, enter, leave, *args) -> None:
            values = tuple(a.data_ptr() if isinstance(a, torch.Tensor) else 0 if a is None else a for a in args)
            self.launches.append(((x, y, z), stream, function, packed, source.signature, source.attrs, source.constants, values))

        return launch


@pytest.fixture
def driver() -> Iterator[Driver]:
    before = triton.runtime.driver._active
    driver = Driver()
    triton.runtime.driver.set_active(driver)
    yield driver
    triton.runtime.driver.set_active(before)


@pytest.fixture
def runs(monkeypatch) -> list:
    """An entry for each launch that Triton made itself."""
    runs, run = [], JITFunction.run
    monkeypatch.setattr(JITFunction, "run", lambda self, *args, **kwargs: runs.append(self) or run(self, *args, **kwargs))
    return runs


def kernel() -> JITFunction:
    return JITFunction(launch_probe.scaled, do_not_specialize=["B"])


def launch_of(kernel, n=64, strides=(1, 16), gap=3) -> Launch:
    return Launch(kernel, n, strides, gap, FACTOR=2.0, BLOCK=16, num_warps=1)


def tensors(dtype=torch.float32, at=(0, 0, 0), other=True) -> list[torch.Tensor | None]:
    memory = torch.zeros(64, dtype=dtype)
    assert memory.data_ptr() % 16 == 0
    return [memory[i:] if k < 2 or other else None for k, i in enumerate(at)]


def test_a_launch_is_what_triton_would_make_of_it(driver, runs):
    probe = kernel()
    for n, strides, gap in [(64, (1, 16), 3), (1, (3, 1), 16), (48, (0, 5), 1)]:
        for dtype, other in [(torch.float32, True), (torch.float64, True), (torch.float32, False)]:
            launch = launch_of(probe, n, strides, gap)
            for at in [(0, 0, 0), (4, 8, 0), (1, 0, 0), (0, 0, 3), (1, 2, 3)]:
                given = tensors(dtype, at, other)
                launch((5, 1), given, 1)
                for batch in (16, 7):  # aligned or not: the batch is not specialized
                    runs.clear()
                    launch((batch, 1), given, batch)
                    assert not runs
                    got = driver.launches[-1]
                    probe[batch, 1](*given, batch, n, strides, gap, FACTOR=2.0, BLOCK=16, num_warps=1)
                    assert runs and got == driver.launches[-1]


def test_alignment_and_constants_choose_what_is_compiled(driver):
    def compiled(at=(0, 0, 0), **constants) -> tuple:
        launch = launch_of(kernel(), **constants)
        for _ in range(2):
            launch((1, 1), tensors(at=at), 4)
        assert driver.launches[-1] == driver.launches[-2][:-1] + driver.launches[-1][-1:]
        return driver.launches[-1][4:6]

    aligned = compiled()
    assert compiled(at=(4, 4, 8)) == aligned
    assert compiled(at=(1, 0, 0)) != aligned
    assert compiled(at=(0, 0, 1)) not in (aligned, compiled(at=(1, 0, 0)))
    assert compiled(n=32) == aligned
    for other in ({"n": 33}, {"n": 1}, {"strides": (2, 16)}, {"strides": (1, 15)}, {"gap": 16}, {"gap": 1}):
        assert compiled(**other) != aligned


def test_a_launch_that_moves_between_alignments_keeps_them_apart(driver, runs):
    launch = launch_of(kernel())
    places = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 0), (1, 0, 0)]
    for at in places:
        launch((1, 1), tensors(at=at), 4)
    assert len(runs) == 3
    seen = [entry[5] for entry in driver.launches]
    assert seen[0] == seen[3] and seen[1] == seen[4] and seen[0] != seen[1] != seen[2]


def _hooked(monkeypatch):
    monkeypatch.setattr(triton.knobs.runtime.launch_enter_hook, "calls", [lambda metadata: None])


def _hooked_as_in_earlier_versions(monkeypatch):
    monkeypatch.setattr(triton.knobs.runtime, "launch_exit_hook", lambda metadata: None)


def _debugged(monkeypatch):
    monkeypatch.setattr(triton.knobs.runtime, "debug", True)


def _of_an_unknown_version(monkeypatch):
    monkeypatch.setattr(_launch, "_KNOWN", False)


@pytest.mark.parametrize("how", [_hooked, _hooked_as_in_earlier_versions, _debugged, _of_an_unknown_version], ids=lambda f: f.__name__)
def test_what_is_not_known_is_left_to_triton(driver, runs, monkeypatch, how):
    launch = launch_of(kernel())
    with monkeypatch.context() as changed:
        how(changed)
        for _ in range(3):
            launch((1, 1), tensors(), 4)
        assert len(runs) == len(driver.launches) == 3
    for _ in range(3):
        launch((1, 1), tensors(), 4)
    assert len(runs) == 4 and len(driver.launches) == 6  # once to prepare what follows


@pytest.mark.parametrize("how", [_hooked, _hooked_as_in_earlier_versions, _debugged], ids=lambda f: f.__name__)
def test_a_launch_that_was_prepared_is_left_to_triton_too(driver, runs, monkeypatch, how):
    launch = launch_of(kernel())
    launch((1, 1), tensors(), 4)
    how(monkeypatch)
    for _ in range(2):
        launch((1, 1), tensors(), 4)
    assert len(runs) == 3


def test_integers_beyond_32_bits_are_left_to_triton(driver, runs):
    launch = launch_of(kernel())
    launch((1, 1), tensors(), 4)
    for _ in range(2):
        launch((1, 1), tensors(), 1 << 31)
    launch((1, 1), tensors(), (1 << 31) - 1)
    assert len(runs) == 3
    assert [entry[4]["B"] for entry in driver.launches] == ["i32", "i64", "i64", "i32"]


def test_the_interpreter_is_called_as_it_is():
    calls = []
    interpreted = {(3, 1): lambda *args, **options: calls.append((args, options))}
    launch = Launch(interpreted, 8, FACTOR=2.0)
    x = torch.zeros(4)
    for _ in range(2):
        launch((3, 1), (x, None), 5)
    assert len(calls) == 2 and calls[0][0][0] is x and calls[0][0][1:] == (None, 5, 8) and calls[0][1] == {"FACTOR": 2.0}


def test_plans_are_bounded(monkeypatch):
    monkeypatch.setattr(_launch, "_MOST_PLANS", 3)
    plans = Plans()
    for key in range(10):
        assert plans.add(key, str(key)) == plans.get(key) == str(key)
        assert len(plans) <= 3


def run_ops(batch: int, at: int = 0, layout=lambda t: t, sites=(4, 8)) -> list[torch.Tensor]:
    """Forward and backward of every op with plans; `at` moves tensors off their alignment."""
    move = lambda t: torch.cat([t.new_zeros(at), t.flatten()])[at:].view_as(t)
    x, net = (layout(move(t)) for t in randn((batch, 6, *sites), (batch, 6, *sites), dtype=torch.float32))
    flat, bias, log_scale, weight = (move(t) for t in randn((batch, 16), (24,), (6,), (16, 24), dtype=torch.float32))
    visible = torch.arange(24, device=x.device, dtype=torch.int32).clamp(max=16)
    leaves = [t.detach().requires_grad_() for t in (x, net, flat, bias, log_scale, weight)]
    x, net, flat, bias, log_scale, weight = leaves
    outputs = [*coupling(x, *net.chunk(2, 1)), *channel_affine(x, None, log_scale), masked_linear(flat, weight, bias, visible)]
    gradients = torch.autograd.grad(outputs, leaves, [torch.ones_like(t) for t in outputs])
    return [t.detach() for t in (*outputs, *gradients)]


def test_the_batch_makes_no_plans():
    from flowkernels.ops.channel_affine import kernels as channel_affine_kernels
    from flowkernels.ops.coupling import kernels as coupling_kernels

    rooms = [getattr(m, name) for m in (coupling_kernels, channel_affine_kernels) for name in ("_forward_plans", "_backward_plans")]
    run_ops(2)
    before = [len(plans) for plans in rooms]
    for batch in (3, 16, 33):
        run_ops(batch)
    assert [len(plans) for plans in rooms] == before and min(before) > 0


LAYOUTS = {
    "contiguous": lambda t: t,
    "channels last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "transposed sites": lambda t: t.mT.contiguous().mT,
}


@pytest.mark.gpu
@pytest.mark.parametrize("sites", [(4, 8), (5, 7), (40, 72)], ids=str)  # the last has several segments
@pytest.mark.parametrize("layout", LAYOUTS)
def test_prepared_launches_have_the_bits_of_tritons_own(layout, sites, monkeypatch):
    cases = [(batch, at) for at in (0, 1, 4) for batch in (5, 64, 1, 5)]
    with monkeypatch.context() as ordinary:
        ordinary.setattr(_launch.Launch, "__call__", lambda self, grid, tensors, *varying: self._ordinarily(grid, tensors, varying))
        want = [run_ops(batch, at, LAYOUTS[layout], sites) for batch, at in cases]
    for _ in range(2):
        for (batch, at), expected in zip(cases, want, strict=True):
            assert all(map(torch.equal, run_ops(batch, at, LAYOUTS[layout], sites), expected)), (batch, at)


@pytest.mark.gpu
def test_prepared_launches_go_into_a_graph_on_its_stream():
    x, net = randn((8, 6, 4, 8), (8, 6, 4, 8), dtype=torch.float32)
    step = lambda: coupling(x, *net.chunk(2, 1))
    with torch.no_grad():
        step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = step()
        x.copy_(x.flip(0))
        graph.replay()
        assert all(map(torch.equal, outputs, step()))
