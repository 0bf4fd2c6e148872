"""Numbers as text, for tables, conclusions and model cards."""

import re

FORMATS = {"dead": ".1%", "l0": ".2f"}


def format_value(name: str, value: float | None, default: str = ".4g") -> str:
    """A figure in the format of its name: `dead` as a percentage, `l0` with two decimals, others in the default format; empty for None.

    >>> format_value("dead", 0.125), format_value("l0", 8.0), format_value("fvu", 0.25), format_value("fvu", None)
    ('12.5%', '8.00', '0.25', '')
    >>> format_value("fvu", 0.25, default=".4f")
    '0.2500'
    """
    if value is None:
        return ""
    return format_number(value, FORMATS.get(name, default))


def format_number(value: float, spec: str) -> str:
    """A number in a format; a number that is rounded to zero has no sign.

    >>> format_number(-0.04, "+.1f"), format_number(0.04, "+.1f"), format_number(-0.06, "+.1f"), format_number(-1e-5, ".1%")
    ('0.0', '0.0', '-0.1', '0.0%')
    """
    text = format(value, spec)
    return text if re.search(r"[1-9]", re.sub(r"e.*", "", text)) or "n" in text else text.lstrip("+-")
