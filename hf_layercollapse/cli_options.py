"""What the commands of `layercollapse` have in common: their options, what is refused before anything is loaded, and
where their results go."""

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from inspect import Parameter, signature
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch

from . import processes
from .models import written_beside


try:
    import typer
except ImportError:
    raise SystemExit('layercollapse needs typer: pip install "hf_layercollapse[cli]"') from None


Model = Annotated[str, typer.Argument(help="Name on the Hub, or folder, of a model.", show_default=False)]
Processor = Annotated[
    str | None,
    typer.Option(help="Name or folder of a transformers model's tokenizer or processor. Default: its own."),
]
DataConfig = Annotated[str | None, typer.Option(help="Configuration of a data set on the Hub.")]
Split = Annotated[
    str | None,
    typer.Option(
        help="Split of the data to use. Not the one the result is tested on. Default: train, or the only one there is."
    ),
]
Columns = Annotated[
    list[str] | None,
    typer.Option(
        help="Column of the text, conversation, image or sound; twice for pairs. Default: the only one that holds any."
    ),
]
Label = Annotated[
    str | None,
    typer.Option(
        help="Column of the class of each row, by index or by name; a text is then one row, cut to its length."
    ),
]
Samples = Annotated[
    int | None,
    typer.Option(
        min=8,
        help="Rows to use: texts, windows of long ones, images. Default: 512; of a language model fewer, so many as "
        "have 8 tokens for each feature and neuron of its widest block, and 16,384 at least.",
    ),
]
Batch = Annotated[int, typer.Option(min=1, help="Rows a batch.")]
Length = Annotated[
    int | None,
    typer.Option(min=1, help="Tokens a row; longer texts are several rows. Default: the model's most, up to 512."),
]
TestSplit = Annotated[
    str | None,
    typer.Option(
        help="Split of the data to test on: one that no model here has seen. Default: test, or the only one there is."
    ),
]
TestLabel = Annotated[
    str | None, typer.Option(help="Column of the class, by index or by name. Not for language models.")
]
TestSamples = Annotated[int, typer.Option(min=2, help="Rows of the data to test on.")]
Blocks = Annotated[
    str | None,
    typer.Option(help="'all', 'last:N', 'first:N', or a regular expression of block names. Default: all."),
]
JsonFile = Annotated[
    Path | None,
    typer.Option("--json", "--json-file", help="Write the result as JSON; '-': to stdout, and words to stderr."),
]
MaxMemory = Annotated[
    str | None,
    typer.Option(
        help='Memory for what is held beside the model, "2GB" or "500MB"; with less the data is read more often. '
        "Default: half of what is free."
    ),
]
Device = Annotated[str, typer.Option(help="Device to compute on, as torch names it.")]
Trust = Annotated[bool, typer.Option(help="Run code that comes with the model.")]
DATA_HELP = (
    "Text, conversations, images or sounds: a name on the Hub; a .txt, .csv, .tsv, .json(l), .parquet or .arrow file, "
    "each also with .gz (of a language model's .txt each is one document, else a line is a text); a folder of such "
    "files, of images in folders named after their classes, or of what save_to_disk wrote."
)


@dataclass(frozen=True)
class DataOptions:
    """Which inputs a command reads from its data. The fields are options of every command that has one of these."""

    usual_split: ClassVar[str] = "train"

    processor: Processor = None
    data_config: DataConfig = None
    split: Split = None
    column: Columns = None
    label_column: Label = None
    samples: Samples = None
    batch_size: Batch = 8
    max_length: Length = None


@dataclass(frozen=True)
class TestDataOptions(DataOptions):
    """The same of a command that tests."""

    usual_split: ClassVar[str] = "test"

    split: TestSplit = None
    label_column: TestLabel = None
    samples: TestSamples = 10_000


def with_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Gives a command, in place of its parameter `options`, an option for each field of that parameter's class."""
    parameters = signature(command).parameters
    kind = parameters["options"].annotation
    names = [option.name for option in fields(kind)]

    def command_of(**values: Any) -> Any:
        chosen = kind(**{name: values.pop(name) for name in names})
        return command(**values, options=chosen)

    own = [parameter.replace(kind=Parameter.KEYWORD_ONLY) for parameter in parameters.values()]
    added = [
        Parameter(option.name, Parameter.KEYWORD_ONLY, default=option.default, annotation=option.type)
        for option in fields(kind)
    ]
    listed = [parameter for parameter in own if parameter.name != "options"] + added
    run: Any = command_of
    run.__name__, run.__doc__ = command.__name__, command.__doc__
    run.__signature__ = signature(command).replace(parameters=listed)
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in listed}
    return run


def usable_device(name: str) -> torch.device:
    """The device of this name. Processes that were launched together join here: each has a device of its own.

    Raises:
        ValueError: There is none, or nothing can be computed on it.
    """
    try:
        device = torch.device(name)
        if processes.launched() > 1 and device.index is not None:
            raise RuntimeError(f"each of {processes.launched()} processes has one of its own, say {device.type}.")
        processes.join(on_cpu=device.type == "cpu")
        torch.zeros(1, device=device)
    # What torch raises depends on the kind of the device.
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"--device {name} cannot be used here: {str(error).splitlines()[0]}") from None
    if device.type == "meta":
        raise ValueError("--device meta holds no numbers to compute with.")
    return device


def check_files(**paths: Path | None) -> None:
    """Refuses files that could not be written in the end, and plots of a format that is not known; option -> path.

    Raises:
        ValueError: A file's folder is not there, it is a folder itself, or its plot cannot be drawn.
    """
    for name, path in paths.items():
        option = f"--{name.replace('_', '-')}"
        if path is None or str(path) == "-":
            continue
        if path.is_dir():
            raise ValueError(f"{option} {path} is a folder.")
        _check_parent(option, path)
        if name == "plot":
            if path.suffix not in (".png", ".svg", ".pdf"):
                raise ValueError(f"--plot must end in .png, .svg or .pdf, got {path}.")
            try:
                import matplotlib  # noqa: F401
            except ImportError:
                raise ValueError('--plot needs matplotlib: pip install "hf_layercollapse[plot]".') from None


def _check_parent(option: str, path: Path) -> None:
    parent = path.absolute().parent
    if not parent.is_dir():
        raise ValueError(f"{option} {path}: there is no folder {parent}. Make it first.")
    if not os.access(parent, os.W_OK):
        raise ValueError(f"{option} {path}: nothing can be written in {parent}.")


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Any]:
    """A folder that becomes `--output` once all that is done in it has succeeded; else nothing is left of it.

    It is made at once, beside the other, so that a place that cannot be written is refused before the work.

    Of several processes the first makes it; the others get `None`.

    Raises:
        ValueError: `path` is there already and not an empty folder, or cannot be made.
    """
    with contextlib.ExitStack() as stack:
        with processes.together():
            beside = _beside(path, stack) if processes.rank() == 0 else None
        yield beside
        with processes.together():
            stack.pop_all().close()


def _beside(path: Path, stack: contextlib.ExitStack) -> Path:
    check_new_folder(path)
    try:
        beside = stack.enter_context(written_beside(path))
        beside.mkdir()
    except OSError as error:
        raise ValueError(f"--output {path} cannot be made: {error.strerror}.") from error
    return beside


def check_new_folder(path: Path) -> None:
    """Refuses an `--output` that cannot be made.

    Raises:
        ValueError: As said.
    """
    if path.exists() and any(path.iterdir() if path.is_dir() else [path]):
        raise ValueError(f"--output {path} exists and is not an empty folder.")
    _check_parent("--output", path)


class Output:
    """Where a command's words and its JSON go. Of several processes the first says and writes.

    Args:
        json_file (`Path`, *optional*): For the JSON; `-` is stdout, and the words then go to stderr.
    """

    def __init__(self, json_file: Path | None) -> None:
        self.json_file = json_file
        self.to_stdout = str(json_file) == "-"

    def say(self, text: object) -> None:
        """Words for the reader."""
        if processes.rank() == 0:
            typer.echo(str(text), err=self.to_stdout)

    def write(self, values: Any) -> None:
        """The result as plain data."""
        with processes.together():
            if self.json_file is None or processes.rank() > 0:
                return
            text = json.dumps(values, indent=1)
            if self.to_stdout:
                typer.echo(text)
            else:
                self.json_file.write_text(text + "\n", encoding="utf-8")
