"""Rows of data from what people have: files of many formats, folders, data sets on the Hub."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any


# `datasets`, with pandas behind it, takes longer to import than all of this package: where it is used.
if TYPE_CHECKING:
    from datasets import Dataset


# Of tables: words such as None, NA and null are texts and names of classes, and only an empty cell is empty; and a
# quotation mark in a tab-separated file is one.
WORDS = {"keep_default_na": False, "na_values": [""]}
TABS = {"delimiter": "\t", "quoting": 3}

# Ending -> what `datasets` calls the format, and its options.
FORMATS = {
    ".csv": ("csv", WORDS),
    ".tsv": ("csv", {**WORDS, **TABS}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".parquet": ("parquet", {}),
    ".arrow": ("arrow", {}),
    ".txt": ("text", {}),
}
ENDINGS = f"{', '.join(FORMATS)}, each also with .gz"

# What a head is separated by that stays one column where commas, or tabs, are looked for.
OTHER_SEPARATORS = ";\t|"

# What `datasets` calls fields of a line that its head has no name for.
_UNNAMED = "__index_level_0__"


def load_rows(data: Any, data_config: Any = None, split: Any = "train", document: bool = False) -> "Dataset":
    """The rows of a file, a folder, or a data set on the Hub.

    Args:
        data (`str`): Path of a file (`ENDINGS`, in upper case too), of what `Dataset.save_to_disk` wrote, of a folder
            of such files or of images in folders named after their classes; or a name on the Hub.
        data_config (`str`, *optional*): Configuration of a data set on the Hub.
        split (`str`): Which part, where there are several; a file is one.
        document (`bool`): Whether a text file, also one of those in a folder, is one document, and not a text a line.

    Raises:
        ValueError: There is no such file, its format is unknown, it is damaged or separated by something else than its
            ending says, or it has no such split.
    """
    from datasets import DatasetDict, load_from_disk

    path = Path(data).expanduser()
    name, options = format_of(path)
    if path.is_file():
        if name is None:
            raise ValueError(f"{data} has an ending that is not known; known are {ENDINGS}.")
        if path.stat().st_size == 0:
            raise ValueError(f"{data} is empty.")
        if name == "text" and document:
            options = {"sample_by": "document"}
        return _loaded(data, name, data_files={split: str(path)}, split=split, **options)
    if is_saved(path):
        saved = load_from_disk(str(path))
        if isinstance(saved, DatasetDict) and split not in saved:
            raise ValueError(f"{data} has no split {split!r}; it has {sorted(saved)}.")
        return saved[split] if isinstance(saved, DatasetDict) else saved
    if path.is_dir():
        return _loaded(data, str(path), split=split, **_options_of(data, path, document))
    if name is not None or is_path(data):
        raise ValueError(f"{data}: there is no such file or folder.")
    return _loaded(data, data, data_config, split=split)


def format_of(path: str | Path) -> tuple[str | None, dict[str, Any]]:
    """`(what datasets calls the format, options)` by a file's ending; `None` in place of the first if it is none."""
    endings = [ending.lower() for ending in Path(path).suffixes]
    if endings[-1:] == [".gz"]:
        endings.pop()
    return FORMATS.get(endings[-1] if endings else "", (None, {}))


def _options_of(data: Any, folder: Path, document: bool) -> dict[str, Any]:
    """What the files of a folder are read with, by what `datasets` takes them for."""
    from datasets import load_dataset_builder

    if all(format_of(file)[0] not in ("csv", "text") for file in folder.rglob("*")):
        return {}
    builder = _told(data, load_dataset_builder, str(folder))
    kind = type(builder).__module__.rpartition(".")[2]
    if kind == "text":
        return {"sample_by": "document"} if document else {}
    if kind == "csv":
        return {**WORDS, **TABS} if builder.config.sep == "\t" else WORDS
    return {}


def is_saved(path: str | Path) -> bool:
    """Whether a folder is what `Dataset.save_to_disk`, or `DatasetDict.save_to_disk`, wrote."""
    return any((Path(path) / name).is_file() for name in ("state.json", "dataset_dict.json"))


def is_path(name: str) -> bool:
    """Whether a name can only be a path: names on the Hub are `name` or `owner/name`."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name


@contextlib.contextmanager
def _one_message() -> Iterator[None]:
    """What `datasets` logs of an error before it raises it, the error says too."""
    from datasets import logging

    before = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _told(data: Any, load: Any, *args: Any, **kwargs: Any) -> Any:
    """What a function of `datasets` makes of some data.

    Raises:
        ValueError: They cannot be read.
    """
    from datasets.exceptions import DatasetGenerationError
    from pyarrow import ArrowInvalid

    try:
        with _one_message():
            return load(*args, **kwargs)
    # Damaged JSON is a plain ValueError of older datasets, without the name of the file.
    except (DatasetGenerationError, ArrowInvalid, ValueError) as error:
        raise ValueError(f"{data} cannot be read: {_reason(error)}") from error


def _loaded(data: Any, *args: Any, **kwargs: Any) -> Any:
    from datasets import load_dataset

    rows = _told(data, load_dataset, *args, **kwargs)
    if _UNNAMED in rows.features:
        raise ValueError(
            f"{data} has lines with more fields than its head names, {sorted(set(rows.features) - {_UNNAMED})}: is "
            "its separator what its ending says, and are texts with separators in them quoted?"
        )
    only = rows.column_names[0] if len(rows.column_names) == 1 else ""
    other = next((separator for separator in OTHER_SEPARATORS if separator in only), None)
    if rows.info.builder_name == "csv" and other is not None:
        raise ValueError(
            f"{data} has one column, {only!r}, which looks like several with {other!r} between them. A .csv file is "
            "read with commas and a .tsv file with tabs: write it so, or name it by what it is."
        )
    return rows


def _reason(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, UnicodeDecodeError):
        return f"it is not UTF-8 ({error}). Convert it: iconv -f latin1 -t utf-8 FILE > NEW."
    return f"{error}"
