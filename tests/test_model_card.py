"""The card, whole: every line of it is expected, and nothing that was not measured."""

import re
from dataclasses import replace

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from transformers import BertModel, LlamaConfig, LlamaForCausalLM

from hf_layercollapse import (
    LayerCollapseConfig,
    apply_layer_collapse,
    collapse_model,
    plan_collapse,
    recover_model,
)
from hf_layercollapse.comparison import compare_models
from hf_layercollapse.model_card import add_comparison, create_model_card
from hf_layercollapse.patching import refresh_layer_collapse
from tests.models import BY_NAME, randomize
from tests.test_families import encoder_decoder_around
from tests.training import set_alphas, trainer_for


NUMBER = r"[+-]?[\d.,]+(?:e[+-]\d+)?"
RANGE = rf"{NUMBER} to {NUMBER}"

WHOLE = rf"""
---
base_model: google-bert/bert-base-uncased
datasets:
- stanfordnlp/sst2
language: en
library_name: transformers
license: apache-2.0
metrics:
- accuracy
pipeline_tag: text-classification
tags:
- layercollapse
- model-compression
- sentiment
model-index:
- name: tiny
  results:
  - task:
      type: text-classification
    dataset:
      name: stanfordnlp/sst2
      type: stanfordnlp/sst2
      split: validation
    metrics:
    - type: accuracy
      value: {NUMBER}
      name: Accuracy
---

\# tiny

\[google-bert/bert-base-uncased\]\(https://huggingface\.co/google-bert/bert-base-uncased\) in which 2 of 3 feed-forward blocks are collapsed: each is a linear map with some of its neurons beside it\. `hf_layercollapse` \S+ fitted them to data; the package is named after LayerCollapse \(\[arXiv 2311\.17943\]\(https://arxiv\.org/abs/2311\.17943\)\), which trains blocks to be linear instead\.

\#\# How to load it

```python
import hf_layercollapse  \# lets transformers read the model
from transformers import AutoModelForSequenceClassification

model = AutoModelForSequenceClassification\.from_pretrained\("me/tiny"\)
```

Without that package the code file that comes with the weights does the same:

```python
from transformers import AutoModelForSequenceClassification

model = AutoModelForSequenceClassification\.from_pretrained\("me/tiny", trust_remote_code=True\)
```

\#\# Feed-forward blocks

In refit blocks the linear map and the output weights of the neurons that stay are the least-squares fit to what they computed on calibration data \(32 rows, 224 tokens\)\. R\^2 and relative errors are estimates for other data of the kind, by generalised cross-validation\.

\| block \| kind \| now \| parameters \| method \| R\^2 \| relative error \|
\| --- \| ---: \| ---: \| ---: \| ---: \| ---: \| ---: \|
\| `bert\.encoder\.layer\.0` \| plain \| dense \| 1,336 \|  \|  \|  \|
\| `bert\.encoder\.layer\.1` \| plain \| linear \+ 3 neurons \| 1,336 -> 371 \| refit \| 0\.\d{{4}} \| \d\.\de-\d\d \|
\| `bert\.encoder\.layer\.2` \| plain \| linear \+ 3 neurons \| 1,336 -> 371 \| refit \| 0\.\d{{4}} \| \d\.\de-\d\d \|

Parameters of the whole model: 9,515 before, 7,585 after \(20\.3 % fewer\)\. The largest difference of an output on calibration data is {NUMBER}\.

<!-- A comparison: .* -->

\#\# Compared

\|  \| dense \| control \| collapsed \|
\| --- \| ---: \| ---: \| ---: \|
\| accuracy \| {NUMBER} % \| {NUMBER} % \| {NUMBER} % \|
\| 95 % interval \| {RANGE} \| {RANGE} \| {RANGE} \|
\| minus dense \|  \| {NUMBER} points \| {NUMBER} points \|
\| 95 % interval \|  \| {RANGE} \| {RANGE} \|
\| minus control \|  \|  \| {NUMBER} points \|
\| 95 % interval \|  \|  \| {RANGE} \|
\| parameters \| 9,515 \| 9,515 \| 7,585 \|
\| MACs per token \| {NUMBER} \| {NUMBER} \| {NUMBER} \|
\| latency, ms \| {NUMBER} \| {NUMBER} \| {NUMBER} \|
\| quartiles \| {RANGE} \| {RANGE} \| {RANGE} \|
\| relative to dense \| 1\.000 \| {NUMBER} \| {NUMBER} \|
\| quartiles \| 1\.000 to 1\.000 \| {RANGE} \| {RANGE} \|

Accuracy was measured on 32 examples of stanfordnlp/sst2 validation, the same for every model; .* Latency is the median of 2 calls with a batch of 8x7 tokens, in which the models took turns, on .+ with torch \S+; MACs are those of linear and convolution layers\.

<!-- End of the comparison\. -->

\#\# Evaluation

\| \| \|
\| --- \| ---: \|
\| eval_loss \| 1\.23457 \|

\#\# Training

\| \| \|
\| --- \| ---: \|
\| learning_rate \| 0\.1 \|
\| optimizer \| adamw \|

\#\# Format

`config\.json` holds .*

\#\# Citation

Of the paper that the package is named after:

```bibtex
@article\{{shabgahi2023layercollapse,
(?:  .*\n)+\}}
```
"""  # noqa: E501


def collapsed():
    model = BY_NAME["bert"].model()
    data = [BY_NAME["bert"].inputs(batch=8, seed=i) for i in range(4)]
    return model, collapse_model(model, LayerCollapseConfig(blocks="last:2", keep_neurons=3), calibration_data=data)


def compared(model, **kwargs):
    data = [{**BY_NAME["bert"].inputs(batch=8, seed=i), "labels": torch.arange(8) % 3} for i in range(4)]
    models = {"dense": BY_NAME["bert"].model(), "control": BY_NAME["bert"].model(seed=3), "collapsed": model}
    return compare_models(models, data, rounds=2, progress=False, **kwargs)


def test_the_whole_card():
    model, report = collapsed()
    card = create_model_card(
        model,
        report,
        compared(model, source=("stanfordnlp/sst2", None, "validation")),
        repo_id="me/tiny",
        base_model="google-bert/bert-base-uncased",
        datasets="stanfordnlp/sst2",
        language="en",
        license="apache-2.0",
        tags="sentiment",
        training={"learning_rate": 0.1, "optimizer": "adamw"},
        evaluation={"eval_loss": 1.234567},
    )
    lines, patterns = card.content.strip().split("\n"), WHOLE.strip("\n").split("\n")
    # Line by line first: a regular expression of a page does not say where it ends to match.
    for line, pattern in zip(lines, patterns[: patterns.index(r"(?:  .*\n)+\}}".replace("}}", "}"))], strict=False):
        assert re.fullmatch(pattern, line), (line, pattern)
    assert re.fullmatch(WHOLE.strip("\n"), card.content.strip())
    assert ModelCard(card.content).data.eval_results[0].metric_type == "accuracy"


def test_what_was_not_measured_is_absent():
    model, _ = collapsed()
    text = create_model_card(model).content
    absent = [
        "R^2",
        "error",
        "accuracy",
        "Latency",
        "Compared",
        "Evaluation",
        "Training",
        "model-index",
        "base_model:",
    ]
    for word in [*absent, " -> "]:
        assert word not in text, word
    assert "| `bert.encoder.layer.2` | plain | linear + 3 neurons | 371 |" in text
    assert "None" not in text and "undefined" not in text and "\n\n\n" not in text


def test_no_result_without_the_name_of_its_data():
    model, report = collapsed()
    card = create_model_card(model, report, compared(model))
    assert "model-index" not in card.content and "Accuracy was measured on 32 examples, the same" in card.content


def test_patched_and_merged():
    model = BY_NAME["bert"].model()
    apply_layer_collapse(model, LayerCollapseConfig())
    set_alphas(model, 0.25, 1.0, 0.98)
    text = create_model_card(model).content
    assert "in which 3 of 3 feed-forward blocks carry an alpha" in text and "| patched | 1,336 | 0.2500 |" in text
    report = collapse_model(model)
    text = create_model_card(model, report).content
    assert "2 of 3 feed-forward blocks are collapsed" in text and "and 1 of 3 feed-forward blocks carry an" in text
    assert "| `bert.encoder.layer.2` | plain | linear | 1,336 -> 272 |" in text and "| merged | 0.9800 |" in text
    assert "Training drove each block's alpha" in text and "refit" not in text
    assert "The method is LayerCollapse ([arXiv 2311.17943]" in text
    assert "2 of 3 feed-forward blocks are collapsed: each is one linear map, and 1 of 3" in text
    assert (
        "cross-validation" not in text
        and "relative error is that on standard-normal" in text
        and "named after" not in text
    )


def test_a_folder_without_code_needs_the_package():
    """Of a whole in which a part is patched or collapsed by itself."""
    whole = encoder_decoder_around(apply_layer_collapse(BertModel(BY_NAME["bert"].config())))
    assert "trust_remote_code" not in str(create_model_card(whole))
    refresh_layer_collapse(whole)
    assert "trust_remote_code" in str(create_model_card(whole))


def test_what_is_refused():
    model, report = collapsed()
    with pytest.raises(ValueError, match="dense"):
        create_model_card(BY_NAME["bert"].model())
    with pytest.raises(TypeError, match="CollapseReport"):
        create_model_card(model, {"blocks": []})
    with pytest.raises(ValueError, match=r"no model called 'small', it has \['dense'"):
        create_model_card(model, report, compared(model), compared_as="small")


@pytest.mark.parametrize("name", ["dataset_tags", "dataset", "dataset_name"])
def test_what_the_trainers_card_is_given(name, tmp_path, caplog):
    """Data sets under any of their names; what it has no place for is said."""
    trainer = trainer_for("bert", tmp_path)
    trainer.create_model_card(**{name: "nyu-mll/glue"})
    assert ModelCard.load(tmp_path / "README.md").data.datasets == ["nyu-mll/glue"] and "cannot be" not in caplog.text
    trainer.create_model_card(**{name: "nyu-mll/glue"}, tasks="text-classification", dataset_args="sst2")
    assert "`tasks` and `dataset_args` cannot be on the card" in caplog.text


def test_the_trainers_card(tmp_path):
    model = BY_NAME["bert"].model()
    model.name_or_path = "google-bert/bert-base-uncased"
    config = {"alpha_learning_rate": 0.4, "collapse_threshold": 0.4}
    trainer = trainer_for("bert", tmp_path, config, model=model, args={"max_steps": 6, "learning_rate": 1e-4})
    trainer.train()
    trainer.evaluate()
    report = trainer.collapse()
    assert trainer.collapse_report is report
    trainer.create_model_card(license="mit", comparison=compared(trainer.model))
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model == "google-bert/bert-base-uncased" and card.data.license == "mit"
    assert yaml.safe_load(card.content.split("---")[1])["library_name"] == "transformers"
    loss = next(log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log)
    assert f"| eval_loss | {loss:.6g} |" in card.text and "runtime" not in card.text
    assert "| learning_rate | 0.0001 |" in card.text and "| merged |" in card.text and "Compared" in card.text
    # Of a model that is dense, the stock card.
    plain = trainer_for("bert", tmp_path / "plain", False)
    plain.create_model_card()
    assert "LayerCollapse" not in (tmp_path / "plain" / "README.md").read_text().replace("LayerCollapseTrainer", "")


def rows_of(case, count=12):
    return [BY_NAME[case].inputs(batch=8, seed=i) for i in range(count)]


BESIDE = "it is a linear map with some of its neurons beside it"
FORMS = [
    ({"blocks": [1]}, "it is one linear map", "linear"),
    ({"blocks": [0, 1]}, "each is one linear map", "linear"),
    (
        {"blocks": [1], "keep_neurons": 3},
        "it is a linear map with some of its neurons beside it",
        "linear + 3 neurons",
    ),
    (
        {"blocks": [1], "rank": 2, "keep_neurons": 3},
        "it is a linear map with some of its neurons beside it",
        "rank 2 + 3 neurons",
    ),
    ({"blocks": "all", "rank": 0, "keep_neurons": 39}, "each keeps some of its neurons", "39 neurons"),
]


@pytest.mark.parametrize(("options", "words", "form"), FORMS)
def test_what_blocks_became(options, words, form):
    """With the report and without: the model shows it."""
    model = BY_NAME["bert"].model()
    report = collapse_model(model, LayerCollapseConfig(**options), calibration_data=rows_of("bert"))
    for given in (report, None):
        text = create_model_card(model, given).content
        assert f"feed-forward blocks are collapsed: {words}. " in text and f"| plain | {form} | " in text
        assert "two wide matrices" not in text and "The method is" not in text
    assert "That was done with `hf_layercollapse`, which is named after LayerCollapse" in text


def test_several_forms_gated_blocks_and_a_plan():
    """A plan that makes something else of each block; one is gone."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 40, "num_attention_heads": 2, "num_hidden_layers": 4}
    model = randomize(LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes))).eval()
    plan = plan_collapse(model, rows_of("gpt2"), macs=0.5)
    wanted = {f"model.layers.{i}.mlp": choice for i, choice in enumerate([(None, 0), (None, 5), (0, 9), (0, 0)])}
    plan = replace(plan, curve=[replace(plan.point, choices=wanted)], chosen=0)
    # Those neurons that it has not ordered.
    plan = replace(plan, neurons={name: {rank: list(range(40)) for rank in ("full", "0")} for name in wanted})
    report = collapse_model(model, plan=plan, calibration_data=rows_of("gpt2"))
    text = create_model_card(model, report, plan=plan).content
    forms = "1 is one linear map, 1 is a linear map with some of its neurons beside it, 1 keeps some of its neurons, "
    assert f"4 of 4 feed-forward blocks are collapsed: {forms}1 is dropped. " in text
    assert "| `model.layers.3.mlp` | gated | dropped | " in text
    assert "A plan for the budget `macs=0.5` chose which blocks collapse, and how." in text
    # Training may give its one neuron something to say.
    with torch.no_grad():
        model.model.layers[3].mlp.down_proj.weight.fill_(0.1)
    assert "| `model.layers.3.mlp` | gated | 1 neuron | " in create_model_card(model).content


def recovered(**options):
    dense, (model, report) = BY_NAME["bert"].model(), collapsed()
    data = rows_of("bert")
    return model, report, recover_model(model, dense, data, **options)


def test_what_was_recovered():
    model, report, recovery = recovered(max_steps=12, learning_rate=1e-4)
    assert recovery.best_step > 0
    text = create_model_card(model, report, recovery=recovery).content
    assert "| method | R^2 before recovery | relative error before recovery |" in text
    kept = f"those of step {recovery.best_step} kept"
    assert f"for 12 steps towards the dense model's predictions, without labels, and {kept}" in text
    assert (
        f"predictions held aside their divergence went from {recovery.before:.3g} to {recovery.after:.3g} nats" in text
    )
    assert "Before recovery the largest difference of an output on calibration data was" in text
    # One that gained nothing left the fits as they were.
    model, report, recovery = recovered(max_steps=1, learning_rate=1e-30)
    assert recovery.best_step == 0
    text = create_model_card(model, report, recovery=recovery).content
    assert "gained nothing" in text and "| R^2 | relative error |" in text and "The largest difference" in text
    with pytest.raises(TypeError, match="`recovery` must be a RecoveryReport, got dict"):
        create_model_card(model, report, recovery={})
    with pytest.raises(TypeError, match="`plan` must be a CollapsePlan, got dict"):
        create_model_card(model, report, plan={})


BEFORE = "| R^2 before training | relative error before training |"


def test_what_was_trained_afterwards(tmp_path):
    """By a loop of one's own, or by the Trainer, which knows."""
    model, report = collapsed()
    assert BEFORE not in create_model_card(model, report).content
    text = create_model_card(model, report, trained_since=True).content
    assert BEFORE in text and "Then the weights were trained on" in text
    assert "Before training the largest difference of an output on calibration data was" in text
    # A plan before the first step.
    trainer = trainer_for("bert", tmp_path, {"budget": "macs=0.3", "budget_samples": 32}, args={"max_steps": 2})
    trainer.train()
    trainer.create_model_card()
    text = (tmp_path / "README.md").read_text()
    assert BEFORE in text and "largest difference of an output on calibration data was" in text
    assert "A plan for the budget `macs=0.3`, made from inputs without labels" in text and "The method is" not in text
    # The report says so too where it is given by hand.
    assert BEFORE in create_model_card(trainer.model, trainer.collapse()).content


def test_what_was_trained_after_a_collapse_that_ended_training(tmp_path):
    config = {"alpha_learning_rate": 0.4, "collapse_threshold": 0.4}
    trainer = trainer_for("bert", tmp_path, config, args={"max_steps": 6, "learning_rate": 1e-4})
    trainer.train()
    trainer.collapse(rows_of("bert"))
    trainer.create_model_card()
    text = (tmp_path / "README.md").read_text()
    assert "| R^2 | relative error |" in text and "The method is LayerCollapse" in text and "trained on" not in text
    trainer.train()
    trainer.create_model_card()
    assert BEFORE in (tmp_path / "README.md").read_text()


def test_blocks_that_collapsed_while_training_went_on(tmp_path):
    """The report of all of them is in the card, also where none is left for the end."""
    config = {"alpha_learning_rate": 0.4, "collapse_threshold": 0.4, "progressive": True}
    args = {"max_steps": 8, "eval_strategy": "steps", "eval_steps": 2}
    trainer = trainer_for("bert", tmp_path, config, args=args)
    trainer.train()
    report = trainer.collapse()
    assert len(report.collapsed) == 3 and trainer.collapse_report is report
    trainer.create_model_card()
    text = (tmp_path / "README.md").read_text()
    assert "| relative error when it collapsed |" in text and "Blocks collapsed while training went on" in text


BY_HAND = """---
license: mit
tags:
- mine
my_key: 3
model-index:
- name: half
  results:
  - task:
      type: text-classification
    dataset:
      name: other
      type: other
    metrics:
    - type: f1
      value: 0.25
      name: F1
metrics:
- f1
---
# Mine

Words of my own.
"""


@pytest.mark.parametrize("line_break", ["\n", "\r\n"])
def test_a_comparison_is_added_to_a_card(line_break, tmp_path):
    """Whoever wrote it. A second one takes its place, and all else stays."""
    model, _ = collapsed()
    first = compared(model, source=("reviews.tsv",))
    second = replace(first, models=[replace(one, quality=one.quality / 2) for one in first.models])
    other = replace(first, data="elsewhere")
    path = tmp_path / "README.md"
    path.write_bytes(BY_HAND.replace("\n", line_break).encode())
    for comparison in (first, second, other):
        card = ModelCard.load(path)
        add_comparison(card, model, comparison)
        card.save(path)
    text = path.read_bytes().decode()
    assert line_break == "\n" or "\n" not in text.replace("\r\n", "")
    card = ModelCard(text.replace("\r\n", "\n"))
    assert card.text.startswith("# Mine\n\nWords of my own.\n\n<!-- A comparison")
    assert card.text.count("## Compared") == 1 and "32 examples of elsewhere" in card.text
    assert (card.data.license, card.data.tags, card.data.my_key) == ("mit", ["mine"], 3)
    assert card.data.metrics == ["f1", "accuracy"] and card.data.model_name == "half"
    values = {(entry.dataset_name, entry.metric_type): entry.metric_value for entry in card.data.eval_results}
    assert values == {
        ("other", "f1"): 0.25,
        ("reviews.tsv", "accuracy"): round(second["collapsed"].quality, 6),
        ("elsewhere", "accuracy"): round(first["collapsed"].quality, 6),
    }


def test_a_comparison_comes_where_the_card_has_a_place_for_it():
    """Added or there from the beginning: the same card."""
    model, report = collapsed()
    found = compared(model, source=("reviews.tsv",))
    card = create_model_card(model, report)
    assert "## Compared" not in card.content
    add_comparison(card, model, found, name="BertForSequenceClassification")
    assert card.text == create_model_card(model, report, found).text
    # A comment that is left over takes nothing else with it.
    left, end = card.text.split("<!-- End of the comparison. -->")
    card.text = left + end
    for _ in range(2):
        add_comparison(card, model, found)
    assert card.text.startswith((left + end).rstrip()) and card.text.count("## Compared") == 2


def test_a_comparison_is_added_to_a_text_without_a_head():
    model, _ = collapsed()
    card = ModelCard("Words.\n")
    add_comparison(card, model, compared(model, source=("reviews.tsv",)), name="mine")
    loaded = ModelCard(card.content)
    assert loaded.text.startswith("Words.\n") and loaded.data.model_name == "mine"
    assert [entry.metric_type for entry in loaded.data.eval_results] == ["accuracy"]
    with pytest.raises(TypeError, match="`card` must be a ModelCard, got str"):
        add_comparison("Words.", model, compared(model))
    with pytest.raises(ValueError, match="no model called 'small'"):
        add_comparison(card, model, compared(model), compared_as="small")
