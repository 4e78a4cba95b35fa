"""Backends are found by name, and arrays know theirs."""

from __future__ import annotations

import numpy as np
import pytest

from peftarray.backend import backend_names, backend_of, load_backend
from peftarray.errors import ConfigError


def test_an_array_of_every_library_has_its_backend(asarray):
    name = backend_of(asarray([1.0]), np.ones(1), 3.0)
    assert name in type(asarray([1.0])).__module__ or name == "jax"
    assert name in backend_names()


def test_arrays_go_to_a_library_and_back(asarray, to_numpy):
    backend = load_backend(backend_of(asarray([1.0])))
    for values in (np.arange(6.0).reshape(2, 3), np.arange(3, dtype=np.int32), np.asarray(True)):
        array = backend.from_host(values)
        assert type(array) is type(asarray([1.0]))
        np.testing.assert_array_equal(to_numpy(array), values)
        back = backend.to_host(array)
        assert isinstance(back, np.ndarray)
        assert back.dtype == values.dtype
        np.testing.assert_array_equal(back, values)


def test_arrays_go_to_the_device_of_others(asarray, device):
    backend = load_backend(backend_of(asarray([1.0])))
    there = backend.from_host(np.ones(2), device=device)
    assert str(there.device) == str(asarray([1.0]).device)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("tensorflow", "there is no backend 'tensorflow'; installed: numpy"),
        ("torhc", "nearest: torch"),
        ("Numpy", "nearest: numpy"),
    ],
)
def test_a_name_without_a_backend_is_refused(name, words):
    with pytest.raises(ConfigError) as caught:
        load_backend(name)
    assert words in str(caught.value)


def test_a_backend_without_its_library_is_refused(monkeypatch):
    import importlib.metadata

    point = importlib.metadata.EntryPoint("numpy", "peftarray.no_such_module", "peftarray.backends")
    monkeypatch.setattr("peftarray.backend._announced", lambda: {"numpy": point})
    with pytest.raises(ConfigError, match=r"cannot be loaded .* install its library, or choose one that is installed"):
        load_backend("numpy")


def test_arrays_without_a_backend_are_refused(monkeypatch):
    monkeypatch.setattr("peftarray.backend._announced", dict)
    with pytest.raises(ConfigError, match="there is no backend for arrays of numpy"):
        backend_of(np.ones(1))
