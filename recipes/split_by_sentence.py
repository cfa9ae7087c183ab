"""Hold phrases out of a training split by the sentence that they come from: what a result is tested on besides dev.

    python recipes/split_by_sentence.py --dataset_name nyu-mll/glue --dataset_config_name sst2 \\
        --output_dir runs/minilm_sst2/data
    python recipes/split_by_sentence.py --train_file train.tsv --output_dir runs/minilm_sst2/data

SST-2's training split holds sentences and most of their phrases, so rows drawn from it at random share their words
with the rows that a model was trained on. A sentence here is what is part of no longer row. Whole sentences, in a
seeded order, are held out with all of their phrases until `--rows` phrases of at least `--words` words are; no phrase
of theirs stays in training, whatever other sentence has it too. Writes `train.tsv` and `held_out.tsv`, and of a data
set the validation split as `dev.tsv`.

Rows whose label is neutral are not in GLUE's version. Where a sentence itself was, its longest phrases count as
sentences, and one of them may be held out while another is trained on.
"""

import argparse
import csv
import random
from pathlib import Path

import datasets
from common import load_table


def parts(words, known):
    """The rows among `known` that are made of consecutive words of a text, itself among them."""
    count = len(words)
    spans = (" ".join(words[i:j]) for i in range(count) for j in range(i + 1, count + 1))
    return {span for span in spans if span in known}


def sentences_of(texts):
    """Sentence -> its phrases, itself among them."""
    known, found, seen = set(texts), {}, set()
    for text in sorted(known, key=lambda text: (-len(text.split()), text)):
        if text not in seen:
            found[text] = parts(text.split(), known)
            seen |= found[text]
    return found


def held_out(texts, rows, words, seed=0):
    """`(texts to test on, texts that may not be trained on)`, the first among the second."""
    sentences = sentences_of(texts)
    order = sorted(sentences)
    random.Random(seed).shuffle(order)
    tested, gone = [], set()
    for sentence in order:
        if len(tested) >= rows:
            break
        new = sorted(sentences[sentence] - gone)
        tested += [text for text in new if len(text.split()) >= words]
        gone |= sentences[sentence]
    return tested[:rows], gone


def write(path, rows):
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter="\t", quoting=csv.QUOTE_NONE, quotechar=None, lineterminator="\n")
        writer.writerows([("sentence", "label"), *rows])


def main(words=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset_name", help="A name on the Hub, or a folder.")
    parser.add_argument("--dataset_config_name")
    parser.add_argument("--train_file", help="In place of it: a table of texts and classes.")
    parser.add_argument("--input_column", default="sentence")
    parser.add_argument("--label_column", default="label")
    parser.add_argument("--rows", type=int, default=5000, help="To hold out.")
    parser.add_argument("--words", type=int, default=4, help="Of each of these, at least.")
    parser.add_argument("--seed", type=int, default=0, help="Of the order of sentences.")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/minilm_sst2/data"))
    options = parser.parse_args(words)
    if (options.dataset_name is None) == (options.train_file is None):
        parser.error("pass either --dataset_name or --train_file")
    options.output_dir.mkdir(parents=True, exist_ok=True)
    if options.train_file is not None:
        table = load_table(options.train_file)
    else:
        found = datasets.load_dataset(options.dataset_name, options.dataset_config_name)
        table, dev = found["train"], found["validation"]
        columns = dev[options.input_column], dev[options.label_column]
        write(options.output_dir / "dev.tsv", zip(*columns, strict=True))
    texts, classes = [" ".join(text.split()) for text in table[options.input_column]], table[options.label_column]
    labels = dict(zip(texts, classes, strict=True))
    tested, gone = held_out(texts, options.rows, options.words, options.seed)
    training = [(text, label) for text, label in zip(texts, classes, strict=True) if text not in gone]
    write(options.output_dir / "train.tsv", training)
    write(options.output_dir / "held_out.tsv", [(text, labels[text]) for text in tested])
    print(f"{len(training):,} of {len(texts):,} rows to train on; {len(tested):,} phrases to test on")


if __name__ == "__main__":
    main()
