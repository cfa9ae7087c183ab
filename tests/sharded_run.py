"""What tests/test_sharded.py has two processes do under FSDP2, through accelerate and the Trainer, over gloo.

accelerate has no FSDP on a CPU: it would run DDP, without a word. So its state is told that these processes are some
that it shards for. From there on everything is its own, and the results say what was sharded.
"""

import contextlib
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[1]))

import pytest  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from accelerate import PartialState  # noqa: E402
from accelerate.utils import DistributedType  # noqa: E402
from huggingface_hub.errors import OfflineModeIsEnabled  # noqa: E402
from transformers import Trainer  # noqa: E402

import tests.conftest  # noqa: E402, F401  (offline, one thread)
from hf_layercollapse import (  # noqa: E402
    LayerCollapseCallback,
    LayerCollapseConfig,
    LayerCollapseTrainerMixin,
    apply_layer_collapse,
    find_feed_forward_blocks,
)
from tests.models import BY_NAME  # noqa: E402
from tests.training import assert_same, model_of, state_of, trainer_for, trajectory  # noqa: E402


# name -> options of `trajectory`, of gpt2
TRAJECTORIES = {"plain": {"uneven": True}, "clipping": {"clip": 0.5}}
# transformers names BertEmbeddings among the classes to shard, and accelerate 1.15 then shards what is in it twice.
FSDP = {"version": 2, "transformer_layer_cls_to_wrap": ["BertLayer"]}
# name -> (config, training arguments), of bert
RUNS = {
    "full": ({}, {"fsdp": True, "fsdp_config": {**FSDP, "state_dict_type": "FULL_STATE_DICT"}}),
    "sharded": (
        {"linear_target": "affine", "granularity": "neuron"},
        {"fsdp": True, "fsdp_config": {**FSDP, "state_dict_type": "SHARDED_STATE_DICT"}, "bf16": True},
    ),
}


class ShardsOnCPU:
    def create_accelerator_and_postprocess(self):
        PartialState().distributed_type = DistributedType.MULTI_GPU
        super().create_accelerator_and_postprocess()


class WithCards(Trainer):
    """Writes a card with each checkpoint, as trl's trainers do."""

    def _save_checkpoint(self, model, trial):
        self.create_model_card(model_name="in training")
        super()._save_checkpoint(model, trial)


class Sharding(ShardsOnCPU, LayerCollapseTrainerMixin, WithCards):
    pass


class PlainSharding(ShardsOnCPU, Trainer):
    pass


def sharding(*args, **kwargs):
    return trainer_for(*args, trainer_class=Sharding, **kwargs)


def kinds_of(model):
    """What the parameters are: (whether an alpha, class, dtype) in order."""
    kinds = {(n.endswith(".alpha"), type(p.data).__name__, str(p.dtype)) for n, p in model.named_parameters()}
    return sorted(kinds)


def card_in(folder):
    dist.barrier()
    return (folder / "README.md").read_text()


def card_of(trainer):
    trainer.create_model_card(model_name="bert")
    return card_in(Path(trainer.args.output_dir))


def push(trainer, folder):
    """As far as to the Hub, which is out of reach: what would go there is in the folder."""
    before, trainer.args.output_dir, trainer.hub_model_id = trainer.args.output_dir, str(folder), "user/bert"
    # Only the first process uploads.
    with pytest.raises(OfflineModeIsEnabled) if dist.get_rank() == 0 else contextlib.nullcontext():
        trainer.push_to_hub()
    trainer.args.output_dir = before


def train_save_collapse(folder, rank, name, options, more_args, make=sharding):
    """Train with checkpoints, resume, collapse, save, train on."""
    config = {"alpha_learning_rate": 0.2, **options}
    data = [BY_NAME["bert"].inputs(batch=16, seed=i) for i in range(3)]
    args = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "lr_scheduler_type": "linear"}
    args |= more_args
    best = {"eval_strategy": "steps", "eval_steps": 3, "load_best_model_at_end": True}
    run = folder / name

    def trainer(**more):
        needs = {"calibration_data": data} if "linear_target" in config else {}
        return make("bert", run, config=config, batch=4, args={**args, **more}, **needs)

    whole = trainer(**best)
    whole.train()
    resumed = trainer(save_strategy="no")
    resumed.train(resume_from_checkpoint=str(run / "checkpoint-3"))
    result = {
        "distributed_type": resumed.accelerator.distributed_type.value,
        "backend": dist.get_backend(),
        "kinds": kinds_of(resumed.model),
        "wrapped": type(resumed.model_wrapped).__name__,
        "optimizer": type(resumed.optimizer.optimizer).__name__,
        "optimized": sum(p.numel() for group in resumed.optimizer.param_groups for p in group["params"]),
        "whole": state_of(whole.model),
        "resumed": state_of(resumed.model),
        "files": sorted(path.name for path in (run / "checkpoint-3").iterdir()),
        "logs": whole.state.log_history,
        "metrics": resumed.evaluate(),
    }
    with pytest.raises((ValueError, RuntimeError), match="holds a model that is patched|alpha"):
        dense = make("bert", run, config=False, batch=4, args={**args, "save_strategy": "no"})
        dense.train(resume_from_checkpoint=str(run / "checkpoint-3"))
    if make is sharding:
        result["cards"] = {"in training": card_in(run), "dense": card_of(dense), "patched": card_of(resumed)}
        result["predictions"] = torch.from_numpy(resumed.predict(resumed.eval_dataset).predictions)
        push(resumed, folder / f"{name}_pushed")
    resumed.save_model(str(folder / f"{name}_patched"))
    # Refused: nothing is gathered, and all say so. Their data differ, so only some would have.
    data = [BY_NAME["bert"].inputs(batch=16, seed=10 * rank + i) for i in range(3)]
    with pytest.raises(ValueError, match="is above max_error"):
        resumed.collapse(data, max_error=0.0 if rank == 0 else None)
    assert kinds_of(resumed.model) == result["kinds"]
    result["report"] = resumed.collapse(data).to_dict()
    result["metrics_collapsed"] = resumed.evaluate()
    result["collapsed"] = state_of(resumed.model)
    result["kinds_collapsed"] = kinds_of(resumed.model)
    resumed.save_model(str(folder / f"{name}_collapsed_by_{rank}"))
    resumed.train()
    result["kinds_healed"] = kinds_of(resumed.model)
    if make is sharding:
        result["cards"]["healed"] = card_of(resumed)
    result["healed"] = state_of(resumed.model)
    return result


def refused_budget(folder, make, args=None):
    """The message; the model is as it was."""
    model = model_of(BY_NAME["bert"])
    before, kind = state_of(model), type(model)
    with pytest.raises(ValueError) as caught:
        make("bert", folder, config={"budget": "macs=0.3"}, model=model, args=args)
    assert_same(state_of(model), before)
    assert type(model) is kind and {block.state for block in find_feed_forward_blocks(model)} == {"dense"}
    return str(caught.value)


def refused(folder):
    """The messages of what cannot be."""
    from peft import LoraConfig, get_peft_model

    messages = []
    for config, args in (
        ({"version": 1, "sync_module_states": False}, {}),
        ({**FSDP, "cpu_ram_efficient_loading": True}, {}),
        (FSDP, {"torch_compile": True}),
    ):
        with pytest.raises(ValueError) as caught:
            sharding("bert", folder, args={"fsdp": True, "fsdp_config": config, **args})
        messages.append(str(caught.value))
    options = {
        "args": {"fsdp": True, "fsdp_config": FSDP},
        "callbacks": [LayerCollapseCallback(LayerCollapseConfig())],
    }
    with pytest.raises(ValueError) as caught:
        trainer_for("bert", folder, config=False, trainer_class=PlainSharding, **options).train()
    messages.append(str(caught.value))
    for config in ({"progressive": True}, {"distillation_weight": 1.0}):
        with pytest.raises(ValueError) as caught:
            sharding("bert", folder, config=config, args=options["args"])
        messages.append(str(caught.value))
    model = apply_layer_collapse(model_of(BY_NAME["bert"]), LayerCollapseConfig())
    model = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", target_modules=["query"]))
    with pytest.raises(ValueError) as caught:
        sharding("bert", folder, config=False, model=model, args=options["args"])
    return [*messages, str(caught.value), refused_budget(folder, sharding, options["args"])]


def main(folder):
    rank = PartialState(cpu=True, backend="gloo").process_index
    results = {
        name: trajectory("gpt2", folder / "scratch", processes=2, trainer_class=Sharding, **options)
        for name, options in TRAJECTORIES.items()
    }
    results["accumulated"] = trajectory("gpt2", folder / "scratch", 2, processes=2, trainer_class=Sharding)
    for name in RUNS:
        results[name] = train_save_collapse(folder, rank, name, *RUNS[name])
    results["refused"] = refused(folder)
    torch.save(results, folder / f"results_{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
