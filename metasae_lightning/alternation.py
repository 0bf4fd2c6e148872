"""Whose turn it is: a macro-step is `n_p` primary steps, then `n_m` meta steps."""


def meta_steps_after(step: int, *, n_p: int, n_m: int, last: bool = False) -> int:
    """Meta steps owed after primary step number `step` (from 1); a last macro-step cut short still ends with its meta phase.

    >>> [meta_steps_after(step, n_p=3, n_m=2, last=step == 5) for step in (1, 2, 3, 4, 5)]
    [0, 0, 2, 0, 2]
    """
    return n_m if last or step % n_p == 0 else 0


def meta_steps_in(steps: int, *, n_p: int, n_m: int) -> int:
    """Meta steps of a whole run of `steps` primary steps.

    >>> meta_steps_in(5, n_p=3, n_m=2)
    4
    """
    return -(-steps // n_p) * n_m
