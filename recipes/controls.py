"""What a user would do instead: blocks dropped, their hidden width cut, whole layers replaced."""

import torch
from torch import nn

from hf_layercollapse import LayerCollapseTrainer, find_feed_forward_blocks, functional
from hf_layercollapse.selection import select_blocks


class Zeros(nn.Module):
    """`(..., width) -> zeros`, in place of a block's last linear: what is left of a block that was dropped."""

    def __init__(self, out_features):
        super().__init__()
        self.out_features = out_features

    def forward(self, x):
        return x.new_zeros(*x.shape[:-1], self.out_features)


class TaughtTrainer(LayerCollapseTrainer):
    """Gives a classifier or language model without any collapse the same teacher: what distillation alone is worth.

    Args:
        teacher (`nn.Module`): The dense model.
        config ([`LayerCollapseConfig`]): `distillation_weight` and `temperature` are used.
    """

    def __init__(self, *args, teacher, config, **kwargs):
        super().__init__(*args, **kwargs)
        if config.hidden_state_weight:
            raise ValueError("`hidden_state_weight` compares collapsed blocks, and this method leaves none.")
        self.control_teacher, self.control_config = teacher.to(self.args.device).eval(), config
        # This loss does not count labels over accumulated batches.
        self.model_accepts_loss_kwargs = False

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if model.training:
            with torch.no_grad():
                expected = self.control_teacher(**inputs).logits
            logits, labels = outputs.logits, inputs["labels"]
            if labels.dim() == 2:  # of a language model: a token's logits are about the next one
                logits, expected, labels = logits[:, :-1], expected[:, :-1], labels[:, 1:]
            counted = labels != -100
            rows = functional.soft_target_loss(logits[counted], expected[counted], self.control_config.temperature)
            loss = loss + self.control_config.distillation_weight * rows.mean()
        return (loss, outputs) if return_outputs else loss


def chosen_blocks(model, selector):
    return select_blocks(find_feed_forward_blocks(model), selector)


def drop_blocks(model, selector):
    """Changes the model in place: the chosen blocks cost nothing and give zero, so that their residual passes them."""
    for block in chosen_blocks(model, selector):
        for part in (block.layout.up, block.layout.gate, block.layout.activation):
            if part is not None:
                model.set_submodule(block.path(part), nn.Identity())
        model.set_submodule(block.path(block.layout.down), Zeros(block.out_features))


def feed_forward_share(model, blocks) -> float:
    """Weights of the feed-forward blocks that are left, as a share of the dense model's, whose `blocks` these were."""
    # By path: what was cut to fewer neurons than it has inputs is not looked upon as a block any more.
    modules = dict(model.named_modules())
    linears = [block.path(linear) for block in blocks for linear in block.layout.linears]
    left = sum(p.numel() for path in linears if path in modules for p in modules[path].parameters() if p.dim() > 1)
    return left / sum(block.macs for block in blocks)


def prune_width(model, selector, share, example):
    """Changes the model in place: torch-pruning (PyPI) removes hidden neurons of the chosen blocks, smallest first.

    Its importance is the group's: the L2 norm of a neuron's weights over both linears. Layouts whose gate and up are
    one fused matrix, and Conv1D, are not what its dependency graph knows.

    Args:
        share (`float`): Of each block's weights that is left, in (0, 1).
        example (`dict[str, Tensor]`): Model inputs that the graph is traced with.
    """
    import torch_pruning

    graph = torch_pruning.DependencyGraph().build_dependency(model, example_inputs=example)
    importance = torch_pruning.importance.GroupMagnitudeImportance(p=2)
    for block in chosen_blocks(model, selector):
        cut = round((1 - share) * block.hidden_features)
        everything = list(range(block.hidden_features))
        up = model.get_submodule(block.path(block.layout.up))
        group = graph.get_pruning_group(up, torch_pruning.prune_linear_out_channels, idxs=everything)
        least = importance(group).argsort()[:cut].tolist()
        graph.get_pruning_group(up, torch_pruning.prune_linear_out_channels, idxs=least).prune()


def replaceable_layers(model):
    """The decoder's list of layers, one feed-forward block each; empty if the model is not built so."""
    if not model.can_generate():
        return []
    layers = getattr(model.get_decoder(), "layers", [])
    return layers if len(layers) == len(find_feed_forward_blocks(model)) else []


@torch.no_grad()
def replace_layers(model, count, data):
    """Removes `count` consecutive layers of a decoder in place; the block before them takes over with a linear map.

    ReplaceMe (arXiv 2505.02819, section 2): the layers after which hidden states have turned least are cut, and with
    `M` what the feed-forward block of the layer before them adds to the residual `Y`, the map is
    `argmin_T sum |M T + Y - H|^2` for the hidden states `H` after the last of them. It merges into that block's last
    linear. Here it has a bias too, and tokens with massive activations count less, as in the package's own fits.

    Returns:
        The index of the first layer that is gone.
    """
    layers, blocks = replaceable_layers(model), find_feed_forward_blocks(model)
    states = list(_outputs(model, layers, data[: max(1, len(data) // 4)]).values())
    similarity = [
        torch.cosine_similarity(states[index], states[index + count], dim=-1).mean()
        for index in range(len(layers) - count)
    ]
    del states
    keeper = int(torch.stack(similarity).argmax())
    path = blocks[keeper].path(blocks[keeper].layout.down)
    down = model.get_submodule(path)
    modules = (down, layers[keeper], layers[keeper + count])
    outputs = _outputs(model, modules, data)
    m, before, after = (outputs[module] for module in modules)
    target = after - (before - m)
    lengths = target.norm(dim=1)
    limit = functional.OUTLIER_LENGTH * float(lengths.median())
    weight = functional.outlier_factors(lengths, limit).square()[:, None].double()
    m, target = m.double(), target.double()
    mean_m, mean_t = (weight * m).sum(0) / weight.sum(), (weight * target).sum(0) / weight.sum()
    centred = m - mean_m
    solution = functional.regress(centred.T @ (weight * centred), centred.T @ (weight * (target - mean_t)))
    merged = nn.Linear(down.in_features, down.out_features, bias=True)
    merged.weight.copy_(solution.T @ down.weight.double())
    bias = mean_t - mean_m @ solution
    merged.bias.copy_(bias if down.bias is None else bias + down.bias.double() @ solution)
    model.set_submodule(path, merged.requires_grad_(False))
    del layers[keeper + 1 : keeper + 1 + count]
    return keeper + 1


def _outputs(model, modules, data):
    """Module -> its outputs over the data, `(tokens, width)`."""
    found = {module: [] for module in modules}

    def keep(module, args, output):
        output = output[0] if isinstance(output, tuple) else output
        found[module].append(output.flatten(0, -2))

    handles = [module.register_forward_hook(keep) for module in found]
    for batch in data:
        model(**batch, use_cache=False)
    for handle in handles:
        handle.remove()
    return {module: torch.cat(outputs) for module, outputs in found.items()}
