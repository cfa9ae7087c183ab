"""Image classification: train a vision transformer, collapse feed-forward blocks, compare.

    python recipes/image_classification.py recipes/image_classification/vit_fashion_mnist/dense.yaml
    python recipes/image_classification.py --model_name_or_path google/vit-base-patch16-224 \\
        --dataset_name ILSVRC/imagenet-1k --method layer_collapse --blocks last:6 --output_dir runs/vit-imagenet

`--train_file` and `--validation_file` take a folder of images in folders named after their classes, or MNIST's format:
`...-images-idx3-ubyte.gz`, with the labels beside it. Otherwise as text_classification.py.
"""

import gzip
from dataclasses import replace
from functools import partial

import datasets
import numpy as np
import torch
from common import labelled, load_rows, names_of_classes, numbers_of_classes, run
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification, DefaultDataCollator

from hf_layercollapse.metrics import Accuracy


def load_idx(path):
    """MNIST's format: big-endian magic number and sizes, then bytes."""
    with gzip.open(path) as file:
        pixels = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 28, 28)
    with gzip.open(str(path).replace("-images-idx3-", "-labels-idx1-")) as file:
        labels = np.frombuffer(file.read(), np.uint8, offset=8)
    features = datasets.Features(
        {"image": datasets.Array2D((28, 28), "uint8"), "label": datasets.ClassLabel(num_classes=10)}
    )
    return datasets.Dataset.from_dict({"image": pixels, "label": labels.astype(int)}, features=features)


def load_folder(path):
    return datasets.load_dataset("imagefolder", data_dir=path, split="train")


class ImageClassification:
    """Data, model and metric of one run."""

    metric = "accuracy"
    peft_task, head = None, ["classifier"]  # peft has no such task

    def __init__(self, data):
        self.processor = AutoImageProcessor.from_pretrained(data.source)
        train, validation = load_rows(data, {("-images-idx3-ubyte.gz",): load_idx, ("",): load_folder})
        self.column = data.input_column or "image"
        column, config = data.label_column, AutoConfig.from_pretrained(data.source)
        train, validation = labelled(train, column), labelled(validation, column)
        kept = data.keeps_head(config, "ForImageClassification")
        self.data = replace(data, class_names=data.class_names or names_of_classes(train, column, config, kept))
        numbers = [numbers_of_classes(rows, column, self.data.class_names) for rows in (train, validation)]
        self.train = train.with_transform(partial(self.augmented, numbers=numbers[0]))
        self.unmirrored = train.with_transform(partial(self.plain, numbers=numbers[0]))
        self.validation = validation.with_transform(partial(self.plain, numbers=numbers[1]))
        self.collate = DefaultDataCollator()

    def plain(self, rows, numbers):
        images = [self._array(image) for image in rows[self.column]]
        pixels = self.processor(images, return_tensors="pt", input_data_format="channels_last")["pixel_values"]
        labels = [numbers[value] for value in rows[self.data.label_column]]
        return {"pixel_values": pixels, "labels": torch.tensor(labels)}

    def augmented(self, rows, numbers):
        """Each image is mirrored or not; the transformation that changes no pixel."""
        encoded = self.plain(rows, numbers)
        mirrored = torch.rand(len(encoded["labels"]), 1, 1, 1) < 0.5
        encoded["pixel_values"] = torch.where(mirrored, encoded["pixel_values"].flip(-1), encoded["pixel_values"])
        return encoded

    @staticmethod
    def _array(image):
        if not isinstance(image, (np.ndarray, list)):
            return np.asarray(image.convert("RGB"))
        return np.asarray(image, np.uint8)[..., None]

    def make_model(self):
        # The head of a pretrained model may have other classes.
        return self.data.make_model(AutoModelForImageClassification, **self.data.classes, ignore_mismatched_sizes=True)

    def batches(self, samples=None, skip=0, validation=False, batch_size=64):
        """Labelled batches of training images (or of the validation split), none of them mirrored."""
        rows = self.validation if validation else self.unmirrored
        stop = len(rows) if samples is None else min(skip + samples, len(rows))
        return [rows[start : min(start + batch_size, stop)] for start in range(skip, stop, batch_size)]

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
    run(ImageClassification, __doc__)
