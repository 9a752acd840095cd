import pytest
import torch

from flowkernels import _extension, backend
from flowkernels.ops import slogdet, slogdet_inverse
from flowkernels.ops.lu import LARGEST
from python_tests.battery import Example, OpBattery, assert_same_bits

# lanes across matrices up to 16; panels of 4 columns and whole or partial vectors beyond
SIZES = [1, 2, 3, 7, 8, 12, 15, 16, 17, 18, 19, 20, 24, 33, 48, 65]


def lapack(w):
    """Each matrix alone in float64: torch's batched call has been seen wrong by 42 nats at n=256, float64, after set_num_threads(2)."""
    flat = w.double().reshape(-1, *w.shape[-2:])
    results = [(*torch.linalg.slogdet(m), torch.linalg.inv_ex(m)[0]) for m in flat]
    sign, logabsdet, inverse = (torch.stack(t) if t else flat.new_zeros(0) for t in (list(zip(*results, strict=True)) or [(), (), ()]))
    return sign.view(w.shape[:-2]), logabsdet.view(w.shape[:-2]), inverse.view(w.shape)


def example(n, inverse):
    call = slogdet_inverse if inverse else slogdet
    keep = slice(1, None)  # the sign is an integer in floating form, and has no gradient

    def oracle(rows, _):
        w = rows[0]
        logabsdet = torch.linalg.slogdet(w)[1]
        return (logabsdet, torch.linalg.inv(w)) if inverse else (logabsdet,)

    def make(batch, dtype):
        g = torch.Generator().manual_seed(n)
        # of condition 4 at most: what the oracle itself loses in float64 is counted against us
        rotation = torch.linalg.qr(torch.randn(batch, n, n, generator=g, dtype=torch.float64))[0]
        w = (rotation * torch.linspace(0.5, 2, n, dtype=torch.float64)).to(dtype)
        return Example([w], [], lambda rows, _: call(rows[0])[keep], oracle, lambda rows, _: (rows[0], False))

    return make


class TestSlogdet(OpBattery):
    bare_op = torch.ops.flowkernels.slogdet.default
    cases = {f"n={n}": example(n, False) for n in (1, 12, 21)}


class TestSlogdetInverse(OpBattery):
    bare_op = torch.ops.flowkernels.slogdet_inverse.default
    cases = {f"n={n}": example(n, True) for n in (5, 21)}


def matrices(kind, n, dtype=torch.float64):
    """Three of a kind, [3, n, n]."""
    g = torch.Generator().manual_seed(n)
    random = torch.randn(3, n, n, generator=g, dtype=torch.float64)
    w = {
        "random": lambda: random,
        "orthogonal": lambda: torch.linalg.qr(random)[0],
        "upper": lambda: random.triu() + n * torch.eye(n),
        "lower": lambda: random.tril() + n * torch.eye(n),
        "permutation": lambda: torch.stack([torch.eye(n, dtype=torch.float64)[torch.randperm(n, generator=g)] for _ in range(3)]),
        "tiny diagonal": lambda: random * (1 - (1 - 1e-14) * torch.eye(n, dtype=torch.float64)),
        "badly scaled": lambda: random * torch.logspace(-12, 12, n, dtype=torch.float64),
        "nearly singular": lambda: random @ torch.diag(torch.logspace(0, -5, n, dtype=torch.float64)) @ random.mT,
    }[kind]()
    return w.to(dtype)


KINDS = ["random", "orthogonal", "upper", "lower", "permutation", "tiny diagonal", "badly scaled", "nearly singular"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_is_as_exact_as_lapack(kind, dtype, device="cpu"):
    for n in SIZES:
        w = matrices(kind, n, dtype)
        sign, logabsdet, inverse = (t.cpu() for t in slogdet_inverse(w.to(device)))
        exact_sign, exact_logabsdet, exact_inverse = lapack(w)
        eager_logabsdet, eager_inverse = torch.linalg.slogdet(w)[1], torch.linalg.inv(w)
        eps = torch.finfo(dtype).eps
        # what changing each entry by its rounding error does to the results (Bauer and Skeel); scaling of rows and columns cancels in it
        size, x = w.double().abs(), exact_inverse.abs()
        pull = (x.mT * size).sum((1, 2))
        logs = torch.linalg.lu_factor(w.double())[0].diagonal(dim1=-2, dim2=-1).abs().log().abs().sum(-1)
        allowed = 2 * (eager_logabsdet - exact_logabsdet).abs() + 4 * eps * (1 + pull + logs)
        assert (((logabsdet - exact_logabsdet).abs() <= allowed) | (eps * pull > 0.01)).all(), n
        assert ((sign == exact_sign) | (eps * pull > 0.01)).all(), n
        allowed = 2 * (eager_inverse - exact_inverse).abs() + 8 * eps * (x @ size @ x)
        assert (((inverse - exact_inverse).abs() <= allowed).all((1, 2)) | (eps * pull > 0.01)).all(), n


@pytest.mark.parametrize("n", [12, 48])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_error_is_at_most_twice_that_of_lapack_over_many(n, dtype):
    g = torch.Generator().manual_seed(0)
    w = torch.linalg.qr(torch.randn(200, n, n, generator=g, dtype=torch.float64))[0] * (
        1 + torch.rand(200, 1, n, generator=g, dtype=torch.float64)
    )
    w = w.to(dtype)
    exact = lapack(w)
    if dtype is torch.float64:  # two float64 factorisations: they agree
        for got, want in zip(slogdet_inverse(w), exact, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-13)
        return
    rms = lambda got, want: (got - want).square().mean().sqrt()
    tail = lambda got, want: (got - want).abs().flatten().quantile(0.999)
    got, eager = slogdet_inverse(w), (*torch.linalg.slogdet(w), torch.linalg.inv(w))
    for measure in (rms, tail):
        for i in (1, 2):
            assert measure(got[i], exact[i]) <= 2 * measure(eager[i], exact[i])


@pytest.mark.parametrize("n", [2, 5, 12, 20, 48])
def test_singular_matrices(n):
    g = torch.Generator().manual_seed(n)
    base = torch.randint(-3, 4, (n, n), generator=g).float()
    zero_row, zero_column, equal_rows, zero = base.clone(), base.clone(), base.clone(), torch.zeros(n, n)
    zero_row[n // 2] = 0
    zero_column[:, n // 2] = 0
    equal_rows[:] = base[0]
    w = torch.stack([zero_row, zero_column, equal_rows, zero])
    for call in (slogdet, slogdet_inverse):
        sign, logabsdet, *inverse = call(w)
        assert sign.eq(0).all() and logabsdet.eq(-torch.inf).all()
        assert all(not x.flatten(1).isfinite().all(1).any() for x in inverse)
    w.requires_grad_()
    ours, theirs = (torch.autograd.grad(f(w)[1].sum(), w)[0] for f in (slogdet, torch.linalg.slogdet))
    assert not ours.flatten(1).isfinite().all(1).any() and not theirs.flatten(1).isfinite().all(1).any()


@pytest.mark.parametrize("n", [1, 2, 3, 9, 18])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_non_finite_entries(n, bad):
    g = torch.Generator().manual_seed(n)
    base = torch.randn(n, n, generator=g)
    places = [(i, j) for i in {0, n // 2, n - 1} for j in {0, n // 2, n - 1}]
    w = base.repeat(len(places) + 1, 1, 1)
    for m, (i, j) in enumerate(places):
        w[m, i, j] = bad
    sign, logabsdet = slogdet(w)
    for m in range(len(w)):
        want_sign, want = torch.linalg.slogdet(w[m])
        if bad is torch.nan:
            assert sign[m] == want_sign
            torch.testing.assert_close(logabsdet[m], want, equal_nan=True)
        else:  # inf or NaN, as the order of operations has it
            assert logabsdet[m].isfinite() == want.isfinite()
    assert_same_bits((sign[-1:], logabsdet[-1:]), slogdet(base[None]))


@pytest.mark.parametrize("n", [6, 20])
@pytest.mark.parametrize("inverse", [False, True])
def test_float32_factored_in_float64_is_rounded_once(n, inverse):
    w = matrices("nearly singular", n, torch.float32)
    call = slogdet_inverse if inverse else slogdet
    for got, want in zip(call(w, in_float64=True), call(w.double()), strict=True):
        assert got.dtype == torch.float32 and torch.equal(got, want.float())


@pytest.mark.parametrize("n", [5, 12, 16, 20])
def test_leading_dimensions_and_strides(n):
    g = torch.Generator().manual_seed(0)
    w = torch.randn(2, 3, n, n, generator=g)
    flat = slogdet_inverse(w.view(6, n, n))
    for view in (w, w.mT.contiguous().mT, w.transpose(0, 1).contiguous().transpose(0, 1), torch.cat([w, w], -1)[..., :n]):
        assert_same_bits(tuple(t.flatten(0, 1) for t in slogdet_inverse(view)), flat)
    assert_same_bits(slogdet_inverse(w[0, 0]), tuple(t[0] for t in flat))
    assert_same_bits(slogdet(w[:1].expand(4, 3, n, n)), tuple(t[:3].expand(4, 3).contiguous() for t in flat[:2]))
    assert slogdet_inverse(w[:, :0])[2].shape == (2, 0, n, n) and slogdet(w[:, :0])[0].shape == (2, 0)


@pytest.mark.skipif(not _extension.has_kernel("slogdet", "CPU"), reason="LAPACK has bits of its own")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_of_pivots_as_large_the_first_is_taken(dtype):
    """By the kernel for small matrices as by that for larger ones, so that a further row of its own does not change a bit."""
    g = torch.Generator().manual_seed(0)
    w = (
        torch.randn(20, 16, 16, generator=g, dtype=torch.float64).sign()
        * torch.tensor([0.3, 1.7])[torch.randint(2, (20, 1, 16), generator=g)]
    )
    w = (w + torch.randn(20, 16, 16, generator=g, dtype=torch.float64) * (torch.arange(16) > 3)).to(dtype)
    larger = torch.stack([torch.block_diag(m, torch.ones(1, 1, dtype=dtype)) for m in w])
    assert_same_bits(slogdet(larger), slogdet(w))


def test_no_rows_and_many_rows():
    assert [t.item() for t in slogdet(torch.zeros(0, 0))] == [1, 0]
    w = torch.linalg.qr(torch.randn(LARGEST + 1, LARGEST + 1, generator=torch.Generator().manual_seed(0)))[0]
    torch.testing.assert_close(slogdet_inverse(w)[2], w.mT, rtol=1e-4, atol=1e-4)
    assert_same_bits(slogdet(w), tuple(torch.linalg.slogdet(w)))
    torch.testing.assert_close(torch.ops.flowkernels.slogdet(w, False)[1], torch.linalg.slogdet(w)[1], rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    w = (torch.randn(3, 6, 6, generator=torch.Generator().manual_seed(0)) + 2 * torch.eye(6)).to(dtype)
    sign, logabsdet, inverse = slogdet_inverse(w)
    want = slogdet_inverse(w.float())
    assert sign.dtype == logabsdet.dtype == torch.float32 and inverse.dtype == dtype
    assert torch.equal(logabsdet, want[1]) and torch.equal(inverse, want[2].to(dtype))


def test_gradient_of_the_batch_is_that_of_each_matrix():
    w = torch.randn(5, 7, 7, dtype=torch.float64, requires_grad=True)
    (got,) = torch.autograd.grad(slogdet(w)[1].sum(), w)
    torch.testing.assert_close(got, torch.linalg.inv(w.detach()).mT)
    hessian = lambda f: torch.func.vmap(torch.func.jacrev(torch.func.jacrev(lambda m: f(m)[1])))(w.detach())
    torch.testing.assert_close(hessian(slogdet), hessian(torch.linalg.slogdet))


@pytest.mark.skipif(not _extension.has_kernel("slogdet", "CPU"), reason="no compiled kernel")
def test_backends_can_be_chosen():
    w = torch.randn(3, 20, 20, dtype=torch.float64)
    with backend("cpp"):
        got = slogdet_inverse(w)
    with backend("reference"):
        want = slogdet_inverse(w)
    torch.testing.assert_close(got, want)
    with backend("cuda"), pytest.raises(RuntimeError, match="slogdet was called with tensors on cpu"):
        slogdet(w)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_gpu_is_as_exact_as_lapack(kind, dtype):
    test_is_as_exact_as_lapack(kind, dtype, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("n", [1, 2, 12, 31, 33, 48, 96, 145, 205, LARGEST])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_gpu_gives_the_cpus_pivots_and_factors(n, dtype):
    """The same operations in the same order on both: log-determinants differ by the logarithm and its sum alone."""
    w = torch.randn(5, n, n, generator=torch.Generator().manual_seed(n), dtype=dtype)
    w[3, n // 2] = 0
    w[4, 0, n - 1] = torch.nan
    strided = torch.cat([w, w], -1)[..., :n].mT.contiguous().mT.cuda()
    for call in (slogdet, slogdet_inverse):
        got, want = call(strided), call(w)
        assert torch.equal(got[0].cpu(), want[0])
        torch.testing.assert_close(got[1].cpu(), want[1], rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps, equal_nan=True)
        assert_same_bits(call(strided), got)
        alone = call(strided[1:2])
        assert_same_bits(alone, tuple(t[1:2] for t in got))
    assert torch.equal(slogdet(strided)[1].cpu()[:3], slogdet_inverse(strided)[1].cpu()[:3])


@pytest.mark.skipif(not _extension.status().cpu_library, reason="the CPU library was not built")
def test_cuda_launch():
    """The kernel's launch for every size: what it takes fits, columns are free of bank conflicts, and every matrix has a block."""
    for item, sm_80, sm_90 in [(4, 201, 238), (8, 141, 167)]:
        for limit, largest in [(163 * 1024, sm_80), (227 * 1024, sm_90)]:
            for n in range(LARGEST + 1):
                for batch in (1, 96, 300, 2**31 + 5):
                    ld, shared, workspace, blocks, warps = torch.ops.flowkernels._lu_plan(n, batch, item, limit)
                    assert n <= ld <= n + 1 and ld % 2 == 1 and 1 <= warps <= 16 and 1 <= blocks <= min(batch, 2**31 - 1)
                    vectors = 4 * n * item + 4 * n
                    assert shared <= limit and (workspace == 0) == (n <= largest), n
                    assert shared == vectors + (n * ld * item if workspace == 0 else 0)
                    assert workspace in (0, n * ld) and blocks * workspace * item <= 256 * 2**20


@pytest.mark.parametrize("call", [slogdet, slogdet_inverse])
@pytest.mark.parametrize(
    ("w", "message"),
    [
        (torch.zeros(2, 3), r"w must hold square matrices, \[\*, n, n\]; got \[2, 3\]"),
        (torch.zeros(3), r"w must hold square matrices, \[\*, n, n\]; got \[3\]"),
        (torch.zeros(2, 2, dtype=torch.int64), "w must be float64, float32, float16 or bfloat16; got torch.int64"),
        (torch.zeros(2, 2, dtype=torch.complex64), "got torch.complex64"),
    ],
)
def test_wrong_arguments_are_named(call, w, message):
    with pytest.raises(ValueError, match=message):
        call(w)


@pytest.mark.parametrize("op", [slogdet, slogdet_inverse])
def test_forward_mode(op):
    w, tangent = (torch.randn(3, 5, 5, dtype=torch.float64) for _ in range(2))
    _, (_, dlogabsdet, *dinverse) = torch.func.jvp(op, (w,), (tangent,))
    x = torch.linalg.inv(w)
    torch.testing.assert_close(dlogabsdet, (x @ tangent).diagonal(dim1=1, dim2=2).sum(1))
    for got in dinverse:
        torch.testing.assert_close(got, -x @ tangent @ x)
