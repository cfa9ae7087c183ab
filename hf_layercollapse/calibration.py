"""Passes over calibration data: sums over tokens, never the activations themselves."""

import math
from dataclasses import dataclass, replace
from typing import Any

import psutil
import torch
from accelerate.utils import convert_file_size_to_int
from torch import nn
from tqdm.auto import tqdm
from transformers.modeling_utils import PreTrainedModel

from . import functional
from .modeling_layercollapse import CollapsibleActivation, is_inplace
from .models import device_of, evaluating, inputs_of
from .rows import DistinctRows


# Tokens whose products are summed in float32 before they are added to the float64 totals.
FLUSH_TOKENS = 4096

# Up to this many features float64 products cost next to nothing beside the model, and are used.
NARROW_FEATURES = 256

# A token whose output is longer than this many times the median counts less, so that its squared error weighs as much
# as one at that length. Ordinary models have none; in decoders the first token's output is hundreds of times longer
# and would decide the fit alone.
OUTLIER_LENGTH = 8.0

# Calibration tokens for each dimension that they span. Below the first a fit is one of noise (MiniLM with 1.14 of them
# has an error of 1.2 on other text); from the second on, how many dimensions there are hardly matters.
LEAST_TOKENS, RICH_TOKENS = 1.25, 20

# Tokens that the lines of affine targets need, five for each of two numbers. With 3 a block of MiniLM is off by 0.75
# on other text, with 15 by 0.54, with 60 by 0.45, with thousands by 0.42.
LINE_TOKENS = 10

# Share of the free memory that sums over the data may take, if nothing else is said; and how many copies of one
# block's sums it takes to work out sizes and fits from them.
FREE_SHARE, WORKING_COPIES = 0.5, 3

# Neurons whose moments are collected for each one that is to be kept; the choice among them is by least squares.
CANDIDATES_PER_NEURON = 4


@dataclass(frozen=True)
class BlockMoments:
    """First and second moments of a block's features `f = [x, h_C]` and output `y`, over weighted tokens.

    Args:
        tokens (`int`): Tokens that were counted, of different rows.
        dimensions (`float`): How many the features span on them; all, where there are many tokens for each.
        width (`int`): Input width, the size of `x`.
        neurons (`list[int]`): Hidden indices `C` of the other features.
        mean_f, mean_o, cov_ff, cov_fo, cov_oo (`Tensor`): Centred, float64.
        constant (`bool`): Whether a fit has a constant term. Without one the last three are about the origin.
        ridge (`float`): Of fits, above the rounding noise of the sums.
    """

    tokens: int
    dimensions: float
    width: int
    neurons: list[int]
    mean_f: torch.Tensor
    mean_o: torch.Tensor
    cov_ff: torch.Tensor
    cov_fo: torch.Tensor
    cov_oo: torch.Tensor
    constant: bool = True
    ridge: float = functional.RIDGE

    @property
    def var_o(self):
        """Variance of each output, or without a constant term its mean square."""
        return self.cov_oo.diagonal().clamp_min(0)

    def without_constant(self):
        """The same for fits that have no constant term: least squares through the origin."""
        moments = self.mean_f, self.mean_o, self.cov_ff, self.cov_fo, self.cov_oo
        cov_ff, cov_fo, cov_oo = functional.about_origin(*moments)
        return replace(self, cov_ff=cov_ff, cov_fo=cov_fo, cov_oo=cov_oo, constant=False)

    def restricted(self, positions):
        """The same for the neurons at these positions of `neurons` only."""
        keep = torch.cat([torch.arange(self.width), self.width + torch.as_tensor(positions, dtype=torch.long)])
        keep = keep.to(self.cov_ff.device)
        return replace(
            self,
            neurons=[self.neurons[position] for position in positions],
            mean_f=self.mean_f[keep],
            cov_ff=self.cov_ff[keep][:, keep],
            cov_fo=self.cov_fo[keep],
        )

    def coefficients(self, rank=None, neurons=None):
        """How many a fit has for each output: what it explains of its own data by chance grows with them.

        Args:
            rank (`int`, *optional*): Of its linear map; `None`: full.
            neurons (`int`, *optional*): How many are kept. Default: all of these.
        """
        neurons = len(self.neurons) if neurons is None else neurons
        of_x = min(self.width, self.dimensions)
        if rank is not None and rank < of_x:
            of_x = rank * (1 + (of_x - rank) / self.mean_o.shape[0])
        return int(self.constant) + min(of_x + neurons, self.dimensions)

    def fit(self, rank=None, refine=functional.REFINE, right_ri=None):
        """The least-squares [`functional.Fit`] on all features; its quality is that to expect on other data.

        Args:
            rank (`int`, *optional*): Of the linear map; `None`: full.
            right_ri (`Tensor`, *optional*): What the linear map of this rank begins with. Default: what is best.
        """
        moments = self.mean_f, self.mean_o, self.cov_ff, self.cov_fo, self.var_o
        inflation = functional.generalized(1.0, self.tokens, self.coefficients(rank))
        return functional.fit_block(
            *moments,
            self.width,
            self.neurons,
            rank,
            self.ridge,
            refine,
            constant=self.constant,
            inflation=inflation,
            right_ri=right_ri,
        )


def calibrate_affine_targets(model, inner, blocks, activations, calibration_data, token_mask_fn=None):
    """Fits the line of each block's new activation (not yet in the model) to what the native one does.

    Raises:
        ValueError: The data is empty or too little, or what reaches a block is not finite. The activations are
            unchanged then.
    """

    turns = _Turns()

    def observe(block, add):
        # Not through `activation.act`: the native module would call this hook again.
        replacement = activations[block.name].replacement

        return _around_activation(block, turns, add, replacement)

    sums = _neuron_sums(model, inner, blocks, calibration_data, token_mask_fn, observe)
    fitted = {}
    for block in blocks:
        count, (z, zz, a, _, za) = sums[block.name]
        if count < LINE_TOKENS:
            raise ValueError(
                f"{count} calibration tokens of different rows are too few for the lines of block {block.name}: at "
                f"least {LINE_TOKENS} are needed, and many times that is better; rows that repeat others do not count."
            )
        if block.kind == "gated":
            fitted[block.name] = None, a / count
        else:
            fitted[block.name] = functional.affine_target(count, z, zz, a, za)
    for name, (slope, offset) in fitted.items():
        if slope is not None:
            activations[name].slope.copy_(slope)
        activations[name].offset.copy_(offset)


def score_neurons(model, inner, blocks, calibration_data, token_mask_fn=None):
    """How much each hidden neuron does that a linear map cannot do for it, in one light pass.

    For a plain block the variance that a line through the neuron's pre-activation leaves unexplained, for a gated one
    the variance of the product with the gate, times the squared norm of the neuron's output column.

    Returns:
        Block name -> scores `(m,)`, float64.
    """

    turns = _Turns()

    def observe(block, add):
        if block.kind == "gated":
            return [block.down.register_forward_pre_hook(lambda module, args: add(args[0], args[0]))]
        return _around_activation(block, turns, add)

    sums = _neuron_sums(model, inner, blocks, calibration_data, token_mask_fn, observe)
    scores = {}
    for block in blocks:
        count, (z, zz, a, aa, za) = sums[block.name]
        if block.kind == "gated":
            variance = (aa / count - (a / count).square()).clamp_min(0)
        else:
            variance = functional.line_residual(count, z, zz, a, aa, za)
        scores[block.name] = variance * block.down_affine()[0].detach().double().square().sum(0)
    return scores


class _Turns:
    """Whose call of an activation it is, where one activation module serves several blocks: that of the block whose
    first linear ran last."""

    def __init__(self):
        self.begun = {}  # activation -> names of blocks whose first linear ran and whose activation did not yet

    def announce(self, block):
        """A hook that notes when the block's first linear has run."""
        begun = self.begun.setdefault(block.activation, [])
        return block.first.register_forward_hook(lambda *_: begun.append(block.name))

    def is_of(self, block, activation):
        """Whether the call that runs now belongs to the block.

        Raises:
            ValueError: It may belong to several.
        """
        names = sorted(set(self.begun[activation]))
        if len(names) > 1:
            raise ValueError(
                f"Blocks {', '.join(names)} share one activation module and run at the same time, so that its calls "
                "cannot be told apart. Give each block an activation module of its own."
            )
        return names == [block.name]

    def done(self, activation):
        self.begun[activation].clear()


def _around_activation(block, turns, add, replacement=None):
    """Hooks that call `add(input, output)` for the block's own calls of its activation."""
    inputs = []

    def before(module, args):
        if turns.is_of(block, module):
            inputs.append(args[0].clone() if is_inplace(module) else args[0])

    def after(module, args, output):
        if inputs:
            turns.done(module)
            z = inputs.pop()
            add(z, output if replacement is None else replacement(z))

    return [
        turns.announce(block),
        block.activation.register_forward_pre_hook(before),
        block.activation.register_forward_hook(after),
    ]


def _neuron_sums(model, inner, blocks, calibration_data, token_mask_fn, observe):
    """Block name -> `(tokens, sums of z, z^2, a, a^2 and z a per neuron)`, where `observe(block, add)` makes the
    hooks that call `add(z, a)`."""
    sums: dict[str, Any] = {}
    tokens = TokenFilter(inner, token_mask_fn)

    def adder(block):
        def add(z, a):
            z, a = tokens.select(block, z, a)
            count, total = sums.get(block.name, (0, 0.0))
            # In pieces that stay in a CPU's cache.
            rows = max(1, 2**16 // z.shape[-1]) if z.device.type == "cpu" else max(1, z.shape[0])
            for z_part, a_part in zip(z.split(rows), a.split(rows), strict=True):
                z_part, a_part = _wide(z_part), _wide(a_part)
                products = [z_part, z_part.square(), a_part, a_part.square(), z_part * a_part]
                total = total + torch.stack([product.sum(0) for product in products])
            sums[block.name] = count + z.shape[0], total

        return add

    handles = [handle for block in blocks for handle in observe(block, adder(block))]
    run_over(model, DistinctRows(calibration_data, tokens.encoder_decoder), handles, "Calibrating", tokens)
    for block in blocks:
        count, total = sums.get(block.name, (0, None))
        if not count:
            raise ValueError(f"No calibration token reached block {block.name}.")
        if not torch.isfinite(total).all():
            raise ValueError(_not_finite(block))
    return sums


def collect_moments(model, inner, blocks, calibration_data, neurons=None, token_mask_fn=None):
    """Second moments of every block's features and output, in one pass; the target is what the block computes now.

    The memory is that of the sums, whatever the number of tokens; see [`bytes_of_sums`].

    Args:
        blocks (`list[BoundBlock]`): Dense or patched.
        calibration_data (iterable of `dict[str, Tensor]`): Model inputs.
        neurons (`dict[str, list[int]]`, *optional*): Block name -> hidden neurons whose activations are features too.
        token_mask_fn (`Callable`, *optional*): See [`TokenFilter`].

    Returns:
        Block name -> [`BlockMoments`].

    Raises:
        ValueError: The data is empty, does not determine the fit, or what reaches a block is not finite.
    """
    neurons = neurons or {}
    tokens = TokenFilter(inner, token_mask_fn)
    sums = {block.name: _MomentSums(neurons.get(block.name, [])) for block in blocks}
    # A block that is called again before its last linear ran (none known) would be mixed up: a stack, not a slot.
    inputs: dict[str, list[torch.Tensor]] = {block.name: [] for block in blocks}
    turns = _Turns()

    def observe(block):
        wanted = neurons.get(block.name)
        # An own module is replaced as a whole, with the constant that it multiplies its output by.
        factor = block.scales[2]
        seen = {}
        index = torch.as_tensor(wanted or [], dtype=torch.long, device=block.down.weight.device)

        def activated(module, args, output):
            if not turns.is_of(block, module):
                return
            turns.done(module)
            # Kept neurons keep the native activation: what alpha adds to it is linear.
            if isinstance(module, CollapsibleActivation):
                output = module.act(args[0].clone() if is_inplace(module.act) else args[0])
            seen["activated"] = output

        def multiplied(module, args, output):
            seen["up"] = block.layout.split(output, -1)[1] if block.layout.fused else output

        def before(module, args):
            inputs[block.name].append(args[0])

        def after(module, args, output):
            x = inputs[block.name].pop()
            if not wanted:
                sums[block.name].add(*tokens.select(block, x, output), factor=factor)
                return
            h = seen.pop("activated").index_select(-1, index)
            if block.layout.gated:
                h = h * seen.pop("up").index_select(-1, index)
            sums[block.name].add(*tokens.select(block, x, output, h), factor=factor)

        handles = [block.first.register_forward_pre_hook(before), block.down.register_forward_hook(after)]
        if wanted:
            handles.append(turns.announce(block))
            handles.append(block.activation.register_forward_hook(activated))
        if wanted and block.layout.gated:
            handles.append(block.up.register_forward_hook(multiplied))
        return handles

    handles = [handle for block in blocks for handle in observe(block)]
    rows = DistinctRows(calibration_data, tokens.encoder_decoder)
    run_over(model, rows, handles, "Calibrating", tokens)
    return {block.name: sums[block.name].finish(block, rows.distinct) for block in blocks}


def bytes_of_sums(block, candidates) -> int:
    """Memory of one block's sums: `(i + c)^2 + (i + c) o + o^2` numbers in float64 and once more in float32."""
    features, outputs = block.in_features + candidates, block.out_features
    return 12 * (features * (features + outputs) + outputs**2)


def moments_in_groups(model, inner, blocks, data, neurons, token_mask_fn=None, max_memory=None):
    """Yields `(block, moments)`: blocks are measured together as far as the memory allows, in as many passes over the
    data as that takes. Each block's moments are let go once the next are asked for.

    Args:
        data (iterable of `dict[str, Tensor]`): Model inputs that can be read again.
        neurons (`dict[str, list[int] | None]`): Block name -> candidates, `None` for all of its neurons.
        max_memory (`int` or `str`, *optional*): Bytes, or `"2GB"`, for sums and what is worked out from them. Default:
            `FREE_SHARE` of what is free where the blocks are.

    Raises:
        ValueError: One block alone needs more, or as [`collect_moments`].
    """
    wanted = {
        block.name: list(range(block.hidden_features)) if neurons[block.name] is None else neurons[block.name]
        for block in blocks
    }
    room = memory_for_sums(inner, max_memory)
    needed = {block.name: bytes_of_sums(block, len(wanted[block.name])) for block in blocks}
    # What is worked out from one block's sums takes about as much again, three times.
    group, used = [], 0
    for block in blocks:
        alone = (1 + WORKING_COPIES) * needed[block.name]
        if alone > room:
            raise ValueError(
                f"Block {block.name} alone needs {alone / 1e9:.2f} GB for its sums over the calibration data, and "
                f"there are {room / 1e9:.2f} GB: raise `max_memory`."
            )
        if used + alone > room:
            yield from _moments_of_group(model, inner, group, data, wanted, token_mask_fn)
            group, used = [], 0
        group.append(block)
        used += needed[block.name]
    yield from _moments_of_group(model, inner, group, data, wanted, token_mask_fn)


def _moments_of_group(model, inner, group, data, wanted, token_mask_fn):
    moments = collect_moments(model, inner, group, data, {b.name: wanted[b.name] for b in group}, token_mask_fn)
    for block in tqdm(group, desc="Fitting", leave=False):
        yield block, moments.pop(block.name)


def memory_for_sums(inner, max_memory) -> int:
    """Bytes that work over calibration data may take: what is asked for, or `FREE_SHARE` of what is free."""
    if max_memory is not None:
        return convert_file_size_to_int(max_memory)
    device = device_of(inner)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    return int(FREE_SHARE * free)


class _MomentSums:
    """The sums of one block: products in float32 over some thousand tokens, totals in float64.

    Everything is taken about the first tokens' mean, so that a large mean does not cost the variance its precision.
    """

    def __init__(self, neurons):
        self.neurons = neurons
        self.tokens = self.pending = 0
        self.total = 0.0
        self.parts = None

    def add(self, x, y, h=None, factor=1.0):
        if not x.shape[0]:
            return
        wide = x.shape[1] + (0 if h is None else h.shape[1]) <= NARROW_FEATURES and x.device.type != "mps"
        dtype = torch.float64 if wide else torch.float32
        x, y = x.to(dtype), y.to(dtype)
        if factor != 1:
            y = y * factor
        f = x if h is None else torch.cat([x, h.to(dtype)], dim=1)
        lengths = torch.linalg.vector_norm(y, dim=1)
        if self.parts is None:
            self._start(x.shape[1], f, y, lengths)
        self.tokens += x.shape[0]
        weights = self.limit / lengths.clamp_min(self.limit) if self.limit > 0 else torch.ones_like(lengths)
        f, y = f - self.origin_f, y - self.origin_o
        if bool((weights < 1).any()):
            f, y = f * weights[:, None], y * weights[:, None]
        squared = weights.square()
        self.total += float(squared.sum(dtype=torch.float64))
        for start in range(0, f.shape[0], FLUSH_TOKENS):
            part = slice(start, start + FLUSH_TOKENS)
            self._add(f[part], y[part], weights[part])

    def _start(self, width, f, y, lengths):
        self.width = width
        self.origin_f, self.origin_o = f.mean(0), y.mean(0)
        self.limit = OUTLIER_LENGTH * float(lengths.median())
        features, outputs = f.shape[1], y.shape[1]
        sizes = [(features, features), (features, outputs), (features,), (outputs,), (outputs, outputs)]
        self.parts = [f.new_zeros(size) for size in sizes]
        self.totals = [_wide(part).clone() for part in self.parts]

    def _add(self, f, y, weights):
        ff, fo, sum_f, sum_o, oo = self.parts
        # The upper triangle, in strips: the rest is its mirror image.
        strip = -(-f.shape[1] // 4)
        for start in range(0, f.shape[1], strip):
            ff[start : start + strip, start:].addmm_(f[:, start : start + strip].T, f[:, start:])
        fo.addmm_(f.T, y)
        sum_f.addmv_(f.T, weights)
        sum_o.addmv_(y.T, weights)
        oo.addmm_(y.T, y)
        self.pending += f.shape[0]
        if self.pending >= FLUSH_TOKENS:
            self._flush()

    def _flush(self):
        for total, part in zip(self.totals, self.parts, strict=True):
            total += _wide(part)
            part.zero_()
        self.pending = 0

    def finish(self, block, rows):
        """The [`BlockMoments`] of so many different rows; checks them."""
        if self.parts is None:
            raise ValueError(f"No calibration token reached block {block.name}.")
        self._flush()
        ff, *rest = self.totals
        if not all(torch.isfinite(tensor).all() for tensor in self.totals):
            raise ValueError(_not_finite(block))
        ff = ff.triu() + ff.triu(1).T
        fo, sum_f, sum_o, oo = rest
        mean_f, mean_o, cov_ff, cov_fo, cov_oo = functional.second_moments(self.total, sum_f, sum_o, ff, fo, oo)
        dimensions = float(ff.shape[0])
        if self.tokens < RICH_TOKENS * (dimensions + 1):
            dimensions = functional.effective_rank(cov_ff)
        if self.tokens < LEAST_TOKENS * (dimensions + 1):
            raise ValueError(self._too_few(block, rows, dimensions))
        return BlockMoments(
            self.tokens,
            dimensions,
            self.width,
            list(self.neurons),
            mean_f + _wide(self.origin_f),
            mean_o + _wide(self.origin_o),
            cov_ff,
            cov_fo,
            cov_oo,
            ridge=functional.RIDGE if self.parts[0].dtype == torch.float64 else functional.RIDGE_FLOAT32,
        )

    def _too_few(self, block, rows, dimensions):
        features = self.width + len(self.neurons)
        what = f"its input has {self.width} features" + (
            f" and {len(self.neurons)} neurons are candidates to be kept" if self.neurons else ""
        )
        return (
            f"{self.tokens} calibration tokens, of {rows} different rows, do not determine the map of block "
            f"{block.name}: {what}, of which the data span {dimensions:.0f} dimensions, each fitted by about one "
            f"token. At least {math.ceil(LEAST_TOKENS * (features + 1))} tokens of different rows are needed, and "
            "several times that is better; rows that repeat others do not count."
        )


def _wide(tensor):
    # MPS has no float64.
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()


def _not_finite(block):
    return f"The calibration data gives inputs to block {block.name} that are not finite."


class TokenFilter:
    """Which rows of a block's tensors are real tokens: those that the batch's attention mask keeps.

    A mask is used where its shape is that of the block's tensors without the last dimension: as it is, flattened, or
    in the chunks that the feed-forward is called with. Blocks of a decoder that reads an encoder use the decoder's
    mask. Where no mask fits and the batch has padding, that is an error.

    Args:
        token_mask_fn (`Callable`, *optional*): `token_mask_fn(block_name, batch, shape)` gives the mask of the
            given shape (bool, or 0 and 1), or `None` for all tokens, in place of all that.
    """

    def __init__(self, inner, token_mask_fn=None):
        self.token_mask_fn = token_mask_fn
        self.encoder_decoder = isinstance(inner, PreTrainedModel) and bool(inner.config.is_encoder_decoder)
        self.batch, self.masks, self.offsets = {}, {}, {}

    def start(self, batch):
        """Called with the inputs before each forward."""
        self.batch, self.offsets = batch, {}
        self.masks = {}
        for key in ("attention_mask", "decoder_attention_mask"):
            mask = batch.get(key)
            if isinstance(mask, torch.Tensor):
                self.masks[key] = None if bool((mask > 0).all()) else mask
        if self.encoder_decoder and "decoder_attention_mask" not in batch:
            labels = batch.get("labels")
            mask = labels != -100 if isinstance(labels, torch.Tensor) and labels.dim() == 2 else None
            self.masks["decoder_attention_mask"] = None if mask is None or bool(mask.all()) else mask

    def select(self, block, *tensors):
        """`(..., width)` tensors of one call as `(tokens, width)`, detached, padding left out."""
        rows = [tensor.detach().reshape(-1, tensor.shape[-1]) for tensor in tensors]
        mask = self.mask(block, tensors[0].shape[:-1])
        if mask is None:
            return rows
        kept = mask.to(rows[0].device).reshape(-1).bool().nonzero().squeeze(1)
        return [row.index_select(0, kept) for row in rows]

    def mask(self, block, shape):
        """Which tokens of one call are no padding: a mask of as many elements as the shape, or `None` for all."""
        if self.token_mask_fn is not None:
            mask = self.token_mask_fn(block.name, self.batch, tuple(shape))
            if mask is not None and tuple(mask.shape) != tuple(shape):
                raise ValueError(
                    f"`token_mask_fn` gave a mask of shape {tuple(mask.shape)} for block {block.name}, whose tokens "
                    f"have the shape {tuple(shape)}."
                )
            return mask
        in_decoder = self.encoder_decoder and "decoder" in block.name.split(".")
        mask = self.masks.get("decoder_attention_mask" if in_decoder else "attention_mask")
        if mask is None:
            return None
        if mask.dim() == 2:
            if mask.shape == shape or (len(shape) == 1 and mask.numel() == shape[0]):
                return mask
            if len(shape) == 2 and shape[0] == mask.shape[0] and mask.shape[1] % shape[1] == 0:
                # Chunked feed-forward: consecutive calls see consecutive parts of the sequence.
                offset = self.offsets.get(block.name, 0)
                self.offsets[block.name] = (offset + shape[1]) % mask.shape[1]
                return mask[:, offset : offset + shape[1]]
        raise ValueError(
            f"The batch has padding, and its mask of shape {tuple(mask.shape)} does not say which of the tokens of "
            f"block {block.name}, of shape {tuple(shape)}, are padding. Use inputs without padding (of one length), "
            "or, for a collapse, pass a `token_mask_fn(block_name, batch, shape)` that gives the mask."
        )


def reiterable(data):
    """The data, or its batches as a list where it can be read only once."""
    return list(data) if iter(data) is data else data


def run_over(model, data, handles, description, tokens=None, gradients=False):
    """Runs the model over the data in evaluation mode; removes the hooks whatever happens.

    Args:
        gradients (`bool`): Whether hooks may ask for gradients of what they see.

    Raises:
        ValueError: There is no batch, or a batch is not a dict of model inputs.
    """
    device = device_of(model)
    batches = 0
    try:
        with evaluating(model), torch.set_grad_enabled(gradients):
            for batch in tqdm(data, desc=description, leave=False):
                inputs = inputs_of(batch, device)
                if tokens is not None:
                    tokens.start(inputs)
                model(**inputs)
                batches += 1
    finally:
        for handle in handles:
            handle.remove()
    if not batches:
        raise ValueError("The calibration data is empty: it must give at least one batch of model inputs.")


def logits_of(model: nn.Module, data):
    """The first output of every batch, on the CPU in float32, without gradients."""
    outputs = []
    handle = model.register_forward_hook(lambda module, args, output: outputs.append(_first_tensor(output)))
    run_over(model, data, [handle], "Measuring")
    return outputs


def _first_tensor(output):
    if isinstance(output, torch.Tensor):
        return output.detach().float().cpu()
    values = output.values() if isinstance(output, dict) else output
    return next(
        value.detach().float().cpu() for value in values if isinstance(value, torch.Tensor) and value.dim() > 0
    )
