"""How much a change of a block's output matters to what the model predicts: the metric of the loss."""

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import recursively_apply
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.hooks import RemovableHandle
from transformers.modeling_layers import GradientCheckpointingLayer

from . import functional, processes
from .forward_passes import run_over
from .models import device_of
from .moments import NARROW_FEATURES
from .predictions import Predictions, number_of, predictions_of
from .rows import bytes_of, row_count, take
from .token_filter import TokenFilter
from .upstream import layers_checkpointed


if TYPE_CHECKING:
    from .blocks import BoundBlock
    from .calibration import Calibration
    from .progress import Progress


@dataclass(frozen=True)
class LossMetric:
    """`G = E[g g^T]` of one block, `g` the gradient of `log p(y)` at its output and `y` drawn from the model's own
    predictions: the Fisher information of what the model predicts, as a function of the block's output.

    A change of the output with covariance `R` over tokens costs about `1/2 tr(G R)` nats of KL divergence a prediction
    (for embeddings: of cosine distance).

    Args:
        matrix (`Tensor`): `G`, shape `(o, o)`, float64 or of wide blocks float32, in nats per prediction: the sum over
            tokens, divided by the number of predictions.
        shrinkage (`float`): In [0, 1], how much of it is to be replaced by a multiple of the identity of the same
            trace, see [`functional.shrinkage`].
        tokens (`int`), predictions (`int`): What it was measured on.
    """

    matrix: torch.Tensor
    shrinkage: float
    tokens: int
    predictions: int

    def shrunk(self) -> torch.Tensor:
        """`G`, as far as so few tokens tell."""
        return functional.shrunk(self.matrix.double(), self.shrinkage)

    def root(self) -> torch.Tensor:
        """The symmetric `S` with `S S = G`: what outputs are multiplied by to be measured in the metric."""
        return functional.psd_root(self.shrunk())


@dataclass(frozen=True)
class MetricReport:
    """How the metric of the loss was measured, or why it was not.

    Args:
        kind (`str`): `"loss"`; `"variance"` where no backward pass is possible, so that every direction of a block's
            output counts alike, and every block.
        reason (`str`, *optional*): Why it is not the loss.
        seconds (`float`): What it took.
        bytes (`int`): Largest memory that one batch's activations took, about.
        rows, tokens (`int`): What was looked at; tokens as the first block sees them.
        checkpointed (`bool`): Whether layers ran twice, to keep fewer activations.
    """

    kind: str
    reason: str | None = None
    seconds: float = 0.0
    bytes: int = 0
    rows: int = 0
    tokens: int = 0
    checkpointed: bool = False

    def __str__(self) -> str:
        if self.kind != "loss":
            return f"chosen by output variance, not by the metric of the loss: {self.reason}"
        twice = ", layers run twice" if self.checkpointed else ""
        return (
            f"metric of the loss: {self.seconds:.0f} s and {self.bytes / 1e6:,.0f} MB for {self.rows:,} rows "
            f"({self.tokens:,} tokens){twice}"
        )


def measure_metrics(
    engine: "Calibration", blocks: "Sequence[BoundBlock]"
) -> tuple[dict[str, LossMetric], MetricReport]:
    """`(metrics, report)`: the [`LossMetric`] of every block from a sample of the data, within the memory; none where
    no backward pass is possible, as the report says.

    Batches that take more memory than there is are taken in parts; where one row does, layers that transformers can
    checkpoint keep their inputs only, and run again in the backward pass.

    Args:
        engine ([`Calibration`]): Of the model, on the data.
        blocks (`list[BoundBlock]`): Dense or patched.

    Raises:
        ValueError: As [`loss_metrics`], or there is too little memory: for the sums of all blocks, which are held from
            here on, or for one row's backward pass.
    """
    reason = _why_not(engine)
    if reason is not None:
        return {}, MetricReport("variance", reason)
    started = time.perf_counter()
    engine.memory.hold_all(held_by_metrics(engine, blocks))
    engine.progress.say("what outputs matter")
    most_bytes = max(0, engine.room(torch.device("cpu"))) // SAMPLE_SHARE
    batches = engine.sample(MOST_ROWS, MOST_TOKENS, most_bytes)
    with processes.together():
        metrics, report = _measured(engine, blocks, batches)
    report = replace(report, seconds=time.perf_counter() - started)
    return _of_the_first(metrics), report


def held_by_metrics(engine: "Calibration", blocks: "Sequence[BoundBlock]") -> Counter[torch.device]:
    """What [`measure_metrics`] of these blocks will hold from then on, in bytes, by device.

    Raises:
        ValueError: There is too little memory for that.
    """
    if _why_not(engine) is not None:
        return Counter()
    kept = bytes_of_metrics(blocks)
    with processes.together():
        if not engine.memory.fits(kept):
            raise ValueError(
                f"The metric of the loss takes {engine.memory.told(kept)}, for what it sums up at the outputs of "
                f"{len(blocks)} blocks: raise `max_memory`."
            )
    return kept


def _why_not(engine: "Calibration") -> str | None:
    """Why there is no metric. Where one process has none, none has."""
    return next((found for found in processes.gathered(why_no_gradients(engine.inner)) if found is not None), None)


def _of_the_first(metrics: Mapping[str, LossMetric]) -> dict[str, LossMetric]:
    """The first process's metrics, on all: rounding can tip a choice that they make."""
    processes.spread([metric.matrix for metric in metrics.values()])
    told = processes.of_the_first([metric.shrinkage for metric in metrics.values()])
    pairs = zip(metrics.items(), told, strict=True)
    return {name: replace(metric, shrinkage=shrinkage) for (name, metric), shrinkage in pairs}


def _measured(
    engine: "Calibration", blocks: "Sequence[BoundBlock]", batches: Sequence[Mapping[str, Any]]
) -> tuple[dict[str, LossMetric], MetricReport]:
    """The same of these batches, within the memory that is left."""
    model, inner, mask, memory = engine.model, engine.inner, engine.tokens.token_mask_fn, engine.memory
    # Beside the sums there are the batches, and what is added to one of the sums.
    taken = bytes_of(batches)
    for device in bytes_of_metrics(blocks):
        taken[device] += max(_bytes_of_metric(block) for block in blocks if device_of(block.down) == device)
    with memory.holding(taken):
        padded = any(_has_padding(batch) for batch in batches)
        needed, layers = _need_of_a_row(engine, blocks, _largest_rows(batches), padded)
        if not memory.fits(needed):
            raise ValueError(
                f"A backward pass of one row of the calibration data takes {memory.told(needed)} beside the metric of "
                "the loss: raise `max_memory`, or pass shorter rows."
            )
        parts = [part for batch in batches for part in _parts_of(batch, max(1, memory.times(needed)))]
        engine.progress.expect(len(parts))
        metrics = loss_metrics(
            model, inner, blocks, parts, token_mask_fn=mask, checkpointed=layers, progress=engine.progress
        )
    rows = [row_count(part) or 1 for part in parts]
    report = MetricReport(
        kind="loss",
        bytes=sum(needed.values()) * max(rows),
        rows=sum(rows),
        tokens=metrics[blocks[0].name].tokens,
        checkpointed=bool(layers),
    )
    return metrics, report


def bytes_of_metrics(blocks: "Iterable[BoundBlock]") -> Counter[torch.device]:
    """What the [`LossMetric`] of every block takes, in bytes, by device."""
    taken: Counter[torch.device] = Counter()
    for block in blocks:
        taken[device_of(block.down)] += _bytes_of_metric(block)
    return taken


def _bytes_of_metric(block: "BoundBlock") -> int:
    return _precision_of(block.out_features).itemsize * block.out_features**2


def _precision_of(outputs: int) -> torch.dtype:
    """Float64 where it costs next to nothing. Products of gradients are float32 in any case."""
    return torch.float64 if outputs <= NARROW_FEATURES else torch.float32


def why_no_gradients(inner: Any) -> str | None:
    """Why no gradient can be had of the activations of a model; `None` if it can."""
    if any(parameter.is_meta for parameter in inner.parameters()):
        return "some weights are offloaded, and a backward pass would bring all of them into memory at once"
    quantizer = vars(inner).get("hf_quantizer")
    if quantizer is not None and not quantizer.is_trainable:
        return f"weights are quantized by {type(quantizer).__name__}, which has no backward pass"
    return None


def _largest_rows(batches: Iterable[Mapping[str, Any]]) -> list[Any]:
    """The largest row of each kind of batch: a model may send texts, images, queries or documents different ways."""
    largest: dict[str, tuple[float, Any]] = {}
    for batch in batches:
        kind = repr([(n, None if isinstance(value, torch.Tensor) else value) for n, value in sorted(batch.items())])
        size = _numbers_of(batch) / (row_count(batch) or 1)
        if kind not in largest or size > largest[kind][0]:
            largest[kind] = size, batch
    return [take(batch, [0]) for _, batch in largest.values()]


def _numbers_of(batch: Mapping[str, Any]) -> int:
    return sum(value.numel() for value in batch.values() if isinstance(value, torch.Tensor))


def _parts_of(batch: Mapping[str, Any], rows: int) -> list[Any]:
    """The batch in parts of so many rows at most, or whole where it has none."""
    count = row_count(batch)
    if count is None or count <= rows:
        return [batch]
    return [take(batch, range(start, min(start + rows, count))) for start in range(0, count, rows)]


def _has_padding(batch: Mapping[str, Any]) -> bool:
    masks = (batch.get(name) for name in ("attention_mask", "decoder_attention_mask"))
    return any(isinstance(mask, torch.Tensor) and not bool((mask > 0).all()) for mask in masks)


def _need_of_a_row(
    engine: "Calibration", blocks: "Sequence[BoundBlock]", rows: Sequence[Mapping[str, Any]], padded: bool = False
) -> tuple[Counter[torch.device], list[nn.Module]]:
    """`(bytes that a backward pass of the row that takes most holds, by device; the layers to run twice)`. Nothing is
    kept to learn it, and layers run twice only where their memory is wanted. Padded: whether rows that run with it may
    have padding."""
    layers: list[nn.Module] = [m for m in engine.inner.modules() if isinstance(m, GradientCheckpointingLayer)]
    found = [(row, _Kept(engine, blocks, padded).of(row, layers)) for row in rows]
    row, plain = max(found, key=lambda pair: sum(pair[1].bytes.values()))
    if engine.memory.fits(plain.bytes) or not layers:
        return plain.bytes, []
    twice = _Kept(engine, blocks, padded).of(row, layers, checkpointed=True)
    # Some layers ask themselves whether they train, for a dropout of their own.
    if not _same(plain.lengths, twice.lengths):
        return plain.bytes, []
    # What is kept outside of them, and of one at a time on the way back.
    inside = max(plain.inside, key=lambda counts: sum(counts.values()))
    return twice.kept + inside + plain.back, layers


class _Kept:
    """How much a forward pass and the way back would hold, of which nothing is kept here: what autograd keeps, what
    the model gives, and what is made on the way back. Parameters, which are there anyway, do not count.

    Args:
        engine ([`Calibration`]): Of the model.
        blocks (`list[BoundBlock]`): Whose outputs' gradients are wanted.
        padded (`bool`): Whether other rows, beside which the row runs, have padding.
    """

    def __init__(self, engine: "Calibration", blocks: "Sequence[BoundBlock]", padded: bool = False) -> None:
        self.engine, self.padded = engine, padded
        self.outcomes = _Outcomes(engine.inner, blocks, TokenFilter(engine.model, engine.tokens.token_mask_fn))
        parameters = [p for p in engine.model.parameters() if type(p) in _WITH_STORAGE]
        self.known = {parameter.untyped_storage().data_ptr() for parameter in parameters}
        # By storage: a reference that keeps no bytes, and by which two in one place after each other are two.
        self.seen: dict[StorageWeakRef, tuple[torch.device, int]] = {}
        self.inside: list[Counter[torch.device]] = []  # of each call of a layer
        self.back: Counter[torch.device] = Counter()  # at most at a time, beside what is kept
        self.lengths: list[torch.Tensor] = []  # of the blocks' outputs, by which two passes are compared

    def of(self, row: Mapping[str, Any], layers: Sequence[nn.Module], checkpointed: bool = False) -> "_Kept":
        """Runs the model over a row."""
        begun: list[int] = []

        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            begun.append(len(self.seen))
            if checkpointed:
                # Their inputs are kept.
                recursively_apply(self._add, [list(args), list(kwargs.values())])

        def after(*_: Any) -> None:
            self.inside.append(_by_device(list(self.seen.values())[begun.pop() :]))

        with contextlib.ExitStack() as stack:
            for layer in layers:
                stack.callback(layer.register_forward_pre_hook(before, with_kwargs=True).remove)
                stack.callback(layer.register_forward_hook(after).remove)
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(self._pack, lambda kept: kept))
            self.outcomes.run(self.engine.model, [row], layers if checkpointed else (), read=self._read)
        return self

    @property
    def kept(self) -> Counter[torch.device]:
        """What is there when the way back begins, in bytes, by device."""
        return _by_device(self.seen.values())

    @property
    def bytes(self) -> Counter[torch.device]:
        """How much in all, by device."""
        return self.kept + self.back

    def _add(self, tensor: torch.Tensor) -> None:
        # Quantized weights are tensors of other classes, without a storage of their own.
        if type(tensor) in _WITH_STORAGE and tensor.untyped_storage().data_ptr() not in self.known:
            storage = tensor.untyped_storage()
            self.seen[StorageWeakRef(storage)] = tensor.device, storage.nbytes()

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        self._add(tensor)
        return tensor.new_empty(0)

    def _read(self, inputs: Mapping[str, Any], output: Any) -> None:
        found = self.outcomes.predictions_of(inputs, output)
        reached = [part for part in found if part.values.requires_grad]
        given = [value for value in output.values() if isinstance(value, torch.Tensor)]
        self.back = _on_the_way_back(self.seen.values()) | _made_of(reached, given, self.padded)
        for value in given:
            self._add(value)
        if reached:
            self.outcomes.score_of(reached)
        for called in self.outcomes.called():
            self.lengths.append(called.detach().float().norm(dim=-1))
            # It is kept, and so is its gradient.
            self._add(called)
            self._add(torch.empty_like(called))


def _on_the_way_back(kept: Iterable[tuple[torch.device, int]]) -> Counter[torch.device]:
    """What an operation holds at most: the gradient of what it gave, and, of a product, those of both factors."""
    most: Counter[torch.device] = Counter()
    for device, count in kept:
        most |= Counter({device: 3 * count})
    return most


def _made_of(predictions: Sequence[Predictions], given: Sequence[torch.Tensor], padded: bool) -> Counter[torch.device]:
    """What is drawn for predictions; or then their gradients; and a copy of those that are no padding."""
    largest = max(given, key=_bytes)
    storages = {value.untyped_storage().data_ptr() for value in given}
    copies, drawn, gradients = Counter[torch.device](), Counter[torch.device](), Counter[torch.device]()
    for part in predictions:
        values, where = part.values, part.values.device
        as_given = values.untyped_storage().data_ptr() in storages
        selected = padded or not as_given
        if selected:
            # The gradient of what is selected is put into zeros, and those are copied.
            gradients[where] += 3 * _bytes(largest)
        else:
            # What stands before a matrix product is of the hidden width. Before a cast or a scale it is not.
            gradients[where] += _bytes(values) + (0 if _is_product(values) else _bytes(largest))
        if padded and as_given:
            copies[where] += _bytes(values)
        if part.kind == "classes":
            drawn |= Counter({torch.device("cpu"): _DRAWN * (largest if selected else values).numel()})
    return copies + (drawn | gradients)


# Bytes of a number that is drawn: float32, and the float64 that MKL makes it from.
_DRAWN = torch.float32.itemsize + torch.float64.itemsize


def _bytes(values: torch.Tensor) -> int:
    return values.numel() * values.element_size()


def _is_product(values: torch.Tensor) -> bool:
    """Whether a matrix product made them, perhaps in another shape."""
    node = values.grad_fn
    while node is not None and "View" in node.name():
        node = node.next_functions[0][0]
    return node is not None and node.name() in ("AddmmBackward0", "MmBackward0")


_WITH_STORAGE = (torch.Tensor, nn.Parameter)


def _by_device(counts: Iterable[tuple[torch.device, int]]) -> Counter[torch.device]:
    taken: Counter[torch.device] = Counter()
    for device, count in counts:
        taken[device] += count
    return taken


def _same(lengths: Sequence[torch.Tensor], again: Sequence[torch.Tensor]) -> bool:
    return all(functional.relative_error(*pair) < 1e-3 for pair in zip(lengths, again, strict=True))


# What the metric is measured on at most: rows, and tokens or patches in all. It is known well enough then.
MOST_ROWS, MOST_TOKENS = 512, 32_768

# Of so many parts of the memory that is left, one may go to the inputs that it is measured on: images are large.
SAMPLE_SHARE = 2


def loss_metrics(
    model: nn.Module,
    inner: Any,
    blocks: "Sequence[BoundBlock]",
    data: Iterable[Mapping[str, Any]],
    draws: int = 1,
    token_mask_fn: Callable[..., Any] | None = None,
    checkpointed: Sequence[nn.Module] = (),
    progress: "Progress | None" = None,
) -> dict[str, LossMetric]:
    """The [`LossMetric`] of every block, from `draws` backward passes over the data. Needs no labels.

    Only gradients of activations are computed, from the first block's output on; parameters get none, and are as
    before afterwards, as is the mode of the model.

    Args:
        model (`nn.Module`): Runs the data; `inner` is what it wraps.
        blocks (`list[BoundBlock]`): Dense or patched.
        data (iterable of `dict[str, Tensor]`): Model inputs.
        draws (`int`): How often outcomes are drawn for each prediction, at least 1; the same ones for the same data,
            with a random generator of its own.
        token_mask_fn (`Callable`, *optional*): See [`TokenFilter`].
        checkpointed (`Sequence[GradientCheckpointingLayer]`): Layers that keep their inputs only, and run again in the
            backward pass.
        progress ([`Progress`], *optional*): Told of every batch.

    Returns:
        Block name -> [`LossMetric`].

    Raises:
        ValueError: The model's outputs are no predictions, no gradient reaches a block, or predictions or gradients
            are not finite.
    """
    outcomes = _Outcomes(inner, blocks, TokenFilter(model, token_mask_fn), draws)
    outcomes.run(model, data, checkpointed, progress)
    return outcomes.metrics(blocks)


class _Outcomes:
    """Draws outcomes of what a model predicts in a forward pass, and sends the gradients of their logarithms back to
    the blocks' outputs."""

    def __init__(self, inner: Any, blocks: "Sequence[BoundBlock]", tokens: TokenFilter, draws: int = 1) -> None:
        self.inner, self.blocks, self.tokens, self.draws = inner, blocks, tokens, draws
        self.generator = torch.Generator().manual_seed(0)
        self.sums = {block.name: _GradientSums() for block in blocks}
        self.predictions = 0
        # The block, a mask of its tokens, and its output, of one forward.
        self._calls: list[tuple[BoundBlock, torch.Tensor | None, torch.Tensor]] = []
        self._backward = False  # where layers may run again

    def run(
        self,
        model: nn.Module,
        data: Iterable[Mapping[str, Any]],
        checkpointed: Sequence[nn.Module] = (),
        progress: "Progress | None" = None,
        read: "Callable[[Any, Any], None] | None" = None,
    ) -> None:
        """Runs the model over the data, forward and back, or with `read(inputs, output)` forward."""
        with _frozen(model), layers_checkpointed(self.inner, checkpointed):
            hooks, read = partial(map, self._keep_output, self.blocks), read or self._send_back
            run_over(model, self.inner, data, hooks, progress, self.tokens, gradients=True, outputs=read)

    def metrics(self, blocks: "Iterable[BoundBlock]") -> dict[str, LossMetric]:
        """Block name -> its [`LossMetric`]."""
        return {block.name: self.sums[block.name].finish(block, self.predictions, self.draws) for block in blocks}

    def _keep_output(self, block: "BoundBlock") -> RemovableHandle:
        def hook(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
            # The first block is where the graph begins. A clone goes on: code that adds in place may follow.
            start = output if output.requires_grad else output.detach().requires_grad_()
            if not self._backward:
                self._calls.append((block, self.tokens.mask(block, output.shape[:-1]), start))
            return start.clone()

        return block.down.register_forward_hook(hook)

    def predictions_of(self, inputs: Mapping[str, Any], output: Any) -> list[Predictions]:
        """What the model predicts.

        Raises:
            ValueError: It is not finite, or no predictions.
        """
        found = predictions_of(self.inner, inputs, output)
        if not all(functional.is_finite(part.values.detach()) for part in found):
            raise ValueError(f"What this {type(self.inner).__name__} predicts for the calibration data is not finite.")
        return found

    def score_of(self, predictions: Sequence[Predictions]) -> torch.Tensor:
        """The score of one draw of an outcome for each prediction."""
        return torch.stack([part.sampled_score(self.generator) for part in predictions]).sum()

    def called(self) -> list[torch.Tensor]:
        """The outputs of the blocks in the last forward."""
        return [output for *_, output in self._calls]

    def _send_back(self, inputs: Mapping[str, Any], output: Any) -> None:
        found = self.predictions_of(inputs, output)
        self.predictions += number_of(found)
        reached = [part for part in found if part.values.requires_grad]
        for draw in range(self.draws if reached and self._calls else 0):
            self._add_gradients(reached, last=draw == self.draws - 1)
        self._calls.clear()

    def _add_gradients(self, predictions: Sequence[Predictions], last: bool) -> None:
        """One draw of an outcome for each prediction."""
        total = self.score_of(predictions)
        self._backward = True
        grads = torch.autograd.grad(total, self.called(), retain_graph=not last, allow_unused=True)
        self._backward = False
        for (block, mask, _), grad in zip(self._calls, grads, strict=True):
            if grad is not None:
                # An own module multiplies its output by this, and it is that product which is fitted.
                factor = block.scales[2]
                self.sums[block.name].add(grad / factor if factor != 1 else grad, mask)


class _GradientSums:
    def __init__(self) -> None:
        self.matrix: torch.Tensor | None = None
        self.fourth, self.rows = 0.0, 0

    def add(self, grad: torch.Tensor, mask: torch.Tensor | None) -> None:
        rows = grad.reshape(-1, grad.shape[-1])
        if mask is not None:
            rows = rows[mask.to(rows.device).reshape(-1) > 0]
        rows = rows.float()
        if self.matrix is None:
            width = rows.shape[1]
            self.matrix = torch.zeros(width, width, dtype=_precision_of(width), device=rows.device)
        self.matrix.add_(rows.T @ rows)
        self.fourth += float(rows.square().sum(1).double().square().sum())
        self.rows += rows.shape[0]

    def finish(self, block: "BoundBlock", predictions: int, draws: int) -> LossMetric:
        """The metric. The sums are used up."""
        if self.matrix is None or not self.rows:
            raise ValueError(
                f"No gradient reaches block {block.name}: what the model predicts does not depend on it, or its code "
                "runs without gradients."
            )
        # No product is larger than the squares on the diagonal.
        if not torch.isfinite(self.matrix.diagonal()).all():
            raise ValueError(f"The gradients that reach block {block.name} are not finite.")
        matrix, of_a_row = self.matrix.div_(predictions * draws), predictions * draws / self.rows
        del self.matrix
        # By prediction in place of by token, which is another unit.
        fourth = self.fourth / self.rows / of_a_row**2
        return LossMetric(matrix, functional.shrinkage(matrix, fourth, self.rows), self.rows // draws, predictions)


@contextlib.contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No parameter wants a gradient inside: none is computed, and nothing is kept for it."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
