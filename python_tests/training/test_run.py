"""Run folders: whole or refused, never lost."""

import errno
import json
import math
import os
import pickle

import numpy as np
import pytest
import torch

from flowkernels.baseline import fit_gaussian
from flowkernels.data import Table
from flowkernels.training import RunError, RunFolder, Trainer, TrainingSettings, load_model, load_split, make_config, train_run
from flowkernels.training.loop import VALIDATION_DRAWS
from flowkernels.training.registry import FLOWS
from flowkernels.training.run import build_model

SETTINGS = {"transforms": 1, "hidden": [8], "batch_norm": False, "activation": "relu", "scale": "softclip"}


class Hostile:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was run",))


@pytest.fixture
def data(tmp_path):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(40, 3)))
    return load_split(str(tmp_path / "x.npy"), seed=0)


def config(data, flow=SETTINGS, **training):
    return make_config("maf", flow, data, TrainingSettings(**{"epochs": 3, "batch_size": 16, **training}))


@pytest.fixture
def run(tmp_path, data):
    train_run(tmp_path / "run", config(data), data)
    return tmp_path / "run"


def test_weights_begin_with_the_seed_of_the_run_alone(data):
    states = []
    for global_seed, seed in ((1, 0), (2, 0), (1, 5)):
        torch.manual_seed(global_seed)
        states.append(torch.cat([p.detach().flatten() for p in build_model(config(data, seed=seed)).flow.parameters()]))
        assert torch.initial_seed() == global_seed
    assert torch.equal(states[0], states[1]) and not torch.equal(states[0], states[2])


def test_a_run_is_a_config_a_checkpoint_and_metrics(run, data):
    assert sorted(os.listdir(run)) == ["checkpoint.pt", "config.json", "metrics.csv"]
    lines = (run / "metrics.csv").read_text().splitlines()
    assert lines[0] == "epoch,learning_rate,train_nats,validation_nats" and len(lines) == 4
    model, _, progress = load_model(run)
    assert progress["finished"] and len(progress["history"]) == 3
    assert model.log_prob(data.validation).mean().item() == progress["best_nats"]


def test_a_finished_run_is_not_trained_again(run, data):
    before = (run / "checkpoint.pt").read_bytes()
    trainer = train_run(run, config(data), data)
    assert trainer.epoch == 3 and (run / "checkpoint.pt").read_bytes() == before
    assert trainer.model.log_prob(data.validation).mean().item() == trainer.best_nats


def test_other_settings_are_named(run, data, tmp_path):
    with pytest.raises(RunError, match=r"other settings: hidden was \[8\], now \[9\]; epochs was 3, now 4. Use those, or another --out"):
        train_run(run, config(data, SETTINGS | {"hidden": [9]}, epochs=4), data)
    np.save(tmp_path / "x.npy", np.random.default_rng(1).normal(size=(40, 3)))
    other = load_split(str(tmp_path / "x.npy"), seed=0)
    with pytest.raises(RunError, match="the content of the data was other"):
        train_run(run, config(other), other)


def test_a_moved_data_file_of_the_same_content_goes_on(run, tmp_path):
    os.rename(tmp_path / "x.npy", tmp_path / "moved.npy")
    moved = load_split(str(tmp_path / "moved.npy"), seed=0)
    assert train_run(run, config(moved), moved).epoch == 3


def test_a_full_disk_keeps_the_old_checkpoint_and_the_run_goes_on_after(tmp_path, data, monkeypatch):
    path, wanted = tmp_path / "run", train_run(tmp_path / "whole", config(data), data)
    real, calls = os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) > 6:  # config, checkpoint and metrics of the first epoch: each a file and its folder
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr("flowkernels.training.start._WRITING_SHARE", 1e9)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"cannot write .*checkpoint.pt: No space left on device"):
        train_run(path, config(data), data)
    monkeypatch.setattr(os, "fsync", real)
    assert sorted(os.listdir(path)) == ["checkpoint.pt", "config.json", "metrics.csv"]
    assert len(RunFolder(path).read_checkpoint()["history"]) == 1
    trainer = train_run(path, config(data), data)
    assert trainer.history == wanted.history
    assert all(torch.equal(trainer.best[name], wanted.best[name]) for name in wanted.best)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is damaged"),
        (b"not a checkpoint", "is damaged|refused"),
        (pickle.dumps(Hostile()), "holds more than tensors and plain values and was refused"),
        (None, "is damaged"),
    ],
)
def test_a_damaged_or_hostile_checkpoint_is_refused(run, data, content, message):
    path = run / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:1000] if content is None else content)
    for use in (lambda: load_model(run), lambda: train_run(run, config(data), data)):
        with pytest.raises(RunError, match=message):
            use()


def test_a_hostile_checkpoint_in_torchs_own_format_is_refused(run):
    torch.save({"format": 1, "best": Hostile()}, run / "checkpoint.pt")
    with pytest.raises(RunError, match="was refused: it could run code"):
        load_model(run)


@pytest.mark.parametrize("content", [{"format": 1}, {"format": 1, "best": {}}, {"format": 1, "best": 3}, {"format": 2}, [1, 2]])
def test_a_checkpoint_of_something_else_is_refused(run, content):
    torch.save(content, run / "checkpoint.pt")
    with pytest.raises(RunError, match="checkpoint.pt (does not fit|is no checkpoint)"):
        load_model(run)


def test_a_checkpoint_of_another_run_is_refused(run, data, tmp_path):
    train_run(tmp_path / "other", config(data, SETTINGS | {"hidden": [9]}), data)
    os.replace(tmp_path / "other" / "checkpoint.pt", run / "checkpoint.pt")
    for use in (lambda: load_model(run), lambda: train_run(run, config(data), data)):
        with pytest.raises(RunError, match="does not fit .*config.json: it is of another run"):
            use()


def test_a_run_without_a_checkpoint_takes_other_settings(run, data):
    (run / "checkpoint.pt").unlink()
    assert train_run(run, config(data, SETTINGS | {"hidden": [9]}), data).epoch == 3
    with pytest.raises(RunError, match=r"other settings: hidden was \[9\], now \[8\]"):
        train_run(run, config(data), data)


def test_folders_that_are_no_runs(tmp_path, run, data):
    with pytest.raises(RunError, match="run folder .*gone does not exist"):
        load_model(tmp_path / "gone")
    with pytest.raises(RunError, match="is no run folder: it has no config.json"):
        load_model(tmp_path)
    with pytest.raises(RunError, match="must be new, empty or a run's; it holds other files"):
        train_run(tmp_path, config(data), data)
    with pytest.raises(RunError, match="must be a folder; it is a file"):
        train_run(tmp_path / "x.npy", config(data), data)
    (run / "checkpoint.pt").unlink()
    with pytest.raises(RunError, match="has no checkpoint yet; start its train command again"):
        load_model(run)
    assert train_run(run, config(data), data).epoch == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read"),
        ("[]", "must have format 1"),
        ('{"format": 9}', "must have format 1; got 9"),
        ('{"format": 1, "flow": {"name": "maf"}}', "has no training, preprocess, data"),
        ('{"format": 1, "flow": {"name": "wavelet"}, REST}', "is of flow 'wavelet'; known here: maf"),
        ('{"format": 1, "flow": {"name": ["maf"]}, REST}', r"is of flow \['maf'\]"),
        ('{"format": 1, "flow": {"name": "maf"}, REST}', "does not fit"),
    ],
)
def test_a_bad_config_is_refused(run, text, message):
    (run / "config.json").write_text(text.replace("REST", '"training": {}, "preprocess": {}, "data": {}'))
    with pytest.raises(RunError, match=message):
        load_model(run)


@pytest.mark.parametrize("name", FLOWS)
def test_every_flow_of_the_registry_has_defaults_that_build(data, name):
    for shape in ([1, 8, 8],) if name == "glow" else (3, [1, 4, 4]):
        for digits in (False, True):
            settings, training = FLOWS[name].choose(digits=digits)
            flow = FLOWS[name].build(shape=shape, context_features=0, **settings)
            assert flow.features == (3 if shape == 3 else math.prod(shape))
    json.dumps(make_config(name, settings, data, training))


def test_what_is_given_comes_before_what_suits_the_digits():
    settings, training = FLOWS["maf"].choose({"hidden": [7], "epochs": 3}, digits=True)
    assert settings["hidden"] == [7] and settings["activation"] == "tanh" and training.epochs == 3 and training.weight_decay == 2.0
    settings, training = FLOWS["maf"].choose({"epochs": 3})
    assert settings["hidden"] == [512, 512] and settings["activation"] == "relu" and training == TrainingSettings(epochs=3)


def test_images_are_dequantised_and_tables_are_not(tmp_path, data):
    np.save(tmp_path / "images.npy", np.random.default_rng(0).integers(0, 16, (40, 4, 6), dtype=np.uint8))
    images = load_split(str(tmp_path / "images.npy"))
    settings, training = FLOWS["nice"].choose({"hidden": [8]})
    found = make_config("nice", settings, images, training, grey_levels=16)
    assert found["preprocess"] == {"kind": "grey_levels", "levels": 16, "alpha": 0.05} and found["flow"]["shape"] == [1, 4, 6]
    assert make_config("nice", settings, images, training)["preprocess"]["levels"] == 256
    with pytest.raises(ValueError, match=r"grey_levels must be given for images alone; .*x.npy is a table of numbers, got grey_levels 16"):
        make_config("nice", settings, data, training, grey_levels=16)


QUICK = {
    "maf": {"transforms": 3, "hidden": [128], "epochs": 35, "learning_rate": 1.5e-2, "weight_decay": 1.0},
    "iaf": {"epochs": 50},
    "nice": {"epochs": 60},
    "realnvp": {"epochs": 9},
    "glow": {"steps": 6, "epochs": 14, "weight_decay": 1.0},
}


@pytest.mark.slow
@pytest.mark.parametrize("flow", QUICK)
@pytest.mark.parametrize("unconditional", [False, True], ids=["conditional", "unconditional"])
def test_every_flow_beats_the_fitted_gaussian_on_held_out_digits(flow, unconditional):
    """In a few epochs, with settings near those that suit the digits: the class-conditional Gaussian, or the one of all digits."""
    pytest.importorskip("sklearn")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    split = load_split("digits", unconditional=unconditional)
    settings, training = FLOWS[flow].choose(QUICK[flow], digits=True)
    model = build_model(make_config(flow, settings, split, training))
    model.fit_preprocess(split.train)
    trainer = Trainer(model, split, training)
    while not trainer.finished:
        trainer.run_epoch()
    torch.set_num_threads(threads)
    gaussian = fit_gaussian(model.preprocess, split.train, split.validation, VALIDATION_DRAWS)
    baseline = gaussian.log_prob(split.validation, torch.Generator().manual_seed(0), VALIDATION_DRAWS).mean().item()
    assert trainer.best_nats > baseline + 0.3


def test_a_folder_in_use_is_refused(run, data):
    with RunFolder(run).in_use(), pytest.raises(RunError, match="is in use: another process trains in it"):
        train_run(run, config(data), data)
    train_run(run, config(data), data)


def test_a_folder_in_use_keeps_its_settings(tmp_path, data):
    """Also before its first checkpoint, when others could begin there anew."""
    folder = RunFolder(tmp_path / "run")
    with folder.in_use():
        folder.open(config(data))
        with pytest.raises(RunError, match="is in use"):
            train_run(folder.path, config(data, {**SETTINGS, "hidden": [9]}), data)
        assert folder.read_config() == config(data)


def test_a_start_spares_what_others_are_writing(run, data):
    """`sample` and `density` write into the folder of the run too."""
    writing = run / ".samples.npy.0123456789abcdef.tmp"
    writing.touch()
    train_run(run, config(data), data)
    assert writing.exists()


def test_settings_may_be_tuples(tmp_path, data):
    for _ in range(2):
        train_run(tmp_path / "run", config(data, {**SETTINGS, "hidden": (8,)}), data)


def test_training_leaves_the_callers_generator_alone(tmp_path, data):
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    train_run(tmp_path / "run", config(data), data)
    assert torch.equal(torch.rand(3), wanted)


def test_what_a_killed_writer_left_is_no_obstacle(tmp_path, data):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / ".config.json.0123456789abcdef.tmp").touch()
    train_run(folder, config(data), data)
    assert sorted(os.listdir(folder)) == ["checkpoint.pt", "config.json", "metrics.csv"]
    (folder / ".notes.tmp").touch()  # somebody else's
    train_run(folder, config(data), data)
    assert ".notes.tmp" in os.listdir(folder)


def test_a_finished_run_validates_and_has_its_metrics(run, data):
    metrics = (run / "metrics.csv").read_bytes()
    (run / "metrics.csv").unlink()
    trainer = train_run(run, config(data), data)
    assert trainer.validate() == trainer.best_nats
    assert (run / "metrics.csv").read_bytes() == metrics


def test_a_context_that_is_not_finite_is_refused(tmp_path):
    rng = np.random.default_rng(0)
    x, context = rng.normal(size=(40, 3)), rng.normal(size=(40, 2))
    np.savez(tmp_path / "x.npz", x=x, context=context)
    data = load_split(str(tmp_path / "x.npz"), seed=0)
    train_run(tmp_path / "run", config(data), data)
    model, *_ = load_model(tmp_path / "run")
    far = data.validation.context.clone()
    far[1, 0] = 1e60
    with pytest.raises(ValueError, match="context must fit torch.float32 after preprocessing; row 1, column 0, .* of .* is 1e"):
        model.log_prob(Table(data.validation.x, far, "far.npy"))


def test_an_unknown_flow_is_named(data):
    with pytest.raises(ValueError, match="flow must be one of .*maf.*; got 'nope'"):
        make_config("nope", {}, data, TrainingSettings())
