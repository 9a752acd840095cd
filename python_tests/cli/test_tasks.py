"""The command line's four tasks, on tables and on images."""

import numpy as np
import pytest
import torch

from flowkernels.cli import main
from flowkernels.training import load_model
from python_tests.cli.runs import SMALL, refusal


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
    train = ["train", "maf", "--data", str(numbers), "--context", str(context), "--out", str(run), *SMALL]
    assert main(train) == 0
    for command in (["density", run, "--data", numbers], ["sample", run, "-n", "1"]):
        out = ["--out", str(tmp_path / "out.npy")]
        assert main([str(part) for part in [*command, "--context", context, *out]]) == 0
        said = refusal(capsys, [*command, "--context", turned, *out])
        assert "turned.csv must have the columns mass, price, in the order of training; got price, mass" in said
    renamed = tmp_path / "renamed.csv"
    renamed.write_text(context.read_text().replace("mass,price", "weight,cost"))
    assert main([*train[:5], str(renamed), *train[6:]]) == 0  # the same content: the run is gone on with


def test_a_context_for_a_run_that_left_it_out(files, tmp_path, capsys):
    run, data = tmp_path / "run", ["--data", str(files / "xc.npz")]
    assert main(["train", "maf", *data, "--unconditional", "--out", str(run), *SMALL]) == 0
    assert main(["density", str(run), *data]) == 0
    context = ["--context", files / "context.npy"]
    assert "context was given, [40, 2], but the run takes none" in refusal(capsys, ["density", run, "--data", files / "x.npy", *context])


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
