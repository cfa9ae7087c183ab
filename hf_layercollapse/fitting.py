"""Fitting blocks to calibration data: which neurons stay, and the least-squares map beside them."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from . import functional, processes
from .block_sizes import fit_size, root_to_fit
from .calibration import Calibration
from .loss_metric import bytes_of_metrics, held_by_metrics, measure_metrics
from .merging import (
    Merge,
    has_constant,
    make_merge,
    merges_of_the_first,
    parameters_of,
    stored_neurons,
    stored_rank,
)
from .models import kept_on
from .moments import BlockMoments, bytes_to_choose, bytes_to_fit


if TYPE_CHECKING:
    from .blocks import BoundBlock


@dataclass(frozen=True)
class BlockFitting:
    """Fits blocks to calibration data.

    Args:
        engine ([`Calibration`]): Measures them.
        choices (`dict[str, BlockChoice]`): Block name -> what it is to become.
        neuron_choice, constant_term: As in [`LayerCollapseConfig`].
    """

    engine: Calibration
    choices: dict
    neuron_choice: str = "greedy"
    constant_term: str = "native"

    def merges(self, blocks: "Sequence[BoundBlock]") -> dict[str, Merge]:
        """Block name -> its [`Merge`], fitted to what it computes now. All neurons are candidates where some are to be
        chosen."""
        return merges_of_the_first(self._reduce(blocks, lambda block, fit: make_merge(block, fit, refit=True)))

    def fits(self, blocks: "Sequence[BoundBlock]") -> dict[str, functional.Fit]:
        """Block name -> the [`functional.Fit`] that its merge is made of."""
        return self._reduce(blocks, lambda block, fit: fit)

    def _reduce(
        self, blocks: "Sequence[BoundBlock]", result: "Callable[[BoundBlock, functional.Fit], Any]"
    ) -> dict[str, Any]:
        if not blocks:
            return {}
        ranks = {block.name: stored_rank(block, self.choices[block.name].rank) for block in blocks}
        open_choices = {block.name: self._open_choice(block) for block in blocks}
        candidates = {block.name: self._candidates(block, open_choices[block.name]) for block in blocks}
        in_metric = [block for block in blocks if self.choices[block.name].in_metric and ranks[block.name]]
        counted, inputs, working, kept = self._taken(blocks)
        with self.engine.memory.holding(held_by_metrics(self.engine, in_metric) if in_metric else {}):
            self.engine.refuse_too_little(blocks, counted, inputs, working, kept)
        counts = {name: count for name, count in open_choices.items() if count is not None}
        to_choose = [block for block in blocks if block.name in counts]
        by_variance = to_choose if self.neuron_choice == "variance" else []
        if by_variance:
            scores = self.engine.neuron_scores(by_variance)
            with processes.together():
                best = {b.name: sorted(scores[b.name].topk(counts[b.name]).indices.tolist()) for b in by_variance}
            # Sums are added up over processes, and rounding can tip a choice.
            candidates |= processes.of_the_first(best)
        metrics = measure_metrics(self.engine, in_metric)[0] if in_metric else {}

        def fit(block: "BoundBlock", moments: BlockMoments) -> Any:
            rank = ranks[block.name]
            constant = has_constant(block, rank, self.constant_term)
            if block.name in metrics:
                everything = range(len(moments.neurons))
                root = root_to_fit(moments, [rank], metrics[block.name])
                return result(block, fit_size(moments, everything, rank, root, constant))
            if not constant:
                moments = moments.without_constant(in_place=True)
            return result(block, best_fit(moments, rank, open_choices[block.name]))

        found = self.engine.reduce(blocks, candidates, fit, inputs, working, kept)
        # The metrics go with this call.
        measured = bytes_of_metrics(block for block in in_metric if block.name in metrics)
        self.engine.memory.hold_all({device: -count for device, count in measured.items()})
        return found

    def refuse_too_little_in_turn(self, ready: "Sequence[BoundBlock]", refit: "Sequence[BoundBlock]") -> None:
        """Raises if there is too little memory to fit blocks one by one, beside what all became that are not fitted.

        Args:
            ready (`list[BoundBlock]`): In the order of their merges.
            refit (`list[BoundBlock]`): Those of them that are fitted.

        Raises:
            ValueError: As said.
        """
        neurons, inputs, working, kept = self._taken(ready)
        merged: Counter[torch.device] = Counter()
        for block in ready:
            if block not in refit:
                merged[kept_on(block.down)] += kept[block.name]
        with self.engine.memory.holding(merged):
            self.engine.refuse_too_little(refit, neurons, inputs, working, kept, in_turn=True)

    def _taken(self, blocks: "Sequence[BoundBlock]") -> tuple[dict, dict, dict, dict]:
        """What fits of these blocks take: of each how many neurons are among the features, whether its input is, bytes
        that are worked with, and bytes of what comes of it."""
        neurons, inputs, working, kept = {}, {}, {}, {}
        for block in blocks:
            name, count = block.name, self.choices[block.name].count
            rank = stored_rank(block, self.choices[name].rank)
            neurons[name], inputs[name] = count, rank != 0
            working[name] = bytes_to_fit(block, count, inputs[name], bool(rank))
            if self.neuron_choice == "greedy" and self._open_choice(block) is not None:
                neurons[name] = block.hidden_features
                working[name] = max(working[name], bytes_to_choose(block, neurons[name], inputs[name]))
            parameters = parameters_of(block, rank, stored_neurons(rank, count), self.constant_term)
            kept[name] = parameters * block.down.weight.element_size()
        return neurons, inputs, working, kept

    def _open_choice(self, block: "BoundBlock") -> int | None:
        """How many neurons are to be chosen; `None` where it is said which, or that none are."""
        neurons = self.choices[block.name].neurons
        return neurons if isinstance(neurons, int) and 0 < neurons < block.hidden_features else None

    def _candidates(self, block: "BoundBlock", count: int | None) -> list[int] | None:
        neurons = self.choices[block.name].neurons
        if count is not None or neurons == block.hidden_features:
            return None
        return [] if neurons == 0 else neurons


def best_fit(moments: BlockMoments, rank: int | None, count: int | None = None) -> functional.Fit:
    """The fit with the `count` neurons that explain most, chosen from those of the moments; `None`: all of them."""
    if count is not None and count < len(moments.neurons):
        cov_ff, cov_fo, width = moments.cov_ff, moments.cov_fo, moments.width
        if not rank:
            given = None if rank is None else moments.mean_f.new_zeros(0, width)
            chosen, _ = functional.greedy_neurons(cov_ff, cov_fo, width, count, given, moments.ridge)
        else:
            # Neurons for a given map, then the map for these neurons: twice, after which little changes.
            right = functional.reduced_rank(cov_ff[:width, :width], cov_fo[:width], width, rank, moments.ridge)[1]
            for step in range(2):
                if step:
                    part = moments.restricted(chosen)
                    right = functional.reduced_rank(part.cov_ff, part.cov_fo, width, rank, moments.ridge)[1]
                chosen, _ = functional.greedy_neurons(cov_ff, cov_fo, width, count, right, moments.ridge)
        moments = moments.restricted(sorted(chosen))
    return moments.fit(rank)
