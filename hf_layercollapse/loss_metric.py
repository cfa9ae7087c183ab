"""How much a change of a block's output matters to what the model predicts: the metric of the loss."""

import contextlib
import time
from dataclasses import dataclass

import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from . import functional
from .forward_passes import run_over
from .models import device_of
from .predictions import predictions_of
from .rows import row_count, take
from .token_filter import TokenFilter
from .upstream import layers_checkpointed


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

    def shrunk(self):
        """`G`, as far as so few tokens tell."""
        return functional.shrunk(self.matrix, self.shrinkage)

    def root(self):
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

    def __str__(self):
        if self.kind != "loss":
            return f"chosen by output variance, not by the metric of the loss: {self.reason}"
        twice = ", layers run twice" if self.checkpointed else ""
        return (
            f"metric of the loss: {self.seconds:.0f} s and {self.bytes / 1e6:,.0f} MB for {self.rows:,} rows "
            f"({self.tokens:,} tokens){twice}"
        )


def measure_metrics(engine, blocks):
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
    how = {"token_mask_fn": mask, "checkpointed": layers, "progress": engine.progress}
    metrics = loss_metrics(model, inner, blocks, parts, **how)
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


def why_no_gradients(inner) -> str | None:
    """Why no gradient can be had of the activations of a model; `None` if it can."""
    if any(parameter.is_meta for parameter in inner.parameters()):
        return "some weights are offloaded, and a backward pass would bring all of them into memory at once"
    quantizer = vars(inner).get("hf_quantizer")
    if quantizer is not None and not quantizer.is_trainable:
        return f"weights are quantized by {type(quantizer).__name__}, which has no backward pass"
    return None


def _largest_rows(batches):
    """The largest row of each kind of batch: a model may send texts, images, queries or documents different ways."""
    largest = {}
    for batch in batches:
        kind = repr([(n, None if isinstance(value, torch.Tensor) else value) for n, value in sorted(batch.items())])
        size = _numbers_of(batch) / (row_count(batch) or 1)
        if kind not in largest or size > largest[kind][0]:
            largest[kind] = size, batch
    return [take(batch, [0]) for _, batch in largest.values()]


def _numbers_of(batch):
    return sum(value.numel() for value in batch.values() if isinstance(value, torch.Tensor))


def _parts_of(batch, rows):
    """The batch in parts of so many rows at most, or whole where it has none."""
    count = row_count(batch)
    if count is None or count <= rows:
        return [batch]
    return [take(batch, range(start, min(start + rows, count))) for start in range(0, count, rows)]


def _graph_of(model, inner, blocks, batch, token_mask_fn, layers=()):
    """`(bytes that autograd keeps of a forward pass over a batch, the metrics of the blocks that it reaches)`;
    parameters, which are there anyway, do not count."""
    # Quantized weights are tensors of other classes, without a storage of their own.
    plain = (torch.Tensor, torch.nn.Parameter)
    known = {parameter.untyped_storage().data_ptr() for parameter in model.parameters() if type(parameter) in plain}
    seen = {}

    def pack(tensor):
        if type(tensor) in plain:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in known:
                seen[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        sums, predictions = _gradients(model, inner, blocks, [batch], token_mask_fn=token_mask_fn, checkpointed=layers)
    reached = [block for block in blocks if sums[block.name].rows]
    return sum(seen.values()), {block.name: sums[block.name].finish(block, predictions, 1) for block in reached}


def _same(metrics, others):
    pairs = [(metric.matrix, others[name].matrix) for name, metric in metrics.items()]
    return all(functional.relative_error(*pair) < 1e-3 for pair in pairs)


# What the metric is measured on at most: rows, and tokens or patches in all. It is known well enough then.
MOST_ROWS, MOST_TOKENS = 512, 32_768


def loss_metrics(model, inner, blocks, data, draws=1, **how):
    """The [`LossMetric`] of every block, from `draws` backward passes over the data. Needs no labels.

    Only gradients of activations are computed, from the first block's output on; parameters get none, and are as
    before afterwards, as is the mode of the model.

    Args:
        model (`nn.Module`): Runs the data; `inner` is what it wraps.
        blocks (`list[BoundBlock]`): Dense or patched.
        data (iterable of `dict[str, Tensor]`): Model inputs.
        draws (`int`): How often outcomes are drawn for each prediction, at least 1.
        how: Any of:
        seed (`int`): Of what is drawn. No other random generator is used. Default: 0.
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
    sums, predictions = _gradients(model, inner, blocks, data, draws, **how)
    return {block.name: sums[block.name].finish(block, predictions, draws) for block in blocks}


def _gradients(model, inner, blocks, data, draws=1, seed=0, token_mask_fn=None, checkpointed=(), progress=None):
    """`(block name -> sums of its gradients, predictions)`; see [`loss_metrics`]."""
    generator = torch.Generator().manual_seed(seed)
    tokens = TokenFilter(inner, token_mask_fn)
    sums = {block.name: _GradientSums() for block in blocks}
    calls = []  # (block, mask of its tokens, output) of one forward
    backward = False  # where layers may run again

    def observe(block):
        # An own module multiplies its output by this, and it is that product which is fitted.
        factor = block.scales[2]

        def hook(module, args, output):
            # The first block is where the graph begins. A clone goes on: code that adds in place may follow.
            start = output if output.requires_grad else output.detach().requires_grad_()
            if not backward:
                calls.append((block, factor, tokens.mask(block, output.shape[:-1]), start))
            return start.clone()

        return block.down.register_forward_hook(hook)

    predictions = 0

    def finish(inputs, output):
        nonlocal predictions, backward
        found = predictions_of(inner, inputs, output)
        if not all(torch.isfinite(part.values).all() for part in found):
            raise ValueError(f"What this {type(inner).__name__} predicts for the calibration data is not finite.")
        predictions += max(part.values.shape[0] for part in found)
        reached = [part for part in found if part.values.requires_grad]
        for draw in range(draws if reached and calls else 0):
            total = sum(part.sampled_score(generator) for part in reached)
            outputs = [output for *_, output in calls]
            last = draw == draws - 1
            backward = True
            grads = torch.autograd.grad(total, outputs, retain_graph=not last, allow_unused=True)
            backward = False
            for (block, factor, mask, _), grad in zip(calls, grads, strict=True):
                if grad is not None:
                    sums[block.name].add(grad / factor if factor != 1 else grad, mask)
        calls.clear()

    def observers():
        return map(observe, blocks)

    with _frozen(model), layers_checkpointed(inner, checkpointed):
        run_over(model, inner, data, observers, progress, tokens, gradients=True, outputs=finish)
    return sums, predictions


class _GradientSums:
    def __init__(self):
        self.matrix, self.fourth, self.rows = 0.0, 0.0, 0

    def add(self, grad, mask):
        rows = grad.reshape(-1, grad.shape[-1])
        if mask is not None:
            rows = rows[mask.to(rows.device).reshape(-1) > 0]
        rows = rows.float()
        self.matrix = self.matrix + (rows.T @ rows).double()
        self.fourth += float(rows.square().sum(1).double().square().sum())
        self.rows += rows.shape[0]

    def finish(self, block, predictions, draws):
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
def _frozen(model):
    """No parameter wants a gradient inside: none is computed, and nothing is kept for it."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
