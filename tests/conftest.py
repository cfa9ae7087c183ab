"""Everything offline, on one thread, from fixed seeds, compiled once; transformers' deprecations are errors."""

import os
import sys


# Before anything that reads them is imported.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"
# Many tests start processes. Where nothing was compiled and nothing may be kept, each compiles torch and transformers
# again: 12 of the 21 seconds that it takes to import the trainer.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

import collections  # noqa: E402
import logging  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402


torch.set_num_threads(1)
transformers.logging.disable_progress_bar()


class _DropNoise(logging.Filter):
    """Native classes on folders of ours report keys by the page; without torchvision image processors say so."""

    def filter(self, record):
        message = record.getMessage()
        return "LOAD REPORT" not in message and "requires torchvision" not in message


for _name in ("transformers.modeling_utils", "transformers.utils.loading_report", "transformers"):
    logging.getLogger(_name).addFilter(_DropNoise())
for _handler in logging.getLogger("transformers").handlers:
    _handler.addFilter(_DropNoise())


# Files of few tests that take long: what starts processes, trains or reads whole models. Begun last, one of them keeps
# one process busy while the others have nothing left to do.
# The first of them runs four native runtimes: in a process in which nothing forked before.
FIRST = [
    "test_export_recipe.py",
    "test_distributed.py",
    "test_sharded.py",
    "test_faults.py",
    "test_hub.py",
    "test_recipes.py",
    "test_remote_code.py",
    "test_quickstart.py",
    "test_processes.py",
    "test_exporting.py",
    "test_serving.py",
]


def pytest_collection_modifyitems(items):
    """Files in the order in which processes are given them: those that take long, then by their number of tests."""
    tests = collections.Counter(item.path for item in items)
    place = {name: index for index, name in enumerate(FIRST)}
    items.sort(key=lambda item: (place.get(item.path.name, len(FIRST)), -tests[item.path], str(item.path)))


def pytest_configure(config):
    # The warning is attributed to the caller, so these are our own calls and the tests'.
    for category in ("FutureWarning", "DeprecationWarning"):
        config.addinivalue_line("filterwarnings", f"error::{category}:hf_layercollapse")
        config.addinivalue_line("filterwarnings", f"error::{category}:tests")
        config.addinivalue_line("filterwarnings", f"error:.*transformers.*:{category}")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
