"""Fourier transforms. The adjoint of a transform is the other one, with the scale that the first leaves out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from peftarray.arrays import Array, device
from peftarray.autodiff.rules.family import Family, Needs, Result

__all__ = ["FFT"]

FFT = Family(constants={"fftfreq", "rfftfreq"})

_ADJOINT_NORM = {"backward": "forward", "forward": "backward", "ortho": "ortho"}


def _adjoint_pair(name: str, other: str) -> None:
    @FFT.rule(name)
    def rule(xp: Any, needs: Needs, x: Array, n: int | None = None, axis: int = -1, norm: str = "backward") -> Result:
        length = x.shape[axis]
        return (
            getattr(xp.fft, name)(x, n=n, axis=axis, norm=norm),
            lambda g: (_fit(xp, getattr(xp.fft, other)(g, axis=axis, norm=_ADJOINT_NORM[norm]), length, axis),),
        )


_adjoint_pair("fft", "ifft")
_adjoint_pair("ifft", "fft")


@FFT.rule("rfft")
def _rfft(xp: Any, needs: Needs, x: Array, n: int | None = None, axis: int = -1, norm: str = "backward") -> Result:
    length = x.shape[axis]
    total = n or length

    def pull(g: Array) -> tuple[Array]:
        halved = g * _weights(xp, g, total, axis, 0.5)
        return (_fit(xp, xp.fft.irfft(halved, n=total, axis=axis, norm=_ADJOINT_NORM[norm]), length, axis),)

    return xp.fft.rfft(x, n=n, axis=axis, norm=norm), pull


@FFT.rule("irfft")
def _irfft(xp: Any, needs: Needs, x: Array, n: int | None = None, axis: int = -1, norm: str = "backward") -> Result:
    length = x.shape[axis]
    total = n or 2 * (length - 1)

    def pull(g: Array) -> tuple[Array]:
        spectrum = xp.fft.rfft(g, axis=axis, norm=_ADJOINT_NORM[norm])
        return (_fit(xp, spectrum * _weights(xp, spectrum, total, axis, 2.0), length, axis),)

    return xp.fft.irfft(x, n=n, axis=axis, norm=norm), pull


def _weights(xp: Any, spectrum: Array, total: int, axis: int, inner: float) -> Array:
    """`inner` for the frequencies of a half spectrum that stand for two; 1 for those that do not."""
    count = total // 2 + 1
    places = xp.arange(count, device=device(spectrum))
    alone = xp.astype((places == 0) | (places * 2 == total), xp.real(spectrum).dtype)
    axis %= spectrum.ndim
    return xp.reshape(inner + alone * (1.0 - inner), tuple(count if i == axis else 1 for i in range(spectrum.ndim)))


def _fit(xp: Any, x: Array, length: int, axis: int) -> Array:
    """`x` cut or filled with zeros to a length along an axis."""
    axis %= x.ndim
    missing = length - x.shape[axis]
    if missing <= 0:
        return x[tuple(slice(length) if i == axis else slice(None) for i in range(x.ndim))]
    shape = tuple(missing if i == axis else n for i, n in enumerate(x.shape))
    return xp.concat([x, xp.zeros(shape, dtype=x.dtype, device=device(x))], axis=axis)


def _over_axes(name: str, first: str, rest: str, *, first_is_last: bool) -> None:
    """Declares a transform over several axes as one over each; a real one changes its side on the last axis."""

    @FFT.composition(name)
    def transform(
        xp: Any, x: Array, s: Sequence[int] | None = None, axes: Sequence[int] | None = None, norm: str = "backward"
    ) -> Array:
        axes = axes if axes is not None else range(-len(s), 0) if s is not None else range(-x.ndim, 0)
        lengths = s if s is not None else [None] * len(axes)
        steps: list[tuple[str, int, int | None]] = [
            (rest, axis, n) for axis, n in zip(axes[:-1], lengths[:-1], strict=True)
        ]
        last = (first, axes[-1], lengths[-1])
        for step, axis, n in [*steps, last] if first_is_last else [last, *steps]:
            x = getattr(xp.fft, step)(x, n=n, axis=axis, norm=norm)
        return x


_over_axes("fftn", "fft", "fft", first_is_last=False)
_over_axes("ifftn", "ifft", "ifft", first_is_last=False)
_over_axes("rfftn", "rfft", "fft", first_is_last=False)
_over_axes("irfftn", "irfft", "ifft", first_is_last=True)


@FFT.composition("hfft")
def _hfft(xp: Any, x: Array, n: int | None = None, axis: int = -1, norm: str = "backward") -> Array:
    return xp.fft.irfft(xp.conj(x), n=n, axis=axis, norm=_ADJOINT_NORM[norm])


@FFT.composition("ihfft")
def _ihfft(xp: Any, x: Array, n: int | None = None, axis: int = -1, norm: str = "backward") -> Array:
    return xp.conj(xp.fft.rfft(x, n=n, axis=axis, norm=_ADJOINT_NORM[norm]))


def _shift(name: str, half: Callable[[int], int]) -> None:
    @FFT.composition(name)
    def shift(xp: Any, x: Array, axes: Sequence[int] | int | None = None) -> Array:
        chosen = tuple(range(x.ndim)) if axes is None else (axes,) if isinstance(axes, int) else tuple(axes)
        return xp.roll(x, tuple(half(x.shape[axis]) for axis in chosen), axis=chosen)


_shift("fftshift", lambda n: n // 2)
_shift("ifftshift", lambda n: -(n // 2))
