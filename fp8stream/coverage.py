"""Exactly once: which parts of a whole have been delivered.

Completeness is never a count. A part that comes twice is an error when it comes, and what is
missing can be named.
"""

from bisect import bisect_right


class Coverage:
    """Half-open ranges of `[0, size)`, each delivered at most once."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._starts: list[int] = []
        self._stops: list[int] = []

    def add(self, start: int, stop: int) -> None:
        """Records `[start, stop)`. Raises ValueError if any of it lies outside or came before."""
        if not 0 <= start <= stop <= self.size:
            raise ValueError(f"[{start}, {stop}) lies outside [0, {self.size})")
        if start == stop:
            return
        at = bisect_right(self._starts, start)
        if (at and self._stops[at - 1] > start) or (
            at < len(self._starts) and self._starts[at] < stop
        ):
            raise ValueError(f"part of [{start}, {stop}) came before")
        self._starts.insert(at, start)
        self._stops.insert(at, stop)
        self._join(at)
        if at:
            self._join(at - 1)

    def _join(self, at: int) -> None:
        """Joins range `at` with the next one where they touch, so that order costs no memory."""
        if at + 1 < len(self._starts) and self._stops[at] == self._starts[at + 1]:
            del self._starts[at + 1]
            del self._stops[at]

    def gap(self) -> tuple[int, int] | None:
        """The first range that has not been delivered, or None."""
        stop = 0
        for begin, end in zip(self._starts, self._stops, strict=True):
            if begin > stop:
                return stop, begin
            stop = end
        return (stop, self.size) if stop < self.size else None
