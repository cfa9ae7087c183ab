"""How much a change of a block's output matters to what the model predicts: the metric of the loss."""

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers.modeling_layers import GradientCheckpointingLayer

from . import functional
from .forward_passes import run_over
from .models import device_of
from .predictions import Predictions, predictions_of
from .rows import row_count, take
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
        matrix (`Tensor`): `G`, shape `(o, o)`, float64, in nats per prediction: the sum over tokens, divided by the
            number of predictions.
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
        return functional.shrunk(self.matrix, self.shrinkage)

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
        ValueError: As [`loss_metrics`].
    """
    model, inner, mask = engine.model, engine.inner, engine.tokens.token_mask_fn
    reason = why_no_gradients(inner)
    if reason is not None:
        return {}, MetricReport("variance", reason)
    started, batches = time.perf_counter(), engine.sample(MOST_ROWS, MOST_TOKENS)
    engine.progress.say("what outputs matter")
    room, layers = engine.room(device_of(inner)), []
    row, needed, plain = max(
        ((row, *_graph_of(model, inner, blocks, row, mask)) for row in _largest_rows(batches)),
        key=lambda seen: seen[1],
    )
    if needed > room:
        layers = [module for module in inner.modules() if isinstance(module, GradientCheckpointingLayer)]
        outside, again = _graph_of(model, inner, blocks, row, mask, layers)
        # Some layers ask themselves whether they train, for a dropout of their own.
        layers = layers if _same(plain, again) else []
        # What is kept outside of them, and one at a time on the way back.
        needed = outside + needed // len(layers) if layers else needed
    parts = [part for batch in batches for part in _parts_of(batch, max(1, room // max(needed, 1)))]
    engine.progress.expect(len(parts))
    metrics = loss_metrics(
        model, inner, blocks, parts, token_mask_fn=mask, checkpointed=layers, progress=engine.progress
    )
    rows = [row_count(part) or 1 for part in parts]
    report = MetricReport(
        kind="loss",
        seconds=time.perf_counter() - started,
        bytes=needed * max(rows),
        rows=sum(rows),
        tokens=metrics[blocks[0].name].tokens,
        checkpointed=bool(layers),
    )
    return metrics, report


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


def _graph_of(
    model: nn.Module,
    inner: Any,
    blocks: "Sequence[BoundBlock]",
    batch: Mapping[str, Any],
    token_mask_fn: Callable[..., Any] | None,
    layers: Sequence[nn.Module] = (),
) -> tuple[int, dict[str, LossMetric]]:
    """`(bytes that autograd keeps of a forward pass over a batch, the metrics of the blocks that it reaches)`;
    parameters, which are there anyway, do not count."""
    # Quantized weights are tensors of other classes, without a storage of their own.
    plain = (torch.Tensor, torch.nn.Parameter)
    known = {parameter.untyped_storage().data_ptr() for parameter in model.parameters() if type(parameter) in plain}
    seen = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if type(tensor) in plain:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in known:
                seen[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outcomes = _Outcomes(inner, blocks, TokenFilter(inner, token_mask_fn))
        outcomes.run(model, [batch], layers)
    return sum(seen.values()), outcomes.metrics(block for block in blocks if outcomes.sums[block.name].rows)


def _same(metrics: Mapping[str, LossMetric], others: Mapping[str, LossMetric]) -> bool:
    pairs = [(metric.matrix, others[name].matrix) for name, metric in metrics.items()]
    return all(functional.relative_error(*pair) < 1e-3 for pair in pairs)


# What the metric is measured on at most: rows, and tokens or patches in all. It is known well enough then.
MOST_ROWS, MOST_TOKENS = 512, 32_768


def loss_metrics(
    model: nn.Module,
    inner: Any,
    blocks: "Sequence[BoundBlock]",
    data: Iterable[Mapping[str, Any]],
    draws: int = 1,
    seed: int = 0,
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
        draws (`int`): How often outcomes are drawn for each prediction, at least 1.
        seed (`int`): Of what is drawn. No other random generator is used.
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
    outcomes = _Outcomes(inner, blocks, TokenFilter(inner, token_mask_fn), draws, seed)
    outcomes.run(model, data, checkpointed, progress)
    return outcomes.metrics(blocks)


class _Outcomes:
    """Draws outcomes of what a model predicts in a forward pass, and sends the gradients of their logarithms back to
    the blocks' outputs."""

    def __init__(
        self, inner: Any, blocks: "Sequence[BoundBlock]", tokens: TokenFilter, draws: int = 1, seed: int = 0
    ) -> None:
        self.inner, self.blocks, self.tokens, self.draws = inner, blocks, tokens, draws
        self.generator = torch.Generator().manual_seed(seed)
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
    ) -> None:
        """Runs the model over the data, forward and back."""
        with _frozen(model), layers_checkpointed(self.inner, checkpointed):
            hooks, read = partial(map, self._keep_output, self.blocks), self._send_back
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

    def _send_back(self, inputs: Mapping[str, Any], output: Any) -> None:
        found = predictions_of(self.inner, inputs, output)
        if not all(torch.isfinite(part.values).all() for part in found):
            raise ValueError(f"What this {type(self.inner).__name__} predicts for the calibration data is not finite.")
        self.predictions += max(part.values.shape[0] for part in found)
        reached = [part for part in found if part.values.requires_grad]
        for draw in range(self.draws if reached and self._calls else 0):
            self._add_gradients(reached, last=draw == self.draws - 1)
        self._calls.clear()

    def _add_gradients(self, predictions: Sequence[Predictions], last: bool) -> None:
        """One draw of an outcome for each prediction."""
        total = torch.stack([part.sampled_score(self.generator) for part in predictions]).sum()
        outputs = [output for *_, output in self._calls]
        self._backward = True
        grads = torch.autograd.grad(total, outputs, retain_graph=not last, allow_unused=True)
        self._backward = False
        for (block, mask, _), grad in zip(self._calls, grads, strict=True):
            if grad is not None:
                # An own module multiplies its output by this, and it is that product which is fitted.
                factor = block.scales[2]
                self.sums[block.name].add(grad / factor if factor != 1 else grad, mask)


class _GradientSums:
    def __init__(self) -> None:
        self.matrix, self.fourth, self.rows = torch.zeros((), dtype=torch.float64), 0.0, 0

    def add(self, grad: torch.Tensor, mask: torch.Tensor | None) -> None:
        rows = grad.reshape(-1, grad.shape[-1])
        if mask is not None:
            rows = rows[mask.to(rows.device).reshape(-1) > 0]
        rows = rows.float()
        self.matrix = self.matrix.to(rows.device) + (rows.T @ rows).double()
        self.fourth += float(rows.square().sum(1).double().square().sum())
        self.rows += rows.shape[0]

    def finish(self, block: "BoundBlock", predictions: int, draws: int) -> LossMetric:
        if not self.rows:
            raise ValueError(
                f"No gradient reaches block {block.name}: what the model predicts does not depend on it, or its code "
                "runs without gradients."
            )
        if not torch.isfinite(self.matrix).all():
            raise ValueError(f"The gradients that reach block {block.name} are not finite.")
        shrinkage = functional.shrinkage(self.matrix / self.rows, self.fourth / self.rows, self.rows)
        return LossMetric(self.matrix / (predictions * draws), shrinkage, self.rows // draws, predictions)


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
