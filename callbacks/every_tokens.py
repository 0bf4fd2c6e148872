"""A counter of training tokens that tells when an interval of tokens has ended."""


class EveryTokens:
    """A counter that is due once `interval` tokens were trained on since the last call of `restart`.

    >>> counter = EveryTokens(100)
    >>> counter.restart(40)  # a resumed run has trained on 40 tokens
    >>> counter.is_due(139), counter.is_due(140)
    (False, True)
    >>> EveryTokens(None).is_due(10**9)
    False

    Args:
        interval: Number of tokens between two events, over all ranks; None is never due.
    """

    def __init__(self, interval: int | None) -> None:
        self.interval = interval
        self._restarted_at = 0

    def restart(self, tokens: int) -> None:
        """Count from `tokens`, the number of tokens that the run has trained on so far."""
        self._restarted_at = tokens

    def elapsed(self, tokens: int) -> int:
        """Number of tokens trained on since the last call of `restart`, where `tokens` is the run's count now."""
        return tokens - self._restarted_at

    def is_due(self, tokens: int) -> bool:
        """Whether `interval` tokens were trained on since the last call of `restart`."""
        return self.interval is not None and self.elapsed(tokens) >= self.interval
