"""The restricted unpickler: plain arrays in every protocol; names and tricks that are refused."""

from __future__ import annotations

import collections
import contextlib
import io
import pickle
from typing import Any

import numpy as np
import pytest

from mtl_fast import restricted_pickle
from mtl_fast.restricted_pickle import NUMPY


def loaded(payload: bytes, allowed: Any = NUMPY) -> Any:
    return restricted_pickle.load(io.BytesIO(payload), allowed)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(
    "array",
    [
        np.arange(6, dtype="<f4").reshape(2, 3),
        np.asfortranarray(np.arange(6, dtype=">f8").reshape(2, 3)),
        np.array([True, False]),
        np.zeros((0, 4), dtype="u1"),
        np.array(3, dtype="i8"),
    ],
    ids=lambda array: f"{array.dtype}{list(array.shape)}",
)
def test_arrays_come_back(array: np.ndarray, protocol: int) -> None:
    back = loaded(pickle.dumps({"a": [array], "b": (1, "x", None)}, protocol))
    assert back["b"] == (1, "x", None)
    assert back["a"][0].dtype == array.dtype
    np.testing.assert_array_equal(back["a"][0], array)


def test_names_of_older_and_newer_numpy_are_the_same() -> None:
    payload = pickle.dumps(np.ones(3), 2)
    assert b"numpy._core" in payload
    np.testing.assert_array_equal(loaded(payload.replace(b"numpy._core", b"numpy.core")), np.ones(3))


def test_only_what_is_admitted_is_made() -> None:
    payload = pickle.dumps(collections.OrderedDict(a=1))
    with pytest.raises(
        pickle.UnpicklingError, match=r"asks for collections\.OrderedDict, which is not admitted"
    ):
        loaded(payload)
    admitted = {"collections.OrderedDict": collections.OrderedDict}
    assert loaded(payload, admitted) == {"a": 1}


class Forged:
    """An object array's dtype over bytes of one's choice: pointers, to numpy's own functions."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.reduced = (function, arguments)

    def __reduce__(self) -> Any:
        return self.reduced


@pytest.mark.parametrize(
    ("forged", "says"),
    [
        (
            Forged(np._core.numeric._frombuffer, b"12345678", np.dtype("O"), (1,), "C"),
            "makes objects of bytes",
        ),
        (Forged(np._core.numeric._frombuffer, b"1234", np.dtype("f4"), (9,), "C"), "are no array"),
        (np.array(["a"]), "holds an array of <U1"),
        (np.zeros(2, dtype=[("a", "f4")]), "holds an array of"),
        (np.array([{}, {}]), "holds an array of objects"),
    ],
)
def test_arrays_of_other_things_are_refused(forged: Any, says: str) -> None:
    with pytest.raises(pickle.UnpicklingError, match=says):
        loaded(pickle.dumps(forged, 4))


def test_damage_is_one_kind_of_error() -> None:
    payload = pickle.dumps({"a": np.arange(50.0)}, 4)
    for size in range(0, len(payload) - 1, 7):
        with pytest.raises(pickle.UnpicklingError):
            loaded(payload[:size])
    for position in range(2, len(payload), 11):
        spoilt = bytearray(payload)
        spoilt[position] ^= 0xFF
        with contextlib.suppress(pickle.UnpicklingError):
            loaded(bytes(spoilt))
