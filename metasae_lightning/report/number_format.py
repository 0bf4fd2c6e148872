"""Numbers as text, for tables and model cards."""

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
    return format(value, FORMATS.get(name, default))
