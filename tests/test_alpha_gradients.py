"""Code that takes the place of a block's: refused where training arguments ask for it, else found in a step."""

import types

import pytest
import torch
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    NemotronConfig,
    NemotronForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from hf_layercollapse import (
    LayerCollapseCallback,
    LayerCollapseConfig,
    LayerCollapseTrainer,
    apply_layer_collapse,
    collapse_model,
)
from tests.models import BY_NAME, HIDDEN, VOCABULARY, WIDTH, randomize
from tests.training import alphas_of, set_alphas, trainer_for


def decoder(config_class=LlamaConfig, model_class=LlamaForCausalLM):
    torch.manual_seed(0)
    config = config_class(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    return randomize(model_class(config)).eval()


def patched(model=None):
    return apply_layer_collapse(model or decoder(), LayerCollapseConfig(alpha_learning_rate=0.1))


def collapsed(**options):
    model = decoder()
    data = [BY_NAME["gpt2"].inputs(batch=8)]
    collapse_model(model, LayerCollapseConfig(**options), calibration_data=data)
    return model


def trainer(folder, model, config=False, trainer_class=LayerCollapseTrainer, args=None, **kwargs):
    return trainer_for(
        "gpt2", folder, config=config, model=model, trainer_class=trainer_class, args=args, batch=4, **kwargs
    )


# ---- Liger, which the arguments ask for ----


@pytest.mark.parametrize(
    "model, config",
    [
        (patched, False),
        (decoder, {}),
        (decoder, {"blocks": "last:1"}),
        (decoder, {"budget": "macs=0.5"}),
        (collapsed, False),
        (lambda: collapsed(keep_neurons=9), False),
    ],
    ids=["patched", "dense", "last", "budget", "collapsed", "neurons"],
)
def test_liger_in_the_place_of_blocks_is_refused(model, config, tmp_path):
    liger = {"use_liger_kernel": True}
    with pytest.raises(ValueError, match=r"model.layers.1.mlp.*'geglu': False, 'swiglu': False"):
        trainer(tmp_path, model(), config, args=liger)
    with pytest.raises(ValueError, match=r"{'rope': False, 'swiglu': False, 'geglu': False}.*its other kernels stay"):
        trainer(tmp_path, model(), config, args={**liger, "liger_kernel_config": {"rope": False, "swiglu": False}})
    trainer(tmp_path, model(), config, args={**liger, "liger_kernel_config": {"geglu": False, "swiglu": False}})


def test_liger_where_it_takes_no_place_is_not(tmp_path):
    """Native modules, narrower, and models that it has no such kernel for."""
    liger = {"use_liger_kernel": True}
    trainer(tmp_path, collapsed(rank=0, keep_neurons=9), args=liger)
    trainer(tmp_path, decoder(), args=liger)
    trainer_for("bert", tmp_path, args=liger)


def test_liger_in_the_place_of_an_activation_is_refused(tmp_path):
    model = patched(decoder(NemotronConfig, NemotronForCausalLM))
    with pytest.raises(ValueError, match="'relu_squared': False"):
        trainer(tmp_path, model, args={"use_liger_kernel": True})
    trainer(tmp_path, model, args={"use_liger_kernel": True, "liger_kernel_config": {"relu_squared": False}})


def test_liger_under_the_callback_is_refused(tmp_path):
    args = TrainingArguments(str(tmp_path), use_liger_kernel=True, report_to=[], use_cpu=True)
    for model, config in ((decoder(), LayerCollapseConfig()), (patched(), None)):
        with pytest.raises(ValueError, match="'swiglu': False"):
            Trainer(model, args, callbacks=[LayerCollapseCallback(config)])


# ---- Whatever puts a forward of its own there ----


class Rebinding(TrainerCallback):
    """Puts a forward that knows the native block only in the place of some."""

    def __init__(self, layers):
        self.layers = layers

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        def forward(self, x):
            return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))

        for layer in self.layers(model):
            layer.mlp.forward = types.MethodType(forward, layer.mlp)


@pytest.mark.parametrize("trainer_class", [LayerCollapseTrainer, Trainer])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_block_that_runs_without_its_activation_raises(accumulate, trainer_class, tmp_path):
    model = patched()
    ours = [] if trainer_class is LayerCollapseTrainer else [LayerCollapseCallback()]
    callbacks = [*ours, Rebinding(lambda model: model.model.layers[1:])]
    made = trainer(
        tmp_path, model, trainer_class=trainer_class, callbacks=callbacks, accumulate=accumulate, args={"max_steps": 3}
    )
    with pytest.raises(RuntimeError, match=r"The code of \['model.layers.1.mlp'\] ran without the activation"):
        made.train()
    assert all(float(alpha) == 0 for alpha in alphas_of(model).values())


def test_a_frozen_alpha_is_not_looked_for(tmp_path):
    model = patched()
    model.model.layers[1].mlp.act_fn.alpha.requires_grad_(False)
    trainer(
        tmp_path, model, callbacks=[Rebinding(lambda model: model.model.layers[1:])], args={"max_steps": 2}
    ).train()


def test_linears_that_are_frozen_show_nothing_but_that_no_alpha_is_reached(tmp_path, caplog):
    model = patched()
    model.model.layers.requires_grad_(False)
    for layer in model.model.layers:
        layer.mlp.act_fn.alpha.requires_grad_(True)
    trainer(tmp_path, model, callbacks=[Rebinding(lambda model: model.model.layers)], args={"max_steps": 2}).train()
    assert caplog.text.count("reached no alpha, of 2") == 1


class SomeLayers(LayerCollapseTrainer):
    """A loss that runs the first layer only, and from the third step on the others too."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        hidden_states = model.bert.embeddings(inputs["input_ids"])
        for layer in model.bert.encoder.layer[: 1 if self.state.global_step < 2 else None]:
            hidden_states = layer(hidden_states)
        return hidden_states.square().mean()


def test_blocks_that_a_step_does_not_run_are_driven_by_the_penalty(tmp_path, caplog):
    trainer = trainer_for(
        "bert",
        tmp_path,
        config={"alpha_learning_rate": 0.1},
        trainer_class=SomeLayers,
        args={"max_steps": 3, "learning_rate": 0.0},
    )
    trainer.train()
    assert trainer.state.global_step == 3 and "reached no alpha" not in caplog.text
    later = [log["layer_collapse/alpha/1"] for log in trainer.state.log_history[:2]]
    assert later == pytest.approx([0.2, 0.36])


def test_what_is_put_there_between_two_runs_is_found(tmp_path):
    model = patched()
    made = trainer(tmp_path, model)
    made.train()
    set_alphas(model, 0.0, 0.0)
    made.add_callback(Rebinding(lambda model: model.model.layers))
    with pytest.raises(RuntimeError, match="ran without the activation"):
        made.train()
