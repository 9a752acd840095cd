"""Preprocessing: the log-determinant is the map's, and the way back is the inverse."""

import math

import pytest
import torch

from flowkernels.data import GreyLevels, Identity, Standardize, build_preprocess, load_digits


def jacobian_logabsdet(function, x):
    return torch.linalg.slogdet(torch.autograd.functional.jacobian(function, x)).logabsdet


@pytest.mark.parametrize("preprocess", [Identity(), Standardize()])
def test_logabsdet_is_that_of_the_jacobian_and_inverse_undoes(preprocess):
    x = torch.randn(30, 4, dtype=torch.float64) * torch.tensor([1e-3, 1.0, 7.0, 1e3]) + 1e6
    preprocess.fit(x)
    y, logabsdet = preprocess.forward(x)
    wanted = jacobian_logabsdet(lambda row: preprocess.forward(row[None])[0][0], x[3])
    assert torch.allclose(logabsdet, wanted.expand(30), rtol=1e-12)
    assert torch.allclose(preprocess.inverse(y), x, rtol=0, atol=1e-9)


def test_standardize_gives_zero_mean_and_unit_variance():
    x = torch.randn(50, 3, dtype=torch.float64) * 9 - 4
    preprocess = Standardize()
    preprocess.fit(x)
    std, mean = torch.std_mean(preprocess.forward(x)[0], dim=0, correction=0)
    assert torch.allclose(mean, torch.zeros(3, dtype=torch.float64), atol=1e-12) and torch.allclose(std, torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize(("value", "message"), [(2.0, "column 1, counted from 0, is constant (2)"), (None, "too large to standardise")])
def test_columns_that_cannot_be_standardised_are_refused(value, message):
    x = torch.randn(10, 2, dtype=torch.float64)
    x[:, 1] = torch.linspace(-1e300, 1e300, 10, dtype=torch.float64) if value is None else value
    with pytest.raises(ValueError) as refusal:
        Standardize().fit(x)
    assert message in str(refusal.value)


def test_a_context_may_have_constant_columns():
    preprocess = Standardize(constant_columns=True)
    preprocess.fit(torch.tensor([[1.0, 5.0], [3.0, 5.0]], dtype=torch.float64))
    assert torch.equal(
        preprocess.forward(torch.tensor([[1.0, 6.0]], dtype=torch.float64))[0], torch.tensor([[-1.0, 1.0]], dtype=torch.float64)
    )


def test_grey_levels_count_their_logabsdet_per_grey_level():
    torch.manual_seed(0)
    x = torch.randint(0, 17, (40, 5), dtype=torch.uint8)
    preprocess = GreyLevels(17, 0.01)
    preprocess.fit(x)
    y, logabsdet = preprocess.forward(x, torch.Generator().manual_seed(5))
    dequantised = x + torch.rand(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))

    def formula(row):
        p = 0.01 + 0.98 * row / 17
        return (torch.log(p / (1 - p)) - preprocess.state_dict()["mean"]) / preprocess.state_dict()["std"]

    assert torch.allclose(y, formula(dequantised), rtol=1e-12)
    for i in range(3):
        assert torch.allclose(logabsdet[i], jacobian_logabsdet(formula, dequantised[i]), rtol=1e-12)
    assert torch.equal(preprocess.inverse(y), x.double())


def test_grey_levels_density_is_that_of_a_uniform_where_the_flow_is_uniform():
    # a density of 1/17 per grey level everywhere is log2(17) bits per dimension
    preprocess = GreyLevels(17, 0.01)
    preprocess.fit(torch.randint(0, 17, (40, 1)).double())
    edges = torch.linspace(0, 17, 20001, dtype=torch.float64)
    u = ((edges[1:] + edges[:-1]) / 2)[:, None] / 17
    y, log_derivative = preprocess._logit(u)
    y, logabsdet = preprocess._affine.forward(y)
    logabsdet += log_derivative - math.log(17)
    # integrate a standard normal pushed back to grey levels: what lies inside 0..17 of its mass
    mass = (torch.distributions.Normal(0, 1).log_prob(y).sum(1) + logabsdet).exp().mean() * 17
    low, high = (preprocess._affine.forward(preprocess._logit(torch.tensor([[u]], dtype=torch.float64))[0])[0] for u in (0.0, 1.0))
    inside = torch.special.ndtr(high) - torch.special.ndtr(low)
    assert torch.allclose(mass, inside.squeeze(), rtol=1e-4)


@pytest.mark.parametrize("value", [-1.0, 17.0, 0.5])
def test_what_is_no_grey_level_is_refused(value):
    x = torch.zeros(3, 4, dtype=torch.float64)
    x[2, 1] = value
    with pytest.raises(ValueError, match=f"whole grey levels 0..16; row 2, column 1, counted from 0, is {value:g}"):
        GreyLevels(17, 0.01).check(x, "data file")


def test_bytes_fit_more_levels_than_they_count():
    GreyLevels(300, 0.05).check(torch.tensor([[5, 200]], dtype=torch.uint8), "data file")


def test_bytes_above_the_stated_levels_are_refused():
    with pytest.raises(ValueError, match="whole grey levels 0..15; row 0, column 1, counted from 0, is 16"):
        GreyLevels(16, 0.05).check(torch.tensor([[15, 16]], dtype=torch.uint8), "data file")
    GreyLevels(256, 0.05).check(torch.tensor([[0, 255]], dtype=torch.uint8), "data file")


def test_unknown_kind():
    with pytest.raises(ValueError, match="must be one of identity, standardize, grey_levels; got 'wavelet'"):
        build_preprocess({"kind": "wavelet"})


def test_digits_are_split_evenly_and_always_the_same():
    pytest.importorskip("sklearn")
    split, again = load_digits(), load_digits()
    assert [len(part) for part in (split.train, split.validation, split.test)] == [1197, 300, 300]
    assert torch.equal(split.test.context.sum(0), torch.full((10,), 30.0, dtype=torch.float64))
    assert torch.equal(split.train.x, again.train.x)
    rows = torch.cat([part.x for part in (split.train, split.validation, split.test)])
    assert split.test.image_shape == (1, 8, 8) and rows.dtype == torch.uint8
    assert rows.shape == (1797, 64) and rows.min() == 0 and rows.max() == 16
