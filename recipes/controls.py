"""What a user would do instead of collapsing: blocks that are dropped, and blocks whose hidden width is cut."""

from torch import nn

from hf_layercollapse import find_feed_forward_blocks
from hf_layercollapse.families import modules_of, select_blocks, survey_blocks


class Zeros(nn.Module):
    """`(..., width) -> zeros`, in place of a block's last linear: what is left of a block that was dropped."""

    def __init__(self, out_features):
        super().__init__()
        self.out_features = out_features

    def forward(self, x):
        return x.new_zeros(*x.shape[:-1], self.out_features)


def chosen_blocks(model, selector):
    blocks, refused = survey_blocks(model)
    return select_blocks(blocks, selector, refused)


def drop_blocks(model, selector):
    """Changes the model in place: the chosen blocks cost nothing and give zero, so that their residual passes them."""
    names = {module: name for name, module in model.named_modules()}
    for block in chosen_blocks(model, selector):
        parts = modules_of(model, block)
        for module in (parts.up, parts.gate, parts.activation):
            if module is not None:
                model.set_submodule(names[module], nn.Identity())
        model.set_submodule(names[parts.down], Zeros(block.out_features))


def feed_forward_share(model, dense_macs) -> float:
    """Multiply-accumulates of the feed-forward blocks that are left, as a share of the dense model's."""
    return sum(block.macs for block in find_feed_forward_blocks(model)) / dense_macs


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
    importance = torch_pruning.importance.GroupNormImportance(p=2)
    for block in chosen_blocks(model, selector):
        up = modules_of(model, block).up
        cut = round((1 - share) * block.hidden_features)
        everything = list(range(block.hidden_features))
        group = graph.get_pruning_group(up, torch_pruning.prune_linear_out_channels, idxs=everything)
        least = importance(group).argsort()[:cut].tolist()
        graph.get_pruning_group(up, torch_pruning.prune_linear_out_channels, idxs=least).prune()
