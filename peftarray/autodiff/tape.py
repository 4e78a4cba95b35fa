"""The graph of one computation, and the walk back through it.

A node knows its place in the order of the computation, the nodes that its value was made of, and how to pull a gradient
back to them. It does not hold its value: what stays in memory is what the rules saved, and a node forgets that as soon
as the walk has passed it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from heapq import heappop, heappush
from itertools import count
from typing import Any

from peftarray.arrays import Array
from peftarray.errors import PeftError

__all__ = ["Node", "Tape", "backward", "is_complex"]

Edges = Sequence[tuple[int, "Node"]]
Pull = Callable[[Any], Sequence[Any]]


class Tape:
    """One computation: the namespace that it runs in, and the counter that orders its nodes.

    Attributes:
        xp: the namespace of the library beneath.
        traced: the class of its traced arrays.
        orders: gives each node a number above those of the nodes that it was made of.
    """

    __slots__ = ("orders", "traced", "xp")

    def __init__(self, xp: Any, traced: type) -> None:
        self.xp = xp
        self.traced = traced
        self.orders = count()

    def leaf(self, value: Array) -> Any:
        """A traced array that gradients are asked for."""
        return self.traced(value, Node(self, (), None, value.shape, value.dtype))


class Node:
    """A step of the computation.

    Attributes:
        tape: the computation that it belongs to.
        edges: (place among the rule's arguments, node) of every argument that a gradient is wanted for; None once the
            walk has passed.
        pull: takes the gradient of the value, gives one for each argument; None for a leaf.
        shape, dtype: of the value; a shape of None is a step with several values.
        order: its place in the computation.
    """

    __slots__ = ("dtype", "edges", "order", "pull", "shape", "tape")

    def __init__(self, tape: Tape, edges: Edges, pull: Pull | None, shape: Any, dtype: Any) -> None:
        self.tape = tape
        self.edges: Edges | None = edges
        self.pull = pull
        self.shape = shape
        self.dtype = dtype
        self.order = next(tape.orders)


def backward(xp: Any, seeds: Iterable[tuple[Node, Array]], leaves: Iterable[Node]) -> list[Array | None]:
    """The gradients of `leaves`, from those of the nodes in `seeds`.

    The latest node comes first, by a heap: no recursion, however deep the graph. A rule may give a gradient at the
    broadcast shape or in a wider dtype; it is summed and cast here to those of the value. Sums are made in place only
    in arrays that were allocated here, since rules hand one array to several arguments.

    Returns:
        One for each leaf: of its value's shape and dtype, shared with nothing, None where no path leads to it.

    Raises:
        PeftError: a node was passed by an earlier walk.
    """
    gradients: dict[int, Any] = {}
    waiting: dict[int, Node] = {}
    heap: list[int] = []
    sums: set[int] = set()
    for node, seed in seeds:
        order = node.order
        if order in waiting:
            gradients[order] = gradients[order] + seed
        else:
            waiting[order], gradients[order] = node, seed
            heappush(heap, -order)
    found: dict[int, Array] = {}
    while heap:
        order = -heappop(heap)
        node, gradient = waiting.pop(order), gradients.pop(order)
        edges, pull = node.edges, node.pull
        if edges is None:
            message = "these gradients were taken already, and what they need is freed; compute the value again"
            raise PeftError(message)
        if pull is None:
            found[order] = gradient
            continue
        pieces = pull(gradient)
        node.pull = node.edges = None
        del node, pull, gradient
        for place, parent in edges:
            piece = pieces[place]
            if piece is None:
                continue
            order, shape = parent.order, parent.shape
            if shape is None:  # of several values; `piece` says which
                if order in waiting:
                    gradients[order].update(piece)
                else:
                    waiting[order], gradients[order] = parent, piece
                    heappush(heap, -order)
                continue
            if piece.shape != shape or piece.dtype != parent.dtype:
                piece = _fitted(xp, piece, parent)
            if order not in waiting:
                waiting[order], gradients[order] = parent, piece
                heappush(heap, -order)
            elif order in sums:
                gradients[order] += piece
            else:
                gradients[order] = gradients[order] + piece
                sums.add(order)
        del pieces, edges
    return _unshared(xp, [found.get(leaf.order) for leaf in leaves])


def is_complex(dtype: Any) -> bool:
    """Whether numbers of `dtype` have an imaginary part."""
    kind = getattr(dtype, "kind", None)  # NumPy's and CuPy's
    return kind == "c" if kind is not None else "complex" in str(dtype)


def _fitted(xp: Any, gradient: Array, node: Node) -> Array:
    """A gradient at the broadcast shape or of another dtype, as that of the node's value."""
    if is_complex(gradient.dtype) and not is_complex(node.dtype):
        gradient = xp.real(gradient)
    if gradient.shape != node.shape:
        lead = gradient.ndim - len(node.shape)
        stretched = [i + lead for i, n in enumerate(node.shape) if n == 1 and gradient.shape[i + lead] != 1]
        axes = (*range(lead), *stretched)
        if lead < 0 or math.prod(node.shape) * math.prod(gradient.shape[i] for i in axes) != math.prod(gradient.shape):
            message = f"a rule gave a gradient of shape {gradient.shape} for a value of {node.shape}; mend the rule"
            raise PeftError(message)
        gradient = xp.reshape(xp.sum(gradient, axis=axes), node.shape)
    return xp.astype(gradient, node.dtype) if gradient.dtype != node.dtype else gradient


def _unshared(xp: Any, gradients: list[Array | None]) -> list[Array | None]:
    """Arrays that own their memory, each its own, so that they may be changed in place."""
    seen: set[int] = set()
    result = []
    for gradient in gradients:
        if gradient is not None:
            # An array without a base is no view; a library that does not tell is not trusted.
            shared = id(gradient) in seen or getattr(gradient, "base", gradient) is not None
            gradient = xp.asarray(gradient, copy=True if shared else None)  # also makes an array of NumPy's scalar
            seen.add(id(gradient))
        result.append(gradient)
    return result
