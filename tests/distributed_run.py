"""What tests/test_distributed.py has two processes do, in one launch.

Everything that is to be checked is left in the folder that is given, by each process in a file of its own.
"""

import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[1]))

import pytest  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict  # noqa: E402
from torch.distributed.fsdp import fully_shard  # noqa: E402
from transformers import Trainer  # noqa: E402

import tests.conftest  # noqa: E402, F401  (offline, one thread)
from hf_layercollapse import (  # noqa: E402
    LayerCollapseCallback,
    LayerCollapseConfig,
    LayerCollapseTrainer,
    apply_layer_collapse,
    collapse_model,
)
from hf_layercollapse.optimization import AlphaSteps, penalty_strength_at, replicate_alphas  # noqa: E402
from hf_layercollapse.patching import alpha_parameters, penalty  # noqa: E402
from hf_layercollapse.upstream import TRANSFORMERS  # noqa: E402
from tests.models import BY_NAME  # noqa: E402
from tests.test_progressive import ARGS, PROGRESSIVE, SCHEDULE, Watch  # noqa: E402
from tests.training import (
    OwnLoss,
    SetAlphas,
    alphas_of,
    counted_cross_entropy,
    model_of,
    rows,
    state_of,
    trainer_for,
    trajectory,
)  # noqa: E402


# name -> (case, options of `trajectory`)
TRAJECTORIES = {
    "classification": ("bert", {}),
    "causal": ("gpt2", {"uneven": True}),
    "causal, tokens not averaged": ("gpt2", {"average_tokens": False}),
    "image": ("vit", {}),
    "classification, smoothing, clipping": ("bert", {"smoothing": 0.1, "clip": 0.5}),
    "causal, smoothing, clipping": ("gpt2", {"smoothing": 0.1, "clip": 0.5, "uneven": True}),
    "image, smoothing, clipping": ("vit", {"smoothing": 0.1, "clip": 0.5}),
    "classification, distilled": ("bert", {"distilled": True}),
    "causal, distilled": ("gpt2", {"distilled": True, "uneven": True}),
    "causal, own loss, distilled": (
        "gpt2",
        {"loss_function": counted_cross_entropy, "distilled": True, "average_tokens": False},
    ),
    "classification, own compute_loss": ("bert", {"trainer_class": OwnLoss}),
    "causal, own loss": ("gpt2", {"loss_function": counted_cross_entropy, "uneven": True}),
}
# Before 5.18 transformers cannot read an optimizer's state on a CPU where there are several processes.
RESUMES = TRANSFORMERS >= (5, 18)
RUN = {"alpha_learning_rate": 0.2, "penalty_strength": 1.0}
RUN_ARGS = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "lr_scheduler_type": "linear"}


class CountedTwice(LayerCollapseTrainer):
    """The mistake that the trajectories are there to find: the penalty multiplied by the number of processes, as it
    is if it joins the loss before that is multiplied."""

    def compute_loss(self, *args, **kwargs):
        strength = penalty_strength_at(self.layer_collapse_config, self.state.global_step, self.state.max_steps)
        again = (self.args.world_size - 1) * strength * penalty(self._blocks.trainable_alphas())
        return super().compute_loss(*args, **kwargs) + again


def train_save_collapse(folder, rank):
    """Train with a checkpoint, resume it, collapse, save."""
    whole = trainer_for("bert", folder / "run", config=RUN, batch=4, args=RUN_ARGS)
    whole.train()
    resumed = trainer_for("bert", folder / "run", config=RUN, batch=4, args={**RUN_ARGS, "save_strategy": "no"})
    resumed.train(resume_from_checkpoint=str(folder / "run" / "checkpoint-3") if RESUMES else None)
    result = {
        "distributed_type": str(whole.accelerator.distributed_type.value),
        "backend": dist.get_backend(),
        "world_size": whole.args.world_size,
        "wrapped": type(whole.model_wrapped).__name__,
        "whole": state_of(whole.model),
        "resumed": state_of(resumed.model),
        "logs": whole.state.log_history,
        "metrics": resumed.evaluate(),
    }
    # Data that differs between processes must not give them different models.
    data = [BY_NAME["bert"].inputs(batch=16, seed=10 * rank + i) for i in range(3)]
    result["report"] = resumed.collapse(data).to_dict()
    result["metrics_collapsed"] = resumed.evaluate()
    result["collapsed"] = state_of(resumed.model)
    resumed.save_model(str(folder / f"collapsed_by_{rank}"))
    # Training goes on with the collapsed model.
    resumed.train()
    result["healed"] = state_of(resumed.model)
    return result


def full_shard(folder, rank):
    """FSDP2 around a patched model: the plain loop, gathered, collapsed, saved. `None` for one process."""
    case = BY_NAME["bert"]
    config = LayerCollapseConfig(alpha_learning_rate=0.06, penalty_strength=1.0)
    model = apply_layer_collapse(model_of(case), config).train()
    alphas = alpha_parameters(model)
    if rank is not None:
        ignored = set(alphas)
        for layer in model.bert.encoder.layer:
            fully_shard(layer, ignored_params=ignored)
        fully_shard(model, ignored_params=ignored)
        replicate_alphas(alphas)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    steps = AlphaSteps(optimizer, alphas, config, lambda: penalty_strength_at(config, steps.taken, 30))
    data, history = rows(case, 32), []
    for step in range(30):
        batch = data[8 * (step % 4) :][:8]
        batch = batch if rank is None else batch[4 * rank :][:4]
        inputs = {name: torch.stack([row[name] for row in batch]) for name in batch[0]}
        model(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append(torch.cat([alpha.detach().clone() for alpha in alphas]))
    result = {"alphas": torch.stack(history)}
    if rank is None:
        return {**result, "state": state_of(model)}

    result["weight"] = type(model.classifier.weight).__name__
    result["alpha"] = type(alphas[0].data).__name__
    with pytest.raises(TypeError, match="sharded|FSDP"):
        collapse_model(model)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    result["state"] = get_model_state_dict(model, options=options)
    if rank == 0:
        whole = apply_layer_collapse(model_of(case, seed=9), config)
        whole.load_state_dict(result["state"])
        result["report"] = collapse_model(whole).to_dict()
        result["collapsed"] = state_of(whole)
        whole.save_pretrained(folder / "fsdp2")

    # Alphas that were sharded with the rest: said, not guessed. And float32 beside bfloat16 where they are left out.
    half = apply_layer_collapse(model_of(case), config).train()
    for layer in half.bert.encoder.layer:
        fully_shard(layer)
    with pytest.raises(TypeError, match="ignored_params"):
        penalty(alpha_parameters(half))
    half = apply_layer_collapse(model_of(case).to(torch.bfloat16), config).train()
    ignored = set(alpha_parameters(half))
    fully_shard(half, ignored_params=ignored)
    half(**inputs).loss.backward()
    result["half"] = sorted({str(parameter.grad.dtype) for parameter in half.parameters()})
    return result


def with_callback(folder, processes=1):
    """The alphas of a plain Trainer with the callback, batches of eight."""
    config = LayerCollapseConfig(alpha_learning_rate=0.05)
    trainer = trainer_for(
        "gpt2",
        folder,
        config=False,
        trainer_class=Trainer,
        batch=8 // processes,
        callbacks=[LayerCollapseCallback(config)],
        args={"max_steps": 8, "optim": "sgd", "train_sampling_strategy": "sequential"},
    )
    trainer.train()
    return alphas_of(trainer.model)


def progressive(folder, processes=1, accumulate=1, resume=None):
    """Blocks that collapse while training goes on: what it ends with, and what was collapsed after each step."""
    watch = Watch()
    trainer = trainer_for(
        "bert",
        folder,
        config=PROGRESSIVE,
        batch=8 // accumulate // processes,
        accumulate=accumulate,
        callbacks=[SetAlphas(SCHEDULE), watch],
        args={**ARGS, "optim": "sgd", "train_sampling_strategy": "sequential"},
    )
    trainer.train(resume_from_checkpoint=resume)
    return {
        "state": state_of(trainer.model),
        "states": watch.states,
        "rates": watch.rates,
        "collapsed": [log.get("layer_collapse/collapsed_blocks") for log in trainer.state.log_history],
        "report": trainer._progressive.reports[-1].collapsed if trainer._progressive.reports else None,
        "reducer": sum(parameter.numel() for parameter in trainer.model_wrapped.parameters()),
        "wrapped": type(trainer.model_wrapped).__name__,
    }


def budgeted(folder, processes=1, resume=None):
    """A run to a stated size: what it ends with, and the plan, of which there is none in a run that is resumed."""
    trainer = trainer_for(
        "bert",
        folder,
        config={"budget": "macs=0.3", "budget_samples": 24},
        batch=8 // processes,
        args={
            **{"max_steps": 4, "optim": "sgd", "learning_rate": 0.02, "train_sampling_strategy": "sequential"},
            **{"save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "linear"},
        },
    )
    trainer.train(resume_from_checkpoint=resume)
    return {
        "state": state_of(trainer.model),
        "choices": trainer.collapse_plan and trainer.collapse_plan.point.choices,
        "table": trainer.model.config.layer_collapse,
        "rows": resume is None and trainer.collapse().data.distinct,
        "wrapped": type(trainer.model_wrapped).__name__,
    }


def told(folder, processes=1, resume=None):
    """A run in which the penalty comes to a stated size: what it ends with."""
    trainer = trainer_for(
        "bert",
        folder,
        config={
            **{"budget": "macs=0.4", "budget_method": "penalty", "distillation_weight": 0.0},
            **{"granularity": "neuron", "linear_target": "constant"},
        },
        batch=8 // processes,
        calibration_data=[BY_NAME["bert"].inputs(batch=16)],
        args={
            **{"max_steps": 8, "optim": "sgd", "learning_rate": 0.02, "train_sampling_strategy": "sequential"},
            **{"save_strategy": "steps", "save_steps": 2},
        },
    )
    trainer.train(resume_from_checkpoint=resume)
    return {
        "state": state_of(trainer.model),
        "told": [log["layer_collapse/told_neurons"] for log in trainer.state.log_history if "loss" in log],
        "wrapped": type(trainer.model_wrapped).__name__,
    }


def main(folder):
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    results = {
        name: trajectory(case, folder / "scratch", processes=2, **options)
        for name, (case, options) in TRAJECTORIES.items()
    }
    results["counted twice"] = trajectory("gpt2", folder / "scratch", processes=2, trainer_class=CountedTwice)
    results["callback"] = with_callback(folder / "scratch", processes=2)
    results["progressive"] = progressive(folder / "progressive", processes=2)
    results["progressive, accumulated"] = progressive(folder / "scratch" / "progressive", processes=2, accumulate=2)
    for step in (2, 4, 6) if RESUMES else ():
        checkpoint = str(folder / "progressive" / f"checkpoint-{step}")
        results[f"progressive, resumed from {step}"] = progressive(folder / "resumed", processes=2, resume=checkpoint)
    results["budgeted"] = budgeted(folder / "budgeted", processes=2)
    if RESUMES:
        checkpoint = str(folder / "budgeted" / "checkpoint-2")
        results["budgeted, resumed"] = budgeted(folder / "resumed", processes=2, resume=checkpoint)
    results["told"] = told(folder / "told", processes=2)
    if RESUMES:
        checkpoint = str(folder / "told" / "checkpoint-2")
        results["told, resumed"] = told(folder / "resumed", processes=2, resume=checkpoint)
    results["fsdp2"] = full_shard(folder, rank)
    results["run"] = train_save_collapse(folder, rank)
    torch.save(results, folder / f"results_{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
