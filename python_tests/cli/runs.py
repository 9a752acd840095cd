"""What tests of the command line share: a small run, and what a mistake is answered with."""

from flowkernels.cli import main

SMALL = ["--transforms", "1", "--hidden", "8", "--epochs", "2", "--batch-size", "16"]


def refusal(capsys, arguments):
    """The one line that a mistake gets."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("flowkernels: error: ") and error.count("\n") == 1 and "Traceback" not in error
    return error
