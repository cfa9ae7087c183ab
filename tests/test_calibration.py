"""Passes over data: sums against the same sums of stored activations in float64."""

import copy

import pytest
import torch
from peft import PromptTuningConfig, get_peft_model
from torch import nn
from torch.nn import functional as F
from transformers import (
    AlbertConfig,
    AlbertModel,
    BertConfig,
    BertModel,
    BigBirdConfig,
    BigBirdModel,
    BigBirdPegasusConfig,
    BigBirdPegasusModel,
    FSMTConfig,
    FSMTModel,
    LEDConfig,
    LEDModel,
    LongformerConfig,
    LongformerModel,
    PegasusXConfig,
    PegasusXModel,
    T5Config,
    T5Model,
)

from hf_layercollapse import LayerCollapseConfig, apply_layer_collapse, functional
from hf_layercollapse.blocks import bind, bind_blocks
from hf_layercollapse.calibration import Calibration
from hf_layercollapse.moments import MomentSums, RangeSums
from hf_layercollapse.token_filter import TokenFilter

from .models import BY_NAME, HIDDEN, VOCABULARY, WIDTH, randomize, text_inputs


def bert(**kwargs):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=40,
        **kwargs,
    )
    return randomize(BertModel(config)).eval()


def data(batches=8, length=7):
    return [text_inputs(seed=seed, length=length) for seed in range(batches)]


def collected(model, blocks, batches, neurons=None):
    return Calibration.on(model, model, batches).moments(blocks, neurons)


def scored(model, blocks, batches):
    return Calibration.on(model, model, batches).neuron_scores(blocks)


def sums_of(x, y):
    """Of one call of a block without neurons, about where its tokens lie."""
    ranges = RangeSums()
    ranges.add(x, y)
    return MomentSums(ranges.finish(), [])


def stored(model, block, batches, neurons=()):
    """`(f, y)` of every token, in float64."""
    xs, hs, ys = [], [], []
    handles = [
        block.up.register_forward_pre_hook(lambda module, args: xs.append(args[0].flatten(0, -2))),
        block.down.register_forward_pre_hook(lambda module, args: hs.append(args[0].flatten(0, -2))),
        block.down.register_forward_hook(lambda module, args, output: ys.append(output.flatten(0, -2))),
    ]
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for handle in handles:
        handle.remove()
    x, h, y = (torch.cat(parts).double() for parts in (xs, hs, ys))
    return torch.cat([x, h[:, list(neurons)]], dim=1), y


def assert_moments(moments, f, y, tolerance=1e-6):
    assert moments.tokens == len(f)
    f0, y0 = f - f.mean(0), y - y.mean(0)
    for actual, expected in (
        (moments.mean_f, f.mean(0)),
        (moments.mean_o, y.mean(0)),
        (moments.cov_ff, f0.T @ f0 / len(f)),
        (moments.cov_fo, f0.T @ y0 / len(f)),
        (moments.var_o, y0.square().mean(0)),
    ):
        torch.testing.assert_close(
            actual.double(), expected, rtol=tolerance, atol=tolerance * float(expected.abs().max())
        )


@pytest.mark.parametrize("neurons", [[], [5, 0, 17]], ids=["x", "x-and-neurons"])
def test_moments_are_those_of_the_stored_activations(neurons):
    model = bert()
    blocks = bind_blocks(model)
    moments = collected(model, blocks, data(), {block.name: neurons for block in blocks})
    for block in blocks:
        assert moments[block.name].neurons == neurons and moments[block.name].width == WIDTH
        assert_moments(moments[block.name], *stored(model, block, data(), neurons))


def test_restricted_moments_are_those_of_the_neurons():
    model = bert()
    block = bind_blocks(model)[0]
    moments = collected(model, [block], data(), {block.name: [1, 3, 9]})[block.name].restricted([2, 0])
    assert moments.neurons == [9, 1]
    assert_moments(moments, *stored(model, block, data(), [9, 1]))


def test_a_chunked_block_is_called_several_times():
    model, chunked = bert(), bert(chunk_size_feed_forward=2)
    batches = data(length=6)
    batches[0]["attention_mask"] = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])
    for block in bind_blocks(model):
        whole = collected(model, [block], batches)[block.name]
        parts = collected(chunked, [bind(chunked, block)], batches)[block.name]
        assert parts.tokens == whole.tokens == 8 * 12 - 3
        torch.testing.assert_close(parts.cov_fo, whole.cov_fo, rtol=1e-5, atol=1e-6)


def test_a_shared_block_gets_the_tokens_of_all_its_calls():
    config = AlbertConfig(
        vocab_size=VOCABULARY,
        embedding_size=12,
        hidden_size=WIDTH,
        intermediate_size=HIDDEN,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=40,
    )
    model = randomize(AlbertModel(config)).eval()
    (block,) = bind_blocks(model)
    moments = collected(model, [block], data())[block.name]
    assert moments.tokens == 3 * 8 * 14
    assert_moments(moments, *stored(model, block, data()))


def test_padding_is_left_out():
    model = bert()
    blocks = bind_blocks(model)
    plain = [text_inputs(batch=1, seed=seed, length=length) for seed, length in enumerate((7, 4, 5, 6) * 5)]
    padded = []
    for batch in plain:
        ids = batch["input_ids"]
        mask = torch.zeros(1, 9, dtype=torch.long)
        mask[:, : ids.shape[1]] = 1
        filled = torch.full((1, 9), 9)
        filled[:, : ids.shape[1]] = ids
        padded.append({"input_ids": filled, "attention_mask": mask})
    expected = collected(model, blocks, plain)
    actual = collected(model, blocks, padded)
    for block in blocks:
        assert actual[block.name].tokens == expected[block.name].tokens == 110
        torch.testing.assert_close(actual[block.name].cov_fo, expected[block.name].cov_fo, rtol=1e-4, atol=1e-5)


def test_blocks_of_a_decoder_use_its_mask():
    config = T5Config(
        vocab_size=VOCABULARY, d_model=WIDTH, d_ff=HIDDEN, d_kv=8, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    model = randomize(T5Model(config)).eval()
    encoder, decoder = bind_blocks(model)
    batches = []
    for seed in range(10):
        batch = {"input_ids": text_inputs(seed=seed)["input_ids"], "attention_mask": torch.ones(2, 7)}
        batch["decoder_input_ids"] = text_inputs(seed=seed + 50)["input_ids"]
        batch["decoder_attention_mask"] = torch.ones(2, 7)
        batch["attention_mask"][1, 5:] = 0
        batch["decoder_attention_mask"][0, 2:] = 0
        batches.append(batch)
    moments = collected(model, [encoder, decoder], batches)
    assert moments[encoder.name].tokens == 120 and moments[decoder.name].tokens == 90
    # Without one the labels say what is padding.
    for batch in batches:
        del batch["decoder_attention_mask"]
    assert collected(model, [decoder], batches)[decoder.name].tokens == 140


def filter_of(mask, token_mask_fn=None, model=None, **inputs):
    model = bert() if model is None else model
    tokens = TokenFilter(model, token_mask_fn)
    tokens.start({"attention_mask": mask, **inputs})
    return tokens, bind_blocks(model)[0]


def test_a_mask_fits_flattened_tokens_too():
    tokens, block = filter_of(torch.tensor([[1, 1, 0], [1, 0, 0]]))
    (rows,) = tokens.select(block, torch.arange(6.0)[:, None])
    assert rows.flatten().tolist() == [0, 1, 3]
    # Choices are rows.
    mask = torch.tensor([[[1, 1, 0], [1, 0, 0]]])
    tokens, block = filter_of(mask, input_ids=mask)
    (rows,) = tokens.select(block, torch.arange(6.0).reshape(2, 3, 1))
    assert rows.flatten().tolist() == [0, 1, 3]


def test_padding_that_cannot_be_told_is_an_error():
    for mask in (torch.tensor([[1, 1, 0, 0]]), torch.ones(1, 4)):
        tokens, block = filter_of(mask)
        # What is added within the model may be padding, too.
        with pytest.raises(ValueError, match=r"does not say which .* \(1, 5\), are padding.* `token_mask_fn"):
            tokens.select(block, torch.zeros(1, 5, 4))
    # Two tokens in place of four are pooled ones: no chunk, since this model makes none.
    with pytest.raises(ValueError, match="The batch has padding, .* Use inputs without padding"):
        filter_of(torch.tensor([[1, 1, 0, 0]]))[0].select(block, torch.zeros(1, 2, 4))
    # Without padding there is nothing to tell of pooled tokens, those of one expert, and patches of pictures.
    for shape in ((1, 2, 4), (3, 4)):
        assert tokens.select(block, torch.zeros(shape))[0].shape == (shape[-2], 4)
    tokens, block = filter_of(torch.ones(1, 4), pixel_values=torch.zeros(1, 3, 8, 8))
    assert tokens.select(block, torch.zeros(1, 5, 4))[0].shape == (5, 4)


SIZES = {"hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": HIDDEN}
SIDES = {"d_model": WIDTH, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": HIDDEN, "decoder_ffn_dim": 40}
SIDES |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
SPARSE = {"block_size": 2, "num_random_blocks": 1, "attention_type": "block_sparse", "max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("model_class", "config", "padded_to"),
    [
        (LongformerModel, LongformerConfig(attention_window=[4, 8], **SIZES | {"num_hidden_layers": 2}), 24),
        (LongformerModel, LongformerConfig(attention_window=16, chunk_size_feed_forward=4, **SIZES), 32),
        (LEDModel, LEDConfig(attention_window=8, max_encoder_position_embeddings=64, **SIDES), 24),
        (BigBirdModel, BigBirdConfig(**SPARSE, **SIZES), 18),
        (BigBirdPegasusModel, BigBirdPegasusConfig(**SPARSE, **SIDES), 18),
        (PegasusXModel, PegasusXConfig(block_size=8, num_global_tokens=2, **SIDES), 24),
    ],
    ids=["longformer", "longformer in chunks", "led", "big_bird", "bigbird_pegasus", "pegasus_x"],
)
def test_what_a_model_pads_within_is_padding(model_class, config, padded_to):
    config.vocab_size, config.pad_token_id = VOCABULARY, 1
    model = randomize(model_class(config)).eval()
    blocks = bind_blocks(model)
    ids = torch.cat([text_inputs(batch=4, length=17, seed=seed)["input_ids"] for seed in range(2)])
    mask = torch.ones_like(ids)

    def moments(ids, mask):
        batch = {"input_ids": ids} if mask is None else {"input_ids": ids, "attention_mask": mask}
        if config.is_encoder_decoder:
            batch["decoder_input_ids"] = ids[:, :5]
        return collected(model, blocks, [batch])

    lengths = []
    handle = blocks[0].down.register_forward_hook(lambda *call: lengths.append(call[-1].shape[1]))
    whole, bare = moments(ids, mask), moments(ids, None)
    handle.remove()
    own = config.num_global_tokens if isinstance(config, PegasusXConfig) else 0
    assert set(lengths) - {own} == {config.chunk_size_feed_forward or padded_to}
    mask[0, 12:] = 0
    padded = moments(ids, mask)
    added = padded_to - 17
    outside = moments(F.pad(ids, (0, added), value=1), F.pad(mask, (0, added)))
    for block in blocks:
        real = 8 * 5 if "decoder" in block.name else 8 * (17 + own)
        assert whole[block.name].tokens == bare[block.name].tokens == real
        assert torch.equal(whole[block.name].cov_fo, bare[block.name].cov_fo)
        assert padded[block.name].tokens == outside[block.name].tokens == real - 5 * ("decoder" not in block.name)
        torch.testing.assert_close(padded[block.name].cov_fo, outside[block.name].cov_fo, rtol=1e-4, atol=1e-5)


def test_chunks_that_may_be_of_padded_rows_or_not():
    config = BigBirdConfig(vocab_size=VOCABULARY, chunk_size_feed_forward=1, **SPARSE, **SIZES)
    model = randomize(BigBirdModel(config)).eval()
    with pytest.raises(ValueError, match="Pad its rows to a multiple of 2 tokens, which the model does within"):
        collected(model, bind_blocks(model), [text_inputs(batch=4, length=17)])


def test_a_model_whose_blocks_have_the_rows_second():
    config = FSMTConfig(langs=["a", "b"], src_vocab_size=VOCABULARY, tgt_vocab_size=VOCABULARY, **SIDES)
    model = randomize(FSMTModel(config)).eval()
    ids = torch.randint(3, VOCABULARY, (4, 4), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]])
    block, kept = bind_blocks(model)[0], []
    tokens = TokenFilter(model)
    batch = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": ids}
    tokens.start(batch)
    block.down.register_forward_hook(lambda module, args, output: kept.append(tokens.select(block, output)[0]))
    model(**batch)
    model(**{**batch, "input_ids": torch.where(mask > 0, ids, 7)})  # what padding says changes nothing
    assert kept[0].shape[0] == 11 and torch.allclose(*kept, atol=1e-6)


def test_prompts_of_an_adapter_are_real_tokens():
    model = get_peft_model(bert(), PromptTuningConfig(num_virtual_tokens=3, task_type="FEATURE_EXTRACTION"))
    blocks = bind_blocks(model)
    mask = torch.ones(4, 7)
    mask[1, 5:] = 0
    batches = [{**text_inputs(batch=4, seed=seed), "attention_mask": mask} for seed in range(2)]
    engine = Calibration.on(model, model.get_base_model(), batches)
    assert engine.moments(blocks)[blocks[0].name].tokens == 2 * (4 * 10 - 2)


def test_the_users_own_mask():
    def last_two(name, batch, shape):
        assert "attention_mask" in batch and shape == (1, 5) and name == "encoder.layer.0"
        mask = torch.zeros(shape)
        mask[:, 3:] = 1
        return mask

    tokens, block = filter_of(torch.tensor([[1, 1, 0]]), last_two)
    assert tokens.select(block, torch.zeros(1, 5, 4))[0].shape == (2, 4)
    tokens, block = filter_of(torch.tensor([[1, 1, 0]]), lambda name, batch, shape: torch.ones(2))
    with pytest.raises(ValueError, match=r"shape \(2,\)"):
        tokens.select(block, torch.zeros(1, 5, 4))


def test_too_few_tokens():
    model = bert()
    block = bind_blocks(model)[0]
    one = [text_inputs(batch=1, length=16)]
    with pytest.raises(ValueError, match="16 calibration tokens, of 1 different rows, .* At least 22 tokens"):
        collected(model, [block], one)[block.name].fit()
    collected(model, [block], [text_inputs(batch=1, length=22)])[block.name].fit()
    with pytest.raises(ValueError, match="3 of its neurons .* At least 25 tokens"):
        collected(model, [block], one, {block.name: [0, 1, 2]})[block.name].fit()


def test_rows_that_repeat_others_do_not_count():
    """However often, in whatever batch, and however padded."""
    model = bert()
    block = bind_blocks(model)[0]
    ids = text_inputs(batch=2, length=9)["input_ids"]
    copies = [{"input_ids": ids.repeat(8, 1)} for _ in range(8)]
    with pytest.raises(ValueError, match="18 calibration tokens, of 2 different rows, .* rows that repeat others"):
        collected(model, [block], copies)[block.name].fit()
    padded = {"input_ids": torch.cat([ids, ids], dim=1), "attention_mask": torch.ones(2, 18).long()}
    padded["attention_mask"][:, 9:] = 0
    plain = data()
    once = collected(model, [block], [*plain, {"input_ids": ids}])[block.name]
    often = collected(model, [block], [*plain, *copies, padded, *plain])[block.name]
    assert often.tokens == once.tokens == 8 * 14 + 18
    assert torch.equal(often.cov_fo, once.cov_fo)


def test_lines_are_not_fitted_to_a_few_tokens():
    model = bert()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    copies = [{"input_ids": text_inputs(batch=1, length=9)["input_ids"].repeat(8, 1)}]
    with pytest.raises(ValueError, match="9 calibration tokens of different rows are too few for the lines of block"):
        apply_layer_collapse(model, LayerCollapseConfig(linear_target="affine"), copies)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def gaussian(rows, width, outputs=8, rank=None, seed=0):
    """`(x, y)`: `y` is partly a linear map of `x`, and partly what no such map explains."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(width, outputs, generator=torch.Generator().manual_seed(9)) / width**0.5
    x = torch.randn(rows, rank or width, generator=generator)
    if rank is not None:
        x = x @ torch.randn(rank, width, generator=torch.Generator().manual_seed(8))
    return x, x @ weight + 0.5 * torch.randn(rows, outputs, generator=generator)


def moments_of(x, y):
    sums = sums_of(x, y)
    sums.add(x, y)
    return sums.finish(bind_blocks(bert())[0], len(x))


@pytest.mark.parametrize("width", [40, 300], ids=["float64", "float32"])
@pytest.mark.parametrize("tokens", [1.5, 3, 20])
def test_the_error_is_that_on_other_data(width, tokens):
    fit = moments_of(*gaussian(int(tokens * width), width)).fit()
    x, y = gaussian(2000, width, seed=1)
    error = float((x @ fit.weight_oi.T.float() + fit.bias_o.float() - y).norm() / y.norm())
    assert fit.error == pytest.approx(error, rel=0.15)
    assert 1 - fit.r2 == pytest.approx(error**2 * float(y.square().sum() / (y - y.mean(0)).square().sum()), rel=0.3)


@pytest.mark.parametrize("width", [40, 300], ids=["float64", "float32"])
def test_inputs_of_low_rank_need_no_more_tokens_than_they_have_dimensions(width):
    rank = width // 4
    moments = moments_of(*gaussian(2 * rank, width, rank=rank))
    assert moments.dimensions == pytest.approx(rank, abs=1)
    fit = moments.fit()
    x, y = gaussian(2000, width, rank=rank, seed=1)
    error = float((x @ fit.weight_oi.T.float() + fit.bias_o.float() - y).norm() / y.norm())
    assert fit.error == pytest.approx(error, rel=0.15)
    with pytest.raises(ValueError, match="do not determine"):
        moments_of(*gaussian(rank + 2, width, rank=rank)).fit()


def test_directions_that_hold_only_rounding_noise_get_no_weight():
    """Float32 sums of inputs of a low rank: other inputs have more dimensions, and must not meet amplified noise."""
    rank, width = 60, 400
    x, y = gaussian(2000, width, rank=rank)
    x = x + 1e-6 * torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    best = (torch.linalg.pinv((x - x.mean(0)).double(), rtol=1e-3) @ (y - y.mean(0)).double()).T
    weight = moments_of(x, y).fit().weight_oi
    assert (weight - best).norm() < 0.5 * best.norm()


def test_a_linear_block_is_recovered_from_float32_sums():
    x, _ = gaussian(4000, 300)
    x[:, 5] = 0.1 * x[:, 5] + x[:, 6]
    weight = torch.randn(8, 300, generator=torch.Generator().manual_seed(3))
    fit = moments_of(x, x @ weight.T + 1).fit()
    torch.testing.assert_close(fit.weight_oi.float(), weight, rtol=1e-3, atol=1e-2)
    assert fit.error < 1e-3


def test_data_that_are_not_finite():
    model = bert()
    with torch.no_grad():
        model.embeddings.word_embeddings.weight[5] = float("nan")
    batches = data()
    batches[3]["input_ids"][0, 0] = 5
    with pytest.raises(ValueError, match="not finite"):
        collected(model, bind_blocks(model), batches)
    with pytest.raises(ValueError, match="not finite"):
        scored(model, bind_blocks(model), batches)


def test_half_precision_models_are_summed_in_float32_or_better():
    model = bert().bfloat16()
    block = bind_blocks(model)[0]
    moments = collected(model, [block], data(40))[block.name]
    assert_moments(moments, *stored(model, block, data(40)))


@pytest.mark.parametrize("width", [20, 300], ids=["float64", "float32"])
def test_large_means_and_many_tokens_keep_their_precision(width):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(9000, width, generator=generator) + 100
    y = 3 * torch.randn(9000, 4, generator=generator) - 50 + x[:, :4]
    sums = sums_of(x[:700], y[:700])
    for start in range(0, 9000, 700):
        sums.add(x[start : start + 700], y[start : start + 700])
    assert_moments(sums.finish(bind_blocks(bert())[0], 1), x.double(), y.double(), 1e-5)


def test_a_massive_token_does_not_decide_the_fit():
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(4000, WIDTH, generator=generator), torch.randn(WIDTH, WIDTH, generator=generator)
    y = x @ weight + 0.1 * torch.randn(4000, WIDTH, generator=generator)
    x[7] *= 3
    y[7] = 1e5
    sums = sums_of(x, y)
    sums.add(x, y)
    fit = sums.finish(bind_blocks(bert())[0], 1).fit()
    # Its squared error weighs as much as that of a token of this length.
    ordinary = torch.arange(4000) != 7
    residual = (x @ fit.weight_oi.T.float() + fit.bias_o.float() - y)[ordinary]
    assert residual.square().mean() < 2 * 0.01
    assert functional.OUTLIER_LENGTH**2 / 4000 < 0.1


@pytest.mark.parametrize("name", ["bert", "vit"])
def test_neurons_are_scored_by_what_a_line_leaves_times_their_column(name):
    case = BY_NAME[name]
    model = case.model()
    blocks = bind_blocks(model)
    batches = [case.inputs(seed=seed) for seed in range(5)]
    scores = scored(model, blocks, batches)
    for block in blocks:
        seen = []
        handle = block.activation.register_forward_hook(
            lambda module, args, output, seen=seen: seen.append((args[0].flatten(0, -2), output.flatten(0, -2)))
        )
        with torch.no_grad():
            for batch in batches:
                model(**batch)
        handle.remove()
        z, a = (torch.cat(parts).double() for parts in zip(*seen, strict=True))
        z, a = z - z.mean(0), a - a.mean(0)
        left = (a - z * ((z * a).sum(0) / (z * z).sum(0))).square().mean(0)
        expected = left * block.down_affine()[0].detach().double().square().sum(0)
        torch.testing.assert_close(scores[block.name], expected, rtol=1e-6, atol=1e-9)


# ----------------------------------------------------------------------------------------------------
# One activation module for several blocks
# ----------------------------------------------------------------------------------------------------


class Mlp(nn.Module):
    def __init__(self, act, hidden=40):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(16, hidden), act, nn.Linear(hidden, 16)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class Stack(nn.Module):
    def __init__(self, act):
        super().__init__()
        self.first, self.second, self.third = Mlp(act), Mlp(act, 24), Mlp(act)

    def forward(self, x):
        return self.third(self.second(self.first(x)))


class Interleaved(nn.Module):
    """Two blocks that run at the same time, in a module of their own each so that both are verified."""

    def __init__(self, act):
        super().__init__()
        self.a, self.b = Mlp(act), Mlp(act)

    def forward(self, x):
        up_a, up_b = self.a.fc1(x), self.b.fc1(x)
        return self.b.fc2(self.b.act(up_b)) + self.a.fc2(self.a.act(up_a))


def stacks():
    """The same network twice: one activation module in all, and one in each."""
    shared = randomize(Stack(nn.GELU()), 3).eval()
    apart = copy.deepcopy(shared)
    for block in (apart.first, apart.second, apart.third):
        block.act = nn.GELU()
    return shared, apart, [{"x": torch.randn(64, 16)} for _ in range(3)]


COUNTS = {"all": 3, "[1]": 1, "[0, 2]": 2}


@pytest.mark.parametrize("blocks", ["all", [1], [0, 2]], ids=str)
def test_affine_targets_of_blocks_that_share_an_activation(blocks):
    shared, apart, batches = stacks()
    config = LayerCollapseConfig(blocks=blocks, linear_target="affine")
    for model in (shared, apart):
        apply_layer_collapse(model, config, batches)
    found, expected = shared.state_dict(), apart.state_dict()
    assert found.keys() == expected.keys() and sum(key.endswith(".alpha") for key in found) == COUNTS[str(blocks)]
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


def test_scores_and_moments_of_blocks_that_share_an_activation():
    shared, apart, batches = stacks()
    blocks = bind_blocks(shared)
    both = [(shared, blocks), (apart, [bind(apart, block) for block in blocks])]
    scores = [scored(model, bound, batches) for model, bound in both]
    assert all(torch.equal(scores[0][block.name], scores[1][block.name]) for block in blocks)
    neurons = {block.name: [3, 1] for block in blocks}
    moments = [collected(model, bound, batches, neurons) for model, bound in both]
    for block in blocks:
        assert torch.equal(moments[0][block.name].cov_ff, moments[1][block.name].cov_ff)


@pytest.mark.parametrize("run", ["affine", "scores", "moments"])
def test_blocks_that_share_an_activation_and_run_at_the_same_time(run):
    model = randomize(Interleaved(nn.GELU()), 3).eval()
    batches = [{"x": torch.randn(64, 16)}]
    blocks = bind_blocks(model)
    assert [block.name for block in blocks] == ["a", "b"]
    with pytest.raises(ValueError, match="a, b share one activation module and run at the same time"):
        if run == "affine":
            apply_layer_collapse(model, LayerCollapseConfig(linear_target="affine"), batches)
        elif run == "scores":
            scored(model, blocks, batches)
        else:
            collected(model, blocks, batches, {"a": [1], "b": [1]})
    assert type(model.a.act) is nn.GELU and not model.a.act._forward_hooks and not model.a.fc1._forward_hooks


def test_sums_of_all_processes_lie_where_the_block_does():
    """Those of other processes come over the CPU."""
    sums = RangeSums()
    sums.add(torch.randn(4, 3), torch.randn(4, 2))
    whole = sums.of_all_processes(torch.device("meta"))
    assert {part.device.type for part in (*whole.lengths, *whole.sums) if part is not None} == {"meta"}
