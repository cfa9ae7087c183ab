"""What plans are scored on: which rows, and which labels are none."""

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import BertForMultipleChoice

from hf_layercollapse import linearity_map
from hf_layercollapse.rows import contents, hold_back
from hf_layercollapse.scoring import check_classes

from .models import BY_NAME, text_inputs


def test_labels_that_are_no_classes():
    model = BY_NAME["bert"].model()
    with pytest.raises(ValueError, match=r"labels of \[-1\].*classes 0 to 2"):
        check_classes(model, torch.tensor([2, -1]))
    check_classes(model, torch.tensor([2, -100]))


def test_more_choices_than_labels_in_the_config():
    torch.manual_seed(0)
    check_classes(BertForMultipleChoice(BY_NAME["bert"].config()), torch.tensor([4, 3]))


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
