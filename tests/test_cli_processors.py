"""Models that read more than one kind of input, from the shell: what goes beside them, and data that is not enough."""

import json

import pytest
from transformers import (
    AutoImageProcessor,
    AutoProcessor,
    AutoTokenizer,
    CLIPConfig,
    CLIPModel,
    CLIPProcessor,
    LlavaProcessor,
    Wav2Vec2FeatureExtractor,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from hf_layercollapse.loading import processors_to_save

from .command_line import fails, lines_of_words, run, save_text_model
from .models import BY_NAME, needs_torchvision
from .test_families import tiny_llava, tiny_towers


pytestmark = needs_torchvision


def with_processor(model, folder, processor_class, **options):
    """A folder of a model with a processor of images and texts."""
    save_text_model(folder)
    images = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    model.save_pretrained(folder)
    processor_class(images, AutoTokenizer.from_pretrained(folder), **options).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    model = tiny_towers(CLIPConfig, CLIPModel)()
    return with_processor(model, tmp_path_factory.mktemp("clip") / "model", CLIPProcessor)


@pytest.fixture
def data(tmp_path):
    (tmp_path / "data.txt").write_text("\n".join(lines_of_words(60)) + "\n")
    return tmp_path / "data.txt"


def test_a_processor_of_several_parts(data, tmp_path):
    """Texts are read by its tokenizer, and all of it is saved."""
    folder, output = tmp_path / "model", tmp_path / "small"
    with_processor(tiny_llava(), folder, LlavaProcessor, patch_size=8)
    options = ["--blocks", "language_model", "--budget", "macs=0.7", "--samples", 32, "--max-length", 12]
    result = run("collapse", folder, "--data", data, "--output", output, *options)
    assert result.exit_code == 0, result.output
    then, now = (AutoProcessor.from_pretrained(each) for each in (folder, output))
    assert isinstance(now, LlavaProcessor) and now.to_dict() == then.to_dict()
    assert now.tokenizer("w1 w2").input_ids == then.tokenizer("w1 w2").input_ids


def kinds(*found):
    return [type(each).__name__ for each in processors_to_save(*found, False)]


def test_what_goes_beside_a_model(clip, tmp_path):
    texts, both, images, sounds = (tmp_path / name for name in ("texts", "both", "images", "sounds"))
    tokenizer = AutoTokenizer.from_pretrained(save_text_model(texts))
    words = type(tokenizer).__name__
    assert kinds(tokenizer, str(texts), None) == [words]
    assert kinds(AutoTokenizer.from_pretrained(clip), str(clip), None) == ["CLIPProcessor"]
    # Where the data was read by something else, that comes last.
    assert kinds(tokenizer, str(clip), str(texts)) == ["CLIPProcessor", words]
    BY_NAME["vit"].model().save_pretrained(images)
    reader = ViTImageProcessorPil(size={"height": 8, "width": 8})
    reader.save_pretrained(images)
    reader = AutoImageProcessor.from_pretrained(images)
    assert kinds(reader, str(images), None) == [type(reader).__name__]
    # Two that no class of a processor holds together.
    save_text_model(both)
    BY_NAME["vit"].model().save_pretrained(both)
    reader.save_pretrained(both)
    assert kinds(reader, str(both), None) == [words, type(reader).__name__]
    BY_NAME["bert"].model().save_pretrained(sounds)
    Wav2Vec2FeatureExtractor().save_pretrained(sounds)
    assert kinds(tokenizer, str(sounds), str(texts)) == ["Wav2Vec2FeatureExtractor", words]


def test_a_processor_that_cannot_be_read(clip, tmp_path):
    """What is saved would lack what the source has."""
    folder = save_text_model(tmp_path / "model")
    content = json.loads((clip / "processor_config.json").read_text())
    (folder / "processor_config.json").write_text(json.dumps({"processor_class": content["processor_class"]}))
    with pytest.raises(ValueError, match="has a processor that cannot be read here, and what is saved would lack it"):
        processors_to_save(AutoTokenizer.from_pretrained(folder), str(folder), None, False)


def test_data_that_is_not_all_that_a_model_reads(clip, data, tmp_path, monkeypatch, capsys):
    out = ["--output", tmp_path / "out"]
    collapse = ["--budget", "macs=0.9", "--blocks", "text_model", *out]
    for command in (
        ["collapse", clip, "--data", data, *collapse],
        ["inspect", clip, "--data", data],
        ["compare", clip, clip, "--data", data],
        ["latency", clip, clip],
        ["export", clip, "--to", "stock", *out],
    ):
        refused = fails(monkeypatch, capsys, *command)
        assert "A CLIPModel does not run on these inputs alone (input_ids, attention_mask): " in refused
        assert "Error: " in refused and "From Python it can be given all that it reads" in refused
    assert not (tmp_path / "out").exists()
