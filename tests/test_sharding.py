"""What is done about sharding in one process; on two: test_sharded.py, test_zero.py."""

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from accelerate.utils import DeepSpeedPlugin, FullyShardedDataParallelPlugin
from torch import nn

from hf_layercollapse import LayerCollapseConfig, apply_layer_collapse
from hf_layercollapse.optimization import AlphaSteps, AlphaStepsApart
from hf_layercollapse.patching import collapsible_activations
from hf_layercollapse.sharding import (
    first_process_first,
    leave_out_of_sharding,
    refuse_deepspeed_setup,
    refuse_fsdp_setup,
)
from tests.models import BY_NAME
from tests.training import model_of


CONFIG = LayerCollapseConfig(alpha_learning_rate=0.5)


@pytest.mark.parametrize(
    ("options", "more", "message"),
    [
        ({"fsdp_version": 1}, {}, "Use FSDP2: `fsdp_version: 2`"),
        ({"fsdp_version": 2, "cpu_ram_efficient_loading": True}, {}, "fsdp_cpu_ram_efficient_loading: false"),
        ({"fsdp_version": 2}, {"compiles": True}, "without adapters and `torch.compile`"),
        ({"fsdp_version": 2}, {"mixed_precision": "fp16"}, "Use bf16"),
        ({"fsdp_version": 2}, {"mixed_precision": "bf16"}, None),
    ],
)
def test_fsdp_setups(options, more, message, monkeypatch):
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "false")  # the plugin sets it
    model = apply_layer_collapse(model_of(BY_NAME["bert"]))
    plugin = FullyShardedDataParallelPlugin(**options)
    if message is None:
        return refuse_fsdp_setup(plugin, model, **more)
    with pytest.raises(ValueError, match=message):
        refuse_fsdp_setup(plugin, model, **more)


@pytest.mark.parametrize(
    ("stage", "config", "message"),
    [
        (3, {}, "Use FSDP2"),
        (2, {"optimizer": {"type": "AdamW"}}, 'Leave `"optimizer"` out'),
        (2, {"fp16": {"enabled": True}}, "Use bf16"),
        (2, {"fp16": {"enabled": False}, "bf16": {"enabled": True}}, None),
        (1, {}, None),
    ],
)
def test_deepspeed_setups(stage, config, message):
    plugin = DeepSpeedPlugin(zero_stage=stage)
    plugin.deepspeed_config.update(config)
    if message is None:
        return refuse_deepspeed_setup(plugin)
    with pytest.raises(ValueError, match=message):
        refuse_deepspeed_setup(plugin)


@pytest.mark.parametrize("before", [None, r"bert\.embeddings", "modules"])
def test_what_was_ignored_before_still_is(before):
    model = apply_layer_collapse(model_of(BY_NAME["bert"]))
    ours = set(collapsible_activations(model).values())
    theirs = {model.bert.embeddings}
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    plugin.ignored_modules = list(theirs | {next(iter(ours))}) if before == "modules" else before
    leave_out_of_sharding(plugin, model, torch.device("cpu"))
    assert set(plugin.ignored_modules) == ours | (theirs if before else set())
    assert len(plugin.ignored_modules) == len(ours) + bool(before)


def parameters():
    alpha, weight = nn.Parameter(torch.tensor([0.5])), nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([{"params": [weight]}, {"params": [alpha], "lr": 3.0}], lr=0.1)
    return alpha, weight, optimizer


@pytest.mark.parametrize("scheduled", [False, True])
def test_a_state_dict_without_alphas(scheduled):
    """Also where it is loaded, which gives the optimizer other groups."""
    alpha, weight, optimizer = parameters()
    steps = AlphaSteps(optimizer, [alpha], CONFIG, lambda: 1.0, scheduled)
    (weight.sum() + alpha.sum()).backward()
    optimizer.step()
    with steps.aside():
        state = copy.deepcopy(optimizer.state_dict())
        assert [[id(p) for p in group["params"]] for group in optimizer.param_groups] == [[id(weight)]]
        before = float(alpha.detach())
        optimizer.step()
        assert float(alpha.detach()) == before
    assert list(state["state"]) == [0]
    other_alpha, other_weight, other = parameters()
    other_steps = AlphaSteps(other, [other_alpha], CONFIG, lambda: 0.0, scheduled)
    count = len(other.param_groups)
    with other_steps.aside():
        other.load_state_dict(state)
    assert len(other.param_groups) == count
    held = [p for group in other.param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(other_alpha), id(other_weight)} and len(held) == 2
    assert int(other.state[other_weight]["step"]) == 1
    other_alpha.grad = torch.tensor([0.2])
    other.step()
    assert float(other_alpha.detach()) == pytest.approx(0.4)


def test_alphas_apart_from_the_optimizer():
    alpha, weight, optimizer = parameters()
    steps = AlphaStepsApart(optimizer, [alpha], CONFIG, lambda: 0.0)
    assert [id(p) for group in optimizer.param_groups for p in group["params"]] == [id(weight)]
    alpha.data = alpha.data.to(torch.bfloat16)
    steps.restore()
    assert alpha.dtype == torch.float32
    (weight.sum() + 0.2 * alpha.sum()).backward()
    optimizer.step()
    assert float(alpha.detach()) == 0.5
    steps.step()
    assert float(alpha.detach()) == pytest.approx(0.4) and alpha.grad is None
    steps.step()
    assert float(alpha.detach()) == pytest.approx(0.4)
    alpha.grad = torch.tensor([float("nan")])
    steps.step()
    assert float(alpha.detach()) == pytest.approx(0.4)


def _out_of_memory_on_one(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for failing in range(2):

        def work(fails=failing == rank):
            if fails:
                raise torch.OutOfMemoryError("no memory")

        with pytest.raises(RuntimeError) as caught:
            first_process_first(work)
        Path(folder, f"{failing} seen by {rank}").write_text(f"{type(caught.value).__name__}: {caught.value}")
    dist.destroy_process_group()


@pytest.mark.distributed
def test_what_one_process_raises_all_raise(tmp_path):
    """Also what is no refusal: the other would wait until the time is out. Two processes take their time to start."""
    torch.multiprocessing.spawn(_out_of_memory_on_one, (str(tmp_path),), nprocs=2)
    for failing, other in ((0, 1), (1, 0)):
        assert (tmp_path / f"{failing} seen by {failing}").read_text() == "OutOfMemoryError: no memory"
        seen = (tmp_path / f"{failing} seen by {other}").read_text()
        assert seen == f"RuntimeError: OutOfMemoryError on process {failing}: no memory"
