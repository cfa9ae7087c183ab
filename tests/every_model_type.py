"""Which model types of transformers can be patched, trained, collapsed, saved and loaded: tried on every one of them.

    python tests/every_model_type.py                  # all model types, seven minutes of CPU time
    python tests/every_model_type.py bert llama t5    # some
    python tests/every_model_type.py --check          # fails if a type of coverage.json does not pass any more
    python tests/every_model_type.py --update         # writes what it found into coverage.json

Each type is built small and random from its own config, nothing is downloaded. Then: find the blocks; give them random
weights and biases; patch (the output must not change by a bit); save and load patched; train three steps; set every
alpha to 1; collapse (the output must be the same map); save; load under every Auto class that knows the type. What
does not pass is reported with the stage and the reason, and whether the untouched model has the same trouble.
"""

import argparse
import collections
import contextlib
import json
import multiprocessing
import os
import re
import signal
import sys
import tempfile
import time
import warnings
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path


LIST = Path(__file__).resolve().with_name("coverage.json")
# Seconds of CPU time for one model type; parameters of the largest model that is still "small".
TIME_LIMIT, PARAMETER_LIMIT = 30, 30_000_000
# Relative difference of outputs allowed between alpha = 1 and merged, in float64 and in float32.
TOLERANCE = {"float64": 1e-6, "float32": 2e-3}
# Not a model type of transformers.
SKIPPED = {"layercollapse"}
# What is caught where the code of hundreds of model types runs: each has errors of its own, and every one of them is
# a result to report, with its reason.
UPSTREAM = Exception

WIDTH, HEADS, LAYERS, VOCABULARY = 32, 4, 2, 160


# ----------------------------------------------------------------------------------------------------
# Small configs
# ----------------------------------------------------------------------------------------------------

# field name -> small value. Applied where a config has such a field with an integer.
SMALL = {
    **dict.fromkeys(
        "hidden_size d_model n_embd embed_dim dim decoder_hidden_size encoder_hidden_size hidden_dim emb_dim "
        "text_embed_dim projection_dim embedding_size d_embed hidden_channels cross_attention_hidden_size "
        "intra_bottleneck_size true_hidden_size output_hidden_size "
        "out_hidden_size word_embed_proj_dim vision_hidden_size text_hidden_size "
        "decoder_dim encoder_dim d_inner_model query_dim conformer_conv_dim llm_dim dim_model".split(),
        WIDTH,
    ),
    **dict.fromkeys(
        "intermediate_size ffn_dim d_ff encoder_ffn_dim decoder_ffn_dim n_inner d_inner ffn_hidden_size dff "
        "dim_feedforward moe_intermediate_size shared_expert_intermediate_size mlp_dim feed_forward_size "
        "intermediate_dim shared_intermediate_size encoder_intermediate_dim decoder_intermediate_dim ffn_size "
        "intermediate_size_mlp decoder_intermediate_size encoder_intermediate_size expert_ffn_hidden_size".split(),
        2 * WIDTH,
    ),
    **dict.fromkeys(
        "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers depth num_decoder_layers "
        "encoder_num_layers decoder_num_layers num_encoder_layers encoder_num_hidden_layers l_layers x_layers "
        "r_layers decoder_num_hidden_layers text_encoder_num_hidden_layers num_blocks sequence_layers".split(),
        LAYERS,
    ),
    **dict.fromkeys(
        "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads "
        "encoder_num_attention_heads decoder_num_attention_heads num_head attention_heads "
        "speech_encoder_attention_heads".split(),
        HEADS,
    ),
    **dict.fromkeys(
        "num_key_value_heads encoder_num_key_value_heads decoder_num_key_value_heads num_kv_heads".split(), HEADS
    ),
    **dict.fromkeys("head_dim d_kv attention_head_dim attention_head_size v_head_dim".split(), WIDTH // HEADS),
    **dict.fromkeys(
        "vocab_size text_vocab_size entity_vocab_size vocab_size_per_layer_input".split(),
        VOCABULARY,
    ),
    **dict.fromkeys("full_attention_interval attn_layer_period expert_layer_period".split(), 2),
    **dict.fromkeys("attn_layer_offset expert_layer_offset".split(), 1),
    **dict.fromkeys("num_experts n_routed_experts num_local_experts moe_num_experts num_routed_experts".split(), 4),
    **dict.fromkeys("num_experts_per_tok moe_topk moe_k moe_top_k".split(), 2),
    **dict.fromkeys("max_position_embeddings n_positions max_source_positions max_target_positions".split(), 64),
    **dict.fromkeys("image_size img_size".split(), 32),
    **dict.fromkeys("patch_size".split(), 8),
    **dict.fromkeys("q_lora_rank kv_lora_rank".split(), 16),
    **dict.fromkeys("rotary_dim".split(), 4),
    **dict.fromkeys("chunk_size mamba_chunk_size mamba_d_state ssm_state_size".split(), 16),
    **dict.fromkeys("qk_rope_head_dim qk_nope_head_dim".split(), WIDTH // HEADS // 2),
}
# field name -> small list, given its length.
SMALL_LISTS = {
    "image_size": lambda stages: [64] * stages,
    "num_heads": lambda stages: [HEADS] * stages,
}
# model type -> fields that its own rules demand beside the small ones.
OWN_FIELDS = {
    "sam2_hiera_det_model": {"hidden_size": 96, "image_size": [128, 128]},
    "deepseek_v3": {"head_dim": 4},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 8, "attn_layer_indices": [1]},
    "granitemoehybrid": {"mamba_n_heads": 8, "mamba_d_head": 8, "layer_types": ["mamba", "attention"]},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "attention_layers": ["global", "local"]},
    "gemma3n_text": {"intermediate_size": 64, "num_kv_shared_layers": 0, "activation_sparsity_pattern": None},
    "nemotron": {"num_key_value_heads": HEADS},
    "cvt": {"embed_dim": [16, 24, 48]},  # lists of widths stay as they are: 30 M parameters
    "esm": {"vocab_size": VOCABULARY, "pad_token_id": 1},
    "recurrent_gemma": {"num_hidden_layers": 3},
    **dict.fromkeys("hunyuan_v1_dense hunyuan_v1_moe ministral".split(), {"head_dim": 8}),
    **dict.fromkeys(
        "qwen3_next qwen3_5_text qwen3_5_moe_text lfm3".split(),
        {"layer_types": ["linear_attention", "full_attention"]},
    ),
    "qwen2_vl_text": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}},
    "qwen2_5_vl_text": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}},
    "glm4v_text": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}},
    "glm_ocr_text": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}},
    "glm_image_text": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}},
}
# Derived from other fields when they are not given.
DERIVED = {"layer_types", "mlp_layer_types", "layers_block_type", "hybrid_layer_ids", "torch_dtype", "dtype"}
DERIVED |= {"out_features", "out_indices", "stage_names", "per_layer_config", "block_types", "no_rope_layers"}


def shrink(values, level):
    """The fields of a config as constructor arguments, made small. Level 0 shrinks what it can, 1 leaves images and
    positions as they are, 2 only takes fewer layers and tokens."""
    small = {}
    own = OWN_FIELDS.get(values.get("model_type"), {}) if level == 0 else {}
    for name, value in values.items():
        if name in DERIVED or name.startswith("_") or name in ("transformers_version", "architectures"):
            continue
        if isinstance(value, dict) and "model_type" in value:
            value = shrink(value, level)
        elif isinstance(value, dict) and name.startswith("rope"):
            value = {k: [2, 1, 1] if k == "mrope_section" and level == 0 else v for k, v in value.items()}
        elif value is None and name == "num_experts_per_tok":
            value = 2
        elif isinstance(value, bool) or value is None:
            pass
        elif isinstance(value, int):
            target = SMALL.get(name)
            if target is not None and _allowed(target, level) and value > target:
                value = target
            elif name.endswith(("_token_id", "_token_index", "_token")) and value >= VOCABULARY:
                value = VOCABULARY - 1 - sum(name.encode()) % 60
        elif isinstance(value, list) and name in SMALL_LISTS and level == 0:
            value = SMALL_LISTS[name](len(value))
        elif isinstance(value, list) and name in ("depths", "num_layers_per_stage", "layers"):
            value = [min(LAYERS, item) if isinstance(item, int) else item for item in value]
        small[name] = value
    return {**small, **own}


def _allowed(target, level):
    return level == 0 or (level == 1 and target not in (64, 8, 16)) or target in (LAYERS, VOCABULARY)


def small_configs(config_class):
    """Small configs of a family, smallest first."""
    values = config_class().to_dict()
    for level in (0, 1, 2):
        values_now = shrink(values, level)
        values_now.pop("model_type", None)
        try:
            yield config_class(**values_now)
        except UPSTREAM as error:
            yield error


# ----------------------------------------------------------------------------------------------------
# One model type
# ----------------------------------------------------------------------------------------------------


class Failure(Exception):
    """A stage that did not pass."""


def auto_classes(config_class):
    """Every Auto class that gives a model for this config, `AutoModel` first."""
    from transformers.models.auto import auto_factory, modeling_auto

    found = {}
    for value in modeling_auto.__dict__.values():
        if isinstance(value, type) and issubclass(value, auto_factory._BaseAutoModelClass) and value._model_mapping:
            if config_class in value._model_mapping:
                found[value.__name__] = value
    return dict(sorted(found.items(), key=lambda item: (item[0] != "AutoModel", item[0])))


def wholes_of(config_class):
    """The model types that hold a config of this class."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    wholes = []
    for model_type in sorted(CONFIG_MAPPING.keys()):
        if model_type not in SKIPPED and config_class in CONFIG_MAPPING[model_type].sub_configs.values():
            wholes.append(model_type)
    return wholes


def build(model_type):
    """`(model, Auto classes, inputs of the modules to run)` of a small random model."""
    import torch
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config_class = CONFIG_MAPPING[model_type]
    autos = auto_classes(config_class)
    if not autos:
        wholes = wholes_of(config_class)
        raise Failure("no Auto class gives a model of this type" + (f", a part of {wholes[0]}" if wholes else ""))
    first = next(iter(autos.values()))
    reason = None
    for config in small_configs(config_class):
        if isinstance(config, Exception):
            reason = reason or f"config: {_line(config)}"
            continue
        try:
            with torch.device("meta"):
                size = sum(parameter.numel() for parameter in first.from_config(config).parameters())
            if size > PARAMETER_LIMIT:
                raise Failure(f"{size:,} parameters at its smallest")
            torch.manual_seed(0)
            model = first.from_config(config).eval().float()
            randomise(model)
            return model, autos, runnable(model)
        except UPSTREAM as error:
            reason = reason or _line(error)
    raise Failure(reason)


def randomise(model):
    import torch
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.Linear, Conv1D)):
                module.weight.normal_(0, 0.5 * min(module.weight.shape) ** -0.5, generator=generator)
            for name, parameter in module._parameters.items():
                if parameter is not None and name.endswith("bias"):
                    parameter.normal_(0, 0.2, generator=generator)


def runnable(model):
    """`{name: inputs}` of the model and of the towers in it that its own inputs do not reach."""
    from transformers.modeling_utils import PreTrainedModel

    from hf_layercollapse.probe_inputs import model_inputs

    runs, failure = {}, None
    for name, module in model.named_modules():
        inputs = model_inputs(module) if isinstance(module, PreTrainedModel) else None
        for candidate in _alternatives(inputs or {}):
            try:
                # Twice: Swin's windows shrink for good when they meet a small image.
                for _ in range(2):
                    forward({name: candidate}, model)
            except UPSTREAM as error:
                failure = failure or _line(error)
            else:
                runs[name] = candidate
                break
    if not runs:
        raise Failure(f"no inputs are known that it runs on: {failure}")
    return runs


def _alternatives(inputs):
    """The inputs as made up, then in the other shapes that models want."""
    if inputs:
        yield inputs
    for key, value in inputs.items():
        if len(inputs) > 1:
            yield {key: value}
        if key == "pixel_values":
            yield {**inputs, key: value[:, None].expand(-1, 16, -1, -1, -1).clone()}
            yield {**inputs, key: value[:, None].expand(-1, 2, -1, -1, -1).clone()}
        if key == "input_values":
            yield {**inputs, key: value[:, None]}
            yield {**inputs, key: value[:, :1, None].expand(-1, 1024, 128).clone()}
        if key == "input_features":
            yield {**inputs, key: value.transpose(1, 2)}


def forward(runs, model, differentiable=False):
    """All floating-point outputs of all runs, in order."""
    import torch

    from hf_layercollapse.verification import _tensors

    outputs = []
    with contextlib.nullcontext() if differentiable else torch.no_grad():
        for name, inputs in runs.items():
            module = model.get_submodule(name)
            dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
            torch.manual_seed(0)
            inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
            output = module(**inputs)
            found = [tensor for tensor in _tensors(output) if tensor.is_floating_point()]
            outputs += found if differentiable else [tensor.detach().clone() for tensor in found]
    return outputs


def identical(a, b):
    import torch

    return len(a) == len(b) and all(
        x.shape == y.shape and torch.equal(x.nan_to_num(), y.nan_to_num()) for x, y in zip(a, b, strict=True)
    )


def same_model(a, b, runs):
    """Whether two models have the same weights and outputs; the same sum can be rounded differently at another
    address."""
    import torch

    one, other = a.state_dict(), b.state_dict()
    if one.keys() != other.keys() or not all(torch.equal(one[key], other[key]) for key in one):
        return False
    x, y = forward(runs, a), forward(runs, b)
    return identical(x, y) or difference(x, y) < 1e-5


def difference(a, b):
    """Largest difference of two runs, relative to the largest value of each tensor."""
    if [x.shape for x in a] != [y.shape for y in b]:
        return float("inf")
    worst = 0.0
    for x, y in zip(a, b, strict=True):
        if x.numel():
            x, y = x.double().nan_to_num(0, 0, 0), y.double().nan_to_num(0, 0, 0)
            worst = max(worst, float((x - y).abs().max() / x.abs().max().clamp_min(1e-6)))
    return worst


def reached(model, blocks, runs, out_of_order):
    """Indices of the blocks that the runs come through; what does not run in that order is added to a list."""
    seen, handles = set(), []
    for block in blocks:
        down = model.get_submodule(block.path(block.layout.down))
        handles.append(down.register_forward_hook(lambda *_, index=block.index: order.append(index)))
    for name, inputs in runs.items():
        order = []
        forward({name: inputs}, model)
        first = list(dict.fromkeys(order))
        if first != sorted(first) and not out_of_order:
            out_of_order.append(f"{blocks[first[0]].name} before {blocks[min(first)].name}")
        seen |= set(first)
    for handle in handles:
        handle.remove()
    return seen


def examine(model_type):
    """Everything about one model type, as plain data."""
    started = time.process_time()
    result = {"model_type": model_type, "status": "failed", "stage": "build"}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _examine(model_type, result)
    except Failure as failure:
        result["reason"] = str(failure)
        if "the untouched model" in result["reason"]:
            result["status"] = "failed natively"
    except UPSTREAM as error:
        result["reason"] = _line(error)
    if result["stage"] == "build":
        result["status"] = "not built"
    result["seconds"] = round(time.process_time() - started, 2)
    return result


def train(model, runs, alphas, steps=3):
    """A few steps on all parameters towards small outputs and linear activations."""
    import torch

    from hf_layercollapse.patching import penalty

    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for _ in range(steps):
        outputs = forward(runs, model, differentiable=True)
        loss = sum(output.float().square().mean() for output in outputs if output.requires_grad) + penalty(alphas)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def _examine(model_type, result):
    import torch

    from hf_layercollapse import LayerCollapseConfig, apply_layer_collapse, collapse_model
    from hf_layercollapse.families import survey_blocks
    from hf_layercollapse.patching import alpha_parameters

    model, autos, runs = build(model_type)
    native_config = type(model.config)

    result["stage"] = "find"
    blocks, refused = survey_blocks(model)
    result["blocks"] = dict(collections.Counter(block.layout.name for block in blocks))
    result["refused"] = collections.Counter(_shape(reason) for reason in refused.values())
    if not blocks:
        result["status"] = "no blocks"
        reasons = [f"{reason} ({count})" for reason, count in result["refused"].items()]
        result["reason"] = "; ".join(reasons) or "nothing in it is spelled like a feed-forward block"
        return
    out_of_order = []
    result["reached"] = len(reached(model, blocks, runs, out_of_order))
    if out_of_order:
        result["out of order"] = out_of_order[0]

    result["stage"] = "patch"
    before = forward(runs, model)
    apply_layer_collapse(model, LayerCollapseConfig())
    if not identical(before, forward(runs, model)):
        if identical(before, forward(runs, model)):
            raise Failure("the model is not deterministic")
        raise Failure(f"patched differs from dense by {difference(before, forward(runs, model)):.1e}")

    result["stage"] = "train"
    alphas = alpha_parameters(model)
    try:
        train(model, runs, alphas)
    except UPSTREAM:
        try:
            train(model.train(), runs, alphas)  # some types cannot be trained in evaluation mode
        except UPSTREAM as error:
            native = build(model_type)[0].train()
            try:
                train(native, runs, [])
            except UPSTREAM:
                result["not trained"] = f"nor is the untouched model: {_line(error)}"
            else:
                raise
    model.eval()
    if "not trained" not in result and not all(float(alpha.detach()) != 0 for alpha in alphas):
        raise Failure("an alpha did not move")

    with tempfile.TemporaryDirectory() as folder:
        result["stage"] = "load patched"
        model.save_pretrained(folder)
        try:
            again = next(iter(autos.values())).from_pretrained(folder).eval()
        except UPSTREAM as error:
            raise Failure(_line(error) + native_trouble(model_type, autos)) from None
        if not same_model(model, again, runs):
            raise Failure("a patched model comes back different" + native_trouble(model_type, autos))
        del again

    result["stage"] = "collapse"
    with torch.no_grad():
        for alpha in alphas:
            alpha.fill_(1.0)
    exact = forward(runs, model)
    report = collapse_model(model)
    after = forward(runs, model)
    if len(report.collapsed) != len(blocks):
        raise Failure(f"{len(report.collapsed)} of {len(blocks)} blocks collapsed")
    worst = max(block.error for block in report.blocks)
    if not worst < 1e-5:
        raise Failure(f"a merged block differs by {worst:.1e}")
    result["difference"] = difference(exact, after)
    if not result["difference"] <= TOLERANCE["float32"]:
        raise Failure(f"collapsed differs from alpha = 1 by {result['difference']:.1e}")

    result["stage"] = "load collapsed"
    result["heads"] = {}
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        state = model.base_model.state_dict()
        for name, auto in autos.items():
            result["heads"][name] = "loads"
            try:
                again = auto.from_pretrained(folder).eval()
            except UPSTREAM as error:
                if "Unrecognized configuration class" in str(error):
                    result["heads"][name] = "is made from the config of a part"
                    continue
                trouble = native_trouble(model_type, autos, name)
                result["heads"][name] = f"{_line(error)}{trouble}"
                if not trouble:
                    raise Failure(f"{name}: {_line(error)}") from None
                continue
            if not isinstance(again.config, native_config):
                raise Failure(f"{name} gives a {type(again.config).__name__}")
            if name == next(iter(autos)):
                result["heads"][name] = "equal"
                if not same_model(model, again, runs):
                    raise Failure("a collapsed model comes back different" + native_trouble(model_type, autos))
            loaded = again.base_model.state_dict()
            common = [key for key in state if key in loaded]
            wrong = [key for key in common if not torch.equal(state[key], loaded[key])]
            if wrong:
                trouble = native_trouble(model_type, autos, name)
                result["heads"][name] = f"{len(wrong)} weights differ{trouble}"
                if not trouble:
                    raise Failure(f"{name}: {len(wrong)} of {len(common)} weights differ, such as {wrong[0]}")
    result["stage"], result["status"] = "done", "passed"


def native_trouble(model_type, autos, head=None):
    """What is wrong with saving and loading the untouched model, in words, or nothing."""
    import torch

    model, _, runs = build(model_type)
    with tempfile.TemporaryDirectory() as folder:
        try:
            model.save_pretrained(folder)
            again, info = autos[head or next(iter(autos))].from_pretrained(folder, output_loading_info=True)
        except UPSTREAM as error:
            return f" (the untouched model does not load either: {_line(error)})"
        if head is None and not same_model(model, again.eval(), runs):
            return " (so does the untouched model)"
        state, loaded = model.base_model.state_dict(), again.base_model.state_dict()
        if any(not torch.equal(state[key], loaded[key]) for key in state if key in loaded):
            return " (of the untouched model too)"
        if info["missing_keys"] and info["unexpected_keys"]:
            return f" (the untouched model loses {len(info['unexpected_keys'])} weights there, silently)"
    return ""


def _line(error):
    """An error in one line, without the names of temporary folders."""
    text = re.sub(rf"{re.escape(tempfile.gettempdir())}/\w+", "FOLDER", " ".join(str(error).split()))
    text = re.sub(r"[\w/.-]+/site-packages/", "", text)[:300]
    return text if isinstance(error, Failure) else f"{type(error).__name__}: {text}"


def _shape(reason):
    """A reason without its numbers, so that equal ones are counted together."""
    return "".join("#" if character.isdigit() else character for character in reason.split("(")[0]).strip()


# ----------------------------------------------------------------------------------------------------
# All of them
# ----------------------------------------------------------------------------------------------------


def _start_worker():
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    from transformers.utils import logging

    import hf_layercollapse  # noqa: F401

    torch.set_num_threads(1)
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    sys.stdout = open(os.devnull, "w")
    sys.stderr = open(os.devnull, "w")


def _examine_in_time(model_type):
    """`examine` in a worker, which ends when the time is up: an exception out of a signal can come up inside native
    code, which then aborts or goes on with half of its work done."""
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_PROF, TIME_LIMIT)
    try:
        return examine(model_type)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _send_result(model_type, sender):
    _start_worker()
    sender.send(_examine_in_time(model_type))


def _examine_alone(model_type):
    """The result of a model type whose process may die, and then what it died of."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.Process(target=_send_result, args=(model_type, sender))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        process.join()
    result = {"model_type": model_type, "stage": "unknown"}
    if process.exitcode == -signal.SIGPROF:
        return {**result, "status": "not built", "reason": f"took more than {TIME_LIMIT} s of CPU time"}
    return {**result, "status": "failed", "reason": f"the process died (exit status {process.exitcode})"}


def examine_all(model_types, workers=2):
    """Yields the result of each model type, in processes of their own; one that dies takes no other with it."""
    waiting = list(model_types)
    while waiting:
        with ProcessPoolExecutor(workers, initializer=_start_worker) as pool:
            suspects = []
            try:
                futures = {pool.submit(_examine_in_time, model_type): model_type for model_type in waiting}
                for future in as_completed(futures):
                    result = future.result()
                    waiting.remove(result["model_type"])
                    yield result
            except BrokenProcessPool:
                # They were begun in this order: one of the first that are left has died.
                suspects = waiting[:workers]
        for model_type in suspects:
            waiting.remove(model_type)
            yield _examine_alone(model_type)


STATUSES = {
    "passed": "passed",
    "failed": "failed",
    "failed natively": "failed, and so does the untouched model",
    "no blocks": "hold no feed-forward block that can collapse",
    "not built": "not tried: no small model of the type could be built and run here",
}


def summary(results):
    lines = []
    by_status = {status: [result for result in results if result["status"] == status] for status in STATUSES}
    lines += [f"{len(found):4d} {STATUSES[status]}" for status, found in by_status.items()]
    passed = by_status["passed"]
    count = sum(sum(result["blocks"].values()) for result in passed)
    heads = sum(len(loaded_heads(result)) for result in passed)
    ran = sum(result["reached"] for result in passed)
    untrained = [result["model_type"] for result in passed if "not trained" in result]
    lines.append(
        f"\nof those that passed: {count} blocks, {ran} of them reached by the made-up inputs, the others compared "
        f"block by block; {heads} heads loaded; not trained, as the untouched model cannot be: "
        f"{', '.join(untrained) or 'none'}"
    )
    lines.append("\nlayout: model types that pass (blocks)")
    layouts = collections.defaultdict(dict)
    for result in passed:
        for layout, number in result["blocks"].items():
            layouts[layout][result["model_type"]] = number
    for layout, types in sorted(layouts.items(), key=lambda item: -len(item[1])):
        lines.append(f"  {layout}: {len(types)} types, {sum(types.values())} blocks; {', '.join(list(types)[:6])}")
    for status in list(STATUSES)[1:]:
        reasons = collections.defaultdict(list)
        for result in by_status[status]:
            reason = re.sub(r", a part of .*", "", result["reason"])
            reasons[f"{result['stage']}: {_shape(reason)}"[:150]].append(result["model_type"])
        lines.append(f"\n{STATUSES[status]}")
        for reason, types in sorted(reasons.items(), key=lambda item: -len(item[1])):
            lines.append(f"  {len(types):3d} {reason}: {', '.join(types)}")
    return "\n".join(lines)


def loaded_heads(result):
    return sorted(name for name, found in result["heads"].items() if found in ("equal", "loads"))


def as_list(results):
    """What is committed: of each model type that passes its blocks by layout and the Auto classes that load it, of
    every other one its reason."""
    listed = {"passed": {}, **{status: {} for status in list(STATUSES)[1:]}}
    for result in sorted(results, key=lambda result: result["model_type"]):
        entry = result.get("reason")
        if result["status"] == "passed":
            heads = loaded_heads(result)
            entry = {"blocks": result["blocks"], "heads": heads}
            # What the untouched model cannot do either.
            native = {name: found for name, found in result["heads"].items() if name not in heads}
            entry |= {"heads that fail natively": native} if native else {}
            entry |= {"not trained": result["not trained"]} if "not trained" in result else {}
        listed[result["status"]][result["model_type"]] = entry
    return listed


def still_passes(model_type, committed, listed, same_heads=True):
    """Whether a type passes with the blocks and heads of the committed list.

    Without `same_heads` it passes with the blocks alone: which heads a type has is another in another transformers.
    """
    before, now = committed["passed"][model_type], listed["passed"].get(model_type, {})
    same = all(now.get(key) == before[key] for key in ("blocks", "heads")[: 1 + same_heads])
    return same and ("not trained" in before or "not trained" not in now)


def read_list():
    return json.loads(LIST.read_text())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_types", nargs="*", help="model types to try; all that transformers has if none")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--check", action="store_true", help="fail if a type of the committed list does not pass")
    parser.add_argument("--update", action="store_true", help="write the committed list")
    parser.add_argument("--output", type=Path, help="write all results here, as JSON")
    arguments = parser.parse_args()

    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    types = arguments.model_types or sorted(set(CONFIG_MAPPING_NAMES) - SKIPPED)
    committed = read_list()
    if arguments.check and not arguments.model_types:
        types = sorted(committed["passed"])
    results = []
    started = time.time()
    for result in examine_all(types, arguments.workers):
        results.append(result)
        reason = f" at {result['stage']}: {result['reason']}" if "reason" in result else ""
        print(f"{len(results):3d}/{len(types)} {result['model_type']}: {result['status']}{reason}"[:300], flush=True)
    used = os.times()
    print(f"\n{summary(results)}\n")
    print(f"{time.time() - started:.0f} s, {used.children_user + used.children_system:.0f} s of CPU time")
    if arguments.output:
        arguments.output.write_text(json.dumps(sorted(results, key=lambda r: r["model_type"]), indent=1) + "\n")
    listed = as_list(results)
    if arguments.update:
        for status, found in listed.items():
            kept = {name: entry for name, entry in committed[status].items() if name not in types}
            # Without names everything was tried, and the list is of this one run.
            listed[status] = {**kept, **found} if arguments.model_types else found
        LIST.write_text(json.dumps(listed, indent=1, sort_keys=True) + "\n")
    if arguments.check:
        lost = [name for name in types if name in committed["passed"] and not still_passes(name, committed, listed)]
        if lost:
            sys.exit(f"not as in {LIST.name} any more: {', '.join(lost)}")


if __name__ == "__main__":
    main()
