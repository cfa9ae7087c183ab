"""What is in a checkpoint of a patched or collapsed model: names of the live model, loaded completely or refused."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from transformers.utils import (
    CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    logging,
)

from .budgeted_training import BudgetedTraining
from .checkpoint_folders import CheckpointFolders
from .modeling_layercollapse import has_own_adapters
from .models import carriers_of, is_transformers_model, shorten, unwrap
from .patching import collapsible_activations
from .progressive import ProgressiveCollapse
from .sentence_models import sentence_model
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
        """In which weights of a checkpoint are loaded: it is of this model, or refused before any is changed. Where it
        gives the model other shapes first, and fails, the model gets its own back.

        Raises:
            ValueError: It is of another model, of this one in another state, or damaged.
        """
        try:
            shapes, stored = self._stored_shapes(folder), self._stored_tables(folder)
            following = self._budgeted.following(folder, stored, self._stored_options(folder))
            with following, self._progressive.following(stored), self._complete(folder, shapes):
                yield
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
        self._loading_failed = None
        with self._complete(folder, self._stored_shapes(folder)):
            yield
            if self._loading_failed is not None:
                # sentence-transformers' trainers log it, and end with the last model in place of the best.
                raise self._loading_failed

    @contextlib.contextmanager
    def _complete(self, folder: str, shapes: Mapping[str, Any] | None) -> Iterator[None]:
        """In which weights of these shapes are read into the model, and then the alphas beside them."""
        self._refuse_other_life(folder)
        if shapes is not None:
            self._refuse_other_weights(folder, shapes)
        alphas = self._stored_alphas(folder)
        yield
        with torch.no_grad():
            for name, alpha in self._blocks.alphas_beside_adapters().items():
                alpha.copy_(alphas[name])

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

    def _stored_shapes(self, folder: str) -> dict[str, tuple[int, ...]] | None:
        """Name -> shape of the weights in a checkpoint; `None` where what upstream reads is something else: an
        adapter, what an engine has sharded, the folder of an object of sentence-transformers.

        Raises:
            ValueError: One of its files cannot be read.
        """
        trainer = self._trainer
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled or sentence_model(trainer.model) is not None:
            return None
        files = [] if unwrap(trainer.model)[1] else _weight_files(folder)
        return {name: shape for file in files for name, shape in _shapes_in(file).items()} if files else None

    def _stored_alphas(self, folder: str) -> dict[str, torch.Tensor]:
        alphas = self._blocks.alphas_beside_adapters()
        if not alphas:
            return {}
        file = os.path.join(folder, ALPHAS_NAME)
        stored = safetensors.torch.load_file(file) if os.path.isfile(file) else {}
        if {name: alpha.shape for name, alpha in stored.items()} != {n: alpha.shape for n, alpha in alphas.items()}:
            raise ValueError(
                f"The checkpoint {folder} holds {len(stored)} alphas beside its adapter, and the model here trains "
                f"{len(alphas)}, or of other shapes. Give the Trainer the model that the checkpoint was made from, "
                "patched and with its alphas trainable as then."
            )
        return stored

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

    def _refuse_other_weights(self, folder: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raises if a patched or collapsed model would not be loaded whole: without an alpha or a merged matrix it is
        another one."""
        model = self._trainer.model
        if not self._blocks.tables():
            return
        live = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        other = [f"{n} {shapes[n]} in place of {live[n]}" for n in live if n in shapes and shapes[n] != live[n]]
        found = {
            "missing": _not_tied(model, [name for name in live if name not in shapes]),
            "unexpected": [name for name in shapes if name not in live],
            "of another shape": other,
        }
        if any(found.values()):
            listed = ", ".join(f"{what} {shorten(names)}" for what, names in found.items() if names)
            raise ValueError(
                f"The checkpoint {folder} does not hold this model: {listed}. It is damaged or was written by another "
                "class; resume from a complete one."
            )


def _weight_files(folder: str) -> list[str]:
    """What upstream loads of a checkpoint: one file, or those that an index names."""
    for name in (SAFE_WEIGHTS_NAME, WEIGHTS_NAME):
        if os.path.isfile(os.path.join(folder, name)):
            return [os.path.join(folder, name)]
    for name in (SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_INDEX_NAME):
        index = _read_json(os.path.join(folder, name))
        if index is not None:
            return [os.path.join(folder, part) for part in sorted(set(index["weight_map"].values()))]
    return []


def _shapes_in(file: str) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the tensors in a file, which are not read.

    Raises:
        ValueError: It is not there, or not whole.
    """
    try:
        if not file.endswith(".safetensors"):
            stored = torch.load(file, map_location="meta", weights_only=True)
            return {name: tuple(tensor.shape) for name, tensor in stored.items()}
        with safetensors.safe_open(file, "pt") as opened:
            return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, safetensors.SafetensorError) as error:
        raise ValueError(
            f"{file} cannot be read: {error}. It is cut off, damaged or missing; resume from another checkpoint."
        ) from error


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
