"""Small training runs for the tests of the Trainer."""

import peft
import torch
import transformers
from packaging.version import Version
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainingArguments
from transformers.integrations.peft import MIN_PEFT_VERSION

from hf_layercollapse import LayerCollapseConfig, LayerCollapseTrainer
from hf_layercollapse.upstream import TRANSFORMERS
from tests.models import BY_NAME


def rows(case, count, seed=0):
    """Single examples with labels. Token labels are partly ignored, by a different share in each row."""
    examples = []
    for i in range(count):
        example = {name: value[0] for name, value in case.inputs(batch=1, seed=1000 * seed + i).items()}
        if case.labels == "tokens":
            example["labels"] = example["input_ids"].clone()
            # The first label is no target, yet the Trainer counts it for GPT-2, whose class name tells no loss type.
            example["labels"][: 1 + i % 4] = -100
        else:
            example["labels"] = torch.tensor((i * 7 + seed) % 3)
        examples.append(example)
    return examples


def checkpointing(enabled=True, **options):
    """Training arguments that compute activations again in backward, or do not."""
    name = "activation_checkpointing" if TRANSFORMERS >= (5, 23) else "gradient_checkpointing"
    return {name: enabled, f"{name}_kwargs": options or None}


NEWER_PEFT = f"transformers {transformers.__version__} wants a newer peft than {peft.__version__}"


def adapters_of_transformers():
    """Whether `add_adapter` of transformers takes the peft that is here: 5.24 wants 0.22."""
    return Version(peft.__version__) >= Version(MIN_PEFT_VERSION)


def enable_checkpointing(model, **options):
    """As the Trainer does with [`checkpointing`]."""
    if TRANSFORMERS >= (5, 23):
        model.activation_checkpointing_enable(options)
    else:
        model.gradient_checkpointing_enable(options)


def model_of(case, seed=0, dropout=False, **kwargs):
    config = case.config()
    for name, value in vars(config).items():
        if "drop" in name and isinstance(value, float) and not dropout:
            setattr(config, name, 0.0)
    return case.model(seed, config=config, **kwargs)


def trainer_for(
    case,
    output_dir,
    config=None,
    model=None,
    trainer_class=LayerCollapseTrainer,
    train=None,
    evaluate=None,
    batch=8,
    accumulate=1,
    dropout=False,
    args=None,
    **kwargs,
):
    """A trainer of one of the test models; `config` may be a dict of options, or `False` for none.

    `args` are training arguments, `kwargs` go to the trainer.
    """
    case = BY_NAME[case] if isinstance(case, str) else case
    if isinstance(config, dict) or config is None:
        config = LayerCollapseConfig(**(config or {}))
    if config:
        kwargs["layer_collapse_config"] = config
    if model is None and "model_init" not in kwargs:
        model = model_of(case, dropout=dropout)
    options = {
        "max_steps": 1,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "use_cpu": True,
        "log_level": "error",
        **(args or {}),
    }
    return trainer_class(
        model=model,
        args=TrainingArguments(
            str(output_dir),
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulate,
            **options,
        ),
        train_dataset=rows(case, 32) if train is None else train,
        eval_dataset=rows(case, 12, seed=1) if evaluate is None else evaluate,
        **kwargs,
    )


def alphas_of(model):
    return {name: value.detach().clone() for name, value in model.named_parameters() if name.endswith(".alpha")}


def set_alphas(model, *values):
    with torch.no_grad():
        parameters = (parameter for name, parameter in model.named_parameters() if name.endswith(".alpha"))
        for parameter, value in zip(parameters, values, strict=True):
            parameter.fill_(value)


def state_of(model):
    """A copy; of a sharded model, whole."""
    state = model.state_dict()
    return {n: (v.full_tensor() if isinstance(v, DTensor) else v).clone() for n, v in state.items()}


def assert_same(left, right):
    """Equal bit for bit."""
    assert left.keys() == right.keys()
    different = [name for name in left if not torch.equal(left[name], right[name])]
    assert not different


class Gradients(TrainerCallback):
    """Keeps the gradients that each optimizer step is about to use."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append(
            {
                name: parameter.grad.clone()
                for name, parameter in model.named_parameters()
                if parameter.grad is not None
            }
        )


class RandomStates(TrainerCallback):
    """Keeps the state of the random numbers that each step begins with."""

    def __init__(self):
        self.states = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.states.append(torch.get_rng_state())


class SetAlphas(TrainerCallback):
    """Sets alphas after each step, as scheduled: a tuple per step."""

    def __init__(self, schedule):
        self.schedule = schedule

    def on_step_end(self, args, state, control, model=None, **kwargs):
        set_alphas(model, *self.schedule[state.global_step - 1])


class OwnLoss(LayerCollapseTrainer):
    """A `compute_loss` without `super()`, the pattern of transformers' docs for a loss of one's own: a mean."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = nn.functional.cross_entropy(outputs["logits"], labels)
        return (loss, outputs) if return_outputs else loss


def zero_loss(outputs, labels, num_items_in_batch=None):
    """No task gradient at all."""
    return outputs["logits"].sum() * 0.0


def counted_cross_entropy(outputs, labels, num_items_in_batch=None):
    """Cross entropy as `compute_loss_func` must give it: a sum over the whole accumulated batch's count."""
    logits = outputs["logits"]
    if labels.dim() == 2:
        logits, labels = logits[:, :-1], labels[:, 1:]
    total = nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="sum")
    return total / (num_items_in_batch if num_items_in_batch is not None else (labels != -100).sum())


STEPS = 20


def trajectory(
    case,
    folder,
    accumulate=1,
    processes=1,
    *,
    smoothing=0.0,
    clip=0.0,
    loss_function=None,
    uneven=False,
    distilled=False,
    **kwargs,
):
    """Losses, norms and alphas of twenty steps of batches of eight, and the weights that they lead to.

    SGD, since Adam blows rounding up where gradients are near 0; rows in their order, since how they are shuffled
    depends on the number of processes. `uneven` gives the parts of a batch different counts of labels; `distilled`
    adds a teacher with other weights.
    """
    case = BY_NAME[case]
    train = rows(case, 32)
    if uneven:
        train = [row for i in range(0, 32, 8) for row in sorted(train[i : i + 8], key=_count_labels)]
    config = {"alpha_learning_rate": 0.03, "penalty_strength": 0.5, "penalty_schedule": "linear"}
    if distilled:
        config |= {"distillation_weight": 0.5, "hidden_state_weight": 0.1}
        kwargs["teacher"] = model_of(case, seed=5)
    trainer = trainer_for(
        case,
        folder,
        config=config,
        batch=8 // accumulate // processes,
        accumulate=accumulate,
        train=train,
        compute_loss_func=loss_function,
        args={
            "max_steps": STEPS,
            "optim": "sgd",
            "learning_rate": 0.02,
            "weight_decay": 0.01,
            "lr_scheduler_type": "linear",
            "label_smoothing_factor": smoothing,
            "max_grad_norm": clip,
            "train_sampling_strategy": "sequential",
            "average_tokens_across_devices": kwargs.pop("average_tokens", True),
        },
        **kwargs,
    )
    assert trainer.args.world_size == processes
    trainer.train()
    logs = trainer.state.log_history[:STEPS]
    losses = {name: torch.tensor([log[name] for log in logs]) for name in ("loss", "grad_norm")}
    alphas = torch.tensor([[log[f"layer_collapse/alpha/{i}"] for i in range(3)] for log in logs])
    return {**losses, "alphas": alphas, **state_of(trainer.model)}


def _count_labels(row):
    return int((row["labels"] != -100).sum())


def assert_close(found, expected):
    """Of two trajectories."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
