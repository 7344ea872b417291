"""What a cell of a sheet shows: its number, truth value or date in the cell's own format."""

from __future__ import annotations

import datetime
import re
from typing import Any

# A number's format: something before it, digits with or without thousands, decimals, per cent, and something
# after.  Of several, with ; between, the first is that of positive numbers.
NUMBER = re.compile(
    r"(?P<before>[^0#?]*?)(?P<thousands>#,##)?(?:#|0)(?:\.(?P<decimals>0+))?(?P<percent>%)?(?P<after>[^0#?]*)"
)
BESIDE = re.compile(r'"([^"]*)"|\\(.)|\[\$([^\]-]*)[^\]]*\]|([$€£¥ -])|_.|\*.|\[[^\]]*\]')
DATE_CODES = re.compile(r'"[^"]*"|\\.|\[[^\]]*\]|AM/PM|y+|m+|d+|h+|s+|.', re.IGNORECASE)
LOCAL_DATE = "mm-dd-yy"  # stands for whatever is usual where the sheet is opened
GENERAL_DIGITS = 15
NAMED = {"yyyy": "%Y", "yy": "%y", "mmmm": "%B", "mmm": "%b", "dddd": "%A", "ddd": "%a", "am/pm": "%p"}


def shown(value: Any, number_format: str) -> str:
    """The text that a sheet shows for ``value`` (a number, truth value, date or time) in ``number_format``
    (ECMA-376, part 1, section 18.8.31).  A format that is none of the usual ones is passed over: a number
    is shown in full then, and a date as in ISO 8601."""
    if isinstance(value, bool):
        return str(value).upper()
    if isinstance(value, datetime.date | datetime.time):
        return _date(value, number_format)
    if isinstance(value, datetime.timedelta):
        return str(value)
    return _number(value, number_format.partition(";")[0])


def _number(value: float, number_format: str) -> str:
    found = NUMBER.fullmatch(number_format)
    before, after = (_beside(found[name]) if found else None for name in ("before", "after"))
    if found is None or before is None or after is None:
        return str(value) if isinstance(value, int) else f"{value:.{GENERAL_DIGITS}g}"
    decimals = len(found["decimals"] or "")
    comma = "," if found["thousands"] else ""
    sign, size = "-" if value < 0 else "", abs(value) * (100 if found["percent"] else 1)
    return f"{sign}{before}{size:{comma}.{decimals}f}{'%' if found['percent'] else ''}{after}"


def _beside(written: str) -> str | None:
    """What a format puts beside the number; None if it is not understood."""
    told, at = "", 0
    while at < len(written):
        found = BESIDE.match(written, at)
        if found is None:
            return None
        told += next((group for group in found.groups() if group is not None), "")
        at = found.end()
    return told


def _date(value: datetime.date | datetime.time, number_format: str) -> str:
    codes = [code.lower() for code in DATE_CODES.findall(number_format.partition(";")[0])]
    if number_format == LOCAL_DATE or not any(code[0] in "ymdhs" for code in codes):
        midnight = isinstance(value, datetime.datetime) and value.time() == datetime.time()
        return (value.date() if midnight else value).isoformat()  # type: ignore[union-attr]
    return "".join(_part(value, codes, place) for place in range(len(codes)))


def _part(value: Any, codes: list[str], place: int) -> str:
    """What one code of a date's format shows.

    ``m`` is minutes behind hours and before seconds, else months; a date begins at midnight."""
    code = codes[place]
    if code in NAMED:
        return str(value.strftime(NAMED[code]))
    if code[0] == "m":
        behind = next((c[0] for c in codes[:place][::-1] if c[0] in "ymdhs"), "")
        ahead = next((c[0] for c in codes[place + 1 :] if c[0] in "ymdhs"), "")
        number = getattr(value, "minute" if behind == "h" or ahead == "s" else "month", 0)
    elif code[0] == "h":
        hour = getattr(value, "hour", 0)
        number = (hour + 11) % 12 + 1 if "am/pm" in codes else hour
    elif code[0] in "ds":
        number = getattr(value, "day" if code[0] == "d" else "second", 0)
    else:
        return code.strip('"\\') if code[0] != "[" else ""
    return f"{number:0{len(code)}}"
