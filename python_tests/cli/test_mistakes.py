"""One line for each mistake, and nothing changed or lost."""

import subprocess
import sys

import pytest

from flowkernels.cli import main
from python_tests.cli.runs import refusal


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
