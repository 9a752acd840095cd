import copy
import pickle
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from flowkernels.layers import ActNorm, ActNormConv1x1


def data(*shape, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    scale, mean = torch.linspace(0.1, 50, shape[1], dtype=dtype), torch.linspace(-30, 20, shape[1], dtype=dtype)
    view = (-1,) + (1,) * (len(shape) - 2)
    return torch.randn(shape, generator=g, dtype=dtype) * scale.view(view) + mean.view(view)


@pytest.mark.parametrize("shape", [(40, 3), (9, 4, 6, 5), (5, 2, 3, 4, 5), (7, 1, 8)])
def test_first_batch_leaves_with_zero_mean_and_unit_variance(shape):
    layer, x = ActNorm(shape[1]), data(*shape)
    z, logabsdet = layer(x)
    sites = [d for d in range(len(shape)) if d != 1]
    torch.testing.assert_close(z.mean(sites), torch.zeros(shape[1]), atol=1e-4, rtol=0)
    torch.testing.assert_close(z.var(sites, correction=0), torch.ones(shape[1]), atol=1e-4, rtol=1e-4)
    assert layer.initialised and logabsdet.shape == (shape[0],)
    before = layer.bias.clone()
    layer(x * 3 + 1)
    assert torch.equal(layer.bias, before), "only the first batch counts"


@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 4, 2)])
@pytest.mark.parametrize("inverse", [False, True])
def test_logabsdet_is_the_jacobians(shape, inverse):
    layer, x = ActNorm(3).double(), data(*shape, dtype=torch.float64)
    layer(x)
    f = layer.inverse if inverse else layer.forward
    jacobian = torch.autograd.functional.jacobian(lambda v: f(v.view(1, *shape[1:]))[0].flatten(), x[0].flatten())
    torch.testing.assert_close(f(x)[1][0], torch.linalg.slogdet(jacobian)[1])
    inputs = [x.requires_grad_(), layer.bias, layer.log_scale]
    assert torch.autograd.gradcheck(lambda *a: f(x), inputs) and torch.autograd.gradgradcheck(lambda *a: f(x), inputs)


def test_inverse_undoes_forward():
    layer, x = ActNorm(4).double(), data(6, 4, 3, dtype=torch.float64)
    z, logabsdet = layer(x)
    back, opposite = layer.eval().inverse(z)
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(opposite, -logabsdet)


def test_a_channel_that_does_not_vary_keeps_its_scale():
    x = data(20, 3)
    x[:, 1] = 7.3
    x[:, 2] = 0
    layer = ActNorm(3)
    z, logabsdet = layer(x)
    assert z.isfinite().all() and logabsdet.isfinite().all()
    assert layer.log_scale[1] == layer.log_scale[2] == 0 and layer.log_scale[0] != 0
    assert z[:, 1:].abs().max() < 1e-6


@pytest.mark.parametrize(("mean", "std"), [(1e9, 300.0), (1e3, 1e-6), (0.0, 1e-13), (1.0, 1e-20)])
def test_in_float64_a_channel_varies_by_little(mean, std):
    """A time stamp, an offset, a small unit; of the last nothing is left in float64."""
    torch.manual_seed(0)
    x = mean + std * torch.randn(1000, 1, dtype=torch.float64)
    z, _ = ActNorm(1).double()(x)
    torch.testing.assert_close(z.mean(), z.new_zeros(()), atol=1e-3, rtol=0)
    torch.testing.assert_close(z.std(correction=0), x.new_tensor(float(std > 1e-16)), rtol=1e-3, atol=0)


def test_initialised_survives_saving_loading_and_copying():
    layer, x = ActNorm(3), data(20, 3)
    want = layer(x)
    loaded = ActNorm(3)
    loaded.load_state_dict(layer.state_dict())
    for twin in (loaded, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer).double().float()):
        got = twin(x + 5)  # in training: an uninitialised layer would take this batch's mean away
        torch.testing.assert_close(got[0], (x + 5 + layer.bias) * layer.log_scale.exp())
        assert twin.initialised and torch.equal(got[1], want[1])
    fresh = copy.deepcopy(layer)
    fresh.load_state_dict(ActNorm(3).state_dict())
    assert fresh(x + 5)[0].mean().abs() < 1e-5, "a checkpoint from before initialisation"


def test_a_flag_that_is_taken_back_asks_for_another_first_batch():
    layer, x = ActNorm(2), torch.randn(50, 2)
    layer(x)
    assert layer.ready
    layer.initialised.fill_(False)
    assert not layer.ready
    z, _ = layer(10 * x + 100)
    torch.testing.assert_close(z.mean(0), torch.zeros(2), rtol=0, atol=1e-4)
    assert layer.ready


def test_a_flag_of_one_call_that_was_written_as_often():
    layer, other, x = ActNorm(2), ActNorm(2), torch.randn(50, 2)
    layer(x)
    other.load_state_dict(ActNorm(2).state_dict())
    assert other.initialised._version == layer.initialised._version
    with pytest.raises(RuntimeError, match="before it was initialised"):
        torch.func.functional_call(layer.eval(), other.state_dict(), (x,))


def test_compiles_without_graph_breaks():
    layer, x = ActNorm(3), data(20, 3, 4)
    layer(x)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))


def test_the_first_batch_of_half_precision():
    x = data(50, 3).bfloat16()
    z, logabsdet = ActNorm(3).bfloat16()(x)
    assert z.dtype == torch.bfloat16 and logabsdet.dtype == torch.float32


def _rank(rank: int, port: int, x: torch.Tensor, results) -> None:
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2, timeout=timedelta(seconds=60))
    torch.set_num_threads(1)
    layer = ActNorm(x.shape[1])
    layer(x[:5] if rank == 0 else x[5:])
    results[rank] = torch.stack([layer.bias.detach(), layer.log_scale.detach()])
    dist.destroy_process_group()


@pytest.mark.slow
def test_statistics_are_those_of_all_ranks():
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    x = data(16, 3, 4)
    results = torch.zeros(2, 2, 3).share_memory_()
    mp.spawn(_rank, args=(port, x, results), nprocs=2)
    alone = ActNorm(3)
    alone(x)
    assert torch.equal(results[0], results[1])
    torch.testing.assert_close(results[0], torch.stack([alone.bias.detach(), alone.log_scale.detach()]))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ActNorm(0), ValueError, "channels must be a whole number of at least 1; got 0"),
        (lambda: ActNorm(3)(torch.zeros(2, 4)), ValueError, r"x must have shape \[batch, 3, \*sites\]; got \[2, 4\]"),
        (lambda: ActNorm(3)(torch.zeros(3)), ValueError, r"got \[3\]"),
        (lambda: ActNorm(3)(torch.zeros(0, 3)), ValueError, "x must not be empty"),
        (lambda: ActNorm(3).eval()(torch.zeros(2, 3)), RuntimeError, "used in evaluation before it was initialised"),
        (lambda: ActNorm(3).inverse(torch.zeros(2, 3)), RuntimeError, "inverted before it was initialised"),
        (lambda: ActNorm(3).eval().inverse(torch.zeros(2, 3)), RuntimeError, "inverted before it was initialised"),
    ],
)
def test_wrong_use_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("kind", [ActNorm, ActNormConv1x1])
def test_noise_of_other_channels_is_named(kind):
    layer = kind(3)
    layer(torch.randn(8, 3))
    with pytest.raises(ValueError, match=r"^z must have shape \[batch, 3, \*sites\]; got \[2, 4\]"):
        layer.inverse(torch.zeros(2, 4))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_that_varies_by_little_of_its_mean(dtype):  # 8 eps of bfloat16 are 6 percent
    x = (10 + 0.3 * torch.randn(4000, 1)).to(dtype) if dtype == torch.bfloat16 else (10 + 0.05 * torch.randn(4000, 1)).to(dtype)
    layer = ActNorm(1)
    layer.initialise(x)
    torch.testing.assert_close(layer.log_scale.detach(), -x.double().std(correction=0).log()[None].float())


def test_a_channel_of_subnormal_numbers_keeps_scale_one():  # 1 / std overflows
    x = torch.randn(100, 2)
    x[:, 1] = torch.where(x[:, 1] > 0, 1e-39, -1e-39)
    layer = ActNorm(2)
    z, logabsdet = layer(x)
    assert z.isfinite().all() and logabsdet.isfinite().all() and layer.log_scale[1] == 0


def test_an_ensemble_of_which_one_was_not_initialised():
    done, fresh = ActNorm(3).eval(), ActNorm(3).eval()
    done.initialise(torch.randn(20, 3))
    parameters, buffers = torch.func.stack_module_state([done, fresh])
    skeleton = ActNorm(3).eval()
    call = lambda p, b, x: torch.func.functional_call(skeleton, (p, b), (x,))
    with pytest.raises(RuntimeError, match="before it was initialised"):
        torch.func.vmap(call, (0, 0, None))(parameters, buffers, torch.randn(5, 3))


def test_a_fake_flag_is_not_read():
    from torch._subclasses.fake_tensor import FakeTensorMode

    layer = ActNorm(3)
    layer(torch.randn(20, 3))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():  # as torch.export calls it
        state = {name: mode.from_tensor(t.detach()) for name, t in layer.state_dict().items()}
        z, logabsdet = torch.func.functional_call(layer, state, (torch.empty(5, 3),))
    assert z.shape == (5, 3) and logabsdet.shape == (5,)


def test_whole_numbers_initialise_nothing():
    layer = ActNorm(3)
    with pytest.raises(ValueError, match="x must be floating-point; got torch.int64"):
        layer(torch.ones(4, 3, dtype=torch.int64))
    assert not layer.initialised
