"""What tests/test_hub.py has fresh processes do: push to a server that speaks the Hub's protocol, and load from it.

`HF_ENDPOINT` and the rest are read when huggingface_hub is imported, hence the processes.
"""

import json
import os
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file


SENTENCES = "user/sentences"
EXAMPLES = {"input_ids": torch.arange(3, 59).reshape(8, 7)}


def logits_of(model):
    with torch.no_grad():
        return model.eval()(**EXAMPLES).logits


def collapsed(seed=0):
    from hf_layercollapse import LayerCollapseConfig, collapse_model
    from tests.models import BY_NAME

    case = BY_NAME["bert"]
    model = case.model(seed)
    data = [case.inputs(batch=8, seed=i) for i in range(4)]
    return model, collapse_model(model, LayerCollapseConfig(blocks="last:2", keep_neurons=3), calibration_data=data)


def encoder(folder):
    """A SentenceTransformer with fewer neurons."""
    from hf_layercollapse import LayerCollapseConfig, collapse_model
    from tests.sentences import random_texts, save_encoder, sentence_transformer

    model = sentence_transformer(save_encoder(folder / "encoder", "sentence"), pooling_mode="cls")
    collapse_model(model, LayerCollapseConfig(keep_neurons=3), calibration_data=random_texts(80))
    return model


def embeddings_of(model):
    return model.encode(["a cat sits on the mat", "rain tomorrow"], convert_to_tensor=True).clone()


def trained(folder, name):
    """A trainer after a short run and a collapse."""
    from tests.training import trainer_for

    trainer = trainer_for(
        "bert",
        folder / "run",
        config={"alpha_learning_rate": 0.4, "collapse_threshold": 0.4},
        args={"max_steps": 6, "hub_model_id": name, "learning_rate": 1e-4},
    )
    trainer.train()
    trainer.evaluate()
    trainer.collapse()
    return trainer


def push(folder):
    """The ways to push: models, a trainer's, and an adapter of a model by transformers."""
    from hf_layercollapse.model_card import create_model_card

    model, report = collapsed()
    model.push_to_hub("user/plain")
    assert model.name_or_path == "user/plain"
    result = {"plain": logits_of(model)}

    model, report = collapsed(seed=1)
    model.push_to_hub("with-card", model_card=create_model_card(model, report, repo_id="user/with-card"))
    assert model.name_or_path == model.config.name_or_path == "user/with-card"
    # Again, and no card: that on the Hub stays. Nothing changed, so that nothing is committed.
    model.push_to_hub("user/with-card")
    result["with-card"] = logits_of(model)

    save_and_push(folder)

    trainer = trained(folder, "user/trained")
    trainer.push_to_hub(tags="a-tag", dataset_tags="stanfordnlp/sst2")
    result["trained"] = logits_of(trainer.model)

    sentences = encoder(folder)
    sentences.push_to_hub(SENTENCES)
    result["sentences"] = embeddings_of(sentences)

    from peft import LoraConfig

    from tests.training import adapters_of_transformers

    if adapters_of_transformers():
        model, _ = collapsed(seed=2)
        model.save_pretrained(folder / "base")
        model.add_adapter(LoraConfig(target_modules=["query"], init_lora_weights=False))
        model.save_pretrained(folder / "adapter", push_to_hub=True, repo_id="user/adapter")
        assert model.name_or_path == str(folder / "base")
        result["adapter"] = logits_of(model)
    save_file(result, folder / "pushed.safetensors")


def save_and_push(folder):
    """`save_pretrained(..., push_to_hub=True)` of a dense model and a collapsed one, with the same arguments."""
    from tests.models import BY_NAME

    for kind, model in (("dense", BY_NAME["bert"].model()), ("collapsed", collapsed()[0])):
        place = folder / f"saved-{kind}"
        place.mkdir()
        (place / "older.txt").write_text("was here")
        asked = []
        model.register_state_dict_pre_hook(lambda *_, asked=asked: asked.append(True))
        average = {key: value + 7 if key == "classifier.bias" else value for key, value in model.state_dict().items()}
        asked.clear()
        options = {"commit_message": "An average", "private": True, "variant": "average", "max_shard_size": "20KB"}
        model.save_pretrained(place, state_dict=average, push_to_hub=True, repo_id=f"user/saved-{kind}", **options)
        # Another process may hold a part of what was given.
        assert not asked
        model.save_pretrained(
            folder / f"proposed-{kind}", push_to_hub=True, create_pr=True, token=os.environ["HF_TOKEN"]
        )
        model.config.save_pretrained(str(folder / f"config-{kind}"), push_to_hub=True)

    model, _ = collapsed()
    model.push_to_hub("proposed-collapsed", create_pr=True)
    # By its name another model is loaded.
    assert model.name_or_path == ""
    (place / "README.md").write_text("mine")
    model.save_pretrained(place, push_to_hub=True, repo_id="with-a-readme")
    assert (place / "README.md").read_text() == "mine"


def interrupted(folder, kind):
    """Push; report what came of it, and what is left here."""
    import logging

    from transformers.utils import logging as transformers_logging

    # Between attempts the client waits up to eight seconds.
    time.sleep = lambda seconds: None
    messages = []

    class Keep(logging.Handler):
        def emit(self, record):
            messages.append(record.getMessage())

    transformers_logging.get_logger("transformers").addHandler(Keep())
    logging.getLogger("hf_layercollapse").addHandler(Keep())

    if kind == "trainer":
        trainer = trained(folder, "user/interrupted")
        model, attempt = trainer.model, trainer.push_to_hub
    else:
        model, _ = collapsed()

        def attempt():
            model.push_to_hub("user/interrupted")

    before, name = {key: value.clone() for key, value in model.state_dict().items()}, model.name_or_path
    outcomes = []
    for _ in range(sum(1 for _ in open(folder / "failures.jsonl")) + 1):
        # The test reads this line, and arms the next failure.
        print("ready", flush=True)
        sys.stdin.readline()
        messages.clear()
        try:
            attempt()
            outcomes.append({"error": None})
        except Exception as error:  # noqa: BLE001 (whatever the client raises)
            same = all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
            kept = model.name_or_path == name and model.config._name_or_path == name
            outcomes.append(
                {"error": f"{type(error).__name__}: {error}", "said": list(messages), "same": same, "name_kept": kept}
            )
    save_file({"logits": logits_of(model)}, folder / "interrupted.safetensors")
    (folder / "outcomes.json").write_text(json.dumps(outcomes))


def load(folder, plugin):
    """Every repository, with the package or with the code that lies in it."""
    if plugin:
        import hf_layercollapse  # noqa: F401
    from transformers import AutoModelForSequenceClassification, pipeline

    names = (folder / "names.txt").read_text().split()
    result = {}
    for name in names:
        if name == SENTENCES:
            from sentence_transformers import SentenceTransformer

            model = SentenceTransformer(name, device="cpu", trust_remote_code=not plugin)
            result["sentences"] = embeddings_of(model)
            if plugin:
                from hf_layercollapse.cli import load_model

                shells = load_model(name)
                assert type(shells) is SentenceTransformer
                assert torch.equal(embeddings_of(shells), result["sentences"])
            continue
        if not plugin:
            try:
                AutoModelForSequenceClassification.from_pretrained(name, trust_remote_code=False)
            except ValueError as error:
                assert "trust_remote_code" in str(error), error
            else:
                raise AssertionError("loaded with neither package nor flag")
        model = AutoModelForSequenceClassification.from_pretrained(name, trust_remote_code=not plugin)
        result[name.split("/")[1]] = logits_of(model)
    assert ("hf_layercollapse" in sys.modules) == plugin and pipeline
    save_file(result, folder / f"loaded_{plugin}.safetensors")


if __name__ == "__main__":
    what, place = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    if what == "push":
        push(place)
    elif what in ("model", "trainer"):
        interrupted(place, what)
    else:
        load(place, what == "load")
