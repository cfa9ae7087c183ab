"""Running the command line in a test, and folders and files for it."""

import sys

import pytest
import torch
from typer.testing import CliRunner

from hf_layercollapse.cli import app, main

from .models import BY_NAME, VOCABULARY
from .words import word_tokenizer


WORDS = [f"w{index}" for index in range(VOCABULARY - 3)]


def save_text_model(folder, case="bert", **tokenizer_options):
    """A tiny model of the table, with a tokenizer of one token a word."""
    BY_NAME[case].model().save_pretrained(folder)
    word_tokenizer(["[PAD]", "[UNK]", "[CLS]", *WORDS], **tokenizer_options).save_pretrained(folder)
    return folder


def lines_of_words(count, seed=0):
    """Different lines of 3 to 11 words."""
    generator = torch.Generator().manual_seed(seed)
    chosen = [torch.randint(0, len(WORDS), (3 + row % 9,), generator=generator).tolist() for row in range(count)]
    return [" ".join(WORDS[index] for index in row) for row in chosen]


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)


def fails(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["layercollapse", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 1
    error = capsys.readouterr().err.strip().split("\n")[-1].split("\r")[-1]
    assert error.startswith("layercollapse: ")
    return error
