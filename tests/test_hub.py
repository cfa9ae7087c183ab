"""Pushing and loading over HTTP, by the real client, from a server on localhost that speaks the Hub's protocol."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load, load_file
from transformers import AutoModelForSequenceClassification

import hf_layercollapse  # noqa: F401  (reads the models here)

from .hub_run import logits_of
from .hub_server import TOKEN, Failure, HubServer
from .training import NEWER_PEFT, adapters_of_transformers


ROOT = Path(__file__).parents[1]
FILES = {"README.md", "config.json", "model.safetensors", "modeling_layercollapse.py"}


def start(hub, folder, what, **kwargs):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": TOKEN,
        "HF_HOME": str(folder / f"home-{what}"),
        # hf_xet speaks to servers of its own; without it files go as LFS objects.
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "PYTHONPATH": str(ROOT),
        "NO_PROXY": "127.0.0.1",
    }
    command = [sys.executable, str(ROOT / "tests" / "hub_run.py"), what, str(folder)]
    return subprocess.Popen(command, env=environment, text=True, **kwargs)


def run(hub, folder, what):
    process = start(hub, folder, what, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-4000:]
    return errors


@pytest.fixture(scope="module")
def hub():
    with HubServer() as server:
        yield server


@pytest.fixture(scope="module")
def pushed(hub, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    run(hub, folder, "push")
    return folder, load_file(folder / "pushed.safetensors")


def card_of(repository):
    return ModelCard(repository.files["README.md"][0].decode())


def test_what_is_in_the_repositories(hub, pushed):
    assert {"user/plain", "user/with-card", "user/trained"} <= hub.repositories.keys()
    for name in ("plain", "with-card", "trained"):
        files = hub.repositories[f"user/{name}"].files
        assert FILES <= files.keys()
        assert [path for path, (_, large) in files.items() if large and path.endswith(".safetensors")]
        config = json.loads(files["config.json"][0])
        assert config["model_type"] == "layercollapse"
        assert config["auto_map"] == {"AutoConfig": "modeling_layercollapse.StoredConfig"}
        code = (ROOT / "hf_layercollapse" / "modeling_layercollapse.py").read_bytes()
        assert files["modeling_layercollapse.py"][0] == code
        assert "layercollapse" in card_of(hub.repositories[f"user/{name}"]).data.tags
        # In one commit.
        assert len(hub.repositories[f"user/{name}"].commits) == 2
    assert not hub.unknown


def test_saved_and_pushed_as_a_dense_model_is(hub, pushed):
    """All that the caller says reaches the Hub, and what is there is what lies in the folder."""
    folder, _ = pushed
    names, asked, tags = {}, {}, {}
    for kind in ("dense", "collapsed"):
        repository = hub.repositories[f"user/saved-{kind}"]
        asked[kind] = {key: value for key, value in repository.asked.items() if key != "name"}
        tags[kind] = card_of(repository).data.tags or []
        assert repository.messages[1:] == ["An average"]
        files = {name: content for name, (content, _) in repository.files.items() if name != ".gitattributes"}
        index = json.loads(files["model.safetensors.index.average.json"])["weight_map"]
        bias = load(files[index["classifier.bias"]])["classifier.bias"]
        assert (bias > 5).all()
        for name in files.keys() - {"README.md"}:
            assert (folder / f"saved-{kind}" / name).read_bytes() == files[name]
        (proposed,) = hub.repositories[f"user/proposed-{kind}"].proposed[:1]
        config = hub.repositories[f"user/config-{kind}"].files
        names[kind] = [{name.partition("-0")[0] for name in each} for each in (files, proposed, config)]
    assert asked["collapsed"] == asked["dense"] != hub.repositories["user/proposed-dense"].asked
    assert names["collapsed"] == [each | {"modeling_layercollapse.py"} for each in names["dense"]]
    assert set(tags["collapsed"]) - set(tags["dense"]) == {"layercollapse"}
    assert hub.repositories["user/with-a-readme"].files["README.md"][0] != b"mine"


def test_an_adapter_alone_in_a_repository(hub, pushed):
    """The model it is for lies elsewhere."""
    if not adapters_of_transformers():
        pytest.skip(NEWER_PEFT)
    files = hub.repositories["user/adapter"].files
    assert {"README.md", "adapter_config.json", "adapter_model.safetensors"} <= files.keys()
    assert not {"config.json", "model.safetensors"} & files.keys()
    assert len(hub.repositories["user/adapter"].commits) == 2


def test_the_cards(hub, pushed):
    card = card_of(hub.repositories["user/with-card"])
    assert 'from_pretrained("user/with-card")' in card.text and "| `bert.encoder.layer.2` |" in card.text
    card = card_of(hub.repositories["user/trained"])
    assert {"layercollapse", "a-tag"} <= set(card.data.tags) and card.data.datasets == ["stanfordnlp/sst2"]
    assert "penalty on `(1 - alpha)^2`" in card.text and "eval_loss" in card.text and "learning_rate" in card.text
    assert 'from_pretrained("user/trained")' in card.text


@pytest.mark.parametrize("plugin", [True, False])
def test_loaded_in_a_fresh_process(hub, pushed, plugin):
    folder, logits = pushed
    (folder / "names.txt").write_text("\n".join(f"user/{name}" for name in logits))
    run(hub, folder, "load" if plugin else "load-code")
    loaded = load_file(folder / f"loaded_{plugin}.safetensors")
    assert loaded.keys() == logits.keys()
    for name, value in logits.items():
        assert torch.equal(loaded[name], value)


# Each way to fail, as the client meets them one after the other; a failed request is tried up to six times,
# for each of up to two large files.
FAILURES = {
    "creating": Failure("POST", "/api/repos/create", 500),
    "asking what is there": Failure("POST", "/preupload/", 500, times=6),
    "large files refused": Failure("POST", "/objects/batch", 403),
    "sending large files": Failure("PUT", "/lfs/", "half", times=12),
    "storage full": Failure("POST", "/verify", 507),
    "committing": Failure("POST", "/commit/", 500),
    "while committing": Failure("POST", "/commit/", "close", times=6),
}


# A single one of these the client gets over by itself.
SURVIVED = Failure("POST", "/preupload/", 500)


@pytest.mark.parametrize("kind", [pytest.param("model", marks=pytest.mark.slow), "trainer"])
def test_an_interrupted_push_loses_nothing_and_goes_on(kind, tmp_path):
    with HubServer() as hub:
        failures = list(FAILURES.values())
        (tmp_path / "failures.jsonl").write_text("\n".join(FAILURES) + "\n")
        process = start(hub, tmp_path, kind, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        commits = []
        for failure in [*failures, SURVIVED]:
            line = process.stdout.readline()
            while line and line.strip() != "ready":
                line = process.stdout.readline()
            assert line, process.stderr.read()[-4000:]
            repository = hub.repositories.get("user/interrupted")
            commits.append(0 if repository is None else len(repository.commits))
            hub.failures = [Failure(**vars(failure))]
            process.stdin.write("go\n")
            process.stdin.flush()
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors[-4000:]
        *failed, last = json.loads((tmp_path / "outcomes.json").read_text())
        for name, outcome in zip(FAILURES, failed, strict=True):
            assert outcome["error"] is not None, name
            assert any("Push again to go on" in message for message in outcome["said"]), name
            # The trainer saves first, and that is where the model then is.
            assert outcome["same"] and (outcome["name_kept"] or kind == "trainer"), name
        assert last["error"] is None and hub.failures[0].times == 0
        # No half commit in between, and what arrived before a failure was not sent again.
        assert commits == [0, 0, *[1] * (len(failures) - 1)]
        assert len(hub.received) == len(set(hub.received)) == (1 if kind == "model" else 2)
        repository = hub.repositories["user/interrupted"]
        assert len(repository.commits) == 2 and FILES <= repository.files.keys()

        (tmp_path / "names.txt").write_text("user/interrupted")
        run(hub, tmp_path, "load")
    loaded = load_file(tmp_path / "loaded_True.safetensors")["interrupted"]
    expected = load_file(tmp_path / "interrupted.safetensors")["logits"]
    assert torch.equal(loaded, expected)
    if kind == "trainer":
        assert torch.equal(logits_of(AutoModelForSequenceClassification.from_pretrained(tmp_path / "run")), expected)
