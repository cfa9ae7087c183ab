"""Tokenizers of one token a word."""

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast


def word_tokenizer(words, framed=False, **options):
    """The id of a word is its place in `words`, special tokens included.

    Args:
        framed (`bool`): Whether texts, and each of a pair, stand between [CLS] and [SEP].
        options: Of [`PreTrainedTokenizerFast`], in place of its [PAD] and [UNK].
    """
    ids = {word: index for index, word in enumerate(words)}
    options = {"pad_token": "[PAD]", "unk_token": "[UNK]", **options}
    inner = Tokenizer(WordLevel(ids, unk_token=options["unk_token"]))
    inner.pre_tokenizer = Whitespace()
    if framed:
        inner.post_processor = TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[(name, ids[name]) for name in ("[CLS]", "[SEP]")],
        )
        options |= {"cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, **options)
