"""Tiny objects of sentence-transformers, made from configs, and texts of the words that they know."""

import torch
from sentence_transformers import CrossEncoder, SentenceTransformer, SparseEncoder
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
)

from .models import BY_NAME, randomize
from .words import word_tokenizer


WORDS = "a cat dog sits barks on the mat outside rain stock market fell tomorrow".split()
TEXTS = ["a cat sits on the mat", "the dog barks outside", "the stock market fell", "rain tomorrow"]
PAIRS = list(zip(TEXTS, TEXTS[::-1], strict=True))

AUTO_CLASSES = {"sentence": AutoModel, "cross": AutoModelForSequenceClassification, "sparse": AutoModelForMaskedLM}
OBJECTS = {"cross": CrossEncoder, "sparse": SparseEncoder}


def tokenizer():
    special = {"cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    return word_tokenizer(["[PAD]", "[UNK]", *special.values(), *WORDS], model_max_length=32, **special)


def save_encoder(path, kind, labels=1):
    """A tiny BERT with the head of a kind of object, and its tokenizer, in a folder; gives its name."""
    config = BY_NAME["bert"].config()
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    config.num_labels = labels
    torch.manual_seed(0)
    randomize(AUTO_CLASSES[kind].from_config(config)).save_pretrained(path)
    tokenizer().save_pretrained(path)
    return str(path)


def sentence_transformer(bert, *more, pooling_mode="mean", **options):
    transformer = Transformer(bert)
    pooling = Pooling(transformer.get_embedding_dimension(), pooling_mode=pooling_mode)
    return SentenceTransformer(modules=[transformer, pooling, *more], device="cpu", **options)


def model_of(kind, folders):
    if kind == "sentence":
        return sentence_transformer(folders[kind])
    return OBJECTS[kind](folders[kind], device="cpu")


def embed(model, texts=TEXTS):
    return model.encode(texts, convert_to_tensor=True)


def predictions_of(model, texts=TEXTS, pairs=PAIRS):
    """What an object tells its user: scores, or embeddings."""
    if isinstance(model, CrossEncoder):
        return torch.tensor(model.predict(pairs))
    return embed(model, texts).to_dense()


def random_texts(count, seed=0, longest=12):
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randint(len(WORDS), (3 + row % (longest - 2),), generator=generator) for row in range(count)]
    return [" ".join(WORDS[index] for index in row.tolist()) for row in drawn]
