"""Text classification: train an encoder, collapse feed-forward blocks, compare.

    python recipes/text_classification.py recipes/text_classification/bert_base_sst2/layer_collapse.yaml
    python recipes/text_classification.py --model_name_or_path google-bert/bert-base-uncased \\
        --dataset_name stanfordnlp/sst2 --input_column sentence --method layer_collapse --blocks last:6 \\
        --output_dir runs/bert-sst2

`--train_file` and `--validation_file` take .csv, .tsv, .json(l) and .parquet files with a text and a class column
(`--input_column`, `--label_column`; classes are numbers or names). A fine-tuned model keeps its classes, in its order;
where it has no names for the data's, `--class_names` says these in the order of its numbers. Options of a YAML file
come first, those of the command line win. Everything that TrainingArguments and LayerCollapseConfig know is an option
too. On several GPUs:
`accelerate launch --config_file recipes/accelerate_configs/ddp.yaml recipes/text_classification.py ...`.
"""

from dataclasses import replace

import torch
from common import TABLES, labelled, load_rows, names_of_classes, numbers_of_classes, run
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding

from hf_layercollapse.metrics import Accuracy


class TextClassification:
    """Data, model and metric of one run."""

    metric = "accuracy"
    peft_task, head = "SEQ_CLS", None

    def __init__(self, data):
        self.processor = AutoTokenizer.from_pretrained(data.source)
        train, validation = load_rows(data, TABLES)
        texts = [data.input_column or "text"] + ([data.second_input_column] if data.second_input_column else [])
        for name in (*texts, data.label_column):
            if name not in train.column_names:
                raise ValueError(f"The data has no column {name!r}, only {train.column_names}.")
        column, config = data.label_column, AutoConfig.from_pretrained(data.source)
        train, validation = labelled(train, column), labelled(validation, column)
        kept = data.keeps_head(config, "ForSequenceClassification")
        self.data = replace(data, class_names=data.class_names or names_of_classes(train, column, config, kept))

        def encode(rows, numbers):
            encoded = self.processor(*(rows[text] for text in texts), truncation=True, max_length=data.max_length)
            return {**encoded, "labels": [numbers[value] for value in rows[column]]}

        self.train, self.validation = (
            rows.map(
                encode,
                batched=True,
                remove_columns=rows.column_names,
                fn_kwargs={"numbers": numbers_of_classes(rows, column, self.data.class_names)},
            )
            for rows in (train, validation)
        )
        self.collate = DataCollatorWithPadding(self.processor)

    def make_model(self):
        return self.data.make_model(AutoModelForSequenceClassification, **self.data.classes)

    def batches(self, samples=None, skip=0, validation=False, batch_size=32):
        """Labelled batches of training rows (or of the validation split), of like lengths together."""
        rows = self.validation if validation else self.train
        rows = rows.select(range(skip, len(rows) if samples is None else min(skip + samples, len(rows))))
        rows = sorted(rows, key=lambda row: len(row["input_ids"]))
        return [dict(self.collate(rows[start : start + batch_size])) for start in range(0, len(rows), batch_size)]

    def shorten_logits(self, logits, labels):
        return logits.argmax(-1)

    def metrics(self, prediction):
        return Accuracy().compute(predictions=prediction.predictions, references=prediction.label_ids)

    @staticmethod
    @torch.no_grad()
    def score(model, batches):
        """Whether each example is right, a tensor of 0 and 1."""
        return torch.cat([(model(**batch).logits.argmax(-1) == batch["labels"]).float() for batch in batches])


if __name__ == "__main__":
    run(TextClassification, __doc__)
