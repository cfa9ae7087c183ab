"""What tests/test_zero.py has two processes do under DeepSpeed, through accelerate and the Trainer, over gloo."""

import os
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[1]))

import pytest  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from accelerate import PartialState  # noqa: E402

import tests.conftest  # noqa: E402, F401  (offline, one thread)
from hf_layercollapse import LayerCollapseConfig, apply_layer_collapse, collapse_model  # noqa: E402
from tests.models import BY_NAME, LAYERS  # noqa: E402
from tests.sharded_run import refused_budget, train_save_collapse  # noqa: E402
from tests.training import model_of, set_alphas, trainer_for, trajectory  # noqa: E402


# name -> options of `trajectory`, of gpt2
TRAJECTORIES = {"plain": {"uneven": True}, "clipping": {"clip": 0.5}}
RUNS = {"float32": ({}, {}), "bfloat16": ({"linear_target": "affine", "alpha_learning_rate": 0.4}, {"bf16": True})}
ZERO_2 = {
    "zero_optimization": {"stage": 2},
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
}


def zero_3(folder):
    """A collapsed model trains and is saved; a patched one is refused."""
    args = {"max_steps": 3}
    model = apply_layer_collapse(model_of(BY_NAME["bert"]), LayerCollapseConfig())
    with pytest.raises(ValueError) as caught:
        trainer_for("bert", folder, config=False, model=model, args=args)
    set_alphas(model, *[1.0] * LAYERS)
    collapse_model(model)
    trainer = trainer_for("bert", folder, config=False, model=model, batch=4, args=args)
    trainer.train()
    trainer.save_model(str(folder / "zero_3"))
    state = trainer.accelerator.get_state_dict(trainer.deepspeed)
    result = {
        "refused": str(caught.value),
        "stage": trainer.accelerator.state.deepspeed_plugin.zero_stage,
        "sharded": all(parameter.ds_id >= 0 for parameter in model.parameters()),
        "losses": [log["loss"] for log in trainer.state.log_history if "loss" in log],
        "state": {name: tensor.clone() for name, tensor in (state or {}).items()},
    }
    trainer.deepspeed.destroy()  # or what it has under way may outlive the process group
    return result


def refused(folder):
    """The messages of what cannot be."""
    messages = [refused_budget(folder, trainer_for)]
    del os.environ["ACCELERATE_CONFIG_DS_FIELDS"]  # or accelerate finds them in two places
    for config, args in (
        ({"optimizer": {"type": "AdamW", "params": {"lr": "auto"}}}, {}),
        ({"fp16": {"enabled": "auto"}}, {"fp16": True}),
    ):
        with pytest.raises(ValueError) as caught:
            trainer_for("bert", folder, args={"deepspeed": {**ZERO_2, **config}, **args})
        messages.append(str(caught.value))
    return messages


def zero_2(folder, rank):
    """Train, resume, collapse, save, train on; and what is refused."""
    results = {
        name: trajectory("gpt2", folder / "scratch", processes=2, **options) for name, options in TRAJECTORIES.items()
    }
    results["accumulated"] = trajectory("gpt2", folder / "scratch", 2, processes=2)
    for name in RUNS:
        results[name] = train_save_collapse(folder, rank, name, *RUNS[name], make=trainer_for)
    results["refused"] = refused(folder)
    return results


def main(stage, folder):
    rank = PartialState(cpu=True, backend="gloo").process_index
    results = zero_2(folder, rank) if stage == "2" else zero_3(folder)
    torch.save(results, folder / f"results_{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
