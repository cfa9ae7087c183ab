"""README's code runs as it stands, in order, in a folder where the names it uses are tiny local models and data."""

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, BertTokenizer

from .models import randomize


ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film", "a", "was", "it", "the"]


def blocks(language):
    """`(line number, code)` of every fenced block in this language."""
    for match in re.finditer(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL):
        yield README.count("\n", 0, match.start()) + 2, match.group(1)


@pytest.fixture
def stand_ins(tmp_path, monkeypatch):
    """A working directory in which README's Hub names are folders; `from_pretrained` prefers those."""
    monkeypatch.chdir(tmp_path)
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        max_position_embeddings=32,
    )
    torch.manual_seed(0)
    randomize(BertForSequenceClassification(config)).save_pretrained("google-bert/bert-base-uncased")
    BertForSequenceClassification.from_pretrained("google-bert/bert-base-uncased").save_pretrained(
        "textattack/bert-base-uncased-SST-2"
    )
    BertTokenizer(vocab={word: index for index, word in enumerate(WORDS)}).save_pretrained(
        "google-bert/bert-base-uncased"
    )
    data = Path("stanfordnlp/sst2")
    data.mkdir(parents=True)
    for split, rows in (("train", 1600), ("validation", 16)):
        lines = [
            json.dumps(
                {
                    "idx": row,
                    "sentence": f"the film was {('bad', 'good')[row % 2]}" + " it" * (row % 5),
                    "label": row % 2,
                }
            )
            for row in range(rows)
        ]
        (data / f"{split}.jsonl").write_text("\n".join(lines))


def test_the_code_runs_in_order(stand_ins):
    namespace = {"__name__": "__main__"}
    found = list(blocks("python"))
    for line, code in found:
        # Line numbers in a traceback are README's.
        exec(compile("\n" * (line - 1) + code, "README.md", "exec"), namespace)
    assert found or not README, "README shows no code"


def test_the_files_that_it_names_are_there():
    for _, code in blocks("bash"):
        for word in code.split():
            if re.fullmatch(r"[\w./-]+\.(py|txt|md|yaml)", word):
                assert (ROOT / word).exists(), word
    for link in re.findall(r"\]\((?!https?://|#)([^)#]+)", README):
        assert (ROOT / link).exists(), link
