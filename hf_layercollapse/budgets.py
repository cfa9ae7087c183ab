"""How small a model is to become: one budget, in words or as a number, as plans, the Trainer and the shell take it."""

import math
from collections.abc import Iterable, Mapping
from typing import Any


BUDGETS = ("parameters", "macs", "latency", "max_drop")


def parse_budget(text: str, option: str = "`budget`") -> dict[str, float]:
    """`"macs=0.5"` as `{"macs": 0.5}`, `"parameters=1e6"` as `{"parameters": 1000000}`.

    Args:
        option (`str`): What messages call it.

    Raises:
        ValueError: It is no budget.
    """
    name, equals, value = text.partition("=")
    if not equals or name not in BUDGETS:
        raise ValueError(f"{option} must be {', '.join(f'{name}=...' for name in BUDGETS)}; got {text!r}.")
    try:
        number = float(value)
    except ValueError:
        raise ValueError(f"{option} {text!r}: {value!r} is not a number.") from None
    if number > 1 and number.is_integer():
        number = int(number)
    return one_budget(**{**dict.fromkeys(BUDGETS), name: number})


def one_budget(**budgets: Any) -> dict[str, float]:
    """The one of these budgets that is given, checked.

    Raises:
        ValueError: It is not exactly one, or no size.
    """
    given = {name: value for name, value in budgets.items() if value is not None}
    if len(given) != 1:
        raise ValueError(f"Exactly one budget of {', '.join(budgets)} is needed, got {sorted(given) or 'none'}.")
    ((name, value),) = given.items()
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"`{name}` must be a number, got {value!r}.")
    whole = isinstance(value, int) and name in ("parameters", "macs") and value > 1
    if not (whole or (0 <= value if name == "max_drop" else 0 < value < 1)):
        allowed = {"max_drop": ">= 0", "latency": "a share in (0, 1)"}.get(name, "a share in (0, 1) or a count")
        raise ValueError(f"`{name}` must be {allowed}, got {value}.")
    return given


def limit_of(value: float, whole: int) -> int:
    """A budget of size, as a count or as a share of the whole, as a count."""
    return math.floor(value if value > 1 else value * whole + 1e-6)


def least_that_works(unit: str, count: int, whole: int) -> str:
    """What to say where a budget is too small: the smallest that can be met, as a share of the whole and as a count.

    Args:
        unit (`str`): `"parameters"` or `"macs"`.
        count (`int`): Of the whole model's, what is left at the smallest.
        whole (`int`): What there is.
    """
    if count >= whole:
        return f"nothing can become smaller than the {whole:,} {unit} that there are."
    digits = 3
    while math.ceil(count / whole * 10**digits) >= 10**digits:
        digits += 1
    share = math.ceil(count / whole * 10**digits) / 10**digits
    return f"the least that works is {unit}={share:g}, or {count:,} of {whole:,}."


def room_of(unit: str, value: float, whole: Mapping[str, int], blocks: Iterable[Any]) -> int:
    """What these blocks may have of a budget of parameters of the model, or of MACs of its feed-forward blocks."""
    ours = sum(block.parameters if unit == "parameters" else block.macs for block in blocks)
    return limit_of(value, whole[unit]) - (whole[unit] - ours)
