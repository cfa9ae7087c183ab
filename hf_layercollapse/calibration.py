"""The engine of everything without training: passes over data within a memory budget, one block's sums at a time where
more do not fit."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from . import neuron_statistics, processes
from .blocks import BoundBlock
from .data_reading import read_calibration_data, split_data
from .forward_passes import LayerOrder, run_over
from .memory import MemoryBudget
from .modeling_layercollapse import CollapsibleActivation, is_inplace
from .models import device_of, is_encoder_decoder, kept_on
from .moments import BlockMoments, MomentSums, RangeSums, TokenRange, bytes_of_sums
from .neuron_statistics import Turns
from .plans import weights_fingerprint
from .progress import Progress
from .reports import DataReport
from .rows import DistinctRows, row_count, sample
from .token_filter import TokenFilter


# What limits and origins are taken from: an eighth of the rows, but at least and at most so many, and so many tokens
# and bytes, whatever memory there is: the same on every machine.
RANGE_SHARE, LEAST_RANGE_ROWS, RANGE_ROWS, RANGE_TOKENS, RANGE_BYTES = 1 / 8, 8, 64, 4096, 2**28


@dataclass(frozen=True)
class _Need:
    """What one block takes, in bytes.

    Args:
        device, kept_on (`torch.device`): Where its sums are, and where its new weights wait.
    """

    block: BoundBlock
    device: torch.device
    sums: int
    working: int
    kept: int
    kept_on: torch.device

    @property
    def alone(self) -> int:
        return self.sums + self.working + self.kept

    @property
    def by_device(self) -> Counter[torch.device]:
        """The same by device."""
        return Counter({self.device: self.sums + self.working}) + Counter({self.kept_on: self.kept})

    def told(self, device: torch.device, apart: bool, needed: int, beside: int, room: int, held: int) -> str:
        """What it lacks on a device, for a message.

        Args:
            apart (`bool`): Whether its sums count on one device, and its new weights on another.
            needed, beside (`int`): Bytes that count on this one, of it and of the new weights of others.
            room, held (`int`): Bytes that are left there, and that are held.
        """
        alone, others = ("", f", beside {beside / 1e9:.3g} GB of new weights") if beside else ("alone ", "")
        left = f" ({held / 1e9:.3g} GB are held, of rows and of the metric of the loss)" if held else ""
        purpose, remedies = "its sums over the calibration data and for what is worked out from them", ""
        if apart and device == self.kept_on:
            purpose = "its new weights, which are kept where offloaded ones lie"
        elif apart:
            remedies = ", or offload more of the model, so that more is free there"
        if beside:
            remedies += ", or take fewer blocks (`blocks`)"
        return (
            f"Block {self.block.name} {alone}needs {needed / 1e9:.3g} GB for {purpose}{others}, and there are "
            f"{max(0, room) / 1e9:.3g} GB on {device}{left}: raise `max_memory`{remedies}."
        )


def _needs_of(
    blocks: Sequence[BoundBlock],
    neurons: Mapping[str, int],
    inputs: Mapping[str, bool],
    working: Mapping[str, int],
    kept: Mapping[str, int],
) -> list[_Need]:
    return [
        _Need(
            block,
            device_of(block.down),
            bytes_of_sums(block, neurons[block.name], inputs[block.name]),
            working.get(block.name, 0),
            kept.get(block.name, 0),
            kept_on(block.down),
        )
        for block in blocks
    ]


def _in_order(needs: Sequence[_Need]) -> list[_Need]:
    """Where something is kept of each, those that take most come first, while little is."""
    return sorted(needs, key=lambda need: -need.alone) if any(need.kept for need in needs) else list(needs)


class Calibration:
    """Measures the blocks of one model on one set of rows; the model is left as it is.

    Args:
        model, inner (`nn.Module`): What runs, and what it wraps.
        rows ([`DistinctRows`]): Of the data.
        memory ([`MemoryBudget`], *optional*): For what is held.
        token_mask_fn (`Callable`, *optional*): See [`TokenFilter`].
        progress ([`Progress`], *optional*): Told of what is done.
    """

    def __init__(
        self,
        model: nn.Module,
        inner: Any,
        rows: DistinctRows,
        memory: MemoryBudget | None = None,
        token_mask_fn: Callable[..., Any] | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.model, self.inner, self.rows = model, inner, rows
        self.memory = memory or MemoryBudget()
        self.tokens = TokenFilter(model, token_mask_fn)
        self.progress = progress or Progress()
        self.most_tokens = 0  # of all blocks, those that the most tokens reached
        self._ranges: dict[str, TokenRange] = {}
        self._layers = LayerOrder(model, inner)

    @classmethod
    def on(
        cls,
        model: nn.Module,
        inner: Any,
        data: Iterable[Any],
        max_memory: int | str | dict[Any, Any] | None = None,
        token_mask_fn: Callable[..., Any] | None = None,
        progress: Progress | None = None,
    ) -> "Calibration":
        """One that reads the data first; see [`read_calibration_data`]."""
        memory = MemoryBudget(max_memory)
        rows = read_calibration_data(data, memory, is_encoder_decoder(inner))
        refuse_different_models(inner)
        return cls(model, inner, rows, memory, token_mask_fn, progress)

    @classmethod
    def holding_aside(
        cls,
        model: nn.Module,
        inner: Any,
        data: Iterable[Any],
        evaluation_data: Iterable[Any] | None = None,
        max_memory: int | str | dict[Any, Any] | None = None,
        token_mask_fn: Callable[..., Any] | None = None,
        progress: Progress | None = None,
    ) -> "tuple[Calibration, list[dict[str, Any]]]":
        """`(one on what is fitted to, the batches to measure on)`; see [`split_data`]."""
        memory = MemoryBudget(max_memory)
        refuse_different_models(inner)
        fitting, held = split_data(data, evaluation_data, memory, is_encoder_decoder(inner))
        return cls(model, inner, fitting, memory, token_mask_fn, progress), held

    def run(
        self,
        what: str,
        observe: Callable[[], Iterable[Any]],
        data: Iterable[Mapping[str, Any]] | None = None,
        blocks: Sequence[BoundBlock] = (),
    ) -> None:
        """One pass over the rows, or over other batches, with the hooks that `observe()` makes.

        Args:
            blocks (`list[BoundBlock]`): All that the hooks look at, where it is blocks: forwards end behind the last
                of them. Default: forwards run to their end.
        """
        self.progress.say(what)
        data = self.rows if data is None else data

        def all_hooks() -> Iterator[Any]:
            yield from observe()
            if blocks:
                yield from self._layers.observe(blocks)

        with processes.together():
            run_over(self.model, self.inner, data, all_hooks, self.progress, self.tokens)

    def room(self, device: torch.device) -> int:
        """Bytes that are left on a device, of all processes where there are fewest."""
        return min(processes.gathered(self.memory.room(device)))

    def sample(self, most_rows: int, most_tokens: int, most_bytes: int) -> list:
        """Some batches of the data; see [`rows.sample`]."""
        return sample(self.rows, most_rows, most_tokens, most_bytes)

    def data_report(self, held: Iterable[Mapping[str, Any]] = ()) -> DataReport:
        """What was read so far, beside these batches that were held aside."""
        aside = sum(processes.gathered(sum(row_count(batch) or 1 for batch in held)))
        return DataReport(self.rows.rows, self.rows.distinct, self.most_tokens, aside)

    def neuron_scores(self, blocks: Sequence[BoundBlock]) -> dict[str, torch.Tensor]:
        """Block name -> a score of each neuron; see [`neuron_statistics.score_neurons`]."""
        return neuron_statistics.score_neurons(self, blocks)

    def reduce(
        self,
        blocks: Sequence[BoundBlock],
        neurons: Mapping[str, Sequence[int] | None],
        work: Callable[[BoundBlock, BlockMoments], Any],
        inputs: Mapping[str, bool] | None = None,
        working: Mapping[str, int] | None = None,
        kept: Mapping[str, int] | None = None,
    ) -> dict:
        """What `work(block, moments)` makes of every block's [`BlockMoments`]. Blocks are measured together as far as
        the memory allows, in as many passes over the data as that takes; the target is what they compute now.

        Args:
            blocks (`list[BoundBlock]`): Dense or patched.
            neurons (`dict[str, list[int] | None]`): Block name -> hidden neurons whose activations are features too;
                `None` for all of them.
            work (`Callable`): What is kept of the moments. They are let go after it.
            inputs (`dict[str, bool]`, *optional*): Block name -> whether its input is among the features. Default:
                every block's is.
            working (`dict[str, int]`, *optional*): Block name -> bytes that `work` takes beside the moments.
            kept (`dict[str, int]`, *optional*): Block name -> bytes of what it gives, all of which is held in the end,
                where the block's weights lie.

        Returns:
            Block name -> what `work` gave.

        Raises:
            ValueError: One block alone needs more memory than there is, no token reaches a block, or what does is not
                finite.
        """
        wanted = {}
        for block in blocks:
            of_block = neurons[block.name]
            wanted[block.name] = list(range(block.hidden_features)) if of_block is None else of_block
        inputs = {block.name: inputs is None or inputs[block.name] for block in blocks}
        counts = {name: len(of_block) for name, of_block in wanted.items()}
        with processes.together():
            groups = self._groups(_needs_of(blocks, counts, inputs, working or {}, kept or {}))
        # Those of the process with the least memory.
        by_name = {block.name: block for block in blocks}
        names = max(processes.gathered([[block.name for block in group] for group in groups]), key=len)
        groups = [[by_name[name] for name in group] for group in names]
        self._look_at_ranges(blocks, wanted)
        self.progress.expect(len(groups) * self.rows.batches, len(blocks))
        results = {}
        for number, group in enumerate(groups, start=1):
            of = f" {number} of {len(groups)}" if len(groups) > 1 else ""
            sums = self._sums(group, wanted, inputs, f"measuring blocks, pass{of}" if of else "measuring blocks")
            for block in group:
                self.progress.say(f"fitting block {block.name}")
                summed = sums.pop(block.name).of_all_processes()
                # What only one process has no memory for, all hear of.
                with self.progress.part(), processes.together():
                    moments = summed.finish(block, self.rows.distinct)
                    self.most_tokens = max(self.most_tokens, moments.tokens)
                    results[block.name] = work(block, moments)
                    del moments
        return results

    def moments(
        self,
        blocks: Sequence[BoundBlock],
        neurons: Mapping[str, Sequence[int]] | None = None,
        inputs: Mapping[str, bool] | None = None,
    ) -> dict:
        """Block name -> its [`BlockMoments`], all held; see [`~Calibration.reduce`]."""
        neurons = {block.name: (neurons or {}).get(block.name, []) for block in blocks}
        return self.reduce(blocks, neurons, lambda block, moments: moments, inputs)

    def refuse_too_little(
        self,
        blocks: Sequence[BoundBlock],
        neurons: Mapping[str, int],
        inputs: Mapping[str, bool],
        working: Mapping[str, int],
        kept: Mapping[str, int] | None = None,
        in_turn: bool = False,
    ) -> None:
        """Raises if there is too little memory for [`~Calibration.reduce`] with so many neurons of each block.

        Args:
            blocks (`list[BoundBlock]`): As there.
            neurons (`dict[str, int]`), inputs, working, kept: As there, of every block.
            in_turn (`bool`): Whether they are measured one by one in this order, each beside what is kept of those
                before it.

        Raises:
            ValueError: As said.
        """
        with processes.together():
            needs = _needs_of(blocks, neurons, inputs, working, kept or {})
            self._refuse_too_little(needs if in_turn else _in_order(needs))

    def _groups(self, needs: Sequence[_Need]) -> list[list[BoundBlock]]:
        """The blocks in groups whose sums, what is worked out from those of one of them, and what is kept of all, fit
        the memory."""
        needs = _in_order(needs)
        self._refuse_too_little(needs)
        groups: list[list[_Need]] = []
        held: Counter[torch.device] = Counter()
        for need in needs:
            group = groups[-1] if groups else []
            if not group or not self._fit([*group, need], held):
                for other in group:
                    held[other.kept_on] += other.kept
                groups.append([])
            groups[-1].append(need)
        return [[need.block for need in group] for group in groups]

    def _refuse_too_little(self, needs: Iterable[_Need]) -> None:
        """Raises if one of these blocks does not fit the memory beside what is kept of those before it, with the
        numbers of the one that lacks most: with so much more all of them fit."""
        held: Counter[torch.device] = Counter()
        lacking: tuple[int, str] = 0, ""
        for need in needs:
            apart = need.device != need.kept_on and not self.memory.is_one_number
            for device in need.by_device:
                needed, beside = (self.memory.counted_on(device, counts) for counts in (need.by_device, held))
                room = self.memory.room(device)
                told = need.told(device, apart, needed, beside, room, self.memory.held(device))
                lacking = max(lacking, (beside + needed - room, told), key=lambda one: one[0])
            held[need.kept_on] += need.kept
        if lacking[1]:
            raise ValueError(lacking[1])

    def _fit(self, needs: Sequence[_Need], held: Mapping[torch.device, int]) -> bool:
        """Whether what these blocks need is there, beside what is held. One block after the other is worked on."""
        taken, working = Counter(held), Counter[torch.device]()
        for need in needs:
            taken[need.device] += need.sums
            taken[need.kept_on] += need.kept
            working[need.device] = max(working[need.device], need.working)
        return self.memory.fits(taken, working)

    def _look_at_ranges(self, blocks: Sequence[BoundBlock], wanted: Mapping[str, Sequence[int]]) -> None:
        """Where the tokens of the blocks lie, from the same sample of rows whatever their order."""
        new = [
            block
            for block in blocks
            if block.name not in self._ranges or (wanted[block.name] and self._ranges[block.name].origin_h is None)
        ]
        # A block that no row of the sample reaches (rows that are sent one way or the other) is looked at on all.
        for on_all in (False, True):
            if not new:
                return
            rows = max(LEAST_RANGE_ROWS, int(RANGE_SHARE * self.rows.distinct))
            sample = None if on_all else self.sample(min(rows, RANGE_ROWS), RANGE_TOKENS, RANGE_BYTES)
            self.progress.expect(self.rows.batches if sample is None else len(sample))
            sums = {block.name: RangeSums() for block in new}
            self._observed(
                "looking at a sample", new, sums, {block.name: bool(wanted[block.name]) for block in new}, sample
            )
            if on_all:
                sums = {block.name: sums[block.name].of_all_processes(device_of(block.down)) for block in new}
            with processes.together():
                ranges = {name: found.finish() for name, found in sums.items() if found.tokens}
            self._ranges |= _of_the_first(ranges)
            new = [block for block in new if not sums[block.name].tokens]
        if new:
            raise ValueError(f"No calibration token reached block {new[0].name}.")

    def _sums(
        self, blocks: Sequence[BoundBlock], wanted: Mapping[str, Sequence[int]], inputs: Mapping[str, bool], what: str
    ) -> dict[str, MomentSums]:
        with processes.together():
            sums = {b.name: MomentSums(self._ranges[b.name], wanted[b.name], inputs[b.name]) for b in blocks}
        self._observed(what, blocks, sums, {block.name: bool(wanted[block.name]) for block in blocks})
        return sums

    def _observed(
        self,
        what: str,
        blocks: Sequence[BoundBlock],
        sums: Mapping[str, Any],
        with_neurons: Mapping[str, bool],
        data: Iterable[Mapping[str, Any]] | None = None,
    ) -> None:
        """A pass that adds every call of the blocks to their sums."""
        turns = Turns()

        def observe() -> Iterator[Any]:
            for block in blocks:
                add = self._adder(block, sums[block.name])
                yield from features_of(block, turns, add, with_neurons[block.name])

        self.run(what, observe, data, blocks)

    def _adder(self, block: BoundBlock, sums: Any) -> Callable[..., None]:
        # An own module is replaced as a whole, with the constant that it multiplies its output by.
        factor = block.scales[2]

        def add(*tensors: torch.Tensor) -> None:
            sums.add(*self.tokens.select(block, *tensors), factor=factor)

        return add


def _of_the_first(ranges: Mapping[str, TokenRange]) -> dict[str, TokenRange]:
    """The first process's ranges, on all: sums about different origins cannot be added up."""
    limits = processes.of_the_first([found.limit for found in ranges.values()])
    origins = [(found.origin_x, found.origin_h, found.origin_o) for found in ranges.values()]
    processes.spread([origin for of_block in origins for origin in of_block if origin is not None])
    return {name: replace(found, limit=limit) for (name, found), limit in zip(ranges.items(), limits, strict=True)}


def refuse_different_models(inner: Any) -> None:
    """Raises if processes hold different models.

    Raises:
        ValueError: They do.
    """
    if processes.count() == 1:
        return
    found = processes.gathered(f"{type(inner).__name__} {weights_fingerprint(inner)}")
    others = [index for index, name in enumerate(found) if name != found[0]]
    if others:
        raise ValueError(
            f"Processes {others} hold another model, or other weights, than process 0. Load the same model in each."
        )


def features_of(block: BoundBlock, turns: Turns, add: Callable[..., None], neurons: bool) -> Iterator[RemovableHandle]:
    """Hooks that call `add(x, y)` or, with neurons, `add(x, y, h)` for each call of a block: its input, its output,
    and the activations of all its hidden neurons."""
    # A block that is called again before its last linear ran (none known) would be mixed up: a stack, not a slot.
    inputs, seen = [], {}

    def activated(module: nn.Module, args: Any, output: torch.Tensor) -> None:
        if not turns.is_of(block, module):
            return
        turns.done(module)
        # Kept neurons keep the native activation: what alpha adds to it is linear.
        if isinstance(module, CollapsibleActivation):
            output = module.act(args[0].clone() if is_inplace(module.act) else args[0])
        seen["activated"] = output

    def multiplied(module: nn.Module, args: Any, output: torch.Tensor) -> None:
        seen["up"] = block.layout.split(output, -1)[1] if block.layout.fused else output

    def before(module: nn.Module, args: Any) -> None:
        inputs.append(args[0])

    def after(module: nn.Module, args: Any, output: torch.Tensor) -> None:
        x = inputs.pop()
        if not neurons:
            add(x, output)
            return
        h = seen.pop("activated")
        add(x, output, h * seen.pop("up") if block.layout.gated else h)

    yield block.first.register_forward_pre_hook(before)
    yield block.down.register_forward_hook(after)
    if neurons:
        yield turns.announce(block)
        yield block.activation.register_forward_hook(activated)
    if neurons and block.layout.gated:
        yield block.up.register_forward_hook(multiplied)
