"""How much a change of a block's output matters to what the model predicts: the metric of the loss."""

import contextlib
from dataclasses import dataclass

import torch

from . import functional
from .calibration import TokenFilter, run_over
from .predictions import predictions_of


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


# What the metric is measured on at most: rows, and tokens or patches in all. It is known well enough then.
MOST_ROWS, MOST_TOKENS = 512, 32_768


def sample(data, rows=MOST_ROWS, tokens=MOST_TOKENS) -> list:
    """Some batches from all over the data, of about so many rows and tokens at most, at least one.

    Args:
        data (iterable of `dict[str, Tensor]`): Read once, held as inputs.
    """
    batches = list(data)
    sizes = [_size_of(batch) for batch in batches]
    share = min(1.0, rows / max(1, sum(r for r, _ in sizes)), tokens / max(1, sum(t for _, t in sizes)))
    count = max(1, int(share * len(batches)))
    return [batches[index * len(batches) // count] for index in range(count)] if batches else []


def _size_of(batch):
    """`(rows, tokens)` of a batch; pixels count as no tokens."""
    first = next(value for value in batch.values() if isinstance(value, torch.Tensor) and value.dim())
    return first.shape[0], first.numel() if first.dim() == 2 else 0


def loss_metrics(model, inner, blocks, data, draws=1, seed=0, token_mask_fn=None):
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

    Returns:
        Block name -> [`LossMetric`].

    Raises:
        ValueError: The model's outputs are no predictions, no gradient reaches a block, or gradients are not finite.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens = TokenFilter(inner, token_mask_fn)
    sums = {block.name: _GradientSums() for block in blocks}
    calls = []  # (block, mask of its tokens, output) of one forward

    def observe(block):
        # An own module multiplies its output by this, and it is that product which is fitted.
        factor = block.scales[2]

        def hook(module, args, output):
            # The first block is where the graph begins. A clone goes on: code that adds in place may follow.
            start = output if output.requires_grad else output.detach().requires_grad_()
            calls.append((block, factor, tokens.mask(block, output.shape[:-1]), start))
            return start.clone()

        return block.down.register_forward_hook(hook)

    predictions = 0

    def finish(module, args, kwargs, output):
        nonlocal predictions
        found = predictions_of(inner, kwargs, output)
        predictions += max(part.values.shape[0] for part in found)
        reached = [part for part in found if part.values.requires_grad]
        for draw in range(draws if reached and calls else 0):
            total = sum(part.sampled_score(generator) for part in reached)
            outputs = [output for *_, output in calls]
            last = draw == draws - 1
            grads = torch.autograd.grad(total, outputs, retain_graph=not last, allow_unused=True)
            for (block, factor, mask, _), grad in zip(calls, grads, strict=True):
                if grad is not None:
                    sums[block.name].add(grad / factor if factor != 1 else grad, mask)
        calls.clear()

    handles = [observe(block) for block in blocks]
    handles.append(model.register_forward_hook(finish, with_kwargs=True))
    with _frozen(model):
        run_over(model, data, handles, "Measuring what outputs matter", tokens, gradients=True)
    return {block.name: sums[block.name].finish(block, predictions, draws) for block in blocks}


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
