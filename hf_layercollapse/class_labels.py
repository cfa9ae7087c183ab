"""Classes of data under the numbers of a model: by name wherever both have names, as a number says less than it seems.

An image folder's classes are numbered in the order of the alphabet, a data set's as its author wrote them down, and a
model's as those that it was trained on were.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any


# Names that a message shows of many, and classes of whose numbers it speaks.
MOST_NAMES, MOST_NUMBERS = 12, 6


class ModelClasses:
    """The classes of a head, by the names in its config.

    Args:
        id2label (`dict[int, str]`, *optional*): Number of a class -> its name.
        label2id (`dict[str, int]`, *optional*): Further names of the same classes; where both know one, the first
            counts, which is what pipelines say.
    """

    def __init__(self, id2label: Mapping[int, str] | None, label2id: Mapping[str, Any] | None = None) -> None:
        names = {number: str(name) for number, name in sorted((id2label or {}).items())}
        self.names = list(names.values())
        self.named = not are_numbers(self.names)
        # Some configs have the number as text there.
        self._numbers = {name: int(n) for name, n in (label2id or {}).items() if str(n).isdigit()}
        self._numbers.update({name: number for number, name in names.items()})
        times = Counter(names.values())
        # ImageNet has two kinds of cranes.
        self.shared = {number for number, name in names.items() if times[name] > 1}
        for number in self.shared:
            self._numbers.pop(names[number], None)
        if not self.named:
            self._numbers.update({str(number): number for number in names})
        lower = Counter(name.lower() for name in self._numbers)
        self._lower = {name.lower(): n for name, n in self._numbers.items() if lower[name.lower()] == 1}

    @classmethod
    def of(cls, config: Any) -> "ModelClasses":
        """Those of a config of transformers."""
        return cls(config.id2label, config.label2id)

    def number(self, name: str) -> int | None:
        """The number of the class of this name, in whatever case it is written; `None` where no class, or several,
        are called so."""
        return self._numbers.get(name, self._lower.get(name.lower()))

    def are_whole_numbers(self) -> bool:
        """Whether numbers are what they are called, other numbers than their own: stars from 1 to 5."""
        return self.named and all(name.removeprefix("-").isdigit() for name in self.names)


def class_numbers(
    found: Iterable[Any], names: Sequence[str] | None, classes: ModelClasses, column: str
) -> dict[Any, int]:
    """`{class of the data: its number in the model}`, for all that a column holds.

    Classes go by their names where the model has those (in any case, as in
    [`~datasets.Dataset.align_labels_with_mapping`]). Numbers stay as they are where the data or the model has no names
    but the numbers themselves, or `LABEL_0` and so on.

    Args:
        found (iterable of `int`, `bool` or `str`): Different values of the column.
        names (`list[str]`, *optional*): What the data calls its numbers, a `ClassLabel`'s names.
        classes ([`ModelClasses`]): Of the model.
        column (`str`): What the column is called, for messages.

    Raises:
        ValueError: Both have names, and a class of the data is none of the model's; or a text is none.
    """
    found = list(found)
    if names is not None and are_numbers(names):
        names = None
    called = {value: names[value] if names is not None else str(value) for value in found}
    numbers = {value: classes.number(name) for value, name in called.items()}
    known = {value: number for value, number in numbers.items() if number is not None}
    if len(known) == len(called):
        return known
    unknown = [value for value in found if value not in known]
    if isinstance(unknown[0], str):
        raise ValueError(_no_class(column, classes, unknown[0]))
    if names is None and classes.are_whole_numbers():
        raise ValueError(
            f"Column {column!r} has the classes {listed(sorted(called.values()))}, and the model's are called "
            f"{listed(classes.names)}: its numbers must be among these names."
        )
    # Of classes that share a name the numbers tell, where those of all others are the same.
    alike = all(number == value for value, number in known.items()) and all(v in classes.shared for v in unknown)
    if names is None or not classes.named or alike:
        return {value: int(value) for value in found}
    raise ValueError(
        f"Column {column!r} has the classes {listed(names)}, and the model's are {listed(classes.names)}: "
        f"{listed([called[value] for value in unknown])} is not one of these, so that their numbers say nothing of "
        "each other. Call the data's classes as the model does (in a column of text; of an image folder its folders), "
        "or set `id2label` in the model's config to the data's names, in the model's order. Where the numbers are the "
        "model's all the same, take the names from the data: `data.cast_column(column, Value('int64'))`."
    )


@dataclass(frozen=True)
class Labels:
    """The labels of a column, as a model numbers them.

    Args:
        values (`list[int | float | None]`): One for each row; `None` where the row has none.
        said (`str`): Which classes have another number in the model than in the data, in a few words; may be empty.
    """

    values: list[int | float | None]
    said: str = ""

    @property
    def missing(self) -> int:
        """Rows without one."""
        return sum(value is None for value in self.values)


def labels_of(values: Iterable[Any], names: Sequence[str] | None, classes: ModelClasses | None, column: str) -> Labels:
    """The labels that a column holds. A row has none where its cell is empty, or below 0 where numbers have names, as
    `datasets` marks what is unknown.

    Args:
        values (iterable): The column.
        names (`list[str]`, *optional*), column (`str`): As in [`class_numbers`].
        classes ([`ModelClasses`], *optional*): Of the model. Without it the column holds values to predict.

    Raises:
        ValueError: The column holds no classes, or others than the model's.
    """
    cells = [cell_of(value, names) for value in values]
    if classes is None:
        for cell in cells:
            if cell is not None and not isinstance(cell, Real):
                raise ValueError(f"Column {column!r} must hold numbers, got {cell!r}.")
        return Labels([None if cell is None else float(cell) for cell in cells])
    for cell in cells:
        if cell is not None and not isinstance(cell, (Integral, str)):
            raise ValueError(_no_class(column, classes, cell))
    numbers = class_numbers(dict.fromkeys(cell for cell in cells if cell is not None), names, classes, column)
    return Labels([None if cell is None else numbers[cell] for cell in cells], _said(numbers, names))


def cell_of(value: Any, names: Sequence[str] | None) -> Any:
    """What a cell holds as plain Python has it: a whole number that an empty cell beside it made a float is one."""
    if isinstance(value, str):
        return value if value.strip() else None
    if isinstance(value, Real) and not isinstance(value, Integral):
        value = None if math.isnan(value) else int(float(value)) if float(value).is_integer() else value
    if names is not None and isinstance(value, Integral) and value < 0:
        return None
    return value


def _said(numbers: Mapping[Any, int], names: Sequence[str] | None) -> str:
    moved = [
        f"{'' if names is None else names[value] + ' '}{value} -> {number}"
        for value, number in numbers.items()
        if not isinstance(value, (str, bool)) and value != number
    ]
    more = [f"{len(moved) - MOST_NUMBERS:,} more"] if len(moved) > MOST_NUMBERS else []
    return "; ".join(sorted(moved)[:MOST_NUMBERS] + more)


def _no_class(column: str, classes: ModelClasses, cell: Any) -> str:
    among = f" or {listed(classes.names)}" if classes.names else ""
    return f"Column {column!r} must hold class indices{among}, got {cell!r}."


def refuse_other_classes(first: Any, other: Any, first_name: str, other_name: str, remedy: str) -> None:
    """Raises if two configs name as many classes, and name them differently: equal logits would mean something else.

    Raises:
        ValueError: As said.
    """
    one, two = (ModelClasses.of(config) for config in (first, other))
    same = len(one.names) == len(two.names)
    if same and one.named and two.named and [n.lower() for n in one.names] != [n.lower() for n in two.names]:
        raise ValueError(
            f"{first_name} classes are {listed(one.names)}, and {other_name} {listed(two.names)}: predictions of the "
            f"one are none of the other. {remedy}"
        )


def listed(names: Sequence[str]) -> str:
    """Names for a message, of very many the first."""
    if len(names) <= MOST_NAMES:
        return f"{list(names)}"
    return f"{list(names[:MOST_NAMES])} and {len(names) - MOST_NAMES:,} more"


def are_numbers(names: Sequence[str]) -> bool:
    """Whether names say no more than the places they stand at."""
    return all(name in (str(number), f"LABEL_{number}") for number, name in enumerate(names))
