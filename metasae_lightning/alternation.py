"""Whose turn it is: a macro-step is `n_p` primary steps, then `n_m` meta steps."""


def meta_steps_after(step: int, *, n_p: int, n_m: int, last: bool = False, taken: bool = True) -> int:
    """Meta steps owed after primary step number `step` (from 1); a last macro-step cut short still ends with its meta phase.

    After a batch whose step was not `taken`, `step` is the one before it, and what that was owed it has had unless it is cut short now.

    >>> [meta_steps_after(step, n_p=3, n_m=2, last=step == 5) for step in (1, 2, 3, 4, 5)]
    [0, 0, 2, 0, 2]
    >>> [meta_steps_after(step, n_p=3, n_m=2, last=last, taken=False) for step, last in ((3, False), (3, True), (4, False), (4, True))]
    [0, 0, 0, 2]
    """
    if not taken:
        return n_m if last and step % n_p else 0
    return n_m if last or step % n_p == 0 else 0


def meta_steps_in(steps: float, *, n_p: int, n_m: int) -> float:
    """Meta steps of a whole run of `steps` primary steps, which may have no end.

    >>> meta_steps_in(5, n_p=3, n_m=2)
    4
    """
    return steps if steps == float("inf") else -(-int(steps) // n_p) * n_m
