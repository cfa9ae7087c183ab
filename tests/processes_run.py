"""What tests/test_processes.py has one or two processes do: each reads its part of the rows."""

import contextlib
import io
import math
import sys
from functools import partial
from pathlib import Path


# A program of its own: what is below is found by this path, and so is imported after it.
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from accelerate import PartialState, cpu_offload  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

import tests.conftest  # noqa: E402, F401  (offline, one thread)
from hf_layercollapse import (  # noqa: E402
    LayerCollapseConfig,
    apply_layer_collapse,
    collapse_model,
    find_feed_forward_blocks,
    linearity_map,
    plan_collapse,
    recover_model,
)
from hf_layercollapse import processes as several  # noqa: E402
from hf_layercollapse.blocks import bind_blocks  # noqa: E402
from hf_layercollapse.calibration import Calibration  # noqa: E402
from hf_layercollapse.cli import main  # noqa: E402
from hf_layercollapse.fitting import BlockFitting  # noqa: E402
from hf_layercollapse.loss_metric import measure_metrics  # noqa: E402
from hf_layercollapse.merging import BlockChoice  # noqa: E402
from hf_layercollapse.plan_search import PlanOptions, Score, Search, divergences  # noqa: E402
from hf_layercollapse.uniform_plans import LEVELS  # noqa: E402
from hf_layercollapse.upstream import weights_in_memory  # noqa: E402
from tests.command_line import lines_of_words, save_text_model  # noqa: E402
from tests.models import BY_NAME, text_inputs  # noqa: E402


CONFIGS = {
    "whole": {},
    "narrow": {"rank": 0, "keep_neurons": 8},
    "both": {"rank": 3, "keep_neurons": 5},
    "in turn, by variance": {"keep_neurons": 4, "neuron_choice": "variance", "sequential": True},
}
BATCHES, ROWS = 40, 2


def data(rank, count):
    """Every process its part of the same batches; the first two are read by all."""
    batches = [text_inputs(batch=ROWS, seed=seed, length=5 + seed % 3) for seed in range(BATCHES)]
    return [batch for index, batch in enumerate(batches) if index < 2 or index % count == rank]


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def run(rank, count):
    """Everything that is to be the same, by name."""
    case, batches, found = BY_NAME["gpt2"], data(rank, count), {}
    for name, options in CONFIGS.items():
        model = case.model()
        report = collapse_model(model, LayerCollapseConfig(**options), iter(batches))
        found[name] = weights(model), report.to_dict()
    model = case.model()
    apply_layer_collapse(model, LayerCollapseConfig(linear_target="affine"), batches)
    found["affine"] = weights(model), {}
    model = case.model()
    plan = plan_collapse(model, batches, macs=0.4)
    collapse_model(model, plan=plan, calibration_data=batches)
    found["plan"] = weights(model), plan.to_dict()
    found["less memory"] = {}, plan_collapse(case.model(), batches, macs=0.4, max_memory=400_000).point.choices
    found["map"] = {}, linearity_map(case.model(), batches).to_dict()
    metric = {"metric": lambda model: float(rank) - float(model.lm_head.weight.sum())}
    found["metric"] = {}, plan_collapse(case.model(), batches, macs=0.4, **metric).to_dict()
    return found


def refused(work, kind=ValueError):
    try:
        work()
    except kind as error:
        return str(error)
    raise AssertionError("nothing was refused")


def tipped(rank, count):
    """What comes out where the second process is given other numbers than the first, as by rounding that tips a
    choice."""
    case, batches, found = BY_NAME["gpt2"], data(rank, count), {}
    model = case.model()

    def steeper(module, args, output):
        return output * 30 if output.requires_grad and rank == 1 else output

    # Other gradients: another metric of the loss.
    model.lm_head.register_forward_hook(steeper)
    found["metric of the loss"] = plan_collapse(model, batches, macs=0.4).to_dict()
    # Another choice of neurons, by their weights.
    engine, blocks = Calibration.on(model, model, batches), bind_blocks(model)
    with torch.no_grad():
        for block in blocks:
            block.down.weight.mul_(torch.rand(block.hidden_features, 1) if rank == 1 else 1)
    choices = {block.name: BlockChoice(0, 4) for block in blocks}
    merges = BlockFitting(engine, choices, "variance").merges(blocks)
    found["neurons"] = {name: merge.fit.neurons for name, merge in merges.items()}
    found["merges"] = {name: [weight.detach() for weight in merge.weights] for name, merge in merges.items()}
    # Other sizes to choose from.
    options = PlanOptions({"macs": 0.4}, False, (None, 0.0), 1 + rank, "native", LEVELS, None, False)
    whole = {"parameters": 10**6, "macs": sum(block.macs for block in blocks)}
    search = Search(engine, blocks, whole, batches[:1], Score("divergence", 1.0, partial(divergences, model)), options)
    search.look()
    found["sizes"] = {name: [(size.rank, size.count) for size in sizes.choice] for name, sizes in search.sizes.items()}
    # What of the new weights is not where they run travels all the same.
    model = cpu_offload(case.model(), torch.device("cpu"))
    engine, blocks = Calibration.on(model, model, batches), bind_blocks(model)
    for block in blocks:
        weights_in_memory(block.down)[0].data.mul_(1 + rank)
    merges = BlockFitting(engine, choices).merges(blocks)
    found["offloaded"] = {name: [weight.detach() for weight in merge.weights] for name, merge in merges.items()}
    return found


def patched():
    """A model of which one block is to be fitted to data, and the others are lines already."""
    model = apply_layer_collapse(BY_NAME["bert"].model(), LayerCollapseConfig())
    with torch.no_grad():
        for number, block in enumerate(bind_blocks(model)):
            block.activation.alpha.fill_(1.0 if number else 0.97)
    return model


def sent(rank):
    """What the first process sends of a patched model's merges, of which one block is fitted to data."""
    model, batches, tensors = patched(), data(rank, 2), []
    spread = several.spread
    several.spread = lambda parameters: (tensors.extend(parameters), spread(parameters))
    try:
        collapse_model(model, calibration_data=batches)
    finally:
        several.spread = spread
    kept = [id(tensor) for tensor in tensors]
    return [kept.count(id(parameter)) for block in bind_blocks(model) for parameter in block.down.parameters()]


class NoRoom(TorchDispatchMode):
    """Counts tensors that are made; the last of so many, or the next that torch.distributed does not make, fails."""

    def __init__(self, last=math.inf):
        super().__init__()
        self.last, self.made = last, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = func(*args, **(kwargs or {}))
        known = {a.untyped_storage().data_ptr() for a in tree_leaves((args, kwargs)) if isinstance(a, torch.Tensor)}
        if isinstance(given, torch.Tensor) and given.untyped_storage().data_ptr() not in known:
            self.made += 1
            if self.made >= self.last and not is_of_torch_distributed(sys._getframe()):
                self.last = math.inf
                raise torch.OutOfMemoryError("no memory is left")
        return given


def is_of_torch_distributed(frame):
    while frame is not None:
        if frame.f_code.co_filename == dist.distributed_c10d.__file__:
            return True
        frame = frame.f_back
    return False


# Where the second process fails, as shares of all that it makes.
PLACES = [0, 0.6, 0.97]

USES = {
    "patched": (patched, lambda model, batches: collapse_model(model, calibration_data=batches)),
    "in turn": (
        BY_NAME["gpt2"].model,
        lambda model, batches: collapse_model(
            model, LayerCollapseConfig(blocks=[0, 1], **CONFIGS["in turn, by variance"]), batches
        ),
    ),
    "affine": (
        BY_NAME["gpt2"].model,
        lambda model, batches: apply_layer_collapse(model, LayerCollapseConfig(linear_target="affine"), batches),
    ),
    "plan": (
        BY_NAME["bert"].model,
        lambda model, batches: plan_collapse(model, batches, macs=0.4, blocks=[0, 1], rank_shares=(1 / 4, 0.0)),
    ),
}


def no_memory_anywhere(rank, name):
    """What all hear where the second process has no memory for something, wherever that is; their models stay."""
    (make, use), batches, said = USES[name], data(rank, 2)[:12], []
    model = make()
    find_feed_forward_blocks(model)  # what is found of its code is kept
    with NoRoom() as whole:
        use(model, batches)
    for place in PLACES:
        model = make()
        before, kinds = weights(model), [type(module) for module in model.modules()]
        with NoRoom(place * whole.made if rank == 1 else math.inf):
            said.append(refused(lambda model=model: use(model, batches), (RuntimeError, ValueError)))
        assert all(torch.equal(value, before[key]) for key, value in weights(model).items())
        assert [type(module) for module in model.modules()] == kinds
    return said


def no_memory(rank):
    """What all hear where the second process alone has no memory for something."""
    case, batches, found = BY_NAME["gpt2"], data(rank, 2), {}

    def fail(*_):
        if rank == 1:
            raise torch.OutOfMemoryError("no memory is left")
        return 0.0

    model = case.model()
    blocks = bind_blocks(model)
    engine = Calibration.on(model, model, batches)
    found["work"] = refused(lambda: engine.reduce(blocks, {b.name: [] for b in blocks}, fail), RuntimeError)
    found["metric"] = refused(lambda: plan_collapse(model, batches, macs=0.4, metric=fail), RuntimeError)

    def no_gradients(module, args, output):
        if output.requires_grad:
            fail()

    model.lm_head.register_forward_hook(no_gradients)
    found["gradients"] = refused(lambda: measure_metrics(engine, blocks), RuntimeError)
    return found


def refusals(rank, count):
    case, batches, found = BY_NAME["gpt2"], data(rank, count), {}
    model = case.model()
    before = weights(model)

    def collapse(model, batches):
        return lambda: collapse_model(model, LayerCollapseConfig(blocks=[0]), batches)

    found["no data"] = refused(collapse(model, batches if rank == 0 else []))
    found["other model"] = refused(collapse(case.model(seed=rank), batches))
    broken = [{"input_ids": torch.full((2, 5), 10**6)}] if rank == 1 else []
    found["broken"] = refused(collapse(model, [*batches, *broken]), (RuntimeError, IndexError))
    found["recovery"] = refused(lambda: recover_model(model, case.model(), batches, max_steps=1))
    assert all(torch.equal(value, before[name]) for name, value in weights(model).items())
    # One process alone does not wait for the others.
    if rank == 0:
        with several.alone():
            collapse_model(case.model(), LayerCollapseConfig(blocks=[0]), data(0, 1))
    dist.barrier()
    return found


def saved_by_each(rank, folder):
    """Files in a folder that every process saves into, the second after the first; and what the model is called."""
    model = apply_layer_collapse(BY_NAME["gpt2"].model())
    if rank == 1:
        dist.barrier()
    model.save_pretrained(folder)
    if rank == 0:
        dist.barrier()
    dist.barrier()
    return sorted(path.name for path in folder.iterdir()), model.name_or_path


def of_the_shell(*arguments):
    """`(exit code, last line of stderr)` of the command line in this process."""
    sys.argv, errors = ["layercollapse", *map(str, arguments)], io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        try:
            main()
            code = 0
        except SystemExit as exit_:
            code = exit_.code
    return code, errors.getvalue().strip().split("\n")[-1].split("\r")[-1]


def shell_refusals(rank, folder):
    """What the command line refuses, whichever process sees it."""
    model, lines, two = folder / "model", folder / "lines.txt", folder / "two.txt"
    if rank == 0:
        folder.mkdir()
        save_text_model(model)
        lines.write_text("\n".join(lines_of_words(80)))
        two.write_text("a b c\n")
    dist.barrier()
    # The second process is given other arguments than the first where only one can see what is wrong.
    found, budget = {}, ["--budget", "macs=0.5"]
    missing = folder / "missing.txt" if rank == 1 else lines
    nowhere = folder / "none" / "new" if rank == 0 else folder / "new"
    found["no data"] = of_the_shell("collapse", model, "--data", missing, "--output", folder / "new", *budget)
    found["no folder"] = of_the_shell("collapse", model, "--data", lines, "--output", nowhere, *budget)
    found["few rows"] = of_the_shell("inspect", model, "--data", two)
    training = ["--output", folder / "new", "--recovery-steps", 3]
    found["recovery"] = of_the_shell("collapse", model, "--data", lines, *budget, *training)
    found["compare"] = of_the_shell("compare", model, model, "--data", lines)
    dist.barrier()
    found["left"] = sorted(path.name for path in folder.iterdir())
    return found


if __name__ == "__main__":
    state = PartialState(cpu=True)
    assert state.num_processes == 2 and dist.is_initialized()
    rank = state.process_index
    results = {"run": run(rank, 2), "refused": refusals(rank, 2), "tipped": tipped(rank, 2)}
    results["no memory"], results["sent"] = no_memory(rank), sent(rank)
    results["anywhere"] = {name: no_memory_anywhere(rank, name) for name in USES}
    folder = Path(sys.argv[1])
    results["shell"] = shell_refusals(rank, folder / "shell")
    results["saved"] = saved_by_each(rank, folder / "saved")
    torch.save(results, folder / f"results_{rank}.pt")
