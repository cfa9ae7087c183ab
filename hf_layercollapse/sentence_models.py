"""Objects of sentence-transformers (`SentenceTransformer`, `CrossEncoder`, `SparseEncoder`): what they read and give.

They take one dict of features, which their own `preprocess` makes of raw inputs, and put what each of their modules
computes into it. Nothing of sentence-transformers is imported where no object of its is around.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_compiled_module
from transformers import PreTrainedTokenizerBase

from .upstream import uncompiled


# What `encode_query` and `encode_document` give their inputs: the first of these prompts that the object has.
TASK_PROMPTS = {"query": ("query",), "document": ("document", "passage", "corpus")}

# Names of the classes whose folders are read here, and the files that say which one a folder holds.
SAVED_KINDS = ("SentenceTransformer", "CrossEncoder", "SparseEncoder")
MODULES_FILE = "modules.json"
KIND_FILES = (MODULES_FILE, "config_sentence_transformers.json", "config.json")

# What a `CrossEncoder` wrote into the config of its transformers model, when its folders had no `modules.json`.
_CROSS_ENCODER_KEYS = ("sentence_transformers", "sbert_ce_default_activation_function")


def saved_kind(folder: Path) -> str | None:
    """Name of the class whose object a folder holds, as sentence-transformers tells it; `None` if it holds none."""
    modules, of_object, of_model = (folder / name for name in KIND_FILES)
    if modules.is_file():
        return str(_values_in(of_object).get("model_type", "SentenceTransformer"))
    return "CrossEncoder" if any(key in _values_in(of_model) for key in _CROSS_ENCODER_KEYS) else None


def _values_in(path: Path) -> dict[str, Any]:
    """What a JSON file holds; of none, nothing."""
    values = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return values if isinstance(values, dict) else {}


def load_sentence_model(name: str, kind: str, trust_remote_code: bool = False) -> Any:
    """The object of a kind (one of [`SAVED_KINDS`]) that a folder or a Hub name holds, on the CPU, for evaluation.

    Raises:
        ValueError: It is of another kind, or sentence-transformers is not installed.
    """
    if kind not in SAVED_KINDS:
        raise ValueError(f"{name} holds a {kind} of sentence-transformers; known are {', '.join(SAVED_KINDS)}.")
    try:
        import sentence_transformers
    except ImportError:
        raise ValueError(
            f"{name} holds a {kind}, which is measured by what it predicts itself: that needs sentence-transformers, "
            'pip install "hf_layercollapse[sentence-transformers]".'
        ) from None
    load: Any = vars(sentence_transformers)[kind]
    return load(name, device="cpu", trust_remote_code=trust_remote_code).eval()


def sentence_model(model: Any) -> Any:
    """The object of sentence-transformers that a model is, compiled or not; `None` if it is something else."""
    while is_compiled_module(model):
        model = uncompiled(model)
    if not any(base.__module__.startswith("sentence_transformers.") for base in type(model).__mro__):
        return None
    from sentence_transformers.base import BaseModel

    return model if isinstance(model, BaseModel) else None


def predicted(sentences: Any, model: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What an object predicts for a batch of features, by the names under which transformers' models give the like.

    Args:
        sentences: The object.
        model (`nn.Module`): Runs: the object, or what it was compiled to.
        inputs (`Mapping`): Features; labels are no part of them and are left out.

    Returns:
        `logits`, the scores of pairs before any activation function; or `sentence_embedding`, with what the object's
        pooling, normalisation and further modules make of it and as short as `truncate_dim` says; or
        `sentence_vector`, the same of an object that compares embeddings not by their cosine, so that their lengths
        matter.
    """
    features = {name: value for name, value in inputs.items() if name != "labels"}
    options = {"task": features["task"]} if features.get("task") is not None else {}
    with _differentiable(sentences):
        given = model(features, **options)
    if "scores" in given:
        return {"logits": given["scores"]}
    if "sentence_embedding" not in given:
        return {name: value for name, value in given.items() if name not in inputs}
    from sentence_transformers import SentenceTransformer

    embedding = given["sentence_embedding"]
    if isinstance(sentences, SentenceTransformer) and sentences.truncate_dim is not None:
        embedding = embedding[..., : sentences.truncate_dim]
    by_direction = sentences.similarity_fn_name == "cosine"
    return {"sentence_embedding" if by_direction else "sentence_vector": embedding}


@contextlib.contextmanager
def _differentiable(sentences: Any) -> Iterator[None]:
    """A sparse encoder's pooling in training mode where gradients are asked for: in evaluation mode it computes the
    same in place, through which none goes."""
    from sentence_transformers.sparse_encoder.modules import SpladePooling

    wanted = torch.is_grad_enabled()
    changed = [m for m in sentences.modules() if wanted and isinstance(m, SpladePooling) and not m.training]
    try:
        for module in changed:
            module.training = True
        yield
    finally:
        for module in changed:
            module.training = False


class SentenceInputs:
    """Makes features of raw inputs as the object's own `encode` or `predict` does: its tokenizer or processor, its
    `max_seq_length`, its prompt.

    Args:
        sentences: The object.
        task (`str`, *optional*): `"query"` or `"document"`: as `encode_query` or `encode_document` does it, with the
            prompt of that name and the route of a `Router`. Default: as `encode` does it.
        max_length (`int`, *optional*): Tokens of a row at most. Default: the object's `max_seq_length`.

    Raises:
        ValueError: `task` is neither.
    """

    def __init__(self, sentences: Any, task: str | None = None, max_length: int | None = None):
        if task is not None and task not in TASK_PROMPTS:
            raise ValueError(f'`task` must be "query" or "document", got {task!r}.')
        from sentence_transformers import CrossEncoder

        self.sentences, self.task = sentences, task
        self.reads_pairs = isinstance(sentences, CrossEncoder)
        self._options = {} if max_length is None else {"max_length": max_length}
        self.max_length = sentences.max_seq_length if max_length is None else max_length
        known = () if task is None else TASK_PROMPTS[task]
        names = [name for name in known if name in sentences.prompts]
        name = names[0] if names else sentences.default_prompt_name
        self.prompt = None if name is None else sentences.prompts[name]

    @property
    def kind(self) -> str:
        """Of the object, for messages."""
        return type(self.sentences).__name__

    def features(self, samples: Sequence[Any]) -> dict[str, Any]:
        """A batch of samples of one kind.

        Raises:
            ValueError: The object does not read them.
        """
        options = self._options if self.task is None else {**self._options, "task": self.task}
        try:
            made = dict(self.sentences.preprocess(list(samples), prompt=self.prompt, **options))
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"This {self.kind} cannot read the calibration data ({type(samples[0]).__name__}; it reads "
                f"{', '.join(map(str, self.sentences.modalities))}): {error}"
            ) from error
        return made if self.task is None else {**made, "task": self.task}

    def pieces(self, text: str) -> list[str]:
        """A text in parts that fit `max_length` with the prompt, so that nothing of it is cut; whole where the
        tokenizer does not say which characters a token stands for."""
        tokenizer = self.sentences.tokenizer
        if not isinstance(tokenizer, PreTrainedTokenizerBase) or not tokenizer.is_fast or self.max_length is None:
            return [text]
        prompt = len(tokenizer(self.prompt or "", add_special_tokens=False)["input_ids"])
        room = self.max_length - prompt - tokenizer.num_special_tokens_to_add()
        found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        places = found["offset_mapping"]
        if len(places) <= room or room < 1:
            return [text]
        parts = [places[start : start + room] for start in range(0, len(places), room)]
        return [text[part[0][0] : part[-1][1]] for part in parts]


def features_in(trainer: Any, sentences: Any, batch: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What the losses of sentence-transformers' trainers give an object for one of their batches: features for each
    column; of columns that are texts still, which a cross encoder's losses read as pairs, features of these.

    Raises:
        ValueError: The object does not read the pairs.
    """
    columns = {name: value for name, value in batch.items() if name not in ("dataset_name", "prompt", "task")}
    features, _ = trainer.collect_features(columns)
    if all(isinstance(each, Mapping) for each in features):
        return [dict(each) for each in features]
    return [SentenceInputs(sentences).features(list(zip(*features, strict=True)))]
