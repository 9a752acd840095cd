"""The training loop: it learns, it continues to the same bits, its statistics are the training set's."""

import copy
import math
from dataclasses import replace

import pytest
import torch

from flowkernels.data import Identity, Split, Standardize, Table
from flowkernels.flows import MAF, NICE, Flow, Glow, RealNVP
from flowkernels.layers import FlowBatchNorm, InvertibleConv1x1
from flowkernels.training import DataModel, Trainer, TrainingSettings, set_training_statistics


def split(rows=60, features=3, context_features=0):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, features, dtype=torch.float64, generator=generator) * 2 + 5
    x[:, -1] = x[:, 0] ** 2 + 0.1 * x[:, -1]
    context = torch.randn(rows, context_features, dtype=torch.float64, generator=generator) if context_features else None
    table = Table(x, context, "made up")
    rows = torch.arange(rows)
    return Split(table.rows(rows[: len(rows) * 3 // 4]), table.rows(rows[len(rows) * 3 // 4 :]))


def trainer(data, seed=0, batch_norm=False, **settings):
    torch.manual_seed(seed)
    context_features = 0 if data.train.context is None else data.train.context.shape[1]
    flow = MAF(data.train.x.shape[1], context_features=context_features, transforms=2, hidden_features=(16,), batch_norm=batch_norm)
    model = DataModel(flow, Standardize())
    model.fit_preprocess(data.train)
    return Trainer(model, data, TrainingSettings(**{"epochs": 6, "batch_size": 16, "learning_rate": 1e-2, **settings}))


def bits(state):
    """Every tensor and number of a state, in order, for comparisons bit by bit."""
    if isinstance(state, dict):
        return [item for key in sorted(state, key=str) for item in [str(key), *bits(state[key])]]
    if isinstance(state, list | tuple):
        return [item for value in state for item in bits(value)]
    return [state.numpy().tobytes() if isinstance(state, torch.Tensor) else state]


def test_training_raises_the_held_out_likelihood():
    run = trainer(split(), epochs=30)
    before = run.validate()
    while not run.finished:
        run.run_epoch()
    assert run.best_nats > before + 0.5
    assert run.best_nats == max(row[3] for row in run.history)


@pytest.mark.parametrize("batch_norm", [False, True])
def test_a_continuation_gives_the_same_bits(batch_norm):
    data = split(context_features=2)
    whole = trainer(data, batch_norm=batch_norm)
    while not whole.finished:
        whole.run_epoch()
    first = trainer(data, batch_norm=batch_norm)
    for _ in range(3):
        first.run_epoch()
    state = copy.deepcopy(first.state_dict())
    second = trainer(data, seed=1, batch_norm=batch_norm)
    second.load_state_dict(state)
    while not second.finished:
        second.run_epoch()
    assert bits(second.state_dict()) == bits(whole.state_dict())


def test_early_stopping_waits_for_patience_epochs():
    run = trainer(split(rows=20), epochs=500, patience=5, learning_rate=0.05, averaging=0.0)
    while not run.finished:
        run.run_epoch()
    assert run.epoch == run.best_epoch + 5 < 500
    run.average.flow.load_state_dict(run.best)
    assert run.validate() == run.best_nats


def test_a_last_batch_of_one_row_is_left_out():
    run = trainer(split(rows=44), batch_norm=True, batch_size=16)  # 33 training rows
    assert run.steps_per_epoch == 2
    run.run_epoch()


def test_batch_norm_takes_the_statistics_of_the_whole_training_set_layer_by_layer():
    torch.manual_seed(0)
    flow = MAF(4, context_features=2, transforms=3, hidden_features=(8,), batch_norm=True)
    x, context = torch.randn(50, 4) * 3 + 1, torch.randn(50, 2)
    set_training_statistics(flow, x, context, rows=7)
    with torch.no_grad():
        for layer in flow.layers:
            if isinstance(layer, FlowBatchNorm):
                assert torch.allclose(layer.running_mean, x.mean(0), atol=1e-5)
                assert torch.allclose(layer.running_var, x.var(0, correction=0), rtol=1e-4)
            x = layer(x, context)[0]
    assert torch.allclose(x.mean(0), torch.zeros(4), atol=1e-5) and torch.allclose(x.var(0, correction=0), torch.ones(4), atol=1e-3)


@pytest.mark.parametrize("rows", [1000, 20])
def test_batch_norms_inside_scales_and_conditioners_take_the_training_sets_statistics(rows):
    torch.manual_seed(0)
    flow = RealNVP((1, 4, 4), blocks=1, hidden_channels=4)
    x = torch.randn(400, 1, 4, 4) * 3 + torch.linspace(-9, 11, 400)[:, None, None, None]  # neighbours are alike, as in sorted data
    difference = lambda: (flow.eval()(x)[0] - copy.deepcopy(flow).train()(x)[0]).abs().max()
    with torch.no_grad():
        before = difference()
        set_training_statistics(flow, x, rows=rows)
        assert not flow.training
        # of one batch they are the batch's own, up to the n / (n - 1) of torch's batch norm; of twenty they are near
        assert difference() < (0.02 if rows == 1000 else 0.5) < before
    assert all(norm.momentum == 0.1 for norm in flow.modules() if hasattr(norm, "momentum"))


def test_a_pass_for_statistics_that_fails_leaves_batch_norms_as_they_were():
    flow = RealNVP((1, 4, 4), blocks=1, hidden_channels=4)
    with pytest.raises(ValueError, match="x must have shape"):
        set_training_statistics(flow, torch.randn(40, 2, 4, 4))
    assert all(norm.momentum == 0.1 and not norm.training for norm in flow.modules() if hasattr(norm, "momentum"))


def test_only_matrices_and_kernels_decay():
    torch.manual_seed(0)
    flow = NICE(4, hidden_features=(5,))
    kept = {name: p.detach().clone() for name, p in flow.named_parameters()}
    run = Trainer(DataModel(flow, Identity()), split(features=4), TrainingSettings(weight_decay=0.5, learning_rate=0.1))
    for p in flow.parameters():
        p.grad = torch.zeros_like(p)
    run.optimizer.step()
    for name, p in flow.named_parameters():
        torch.testing.assert_close(p.detach(), kept[name] * (0.95 if p.dim() >= 2 else 1.0))


def test_weights_to_be_inverted_do_not_decay():
    torch.manual_seed(0)
    conv = InvertibleConv1x1(4, parametrization="plain")
    kept = conv.plain_weight.detach().clone()
    run = Trainer(DataModel(Flow([conv], 4), Identity()), split(features=4), TrainingSettings(weight_decay=0.5, learning_rate=0.1))
    conv.plain_weight.grad = torch.zeros_like(kept)
    run.optimizer.step()
    assert torch.equal(conv.plain_weight, kept)


def test_a_glow_trains():
    run = Trainer(DataModel(Glow((1, 4, 4), levels=1, steps=2, hidden_channels=4), Identity()), split(features=16), TrainingSettings())
    for _ in range(2):
        assert math.isfinite(run.run_epoch()["validation_nats"])
    assert all(flag for name, flag in run.best.items() if name.endswith("initialised"))


def test_the_average_grows_longer_from_epoch_to_epoch():
    run, steps = trainer(split(), averaging=0.9), 0
    mean = [p.detach().clone() for p in run.average.flow.parameters()]

    def follow():
        nonlocal steps
        steps += 1
        for mine, p in zip(mean, run.model.flow.parameters(), strict=True):
            mine.lerp_(p.detach(), 1 - min(0.9, (1 + steps) / (10 + steps)))

    for _ in range(3):
        run.run_epoch(follow)
    torch.testing.assert_close([p.detach() for p in run.average.flow.parameters()], mean)


def test_the_first_of_equal_epochs_is_the_best(monkeypatch):
    run = trainer(split(rows=20), patience=2)
    monkeypatch.setattr(run, "validate", lambda: 1.0)
    while not run.finished:
        run.run_epoch()
    assert (run.best_epoch, run.epoch) == (1, 3)


def test_a_loss_that_is_not_finite_is_one_error():
    run = trainer(split(), learning_rate=1e3)
    next(run.model.flow.parameters()).data.fill_(math.nan)
    with pytest.raises(ValueError, match="the loss is nan in epoch 1; learning_rate 1000.0 may be too large"):
        run.run_epoch()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epochs", 0),
        ("batch_size", 1),
        ("patience", 0),
        ("seed", -1),
        ("learning_rate", 0.0),
        ("learning_rate", math.nan),
        ("clip_norm", math.inf),
        ("weight_decay", -1.0),
        ("averaging", 1.0),
        ("schedule", "step"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"{name} must be"):
        TrainingSettings(**{name: value})


def test_model_counts_the_preprocessing_and_samples_in_the_users_units():
    data = split(rows=40)
    model = trainer(data).model
    y, logabsdet, _ = model.prepare(data.train)
    with torch.no_grad():
        wanted = model.flow.log_prob(y).double() + logabsdet
    assert torch.equal(model.log_prob(data.train), wanted)
    z = model.encode(data.train)
    assert torch.allclose(z, model.flow(y)[0], atol=1e-6)
    samples = model.sample(2000, generator=torch.Generator().manual_seed(0))
    assert samples.shape == (2000, 3) and samples.dtype == torch.float64
    assert (samples.mean(0) - data.train.x.mean(0)).abs().max() < 3 * data.train.x.std(0).max()


def test_samples_follow_their_contexts_row_by_row():
    data = split(context_features=2)
    model = trainer(data).model
    contexts = torch.tensor([[0.0, 1.0], [2.0, -1.0]], dtype=torch.float64)
    both = model.sample(3, contexts, generator=torch.Generator().manual_seed(0))
    z = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        second = model.preprocess.inverse(model.flow.inverse(z[3:], contexts[1:].float().expand(3, 2))[0].double())
    assert torch.allclose(both[3:], second, rtol=1e-5)


def test_model_refuses_other_data():
    data = split(context_features=2)
    model = trainer(data).model
    x, context = data.train.x, data.train.context
    for table, message in (
        (Table(x[:, :2], context, "file"), "data must have 3 columns, like the run's; file has 2"),
        (Table(x, None, "file"), "context is missing: the run takes 2 columns of context, and file gives none"),
        (Table(x, context[:, :1], "file"), "context must have 2 columns, like the run's; got 1"),
    ):
        with pytest.raises(ValueError) as refusal:
            model.check(table)
        assert message in str(refusal.value)
    plain = trainer(split()).model
    with pytest.raises(ValueError, match=r"context was given, \[45, 2\], but the run takes none"):
        plain.check(Table(x, context, "file"))
    model.preprocess.std.fill_(1e-300)
    with pytest.raises(ValueError, match="data must fit torch.float32 after preprocessing; row 0, column 0"):
        model.prepare(data.train)


def test_rows_of_another_width_are_refused_everywhere():
    """Two rows of 4 would fill one of 8."""
    data = split(60, 4)
    model = DataModel(MAF(8, hidden_features=(8,)), Standardize())
    model.fit_preprocess(data.train)
    for call in (model.log_prob, model.encode, model.prepare):
        with pytest.raises(ValueError, match="data must have 8 columns, like the run's; .* has 4"):
            call(data.train)
    with pytest.raises(ValueError, match="data must have 8 columns"):
        Trainer(model, data, TrainingSettings(epochs=1)).run_epoch()


@pytest.mark.parametrize("temperature", [-1.0, math.nan, math.inf])
def test_temperatures_and_draws_out_of_range(temperature):
    model = DataModel(MAF(3, hidden_features=(8,)), Identity())
    with pytest.raises(ValueError, match="temperature must be at least 0"):
        model.sample(2, temperature=temperature)
    for draws in (0, -1, 1.5):
        with pytest.raises(ValueError, match="draws must be a whole number from 1 on"):
            model.log_prob(split().train, draws=draws)


def test_a_flow_without_parameters_to_train_is_refused():
    with pytest.raises(ValueError, match="must have parameters to train; all of them are frozen"):
        Trainer(DataModel(MAF(3, hidden_features=(8,)).requires_grad_(False), Identity()), split(), TrainingSettings())


def test_a_state_is_a_copy_that_may_be_loaded_again():
    data = split()
    first = trainer(data)
    first.run_epoch()
    state = first.state_dict()
    before = bits(state)
    first.run_epoch()
    assert bits(state) == before
    others = [trainer(data, seed=seed) for seed in (1, 2)]
    for other in others:
        other.load_state_dict(state)
        other.run_epoch()
    assert bits(state) == before
    assert bits(others[0].state_dict()) == bits(others[1].state_dict()) == bits(first.state_dict())


def test_a_held_out_row_without_a_density_is_named():
    data = split()
    data.validation.x[2, 1] = 1e25
    with pytest.raises(ValueError, match="the held-out log p.x. is -inf for row 2, counted from 0, in epoch 1: it may lie too far"):
        trainer(data).run_epoch()


@pytest.mark.parametrize("part", ["train", "validation"])
def test_rows_are_needed_to_train_and_to_validate(part):
    data = split()
    model = trainer(data).model
    without = replace(data, **{part: getattr(data, part).rows(torch.arange(0))})
    with pytest.raises(ValueError, match=f"split.{part} must have at least one row; got none"):
        Trainer(model, without, TrainingSettings())


def test_the_learning_rate_does_not_rise_again():
    run = trainer(split(), epochs=2)
    for _ in range(4):
        run.run_epoch()
    assert [row[1] for row in run.history][2:] == [0.0, 0.0]
