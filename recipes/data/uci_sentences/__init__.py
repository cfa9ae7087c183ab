"""Reader of the Sentiment Labelled Sentences, with a split that never changes."""

import hashlib
from collections import Counter
from pathlib import Path

from datasets import ClassLabel, Dataset, DatasetDict, Features, Value


SOURCES = {"amazon": "amazon_cells_labelled.txt", "imdb": "imdb_labelled.txt", "yelp": "yelp_labelled.txt"}
LABELS = ["negative", "positive"]
SPLIT_SEED = 2015  # the year of the paper; with it everything below is fixed
TEST_PER_GROUP = 100  # of the 500 sentences of each source and label: 3 sources x 2 labels x 100 = 600


def load_uci_sentences() -> DatasetDict:
    """The 3,000 sentences as `train` (2,400) and `test` (600), columns `text`, `label` (0 or 1) and `source`.

    The test split holds 100 sentences of each source and label: those whose SHA-256 with the seed comes first, so that
    the split does not depend on any library's random numbers. A sentence that occurs more than once (19 do) is never
    in it.
    """
    rows = read_rows()
    copies = Counter(_key(row["text"]) for row in rows)
    groups = {}
    for row in rows:
        if copies[_key(row["text"])] == 1:
            groups.setdefault((row["source"], row["label"]), []).append(row["text"])
    test = {text for group in groups.values() for text in sorted(group, key=_order)[:TEST_PER_GROUP]}
    features = Features({"text": Value("string"), "label": ClassLabel(names=LABELS), "source": Value("string")})
    return DatasetDict(
        {
            "train": Dataset.from_list([row for row in rows if row["text"] not in test], features=features),
            "test": Dataset.from_list([row for row in rows if row["text"] in test], features=features),
        }
    )


def read_rows() -> list[dict]:
    """All rows in the order of the files.

    Read line by line, as `sentence<TAB>label`: the sentences contain quotation marks that quote nothing, and a CSV
    reader that honours them loses 252 rows. Lines end at `\\n` only; other characters that `str.splitlines` would
    break at are part of the sentences.
    """
    rows = []
    for source, name in SOURCES.items():
        for line in (Path(__file__).parent / name).read_bytes().decode("utf-8").split("\n"):
            if line:
                text, label = line.rsplit("\t", 1)
                rows.append({"text": text.strip(), "label": int(label), "source": source})
    return rows


def _key(text):
    """What makes two sentences the same: their words, in any case and spacing."""
    return " ".join(text.casefold().split())


def _order(text):
    return hashlib.sha256(f"{SPLIT_SEED}:{text}".encode()).hexdigest()
