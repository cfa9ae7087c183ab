"""README's code and that of the pages in recipes/ runs as it stands, in order, in a folder where the names it uses are
tiny local models and data; what they link to is there, and every public name stands in one of them."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModel,
    BertConfig,
    BertForSequenceClassification,
    BertTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
)
from typer.testing import CliRunner

import hf_layercollapse
from hf_layercollapse.cli import app

from .models import randomize
from .sentences import sentence_transformer
from .words import word_tokenizer


ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "recipes").glob("*.md")),
    *sorted((ROOT / "recipes").glob("results/*.md")),
]
WORDS = "good bad film a was it the plot actor scene long short funny sad old new bright dark slow fast".split()

# A block of code under such a comment does not run; each says why.
NOT_RUN = re.compile(r"<!-- not run: (.+) -->\n\Z")


def blocks(page, languages=("python", "bash")):
    """`(line number, language, code)` of the fenced blocks of a page that are to run."""
    text = page.read_text(encoding="utf-8")
    for match in re.finditer(rf"^```({'|'.join(languages)})\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        if not NOT_RUN.search(text[: match.start()]):
            yield text.count("\n", 0, match.start()) + 2, match.group(1), match.group(2)


def commands(code):
    """The `layercollapse` lines of a shell block, as words; what their output is piped to is not run."""
    lines = [line.split(" | ")[0] for line in code.replace("\\\n", " ").splitlines()]
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("layercollapse ")]


RUNNABLE = [
    page for page in PAGES if any(language == "python" or commands(code) for _, language, code in blocks(page))
]


def sentences(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randint(0, len(WORDS), (4 + row % 9,), generator=generator).tolist() for row in range(count)]
    return [" ".join(WORDS[index] for index in row) for row in drawn]


@pytest.fixture
def stand_ins(tmp_path, monkeypatch):
    """A working directory in which the pages' Hub names and files are tiny; `from_pretrained` prefers folders."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    _save_encoders()
    _save_decoder()
    data = Path("stanfordnlp/sst2")
    data.mkdir(parents=True)
    for split, rows in (("train", 1600), ("validation", 16)):
        lines = [
            json.dumps({"idx": row, "sentence": sentence, "label": row % 2})
            for row, sentence in enumerate(sentences(rows, seed=len(split)))
        ]
        (data / f"{split}.jsonl").write_text("\n".join(lines))
    Path("reviews.txt").write_text("\n".join(sentences(160)))
    rows = [f"{sentence}\t{row % 2}" for row, sentence in enumerate(sentences(160))]
    Path("reviews.tsv").write_text("\n".join(["sentence\tlabel", *rows]) + "\n")
    rows = [f"{sentence}\t{row % 2}" for row, sentence in enumerate(sentences(40, seed=1))]
    Path("test.tsv").write_text("\n".join(["sentence\tlabel", *rows]) + "\n")
    Path("held_out.txt").write_text("\n".join(sentences(40, seed=1)))
    Path("book.txt").write_text("\n".join(sentences(400)))


def _save_encoders():
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    config = BertConfig(
        vocab_size=len(special) + len(WORDS),
        hidden_size=16,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=2,
        max_position_embeddings=32,
    )
    model = randomize(BertForSequenceClassification(config))
    tokenizer = BertTokenizer(vocab={word: index for index, word in enumerate(special + WORDS)})
    for name in ("google-bert/bert-base-uncased", "textattack/bert-base-uncased-SST-2", "bert-sst2"):
        model.save_pretrained(name)
        tokenizer.save_pretrained(name)
    for name in ("sentence-encoder", "sentence-transformers/all-MiniLM-L6-v2"):
        AutoModel.from_pretrained("bert-sst2").save_pretrained(name)
        tokenizer.save_pretrained(name)
        sentence_transformer(name).save_pretrained(name, create_model_card=False)


def _save_decoder():
    words = ["<s>", "</s>", "<unk>", "user", "assistant", *WORDS]
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    LlamaForCausalLM(config).save_pretrained("HuggingFaceTB/SmolLM2-135M-Instruct")
    template = "{% for message in messages %}{{ message['role'] }} {{ message['content'] }} {% endfor %}"
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = word_tokenizer(words, pad_token=None, chat_template=template, **names)
    tokenizer.save_pretrained("HuggingFaceTB/SmolLM2-135M-Instruct")


@pytest.mark.parametrize("page", RUNNABLE, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_code_runs_in_order(page, stand_ins):
    namespace = {"__name__": "__main__"}
    for line, language, code in blocks(page):
        if language == "python":
            # Line numbers in a traceback are the page's.
            exec(compile("\n" * (line - 1) + code, str(page), "exec"), namespace)
            continue
        for arguments in commands(code):
            result = CliRunner().invoke(app, arguments, catch_exceptions=False)
            assert result.exit_code == 0, f"{page}:{line}: {result.output}"


def test_pages_show_code():
    assert ROOT / "README.md" in RUNNABLE and len(RUNNABLE) > 8


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_names_is_there(page):
    text = page.read_text(encoding="utf-8")
    for code in re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        for word in code.split():
            if re.fullmatch(r"(recipes|tests|\.ci)/[\w./-]+\.(py|txt|md|yaml)", word):
                assert (ROOT / word).exists(), word
    for link in re.findall(r"\]\((?!https?://)([^)]+)\)", text):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link


def anchors(page):
    """What GitHub calls the headings of a page; a second one of the same words ends in -1."""
    found = {}
    for heading in re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE):
        name = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        count = found[name] = found.get(name, -1) + 1
        if count:
            found[f"{name}-{count}"] = 0
    return found


def test_every_public_name_stands_in_a_page():
    words = {word for page in PAGES for word in re.findall(r"\w+", page.read_text(encoding="utf-8"))}
    assert set(hf_layercollapse.__all__) <= words


def test_every_page_is_linked():
    """From README, or from the index."""
    linked = {
        (page.parent / link.partition("#")[0]).resolve()
        for page in (ROOT / "README.md", ROOT / "recipes" / "README.md")
        for link in re.findall(r"\]\((?!https?://|#)([^)]+)\)", page.read_text(encoding="utf-8"))
    }
    assert set(PAGES) - {ROOT / "README.md"} <= linked
