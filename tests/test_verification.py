"""The probe: what it must leave alone, what it must not take for known, and which activations it refuses."""

import functools
import random
import types
import weakref
from collections import deque

import numpy as np
import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel, Trainer, TrainingArguments, WhisperConfig
from transformers.activations import ACT2FN
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from hf_layercollapse import (
    LayerCollapseConfig,
    LayerCollapseTrainer,
    apply_layer_collapse,
    collapse_model,
    find_feed_forward_blocks,
    probe_inputs,
    skeletons,
)
from hf_layercollapse.families import refused_blocks
from hf_layercollapse.patching import alpha_parameters

from .models import BY_NAME, randomize


WIDTH, HIDDEN = 8, 32


class Mlp(nn.Module):
    def __init__(self, act=None, **attributes):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(WIDTH, HIDDEN), act or nn.GELU(), nn.Linear(HIDDEN, WIDTH)
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class Net(nn.Module):
    def __init__(self, *mlps):
        super().__init__()
        self.layers = nn.ModuleList(mlps)

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x


def collapsed_is_exact(net):
    """Whether the model with all alphas at 1 and the collapsed one are the same map."""
    net, x = randomize(net).eval(), torch.randn(3, 5, WIDTH)
    apply_layer_collapse(net)
    with torch.no_grad():
        for alpha in alpha_parameters(net):
            alpha.fill_(1)
        exact = net(x)
        collapse_model(net)
        return torch.allclose(net(x), exact, rtol=1e-4, atol=1e-5)


# ----------------------------------------------------------------------------------------------------
# Nothing is touched
# ----------------------------------------------------------------------------------------------------


class Meter:
    """A plain object of the user's."""

    def __init__(self):
        self.history, self.sums = [0.0], {"all": torch.zeros(())}


class Slotted:
    __slots__ = ("values",)

    def __init__(self):
        self.values = [0.0]


class NormMlp(Mlp):
    def forward(self, x):
        return self.fc2(self.act(self.norm(self.fc1(x))))


class CountingMlp(Mlp):
    """Writes what it sees wherever a module may keep it."""

    def __init__(self):
        super().__init__()
        self.calls = 0
        self.stats = {"calls": 0, "nested": [{"last": None}]}
        self.seen, self.kept, self.window = [], set(), deque(maxlen=3)
        self.meter, self.slotted = Meter(), Slotted()
        self.array, self.tensor = np.zeros(2), torch.zeros(2)
        self.torch_generator = torch.Generator().manual_seed(3)
        self.numpy_generator, self.python_generator = np.random.default_rng(3), random.Random(3)
        self.register_buffer("running", torch.zeros(1))
        self.register_buffer("low", torch.zeros(1, dtype=torch.float16))
        noted = self.noted = []
        self.note = lambda value: noted.append(value)
        self.method = self.remember
        self.partial = functools.partial(self.remember, "partial")
        self.itself = weakref.ref(self)

    def remember(self, *values):
        self.stats.setdefault("remembered", []).append(values)

    def forward(self, x):
        hidden = self.act(self.fc1(x))
        self.calls += 1
        self.stats["calls"] += 1
        self.stats["nested"][0]["last"] = float(hidden.mean())
        self.seen.append(tuple(x.shape))
        self.kept.add(len(self.seen))
        self.window.append(x)
        self.meter.history.append(float(hidden.sum()))
        self.meter.sums["all"] += hidden.sum()
        self.slotted.values.append(1.0)
        self.array += 1
        self.tensor += 1
        self.running.mul_(0.9).add_(0.1 * hidden.abs().mean())
        self.low += 1
        self.note(float(hidden.mean()))
        self.method("method")
        self.partial(1)
        self.itself().seen.append("itself")
        torch.rand(1, generator=self.torch_generator)
        self.numpy_generator.random()
        self.python_generator.random()
        self._parameters["added"] = None
        return self.fc2(hidden)


class WatchedMlp(Mlp):
    """Has a module above it in a list, and writes into that."""

    def __init__(self):
        super().__init__()
        self.above = []

    def forward(self, x):
        self.above[0].register_buffer("written", x)
        self.above[0].layers[0].fc1.weight.data.add_(1)
        return self.fc2(self.act(self.fc1(x)))


class DrawingMlp(Mlp):
    """Draws from every global generator."""

    def forward(self, x):
        noise = torch.rand(()) + np.random.rand() + random.random()
        return self.fc2(self.act(self.fc1(x))) + 0 * noise


def watched():
    net = Net(WatchedMlp())
    net.layers[0].above.append(net)
    return net


def state_of(value):
    """Everything that hangs on an object, as data that can be compared."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.tolist()
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, torch.Generator):
        return value.get_state().tolist()
    if isinstance(value, np.random.Generator):
        return repr(value.bit_generator.state)
    if isinstance(value, random.Random):
        return value.getstate()
    if isinstance(value, dict):
        return {key: state_of(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, deque)):
        return [state_of(item) for item in value]
    if isinstance(value, Meter):
        return state_of(vars(value))
    if isinstance(value, Slotted):
        return state_of(value.values)
    return value


def whole_state(net):
    return {
        name: {key: state_of(value) for key, value in vars(module).items() if key not in ("_modules", "above")}
        for name, module in net.named_modules()
    }


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(
    "build",
    [
        lambda: Net(NormMlp(norm=nn.BatchNorm1d(HIDDEN)), NormMlp(norm=nn.BatchNorm1d(HIDDEN))),
        lambda: Net(CountingMlp(), CountingMlp()),
        watched,
    ],
    ids=["batch norm", "containers", "module above"],
)
def test_looking_for_blocks_changes_nothing(build, train):
    net = randomize(build()).train(train)
    before = whole_state(net)
    blocks = find_feed_forward_blocks(net)
    assert len(blocks) == len(net.layers)
    assert whole_state(net) == before
    apply_layer_collapse(net)
    for layer in net.layers:
        layer.act = layer.act.native
    assert whole_state(net) == before


def test_what_is_bound_to_the_real_module_does_not_run():
    net = Net(Mlp())
    net.layers[0].register_forward_hook(lambda *_: pytest.fail("a hook ran"))
    net.layers[0]._compiled_call_impl = lambda *_: pytest.fail("the compiled module ran")
    assert len(find_feed_forward_blocks(net)) == 1


class Registry(nn.Module):
    kinds = []

    def __init_subclass__(cls):
        super().__init_subclass__()
        Registry.kinds.append(cls)


class RegisteredMlp(Registry, Mlp):
    pass


def test_no_class_is_made_of_one_that_keeps_account_of_them():
    assert len(find_feed_forward_blocks(Net(RegisteredMlp(), RegisteredMlp()))) == 2
    assert Registry.kinds == [RegisteredMlp]


@pytest.fixture
def no_seeding(monkeypatch):
    """Fails if anything seeds an accelerator, or everything at once; there may be none in this machine."""
    for module, name in (
        (torch, "manual_seed"),
        (torch.random, "manual_seed"),
        (torch.cuda, "manual_seed"),
        (torch.cuda, "manual_seed_all"),
        (torch.mps, "manual_seed"),
        (torch.xpu, "manual_seed_all"),
    ):
        monkeypatch.setattr(module, name, lambda seed: pytest.fail("something seeds the accelerators"))


def random_states():
    return torch.get_rng_state().tolist(), repr(np.random.get_state()), random.getstate()


def whisper_encoder():
    config = WhisperConfig(
        vocab_size=64, d_model=16, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=40,
        num_mel_bins=8, max_source_positions=16, pad_token_id=0,
    )  # fmt: skip
    return WhisperEncoder(config)


@pytest.mark.parametrize("build", [lambda: Net(DrawingMlp(), Mlp()), whisper_encoder], ids=["drawing", "whisper"])
def test_random_numbers_of_the_process_are_not_drawn(build, no_seeding):
    net, before = build().train(), random_states()
    assert len(find_feed_forward_blocks(net)) == 2
    assert random_states() == before


def test_made_up_inputs_draw_from_a_generator_of_their_own(no_seeding):
    before = random_states()
    probe_inputs.model_inputs(whisper_encoder_without_drawing(before))
    assert random_states() == before


def whisper_encoder_without_drawing(state):
    with torch.device("meta"):
        encoder = whisper_encoder()
    assert random_states() == state
    return encoder


@pytest.mark.parametrize("family", ["bert", "vit", "gpt2"])
@pytest.mark.parametrize(
    "config",
    [LayerCollapseConfig(), LayerCollapseConfig(keep_neurons=2, rank=4)],
    ids=["full", "narrow"],
)
def test_a_whole_collapse_draws_no_random_numbers(family, config, no_seeding, monkeypatch):
    case = BY_NAME[family]
    monkeypatch.undo()
    model, batches = case.model(), [case.inputs(seed=seed) for seed in range(12)]
    for module in (torch, torch.random):
        monkeypatch.setattr(module, "manual_seed", lambda seed: pytest.fail("something seeds the accelerators"))
    before = random_states()
    apply_layer_collapse(model)
    with torch.no_grad():
        for alpha in alpha_parameters(model):
            alpha.fill_(1)
    if config.keep_neurons:
        model = case_model_again(case, before)
        collapse_model(model, config, calibration_data=batches)
    else:
        collapse_model(model)
    assert random_states() == before


def case_model_again(case, state):
    torch.set_rng_state(torch.tensor(state[0], dtype=torch.uint8))
    with torch.random.fork_rng(devices=[]):
        return case.auto_class.from_config(case.config()).eval()


def test_a_trainer_leaves_the_accelerators_the_seed_of_its_arguments(tmp_path, monkeypatch):
    seeds = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)
    case = BY_NAME["bert"]
    rows = [{"input_ids": torch.arange(3, 10), "labels": i % 3} for i in range(8)]
    arguments = TrainingArguments(
        tmp_path, seed=7, max_steps=2, logging_steps=1, eval_strategy="steps", eval_steps=1, save_strategy="no",
        report_to=[], use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    data = {"train_dataset": rows, "eval_dataset": rows}
    model = case.model()
    seeds.clear()
    trainer = LayerCollapseTrainer(
        model, layer_collapse_config=LayerCollapseConfig(progressive=True), args=arguments, **data
    )
    trainer.train()
    patched = set(seeds)
    seeds.clear()
    Trainer(case.model(), args=arguments, **data).train()
    assert patched == set(seeds) - {0} == {7}


# ----------------------------------------------------------------------------------------------------
# What is taken for known
# ----------------------------------------------------------------------------------------------------


class Scaled(Mlp):
    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)) * self.scale)


class Scale(nn.Module):
    def __init__(self, scale):
        super().__init__()
        self.scale = scale

    def forward(self, x):
        return x * self.scale


class ByChild(Mlp):
    def forward(self, x):
        return self.fc2(self.scale(self.act(self.fc1(x))))


class ByBuffer(Mlp):
    def __init__(self, scale):
        super().__init__()
        self.register_buffer("scale", torch.tensor(float(scale)))

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)) * self.scale)


class ByFunction(Mlp):
    def forward(self, x):
        return self.fc2(self.scale(self.act(self.fc1(x))))


class ByList(Mlp):
    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)) * self.scale[0]["value"])


class ByObject(Mlp):
    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)) * self.scale.value)


class ByDict(Mlp):
    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)) * self.__dict__["scale"])


class ByDefault(Mlp):
    factor = 1

    def __init__(self, scale):
        super().__init__()
        if scale != 1:
            self.factor = scale

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)) * self.factor)


def scaled_forward(self, x):
    return self.fc2(3 * self.act(self.fc1(x)))


def with_own_forward(scale):
    mlp = Mlp()
    if scale != 1:
        mlp.forward = types.MethodType(scaled_forward, mlp)
    return mlp


@pytest.mark.parametrize(
    "build",
    {
        "int": lambda scale: Scaled(scale=scale),
        "float": lambda scale: Scaled(scale=float(scale)),
        "tensor": lambda scale: Scaled(scale=torch.tensor(float(scale))),
        "array": lambda scale: Scaled(scale=np.float32(scale)),
        "buffer": ByBuffer,
        "child": lambda scale: ByChild(scale=Scale(scale)),
        "closure": lambda scale: ByFunction(scale=lambda x: x * scale),
        "partial": lambda scale: ByFunction(scale=functools.partial(torch.mul, scale)),
        "list": lambda scale: ByList(scale=[{"value": scale}]),
        "object": lambda scale: ByObject(scale=types.SimpleNamespace(value=scale)),
        "config": lambda scale: ByObject(scale=BertConfig(value=scale)),
        "dict of the instance": lambda scale: ByDict(scale=scale),
        "attribute of the class": ByDefault,
        "forward of the instance": with_own_forward,
    }.items(),
    ids=lambda item: item[0],
)
def test_blocks_that_differ_in_a_constant(build):
    net = Net(build[1](1), build[1](3), build[1](1))
    assert [round(block.wiring.scales[1], 4) for block in find_feed_forward_blocks(net)] == [1, 3, 1]
    assert collapsed_is_exact(net)


def count_runs(monkeypatch, net):
    runs, run = [], skeletons.Skeleton.run
    monkeypatch.setattr(
        skeletons.Skeleton,
        "run",
        lambda self, *args, **kwargs: runs.append(self) or run(self, *args, **kwargs),
    )
    find_feed_forward_blocks(net)
    monkeypatch.undo()
    return len(runs)


def test_blocks_that_are_alike_run_once(monkeypatch):
    def bert(layers):
        config = BertConfig(
            vocab_size=32, hidden_size=8, num_attention_heads=2, intermediate_size=32, num_hidden_layers=layers
        )
        return BertModel(config)

    # Each attention knows the index of its layer, and does not read it.
    assert count_runs(monkeypatch, bert(6)) == count_runs(monkeypatch, bert(1))
    # This one holds a method of its own.
    python_gelu = ACT2FN["gelu_python"]
    assert isinstance(vars(python_gelu)["act"], types.MethodType)
    nets = (Net(*(Mlp(ACT2FN["gelu_python"]) for _ in range(count))) for count in (6, 1))
    assert len({count_runs(monkeypatch, net) for net in nets}) == 1
    assert count_runs(monkeypatch, Net(*(Scaled(scale=2) for _ in range(6)))) == count_runs(
        monkeypatch, Net(Scaled(scale=2))
    )


class ByWeight(Mlp):
    def __init__(self, *shape):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(shape))

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)) * self.weight)


class ThenWeight(ByWeight):
    def forward(self, x):
        return self.fc2(self.act(self.fc1(x))) * self.weight


@pytest.mark.parametrize(
    "mlp, reason",
    [
        (ByWeight(HIDDEN), "something else than the layout says between `act` and `fc2`"),
        (ByWeight(), "multiplies by a weight of its own"),
        (ByWeight(1), "multiplies by a weight of its own"),
        (ThenWeight(), "multiplies by a weight of its own"),
    ],
    ids=["of each neuron", "scalar", "of one element", "after the block"],
)
def test_weights_between_the_linears_are_no_constants(mlp, reason):
    net = Net(mlp)
    assert find_feed_forward_blocks(net) == []
    assert reason in refused_blocks(net)["layers.0"]


def test_weights_after_the_linears_stay():
    net = Net(ThenWeight(WIDTH))
    assert collapsed_is_exact(net) and "weight" in net.layers[0]._parameters


class WritesInput(Mlp):
    def forward(self, x):
        return self.fc2(self.act(self.fc1(x.mul_(2))))


def test_code_that_writes_into_its_input():
    class Apart(Net):
        def forward(self, x):
            return self.layers[0](x.clone())

    assert collapsed_is_exact(Apart(WritesInput()))


class CallableForward(nn.Module):
    class Call:
        def __call__(self, x):
            return x

    forward = Call()

    def __init__(self):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(WIDTH, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, WIDTH)


class PartialForward(Mlp):
    def compute(self, extra, x):
        return self.fc2(self.act(self.fc1(x)))

    forward = functools.partialmethod(compute, None)


def test_forwards_that_are_no_plain_functions():
    assert "running CallableForward does not reach it" in refused_blocks(Net(CallableForward()))["layers.0"]
    net = Net(PartialForward())
    assert [block.wiring.own_module for block in find_feed_forward_blocks(net)] == [True]
    assert collapsed_is_exact(net)


# ----------------------------------------------------------------------------------------------------
# Activations
# ----------------------------------------------------------------------------------------------------


class WritesOver(nn.Module):
    def forward(self, x):
        return x.mul_(torch.sigmoid(x))


class Counts(nn.Module):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return x * self.calls


class Averages(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, x):
        self.mean.mul_(0.9).add_(0.1 * x.mean())
        return torch.relu(x)


class AddsNoise(nn.Module):
    def forward(self, x):
        return torch.relu(x) + (torch.randn_like(x) if self.training else 0)


class Positive(nn.Module):
    def forward(self, x):
        return x > 0


class Pair(nn.Module):
    def forward(self, x):
        return x, x


class Slopes(nn.Module):
    """Another slope at each position of a sequence."""

    def forward(self, x):
        return x * torch.arange(1, x.shape[-2] + 1)[:, None]


NOT_ELEMENTWISE = "is not the same function of each number of its input"


@pytest.mark.parametrize(
    "act, reason",
    [
        (nn.Softmax(dim=1), NOT_ELEMENTWISE),
        (nn.Softmax(dim=-1), NOT_ELEMENTWISE),
        (nn.LayerNorm(HIDDEN), NOT_ELEMENTWISE),
        (nn.LayerNorm(HIDDEN, elementwise_affine=False), NOT_ELEMENTWISE),
        (Slopes(), NOT_ELEMENTWISE),
        (WritesOver(), "writes over its input, and has no attribute `inplace` that says so"),
        (nn.Sequential(nn.ReLU(inplace=True)), "writes over its input"),
        (nn.RReLU(), "in training gives two outputs for one input"),
        (nn.Sequential(nn.GELU(), nn.Dropout(0.5)), "in training gives two outputs for one input"),
        (AddsNoise(), "in training gives two outputs for one input"),
        (Counts(), "gives two outputs for one input: it draws random numbers or keeps a state"),
        (Averages(), "changes a buffer of its own when it runs"),
        (Positive(), "gives numbers of torch.bool"),
        (Pair(), "gives tuple for an input of shape"),
        (nn.GLU(), "gives (2, 4, 16) for an input of shape (2, 4, 32)"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_what_is_no_activation_is_refused(act, reason):
    net = Net(Mlp(act), Mlp())
    assert [block.name for block in find_feed_forward_blocks(net)] == ["layers.1"]
    why = refused_blocks(net)["layers.0"]
    assert reason in why and (type(act).__name__ in why or "named" in why)
    with pytest.raises(ValueError, match="layers.0 is refused: its activation"):
        apply_layer_collapse(net, LayerCollapseConfig(blocks=["layers.0"]))
    assert net.layers[0].act is act


@pytest.mark.parametrize(
    "act",
    [
        nn.PReLU(),
        nn.ReLU(inplace=True),
        nn.Hardtanh(),
        nn.Identity(),
        nn.Dropout(0.0),
        *(ACT2FN[name] for name in ACT2FN),
    ],
    ids=lambda act: type(act).__name__,
)
def test_activations(act):
    assert len(find_feed_forward_blocks(Net(Mlp(act)))) == 1


def test_activations_of_an_nn_sequential():
    def chain(act):
        return nn.Sequential(nn.Linear(WIDTH, HIDDEN), act, nn.Linear(HIDDEN, WIDTH))

    net = nn.Sequential(chain(nn.RReLU()), chain(nn.GELU()), chain(nn.PReLU(HIDDEN)), chain(nn.PReLU()))
    assert [block.name for block in find_feed_forward_blocks(net)] == ["1.0", "3.0"]
    refused = refused_blocks(net)
    assert "in training gives two outputs" in refused["0"] and "PReLU" in refused["2"]


def test_a_patched_activation_is_looked_into():
    net = Net(Mlp(nn.PReLU()), Mlp())
    apply_layer_collapse(net)
    assert [block.state for block in find_feed_forward_blocks(net)] == ["patched", "patched"]
