"""Memory by a budget: what may be held, what is refused, and that less of it is the same answer in more passes."""

import copy
import math
import weakref
from collections import Counter
from copy import deepcopy

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from transformers import LlamaConfig, LlamaForCausalLM

from hf_layercollapse import (
    LayerCollapseConfig,
    apply_layer_collapse,
    calibration,
    collapse_model,
    comparison,
    functional,
    linearity_map,
    plan_collapse,
    shape_times,
)
from hf_layercollapse.block_sizes import RANK_SHARES, possible_sizes
from hf_layercollapse.blocks import bind_blocks
from hf_layercollapse.calibration import Calibration, _Need
from hf_layercollapse.fitting import BlockFitting
from hf_layercollapse.loss_metric import bytes_of_metrics
from hf_layercollapse.memory import MemoryBudget, left_by_control_groups
from hf_layercollapse.merging import BlockChoice, parameters_of
from hf_layercollapse.moments import bytes_in_metric, bytes_of_sums, bytes_to_choose, bytes_to_fit
from hf_layercollapse.neuron_statistics import tokens_at_a_time
from hf_layercollapse.plan_search import Candidate, PlanOptions, Search
from hf_layercollapse.rows import bytes_of, hold_back

from .models import BY_NAME, randomize, text_inputs
from .test_patching import logits


def test_sizes_of_a_budget():
    for given, expected in ((1500, 1500), ("2GB", 2 * 10**9), ("500MB", 5 * 10**8), ({"cpu": "1GB"}, 10**9)):
        assert MemoryBudget(given).room("cpu") == expected
    memory = MemoryBudget({"cpu": 100, "disk": "1TB"})
    memory.hold(40)
    assert memory.room() == 60
    memory.hold(-40)
    assert memory.room() == 100
    free = MemoryBudget()
    assert 0 < free.room() == free.room()


def test_one_number_is_for_all_devices_together():
    model = llama()
    first, second, *_ = bind_blocks(model)
    here, there = torch.device("cpu"), torch.device("meta")
    pair = [
        _Need(block, device, sums=40, working=20, kept=0, kept_on=device)
        for block, device in ((first, here), (second, there))
    ]
    # What is worked out on one device comes after what is on the other.
    for given, fit in ((99, False), (100, True), ({"cpu": 60}, True), ({"cpu": 59}, False)):
        engine = Calibration.on(model, model, data(), max_memory=given)
        assert engine._fit(pair, Counter()) == fit, given
    memory = MemoryBudget(100)
    assert memory.fits({here: 60, there: 40}) and not memory.fits({here: 60, there: 41})
    assert memory.times({here: 20, there: 20}) == 2 and memory.times({here: 20, there: 100}) == 0


@pytest.mark.parametrize(
    ("given", "kind", "message"),
    [
        ("much", ValueError, "positive number of bytes.*'much'"),
        (0, ValueError, "positive number of bytes"),
        (-5, ValueError, "positive number of bytes"),
        (True, TypeError, "got True"),
        (1.5, TypeError, "got 1.5"),
        ({"gpu": 10}, ValueError, "names the device 'gpu', and there is none such"),
        ({99: 10}, ValueError, "names the device 99, and there is none such"),
    ],
)
@pytest.mark.parametrize("use", ["collapse", "plan", "map", "affine"])
def test_what_is_no_budget(use, given, kind, message):
    model, data = BY_NAME["bert"].model(), [text_inputs(batch=8, seed=seed) for seed in range(8)]
    with pytest.raises(kind, match=message):
        if use == "collapse":
            collapse_model(model, LayerCollapseConfig(blocks=[0]), data, max_memory=given)
        elif use == "plan":
            plan_collapse(model, data, macs=0.5, max_memory=given)
        elif use == "map":
            linearity_map(model, data, max_memory=given)
        else:
            apply_layer_collapse(model, LayerCollapseConfig(linear_target="affine"), data, max_memory=given)


def llama(layers=4):
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=48,
        vocab_size=64,
    )
    return randomize(LlamaForCausalLM(config)).eval()


def data():
    return [text_inputs(batch=8, seed=seed) for seed in range(12)]


@pytest.mark.parametrize("options", [{}, {"rank": 0, "keep_neurons": 20}, {"rank": 3, "keep_neurons": 5}], ids=str)
def test_less_memory_is_more_passes_and_the_same_weights(options):
    config = LayerCollapseConfig(**options)
    block = bind_blocks(llama())[0]
    candidates, inputs = 48 if options else 0, options.get("rank") != 0
    count = options.get("keep_neurons", 0)
    working = bytes_to_fit(block, count, inputs, bool(options.get("rank")))
    working = max(working, bytes_to_choose(block, 48, inputs) if options else 0)
    one = bytes_of_sums(block, candidates, inputs) + working
    passes, models = [], []
    for memory in (None, one + 20_000):
        models.append(llama())
        passes.append(0)
        handle = models[-1].register_forward_pre_hook(lambda *_: passes.append(passes.pop() + 1))
        collapse_model(models[-1], config, data(), max_memory=memory)
        handle.remove()
    assert passes[1] >= passes[0] + 12
    first, second = (model.state_dict() for model in models)
    assert all(torch.equal(first[name], second[name]) for name in first)
    with pytest.raises(ValueError, match=r"Block model.layers.\d.mlp needs .* GB .* new weights.* raise `max_memory`"):
        collapse_model(llama(), config, data(), max_memory=one // 2)


def test_in_turn_what_was_fitted_counts():
    """It stays in place while the next blocks are fitted."""
    config = LayerCollapseConfig(sequential=True)
    block, *others = bind_blocks(llama())
    one = bytes_of_sums(block, 0) + bytes_to_fit(block, 0)
    linear = 4 * parameters_of(block, None, 0, "native")
    enough = one + (1 + len(others)) * linear
    collapse_model(llama(), config, data(), max_memory=enough)
    model = llama()
    before, forwards = {name: value.clone() for name, value in model.state_dict().items()}, forwards_of(model)
    with pytest.raises(
        ValueError, match=rf"Block {others[-1].name} needs .*, beside .* of new weights.* `max_memory`"
    ):
        collapse_model(model, config, data(), max_memory=enough - 100)
    assert not forwards  # it is known before the first block is measured
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(value, before[name]) for name, value in after.items())


def forwards_of(model):
    """A list that gets an entry for each forward from now on."""
    forwards = []
    model.register_forward_pre_hook(lambda *_: forwards.append(1))
    return forwards


@pytest.mark.parametrize("how", ["plan", "points", "one width"])
def test_a_plan_that_cannot_hold_what_it_measures_is_refused_before_a_pass(how):
    options = {
        "plan": {"macs": 0.9},
        "points": {"macs": 0.1, "points": [0.1, 0.9]},
        "one width": {"macs": 0.9, "uniform_width": True},
    }[how]
    model = llama(layers=12)
    blocks, (_, held) = bind_blocks(model), hold_back(data())
    looked = bytes_of_sums(blocks[0], 48) + bytes_to_choose(blocks[0], 48) + bytes_in_metric(blocks[0], 48)
    enough = sum(bytes_of(held).values()) + sum(bytes_of_metrics(blocks).values()) + looked
    forwards = forwards_of(model)
    with pytest.raises(
        ValueError, match=r"needs .*, beside .* GB of new weights, and there are .* raise `max_memory`"
    ):
        plan_collapse(model, data(), max_memory=enough, **options)
    assert not forwards
    # It is the candidates that there is too little for.
    assert plan_collapse(model, data(), macs=0.1, max_memory=enough + 20_000).point.choices


def test_what_plans_are_timed_beside_counts(monkeypatch):
    """A copy of the model, which may be all that a device has room for."""
    model = llama()
    forwards, copied = forwards_of(model), []
    monkeypatch.setattr(copy, "deepcopy", lambda of: copied.append(of) or deepcopy(of))
    # Far more than sums and fits of so small blocks take.
    model.register_buffer("large", torch.zeros(10**7))
    with pytest.raises(ValueError, match=r"beside a copy of the model.*: that takes 40,\d{3},\d{3} bytes, of 3\d,"):
        plan_collapse(model, data(), latency=0.9, max_memory=4 * 10**7)
    assert not forwards and not copied
    assert plan_collapse(model, data(), macs=0.9, max_memory=4 * 10**7).point.choices


@pytest.mark.parametrize("offloaded", [False, True], ids=["resident", "offloaded"])
def test_blocks_that_are_timed_count(offloaded, monkeypatch):
    """Those of one shape in all their sizes are held at a time, and timed as they would run."""
    model, held, brought = llama(), [], []
    if offloaded:
        cpu_offload(model, torch.device("cpu"))
    how = RANK_SHARES, 1, "native"
    make = shape_times.make_merge

    def made(*args, **options):
        merge = make(*args, **options)
        held.append(merge.bytes)
        brought.extend(weight.is_meta for linear in merge.linears.values() for weight in linear.parameters())
        return merge

    monkeypatch.setattr(shape_times, "make_merge", made)
    shape_times.measure_shapes(model, model, bind_blocks(model), data()[0], *how)
    assert shape_times.bytes_to_time(bind_blocks(model), *how) == Counter({torch.device("cpu"): sum(held)})
    assert set(brought) == {offloaded}


def test_a_plan_of_a_low_rank_block_is_refused_before_its_metric_is_measured():
    model = llama()
    plan = plan_collapse(model, data(), macs=0.3, rank_shares=(1 / 4,))
    forwards = forwards_of(model)
    with pytest.raises(ValueError, match=r"needs .* raise `max_memory`"):
        collapse_model(model, plan=plan, calibration_data=data(), max_memory=20_000)
    assert not forwards


def test_rows_to_measure_on_are_refused_before_they_fill_the_memory():
    read = []

    def evaluation():
        for seed in range(100):
            read.append(seed)
            yield text_inputs(batch=8, seed=seed)

    one = sum(bytes_of(data()[:1]).values())
    message = r"rows to measure on take {:,} bytes, of {:,} that there are.* raise `max_memory`"
    with pytest.raises(ValueError, match=message.format(4 * one, 4 * one - 1)):
        linearity_map(llama(), data(), evaluation_data=evaluation(), max_memory=4 * one - 1)
    assert len(read) == 4
    held = sum(bytes_of(hold_back(data())[1]).values())
    with pytest.raises(ValueError, match="rows to measure on take"):
        linearity_map(llama(), data(), max_memory=held - 1)


def test_the_root_of_the_metric_counts():
    """Where blocks are narrow inside it takes more than choosing."""
    widths = {"hidden_size": 304, "intermediate_size": 320}
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, num_attention_heads=2, vocab_size=64, **widths)).eval()
    blocks, (_, held) = bind_blocks(model), hold_back(data())
    enough = sum((bytes_of(held) + bytes_of_metrics(blocks)).values()) + bytes_of_sums(blocks[0], 320, False)
    root = 7 * 8 * 304 * 304
    assert bytes_to_choose(blocks[0], 320, False) + bytes_in_metric(blocks[0], 320, False) < root
    forwards = forwards_of(model)
    with pytest.raises(ValueError, match="alone needs .* raise `max_memory`"):
        plan_collapse(model, data(), macs=0.5, rank_shares=(0.0,), max_memory=enough + root - 1)
    assert not forwards
    assert bytes_to_fit(blocks[0], 0, True, True) >= root


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_neurons_of_many_tokens_are_worked_on_in_parts(device):
    tokens = tokens_at_a_time(torch.device(device), 14_336)
    assert 1 <= tokens and 6 * 8 * tokens * 14_336 < 2**27
    assert tokens_at_a_time(torch.device(device), 2**30) == 1


def test_control_groups(tmp_path):
    def group(path, most, used, cache, version=2):
        names = {
            2: ("max", "current", "inactive_file"),
            1: ("limit_in_bytes", "usage_in_bytes", "total_inactive_file"),
        }
        limit, current, line = names[version]
        path.mkdir(parents=True, exist_ok=True)
        (path / f"memory.{limit}").write_text(f"{most}\n")
        (path / f"memory.{current}").write_text(f"{used}\n")
        (path / "memory.stat").write_text(f"anon 7\n{line} {cache}\n")

    own = tmp_path / "own"
    assert left_by_control_groups(tmp_path, own) == []
    # A job of Slurm: the limit is that of a group above.
    own.write_text("0::/system.slice/job_1/step_0\n")
    assert left_by_control_groups(tmp_path, own) == []
    group(tmp_path / "system.slice" / "job_1" / "step_0", "max", 900, 0)
    group(tmp_path / "system.slice" / "job_1", 1000, 900, 300)
    assert left_by_control_groups(tmp_path, own) == [400]
    # In a container the group itself is the root.
    group(tmp_path, 500, 600, 50)
    assert left_by_control_groups(tmp_path, own) == [400, 0]
    own.write_text("12:cpu,cpuacct:/docker/a\n4:memory:/docker/a\n1:name=systemd:/docker/a\n")
    assert left_by_control_groups(tmp_path, own) == []
    group(tmp_path / "memory", 800, 300, 100, version=1)
    assert left_by_control_groups(tmp_path, own) == [600]
    # gVisor says nothing of the cache, and of a group that went away nothing is left to read.
    (tmp_path / "memory" / "memory.stat").unlink()
    assert left_by_control_groups(tmp_path, own) == [500]
    (tmp_path / "memory" / "memory.usage_in_bytes").unlink()
    assert left_by_control_groups(tmp_path, own) == []


def test_new_weights_count_where_they_lie():
    """On another device than the first block's there may be more room."""
    model = llama(layers=2)
    first, second = bind_blocks(model)
    model.model.layers[1].mlp.to("meta")
    engine = Calibration.on(model, model, data(), max_memory={"cpu": 10_000})
    whole = {"parameters": 0, "macs": first.macs + second.macs}
    options = PlanOptions({"macs": 0.5}, False, (0.0,), 1, "native", (), None, False)
    search = Search(engine, [first, second], whole, [], None, options)
    counts = {first: 2, second: 40}
    sizes = {block.name: possible_sizes(block, (0.0,), 1, "native").at(0, counts[block]) for block in counts}
    candidates = [Candidate("planned", sizes)] * 3
    # 384 bytes here, 7,680 there.
    assert len(search._next_of(candidates)) == 3
    search.engine.memory.hold(9_000)
    assert len(search._next_of(candidates)) == 1


@pytest.mark.parametrize("sequential", [False, True])
def test_new_weights_of_offloaded_blocks_count_in_the_memory_of_the_host(sequential):
    model = cpu_offload(llama(), torch.device("meta"))
    blocks, accelerator = bind_blocks(model), torch.device("meta")
    new = sum(4 * parameters_of(block, 0, 40, "native") for block in blocks)
    choices = {block.name: BlockChoice(0, 40) for block in blocks}

    def refuse(most, held=0):
        engine = Calibration.on(model, model, data(), max_memory=most)
        engine.memory.hold(held, accelerator)
        fitting = BlockFitting(engine, choices)
        if sequential:
            fitting.refuse_too_little_in_turn(blocks, blocks)
        else:
            engine.refuse_too_little(blocks, *fitting._taken(blocks))

    refuse({"cpu": new})
    with pytest.raises(
        ValueError,
        match=r"needs .* for its new weights, which are kept where offloaded ones lie, beside .* GB of new weights, "
        r"and there are .* GB on cpu.*: raise `max_memory`, or take fewer blocks",
    ):
        refuse({"cpu": new - 1})
    # What there is of the host's memory is no help for sums; nor are the new weights in their way.
    with pytest.raises(
        ValueError,
        match=r"alone needs .* GB for its sums .* on meta \(.* are held.*\): raise `max_memory`, or offload more of",
    ):
        refuse({"cpu": new}, held=2**60)
    # One number is for both.
    with pytest.raises(ValueError, match=r"for its sums .* beside .* raise `max_memory`, or take fewer blocks"):
        refuse(new)


def test_a_copy_of_an_offloaded_model_counts_where_its_weights_lie(tmp_path):
    expected = sum(parameter.numel() * 4 for parameter in llama().parameters())
    buffers = sum(buffer.numel() * buffer.element_size() for buffer in llama().buffers())
    options = PlanOptions({"latency": 0.5}, False, (0.0,), 1, "native", (), None, False)
    models = {
        0: disk_offload(llama(), str(tmp_path), execution_device=torch.device("cpu")),
        expected: cpu_offload(llama(), torch.device("cpu")),
    }
    for count, model in models.items():
        search = Search(Calibration.on(model, model, data()), [], {"macs": 0}, [], None, options)
        assert search.bytes_of_model() == Counter({torch.device("cpu"): count + buffers})


def test_moments_are_let_go_before_the_next_are_measured():
    """Of groups of one block, the sums of one are held at a time."""
    model = llama()
    blocks = bind_blocks(model)
    held = []

    def work(block, moments):
        held.append(moments.cov_ff.data_ptr())
        return float(moments.cov_ff.trace())

    room = bytes_of_sums(blocks[0], 48) + 1
    engine = Calibration.on(model, model, data(), max_memory=room)
    found = engine.reduce(blocks, {block.name: None for block in blocks}, work)
    expected = Calibration.on(model, model, data()).moments(blocks, {b.name: list(range(48)) for b in blocks})
    assert found == pytest.approx({name: float(moments.cov_ff.trace()) for name, moments in expected.items()})


@pytest.mark.parametrize("what", ["collapse", "plan", "divergence", "perplexity"])
def test_outputs_of_one_batch_are_held(what):
    """Logits of a large vocabulary are more than a block's sums: two are there where two are compared, and none of the
    batch before."""
    model, outputs, held = llama(), [], []

    def count(module, args, output):
        outputs.append(weakref.ref(output.untyped_storage()))
        held.append(sum(storage() is not None for storage in outputs))

    model.lm_head.register_forward_hook(count)
    if what == "collapse":
        collapse_model(model, None, data())
    elif what == "plan":
        plan_collapse(model, data(), macs=0.8)
    else:
        comparison._scored({"dense": model, "other": copy.deepcopy(model), "third": model}, data()[:4], what)
    assert max(held) == (1 if what == "perplexity" else 2)


def test_outputs_are_looked_at_in_parts(monkeypatch):
    monkeypatch.setattr(functional, "OUTPUTS", 7)
    torch.manual_seed(0)
    one, other = torch.randn(5, 4), torch.randn(5, 4)
    assert functional.largest_difference(one, other.T.contiguous().T) == float((one - other).abs().max())
    assert functional.largest_difference(one.T, other.T) == float((one - other).abs().max())
    assert functional.is_finite(one)
    for value in (float("nan"), float("inf")):
        other[4, 3] = value
        assert not functional.is_finite(other) and not math.isfinite(functional.largest_difference(one, other))


def test_large_rows_are_fewer_in_a_sample(monkeypatch):
    """64 images of 12 MB would be held beside what the budget counts."""
    model, seen = llama(), []
    engine = Calibration.on(model, model, data())
    monkeypatch.setattr(calibration, "RANGE_BYTES", 3 * max(engine.rows.sizes.values()))
    model.register_forward_pre_hook(lambda _, args, given: seen.append(len(given["input_ids"])), with_kwargs=True)
    engine.moments(bind_blocks(model))
    assert seen == [3, *[8] * 12]


def test_every_neuron_is_a_candidate():
    """Neurons with the largest variance that cancel each other are no reason to pass over those that do something."""
    case = BY_NAME["bert"]
    model = case.model()
    block = bind_blocks(model)[0]
    with torch.no_grad():
        # Twelve neurons of large variance in six pairs that give nothing, two of a small one that give all there is.
        block.up.weight[:14] *= 3
        block.up.weight[1:12:2] = block.up.weight[:12:2]
        block.up.bias[1:12:2] = block.up.bias[:12:2]
        block.down.weight.mul_(0)
        block.down.weight[:, :12:2] = 5.0 * torch.randn(16, 6)
        block.down.weight[:, 1:12:2] = -block.down.weight[:, :12:2]
        block.down.weight[:, 12:14] = 0.3 * torch.randn(16, 2)
    batches = [case.inputs(seed=seed) for seed in range(30)]
    report = collapse_model(model, LayerCollapseConfig(blocks=[0], rank=0, keep_neurons=2), batches)
    assert report.blocks[0].r2 > 0.99


def test_logits_are_those_of_the_model_as_it_is():
    case = BY_NAME["gpt2"]
    model, batches = case.model(), [case.inputs(seed=seed) for seed in range(20)]
    dense = case.model()
    report = collapse_model(model, LayerCollapseConfig(blocks=[1]), batches)
    largest = max(float((logits(model, b) - logits(dense, b)).abs().max()) for b in batches)
    assert report.largest_logit_difference == pytest.approx(largest, rel=1e-4)


@pytest.mark.parametrize("choice", ["greedy", "variance"])
def test_all_neurons_can_be_kept(choice):
    case = BY_NAME["bert"]
    model, batches = case.model(), [case.inputs(seed=seed) for seed in range(40)]
    report = collapse_model(model, LayerCollapseConfig(blocks=[1], keep_neurons=40, neuron_choice=choice), batches)
    assert report.blocks[0].kept_neurons == 40 and report.blocks[0].r2 > 0.999
