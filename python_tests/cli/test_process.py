"""Commands in processes of their own: Ctrl-C that loses nothing, limits, closed outputs; and the demo."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from flowkernels.cli import main
from flowkernels.training import RunFolder, TrainingSettings
from python_tests.cli.runs import SMALL, refusal


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
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
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
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
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
