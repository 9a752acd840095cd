"""The flows that the benchmark compares: the eager ones compute what ours do, and every library's answer can be checked."""

import pytest
import torch

from benchmarks.bench_flows import sampling, training
from benchmarks.case import Case
from benchmarks.flow_models import EAGER, OURS, channel_couplings, image_realnvp, nice, realnvp
from benchmarks.measure import measure_case

MODELS = {
    "nice": (nice(6, 3, (7,)), (5, 6)),
    "realnvp": (realnvp(6, 4, (7, 7)), (5, 6)),
    "images": (image_realnvp((1, 4, 4), blocks=1, hidden_channels=3), (5, 1, 4, 4)),
    "channels": (channel_couplings(4, 3, 3, 1), (5, 4, 2, 2)),
}


@pytest.mark.parametrize("name", ["nice", "realnvp", "images"])
def test_eager_layers_compute_the_same(name):
    models, shape = MODELS[name]
    mine, plain = (models[kind]().double() for kind in (OURS, EAGER))
    x = torch.randn(shape, dtype=torch.float64)
    assert {type(m) for m in plain.module.modules()} != {type(m) for m in mine.module.modules()}
    losses = [model.loss(x) for model in (mine, plain)]
    torch.testing.assert_close(*losses)
    gradients = [torch.autograd.grad(loss, list(model.module.parameters())) for loss, model in zip(losses, (mine, plain), strict=True)]
    sizes = [sorted(g.square().sum().item() for g in grads) for grads in gradients]  # networks lie in memory in their own ways
    torch.testing.assert_close(*sizes)
    data = [model.to_data(model.module.eval(), x.flatten(1)) for model in (mine, plain)]
    torch.testing.assert_close(*data)


@pytest.mark.parametrize("name", MODELS)
def test_every_library_gives_a_right_answer(name):
    for library in ("nflows", "normflows", "zuko", "pyro"):
        pytest.importorskip(library)
    models, shape = MODELS[name]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    z = x.flatten(1) if name == "images" else x
    limits = {"matmul_gmac_s": 50.0, "copy_gb_s": 10.0}
    for make, rows in ((training, x), (sampling, z)):
        case = Case("toy", [make(library, build, rows) for library, build in models.items()], seconds=0.01, most_rounds=2)
        found = measure_case(case, benchmark="toy", machine={}, limits=limits, say=lambda _: None)
        assert {row["competitor"] for row in found} == set(models) and not any(row["wrong"] for row in found)
        assert all(row["error_rms"] is not None for row in found)
