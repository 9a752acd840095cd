"""The READMEs' figures are those of the result rows."""

import pytest

from benchmarks import readme

pytestmark = pytest.mark.skipif(not readme.READMES[0].exists(), reason="needs the source tree")


def test_the_tables_are_made_of_the_rows():
    texts = [path.read_text() for path in readme.READMES]
    made = readme.tables()
    assert all(sum(f"<!-- measured: {name} -->" in text for text in texts) == 1 for name in made)
    assert [readme.with_tables(text, made) for text in texts] == texts, "python -m benchmarks.readme"


def test_only_what_stands_between_the_comments_is_replaced():
    text = "before\n<!-- measured: others -->\nold\nolder\n<!-- end -->\nbehind\n"
    assert readme.with_tables(text, {"others": "new"}) == "before\n<!-- measured: others -->\nnew\n<!-- end -->\nbehind\n"
