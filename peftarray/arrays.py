"""Arrays of any library: which namespace a formula runs in, and the few things the array API standard lacks.

The only module that imports array-api-compat. A formula asks `namespace(*arrays)` over *all* its arrays, so that a
frozen NumPy factor beneath a traced array ends up in the namespace that can trace.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np

from peftarray.errors import PeftError

__all__ = [
    "Array",
    "Params",
    "add_matmul",
    "add_matmul_into",
    "add_product",
    "add_product_into",
    "by_rows",
    "constant",
    "device",
    "integers",
    "is_constant",
    "is_short",
    "is_writable",
    "multiplies_short",
    "namespace",
    "register_branch",
    "row_norms",
    "row_parts",
    "sealed",
    "spaced",
    "stop_gradient",
    "thin_product",
    "to_host",
    "unsealed",
    "weight_product",
    "wide",
]

Array = Any
Params = Mapping[str, Array]

# OpenBLAS takes its path for small matrices up to this many multiplications, and it is the faster one up to this rank.
_SMALL_PRODUCT = 1_000_000
_SMALL_RANK = 16
_FEW_ROWS = 64
_PAGE, _LINE = 4096, 64
# So many numbers, and a few arrays as large, stay in a core's cache.
_CACHED = 1 << 16
# type -> (rank, namespace). A plain dict filled on a miss: a look-up takes 0.1 us, and compilers can trace it.
# NumPy 2 keeps the standard by itself; to load the shim around it would take longer than a small merge.
_NAMESPACES: dict[type, tuple[int, Any]] = {np.ndarray: (0, np)}


def namespace(*arrays: Array) -> Any:
    """The array API namespace that a formula over `arrays` runs in.

    Arrays rank by what can hold the result: one that stands for others (it says so by `__namespace_rank__`), then a
    library's array, then NumPy's. Scalars and None are passed over.

    Raises:
        PeftError: two foreign libraries meet, or there is no array at all.

    Example:
        >>> namespace(np.ones(2), 3.0).__name__
        'numpy'
    """
    best_rank = -1
    best: Any = None
    for array in arrays:
        found = _NAMESPACES.get(type(array))
        if found is None:
            # NumPy scalars and memory maps are NumPy's too; its float64 is a Python float besides.
            is_numpy = isinstance(array, (np.ndarray, np.generic))
            if array is None or (isinstance(array, (int, float, complex)) and not is_numpy):
                continue
            found = (0, np) if is_numpy else (_rank(array), _shim().array_namespace(array))
            _NAMESPACES[type(array)] = found
        rank, xp = found
        if rank > best_rank:
            best_rank, best = rank, xp
        elif rank == best_rank and xp is not best and xp.__name__ != best.__name__:
            message = f"arrays of {best.__name__} and {xp.__name__} meet in one formula; move them to one library first"
            raise PeftError(message)
    if best is None:
        message = "a formula got no array; give at least one"
        raise PeftError(message)
    return best


def device(array: Array) -> Any:
    """Where an array lies, as its library says it."""
    # JAX's arrays under a transformation have none, which the shim knows; torch's compiler does not trace the shim.
    return _shim().device(array) if namespace(array).__name__ == "jax.numpy" else array.device


def _shim() -> ModuleType:
    """array-api-compat, imported by the first array that is not NumPy's."""
    import array_api_compat

    return array_api_compat


def _rank(array: Array) -> int:
    return getattr(type(array), "__namespace_rank__", 1)


def constant(values: np.ndarray, like: Array) -> Array:
    """Host values as an array of the library, device and dtype of `like`."""
    return namespace(like).asarray(values, dtype=like.dtype, device=device(like))


def wide(like: Array) -> Array:
    """`like`, or an array of its library and device with float32 in place of a shorter dtype."""
    if getattr(like.dtype, "itemsize", 4) >= 4:
        return like
    xp = namespace(like)
    return xp.zeros((), dtype=xp.float32, device=device(like))


def is_short(array: Array) -> bool:
    """Whether it holds floating numbers of fewer bits than float32."""
    return getattr(array.dtype, "itemsize", 4) < 4 and "float" in str(array.dtype)


def is_writable(array: Array) -> bool:
    """Whether its numbers can be changed: those of JAX's arrays never, of NumPy's where they lie in such memory."""
    if isinstance(array, np.ndarray):
        return array.flags.writeable
    return namespace(array).__name__ != "jax.numpy"


def sealed(array: Array) -> Array:
    """An array of NumPy's that nobody else holds, which nobody can write into any more; any other as it is."""
    owner = array
    while isinstance(owner, np.ndarray):
        owner.flags.writeable = False
        owner = owner.base
    return array


def unsealed(array: Array) -> Array:
    """A copy of an array of NumPy's that cannot be written into; any other as it is."""
    return array.copy() if isinstance(array, np.ndarray) and not array.flags.writeable else array


def is_constant(array: Array) -> bool:
    """Whether it is an array of NumPy's whose memory nobody can write into.

    Example:
        >>> values = np.ones(3)
        >>> is_constant(values), is_constant(sealed(values)), is_constant(values[1:])
        (False, True, True)
    """
    while isinstance(array, np.ndarray):
        if array.flags.writeable:
            return False
        array = array.base
    return array is None or isinstance(array, bytes)


def multiplies_short(array: Array) -> bool:
    """Whether its library multiplies matrices of short floating dtypes at speed; NumPy does not."""
    return not isinstance(array, np.ndarray)


def integers(values: Sequence[int] | np.ndarray, like: Array) -> Array:
    """Whole numbers as an index array of the library and device of `like`."""
    # A copy: torch takes only memory that it might write to.
    host = np.array(values, np.int64)
    return namespace(like).asarray(host, device=device(like))


def stop_gradient(array: Array) -> Array:
    """The same values as a constant of the gradient; the array itself where its library traces none.

    An array that stands for others brings its own way by the method `__stop_gradient__`.
    """
    own = getattr(type(array), "__stop_gradient__", None)
    if own is not None:
        return own(array)
    if isinstance(array, np.ndarray):
        return array
    home = namespace(array).__name__  # by the table: torch's compiler traces it, and not the shim's cached tests
    if home == "array_api_compat.torch":
        return array.detach()
    if home == "jax.numpy":
        import jax

        return jax.lax.stop_gradient(array)
    return array


def register_branch(
    kind: type, like: Array, flatten: Callable[[Any], Any], unflatten: Callable[[Any, Any], Any]
) -> None:
    """Let the library of `like` look into objects of this kind, where it has trees of arrays of its own.

    Args:
        kind: the class.
        like: an array of the library.
        flatten: object -> (arrays, what else makes it).
        unflatten: (what else makes it, arrays) -> object.
    """
    if not isinstance(like, np.ndarray) and _shim().is_jax_array(like):
        import jax

        jax.tree_util.register_pytree_node(kind, flatten, unflatten)


def thin_product(up: Array, down: Array) -> Array:
    """`up @ down` of thin factors `(n, r)` and `(r, m)`.

    NumPy's BLAS multiplies small matrices without packing them first, in about half the time for r = 16; so its product
    is made in blocks of rows that count as small.
    """
    if not (isinstance(up, np.ndarray) and isinstance(down, np.ndarray) and up.ndim == down.ndim == 2):
        return up @ down
    rows, rank = up.shape
    columns = down.shape[1]
    block = _SMALL_PRODUCT // max(1, rank * columns)
    stacks = rows // block if block > 1 and rank <= _SMALL_RANK else 0
    if stacks < 2:
        return up @ down
    product = np.empty((rows, columns), np.result_type(up, down))
    whole = stacks * block
    np.matmul(up[:whole].reshape(stacks, block, rank), down, out=product[:whole].reshape(stacks, block, columns))
    np.matmul(up[whole:], down, out=product[whole:])
    return product


def spaced(down: Array) -> Array:
    """The right factor of a thin product, with columns to spare where that makes the product sooner.

    Where the product's rows would lie whole pages apart in torch's memory on the CPU, as 1024 numbers of float32 do,
    all that is written at a time falls on the same lines of the cache. A few columns more keep it off them; whoever
    multiplies takes only the first ones of the product.
    """
    if isinstance(down, np.ndarray) or not _is_torch(down) or down.device.type != "cpu":
        return down
    size = down.dtype.itemsize
    if down.shape[1] * size % _PAGE or down.shape[0] > _SMALL_RANK:
        return down
    return namespace(down).concat([down, down[:, : _LINE // size]], axis=1)


def weight_product(x: Array, weight: Array) -> Array:
    """`x @ weight.mT` of rows `(n, in)` and a weight `(out, in)`.

    NumPy's BLAS packs the right side, which for few rows takes longer than the product: that one is turned round.
    """
    if isinstance(x, np.ndarray) and isinstance(weight, np.ndarray) and x.ndim == 2 and 1 < len(x) <= _FEW_ROWS:
        return (weight @ x.mT).mT
    return x @ weight.mT


def add_matmul(base: Array, left: Array, right: Array) -> Array:
    """`base + left @ right` of matrices; in one pass over the base where the library has such a product."""
    if _is_fused(base, left, right):
        return base.addmm(left, right)
    return base + thin_product(left, right)


def add_matmul_into(base: Array, left: Array, right: Array) -> None:
    """`base += left @ right` of matrices, in the memory of `base`."""
    if isinstance(base, np.ndarray):
        for rows, of_left in row_parts(base, left):
            rows += thin_product(of_left, right)
    elif _is_fused(base, left, right):
        base.addmm_(left, right)
    else:
        base += left @ right


def add_product_into(base: Array, left: Array, right: Array) -> None:
    """`base += left * right`, in the memory of `base`."""
    if _is_fused(base, left, right):
        base.addcmul_(left, right)
    elif isinstance(base, np.ndarray) and base.ndim > 2:  # blocks of a matrix, a row of which stays in the cache
        of_rows = (np.broadcast_to(factor, (len(base), *factor.shape[1:])) for factor in (left, right))
        for row, of_left, of_right in zip(base, *of_rows, strict=True):
            row += of_left * of_right
    else:
        base += left * right


def add_product(base: Array, left: Array, right: Array) -> Array:
    """`base + left * right`; in one pass where the library has such a sum."""
    if _is_fused(base, left, right):
        return base.addcmul(left, right)
    return base + left * right


def _is_fused(base: Array, *others: Array) -> bool:
    """Whether all are torch's, of one dtype."""
    if isinstance(base, np.ndarray) or not _is_torch(base):
        return False
    for other in others:  # a loop, since a generator takes longer than a small product's launch
        if isinstance(other, np.ndarray) or not _is_torch(other) or other.dtype != base.dtype:
            return False
    return True


def _is_torch(array: Array) -> bool:
    name: str = namespace(array).__name__
    return name == "array_api_compat.torch"


def by_rows(make: Callable[[slice], Array], like: Array) -> Array:
    """What `make` makes of all rows, where the result is a matrix like `like`.

    NumPy goes through the memory once for each operation; so it makes blocks of rows that stay in the cache.
    """
    if not isinstance(like, np.ndarray):
        return make(slice(None))
    blocks = _row_blocks(like)
    first = make(blocks[0])
    if len(blocks) == 1:
        return first
    if not isinstance(first, np.ndarray):  # traced factors over a plain base
        return make(slice(None))
    made = np.empty(like.shape, first.dtype)
    made[blocks[0]] = first
    for block in blocks[1:]:
        made[block] = make(block)
    return made


def row_parts(matrix: Array, *others: Array) -> Iterator[tuple[Array, ...]]:
    """Rows of a matrix that stay in the cache together, and the same rows of others; all, where not on the host."""
    if isinstance(matrix, np.ndarray):
        for rows in _row_blocks(matrix):
            yield matrix[rows], *(other[rows, ...] for other in others)
    elif _is_fused(matrix, *others) and matrix.device.type == "cpu" and matrix.shape[1]:
        numbers = 2 * _CACHED * namespace(matrix).get_num_threads()  # all of which share each part
        rows = max(1, numbers // matrix.shape[1])
        yield from zip(*(array.split(rows) for array in (matrix, *others)), strict=True)
    else:
        yield matrix, *others


def _row_blocks(matrix: np.ndarray) -> list[slice]:
    rows = max(1, _CACHED // max(1, matrix.shape[1]))
    return [slice(start, start + rows) for start in range(0, matrix.shape[0], rows)] or [slice(None)]


def row_norms(matrix: Array) -> Array:
    """The Euclidean norm of each row, in one pass over the matrix."""
    if isinstance(matrix, np.ndarray):
        return np.sqrt(np.vecdot(matrix, matrix))
    return namespace(matrix).linalg.vector_norm(matrix, axis=1)


def to_host(array: Array) -> np.ndarray:
    """A NumPy array with the values of `array`: the one place where a copy from a device to the host is made."""
    if isinstance(array, np.ndarray):
        return array
    if _shim().is_torch_array(array):
        array = array.detach().cpu()
        if str(array.dtype) == "torch.bfloat16":  # which NumPy lacks: by its bits
            import ml_dtypes

            return array.view(namespace(array).int16).numpy().view(ml_dtypes.bfloat16)
        return array.numpy()
    if hasattr(array, "get"):  # CuPy refuses implicit conversion, by design
        return array.get()
    xp = namespace(array)
    if "array_api_strict" in xp.__name__:
        return np.asarray(array.to_device(xp.Device("CPU_DEVICE")))
    return np.asarray(array)
