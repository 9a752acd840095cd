import pytest
import torch

from flowkernels import ScaleMap, backend
from flowkernels.ops import Form, Part, coupling
from flowkernels.ops.coupling.reference import Coupling, coupling_reference
from python_tests.battery import Example, OpBattery
from python_tests.triton.device import assert_rounded, randn

pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy, in the interpreter

PARTS = [part.name.lower() for part in Part]
FORMS = [form.name.lower() for form in Form]
LAYOUTS = {
    "contiguous": lambda t: t,
    "channels last": lambda t: t.transpose(1, -1).contiguous().transpose(1, -1),
    "transposed sites": lambda t: t.mT.contiguous().mT,
    "sliced": lambda t: torch.cat([t, t], -1)[..., : t.shape[-1]],
    "batch last": lambda t: t.movedim(0, -1).contiguous().movedim(-1, 0),
    "expanded": lambda t: t[:1].expand_as(t),
}


def inputs(shape, part, *, learned=0, dtype=torch.float64):
    """x, shift, raw scale and, if learned, the scale parameter's values."""
    part = Part[part.upper()]
    net = shape if part.is_checkerboard else (shape[0], part.count(shape[1]), *shape[2:])
    tensors = randn(shape, net, net, dtype=dtype)
    wide = torch.promote_types(dtype, torch.float32)
    return [*tensors, *randn((learned,), dtype=wide, seed=1)] if learned else tensors


def run(tensors, **options):
    """y, log-determinant, and the gradients of a weighted sum of both."""
    tensors = [t.detach().requires_grad_() for t in tensors]
    x, shift, raw_scale, parameter = (*tensors, None, None)[:4]
    y, logabsdet = coupling(x, shift, raw_scale, scale_parameter=parameter, **options)
    outputs = [t for t in (y, logabsdet) if t.requires_grad]
    weights = [(torch.arange(t.numel(), device=t.device) % 5 - 2).view_as(t).to(t.dtype) for t in outputs]  # exact in every dtype
    return y.detach(), logabsdet.detach(), *torch.autograd.grad(outputs, tensors, weights)


def assert_equals_reference(tensors, **options):
    got = run(tensors, **options)
    with backend("reference"):
        want = run(tensors, **options)
    for g, w in zip(got, want, strict=True):
        assert g.dtype == w.dtype
        torch.testing.assert_close(g, w, rtol=1e-11, atol=1e-11)


def example(*shape, part="second_half", scale=None, form="scale_shift", inverse=False, learned=0):
    def make(batch, dtype):
        tensors = inputs((batch, *shape), part, learned=learned, dtype=dtype)
        map_ = ScaleMap.exp_tanh(1.0) if learned else scale or ScaleMap.softclip()
        options = Coupling(Part[part.upper()], map_, Form[form.upper()], inverse)
        parameter = lambda p: p[0] if p else None
        return Example(
            tensors[:3],
            tensors[3:],
            lambda r, p: coupling(*r, part=part, scale=map_, form=form, scale_parameter=parameter(p), inverse=inverse),
            lambda r, p: coupling_reference(*r, parameter(p), options),
            lambda r, p: (*r, parameter(p), int(options.part), int(map_.kind), *map_.packed, int(options.form), inverse),
            transform=True,
        )

    return make


class TestCoupling(OpBattery):
    bare_op = torch.ops.flowkernels.coupling.default
    cases = {
        "images, learned, inverse": example(3, 2, 2, part="checkerboard_odd", learned=3, form="shift_scale", inverse=True),
    }


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("part", PARTS)
def test_every_part_form_and_direction(part, form):
    floor, limit = ScaleMap.sigmoid(2.0, 1e-3), ScaleMap.exp_half(0.5)  # limited, 1 / sigma is not undone: no "output"
    for inverse, keep, scale in [
        (False, "input", limit),
        (False, "input", None),
        (False, "output", floor),
        (True, "input", limit),
        (True, "input", floor),
        (True, "output", None),
    ]:
        tensors = inputs((2, 3, 2, 3), part, learned=(0 if scale else 1))
        assert_equals_reference(tensors, part=part, form=form, scale=scale, inverse=inverse, keep=keep)


# a tile has 1024 elements, and a segment 8 tiles at most
@pytest.mark.parametrize(
    "shape", [(600, 3), (2, 2100), (2, 17, 7), (1, 3, 33, 65), (2, 40, 5, 6), (2, 5, 2, 3, 4), (0, 4), (0, 2, 2, 2)], ids=str
)
def test_sizes_beyond_a_tile(shape):
    for part in ("second_half", "odd", "checkerboard_even"):
        if part != "checkerboard_even" or len(shape) == 4:
            channels = Part[part.upper()].count(shape[1])
            assert_equals_reference(inputs(shape, part, learned=channels), part=part)
    assert_equals_reference(inputs(shape, "odd")[:2], part="odd")  # additive


def test_segments_are_summed_in_an_order_of_their_own():
    tensors = inputs((3, 2, 96, 96), "second_half", dtype=torch.float32)
    with torch.no_grad():
        whole = coupling(*tensors)[1]
        assert torch.equal(whole[1:2], coupling(*(t[1:2] for t in tensors))[1])
        want = coupling_reference(*(t.double() for t in tensors), None, Coupling(Part.SECOND_HALF, ScaleMap.softclip(), Form(0), False))[1]
    torch.testing.assert_close(whole.double(), want, rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(3, 4), (3, 4, 2, 5), (2, 3, 2, 3, 4)], ids=str)
def test_layouts(layout, shape):
    if len(shape) == 2 and layout == "transposed sites":
        pytest.skip("vectors have no sites")
    for part in ("first_half", "even"):
        assert_equals_reference([LAYOUTS[layout](t) for t in inputs(shape, part)], part=part)
    if len(shape) == 4:
        assert_equals_reference([LAYOUTS[layout](t) for t in inputs(shape, "checkerboard_odd")], part="checkerboard_odd")


def test_packings_are_read_through_their_strides():
    x, net = randn((3, 4, 2, 3), (3, 2, 2, 3, 2))
    blocked = net.movedim(-1, 1).flatten(1, 2)
    for shift, raw_scale in (net.unbind(-1), blocked.chunk(2, 1), (net.movedim(-1, 2).flatten(1, 2)[:, i::2] for i in (0, 1))):
        assert_equals_reference([x, shift, raw_scale])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("part", PARTS)
def test_half_precision_is_float32_rounded_once(part, dtype):
    tensors = inputs((3, 4, 2, 3), part, dtype=dtype)
    got, want = run(tensors, part=part), run([t.float() for t in tensors], part=part)
    for g, w in zip(got, want, strict=True):
        assert g.dtype == dtype or torch.equal(g, w)
        assert_rounded(g, w)


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_untouched_sites_and_other_samples_do_not_see_a_bad_value(bad):
    tensors = inputs((3, 2, 4, 4), "checkerboard_even", dtype=torch.float32)
    here = Part.CHECKERBOARD_EVEN.mask(tensors[0])
    clean = run(tensors, part="checkerboard_even")
    got = run([tensors[0], *(torch.where(here, t, bad) for t in tensors[1:])], part="checkerboard_even")
    torch.testing.assert_close(got, clean, rtol=0, atol=0)
    tensors[2][1, 0, 0, 0] = bad
    got = run(tensors, part="checkerboard_even")
    assert not got[0][1].isfinite().all()
    for g, c in zip(got, clean, strict=True):
        torch.testing.assert_close(g[[0, 2]], c[[0, 2]], rtol=0, atol=0)
