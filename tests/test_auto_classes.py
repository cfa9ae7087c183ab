"""The class of a saved model: what the command line loads, and what a card tells its readers to load by."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModel, BertConfig, CLIPTextConfig, CLIPVisionConfig, ElectraConfig, T5Config

from hf_layercollapse import LayerCollapseConfig, collapse_model, create_model_card
from hf_layercollapse.auto_classes import auto_class_of
from hf_layercollapse.loading import load_model, load_transformers_model
from hf_layercollapse.model_card import loader_of
from hf_layercollapse.modeling_layercollapse import native_models_of

from .command_line import fails, lines_of_words, run, save_text_model
from .models import BY_NAME, image_inputs, randomize, text_inputs, tiny_wav2vec2
from .test_every_head import CONFIGS, heads_of
from .test_native_classes import tiny_yolos
from .test_own_code import AUTO_MAP, MODELING, POOLING


TEXT = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2}
PROJECTED = {"projection_dim": 8, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 40}
IMAGE = {"hidden_size": 16, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2}


def t5_config():
    return T5Config(vocab_size=64, d_model=16, d_ff=40, num_layers=2, num_heads=2, d_kv=8)


# Class -> its config, and the Auto class that has it.
HEADS = {
    "ElectraForPreTraining": (lambda: ElectraConfig(**TEXT, embedding_size=12), "AutoModelForPreTraining"),
    "BertForPreTraining": (lambda: BertConfig(**TEXT), "AutoModelForPreTraining"),
    "BertForNextSentencePrediction": (lambda: BertConfig(**TEXT), "AutoModelForNextSentencePrediction"),
    "BertModel": (lambda: BertConfig(**TEXT), "AutoModel"),
    "T5EncoderModel": (t5_config, "AutoModelForTextEncoding"),
    "YolosForObjectDetection": (lambda: tiny_yolos().config, "AutoModelForObjectDetection"),
    "CLIPTextModelWithProjection": (lambda: CLIPTextConfig(**TEXT, **PROJECTED), None),
    "CLIPVisionModelWithProjection": (
        lambda: CLIPVisionConfig(**IMAGE, projection_dim=8, image_size=8, patch_size=4),
        None,
    ),
}


def head(name):
    return randomize(getattr(transformers, name)(HEADS[name][0]())).eval()


def half_collapsed(model):
    inputs = image_inputs if model.main_input_name == "pixel_values" else text_inputs
    if type(model).__name__.startswith("Yolos"):
        data = [{"pixel_values": torch.randn(2, 3, 16, 16)} for _ in range(12)]
    else:
        data = [inputs(seed=seed) for seed in range(12)]
    report = collapse_model(model, LayerCollapseConfig(blocks="last:1", keep_neurons=2), calibration_data=data)
    return model, report


def assert_same_weights(model, other):
    assert type(model).__name__ == type(other).__name__
    assert model.state_dict().keys() == other.state_dict().keys()
    assert all(torch.equal(other.state_dict()[key], value) for key, value in model.state_dict().items())


def snippets(card):
    """The two ways to load a model that a card tells."""
    return [part.split("```")[0] for part in card.content.split("```python\n")[1:3]]


@pytest.mark.parametrize("name", HEADS)
def test_loaded_in_the_class_that_was_saved(name, tmp_path):
    """By the command line; and what was collapsed, as its card says too."""
    model = head(name)
    model.save_pretrained(tmp_path / "dense")
    assert_same_weights(model, load_model(str(tmp_path / "dense"), purpose="save"))
    model, report = half_collapsed(model)
    model.save_pretrained(tmp_path / "small")
    assert_same_weights(model, load_model(str(tmp_path / "small"), purpose="save"))
    assert auto_class_of(model.config, name) == HEADS[name][1]
    told = snippets(create_model_card(model, report, repo_id=str(tmp_path / "small")))
    # Running the code of a folder takes seconds.
    for snippet in told[:1] if name == "CLIPVisionModelWithProjection" else told:
        found = {}
        exec(snippet, found)
        assert_same_weights(model, found["model"])
        assert ("AutoModel" in snippet) == (HEADS[name][1] is not None)


@pytest.mark.parametrize("family", CONFIGS)
def test_an_auto_class_is_named_that_has_the_class(family):
    config = CONFIGS[family]()
    for native in heads_of(config):
        name = auto_class_of(config, native.__name__)
        if name is None:
            assert native.__name__.endswith("Backbone")
            continue
        assert name in [each.__name__ for each, models, _ in native_models_of(type(config)) if native in models]


def test_a_part_saved_by_itself(tmp_path):
    model, _ = half_collapsed(head("T5EncoderModel"))
    model.encoder.save_pretrained(tmp_path)
    assert loader_of(model.encoder).name == "AutoModel"
    assert_same_weights(model.encoder, load_model(str(tmp_path), purpose="save"))
    assert type(load_model(str(tmp_path))) is type(AutoModel.from_pretrained(tmp_path))


def test_code_that_comes_with_a_model(tmp_path):
    """The Auto class is the one that its `auto_map` has the class under, of what it becomes too."""
    folder = tmp_path / "theirs"
    BY_NAME["bert"].model().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"auto_map": AUTO_MAP, "architectures": ["MeanBert"]}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modeling_x.py").write_text(MODELING)
    (folder / "pooling_x.py").write_text(POOLING)
    model = load_transformers_model(str(folder), True, "save")
    assert type(model).__name__ == "MeanBert"
    data = [text_inputs(seed=seed) for seed in range(12)]
    collapse_model(model, LayerCollapseConfig(blocks="last:1", keep_neurons=2), calibration_data=data)
    assert loader_of(model).name == "AutoModelForSequenceClassification"
    model.save_pretrained(tmp_path / "small")
    assert_same_weights(model, load_transformers_model(str(tmp_path / "small"), True, "save"))
    # Nobody has it, and nobody guesses.
    config["architectures"] = ["MedianBert"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="it is a MedianBert, which neither transformers"):
        load_transformers_model(str(folder), True)


# ---- From the shell ----


@pytest.fixture
def data(tmp_path):
    (tmp_path / "data.txt").write_text("\n".join(lines_of_words(120)) + "\n")
    return tmp_path / "data.txt"


@pytest.fixture
def error(monkeypatch, capsys):
    return lambda *arguments: fails(monkeypatch, capsys, *arguments)


def change_config(folder, **values):
    path = folder / "config.json"
    content = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def test_collapse_keeps_the_head(data, tmp_path):
    folder, output = save_text_model(tmp_path / "model"), tmp_path / "small"
    head("ElectraForPreTraining").save_pretrained(folder)
    result = run("collapse", folder, "--data", data, "--budget", "macs=0.5", "--output", output)
    assert result.exit_code == 0, result.output
    assert f'AutoModelForPreTraining.from_pretrained("{output}")' in result.output
    assert "model = AutoModelForPreTraining.from_pretrained(" in (output / "README.md").read_text()
    saved = [load_file(each / "model.safetensors") for each in (folder, output)]
    heads = [{key for key in tensors if key.startswith("discriminator_predictions.")} for tensors in saved]
    assert heads[0] == heads[1] and len(heads[0]) == 4


def every_command(folder, data, tmp_path):
    """Command -> its arguments; the last only lists blocks."""
    read = ["--data", data]
    return {
        "collapse": [folder, *read, "--budget", "macs=0.5", "--output", tmp_path / "out"],
        "export": [folder, "--to", "stock", "--output", tmp_path / "out"],
        "measure": [folder, *read],
        "compare": [folder, folder, *read],
        "latency": [folder, folder],
        "inspect": [folder],
    }


def test_a_config_that_names_no_class(data, tmp_path, error):
    folder = save_text_model(tmp_path / "model")
    change_config(folder, architectures=None)
    for command, arguments in every_command(folder, data, tmp_path).items():
        refused = error({"measure": "inspect"}.get(command, command), *arguments)
        assert (
            f"{folder}: its config.json names no class" in refused and "`save_pretrained` writes the name" in refused
        )
    assert not (tmp_path / "out").exists()


def test_weights_that_only_training_reads(tmp_path):
    """Speech checkpoints lack what SpecAugment masks with."""
    folder = tmp_path / "model"
    tiny_wav2vec2().save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    left = {name: value for name, value in weights.items() if not name.endswith("masked_spec_embed")}
    assert len(left) < len(weights)
    save_file(left, folder / "model.safetensors")
    load_model(str(folder), purpose="save")


def test_weights_that_are_missing(data, tmp_path, error):
    """Refused by all that measures or writes; blocks are listed."""
    folder = save_text_model(tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in weights.items() if not k.startswith("classifier.")}, folder / "model.safetensors")
    for command, arguments in every_command(folder, data, tmp_path).items():
        if command == "inspect":
            assert run(command, *arguments).exit_code == 0
            continue
        refused = error({"measure": "inspect"}.get(command, command), *arguments)
        assert "does not hold all weights of a BertForSequenceClassification" in refused
        assert "classifier.bias, classifier.weight" in refused
    assert not (tmp_path / "out").exists()


def test_weights_that_have_no_place(data, tmp_path, caplog):
    """As `save_pretrained` leaves them out, so do commands that save, and say so; those that measure have no use for
    them. What the class makes itself is none."""
    folder = save_text_model(tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    positions = {"bert.embeddings.position_ids": torch.arange(40)[None]}
    more = {"cls.seq_relationship.bias": torch.zeros(2)}
    for content, purpose, told in ((positions, "save", 0), (positions | more, "measure", 0), (more, "save", 1)):
        save_file(weights | content, folder / "model.safetensors")
        caplog.clear()
        load_model(str(folder), purpose=purpose)
        lacking = (
            "has no place for, and what is saved lacks them, as with `save_pretrained`: cls.seq_relationship.bias."
        )
        assert caplog.text.count(lacking) == told
    arguments = every_command(folder, data, tmp_path)["collapse"]
    assert run("collapse", *arguments).exit_code == 0


def test_names_that_are_nowhere(data, tmp_path, error):
    """Neither a folder here nor in the Hub's cache."""
    for command, arguments in every_command("no-such-model", data, tmp_path).items():
        refused = error({"measure": "inspect"}.get(command, command), *arguments)
        assert "no-such-model: there is no such folder here, and no model of this name in the Hub's cache" in refused
        assert "HF_HUB_OFFLINE" in refused and "snapshot" not in refused
    assert "there is no such folder here, and of the Hub: " in error("inspect", "what is this?")
