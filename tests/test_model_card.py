"""The card, whole: every line of it is expected, and nothing that was not measured."""

import re

import pytest
import torch
import yaml
from huggingface_hub import ModelCard

from hf_layercollapse import LayerCollapseConfig, apply_layer_collapse, collapse_model
from hf_layercollapse.comparison import compare_models
from hf_layercollapse.model_card import create_model_card
from tests.models import BY_NAME
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

\[google-bert/bert-base-uncased\]\(https://huggingface\.co/google-bert/bert-base-uncased\) in which 2 of 3 feed-forward blocks are collapsed: .* LayerCollapse \(\[arXiv 2311\.17943\]\(https://arxiv\.org/abs/2311\.17943\)\), as `hf_layercollapse` \S+ implements it\.

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

Refit blocks are the least-squares map of what they computed on calibration data; errors and R\^2 are measured on that data\.

\| block \| kind \| now \| parameters \| method \| R\^2 \| relative error \|
\| --- \| ---: \| ---: \| ---: \| ---: \| ---: \| ---: \|
\| `bert\.encoder\.layer\.0` \| plain \| dense \| 1,336 \|  \|  \|  \|
\| `bert\.encoder\.layer\.1` \| plain \| linear \+ 3 neurons \| 1,336 -> 371 \| refit \| 0\.\d{{4}} \| \d\.\de-\d\d \|
\| `bert\.encoder\.layer\.2` \| plain \| linear \+ 3 neurons \| 1,336 -> 371 \| refit \| 0\.\d{{4}} \| \d\.\de-\d\d \|

Parameters of the whole model: 9,515 before, 7,585 after \(20\.3 % fewer\)\. The largest difference of an output on calibration data is {NUMBER}\.

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
    for word in [*absent, "->"]:
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
    assert "Training drove each block's alpha" in text and "Refit" not in text


def test_what_is_refused():
    model, report = collapsed()
    with pytest.raises(ValueError, match="dense"):
        create_model_card(BY_NAME["bert"].model())
    with pytest.raises(TypeError, match="CollapseReport"):
        create_model_card(model, {"blocks": []})
    with pytest.raises(ValueError, match=r"no model called 'small', it has \['dense'"):
        create_model_card(model, report, compared(model), compared_as="small")


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
