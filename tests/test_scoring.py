"""What plans are scored on: which rows, and by what their losses are weighed."""

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import BertForMultipleChoice, BertForTokenClassification, T5Config, T5ForConditionalGeneration

from hf_layercollapse import linearity_map
from hf_layercollapse.rows import contents, hold_back
from hf_layercollapse.scoring import Score, split

from .models import BY_NAME, HIDDEN, VOCABULARY, WIDTH, randomize, text_inputs


def t5():
    config = T5Config(
        vocab_size=VOCABULARY, d_model=WIDTH, d_ff=HIDDEN, d_kv=8, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    return randomize(T5ForConditionalGeneration(config)).eval()


def of_tokens():
    torch.manual_seed(0)
    return randomize(BertForTokenClassification(BY_NAME["bert"].config())).eval()


def labelled(name, first_ignored=False):
    """Batches of rows of different lengths: their losses are means over different counts."""
    batches = []
    for seed, length in enumerate((3, 9, 5)):
        batch = text_inputs(batch=4, length=length, seed=seed)
        batch["labels"] = batch["input_ids"].clone() if name != "tokens" else batch["input_ids"] % 3
        batch["labels"][seed, 1:] = -100
        if first_ignored:
            batch["labels"][:, 0] = -100
        batches.append(batch)
    return batches


@pytest.mark.parametrize("first_ignored", [False, True], ids=["whole", "first-ignored"])
@pytest.mark.parametrize("name", ["gpt2", "t5", "tokens"])
def test_the_loss_is_the_mean_over_all_that_is_predicted(name, first_ignored):
    model = {"gpt2": BY_NAME["gpt2"].model, "t5": t5, "tokens": of_tokens}[name]()
    batches = labelled(name, first_ignored)
    total = count = 0.0
    with torch.no_grad():
        for batch in batches:
            logits, labels = model(**batch).logits, batch["labels"]
            if name == "gpt2":
                logits, labels = logits[:, :-1], labels[:, 1:]
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
            total, count = total + float(loss), count + int((labels != -100).sum())
    score = Score(model, model, batches, None)
    assert score() == pytest.approx(total / count, rel=1e-5)


def test_labels_that_are_no_classes():
    case = BY_NAME["bert"]
    model, batches = case.model(), [case.batch(seed=seed) for seed in range(2)]
    batches[1]["labels"][0] = -1
    with pytest.raises(ValueError, match=r"labels of \[-1\].*classes 0 to 2"):
        Score(model, model, batches, None)()
    del batches[1]["labels"]
    with pytest.raises(ValueError, match="some have none"):
        Score(model, model, batches, None)()


def test_more_choices_than_labels_in_the_config():
    torch.manual_seed(0)
    model = BertForMultipleChoice(BY_NAME["bert"].config()).eval()
    ids = text_inputs(batch=10)["input_ids"].reshape(2, 5, 7)
    assert Score(model, model, [{"input_ids": ids, "labels": torch.tensor([4, 3])}], None)() > 0


def test_labels_that_are_all_left_out():
    batches = labelled("gpt2")
    for batch in batches:
        batch["labels"][:] = -100
    model = BY_NAME["gpt2"].model()
    with pytest.raises(ValueError, match="nothing is predicted"):
        Score(model, model, batches, None)()


def test_a_shuffled_loader_gives_the_scores_of_a_list():
    case = BY_NAME["bert"]
    rows = [{"input_ids": text_inputs(batch=1, seed=seed)["input_ids"][0]} for seed in range(60)]
    shuffled = DataLoader(rows, batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(0))
    found = linearity_map(case.model(), shuffled)
    expected = linearity_map(case.model(), [row for row in DataLoader(rows, batch_size=5)])
    assert found.score == expected.score == 0
    for one, other in zip(found.blocks, expected.blocks, strict=True):
        assert one.score_change == pytest.approx(other.score_change, rel=1e-3)
        assert one.r2 == pytest.approx(other.r2, rel=1e-4)


def test_no_copy_of_a_row_that_is_fitted_is_scored():
    batches = [text_inputs(batch=4, seed=seed) for seed in range(6)]
    padded = {"input_ids": torch.zeros(24, 9).long(), "attention_mask": torch.zeros(24, 9).long()}
    padded["input_ids"][:, 2:] = torch.cat([batch["input_ids"] for batch in batches])
    padded["attention_mask"][:, 2:] = 1
    fitted, scored = hold_back([*batches, padded])
    found = [{content for batch in part for content in contents(batch)} for part in (fitted, scored)]
    assert not found[0] & found[1] and (len(found[0]), len(found[1])) == (18, 6)


def test_a_batch_without_rows_is_taken_whole():
    """Patches of several images: their first size is not that of the texts."""
    batches = [
        {"input_ids": torch.randint(9, (2, 4)), "pixel_values": torch.randn(6, 3), "labels": torch.tensor([1, seed])}
        for seed in range(8)
    ]
    fitted, scored = hold_back(batches)
    assert len(list(fitted)) == 6 and len(scored) == 2
    assert all(any(batch is one for one in batches) for batch in [*fitted, *scored])


@pytest.mark.parametrize("batches", [[torch.zeros(2, 3)], [[1, 2]]], ids=["tensor", "list"])
def test_data_that_are_no_model_inputs(batches):
    with pytest.raises(ValueError, match="iterable of model inputs"):
        split(batches, None)
