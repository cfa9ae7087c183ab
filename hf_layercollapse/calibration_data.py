"""Calibration data as models read it, made of what people have: texts, pairs, conversations, images, sounds."""

import copy
import math
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from functools import partial
from inspect import signature
from itertools import accumulate, chain, islice
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import BaseImageProcessor, PreTrainedTokenizerBase, ProcessorMixin, SequenceFeatureExtractor
from transformers.image_utils import is_pil_image
from transformers.modeling_utils import PreTrainedModel

from .class_labels import Labels, ModelClasses, labels_of
from .models import is_encoder_decoder, unwrap
from .rows import IGNORED, contents, tokens_in
from .scoring import SECRET, check_classes
from .sentence_models import SentenceInputs, sentence_model
from .upstream import is_causal_language_model, is_classifier


# Tokens of a row, where nothing is said and the model takes more: what a block is fitted to hardly depends on it, and
# the time and memory of attention do.
MOST_TOKENS = 512

# Of a stream so many rows are read for each that is wanted (some are empty); where nothing is said, so many at most.
ROWS_FOR_A_SAMPLE, MOST_OF_A_STREAM = 2, 16_384

# A document that gives fewer rows than this is read in shorter ones, of no fewer than so many tokens.
FEW_ROWS, LEAST_TOKENS = 16, 32


class CalibrationData:
    """Batches of model inputs, made of raw data by the model's own tokenizer or processor.

    A text that is longer than a row is read in several rows of `max_length` tokens, so that nothing of it is lost;
    with a label it is one example and is cut, as the model's user would cut it. Tokens are kept; images and sounds
    are read anew at each pass, and only those that are used. Batches can be read as often as one likes.

    What takes `calibration_data` takes raw data too, where it is given the `processing_class`, with the defaults here.
    An object of sentence-transformers needs none: raw data become the features that its own `encode` or `predict`
    makes of them, with its tokenizer, its `max_seq_length` and its default prompt.

    Args:
        data (iterable): Any of these, all of one kind, or rows of a data set that have them in `columns`:

            - texts (`str`), or pairs of them (`tuple[str, str]`): two sentences that the model reads together, or for
              an encoder-decoder a source and a target;
            - conversations: lists of messages, `{"role": …, "content": …}`, written out by the chat template;
            - images (`PIL.Image`, or arrays as the processor takes them);
            - sounds: arrays of shape `(samples,)` at the processor's sampling rate, or dicts of `array` and
              `sampling_rate`; for an encoder-decoder pairs of a sound and a text;
            - rows that are tokenized (`{"input_ids": list[int], …}`), which are padded to batches; their `labels`, or
              `label`, are the model's numbers;
            - batches (dicts of tensors), which stay as they are.

            A stream (an `IterableDataset` of datasets or torch that has no length) is read from its beginning: twice
            as many of its rows as `samples` says, or without that all of them, and it is refused if they are more
            than 16,384. Call its `shuffle` first where its beginning is not like the rest.
        processing_class (*optional*): Tokenizer, image processor, feature extractor, or processor with these parts,
            as [`~transformers.Trainer`] takes it. Not needed for batches and rows that are tokenized, nor for a
            `SentenceTransformer`, `SparseEncoder` (texts, or what else it reads) or `CrossEncoder` (pairs).
        model (`nn.Module`, *optional*): Whose inputs these are to be: its longest input is the limit of `max_length`,
            and it gets only what its forward takes.
        columns (`str` or `list[str]`, *optional*): Where data has columns: which to read, two for pairs. Default: the
            only one that holds something of the above.
        label_column (`str`, *optional*): Column of the class of each row, its index or its name in the model's
            config; the batches then have `labels`. Where a data set names its classes (a `ClassLabel`, as the folders
            of images are) and the model's config does, they are found by name, in whatever case and order. Rows
            without a label are left out.
        max_length (`int`, *optional*): Tokens of a row at most. Default: what the model and its tokenizer take, at
            most 512; the `max_seq_length` of an object of sentence-transformers.
        batch_size (`int`): Rows of a batch.
        samples (`int`, *optional*): Use so many rows, drawn at random, from as many texts as there are, or of a stream
            as are read. Default: all, in order.
        max_tokens (`int`, *optional*): Of rows of tokens use so many, drawn at random, as have this many tokens
            together; but 16, where there are these. Default: no limit.
        seed (`int`): Of that draw.
        task (`str`, *optional*): `"query"` or `"document"`: what `encode_query` or `encode_document` of an object of
            sentence-transformers makes of texts, with the prompt of that name, by that route of a `Router`.

    Raises:
        TypeError: `processing_class` is none of these.
        ValueError: There is no data, it is of no kind that is known or that `processing_class` reads, it is a stream
            that goes on and on, columns or labels are missing or wrong, the data's classes have names and the model's
            have others, or `max_length` is more than the model takes.
    """

    def __init__(
        self,
        data: Iterable[Any],
        processing_class: Any = None,
        model: nn.Module | None = None,
        columns: str | Sequence[str] | None = None,
        label_column: str | None = None,
        max_length: int | None = None,
        batch_size: int = 8,
        samples: int | None = None,
        seed: int = 0,
        task: str | None = None,
        max_tokens: int | None = None,
    ) -> None:
        numbers = {"max_length": max_length, "batch_size": batch_size, "samples": samples, "max_tokens": max_tokens}
        for name, value in numbers.items():
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"`{name}` must be an integer of at least 1, got {value!r}.")
        self.model = None if model is None else unwrap(model)[0]
        self.batch_size, self.samples, self.label_column = batch_size, samples, label_column
        self.max_tokens = max_tokens
        self.columns = [columns] if isinstance(columns, str) else None if columns is None else list(columns)
        data, first = _with_its_first(data)
        # Batches, as they were given.
        self._batches: Any = data if _is_batch(first) else None
        if self._batches is not None:
            return
        self._order = random.Random(seed)
        # How many rows were met, and of how many samples, where some of them are drawn.
        self._met, self._visited, self._is_stream = 0, 0, is_stream(data)
        self._parts = _Parts(processing_class)
        sentences = sentence_model(model) if processing_class is None else None
        self._inputs: Any = None if sentences is None else SentenceInputs(sentences, task, max_length)
        if task is not None and self._inputs is None:
            raise ValueError("`task` is of objects of sentence-transformers, without a `processing_class`.")
        self._class_names = _class_names_of(data, label_column)
        self._labels = Labels([])  # none where no column of them is asked for
        # The second to ask what is there, which decodes nothing.
        self._data: Any
        self._undecoded: Any
        self._data = self._undecoded = _by_index(data, samples)
        self._rows = self._prepared(first, max_length)

    def __len__(self) -> int:
        """How many batches there are."""
        return len(self._batches) if self._batches is not None else len(self._parts_of_rows())

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if self._batches is not None:
            yield from self._batches
            return
        yield from self.at(range(len(self)))

    @property
    def given(self) -> Any:
        """The batches that it was given, as they are; `None` where they are made of rows."""
        return self._batches

    def at(self, numbers: Iterable[int]) -> Iterator[dict[str, Any]]:
        """The batches of these numbers, of those that are made of rows."""
        parts = self._parts_of_rows()
        for number in numbers:
            batch = self._collate(parts[number])
            if self.model is not None and not self._are_features:
                taken = signature(self.model.forward).parameters
                batch = {name: value for name, value in batch.items() if name in taken}
            yield batch

    def regrouped(self, places: Mapping[int, Sequence[int]], batch_size: int, seed: int) -> "CalibrationData":
        """Some of the rows, by the numbers of their batches and their places in these, in batches of another size."""
        parts, chosen = self._parts_of_rows(), copy.copy(self)
        chosen._rows = [parts[number][place] for number, found in places.items() for place in found]
        chosen.batch_size = batch_size
        random.Random(seed).shuffle(chosen._rows)
        return chosen

    def _parts_of_rows(self) -> list[list[Any]]:
        """The rows of each batch; those that an object of sentence-transformers reads are of one kind in a batch."""
        groups = [self._rows]
        if self._are_features:
            groups = [[row for row in self._rows if row.kind == kind] for kind in sorted({r.kind for r in self._rows})]
        size = self.batch_size
        return [rows[start : start + size] for rows in groups for start in range(0, len(rows), size)]

    def part(self, index: int, count: int) -> "CalibrationData":
        """Every `count`-th of the rows (or of the batches that it was given), from this one on: what one of several
        processes reads.

        Raises:
            ValueError: There are fewer than `count`.
        """
        part = copy.copy(self)
        if self._batches is not None:
            part._batches = list(islice(self._batches, index, None, count))
            left, what = part._batches, "batches"
        else:
            left = part._rows = self._rows[index::count]
            what = "rows"
            part._met, part._visited = len(left), len(self._data)  # the others are not left out
        if not left:
            raise ValueError(f"The calibration data has fewer {what} than there are processes ({count}).")
        return part

    def __str__(self) -> str:
        return self.described()

    def described(self, option: str = "`samples`") -> str:
        """What was read, in one line, with this option for what says how many rows."""
        if self._batches is not None:
            return "batches of model inputs"
        parts = [f"column {' and '.join(self.columns)}"] if self.columns else []
        parts.append(f"{len(self._rows):,}{self._of_all(option)}")
        if self._has_tokens:
            batches = list(self)
            found = [content for batch in batches for content in contents(batch)]
            parts += [f"{len(set(found)):,} different", f"{sum(map(tokens_in, batches)):,} tokens"]
        if self.samples is not None and len(self._rows) < self.samples and len(self._rows) == self._met:
            parts.append(f"all there are (fewer than {self.samples:,})")
        if self._cut:
            parts.append(f"{self._cut:,} of them cut to {self.max_length} tokens")
        if self._labels.missing:
            parts.append(f"{self._labels.missing:,} without a label left out")
        if self._labels.said:
            parts.append(f"classes by name: {self._labels.said}")
        return ", ".join(parts)

    def _of_all(self, option: str) -> str:
        """Of how many rows these are, behind their number."""
        if len(self._rows) == self._met and self._visited == len(self._data):
            texts = f" of {self._visited:,} text{'s' if self._visited > 1 else ''}"
            return " rows" + (texts if self._met > self._visited else "")
        if self._is_stream:
            return f" rows of the first {len(self._data):,} samples ({option})"
        if self._visited == len(self._data):
            return f" of {self._met:,} rows ({option})"
        if self._met <= self._visited:  # one of each, but for empty ones
            return f" of {len(self._data):,} rows ({option})"
        return f" rows of {len(self._data):,} texts ({option})"

    # ---- What the samples are ----

    def _prepared(self, first: Any, max_length: int | None) -> list[Any]:
        """The rows: tokens, or where images and sounds are."""
        self._cut, self._has_tokens, self._are_features = 0, True, False
        self.max_length: int | None = None
        # Makes a batch of some of the rows.
        self._collate: Callable[[Any], dict[str, Any]]
        if isinstance(first, Mapping) and "input_ids" in first:
            self._collate = self._padded
            self._check_columns(first)
            self._labels = self._read_labels()
            return self._within(self._drawn(self._tokens(index) for index in self._indices()))
        if isinstance(first, Mapping) and not _is_medium(first):
            self._check_columns(first)
            self.columns = self._columns(first)
            self._labels = self._read_labels()
            if _is_data_set(self._data):
                self._data, self._undecoded = _columns_of(self._data, [*self.columns, self.label_column])
        elif self.columns or self.label_column:
            raise ValueError(f"`columns` are of data that has some; got {_kind(first)} in place of rows.")
        filled = next((index for index in range(len(self._data)) if not self._is_empty(index)), None)
        if filled is None:
            where = f"column {' and '.join(self.columns)} of " if self.columns else ""
            raise ValueError(f"There is nothing in {where}the calibration data: all {len(self._data)} rows are empty.")
        sample = self._sample(self._data, filled)
        if self._inputs is not None:
            self._collate, self._are_features, self.max_length = self._featured, True, self._inputs.max_length
            return self._read_by_the_object()
        medium, paired = (sample[0], True) if _is_pair(sample) else (sample, False)
        if isinstance(medium, str) or _is_chat(medium):
            tokenizer = self._parts.tokenizer_of_texts(medium)
            self._check_encoder_decoder(paired)
            self._collate = self._padded
            return self._texts(max_length, tokenizer)
        if not _is_medium(medium):
            where = f"Column {self.columns[0]!r} holds" if self.columns else "The calibration data holds"
            raise ValueError(
                f"{where} {_kind(medium)}; known are texts, pairs of texts, conversations (lists of messages with "
                "`role` and `content`), images, sounds, rows with `input_ids`, and batches (dicts of tensors)."
            )
        self._reader = self._parts.reader(medium, self.model)
        self._collate, self._has_tokens = self._read, False
        return self._drawn([] if self._is_empty(index) else [index] for index in self._indices())

    def _check_columns(self, first: Mapping[str, Any]) -> None:
        for name in [*(self.columns or []), *([self.label_column] if self.label_column else [])]:
            if name not in first:
                raise ValueError(f"The data has no column {name!r}; it has {sorted(first)}.")

    def _columns(self, first: Mapping[str, Any]) -> list[str]:
        """The columns to read: those that were named, or the only one there is."""
        if self.columns:
            if len(self.columns) > 2:
                raise ValueError(f"Two columns can be read together at most, got {self.columns}.")
            return self.columns
        wanted = self._parts.wanted(self.model)
        found = [name for name in first if _is_one_of(self._first_of(name, first), wanted)]
        found = [name for name in found if name != self.label_column] or found
        if not found:
            raise ValueError(f"The data has no column with any {wanted}; it has {sorted(first)}.")
        if len(found) > 1:
            raise ValueError(
                f"The data has several columns of {wanted}, {found}: say which to read with `columns` (from the "
                "shell: --column), or two of them for pairs."
            )
        return found

    def _first_of(self, name: str, first: Mapping[str, Any]) -> Any:
        """What a column holds first."""
        if not _is_nothing(first[name]):
            return first[name]
        column = self._data[name] if _is_data_set(self._data) else (row[name] for row in self._data)
        return next((value for value in column if not _is_nothing(value)), None)

    def _sample(self, data: Any, index: int) -> Any:
        row = data[index]
        if self.columns is None:
            return row
        return row[self.columns[0]] if len(self.columns) == 1 else tuple(row[name] for name in self.columns)

    def _is_empty(self, index: int) -> bool:
        """Whether nothing is read of a row: it has no sample, or no label where these are read."""
        if self.label_column is not None and self._labels.values[index] is None:
            return True
        sample = self._sample(self._undecoded, index)
        parts = sample if isinstance(sample, tuple) else [sample]
        return any(_is_nothing(part) for part in parts)

    def _indices(self) -> list[int]:
        """Of the data: in order, or in a random one where some are drawn."""
        indices = list(range(len(self._data)))
        if self.samples is not None:
            self._order.shuffle(indices)
        return indices

    def _drawn(self, rows_of_samples: Iterable[list[Any]]) -> list[Any]:
        """The rows of all samples; or so many as are wanted, from as many samples as there are."""
        self._met, self._visited = 0, 0
        samples = self.samples
        share = 0 if samples is None else math.ceil(samples / len(self._data))
        drawn, spare = [], []
        for rows in rows_of_samples:
            self._met, self._visited = self._met + len(rows), self._visited + 1
            if samples is None:
                drawn += rows
                continue
            if len(rows) > share:
                rows = self._order.sample(rows, len(rows))
            drawn += rows[:share]
            spare += rows[share:]
            if len(drawn) >= samples:
                break
        self._order.shuffle(spare)
        return (drawn + spare)[:samples]

    def _within(self, rows: list[Any]) -> list[Any]:
        """Of rows of tokens so many, from all over them, as `max_tokens` leaves."""
        if self.max_tokens is None or sum(len(row["input_ids"]) for row in rows) <= self.max_tokens:
            return rows
        self._order.shuffle(rows)
        sums = accumulate(len(row["input_ids"]) for row in rows)
        return rows[: max(FEW_ROWS, sum(total <= self.max_tokens for total in sums))]

    # ---- Labels ----

    def _read_labels(self) -> Labels:
        """Those of all rows, as the model numbers its classes; without a column of them none.

        Raises:
            ValueError: The column holds no labels, or others than the model's.
        """
        if self.label_column is None:
            return Labels([])
        classes: ModelClasses | None = ModelClasses(None)
        if isinstance(self.model, PreTrainedModel):
            classes = None if self.model.config.num_labels == 1 else ModelClasses.of(self.model.config)
        labels = labels_of(self._values_of(self.label_column), self._class_names, classes, self.label_column)
        found = sorted({value for value in labels.values if value is not None})
        if not found:
            raise ValueError(f"No row has a label in column {self.label_column!r}." + SECRET)
        if isinstance(self.model, PreTrainedModel):
            check_classes(self.model, torch.tensor(found))
        return labels

    def _values_of(self, column: str) -> list[Any]:
        # What a data set's own format makes of a cell is what is stored; what a transform makes of it is not.
        if _is_data_set(self._data) and self._data.format["type"] != "custom":
            return self._data.with_format(None)[column][:]
        values = [row[column] for row in self._data]
        return [value.item() if _is_array(value) and value.ndim == 0 else value for value in values]

    # ---- Texts ----

    def _texts(self, max_length: int | None, tokenizer: Any) -> list[Any]:
        """The rows of all texts. Where nothing is said of their length, and a document gives few, shorter ones: some
        are held back to score on."""
        length = longest_row(max_length, self.model, tokenizer)
        while True:
            self._cut, self.max_length = 0, length
            rows = self._within(self._drawn(self._tokenized(index, length) for index in self._indices()))
            long = any(len(row["input_ids"]) == length for row in rows) and not self._cut
            if max_length is not None or len(rows) >= FEW_ROWS or not long or length // 2 < LEAST_TOKENS:
                return rows
            length //= 2

    def _tokens(self, index: int) -> list[dict[str, Any]]:
        """A row that is tokenized; none without a label where these are read."""
        row = _token_row(self._data[index])
        if self.label_column is None:
            return [row]
        label = self._labels.values[index]
        return [] if label is None else [{**row, "labels": label}]

    def _check_encoder_decoder(self, paired: bool) -> None:
        self._has_target = is_encoder_decoder(self.model) and not is_classifier(self.model)
        if self._has_target and not paired:
            raise ValueError(
                f"A {type(self.model).__name__} reads an input and writes another text: pass pairs of these."
            )

    def _tokenized(self, index: int, length: int) -> list[dict[str, Any]]:
        """The rows of one text, pair or conversation; none if it is empty."""
        if self._is_empty(index):
            return []
        sample, tokenizer = self._sample(self._data, index), self._parts.tokenizer()
        label = {} if self.label_column is None else {"labels": self._labels.values[index]}
        cut = {"truncation": True, "max_length": length}
        if _is_pair(sample):
            source, *other = sample
            if not all(isinstance(text, str) for text in sample):
                raise ValueError(f"Pairs must be two texts, got {_kind(source)} and {_kind(other[0])}.")
            row = dict(tokenizer(source, **cut) if self._has_target else tokenizer(*sample, **cut))
            if self._has_target:
                label = {"labels": tokenizer(text_target=other[0], **cut)["input_ids"]}
            self._cut += len(row["input_ids"]) == length
            return [{**row, **label}]
        special = not _is_chat(sample)
        if not special:
            sample = tokenizer.apply_chat_template(list(sample), tokenize=False)
        elif not isinstance(sample, str):
            raise ValueError(f"Row {index} of the calibration data holds {_kind(sample)} where others hold text.")
        rows = _windows(tokenizer, sample, length, special)
        if label and len(rows) > 1:
            self._cut += 1
            rows = rows[:1]
        return [{**row, **label} for row in rows]

    def _padded(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Tokens as a batch. On the right for language models: positions that are not said count from the left."""
        right = self._parts.pads_right() or (self.model is not None and is_causal_language_model(self.model))
        fill = {"input_ids": self._parts.pad_id(), "labels": IGNORED}
        batch = {}
        for name in rows[0]:
            values = [row[name] for row in rows]
            if not isinstance(values[0], Sequence):
                batch[name] = torch.tensor(values)
                continue
            longest = max(map(len, values))
            short = [[fill.get(name, 0)] * (longest - len(value)) for value in values]
            both = zip(values, short, strict=True)
            batch[name] = torch.tensor([[*value, *rest] if right else [*rest, *value] for value, rest in both])
        if "attention_mask" not in batch and "input_ids" in batch:
            lengths = torch.tensor([len(row["input_ids"]) for row in rows])[:, None]
            places = torch.arange(batch["input_ids"].shape[1])[None]
            batch["attention_mask"] = ((places if right else places.flip(1)) < lengths).long()
        return batch

    # ---- What an object of sentence-transformers reads ----

    def _read_by_the_object(self) -> list[Any]:
        """The rows; what the object does not read is refused now."""
        rows = self._drawn(self._raw(index) for index in self._indices())
        for kind in sorted({row.kind for row in rows}):
            self._inputs.features([next(row.sample for row in rows if row.kind == kind)])
        return rows

    def _raw(self, index: int) -> "list[_Raw]":
        """The rows of one sample; none if it is empty."""
        if self._is_empty(index):
            return []
        sample, inputs = self._sample(self._data, index), self._inputs
        label = None if self.label_column is None else self._labels.values[index]
        if _is_pair(sample):
            sample = tuple(sample)
        if _is_pair(sample) != inputs.reads_pairs:
            reads = "pairs: tuples of two texts" if inputs.reads_pairs else "one text at a time: pass those of pairs "
            raise ValueError(
                f"Row {index} of the calibration data holds {_kind(sample)}, and a {inputs.kind} reads {reads}"
                + ("." if inputs.reads_pairs else "by themselves.")
            )
        samples = inputs.pieces(sample) if isinstance(sample, str) else [sample]
        if label is not None and len(samples) > 1:
            self._cut += 1
            samples = [sample]
        return [_Raw(type(sample).__name__, sample, label) for sample in samples]

    def _featured(self, rows: "Sequence[_Raw]") -> dict[str, Any]:
        batch = self._inputs.features([row.sample for row in rows])
        return batch if self.label_column is None else {**batch, "labels": torch.tensor([row.label for row in rows])}

    # ---- Images and sounds ----

    def _read(self, indices: Sequence[int]) -> dict[str, Any]:
        samples = [self._sample(self._data, index) for index in indices]
        media, targets = zip(*samples, strict=True) if _is_pair(samples[0]) else (samples, None)
        batch = self._reader(list(media))
        if targets is not None:
            tokenizer = self._parts.tokenizer(targets[0])
            rows = [{"labels": tokenizer(text_target=target)["input_ids"]} for target in targets]
            batch.update(self._padded(rows))
        if self.label_column is not None:
            batch["labels"] = torch.tensor([self._labels.values[index] for index in indices])
        return batch


def model_inputs(data: Any, processing_class: Any, model: nn.Module) -> Any:
    """Calibration data as it was given; or made by the processing class if there is one, or by an object of
    sentence-transformers of what it reads."""
    if data is None or isinstance(data, CalibrationData):
        return data
    if processing_class is None and sentence_model(model) is None:
        return data
    if processing_class is None and isinstance(data, Iterable) and not isinstance(data, (str, bytes, Mapping)):
        iterator = iter(data)
        first = next(iterator, None)
        if iterator is data and first is not None:  # what can be read only once
            data = chain([first], iterator)
        if first is None or _is_batch(first):
            return data
    return CalibrationData(data, processing_class, model)


def both_model_inputs(
    calibration_data: Any, evaluation_data: Any, processing_class: Any, model: nn.Module
) -> tuple[Any, Any]:
    """[`model_inputs`] of what is fitted to, and of what is measured on."""
    fitted, held = (model_inputs(data, processing_class, model) for data in (calibration_data, evaluation_data))
    return fitted, held


@dataclass(frozen=True)
class _Raw:
    """What an object of sentence-transformers reads as one row.

    Args:
        kind (`str`): Rows of one kind can be in one batch.
        sample: A text, a pair, an image or whatever it reads.
        label (`int` or `float`, *optional*): Its class.
    """

    kind: str
    sample: Any
    label: int | float | None


def longest_row(max_length: int | None, model: nn.Module | None, tokenizer: Any) -> int:
    """Tokens of a row at most: as asked for, or what the model and its tokenizer take, up to [`MOST_TOKENS`].

    Raises:
        ValueError: More than the model takes is asked for.
    """
    positions = None if model is None else positions_of(model)
    if max_length is None:
        return min(MOST_TOKENS, tokenizer.model_max_length, positions or MOST_TOKENS)
    if positions is not None and max_length > positions:
        raise ValueError(f"Rows of {max_length} tokens are too long for this model, which takes {positions}.")
    return max_length


def positions_of(model: nn.Module) -> int | None:
    """How many tokens a model takes; `None` where nothing limits them, or its config does not say it."""
    if not isinstance(model, PreTrainedModel):
        return None
    config = model.config.get_text_config()
    name = config.attribute_map.get("max_position_embeddings", "max_position_embeddings")
    count = config.to_dict().get(name)
    if not isinstance(count, int) or count < 1:
        return None
    for path, module in model.named_modules():
        # RoBERTa's kin count positions from behind the padding's.
        if isinstance(module, torch.nn.Embedding) and "position" in path and module.num_embeddings == count:
            return count if module.padding_idx is None else count - module.padding_idx - 1
    return count


def _windows(tokenizer: Any, text: str, length: int, special: bool) -> list[dict[str, Any]]:
    """A text in rows of so many tokens, each with the special tokens of a text of its own."""
    if tokenizer.is_fast:
        found = tokenizer(
            text, add_special_tokens=special, truncation=True, max_length=length, return_overflowing_tokens=True
        )
        names = [name for name in tokenizer.model_input_names if name in found]
        return [{name: found[name][row] for name in names} for row in range(len(found["input_ids"]))]
    tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    room = length - (tokenizer.num_special_tokens_to_add() if special else 0)
    starts = range(0, len(tokens), room)
    return [dict(tokenizer.prepare_for_model(tokens[s : s + room], add_special_tokens=special)) for s in starts]


class _Parts:
    """What a processing class is made of, and which of it reads what."""

    def __init__(self, processing_class: Any) -> None:
        self.given = processing_class
        if isinstance(processing_class, ProcessorMixin):
            parts = [getattr(processing_class, name) for name in processing_class.get_attributes()]
        else:
            parts = [] if processing_class is None else [processing_class]
        kinds = {"text": PreTrainedTokenizerBase, "image": BaseImageProcessor, "sound": SequenceFeatureExtractor}
        self.found: dict[str, Any] = {
            kind: part for part in parts for kind, of in kinds.items() if isinstance(part, of)
        }
        if parts and not self.found:
            raise TypeError(
                "`processing_class` must be a tokenizer, an image processor, a feature extractor, or a processor with "
                f"one of these, got {type(processing_class).__name__}."
            )

    def wanted(self, model: Any) -> str:
        """What a column is looked for: what the model reads, as far as the processing class can make it."""
        for kind, name in (("image", "pixel_values"), ("text", "input_ids")):
            if kind in self.found and model is not None and model.main_input_name == name:
                return kind
        return next(iter(self.found), "text")

    def part(self, kind: str, sample: Any) -> Any:
        if kind not in self.found:
            given = "none was given" if self.given is None else f"got {type(self.given).__name__}"
            need = {"text": "a tokenizer", "image": "an image processor", "sound": "a feature extractor"}[kind]
            raise ValueError(
                f"The calibration data holds {_kind(sample)}, which {need} makes model inputs of: pass it as "
                f"`processing_class` ({given})."
            )
        return self.found[kind]

    def tokenizer(self, sample: Any = "") -> Any:
        return self.part("text", sample)

    def tokenizer_of_texts(self, sample: Any) -> Any:
        """The tokenizer of texts or conversations like this one."""
        tokenizer = self.tokenizer(sample)
        if _is_chat(sample) and tokenizer.chat_template is None:
            raise ValueError(
                "The data are conversations, and the tokenizer has no chat template: set `tokenizer.chat_template`, "
                "or pass the texts as they are to be."
            )
        return tokenizer

    def reader(self, sample: Any, model: Any) -> Callable[[list[Any]], dict[str, Any]]:
        """What makes a batch of a list of images, or of sounds."""
        if "sound" in self.found and ("image" not in self.found or _is_sound(sample)):
            return self._heard
        self.part("image", sample)
        gray = isinstance(model, PreTrainedModel) and model.config.to_dict().get("num_channels") == 1
        return partial(self._seen, "L" if gray else "RGB")

    def _seen(self, mode: str, images: list[Any]) -> dict[str, Any]:
        # Arrays are taken as they are.
        images = [image if _is_array(image) else image.convert(mode) for image in images]
        return dict(self.found["image"](images, return_tensors="pt"))

    def _heard(self, sounds: list[Any]) -> dict[str, Any]:
        extractor = self.found["sound"]
        rates = {sound["sampling_rate"] for sound in sounds if isinstance(sound, Mapping)}
        if len(rates) > 1:
            raise ValueError(f"Sounds must be of one sampling rate, got {sorted(rates)}.")
        rate = rates.pop() if rates else extractor.sampling_rate
        arrays = [sound["array"] if isinstance(sound, Mapping) else sound for sound in sounds]
        return dict(extractor(arrays, sampling_rate=rate, padding=True, return_tensors="pt"))

    def pads_right(self) -> bool:
        return "text" not in self.found or self.found["text"].padding_side == "right"

    def pad_id(self) -> int:
        # Padding is masked out, so any token will do where there is none for it.
        tokenizer = self.found.get("text")
        return 0 if tokenizer is None or tokenizer.pad_token_id is None else tokenizer.pad_token_id


def _with_its_first(data: Any) -> tuple[Any, Any]:
    """The data, which can be read again, and the first of it."""
    if isinstance(data, (str, bytes, Mapping)):
        raise ValueError(f"Calibration data must be a list or another iterable of samples, got {_kind(data)}.")
    if iter(data) is data:
        data = list(data)
    first = next(iter(data), None)
    if first is None:
        raise ValueError("The calibration data is empty.")
    return data, first


def _by_index(data: Any, samples: int | None) -> Any:
    """The data, whose rows can be asked for in any order; of a stream those at its beginning."""
    if isinstance(data, Sequence) or _is_data_set(data):
        return data
    if not is_stream(data):
        return list(data)
    if samples is not None:
        return list(islice(data, ROWS_FOR_A_SAMPLE * samples))
    rows = list(islice(data, MOST_OF_A_STREAM + 1))
    refuse_endless(data, len(rows))
    return rows


def is_stream(data: Any) -> bool:
    """Whether data come one after the other from a data set of which nobody says how long it is."""
    if isinstance(data, CalibrationData):
        data = data._batches
    if isinstance(data, DataLoader):
        data = data.dataset
    # Whoever has one of its objects has imported it.
    datasets = sys.modules.get("datasets")
    kinds = (IterableDataset,) if datasets is None else (IterableDataset, datasets.IterableDataset)
    return isinstance(data, kinds) and not isinstance(data, Sized)


def refuse_endless(data: Any, rows: int) -> None:
    """Raises if so many rows came of a stream, and it may go on for as long as one likes.

    Raises:
        ValueError: They are more than `MOST_OF_A_STREAM`.
    """
    if rows > MOST_OF_A_STREAM:
        raise ValueError(
            f"The calibration data is a stream (a {type(data).__name__}) of more than {MOST_OF_A_STREAM:,} rows, and "
            "nothing says how many. Take some of it, `stream.shuffle(seed=0).take(1000)`, or of raw data say how many "
            "rows: `CalibrationData(stream, tokenizer, samples=1000)`."
        )


def _token_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """What a model reads of a row that is tokenized."""
    names = {"label": "labels", "label_ids": "labels"}
    kept = {names.get(name, name): value for name, value in row.items()}
    known = ("input_ids", "attention_mask", "token_type_ids", "labels")
    kept = {name: kept[name] for name in known if name in kept}
    return {name: value.tolist() if _is_array(value) else value for name, value in kept.items()}


def _class_names_of(data: Any, column: str | None) -> list[str] | None:
    """What a data set calls the numbers of a column; `None` where nothing says it."""
    # Whoever has one of its objects has imported it.
    datasets = sys.modules.get("datasets")
    if datasets is None or not isinstance(data, (datasets.Dataset, datasets.IterableDataset)):
        return None
    feature = (data.features or {}).get(column)  # a stream may not know them
    return list(feature.names) if isinstance(feature, datasets.ClassLabel) else None


def _is_data_set(data: Any) -> bool:
    # Not at the head of the module: importing it takes as long as the rest of this package.
    from datasets import Dataset

    return isinstance(data, Dataset)


def _columns_of(data: Any, names: Iterable[str | None]) -> tuple[Any, Any]:
    """A data set with these columns only, and the same without anything decoded."""
    from datasets import Audio, Image

    data = data.select_columns([name for name in dict.fromkeys(names) if name is not None])
    undecoded = data
    for name, feature in data.features.items():
        if isinstance(feature, (Audio, Image)):
            undecoded = undecoded.cast_column(name, type(feature)(decode=False))
    return data, undecoded


def _is_batch(value: Any) -> bool:
    tensors = [part for part in value.values() if isinstance(part, torch.Tensor)] if isinstance(value, Mapping) else []
    return bool(tensors) and all(tensor.dim() > 0 for tensor in tensors) and not _is_row(value)


def _is_row(value: Any) -> bool:
    """Whether it is one row of tokens, as data sets in torch's format give them."""
    return isinstance(value.get("input_ids"), torch.Tensor) and value["input_ids"].dim() == 1


def _is_pair(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 2 and isinstance(value[1], str)


def _is_chat(value: Any) -> bool:
    messages = value if isinstance(value, Sequence) and not isinstance(value, str) else []
    return len(messages) > 0 and all(
        isinstance(message, Mapping) and {"role", "content"} <= message.keys() for message in messages
    )


def _is_nothing(value: Any) -> bool:
    if isinstance(value, str):
        return not value.strip()
    return value is None or (isinstance(value, Sequence) and len(value) == 0)


def _is_array(value: Any) -> bool:
    return isinstance(value, (np.ndarray, torch.Tensor))


def _is_sound(value: Any) -> bool:
    return isinstance(value, Mapping) and {"array", "sampling_rate"} <= value.keys()


def _is_medium(value: Any) -> bool:
    return is_pil_image(value) or _is_sound(value) or _is_array(value)


def _is_one_of(value: Any, kind: str) -> bool:
    return isinstance(value, str) or _is_chat(value) if kind == "text" else _is_medium(value)


def _kind(value: Any) -> str:
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)) and len(value):
        return f"a {type(value).__name__} of {type(value[0]).__name__}"
    return f"a {type(value).__name__}"
