"""The README's figures are those of the result rows."""

import pytest

from benchmarks import readme, rows

pytestmark = pytest.mark.skipif(not readme.README.exists(), reason="needs the source tree")


def test_the_tables_are_made_of_the_rows():
    text = readme.README.read_text()
    made = readme.tables(rows.read(readme.MEASURED))
    assert all(f"<!-- measured: {name} -->" in text for name in made)
    assert readme.with_tables(text, made) == text, "python -m benchmarks.readme"


def test_only_what_stands_between_the_comments_is_replaced():
    text = "before\n<!-- measured: others -->\nold\nolder\n<!-- end -->\nbehind\n"
    assert readme.with_tables(text, {"others": "new"}) == "before\n<!-- measured: others -->\nnew\n<!-- end -->\nbehind\n"
