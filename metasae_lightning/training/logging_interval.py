"""Which training steps are logged: reading a step's figures costs time, on a GPU most of all."""

from typing import Any


def is_logged(trainer: Any) -> bool:
    """Whether Lightning passes this training step's values to the loggers, or the step is the last one."""
    return trainer._logger_connector.should_update_logs or trainer.is_last_batch
