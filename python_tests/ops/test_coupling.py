"""Coupling against its reference, autograd's Jacobian and the definition of every scale map, form and part."""

import ctypes
import itertools
import math
import mmap

import pytest
import torch

from flowkernels import ScaleMap, backend
from flowkernels.ops import Form, Part, coupling
from flowkernels.ops.coupling.reference import Coupling, coupling_reference
from python_tests.battery import IMAGE_LAYOUTS, LAYOUTS, Example, OpBattery, assert_as_exact_as_eager, assert_same_bits, with_grad

MAPS = [
    ScaleMap.exp(),
    ScaleMap.exp_half(0.5),
    ScaleMap.exp_clamped(-5.0, 3.0),
    ScaleMap.exp_tanh(2.0, 2.0),
    ScaleMap.exp_atan(2.0),
    ScaleMap.softclip(),
    ScaleMap.sigmoid(bias=2.0),
    ScaleMap.sigmoid(bias=2.0, floor=1e-3),
    ScaleMap.softplus(),
    ScaleMap.softplus(floor=1e-3, ceiling=3.0),
]
FORMS = ["scale_shift", "shift_scale", "divide", "gate"]
PARTS = [part.name.lower() for part in Part]
HALVES = (torch.float16, torch.bfloat16)


def net_shape(shape, part):
    part = Part[part.upper()]
    return shape if part.is_checkerboard else (shape[0], part.count(shape[1]), *shape[2:])


def randn(*shapes, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for shape in shapes]


def example(*shape, part="second_half", scale=None, form="scale_shift", inverse=False, additive=False, learned=0, keep="input"):
    """learned: number of values of the scale parameter."""

    def make(batch, dtype):
        net = net_shape((batch, *shape), part)
        x, shift, s, a = randn((batch, *shape), net, net, (learned,), dtype=dtype, seed=2)
        map_ = ScaleMap.exp_tanh(1.0) if learned else scale or ScaleMap.softclip()
        options = Coupling(Part[part.upper()], map_, Form[form.upper()], inverse)
        parts = lambda rows, parameters: (*rows, *[None] * (3 - len(rows)), parameters[0] if parameters else None)

        def op(rows, parameters):
            x, shift, s, a = parts(rows, parameters)
            return coupling(x, shift, s, part=part, scale=scale, form=form, scale_parameter=a, inverse=inverse, keep=keep)

        def oracle(rows, parameters):
            return coupling_reference(*parts(rows, parameters), options)

        def schema(rows, parameters):
            return (*parts(rows, parameters), int(options.part), int(map_.kind), *map_.packed, int(options.form), inverse)

        return Example([x, shift] + ([] if additive else [s]), [a] if learned else [], op, oracle, schema, transform=True)

    return make


class TestCoupling(OpBattery):
    bare_op = torch.ops.flowkernels.coupling.default
    layouts = LAYOUTS | IMAGE_LAYOUTS
    cases = {
        "vectors": example(8),
        "odd number of features, inverse": example(5, part="first_half", scale=ScaleMap.sigmoid(2.0, 1e-3), inverse=True),
        "two features, additive, inverse": example(2, part="odd", additive=True, inverse=True),
        "images": example(4, 3, 5, scale=ScaleMap.sigmoid(2.0), form="shift_scale", keep="output"),
        "odd channels, learned, inverse": example(5, 2, 3, part="odd", learned=1, form="shift_scale", inverse=True),
        "even channels, divide": example(3, 4, 4, part="even", scale=ScaleMap.exp_half(0.5), form="divide", keep="output"),
        "checkerboard, learned for each channel": example(3, 4, 5, part="checkerboard_odd", learned=3, keep="output"),
        "checkerboard, gate, inverse": example(2, 3, 3, part="checkerboard_even", scale=ScaleMap.softplus(), form="gate", inverse=True),
        "sequences": example(3, 7, scale=ScaleMap.exp_tanh(2.0), form="gate"),
    }


def weighted(outputs):
    return sum((o * torch.linspace(-1, 2, o.numel(), dtype=torch.float64).view_as(o)).sum() for o in outputs)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("part", PARTS)
def test_every_part_form_and_map(part, form, inverse):
    """Values and gradients of both kinds of backward against autograd through the reference, the log-determinant against its Jacobian."""
    for scale, (*shape, keep) in itertools.product([*MAPS, "learned"], [(2, 3, 3, 2, "input"), (2, 4, 2, 4, "output")]):
        learned = 0 if scale != "learned" else net_shape(shape, part)[1] if keep == "input" else 1
        map_ = None if learned else scale
        make = example(*shape[1:], part=part, scale=map_, form=form, inverse=inverse, learned=learned, keep=keep)
        rows, parameters, op, oracle, *_ = make(shape[0], torch.float64)
        inputs = [t.requires_grad_() for t in (*rows, *parameters)]
        got, want = op(inputs[:3], inputs[3:]), oracle(inputs[:3], inputs[3:])
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
        gradients = [torch.autograd.grad(weighted(outputs), inputs) for outputs in (got, want)]
        torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-10)
        if keep == "input":
            f = lambda x, r=rows, p=parameters, o=op: o([x.view(1, *r[0].shape[1:]), r[1][:1], r[2][:1]], p)[0].flatten()
            with torch.no_grad():
                jacobian = torch.autograd.functional.jacobian(f, rows[0][0].flatten())
            torch.testing.assert_close(got[1][0].detach(), torch.linalg.slogdet(jacobian)[1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize(
    "shape",
    [
        (3, 1300),
        (2, 2600),
        (700, 3),
        (2, 3, 33, 33),
        (1, 2, 3, 2100),
        (2, 5, 2, 3, 4),
        (1, 3, 8, 129),
        (90, 3, 2, 4),
        (70, 2, 6),
        (3, 6, 200),
        (3, 8, 8, 10),
    ],
)
def test_sizes_beyond_one_block(shape, part):
    """Rows, lines and groups of samples that are cut, and small samples in one block: the same bits in every layout, both ways."""
    if part.startswith("checkerboard") and len(shape) != 4:
        pytest.skip("a checkerboard is of images")
    learned = 1 if shape[1] % 2 else net_shape(shape, part)[1]
    rows, parameters, op, oracle, *_ = example(*shape[1:], part=part, learned=learned)(shape[0], torch.float64)
    first = None
    for layout in (lambda t: t, *IMAGE_LAYOUTS.values()):
        inputs = [layout(t.detach()).detach().requires_grad_() for t in rows] + [t.detach().requires_grad_() for t in parameters]
        outputs = op(inputs[:3], inputs[3:])
        gradients = torch.autograd.grad(weighted(outputs), inputs)
        if first is None:
            want = oracle(inputs[:3], inputs[3:])
            torch.testing.assert_close(outputs, want, rtol=1e-11, atol=1e-11)
            torch.testing.assert_close(gradients, torch.autograd.grad(weighted(want), inputs), rtol=1e-10, atol=1e-10)
            first = (*outputs, *gradients)
        assert_same_bits((*outputs, *gradients), first)


def test_tensors_many_times_the_cache():
    # all samples are one, so that only the results take memory; 65 sites end lines and vectors in their midst
    rows, _, op, *_ = example(16, 65, 65)(1, torch.float32)

    def results(rows):
        inputs = with_grad(rows)
        outputs = op(inputs, [])
        return *outputs, *torch.autograd.grad(outputs, inputs, [o.detach() for o in outputs])

    n = 2**27 // rows[0].nbytes + 1
    want = results(rows)
    for g, w in zip(results([t.expand(n, -1, -1, -1) for t in rows]), want, strict=True):
        assert torch.equal(g, w.expand_as(g))


def test_threads_do_not_change_a_bit():
    threads = torch.get_num_threads()
    cases = [
        ((5, 4, 64, 64), "odd"),
        ((1, 3, 160, 160), "checkerboard_even"),
        ((9000, 8), "second_half"),
        ((1, 2, 300, 300), "second_half"),
    ]
    for shape, part in cases:
        rows, parameters, op, *_ = example(*shape[1:], part=part, learned=1)(shape[0], torch.float32)
        results = []
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            inputs = [t.detach().requires_grad_() for t in (*rows, *parameters)]
            outputs = op(inputs[:3], inputs[3:])
            results.append((*outputs, *torch.autograd.grad(sum(o.square().sum() for o in outputs), inputs)))
        torch.set_num_threads(threads)
        assert_same_bits(results[1], results[0])
        assert_same_bits(results[2], results[0])


# sigma and log sigma at s = -100, 0 and 100, from their definitions
L3 = math.log(1e-3)
KNOWN = [
    (ScaleMap.exp(), lambda s: s),
    (ScaleMap.exp_half(200.0), lambda s: s / 2),
    (ScaleMap.exp_clamped(-5.0, 3.0), lambda s: min(max(s, -5.0), 3.0)),
    (ScaleMap.exp_tanh(2.0, 2.0), lambda s: 2 * math.tanh(s / 2)),
    (ScaleMap.exp_atan(2.0), lambda s: 2 * 0.636 * math.atan(s)),
    (ScaleMap.softclip(), lambda s: s / (1 + abs(s / L3))),
    (ScaleMap.sigmoid(bias=2.0), lambda s: min(s + 2, 0) - math.log1p(math.exp(-abs(s + 2)))),
    (ScaleMap.sigmoid(bias=2.0, floor=1e-3), lambda s: math.log(1e-3 + 1 / (1 + math.exp(-(s + 2))))),
    (ScaleMap.softplus(), lambda s: math.log(math.log1p(math.exp(s)))),
    (ScaleMap.softplus(floor=1e-3, ceiling=3.0), lambda s: min(math.log(1e-3 + math.log1p(math.exp(s))), math.log(3.0))),
]


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("form", ["scale_shift", "divide"])
@pytest.mark.parametrize(("scale", "log_sigma"), KNOWN, ids=lambda v: repr(v) if isinstance(v, ScaleMap) else "")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_known_answers_over_the_whole_range(scale, log_sigma, form, inverse, dtype):
    """x = 1, shift = 0: y is sigma or its reciprocal, to the last places, or infinity where that overflows, with a finite log."""
    s = torch.cat([torch.linspace(-100, 100, 401), torch.tensor([-30.0, -1e-3, 0.0, 1e-3])]).to(dtype)
    log = torch.tensor([log_sigma(v) for v in s.tolist()], dtype=torch.float64)
    log = -log if (form == "divide") != inverse else log
    x, shift = torch.ones(len(s), 2, dtype=dtype), torch.zeros(len(s), 1, dtype=dtype)
    y, logabsdet = coupling(x, shift, s[:, None], scale=scale, form=form, inverse=inverse)
    assert logabsdet.isfinite().all() and torch.equal(y[:, 0], x[:, 0])
    unit = torch.finfo(dtype).eps
    assert ((logabsdet.double() - log).abs() <= 6 * unit * (1 + log.abs())).all()
    value = torch.exp(log)
    overflows = value > torch.finfo(dtype).max
    assert y[overflows, 1].isinf().all()
    normal = ~overflows & (value > 2 * torch.finfo(dtype).tiny)
    error = (y[:, 1].double() - value).abs()
    assert (error <= 8 * unit * (1 + log.abs()) * value)[normal].all()
    assert (error <= torch.finfo(dtype).tiny)[~normal & ~overflows].all()


@pytest.mark.parametrize("scale", [*MAPS, "learned"], ids=repr)
@pytest.mark.parametrize("inverse", [False, True])
def test_error_in_float32_is_that_of_eager_float32(scale, inverse):
    learned = scale == "learned"
    make = example(4, 32, 33, scale=None if learned else scale, inverse=inverse, learned=2 if learned else 0)
    assert_as_exact_as_eager(make(32, torch.float32))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", list(TestCoupling.cases))
def test_half_precision_is_float32_rounded_once(dtype, name):
    for layout in (lambda t: t, IMAGE_LAYOUTS["channels last"], IMAGE_LAYOUTS["interleaved"]):
        rows, parameters, op, *_ = TestCoupling.cases[name](19, torch.float32)
        rows = [layout(t.to(dtype)).detach().requires_grad_() for t in rows]
        wide = [t.detach().float().requires_grad_() for t in rows]
        y, logabsdet = op(rows, parameters)
        want, want_logabsdet = op(wide, parameters)
        assert y.dtype == dtype and torch.equal(y, want.to(dtype))
        assert logabsdet.dtype == torch.float32 and torch.equal(logabsdet, want_logabsdet)
        if (
            "output" not in name
            and len(rows) == 3
            and not {"images", "even channels, divide", "checkerboard, learned for each channel"} & {name}
        ):
            cotangents = [torch.ones_like(y), torch.ones_like(logabsdet)]
            got = torch.autograd.grad([y, logabsdet], rows, cotangents)
            for g, w in zip(got, torch.autograd.grad([want, want_logabsdet], wide, [c.float() for c in cotangents]), strict=True):
                assert g.dtype == dtype and torch.equal(g, w.to(dtype))


def test_special_half_values_survive():
    x = torch.tensor([0.0, -0.0, 1.0, 65504.0, 6e-8, -6.1e-5, math.inf, -math.inf, math.nan, 3.0]).repeat(2, 40)
    for dtype in HALVES:
        y, _ = coupling(x.to(dtype), torch.zeros(2, 200, dtype=dtype))
        torch.testing.assert_close(y, x.to(dtype), rtol=0, atol=0, equal_nan=True)


def test_untouched_sites_are_ignored():
    """Whatever stands in shift and raw scale at the other colour of a checkerboard has no effect and no gradient."""
    rows, _, op, *_ = example(2, 4, 4, part="checkerboard_even")(2, torch.float32)
    mask = Part.CHECKERBOARD_EVEN.mask(rows[0])
    clean = op(rows, [])
    spoilt = [rows[0].clone().requires_grad_(), *(torch.where(mask, t, torch.nan).requires_grad_() for t in rows[1:])]
    for name in ("auto", "reference"):
        with backend(name):
            got = op(spoilt, [])
            gradients = torch.autograd.grad(sum(o.sum() for o in got), spoilt)
        torch.testing.assert_close(got, clean)
        assert all(g.isfinite().all() for g in gradients) and all(g[:, :, ~mask].eq(0).all() for g in gradients[1:])


@pytest.mark.parametrize("part", PARTS)
def test_round_trip(part):
    for scale, form in itertools.product(MAPS, FORMS):
        if scale.kind.name == "EXP_HALF" or (form == "gate" and scale.kind.name != "SIGMOID"):
            continue  # a limited 1 / sigma is no inverse
        rows, _, op, *_ = example(3, 4, 4, part=part, scale=scale, form=form)(3, torch.float64)
        y, logabsdet = op(rows, [])
        x, back = coupling(y, *rows[1:], part=part, scale=scale, form=form, inverse=True)
        torch.testing.assert_close(x, rows[0])
        torch.testing.assert_close(back, -logabsdet)


def test_a_row_alone_has_the_sign_of_its_zero():
    x, zero = torch.randn(3, 2), torch.zeros(3, 1)
    for n in (1, 3):
        logabsdet = coupling(x[:n], zero[:n], zero[:n], scale=ScaleMap.exp(), inverse=True)[1]
        assert_same_bits((logabsdet,), (torch.zeros(n),))


def test_inputs_are_left_alone():
    for make in TestCoupling.cases.values():
        rows, parameters, op, *_ = make(3, torch.float32)
        before = [t.clone() for t in rows]
        y, _ = op(rows, parameters)
        assert all(torch.equal(t, b) for t, b in zip(rows, before, strict=True))
        assert y.untyped_storage().data_ptr() != rows[0].untyped_storage().data_ptr()


def test_channels_last_stays():
    x, net = (t.to(memory_format=torch.channels_last) for t in randn((2, 4, 3, 3), (2, 4, 3, 3)))
    shift, s = net.chunk(2, 1)
    y, _ = coupling(x, shift.requires_grad_(), s)
    assert y.is_contiguous(memory_format=torch.channels_last)
    (dshift,) = torch.autograd.grad(y.sum(), shift)
    assert dshift.is_contiguous(memory_format=torch.channels_last)


def test_every_element_is_written():
    """Memory that held NaN before is taken for the results."""
    for shape, part in itertools.product([(6, 5, 16, 16), (50, 7)], PARTS):
        if part.startswith("checkerboard") and len(shape) != 4:
            continue
        rows, parameters, op, *_ = example(*shape[1:], part=part, learned=1)(shape[0], torch.float32)
        inputs = [t.requires_grad_() for t in (*rows, *parameters)]
        for _ in range(2):
            stale = [torch.full_like(t, torch.nan) for t in (rows[0], *rows, *rows)]
            del stale
            outputs = op(inputs[:3], inputs[3:])
            assert all(o.isfinite().all() for o in (*outputs, *torch.autograd.grad(sum(o.sum() for o in outputs), inputs)))


@pytest.fixture
def before_a_wall():
    """Copies a tensor, strides and all, to where its last element is followed by a page that may not be touched."""
    libc, walls = ctypes.CDLL(None, use_errno=True), []

    def place(t):
        size = 1 + sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True))
        pages = -(-size * t.element_size() // mmap.PAGESIZE)
        memory = mmap.mmap(-1, (pages + 1) * mmap.PAGESIZE)
        wall = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + pages * mmap.PAGESIZE
        assert libc.mprotect(ctypes.c_void_p(wall), ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
        walls.append(wall)
        storage = torch.frombuffer(memory, dtype=t.dtype, count=pages * mmap.PAGESIZE // t.element_size())
        return storage[len(storage) - size :].as_strided(t.shape, t.stride()).copy_(t)

    yield place
    for wall in walls:
        libc.mprotect(ctypes.c_void_p(wall), ctypes.c_size_t(mmap.PAGESIZE), 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("part", PARTS)
def test_nothing_beyond_the_inputs_is_read(before_a_wall, part, dtype):
    for shape in [(3, 2), (5, 7), (2, 19), (2, 3, 3, 5), (3, 2, 4, 6), (2, 4, 2, 18), (1, 2, 5, 33)]:
        if part.startswith("checkerboard") and len(shape) != 4:
            continue
        for layout in (lambda t: t, *IMAGE_LAYOUTS.values()):
            rows, _, op, *_ = example(*shape[1:], part=part)(shape[0], dtype)
            rows = [layout(t) for t in rows]
            assert_same_bits(op([before_a_wall(t) for t in rows], []), op(rows, []))


def test_additive_logabsdet_is_zero_without_a_gradient():
    x, shift = randn((3, 4), (3, 2))
    y, logabsdet = coupling(x.requires_grad_(), shift)
    assert logabsdet.eq(0).all() and not logabsdet.requires_grad and y.requires_grad


@pytest.mark.parametrize("dtype", HALVES)
def test_autocast_keeps_the_dtype_of_x(dtype):
    x, shift, s = randn((3, 4), (3, 2), (3, 2), dtype=torch.float32)
    with torch.autocast("cpu", dtype):
        y, logabsdet = coupling(x, shift.to(dtype), s.to(dtype))
        compiled = torch.compile(lambda *a: coupling(*a), backend="aot_eager", fullgraph=True)(x, shift.to(dtype), s.to(dtype))
    assert y.dtype == logabsdet.dtype == torch.float32
    torch.testing.assert_close((y, logabsdet), coupling(x, shift.to(dtype).float(), s.to(dtype).float()))
    torch.testing.assert_close(compiled, (y, logabsdet))


def test_backend_reference_runs_the_reference():
    rows, parameters, op, oracle, *_ = TestCoupling.cases["images"](4, torch.float32)
    with backend("reference"):
        assert_same_bits(op(rows, parameters), oracle(rows, parameters))
    with backend("cuda"), pytest.raises(RuntimeError, match="'cuda' was chosen, but coupling was called with tensors on cpu"):
        op(rows, parameters)


def test_vmap_over_a_scale_parameter():
    rows, _, op, *_ = example(4, part="even", learned=1)(5, torch.float64)
    values = torch.tensor([[0.3], [-0.5], [1.0]], dtype=torch.float64)
    loss = lambda a: sum(o.square().sum() for o in op(rows, [a]))
    torch.testing.assert_close(torch.func.vmap(loss)(values), torch.stack([loss(a) for a in values]))
    gradients = torch.func.vmap(torch.func.grad(loss))(values)
    torch.testing.assert_close(gradients, torch.stack([torch.func.grad(loss)(a) for a in values]))


class TestBadInput:
    arguments = {"x": torch.zeros(2, 5, 4, 4), "shift": torch.zeros(2, 3, 4, 4), "raw_scale": torch.zeros(2, 3, 4, 4)}

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"x": torch.zeros(2, 5, 4, 4).long()}, "x must be float64, float32, float16 or bfloat16; got torch.int64"),
            ({"x": torch.zeros(2)}, r"x must have shape \[batch, channels, \*sites\] with at least one site; got \[2\]"),
            ({"x": torch.zeros(2, 5, 0, 4)}, r"with at least one site; got \[2, 5, 0, 4\]"),
            (
                {"x": torch.zeros(2, 1, 4, 4)},
                r"x must have at least 2 channels, \[batch, channels, \*sites\], to split; got \[2, 1, 4, 4\]",
            ),
            (
                {"x": torch.zeros(2, 5, 4), "part": "checkerboard_odd"},
                r"\[batch, channels, height, width\] for a checkerboard; got \[2, 5, 4\]",
            ),
            (
                {"shift": torch.zeros(2, 2, 4, 4)},
                r"shift must have shape \[2, 3, 4, 4\], like the transformed part of x; got \[2, 2, 4, 4\]",
            ),
            (
                {"raw_scale": torch.zeros(2, 3, 4)},
                r"raw_scale must have shape \[2, 3, 4, 4\], like the transformed part of x; got \[2, 3, 4\]",
            ),
            ({"part": "odd"}, r"shift must have shape \[2, 2, 4, 4\], like the transformed part of x; got \[2, 3, 4, 4\]"),
            ({"part": "checkerboard_even"}, r"shift must have shape \[2, 5, 4, 4\]"),
            ({"shift": torch.zeros(2, 3, 4, 4).double()}, "shift must be torch.float32 on cpu, like x; got torch.float64 on cpu"),
            (
                {"raw_scale": torch.zeros(2, 3, 4, 4, device="meta")},
                "raw_scale must be torch.float32 on cpu, like x; got torch.float32 on meta",
            ),
            ({"part": "third"}, "part must be one of 'first_half', 'second_half', 'even', 'odd', .*; got 'third'"),
            ({"form": "affine"}, "form must be one of 'scale_shift', 'shift_scale', 'divide', 'gate'; got 'affine'"),
            ({"scale": "exp"}, r"scale must be a ScaleMap, such as ScaleMap.sigmoid\(bias=2.0\); got 'exp'"),
            ({"keep": "both"}, "keep must be 'input' or 'output'; got 'both'"),
            ({"raw_scale": None, "scale": ScaleMap.exp()}, "raw_scale is missing: without it the coupling is additive"),
            ({"raw_scale": None, "form": "gate"}, "raw_scale is missing: form 'gate' needs one"),
            ({"scale_parameter": torch.zeros(2)}, r"scale_parameter must be a scalar or have shape \[3\], .*; got \[2\]"),
            ({"scale_parameter": torch.zeros(3).double()}, "scale_parameter must be torch.float32 on cpu; got torch.float64"),
            (
                {"scale_parameter": torch.zeros(3), "scale": ScaleMap.exp()},
                "scale must be an exp_tanh map with a scale_parameter; got ScaleMap.exp",
            ),
        ],
    )
    def test_is_named(self, change, message):
        with pytest.raises(ValueError, match=message):
            coupling(**(self.arguments | change))

    def test_autocast_excuses_no_integers(self):
        with (
            torch.autocast("cpu", dtype=torch.bfloat16),
            pytest.raises(ValueError, match="shift must be torch.float32 .* got torch.int64"),
        ):
            coupling(**(self.arguments | {"shift": torch.zeros(2, 3, 4, 4).long()}))

    def test_is_refused_by_the_kernel_too(self):
        bare = torch.ops.flowkernels.coupling.default
        x, s = torch.zeros(2, 4), torch.zeros(2, 2)
        for arguments in [(x, s[:1], s), (x, s, s.double()), (x[:, :1], s, s), (x, s, torch.zeros(2, 3))]:
            with pytest.raises(RuntimeError):
                bare(*arguments, None, 1, 0, 0.0, 0.0, 0, False)
        with pytest.raises(RuntimeError, match="unknown part"):
            bare(x, s, s, None, 7, 0, 0.0, 0.0, 0, False)


@pytest.mark.parametrize("part", ["first_half", "second_half", "even", "odd"])
@pytest.mark.parametrize("sites", [(4,), (2, 3)])
def test_views_whose_channels_share_memory(part, sites):
    """Strides of inputs and of gradients that happen to be those of neighbouring channels, where the results have others."""
    size = math.prod(sites)
    overlapping = torch.arange(2.0 * 4 * size).view(2, -1).unfold(1, size, size // 2)[:, :4].unflatten(2, sites)
    shared = {
        "half overlapping": overlapping,
        "one value": torch.tensor(0.5).expand(2, 4, *sites),
        "one channel": torch.randn(2, 1, *sites).expand(2, 4, *sites),
        "as far apart as sites": torch.randn(40).as_strided((2, 4, *sites), (20, 1, *[4] * (len(sites) - 1), 1)),
    }
    raw = torch.randn(2, 2, *sites)
    for x, dy in itertools.product(shared.values(), repeat=2):
        found = []
        for x_, dy_ in ((x, dy), (x.contiguous(), dy.contiguous())):
            x_ = x_.detach().requires_grad_()
            y, logabsdet = coupling(x_, raw, raw, part=part)
            assert y.is_contiguous()
            found.append((y, logabsdet, torch.autograd.grad(y, x_, dy_)[0]))
        assert_same_bits(*found)
