import time

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

from hf_layercollapse import LayerCollapseConfig, apply_layer_collapse, collapse_model, find_feed_forward_blocks
from hf_layercollapse.profiling import (
    FixedCost,
    Latency,
    compare_latency,
    cost_of,
    count_macs,
    count_parameters,
    fixed_cost,
    macs_per_token,
    measure_speedup,
    neurons_within,
    weights_size,
)


WIDTH, HIDDEN, LAYERS, LABELS, BATCH, LENGTH = 16, 40, 3, 3, 2, 7
INPUTS = {"input_ids": torch.arange(BATCH * LENGTH).reshape(BATCH, LENGTH) + 3}


@pytest.fixture
def bert():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=64,
        hidden_size=WIDTH,
        intermediate_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        max_position_embeddings=40,
        num_labels=LABELS,
    )
    return BertForSequenceClassification(config)


def test_macs_of_bert_are_exact(bert):
    per_layer = 4 * WIDTH * WIDTH + 2 * WIDTH * HIDDEN
    head = WIDTH * WIDTH + WIDTH * LABELS  # pooler and classifier: once per sequence
    expected = BATCH * (LENGTH * LAYERS * per_layer + head)
    assert count_macs(bert, INPUTS) == expected
    assert macs_per_token(bert, INPUTS) == expected / (BATCH * LENGTH)


@pytest.mark.parametrize("share, rank", [(0.5, None), (0.3, 0), (0.45, 2), (0.05, 0)])
def test_neurons_within_a_share_are_as_many_as_fit(bert, share, rank):
    block = find_feed_forward_blocks(bert)[0]
    neurons = neurons_within(block, share, rank)
    assert cost_of(block, rank, neurons) <= share * block.macs < cost_of(block, rank, neurons + 1)


def test_neurons_within_a_share_that_holds_none(bert):
    block = find_feed_forward_blocks(bert)[0]
    assert neurons_within(block, WIDTH * WIDTH / (2 * WIDTH * HIDDEN)) == 0
    for share, rank, message in ((0.19, None, "its linear map"), (0.02, 0, "0.025"), (1, 0, r"in \(0, 1\)")):
        with pytest.raises(ValueError, match=message):
            neurons_within(block, share, rank)


def test_macs_of_conv1d_and_a_tied_head_are_exact():
    config = GPT2Config(vocab_size=64, n_positions=16, n_embd=WIDTH, n_layer=LAYERS, n_head=2, n_inner=HIDDEN)
    per_layer = 4 * WIDTH * WIDTH + 2 * WIDTH * HIDDEN
    assert macs_per_token(GPT2LMHeadModel(config), INPUTS) == LAYERS * per_layer + WIDTH * 64


@pytest.mark.parametrize(
    "layer, shape, expected",
    [
        (nn.Conv2d(4, 6, 3, padding=1, groups=2), (2, 4, 8, 8), 2 * 8 * 8 * 6 * (4 // 2) * 9),
        (nn.Conv1d(4, 6, 3, stride=2), (2, 4, 9), 2 * 4 * 6 * 4 * 3),
        (nn.ConvTranspose2d(4, 6, 2, stride=2), (2, 4, 8, 8), 2 * 8 * 8 * 4 * 6 * 4),
    ],
    ids=["grouped", "strided", "transposed"],
)
def test_macs_of_convolutions_are_exact(layer, shape, expected):
    assert count_macs(layer, {"input": torch.zeros(shape)}) == expected


def test_macs_fall_by_what_a_collapse_saves_and_leave_nothing_behind(bert):
    bert.train()
    before = macs_per_token(bert, INPUTS)
    config = LayerCollapseConfig(blocks="last:2", initial_alpha=1.0)
    report = collapse_model(apply_layer_collapse(bert, config))
    assert before - macs_per_token(bert, INPUTS) == 2 * (2 * WIDTH * HIDDEN - WIDTH * WIDTH)
    assert count_parameters(bert) == report.parameters_after
    assert bert.training and bert.bert.encoder.layer[0].training
    assert not any(module._forward_hooks for module in bert.modules())


def test_a_layer_that_is_used_twice_counts_twice():
    shared = nn.Linear(4, 4)
    assert count_macs(nn.Sequential(shared, shared), {"input": torch.zeros(1, 4)}) == 2 * 16
    assert count_parameters(nn.Sequential(shared, shared)) == 20


def test_hooks_go_when_the_forward_fails():
    layer = nn.Linear(4, 4)
    with pytest.raises(RuntimeError):
        count_macs(layer, {"input": torch.zeros(1, 5)})
    assert not layer._forward_hooks


def test_macs_per_token_asks_for_tokens_where_it_cannot_know_them():
    layer, inputs = nn.Linear(4, 4), {"input": torch.zeros(3, 4)}
    with pytest.raises(ValueError, match="say `tokens`"):
        macs_per_token(layer, inputs)
    with pytest.raises(ValueError, match="at least 1"):
        macs_per_token(layer, inputs, tokens=0)
    assert macs_per_token(layer, inputs, tokens=3) == 16


def test_weights_size_counts_weights_and_nothing_else(bert, tmp_path):
    with pytest.raises(ValueError, match="no weights"):
        weights_size(tmp_path)
    bert.save_pretrained(tmp_path)
    (tmp_path / "optimizer.pt").write_bytes(bytes(100))
    (tmp_path / "training_args.bin").write_bytes(bytes(100))
    whole = weights_size(tmp_path)
    assert whole == (tmp_path / "model.safetensors").stat().st_size > 4 * count_parameters(bert)
    bert.save_pretrained(tmp_path / "shards", max_shard_size="10KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    shards = weights_size(tmp_path / "shards")
    assert shards == pytest.approx(whole, rel=0.1)
    # What a loader does not read beside them: other formats, variants, shards of another save.
    for name in ("pytorch_model.bin", "model.fp16.safetensors", "model-00001-of-00099.safetensors"):
        (tmp_path / name).write_bytes(bytes(100))
        (tmp_path / "shards" / name).write_bytes(bytes(100))
    assert (weights_size(tmp_path), weights_size(tmp_path / "shards")) == (whole, shards)
    assert weights_size(tmp_path, variant="fp16") == 100
    with pytest.raises(ValueError, match="no weights.*expected model.bf16.safetensors"):
        weights_size(tmp_path, variant="bf16")
    (tmp_path / "model.safetensors").unlink()
    assert weights_size(tmp_path) == 100
    (tmp_path / "shards" / "model.fp16.safetensors").unlink()
    bert.save_pretrained(tmp_path / "shards", max_shard_size="10KB", variant="fp16")
    assert weights_size(tmp_path / "shards", variant="fp16") == shards


class _Sleeper(nn.Module):
    def __init__(self, name, seconds, calls):
        super().__init__()
        self.name, self.seconds, self.calls = name, seconds, calls

    def forward(self, x):
        assert not self.training and not torch.is_grad_enabled()
        self.calls.append(self.name)
        time.sleep(self.seconds)


def test_latency_is_measured_in_turn_and_relative_to_the_first():
    calls = []
    models = {"slow": _Sleeper("slow", 0.02, calls), "fast": _Sleeper("fast", 0.01, calls)}
    latencies = compare_latency(models, {"x": torch.zeros(1)}, rounds=6, warmup=1, progress=False)
    assert all(model.training for model in models.values())
    # Every round calls each once; who is first alternates.
    rounds = [tuple(calls[start : start + 2]) for start in range(0, len(calls), 2)]
    assert rounds == [("fast", "slow"), ("slow", "fast")] * 3 + [("fast", "slow")]
    assert len(latencies["slow"].seconds) == 6
    assert set(latencies["slow"].ratios) == {1.0}
    assert 0.02 <= latencies["slow"].median < 0.2
    assert latencies["fast"].ratio < 0.9


def test_latency_reports_median_and_quartiles():
    latency = Latency(seconds=(1.0, 2.0, 3.0, 4.0, 100.0), ratios=(0.5, 0.5, 1.0, 2.0, 2.0))
    assert (latency.median, latency.quartiles) == (3.0, (2.0, 4.0))
    assert (latency.ratio, latency.ratio_quartiles) == (1.0, (0.5, 2.0))


@pytest.mark.parametrize("kwargs", [{"rounds": 1}, {"warmup": -1}, {"models": {}}], ids=str)
def test_latency_refuses_what_measures_nothing(kwargs):
    models = kwargs.pop("models", {"one": nn.Identity()})
    with pytest.raises(ValueError):
        compare_latency(models, {"input": torch.zeros(1)}, **kwargs)


class Takes(nn.Module):
    """Takes a fixed time and a time for each row, on a clock of its own."""

    def __init__(self, fixed, per_row):
        super().__init__()
        self.fixed, self.per_row, self.now = fixed, per_row, 0.0
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x, mask=None):
        self.now += self.fixed + self.per_row * x.shape[0]
        return x


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("fixed, per_row, bound", [(0.02, 0.0005, "launches"), (0.0, 0.01, "compute")])
def test_what_a_call_costs_whatever_the_batch(rows, fixed, per_row, bound, monkeypatch):
    model = Takes(fixed, per_row)
    # What else the machine does is not in this test's hands.
    monkeypatch.setattr(time, "perf_counter", lambda: model.now)
    inputs = {"x": torch.ones(rows, 3), "mask": torch.ones(5)}
    cost = fixed_cost(model, inputs, rounds=5, warmup=1, progress=False)
    assert cost.seconds == pytest.approx(fixed + per_row * rows)
    assert cost.fixed == pytest.approx(fixed, abs=1e-9)
    assert cost.bound_by == bound
    assert f"bound by {bound}" in str(cost)


def test_a_call_that_only_reads_weights_is_bound_by_memory():
    cost = FixedCost(seconds=0.010, fixed=0.009, reading=0.008)
    assert cost.bound_by == "memory" and "weights' bytes" in str(cost)
    assert FixedCost(seconds=0.010, fixed=0.009, reading=0.001).bound_by == "launches"
    # Half the batch may measure slower than half the time: no share is negative.
    assert FixedCost(seconds=0.010, fixed=-0.001, reading=0.001).share == 0


def test_the_fixed_cost_needs_a_batch(bert):
    with pytest.raises(ValueError, match="no tensor with a batch dimension"):
        fixed_cost(bert, {"use_cache": False})


def test_speedup_of_a_collapse(bert):
    collapsed = BertForSequenceClassification(bert.config)
    apply_layer_collapse(collapsed, LayerCollapseConfig(initial_alpha=1.0))
    collapse_model(collapsed)
    (eager,) = measure_speedup(bert, collapsed, INPUTS, modes=["eager"], rounds=2, warmup=0, progress=False)
    assert eager.promised == count_macs(bert, INPUTS) / count_macs(collapsed, INPUTS) > 1.5
    assert eager.measured == pytest.approx(1 / eager.collapsed.ratio)
    low, high = eager.quartiles
    assert low <= eager.measured <= high
    assert "the MACs promise" in str(eager)
    with pytest.raises(ValueError, match="'eager' and 'compiled'"):
        measure_speedup(bert, collapsed, INPUTS, modes=["fast"])


@pytest.mark.slow
def test_speedup_when_compiled(bert):
    collapsed = BertForSequenceClassification(bert.config)
    apply_layer_collapse(collapsed, LayerCollapseConfig(initial_alpha=1.0))
    collapse_model(collapsed)
    eager, compiled = measure_speedup(bert, collapsed, INPUTS, rounds=3, warmup=1, progress=False)
    assert (eager.mode, compiled.mode) == ("eager", "compiled")
    assert compiled.promised == eager.promised
