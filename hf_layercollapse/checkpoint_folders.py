"""Checkpoint folders of a Trainer: each is whole or not there, whenever a run is killed."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors
import torch
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, sort_checkpoints
from transformers.training_args import ParallelMode
from transformers.utils import logging

from .modeling_layercollapse import CODE_FILE, OLD_SAVING_PREFIX, SAVING_PREFIX


if TYPE_CHECKING:
    from .trainer import LayerCollapseTrainerMixin

logger = logging.get_logger(__name__)


class CheckpointFolders:
    """Where a Trainer writes checkpoints, which it resumes from, and which it deletes.

    Args:
        trainer ([`LayerCollapseTrainerMixin`]): Has the arguments and the state.

    Attributes:
        staging (`str` or `None`): While a checkpoint is being written, the folder that it is written in.
    """

    def __init__(self, trainer: LayerCollapseTrainerMixin) -> None:
        self._trainer: Any = trainer
        self.staging: str | None = None

    # ---- Resuming ----

    def to_resume_from(self, asked_for: str | bool | None) -> str | bool | None:
        """The folder that `resume_from_checkpoint` means: what was interrupted is none.

        Raises:
            ValueError: It names one that is not complete.
        """
        if asked_for is True:
            return self._last_complete() or True
        if asked_for and not _is_complete(asked_for):
            raise ValueError(
                f"{asked_for} is no complete checkpoint: it has no readable {TRAINER_STATE_NAME}, which "
                "is written last. Resume from another, or with `resume_from_checkpoint=True` from the last complete "
                "one."
            )
        return asked_for

    def _last_complete(self) -> str | None:
        output_dir = self._trainer.args.output_dir
        for folder in sort_checkpoints(output_dir)[::-1] if os.path.isdir(output_dir) else []:
            if _is_complete(folder):
                return folder
            logger.warning(f"{folder} is not complete and is passed over.")
        return None

    def is_at_the_end(self) -> bool:
        """Whether no step is left, as where a run is resumed from its last checkpoint; training stops then."""
        ended = self._trainer.state.global_step >= self._trainer.state.max_steps
        if ended:
            self._trainer.control.should_training_stop = True
        return ended

    # ---- Writing ----

    @contextlib.contextmanager
    def written_beside(self, run_folder: str, push: Callable[[str], None]) -> Iterator[None]:
        """What is written to `staging` inside is moved in when it is whole; `push` gets its place then.

        Raises:
            OSError: It could not be written.
        """
        trainer, step = self._trainer, self._trainer.state.global_step
        name, staging = f"{PREFIX_CHECKPOINT_DIR}-{step}", os.path.join(run_folder, f"{SAVING_PREFIX}checkpoint")
        if trainer.is_local_process_zero():
            for left in (
                f"{SAVING_PREFIX}checkpoint",
                f"{OLD_SAVING_PREFIX}checkpoint",
                f"{OLD_SAVING_PREFIX}deleted",
            ):
                _remove(os.path.join(run_folder, left))  # by a run that was killed
        self._wait()
        self.staging = staging
        try:
            yield
            self._name_the_best(run_folder)
            self._move_in(staging, name, run_folder)
        except (OSError, RuntimeError, safetensors.SafetensorError) as error:
            _remove(staging)
            if not _is_of_writing(error):
                raise
            raise OSError(
                f"The checkpoint of step {step} could not be written to {run_folder}: {error}. Is the disk full, or "
                "the folder not writable? The checkpoints from before are complete; resume with "
                "`resume_from_checkpoint=True`."
            ) from error
        finally:
            self.staging = None
        if trainer.args.push_to_hub:
            push(os.path.join(run_folder, name))
        self._delete_surplus(name, run_folder)

    def _wait(self) -> None:
        if self._trainer.args.parallel_mode == ParallelMode.DISTRIBUTED:
            torch.distributed.barrier()

    def _name_the_best(self, run_folder: str) -> None:
        """In its place, and not in that where it was written."""
        state = self._trainer.state
        best = os.path.join(run_folder, f"{PREFIX_CHECKPOINT_DIR}-{state.best_global_step}")
        if state.best_global_step and (state.best_global_step == state.global_step or os.path.isdir(best)):
            state.best_model_checkpoint = best

    def _move_in(self, staging: str, name: str, run_folder: str) -> None:
        trainer, written = self._trainer, os.path.join(staging, name)
        if trainer.args.should_save:
            trainer.state.save_to_json(os.path.join(written, TRAINER_STATE_NAME))
        self._wait()
        if trainer.args.should_save:
            _replace_folder(staging, name, run_folder)
        self._wait()
        if trainer.is_local_process_zero() and os.path.isdir(written):
            _replace_folder(staging, name, run_folder)  # on a node with a disk of its own

    def may_be_pushed(self, folder: str) -> bool:
        """Whether a checkpoint is in its place; if so, what upstream does not know of it is put beside what it
        copies to be pushed."""
        if self.staging is not None:
            return False
        # Upstream copies the files that it knows; our config.json names one more.
        code = os.path.join(folder, CODE_FILE)
        if self._trainer.is_world_process_zero() and os.path.isfile(code):
            shutil.copy(code, os.path.join(self._trainer.args.output_dir, CODE_FILE))
        return True

    # ---- Deleting ----

    def _delete_surplus(self, last: str, run_folder: str) -> None:
        args, best = self._trainer.args, self._trainer.state.best_model_checkpoint
        limit = args.save_total_limit
        if not args.should_save or limit is None or limit <= 0:
            return
        kept = {str(Path(run_folder, last))} | ({str(Path(best))} if best is not None else set())
        surplus = [folder for folder in sort_checkpoints(run_folder, use_mtime=True) if folder not in kept]
        for folder in surplus[: max(0, len(surplus) + len(kept) - limit)]:
            _remove(folder)

    def delete_all_but_the_best(self, run_folder: str) -> None:
        """Where one is to be kept. Upstream deletes the others in place: a kill in between would leave a part of the
        last one."""
        args, best = self._trainer.args, self._trainer.state.best_model_checkpoint
        if args.should_save and best is not None and args.save_total_limit == 1:
            for folder in sort_checkpoints(run_folder):
                if not os.path.samefile(folder, best):
                    _remove(folder)


def _is_complete(folder: str) -> bool:
    try:
        with open(os.path.join(folder, TRAINER_STATE_NAME), encoding="utf-8") as file:
            json.load(file)
    except (OSError, ValueError):
        return False
    return True


def _is_of_writing(error: BaseException) -> bool:
    # `torch.save` has no type of its own for a disk that is full.
    text = str(error)
    return not isinstance(error, RuntimeError) or "inline_container" in text or "PytorchStreamWriter" in text


def _replace_folder(staging: str, name: str, target: str) -> None:
    """Moves `staging/name` to `target/name`; what may be there is the old folder or the new one, whole."""
    if os.path.isdir(os.path.join(target, name)):
        os.replace(os.path.join(target, name), os.path.join(staging, "before"))
    os.replace(os.path.join(staging, name), os.path.join(target, name))
    _remove(staging)


def _remove(folder: str) -> None:
    """Deletes a folder under another name, so that no part of it can be taken for the whole."""
    doomed = os.path.join(os.path.dirname(folder), f"{SAVING_PREFIX}deleted")
    shutil.rmtree(doomed, ignore_errors=True)
    if os.path.isdir(folder):
        os.replace(folder, doomed)
        shutil.rmtree(doomed, ignore_errors=True)
