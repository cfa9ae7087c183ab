"""What is in a checkpoint of a patched or collapsed model: names of the live model, loaded completely or refused."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from transformers.utils import CONFIG_NAME, logging

from .budgeted_training import BudgetedTraining
from .checkpoint_folders import CheckpointFolders
from .modeling_layercollapse import has_own_adapters
from .models import carriers_of, is_transformers_model, shorten, unwrap
from .patching import collapsible_activations
from .progressive import ProgressiveCollapse
from .trained_blocks import TrainedBlocks, forget_base


if TYPE_CHECKING:
    from .trainer import LayerCollapseTrainerMixin

logger = logging.get_logger(__name__)

# Alphas that train under a PeftModel but not in it, in a checkpoint.
ALPHAS_NAME = "layer_collapse_alphas.safetensors"
# Tables of the models inside a module that has no config of its own, in a checkpoint.
TABLES_NAME = "layer_collapse_tables.json"
# Beside it, options that they were collapsed by.
OPTIONS_NAME = "layer_collapse_options.json"
# What an adapter in a checkpoint names as its base where that is nowhere but in memory. No folder, and no repository.
BASE_NOT_SAVED = "(patched in memory and not saved)"


class Checkpoints:
    """Saves the model of a Trainer so that it can go on, and loads it as a whole or not at all.

    Args:
        trainer ([`LayerCollapseTrainerMixin`]): Has the model.
        blocks ([`TrainedBlocks`]): Of the model.
        folders ([`CheckpointFolders`]): Know whether a checkpoint is being written, or the user saves a model.
        progressive ([`ProgressiveCollapse`]): Takes the model to where a checkpoint of its run is.
        budgeted ([`BudgetedTraining`]): The same, from a dense model.
    """

    def __init__(
        self,
        trainer: LayerCollapseTrainerMixin,
        blocks: TrainedBlocks,
        folders: CheckpointFolders,
        progressive: ProgressiveCollapse,
        budgeted: BudgetedTraining,
    ) -> None:
        self._trainer: Any = trainer
        self._blocks, self._folders, self._progressive, self._budgeted = blocks, folders, progressive, budgeted
        self._loading_failed: Exception | None = None

    # ---- Saving ----

    def saving(self, folder: str | None) -> contextlib.AbstractContextManager:
        """In which a save writes what a checkpoint needs.

        A checkpoint is loaded into the live model as it is, so it must hold live names, not those that
        `from_pretrained` would convert. It does not name the model: only a save by the user does, who wants the
        original names, too.
        """
        if self._folders.staging is None or folder is None:
            return contextlib.nullcontext()
        by_itself = is_transformers_model(self._trainer.model)
        return self._saving_model(folder) if by_itself else self._saving_module(folder)

    @contextlib.contextmanager
    def _saving_model(self, folder: str) -> Iterator[None]:
        model = self._trainer.model
        inner, wrappers = unwrap(model, sharded=True)
        names = inner.name_or_path, inner.config.name_or_path
        adapted = bool(wrappers) or has_own_adapters(inner)
        if not wrappers:
            model.save_pretrained = partial(model.save_pretrained, save_original_format=False)
        if adapted and not inner.name_or_path and inner.config.__dict__.get("layer_collapse"):
            # An adapter. Into the live model it goes back all the same.
            inner.name_or_path = inner.config.name_or_path = BASE_NOT_SAVED
        try:
            yield
        finally:
            if adapted:
                forget_base(model, only=BASE_NOT_SAVED)
            if not wrappers:
                del model.save_pretrained
            inner.name_or_path, inner.config.name_or_path = names
        alphas = self._blocks.alphas_beside_adapters()
        if alphas and self._trainer.args.should_save:
            tensors = {name: alpha.detach().contiguous() for name, alpha in alphas.items()}
            safetensors.torch.save_file(tensors, os.path.join(folder, ALPHAS_NAME))

    @contextlib.contextmanager
    def _saving_module(self, folder: str) -> Iterator[None]:
        """Of a module with transformers models inside: the tables of these go beside it."""
        inner, wrappers = unwrap(self._trainer.model, sharded=True)
        carriers = [carrier for _, carrier in carriers_of(inner)]
        names = [(carrier.name_or_path, carrier.config.name_or_path) for carrier in carriers]
        try:
            yield
        finally:
            for carrier, (name, in_config) in zip(carriers, names, strict=True):
                carrier.name_or_path, carrier.config.name_or_path = name, in_config
        if carriers and not wrappers and self._trainer.args.should_save:
            with open(os.path.join(folder, TABLES_NAME), "w", encoding="utf-8") as file:
                json.dump(self._blocks.tables(), file, indent=2, sort_keys=True)
            if self._budgeted.recorded is not None:
                with open(os.path.join(folder, OPTIONS_NAME), "w", encoding="utf-8") as file:
                    file.write(self._budgeted.recorded.to_json_string())

    # ---- Loading ----

    @contextlib.contextmanager
    def loading(self, folder: str) -> Iterator[None]:
        """In which weights of a checkpoint are loaded: it is of this model, or refused before any is changed.

        Raises:
            ValueError: It is of another model, or of this one in another state.
        """
        try:
            stored = self._stored_tables(folder)
            self._budgeted.follow(folder, stored, self._stored_options(folder))
            self._progressive.follow(stored)
            self._refuse_other_life(folder)
            yield
            self._load_alphas(folder)
        except Exception as error:
            self._loading_failed = error
            raise

    def best_is_less_collapsed(self) -> bool:
        """Whether the best checkpoint is one that a progressive run has left behind; says so."""
        folder = self._trainer.state.best_model_checkpoint
        left_behind = self._progressive.is_asked_for and self._stored_tables(folder) not in (
            None,
            self._blocks.tables(),
        )
        if left_behind:
            logger.warning(
                f"The best checkpoint, {folder}, holds fewer collapsed blocks than the model does by now, which goes "
                "on as it is. Load that one with `from_pretrained`."
            )
        return left_behind

    @contextlib.contextmanager
    def loading_best(self) -> Iterator[None]:
        """As [`Checkpoints.loading`], of the best checkpoint."""
        folder = self._trainer.state.best_model_checkpoint
        self._refuse_other_life(folder)
        self._loading_failed = None
        yield
        if self._loading_failed is not None:
            # sentence-transformers' trainers log it, and end with the last model in place of the best.
            raise self._loading_failed
        self._load_alphas(folder)

    def _stored_tables(self, folder: str) -> dict[str, dict[str, Any]] | None:
        """What [`tables_of`] gave for the model of a checkpoint; `None` if that does not say, as one of an adapter."""
        if unwrap(self._trainer.model, sharded=True)[1]:
            return None
        if not is_transformers_model(self._trainer.model):
            return _read_json(os.path.join(folder, TABLES_NAME))
        config = _read_json(os.path.join(folder, CONFIG_NAME))
        if config is None:
            return None
        layer_collapse = config.get("layer_collapse")
        return {"": layer_collapse["modules"]} if layer_collapse else {}

    def _stored_options(self, folder: str) -> dict[str, Any] | None:
        """What a checkpoint's model was made to; `None` if that does not say."""
        if not is_transformers_model(self._trainer.model):
            return _read_json(os.path.join(folder, OPTIONS_NAME))
        config = _read_json(os.path.join(folder, CONFIG_NAME)) or {}
        return (config.get("layer_collapse") or {}).get("options")

    def _load_alphas(self, folder: str) -> None:
        alphas = self._blocks.alphas_beside_adapters()
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

    def _refuse_other_life(self, folder: str) -> None:
        self._refuse_other_adapter(folder)
        stored, live = self._stored_tables(folder), self._blocks.tables()
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

    def _refuse_other_adapter(self, folder: str) -> None:
        file, model = os.path.join(folder, "adapter_model.safetensors"), self._trainer.model
        if not os.path.isfile(file) or not unwrap(model, sharded=True)[1]:
            return
        with safetensors.safe_open(file, "pt") as adapter:
            stored = sum(key.endswith(".alpha") for key in adapter.keys())
        live = sum(".modules_to_save." in name for name in collapsible_activations(model))
        if stored != live:
            raise ValueError(
                f"The adapter in {folder} holds {stored} alphas, and the one here trains {live}; what has no place "
                "would be dropped without a word. Give the Trainer the model that the checkpoint was made from, "
                "patched and with the same `modules_to_save`."
            )

    def refuse_partial(self, load_result: Any) -> None:
        """Raises if a patched or collapsed model was not loaded whole: without an alpha or a merged matrix it is
        another one.

        Args:
            load_result: What `load_state_dict` gave.

        Raises:
            ValueError: Keys were missing or left over.
        """
        model = self._trainer.model
        if not self._blocks.tables() or unwrap(model, sharded=True)[1]:
            return
        missing = _not_tied(model, load_result.missing_keys)
        if missing or load_result.unexpected_keys:
            raise ValueError(
                f"The checkpoint does not hold this model: missing {shorten(missing)}, unexpected "
                f"{shorten(load_result.unexpected_keys)}. It is damaged or was written by another class; resume "
                "from a complete one."
            )


def _read_json(file: str) -> Any:
    if not os.path.isfile(file):
        return None
    with open(file, encoding="utf-8") as stream:
        return json.load(stream)


def _life(table: Any) -> Any:
    """What a replacement table makes of a model, for a message."""
    alphas = sum(spec["type"] == "activation" for spec in table.values())
    if not table:
        return "dense"
    others = len(table) - alphas
    return " and ".join(
        ([f"patched ({alphas} alphas)"] if alphas else []) + ([f"collapsed ({others} modules)"] if others else [])
    )


def _not_tied(model: Any, keys: Iterable[str]) -> list[str]:
    """Those keys that are no second name of a parameter with another key."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    present = {id(parameter) for name, parameter in parameters.items() if name not in keys}
    return [key for key in keys if key not in parameters or id(parameters[key]) not in present]
