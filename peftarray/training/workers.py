"""Threads that work on the batches of a step side by side."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from functools import cached_property
from typing import TypeVar

from threadpoolctl import ThreadpoolController

__all__ = ["Workers"]

Item = TypeVar("Item")
Result = TypeVar("Result")


class Workers:
    """So many threads, each with one thread of the BLAS library while they work.

    An operation of NumPy's but the product of matrices uses one core, however large its arrays; in several threads
    several such operations run at once.

    Args:
        count: of threads; 1 is the caller's own, whose BLAS is left as it is.

    Example:
        >>> list(Workers(2).map(abs, [-1, 2, -3]))
        [1, 2, 3]
    """

    def __init__(self, count: int = 1) -> None:
        self.count = count

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """What the function makes of each, in the order of `items`, from which no more are taken than are worked on."""
        if self.count == 1:
            yield from map(function, items)
            return
        waiting: deque[Future[Result]] = deque()
        with self._blas.limit(limits=1, user_api="blas"), ThreadPoolExecutor(self.count, "batch") as threads:
            try:
                for item in items:
                    # What NumPy does about overflows is said in the context.
                    waiting.append(threads.submit(copy_context().run, function, item))
                    if len(waiting) == self.count:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            finally:
                for future in waiting:
                    future.cancel()

    @cached_property
    def _blas(self) -> ThreadpoolController:
        # Made once: it goes through all libraries of the process.
        return ThreadpoolController()
