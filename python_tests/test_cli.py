"""The command line: the four tasks, one line for each mistake, and Ctrl-C that loses nothing."""

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from flowkernels.cli import main
from flowkernels.training import RunFolder, TrainingSettings, load_model

SMALL = ["--transforms", "1", "--hidden", "8", "--epochs", "2", "--batch-size", "16"]


class Hostile:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was run",))


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Flows this small only wait for a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    random = np.random.default_rng(0)
    x, context = random.normal(size=(40, 3)) * 2 + 7, random.normal(size=(40, 2))
    np.save(folder / "x.npy", x)
    np.save(folder / "context.npy", context)
    np.savez(folder / "xc.npz", x=x, context=context)
    np.savetxt(folder / "x.csv", x, delimiter=",", header="a,b,c", comments="")
    np.save(folder / "wide.npy", random.normal(size=(40, 4)))
    np.save(folder / "short.npy", context[:7])
    images = random.integers(0, 16, (40, 6, 4, 3), dtype=np.uint8)
    np.save(folder / "images.npy", images)
    np.savez(folder / "images.npz", x=images, context=np.eye(4)[np.arange(40) % 4])
    bad = x.copy()
    bad[3, 1] = np.nan
    np.save(folder / "nan.npy", bad)
    (folder / "empty.csv").touch()
    (folder / "words.csv").write_text("1,2,3\n4,five,6\n")
    (folder / "hostile.npy").write_bytes(pickle.dumps(Hostile()))
    assert main(["train", "maf", "--data", str(folder / "x.npy"), "--out", str(folder / "run"), *SMALL]) == 0
    assert main(["train", "maf", "--data", str(folder / "xc.npz"), "--out", str(folder / "conditional"), *SMALL]) == 0
    return folder


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    pytest.importorskip("sklearn")
    path = tmp_path_factory.mktemp("digits") / "run"
    assert main(["train", "maf", "--data", "digits", "--out", str(path), *SMALL]) == 0
    return path


def refusal(capsys, arguments):
    """The one line that a mistake gets."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("flowkernels: error: ") and error.count("\n") == 1 and "Traceback" not in error
    return error


def test_sample_density_and_infer_agree_with_the_model(files, tmp_path, capsys):
    run = files / "run"
    model, _, _ = load_model(run)
    assert main(["sample", str(run), "-n", "5", "--seed", "3", "--out", str(tmp_path / "s.npy")]) == 0
    samples = np.load(tmp_path / "s.npy")
    assert np.array_equal(samples, model.sample(5, generator=torch.Generator().manual_seed(3)).numpy())
    assert main(["density", str(run), "--data", str(files / "x.csv"), "--out", str(tmp_path / "d.csv")]) == 0
    density = np.loadtxt(tmp_path / "d.csv", skiprows=1)
    assert f"mean {density.mean():.4f} nats" in capsys.readouterr().out
    assert main(["infer", str(run), "--data", str(files / "x.npy")]) == 0
    z = torch.from_numpy(np.load(run / "z.npy"))
    log_prob = torch.distributions.Normal(0, 1).log_prob(z).sum(1)
    with torch.no_grad():
        x, logabsdet = model.flow.inverse(z)
    assert np.allclose(model.preprocess.inverse(x.double()).numpy(), np.load(files / "x.npy"), atol=1e-4)
    assert np.allclose(density, (log_prob - logabsdet).double() - model.preprocess.std.log().sum(), atol=1e-4)


def test_columns_keep_their_names_and_order(files, tmp_path, capsys):
    run, other = tmp_path / "run", tmp_path / "other.csv"
    train = ["train", "maf", "--data", str(files / "x.csv"), "--out", str(run), *SMALL]
    assert main(train) == 0
    assert main(["sample", str(run), "-n", "2", "--out", str(tmp_path / "s.csv")]) == 0
    assert (tmp_path / "s.csv").read_text().startswith("a,b,c\n")
    numbers = (files / "x.csv").read_text().partition("\n")[2]
    for name, header in (("named otherwise", "c,b,a\n"), ("unnamed", "")):
        other.write_text(header + numbers)
        density = ["density", str(run), "--data", str(other), "--out", str(tmp_path / "d.npy")]
        if header:
            assert "must have the columns a, b, c, in the order of training; got c, b, a" in refusal(capsys, density), name
        else:
            assert main(density) == 0
    assert main([*train[:3], str(other), *train[4:]]) == 0  # the same content: the run is gone on with


def test_columns_of_a_context_keep_their_names_and_order(files, tmp_path, capsys):
    numbers, context, turned, run = tmp_path / "x.npy", tmp_path / "c.csv", tmp_path / "turned.csv", tmp_path / "run"
    np.save(numbers, np.load(files / "x.npy"))
    rows = np.load(files / "context.npy")
    np.savetxt(context, rows, delimiter=",", header="mass,price", comments="")
    np.savetxt(turned, rows[:, ::-1], delimiter=",", header="price,mass", comments="")
    assert main(["train", "maf", "--data", str(numbers), "--context", str(context), "--out", str(run), *SMALL]) == 0
    for command in (["density", run, "--data", numbers], ["sample", run, "-n", "1"]):
        out = ["--out", str(tmp_path / "out.npy")]
        assert main([str(part) for part in [*command, "--context", context, *out]]) == 0
        said = refusal(capsys, [*command, "--context", turned, *out])
        assert "turned.csv must have the columns mass, price, in the order of training; got price, mass" in said


def test_images_of_another_shape(tmp_path, capsys):
    images = np.random.default_rng(0).integers(0, 256, size=(40, 1, 6, 4), dtype=np.uint8)
    for name, array in (("im", images), ("turned", images.transpose(0, 1, 3, 2)), ("colour", images.reshape(40, 2, 3, 4))):
        np.save(tmp_path / f"{name}.npy", array)
    run = tmp_path / "run"
    small = ["--levels", "1", "--steps", "1", "--hidden-channels", "4", "--epochs", "1"]
    assert main(["train", "glow", "--data", str(tmp_path / "im.npy"), "--out", str(run), *small]) == 0
    assert main(["density", str(run), "--data", str(tmp_path / "im.npy")]) == 0
    for name, shape in (("turned", "[1, 4, 6]"), ("colour", "[2, 3, 4]")):
        said = refusal(capsys, ["density", run, "--data", tmp_path / f"{name}.npy"])
        assert "must be images of shape [1, 6, 4]" in said and shape in said


@pytest.mark.parametrize("n", ["1000000000000", "1000000000000000000"])
def test_more_samples_than_fit_memory(files, capsys, n):
    assert "not enough memory" in refusal(capsys, ["sample", files / "run", "-n", n])


def test_temperature_scales_the_noise(files, tmp_path):
    for temperature in ("1", "1e-6"):
        assert (
            main(["sample", str(files / "run"), "-n", "50", "--temperature", temperature, "--out", str(tmp_path / f"{temperature}.npy")])
            == 0
        )
    assert np.load(tmp_path / "1e-6.npy").std(0).max() < 1e-4 < np.load(tmp_path / "1.npy").std(0).min()


def test_a_conditional_flow_takes_its_context_from_either_file(files, tmp_path):
    run = str(files / "conditional")
    assert main(["density", run, "--data", str(files / "xc.npz"), "--out", str(tmp_path / "a.npy")]) == 0
    context = ["--context", str(files / "context.npy")]
    assert main(["density", run, "--data", str(files / "x.csv"), *context, "--out", str(tmp_path / "b.npy")]) == 0
    assert np.array_equal(np.load(tmp_path / "a.npy"), np.load(tmp_path / "b.npy"))
    assert main(["sample", run, "-n", "2", *context, "--out", str(tmp_path / "s.npy")]) == 0
    assert np.load(tmp_path / "s.npy").shape == (80, 3)


def test_digits_from_grey_levels_to_grey_levels(digits, tmp_path, capsys):
    samples = tmp_path / "s.npy"
    assert main(["sample", str(digits), "-n", "12", "--class", "3", "--out", str(samples)]) == 0
    levels = np.load(samples)
    assert levels.shape == (12, 1, 8, 8) and levels.dtype == np.uint8 and levels.max() <= 16
    capsys.readouterr()
    assert main(["density", str(digits), "--data", "digits", "--draws", "2"]) == 0
    log_prob = np.load(digits / "log_prob.npy")
    assert log_prob.shape == (300,)
    assert f"{-log_prob.mean() / (64 * np.log(2)):.4f} bits per dimension" in capsys.readouterr().out
    np.savez(tmp_path / "xc.npz", x=levels, context=np.eye(10)[[3] * 12])
    assert main(["density", str(digits), "--data", str(tmp_path / "xc.npz")]) == 0


def test_images_become_a_picture(digits, tmp_path):
    pytest.importorskip("matplotlib")
    assert main(["sample", str(digits), "-n", "20", "--out", str(tmp_path / "s.png")]) == 0
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")


SHORT = ["--epochs", "1", "--batch-size", "16"]
COUPLINGS = {"nice": ["--hidden", "8", *SHORT], "realnvp": ["--hidden", "8", *SHORT]}
OF_IMAGES = {
    "nice": COUPLINGS["nice"],
    "realnvp": ["--blocks", "1", "--hidden-channels", "4", *SHORT],
    "glow": ["--levels", "1", "--steps", "2", "--hidden-channels", "4", *SHORT],
}


@pytest.mark.parametrize("flow", COUPLINGS)
def test_coupling_flows_do_the_four_tasks_on_tables(files, tmp_path, flow):
    run = tmp_path / "run"
    assert main(["train", flow, "--data", str(files / "xc.npz"), "--out", str(run), *COUPLINGS[flow]]) == 0
    assert main(["sample", str(run), "-n", "2", "--context", str(files / "context.npy"), "--temperature", "0.7"]) == 0
    assert np.load(run / "samples.npy").shape == (80, 3)
    assert main(["density", str(run), "--data", str(files / "xc.npz")]) == 0
    assert main(["infer", str(run), "--data", str(files / "xc.npz")]) == 0
    model, _, _ = load_model(run)
    x = model.decode(torch.from_numpy(np.load(run / "z.npy")), torch.from_numpy(np.load(files / "context.npy")))
    assert np.allclose(x, np.load(files / "x.npy"), atol=1e-3)


@pytest.mark.parametrize("flow", [*OF_IMAGES, "maf", "iaf"])
@pytest.mark.parametrize("conditional", [True, False], ids=["conditional", "unconditional"])
def test_every_flow_does_the_four_tasks_on_images(files, tmp_path, capsys, flow, conditional):
    pytest.importorskip("matplotlib")
    run = tmp_path / "run"
    data = ["--data", str(files / "images.npz")]
    train = ["train", flow, *data, "--grey-levels", "16", "--out", str(run), *OF_IMAGES.get(flow, SMALL)]
    assert main(train if conditional else [*train, "--unconditional"]) == 0
    assert "images of 3 x 6 x 4" + (" given 4 of context" if conditional else ";") in capsys.readouterr().out
    np.save(tmp_path / "classes.npy", np.eye(4)[:2])
    context = ["--context", str(tmp_path / "classes.npy")] if conditional else []
    assert main(["sample", str(run), "-n", "3", *context]) == 0
    samples = np.load(run / "samples.npy")
    assert samples.shape == ((6 if conditional else 3), 3, 6, 4) and samples.dtype == np.uint8 and samples.max() <= 15
    assert main(["density", str(run), *data]) == 0
    log_prob = np.load(run / "log_prob.npy")
    assert f"{-log_prob.mean() / (72 * np.log(2)):.4f} bits per dimension" in capsys.readouterr().out
    assert main(["infer", str(run), *data]) == 0
    model, _, _ = load_model(run)
    classes = torch.eye(4, dtype=torch.float64)[torch.arange(40) % 4] if conditional else None
    back = model.decode(torch.from_numpy(np.load(run / "z.npy")), classes).view(40, 3, 6, 4)
    images = np.moveaxis(np.load(files / "images.npy"), -1, 1)
    assert (back.numpy() == images).mean() > 0.999  # noise within 1e-6 of the next level may round to it
    assert main(["sample", str(run), "-n", "3", *context, "--out", str(tmp_path / "s.png")]) == 0
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")


def test_settings_of_images_are_refused_for_tables_and_the_other_way_round(files, tmp_path, capsys):
    train = ["train", "realnvp", "--out", tmp_path / "run", "--data"]
    assert "--levels is for images; the data are tables, of shape 3" in refusal(capsys, [*train, files / "xc.npz", "--levels", "3"])
    assert "--hidden is for tables; the data are images, of shape" in refusal(capsys, [*train, files / "images.npz", "--hidden", "8"])
    assert not (tmp_path / "run").exists()


def test_interpolations_begin_and_end_with_real_images(digits, files, tmp_path):
    pytest.importorskip("matplotlib")
    from flowkernels.data import load_digits

    out = tmp_path / "i.npy"
    assert main(["interpolate", str(digits), "--data", "digits", "--pairs", "12", "--steps", "5", "--out", str(out)]) == 0
    rows = np.load(out).reshape(12, 5, 64)
    test = load_digits().test
    for k, row in enumerate(rows):
        found = [(test.x.numpy() == end).all(1).nonzero()[0] for end in (row[0], row[-1])]
        assert all(len(f) for f in found) and found[0][0] != found[1][0]
        assert {int(test.context[f[0]].argmax()) for f in found} == {k % 10}  # both of one class, the classes in turn
        assert not (row[2] == row[0]).all()
    assert main(["interpolate", str(digits), "--data", "digits", "--pairs", "2"]) == 0
    assert (digits / "interpolation.png").read_bytes().startswith(b"\x89PNG")


def test_digits_without_their_classes(tmp_path, capsys):
    pytest.importorskip("sklearn")
    run = tmp_path / "run"
    assert main(["train", "nice", "--data", "digits", "--unconditional", "--out", str(run), *COUPLINGS["nice"]]) == 0
    for command in (["sample", str(run), "-n", "3"], ["density", str(run), "--data", "digits"], ["infer", str(run), "--data", "digits"]):
        assert main(command) == 0
    assert "standard deviation" in capsys.readouterr().out
    assert "--class is for runs trained on the digits with their classes; got 3" in refusal(capsys, ["sample", run, "-n", 1, "--class", 3])


def test_the_digits_have_settings_of_their_own(digits):
    _, config, _ = load_model(digits)
    assert config["flow"]["activation"] == "tanh" and config["training"]["weight_decay"] == 2.0 and config["flow"]["hidden"] == [8]


def test_great_circle_keeps_its_ends_and_its_radius():
    from flowkernels.cli.interpolate import great_circle

    torch.manual_seed(0)
    a = torch.nn.functional.normalize(torch.randn(3, 8), dim=1)
    b = torch.nn.functional.normalize(torch.randn(3, 8), dim=1)
    between = great_circle(a, b, torch.linspace(0, 1, 5))
    assert torch.allclose(between[:, 0], a, atol=1e-6) and torch.allclose(between[:, -1], b, atol=1e-6)
    assert torch.allclose(between.norm(dim=-1), torch.ones(3, 5), atol=1e-6)
    assert torch.allclose(great_circle(a, a, torch.tensor([0.3]))[:, 0], a)


def test_a_finished_run_says_so(files, capsys):
    capsys.readouterr()
    assert main(["train", "maf", "--data", str(files / "x.npy"), "--out", str(files / "run"), *SMALL]) == 0
    assert f"{files / 'run'} is finished" in capsys.readouterr().out


def test_no_standardize_takes_the_columns_as_they_are(files, tmp_path):
    arguments = ["train", "maf", "--data", str(files / "x.npy"), "--out", str(tmp_path / "run"), "--no-standardize", *SMALL]
    assert main(arguments) == 0
    assert load_model(tmp_path / "run")[1]["preprocess"] == {"kind": "identity"}


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        ("--data gone.npy", ["data file", "gone.npy does not exist"]),
        ("--data empty.csv", ["empty.csv is empty"]),
        ("--data words.csv", ["must be numeric; line 2, column 2 is 'five'"]),
        ("--data nan.npy", ["must be finite; row 3, column 1, counted from 0, is nan"]),
        ("--data hostile.npy", ["pickled objects are never loaded"]),
        ("--data x.npy --context gone.npy", ["context file", "does not exist"]),
        ("--data x.npy --context short.npy", ["context must have 40 rows", "got 7"]),
        ("--data xc.npz --context context.npy", ["context must come once"]),
        ("--data digits --context context.npy", ["context must not be given with --data digits"]),
        ("--data x.npy --context context.npy --unconditional", ["context must not be given with --unconditional"]),
        ("--data x.npy --grey-levels 4", ["grey_levels must be given for images alone; x.npy is a table of numbers"]),
        ("--data images.npy --grey-levels 4", ["must hold whole grey levels 0..3; row"]),
        ("--data images.npy --alpha 0.7", ["alpha must be at least 0 and less than 0.5; got 0.7"]),
        ("--data x.npy --validation 2", ["validation must be a fraction between 0 and 1; got 2.0"]),
        ("--data x.npy --averaging 1", ["averaging must be at least 0 and less than 1; got 1.0"]),
        ("--data x.npy --device cuda:99", ["device 'cuda:99' cannot be used"]),
    ],
)
def test_a_mistake_in_training_makes_no_folder(files, tmp_path, monkeypatch, capsys, arguments, messages):
    monkeypatch.chdir(files)
    error = refusal(capsys, ["train", "maf", *arguments.split(), "--out", tmp_path / "run"])
    assert all(message in error for message in messages)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        ("density run --data wide.npy", ["data must have 3 columns, like the run's; wide.npy has 4"]),
        ("density run --data xc.npz", ["context was given, [40, 2], but the run takes none"]),
        ("density conditional --data x.npy", ["context is missing: the run takes 2 columns"]),
        ("infer conditional --data x.npy --context wide.npy", ["context must have 2 columns, like the run's; got 4"]),
        ("density run --data digits", ["was trained on", "x.npy, not on the digits"]),
        ("density run --data nan.npy", ["row 3, column 1"]),
        ("density gone --data x.npy", ["run folder gone does not exist"]),
        ("density . --data x.npy", ["is no run folder: it has no config.json"]),
        ("density run --data x.npy --out d.txt", ["--out must end in .npy or .csv; got d.txt"]),
        ("density run --data x.npy --out gone/d.npy", ["folder gone of --out does not exist"]),
        ("sample run -n 3 --class 2", ["--class is for runs trained on the digits with their classes; got 2"]),
        ("sample run -n 3 --out s.png", ["not trained on images"]),
        ("interpolate run --data x.npy", ["interpolate is for runs trained on images; run was trained on a table"]),
        ("interpolate run --data x.npy --steps 1", ["argument --steps: must be at least 2, for both ends; got 1"]),
        ("sample conditional -n 3", ["context is missing"]),
        ("sample run -n 3 --context context.npy", ["context was given"]),
        ("train maf --data x.npy --out run --transforms 3", ["other settings: transforms was 1, now 3"]),
        ("train maf --data x.npy --out x.csv", ["must be a folder; it is a file"]),
        ("train maf --data digits --no-standardize --out new", ["standardize must not be switched off for images, such as digits"]),
    ],
)
def test_a_mistake_in_use_changes_nothing(files, monkeypatch, capsys, arguments, messages):
    monkeypatch.chdir(files)
    if arguments.startswith("train"):
        arguments += " --hidden 8 --epochs 2 --batch-size 16"
    before = {path: path.stat().st_mtime_ns for path in files.rglob("*")}
    error = refusal(capsys, arguments.split())
    assert all(message in error for message in messages), error
    assert before == {path: path.stat().st_mtime_ns for path in files.rglob("*")}


def test_a_reader_who_has_seen_enough():
    command = f"{sys.executable} -m flowkernels info; echo $? >&2"
    done = subprocess.run(f"({command}) | true", shell=True, capture_output=True, text=True)
    assert done.stderr.split() in (["141"], ["0"])  # the latter where all of it was written before the reader left


@pytest.mark.parametrize("number", ["-1", "10"])
def test_a_class_out_of_range(digits, capsys, number):
    assert f"--class must be 0..9; got {number}" in refusal(capsys, ["sample", digits, "-n", 1, "--class", number])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("sample run -n 0", "argument -n: must be at least 1; got 0"),
        ("sample run -n many", "argument -n: invalid whole number value: 'many'"),
        ("sample run -n 2 --temperature -1", "argument --temperature: must be a positive number; got -1"),
        ("train wavelet --data x --out y", "invalid choice: 'wavelet'"),
        ("train maf --out y", "the following arguments are required: --data"),
        ("train maf --data x --out y --activation cube", "invalid choice: 'cube'"),
        ("", "required: COMMAND"),
    ],
)
def test_argparse_refuses_the_rest(capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        main(arguments.split())
    assert stop.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["train"],
        ["train", "maf"],
        ["train", "nice"],
        ["train", "realnvp"],
        ["sample"],
        ["density"],
        ["infer"],
        ["interpolate"],
        ["info"],
        ["demo"],
    ],
)
def test_help_reads(capsys, arguments):
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and text.startswith("usage: python -m flowkernels") and "None" not in text


def test_info_names_the_version(capsys):
    import flowkernels

    assert main(["info"]) == 0
    assert flowkernels.__version__ in capsys.readouterr().out


@pytest.mark.parametrize(("module", "package"), [("sklearn", "scikit-learn"), ("matplotlib", "matplotlib")])
def test_a_missing_extra_is_named(monkeypatch, tmp_path, capsys, module, package):
    for name in [name for name in sys.modules if name.split(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    error = refusal(capsys, ["demo", "--quick", "--out", tmp_path / "demo"])
    assert f"needs {package}: pip install 'flowkernels[demo]'" in error
    assert not (tmp_path / "demo").exists()


def test_the_demo_leaves_pictures_and_figures(monkeypatch, tmp_path, capsys):
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    from flowkernels import demo

    monkeypatch.setattr(demo, "QUICK_FLOW", demo.QUICK_FLOW | {"transforms": 1, "hidden": [8]})
    monkeypatch.setattr(demo, "QUICK_TRAINING", TrainingSettings(epochs=2))
    monkeypatch.setattr(demo, "TIMED_SAMPLES", 20)
    threads = torch.get_num_threads()
    assert main(["demo", "--quick", "--out", str(tmp_path)]) == 0
    assert torch.get_num_threads() == threads
    assert sorted(os.listdir(tmp_path / "quick")) == ["results.json", "run", "samples.png", "training.png"]
    results = json.loads((tmp_path / "quick" / "results.json").read_text())
    for figures in (results["test"]["MAF"], results["test"]["Gaussian"]):
        assert np.isclose(figures["bits_per_dim"], -figures["nats"] / (64 * np.log(2)))
    # one class-conditional Gaussian in this space is near 2.05 bits per dimension; a uniform density is log2(17) = 4.09
    assert 2.0 < results["test"]["Gaussian"]["bits_per_dim"] < 2.1
    output = capsys.readouterr().out
    assert "test log-likelihood" in output and "D-pass loop" in output


def process(arguments, folder, **options):
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    # a test run started in the background ignores SIGINT, and its children would too
    restore = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    command = [sys.executable, "-m", "flowkernels", *arguments]
    return subprocess.Popen(
        command, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=restore, **options
    )


def test_ctrl_c_and_a_second_start_give_the_same_bits(files):
    train = ["train", "maf", "--data", "xc.npz", "--transforms", "2", "--hidden", "16", "--batch-norm", "--batch-size", "4"]
    train += ["--epochs", "40", "--patience", "40"]
    whole = process([*train, "--out", "whole"], files)
    broken = process([*train, "--out", "broken"], files)
    deadline = time.monotonic() + 600
    while not (files / "broken" / "checkpoint.pt").exists() and broken.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    broken.send_signal(signal.SIGINT)
    _, error = broken.communicate(timeout=600)
    assert broken.returncode == 130, error
    assert (
        "interrupted: broken is kept up to epoch" in error and "start the same command again to go on" in error and error.count("\n") == 1
    )
    checkpoint = RunFolder(files / "broken").read_checkpoint()
    assert not checkpoint["finished"] and 0 < len(checkpoint["history"]) < 40
    assert sorted(os.listdir(files / "broken")) in (["checkpoint.pt", "config.json"], ["checkpoint.pt", "config.json", "metrics.csv"])
    again = process([*train, "--out", "broken"], files)
    output, error = again.communicate(timeout=600)
    assert again.returncode == 0 and error == "" and "going on in broken after epoch" in output
    assert whole.communicate(timeout=600)[1] == "" and whole.returncode == 0
    for name in ("metrics.csv", "config.json"):
        assert (files / "broken" / name).read_bytes() == (files / "whole" / name).read_bytes()
    results = [RunFolder(files / name).read_checkpoint() for name in ("broken", "whole")]
    assert results[0]["history"] == results[1]["history"]
    assert all(torch.equal(results[0]["best"][name], value) for name, value in results[1]["best"].items())


def test_a_real_limit_on_file_size_is_one_line_and_loses_nothing(files):
    pytest.importorskip("resource")
    before = (files / "run" / "checkpoint.pt").read_bytes()
    script = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000)); from flowkernels.cli import main; sys.exit(main())"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    for arguments in (
        ["train", "maf", "--data", "x.npy", "--out", "limited", *SMALL],
        ["sample", "run", "-n", "1000", "--out", "run/big.npy"],
    ):
        done = subprocess.run([sys.executable, "-c", script, *arguments], cwd=files, env=environment, text=True, capture_output=True)
        assert done.returncode == 2 and done.stderr.count("\n") == 1
        assert "cannot write" in done.stderr and "File too large; what was there before is unchanged" in done.stderr
    assert os.listdir(files / "limited") == ["config.json"]
    assert (files / "run" / "checkpoint.pt").read_bytes() == before and not (files / "run" / "big.npy").exists()
    with_checkpoint = process(["sample", "limited", "-n", "1"], files)
    assert "has no checkpoint yet; start its train command again" in with_checkpoint.communicate(timeout=600)[1]


def test_a_folder_that_cannot_be_made_is_one_line(files, capsys):
    error = refusal(capsys, ["train", "maf", "--data", files / "x.npy", "--out", "/proc/run", *SMALL])
    assert "cannot make run folder /proc/run" in error


def test_a_closed_standard_output():
    done = subprocess.run(f"{sys.executable} -m flowkernels info >&-", shell=True, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
