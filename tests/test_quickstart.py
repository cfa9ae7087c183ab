import hashlib
import sys
from collections import Counter
from pathlib import Path

import pytest


RECIPES = Path(__file__).parents[1] / "recipes"


@pytest.fixture(scope="module")
def sentences():
    sys.path.insert(0, str(RECIPES))
    try:
        from data.uci_sentences import load_uci_sentences

        return load_uci_sentences()
    finally:
        sys.path.remove(str(RECIPES))


def test_split_has_its_sizes_and_is_balanced(sentences):
    assert {name: len(split) for name, split in sentences.items()} == {"train": 2400, "test": 600}
    for name, count in (("train", 400), ("test", 100)):
        groups = Counter(zip(sentences[name]["source"], sentences[name]["label"], strict=True))
        assert groups == {(source, label): count for source in ("amazon", "imdb", "yelp") for label in (0, 1)}


def test_no_sentence_is_in_both_splits(sentences):
    train, test = ({" ".join(text.lower().split()) for text in sentences[name]["text"]} for name in ("train", "test"))
    assert not train & test
    assert len(test) == 600


def test_no_row_is_lost_and_none_are_glued_together(sentences):
    rows = [row for split in sentences.values() for row in split]
    # A reader that honours quotes gives 748 IMDb rows, some of them many lines long.
    assert sum(row["source"] == "imdb" for row in rows) == 1000
    assert not any(character in row["text"] for row in rows for character in "\n\t")
    assert max(len(row["text"]) for row in rows) < 500


def test_split_never_changes(sentences):
    digest = hashlib.sha256("\n".join(sentences["test"]["text"]).encode()).hexdigest()
    assert digest == "2a28c890e23605bedb46d8cb42e1a67ceeb4e5214125d0e239e075a1c571b053"
