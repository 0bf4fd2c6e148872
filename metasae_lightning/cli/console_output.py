"""What the commands print beside their results: log lines on stderr, without the tips and warnings of Lightning that do not apply."""

import logging
import sys
import warnings
from collections.abc import Generator
from contextlib import contextmanager

# Warnings about choices that this package makes on purpose.
INTENDED = (
    ".*does not have many workers.*",
    ".*Experiment logs directory.*",
    ".*LeafSpec.*",
    "Checkpoint directory .* not empty",
    "Total length of `list` across ranks is zero",
    r"It is recommended to use `self\.log\('(?:\S+/)?(?:val|test|phi)/",  # these metrics are already reduced over ranks
)


@contextmanager
def progress_on_stderr() -> Generator[None, None, None]:
    """Print the package's log lines to stderr while a command runs."""
    logger, handler = logging.getLogger("metasae_lightning"), logging.StreamHandler(sys.stderr)
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


@contextmanager
def quiet_lightning() -> Generator[None, None, None]:
    """Silence Lightning's product tips, and, until the block ends, its warnings about intended choices."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(is_no_product_tip)
    with warnings.catch_warnings():
        for message in INTENDED:
            warnings.filterwarnings("ignore", message=message)
        yield


def is_no_product_tip(record: logging.LogRecord) -> bool:
    """Whether to keep a log record: all but those that recommend Lightning's products."""
    return "litlogger" not in record.getMessage()
