"""Checkpoints of a patched or collapsed model: written whole or not at all, loaded completely or refused."""

import contextlib
import json
import os
import shutil
from functools import partial
from pathlib import Path

import safetensors.torch
import torch
from accelerate.utils import is_compiled_module
from transformers.modeling_utils import PreTrainedModel
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, sort_checkpoints
from transformers.training_args import ParallelMode
from transformers.utils import CONFIG_NAME, logging

from .collapsing import collapse_as
from .families import find_feed_forward_blocks
from .modeling_layercollapse import CODE_FILE, SAVING_PREFIX, resolve_table
from .models import is_fully_sharded, unwrap
from .patching import carriers_of, collapsible_activations, shorten, tables_of


logger = logging.get_logger(__name__)

# Alphas that train under a PeftModel but not in it, in a checkpoint.
ALPHAS_NAME = "layer_collapse_alphas.safetensors"
# Tables of the models inside a module that has no config of its own, in a checkpoint.
TABLES_NAME = "layer_collapse_tables.json"
# What an adapter in a checkpoint names as its base where that is nowhere but in memory. No folder, and no repository.
BASE_NOT_SAVED = "(patched in memory and not saved)"


class CheckpointsMixin:
    """The part of [`LayerCollapseTrainerMixin`] that writes checkpoints and loads them. No mixin by itself: it uses
    the config, the alphas and the optimizer of the other part.
    """

    # Whether a checkpoint is being written, and the folder that it is written in.
    _writing_checkpoint, _staging = False, None
    _loading_failed = None  # of the best checkpoint

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        # What was interrupted while it was written or deleted is no checkpoint.
        if resume_from_checkpoint is True:
            resume_from_checkpoint = self._last_complete_checkpoint() or True
        elif resume_from_checkpoint and not _is_complete(resume_from_checkpoint):
            raise ValueError(
                f"{resume_from_checkpoint} is no complete checkpoint: it has no readable {TRAINER_STATE_NAME}, which "
                "is written last. Resume from another, or with `resume_from_checkpoint=True` from the last complete "
                "one."
            )
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _last_complete_checkpoint(self):
        folders = sort_checkpoints(self.args.output_dir)[::-1] if os.path.isdir(self.args.output_dir) else []
        for folder in folders:
            if _is_complete(folder):
                return folder
            logger.warning(f"{folder} is not complete and is passed over.")
        return None

    def _save_checkpoint(self, model, trial):
        # Written in a folder beside and moved in when it is whole: what is named checkpoint-... is complete.
        run_folder, step = self._get_output_dir(trial), self.state.global_step
        name = f"{PREFIX_CHECKPOINT_DIR}-{step}"
        staging = os.path.join(run_folder, f"{SAVING_PREFIX}checkpoint")
        if self.is_local_process_zero():
            _remove(staging)  # left by a run that was killed
        self._wait()
        # `_save` serves save_model too, where the user wants the original names.
        self._writing_checkpoint, self._staging = True, staging
        try:
            super()._save_checkpoint(model, trial)
            best = os.path.join(run_folder, f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}")
            if self.state.best_global_step and (self.state.best_global_step == step or os.path.isdir(best)):
                self.state.best_model_checkpoint = best
            if self.args.should_save:
                self.state.save_to_json(os.path.join(staging, name, TRAINER_STATE_NAME))
            self._wait()
            if self.args.should_save:
                _replace_folder(staging, name, run_folder)
            self._wait()
            if self.is_local_process_zero() and os.path.isdir(os.path.join(staging, name)):
                _replace_folder(staging, name, run_folder)  # on a node with a disk of its own
        except (OSError, RuntimeError, safetensors.SafetensorError) as error:
            _remove(staging)
            # `torch.save` has no type of its own for a disk that is full.
            written = "inline_container" in str(error) or "PytorchStreamWriter" in str(error)
            if isinstance(error, RuntimeError) and not written:
                raise
            raise OSError(
                f"The checkpoint of step {step} could not be written to {run_folder}: {error}. Is the disk full, or "
                "the folder not writable? The checkpoints from before are complete; resume with "
                "`resume_from_checkpoint=True`."
            ) from error
        finally:
            self._writing_checkpoint, self._staging = False, None
        if self.args.push_to_hub:
            self._push_from_checkpoint(os.path.join(run_folder, name))
        limit = self.args.save_total_limit
        if self.args.should_save and limit is not None and limit > 0:
            kept = self._kept_checkpoints(run_folder, name)
            surplus = [folder for folder in sort_checkpoints(run_folder, use_mtime=True) if folder not in kept]
            for folder in surplus[: max(0, len(surplus) + len(kept) - limit)]:
                _remove(folder)

    def _kept_checkpoints(self, run_folder, last):
        best = self.state.best_model_checkpoint
        return {str(Path(run_folder, last))} | ({str(Path(best))} if best is not None else set())

    def _get_output_dir(self, trial):
        return super()._get_output_dir(trial) if self._staging is None else self._staging

    def _wait(self):
        if self.args.parallel_mode == ParallelMode.DISTRIBUTED:
            torch.distributed.barrier()

    def _run_epoch(self, *args, **kwargs):
        # Resumed from its last checkpoint, a run that had ended would take one more step.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _finalize_training(self, trial, num_train_samples, start_time):
        # Upstream deletes these in place: a kill in between would leave a part of the last checkpoint.
        best = self.state.best_model_checkpoint
        if self.args.should_save and best is not None and self.args.save_total_limit == 1:
            for folder in sort_checkpoints(self._get_output_dir(trial)):
                if not os.path.samefile(folder, best):
                    _remove(folder)
        return super()._finalize_training(trial, num_train_samples, start_time)

    def save_model(self, output_dir=None, _internal_call=False):
        if self.is_fsdp_enabled:
            whole = not is_fully_sharded(self.model)
            # Where checkpoints are sharded, upstream would save nothing at all. FSDP1 wraps instead.
            ours = self.accelerator.state.fsdp_plugin.fsdp_version == 2 and (whole or not _internal_call)
        else:
            whole = self.model_wrapped is self.model
            # Upstream asks the engine, which is none before training and after a collapse.
            ours = whole and self.is_deepspeed_enabled
        if not ours:
            return super().save_model(output_dir, _internal_call)
        state_dict = None if whole else self.accelerator.get_state_dict(self.model)
        self._save(output_dir, state_dict)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save(self, output_dir=None, state_dict=None):
        # A checkpoint is loaded into the live model as it is, so it must hold live names, not those that
        # `from_pretrained` would convert. It does not name the model: only a save by the user does.
        model = self.model
        inner, holders = unwrap(model, sharded=True)
        if not self._writing_checkpoint:
            return super()._save(output_dir, state_dict)
        if not isinstance(inner, PreTrainedModel):
            return self._save_module(output_dir, state_dict)
        names = inner.name_or_path, inner.config.name_or_path
        if not holders:
            model.save_pretrained = partial(model.save_pretrained, save_original_format=False)
        elif not inner.name_or_path and inner.config.__dict__.get("layer_collapse"):
            # An adapter. Into the live model it goes back all the same.
            inner.name_or_path = inner.config.name_or_path = BASE_NOT_SAVED
        try:
            super()._save(output_dir, state_dict)
        finally:
            if holders:
                forget_base(model, only=BASE_NOT_SAVED)
            else:
                del model.save_pretrained
            inner.name_or_path, inner.config.name_or_path = names
        alphas = self._alphas_beside_adapters()
        if alphas and self.args.should_save:
            tensors = {name: alpha.detach().contiguous() for name, alpha in alphas.items()}
            safetensors.torch.save_file(tensors, os.path.join(output_dir, ALPHAS_NAME))

    def _save_module(self, output_dir, state_dict):
        """Saves a module with transformers models inside, and the tables of these."""
        inner, holders = unwrap(self.model, sharded=True)
        carriers = [carrier for _, carrier in carriers_of(inner)]
        names = [(carrier.name_or_path, carrier.config.name_or_path) for carrier in carriers]
        try:
            super()._save(output_dir, state_dict)
        finally:
            for carrier, (name, in_config) in zip(carriers, names, strict=True):
                carrier.name_or_path, carrier.config.name_or_path = name, in_config
        if carriers and not holders and self.args.should_save:
            with open(os.path.join(output_dir, TABLES_NAME), "w", encoding="utf-8") as file:
                json.dump(self._tables(), file, indent=2, sort_keys=True)

    def _alphas_beside_adapters(self):
        """Name -> alpha, for those that train under a PeftModel that does not save them."""
        if not unwrap(self.model, sharded=True)[1]:
            return {}
        activations = collapsible_activations(self.model).items()
        return {
            name: module.alpha
            for name, module in activations
            if module.alpha.requires_grad and ".modules_to_save." not in name
        }

    def _push_from_checkpoint(self, checkpoint_folder):
        if self._staging is not None:
            return  # once it is in its place
        # Upstream copies the files that it knows; our config.json names one more.
        code = os.path.join(checkpoint_folder, CODE_FILE)
        if self.is_world_process_zero() and os.path.isfile(code):
            shutil.copy(code, os.path.join(self.args.output_dir, CODE_FILE))
        super()._push_from_checkpoint(checkpoint_folder)

    def _save_optimizer_and_scheduler(self, output_dir):
        with self._optimizer_as_sharded():
            super()._save_optimizer_and_scheduler(output_dir)
        if self.is_fsdp_enabled and self.args.should_save and isinstance(self.model, PreTrainedModel):
            # Beside a state dict that is sharded upstream leaves none, and with it no trace of which model it is of.
            self.model.config.save_pretrained(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint):
        with self._optimizer_as_sharded():
            super()._load_optimizer_and_scheduler(checkpoint)

    def _optimizer_as_sharded(self):
        alone = self.is_fsdp_enabled and self._alpha_steps is not None
        return self._alpha_steps.aside() if alone else contextlib.nullcontext()

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        try:
            # Before any weight is changed.
            self._follow(resume_from_checkpoint)
            self._refuse_other_life(resume_from_checkpoint)
            # sentence-transformers' trainers take no model here.
            super()._load_from_checkpoint(resume_from_checkpoint, *([] if model is None else [model]))
            self._load_alphas(resume_from_checkpoint)
        except Exception as error:
            self._loading_failed = error
            raise

    def _load_best_model(self):
        # As above.
        folder = self.state.best_model_checkpoint
        config = self.layer_collapse_config
        stored = self._stored_tables(folder)
        if config is not None and config.progressive and stored not in (None, self._tables()):
            logger.warning(
                f"The best checkpoint, {folder}, holds fewer collapsed blocks than the model does by now, which goes "
                "on as it is. Load that one with `from_pretrained`."
            )
            return
        self._refuse_other_life(folder)
        self._loading_failed = None
        super()._load_best_model()
        if self._loading_failed is not None:
            # sentence-transformers' trainers log it, and end with the last model in place of the best.
            raise self._loading_failed
        self._load_alphas(self.state.best_model_checkpoint)

    def _tables(self):
        return tables_of(unwrap(self.model, sharded=True)[0])

    def _stored_tables(self, folder):
        """What [`tables_of`] gave for the model of a checkpoint; `None` if that does not say, as one of an adapter."""
        inner, holders = unwrap(self.model, sharded=True)
        if holders:
            return None
        if not isinstance(inner, PreTrainedModel):
            return _read_json(os.path.join(folder, TABLES_NAME))
        config = _read_json(os.path.join(folder, CONFIG_NAME))
        if config is None:
            return None
        layer_collapse = config.get("layer_collapse")
        return {"": layer_collapse["modules"]} if layer_collapse else {}

    def _load_alphas(self, folder):
        alphas = self._alphas_beside_adapters()
        if not alphas:
            return
        file = os.path.join(folder, ALPHAS_NAME)
        stored = safetensors.torch.load_file(file) if os.path.isfile(file) else {}
        if stored.keys() != alphas.keys():
            raise ValueError(
                f"The checkpoint {folder} holds {len(stored)} alphas beside its adapter, and the model here trains "
                f"{len(alphas)}. Give the Trainer the model that the checkpoint was made from, patched and with its "
                "alphas trainable as then."
            )
        with torch.no_grad():
            for name, alpha in alphas.items():
                alpha.copy_(stored[name])

    def _follow(self, folder):
        """Collapses the blocks that a checkpoint of this run holds collapsed; its weights come afterwards."""
        config = self.layer_collapse_config
        if config is None or not config.progressive:
            return
        stored, waiting = self._stored_tables(folder) or {}, []
        carriers = dict(carriers_of(unwrap(self.model, sharded=True)[0]))
        patched = [block for block in find_feed_forward_blocks(self.model) if block.state == "patched"]
        patched = {block.path(block.layout.activation): block for block in patched}
        for name, live in self._tables().items():
            there = stored.get(name, {})
            waits = {path for path, spec in live.items() if spec["type"] == "activation" and there.get(path) != spec}
            resolved = resolve_table(carriers[name], live) if waits else []
            resolved = {path: f"{name}.{qualified}".lstrip(".") for path, qualified, _, _ in resolved}
            blocks = [patched[resolved[path]] for path in waits if resolved.get(path) in patched]
            # Of the same model, only further on. A block that was narrowed before has entries of its linears, too.
            inside = {block.path(linear) for block in blocks for linear in block.layout.linears}
            rest = [path for path in live if path not in waits and resolved.get(path) not in inside]
            if not all(there.get(path) == live[path] for path in rest):
                return
            waiting += [block.name for block in blocks]
        if not waiting:
            return
        with self._optimizer_follows():
            collapse_as(self.model, waiting)

    def _refuse_other_life(self, folder):
        self._refuse_other_adapter(folder)
        stored, live = self._stored_tables(folder), self._tables()
        if stored is None:
            return
        for name in sorted(stored.keys() | live.keys()):
            there, here = stored.get(name, {}), live.get(name, {})
            if there != here:
                which = f"`{name}`" if name else "a model"
                raise ValueError(
                    f"The checkpoint {folder} holds {which} that is {_life(there)}, and the model here is "
                    f"{_life(here)}. Give the Trainer the model that the checkpoint was made from, patched by the "
                    "same config, or load it from the checkpoint with `from_pretrained`."
                )

    def _refuse_other_adapter(self, folder):
        file = os.path.join(folder, "adapter_model.safetensors")
        if not os.path.isfile(file) or not unwrap(self.model, sharded=True)[1]:
            return
        with safetensors.safe_open(file, "pt") as adapter:
            stored = sum(key.endswith(".alpha") for key in adapter.keys())
        live = sum(".modules_to_save." in name for name in collapsible_activations(self.model))
        if stored != live:
            raise ValueError(
                f"The adapter in {folder} holds {stored} alphas, and the one here trains {live}; what has no place "
                "would be dropped without a word. Give the Trainer the model that the checkpoint was made from, "
                "patched and with the same `modules_to_save`."
            )

    def _issue_warnings_after_load(self, load_result):
        # A missing alpha or merged matrix is not a warning: the model would be another one.
        if self._tables() and not unwrap(self.model, sharded=True)[1]:
            missing = _not_tied(self.model, load_result.missing_keys)
            if missing or load_result.unexpected_keys:
                raise ValueError(
                    f"The checkpoint does not hold this model: missing {shorten(missing)}, unexpected "
                    f"{shorten(load_result.unexpected_keys)}. It is damaged or was written by another class; resume "
                    "from a complete one."
                )
        super()._issue_warnings_after_load(load_result)


def _is_complete(folder):
    try:
        with open(os.path.join(folder, TRAINER_STATE_NAME), encoding="utf-8") as file:
            json.load(file)
    except (OSError, ValueError):
        return False
    return True


def _replace_folder(staging, name, target):
    """Moves `staging/name` to `target/name`; what may be there is the old folder or the new one, whole."""
    if os.path.isdir(os.path.join(target, name)):
        os.replace(os.path.join(target, name), os.path.join(staging, "before"))
    os.replace(os.path.join(staging, name), os.path.join(target, name))
    _remove(staging)


def _remove(folder):
    """Deletes a folder under another name, so that no part of it can be taken for the whole."""
    doomed = os.path.join(os.path.dirname(folder), f"{SAVING_PREFIX}deleted")
    shutil.rmtree(doomed, ignore_errors=True)
    if os.path.isdir(folder):
        os.replace(folder, doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def forget_base(model, only=None):
    """Adapters name their base once they are saved; that base is not what they are on."""
    inner, holders = unwrap(model, sharded=True)
    if only is None:
        inner.name_or_path = inner.config.name_or_path = ""
    for holder in holders:
        if is_compiled_module(holder):
            continue
        for adapter in holder.peft_config.values():
            if only in (None, adapter.base_model_name_or_path):
                adapter.base_model_name_or_path = None


def _read_json(file):
    if not os.path.isfile(file):
        return None
    with open(file, encoding="utf-8") as stream:
        return json.load(stream)


def _life(table):
    """What a replacement table makes of a model, for a message."""
    alphas = sum(spec["type"] == "activation" for spec in table.values())
    if not table:
        return "dense"
    others = len(table) - alphas
    return " and ".join(
        ([f"patched ({alphas} alphas)"] if alphas else []) + ([f"collapsed ({others} modules)"] if others else [])
    )


def _not_tied(model, keys):
    """Those keys that are no second name of a parameter with another key."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    present = {id(parameter) for name, parameter in parameters.items() if name not in keys}
    return [key for key in keys if key not in parameters or id(parameters[key]) not in present]
