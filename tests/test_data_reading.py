"""Calibration data in whatever form people have it: the same rows give the same answer, or one clear line."""

import gc
import weakref

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from hf_layercollapse import (
    LayerCollapseConfig,
    apply_layer_collapse,
    collapse_model,
    find_feed_forward_blocks,
    linearity_map,
    plan_collapse,
    recover_model,
)
from hf_layercollapse.blocks import bind_blocks
from hf_layercollapse.calibration import Calibration
from hf_layercollapse.data_reading import read_calibration_data, readable, split_data
from hf_layercollapse.memory import MemoryBudget
from hf_layercollapse.reports import DataReport
from hf_layercollapse.rows import sample

from .models import BY_NAME, text_inputs
from .test_patching import logits


def rows(count=60):
    return [{"input_ids": text_inputs(batch=1, seed=seed)["input_ids"][0]} for seed in range(count)]


class Stream(IterableDataset):
    """Can be read again, and says nothing of its order."""

    def __iter__(self):
        return iter(rows())


def shuffled(seed=0):
    return DataLoader(rows(), batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(seed))


FORMS = {
    "generator": lambda: (batch for batch in DataLoader(rows(), batch_size=7)),
    "shuffled": shuffled,
    "iterable-dataset": lambda: DataLoader(Stream(), batch_size=5),
    "backwards": lambda: list(DataLoader(rows()[::-1], batch_size=6)),
    "arrays": lambda: [{"input_ids": batch["input_ids"].numpy()} for batch in DataLoader(rows(), batch_size=5)],
}


CONFIG = LayerCollapseConfig(blocks=[0, 2], rank=2, keep_neurons=3)


def all_of_it(data):
    """`(collapsed model, report, plan, linearity map)`."""
    case = BY_NAME["bert"]
    model = case.model()
    report = collapse_model(model, CONFIG, data())
    return model, report, plan_collapse(case.model(), data(), macs=0.4), linearity_map(case.model(), data())


@pytest.fixture(scope="module")
def of_a_list():
    return all_of_it(lambda: list(DataLoader(rows(), batch_size=8)))


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_the_same_rows_gives_the_same_answer(form, of_a_list):
    model, report, plan, lines = of_a_list
    other, other_report, other_plan, other_lines = all_of_it(FORMS[form])
    inputs = BY_NAME["bert"].inputs(seed=99)
    torch.testing.assert_close(logits(other, inputs), logits(model, inputs), rtol=1e-4, atol=1e-4)
    assert (other_report.data.rows, other_report.data.distinct, other_report.data.tokens) == (60, 60, 420)
    assert other_report.data == report.data and "60 different, 420 tokens" in str(report)
    assert other_plan.data == other_lines.data == DataReport(45, 45, 315, 15)
    assert all("315 tokens, 15 rows held aside" in str(told) for told in (other_plan, other_lines))
    assert other_plan.point.choices == plan.point.choices and other_plan.neurons == plan.neurons
    assert other_plan.point.score == pytest.approx(plan.point.score, rel=1e-3)
    for one, another in zip(lines.blocks, other_lines.blocks, strict=True):
        assert another.score_change == pytest.approx(one.score_change, rel=1e-3)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.mlp = nn.Module()
        self.fc1, self.act, self.fc2 = nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8)

    def forward(self, x):
        return x + self.fc2(self.act(self.fc1(x)))


def test_small_tokens_first_or_last_are_the_same_data():
    """What counts as an outlier is seen on a sample of all rows, and not on those that come first."""
    generator = torch.Generator().manual_seed(0)
    small = [{"x": 0.02 * torch.randn(64, 8, generator=generator)} for _ in range(2)]
    large = [{"x": 5 * torch.randn(64, 8, generator=generator)} for _ in range(20)]
    errors = []
    for data in (small + large, large + small, large[:7] + small + large[7:]):
        torch.manual_seed(0)
        report = collapse_model(Net().eval(), LayerCollapseConfig(), data)
        errors.append(report.blocks[0].calibration_error)
    assert errors == pytest.approx([errors[0]] * 3, rel=1e-6) and errors[0] < 0.5


def test_a_loader_is_read_and_not_kept():
    alive, most = weakref.WeakSet(), []

    class Loader(DataLoader):
        def __iter__(self):
            for batch in super().__iter__():
                gc.collect()
                alive.add(batch["input_ids"])
                most.append(len(alive))
                yield batch

    model = BY_NAME["bert"].model()
    # What is there already is not looked through for every batch.
    gc.freeze()
    try:
        collapse_model(model, LayerCollapseConfig(keep_neurons=2), Loader(rows(80), batch_size=4))
    finally:
        gc.unfreeze()
    assert len(most) >= 40 and max(most) <= 5


def test_what_can_be_read_only_once_is_kept_within_the_memory():
    batches = list(DataLoader(rows(), batch_size=4))
    taken = sum(batch["input_ids"].numel() * 8 for batch in batches)
    memory = MemoryBudget(10 * taken)
    found = read_calibration_data(iter(batches), memory)
    assert memory.room() == 9 * taken and found.distinct == 60
    with pytest.raises(ValueError, match=r"can be read only once, and its first 8 batches take 1,792 bytes, of 1,700"):
        read_calibration_data(iter(batches), MemoryBudget(1700))
    # What can be read again need not be.
    assert read_calibration_data(shuffled(), MemoryBudget(1700)).distinct == 60


def test_what_lies_on_another_device_takes_none_of_the_host():
    batches = [{"input_ids": torch.zeros(2, 50, dtype=torch.long, device="meta")} for _ in range(3)]
    memory = MemoryBudget({"cpu": 1000})
    before = memory.room("meta")
    assert len(readable(iter(batches), memory)) == 3
    assert memory.room("cpu") == 1000 and memory.room("meta") == before - 2400


def test_rows_that_are_held_aside_count():
    batches = list(DataLoader(rows(), batch_size=4))
    memory = MemoryBudget(10_000)
    fitting, held = split_data(batches, None, memory)
    assert fitting.distinct == 45 and sum(len(batch["input_ids"]) for batch in held) == 15
    assert memory.room() == 10_000 - 15 * 7 * 8


def test_data_that_change_between_readings():
    class Random(IterableDataset):
        def __iter__(self):
            return iter([{"input_ids": torch.randint(3, 60, (7,))} for _ in range(200)])

    model = BY_NAME["bert"].model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    data = DataLoader(Random(), batch_size=4)
    # Kept, where there is room for it.
    collapse_model(BY_NAME["bert"].model(), LayerCollapseConfig(blocks=[0]), data)
    with pytest.raises(
        ValueError, match="The calibration data changes: of 200 different rows .* as a list of batches"
    ):
        Calibration.on(model, model, data, max_memory=7000).moments(bind_blocks(model)[:1])

    class Augmented(torch.utils.data.Dataset):
        def __len__(self):
            return 60

        def __getitem__(self, index):
            return {"input_ids": torch.randint(3, 60, (7,))}

    with pytest.raises(ValueError, match="The calibration data changes"):
        collapse_model(model, LayerCollapseConfig(blocks=[0]), DataLoader(Augmented(), batch_size=4))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


IDS = text_inputs()["input_ids"]
REFUSED = {
    "one batch": ({"input_ids": IDS}, ValueError, "this is one batch .* pass a list of them"),
    "a tensor": ([IDS], ValueError, "dicts of tensors.*, got a Tensor"),
    "pairs": ([(IDS, IDS)], ValueError, "dicts of tensors.*, got a tuple"),
    "lists": ([{"input_ids": IDS.tolist()}], ValueError, "`input_ids` .* is a list, not a tensor"),
    "rows": (rows(), ValueError, r"`input_ids` .* shape \(7,\): these are rows, .*DataLoader"),
    "nothing": ([], ValueError, "calibration data is empty"),
    "a generator of nothing": (iter([]), ValueError, "calibration data is empty"),
    "a number": (7, TypeError, "must be an iterable of batches of model inputs, got 7"),
}
USES = {
    "collapse": lambda model, data: collapse_model(model, LayerCollapseConfig(blocks=[0]), data),
    "plan": lambda model, data: plan_collapse(model, data, macs=0.5),
    "map": linearity_map,
    "affine": lambda model, data: apply_layer_collapse(model, LayerCollapseConfig(linear_target="affine"), data),
    "recovery": lambda model, data: recover_model(model, BY_NAME["bert"].model(), data, max_steps=1),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("what", REFUSED)
def test_what_is_no_calibration_data(use, what):
    data, kind, message = REFUSED[what]
    if what == "a generator of nothing":
        data = iter([])
    model = BY_NAME["bert"].model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(kind, match=message) as refused:
        USES[use](model, data)
    assert "\n" not in str(refused.value)
    assert {block.state for block in find_feed_forward_blocks(model)} == {"dense"}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_images_without_a_batch():
    model = BY_NAME["vit"].model()
    image = torch.randn(3, 8, 8)
    with pytest.raises(ValueError, match=r"`pixel_values` .* shape \(3, 8, 8\): these are rows"):
        linearity_map(model, [{"pixel_values": image}] * 4)
    # Patches of several images, as some models take them, are a batch.
    patches = {"pixel_values": torch.randn(3, 8, 8), "spatial_shapes": torch.ones(3, 2)}
    assert read_calibration_data([patches], MemoryBudget()).distinct == 3


def test_a_sample_is_of_the_same_rows_whatever_their_order():
    def contents(data):
        batches = sample(read_calibration_data(data, MemoryBudget()), 10, 10_000, 10**9)
        return torch.cat([batch["input_ids"] for batch in batches])

    batches = list(DataLoader(rows(), batch_size=8))
    expected = contents(batches)
    assert len(expected) == 10
    for other in (batches[::-1], shuffled(), shuffled(3), iter(batches)):
        assert torch.equal(contents(other), expected)
    few = sample(read_calibration_data(batches, MemoryBudget()), 10, 15, 10**9)
    assert sum(len(batch["input_ids"]) for batch in few) == 2


def test_arrays_of_objects_are_no_tensors():
    batch = {"input_ids": np.array([[1, 2], [3]], dtype=object)}
    with pytest.raises(ValueError, match="`input_ids` .* is a ndarray"):
        read_calibration_data([batch], MemoryBudget())


@pytest.mark.parametrize(
    ("first", "later", "message"),
    [(12, 10, "of 20 different rows 0 are new, and 4 "), (10, 12, "of 24 different rows 4 are new, and 0 ")],
)
def test_rows_that_go_or_come_are_named_as_such(first, later, message):
    class Changing(list):
        readings = 0

        def __iter__(self):
            self.readings += 1
            return iter(self[: first if self.readings == 1 else later])

    model = BY_NAME["bert"].model()
    engine = Calibration.on(model, model, Changing(text_inputs(batch=2, seed=seed) for seed in range(12)))
    with pytest.raises(ValueError, match=message + "that were read before are gone"):
        engine.run("", lambda: ())
