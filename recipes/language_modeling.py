"""Causal language modelling: train a decoder, collapse feed-forward blocks, compare.

    python recipes/language_modeling.py --model_name_or_path openai-community/gpt2 \\
        --dataset_name Salesforce/wikitext --dataset_config_name wikitext-103-raw-v1 --max_length 1024 \\
        --method layer_collapse --blocks last:4 --output_dir runs/gpt2-wikitext103

`--train_file` and `--validation_file` take plain text. Texts are joined and cut into blocks of `--max_length` tokens.
Otherwise as text_classification.py.
"""

from pathlib import Path

import torch
from common import TABLES, load_rows, run
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, default_data_collator

from hf_layercollapse.metrics import Perplexity


def load_text(path):
    return Dataset.from_dict({"text": Path(path).read_text(encoding="utf-8").splitlines(keepends=True)})


class LanguageModeling:
    """Data, model and metric of one run."""

    metric = "perplexity"
    peft_task, head = "CAUSAL_LM", None
    collate = staticmethod(default_data_collator)

    def __init__(self, data):
        self.data = data
        self.processor = AutoTokenizer.from_pretrained(data.source)
        self.train, self.validation = load_rows(data, {(".txt", ".tokens", ".raw"): load_text, **TABLES}, self._blocks)

    def _blocks(self, rows):
        """The texts in their order as one, in blocks of tokens."""
        column, length = self.data.input_column or "text", self.data.max_length
        tokens = [
            token
            for start in range(0, len(rows), 1000)
            for text in self.processor(rows[start : start + 1000][column], verbose=False)["input_ids"]
            for token in text
        ]
        blocks = [tokens[start : start + length] for start in range(0, len(tokens) - length + 1, length)]
        if not blocks:
            raise ValueError(f"The text has {len(tokens)} tokens, fewer than one block of --max_length {length}.")
        return Dataset.from_dict({"input_ids": blocks, "labels": blocks})

    def make_model(self):
        return self.data.make_model(AutoModelForCausalLM)

    def batches(self, samples=None, skip=0, validation=False, batch_size=1):
        """Batches of blocks of the training text (or of the validation text), with labels."""
        rows = (self.validation if validation else self.train).with_format("torch")
        stop = len(rows) if samples is None else min(skip + samples, len(rows))
        return [dict(rows[start : min(start + batch_size, stop)]) for start in range(skip, stop, batch_size)]

    def shorten_logits(self, logits, labels):
        """Summed negative log-likelihood of each block."""
        return negative_log_likelihood(logits, labels)

    def metrics(self, prediction):
        counts = (prediction.label_ids[:, 1:] != -100).sum(1)
        return Perplexity().compute(predictions=prediction.predictions, references=counts)

    @staticmethod
    @torch.no_grad()
    def score(model, batches):
        """Mean negative log-likelihood of each block, in nats a token."""
        values = [negative_log_likelihood(model(batch["input_ids"]).logits, batch["labels"]) for batch in batches]
        return torch.cat(values) / (batches[0]["labels"].shape[1] - 1)


def negative_log_likelihood(logits, labels):
    """`(batch, tokens, vocabulary), (batch, tokens) -> (batch,)`, summed over the tokens after the first."""
    losses = torch.nn.functional.cross_entropy(
        logits[:, :-1].float().transpose(1, 2), labels[:, 1:], ignore_index=-100, reduction="none"
    )
    return losses.sum(1)


if __name__ == "__main__":
    run(LanguageModeling, __doc__)
