"""Data: tables from files, the bundled digits, preprocessing whose log-determinant counts, and files written whole or not at all."""

from .digits import DIGITS, load_digits, one_hot
from .extras import optional
from .files import atomic_write, save_array
from .preprocess import GreyLevels, Identity, Preprocess, Standardize, build_preprocess
from .split import split_rows
from .table import Split, Table, load_table, read_array

__all__ = [
    "DIGITS",
    "GreyLevels",
    "Identity",
    "Preprocess",
    "Split",
    "Standardize",
    "Table",
    "atomic_write",
    "build_preprocess",
    "load_digits",
    "load_table",
    "one_hot",
    "optional",
    "read_array",
    "save_array",
    "split_rows",
]
