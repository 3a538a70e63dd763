"""The unpickler: what it makes of every protocol, and what it refuses before anything happens."""

from __future__ import annotations

import collections
import io
import os
import pickle
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mtl_fast.data.pickles import load_pickle
from mtl_fast.errors import InputError
from tests.data import python2

VALUE = {
    "data": np.arange(24, dtype=np.uint8).reshape(2, 3, 4),
    "fortran": np.asfortranarray(np.arange(6, dtype=np.int32).reshape(2, 3)),
    "big endian": np.arange(3, dtype=">i4"),
    "flags": np.array([True, False]),
    "scalar": np.int64(7),
    "real": np.float32(0.5),
    "rows": {"n01": [0, 1], "n02": []},
    "pair": (1, None, True, 2.5, -(2**40)),
    "long": list(range(1000)),
    "buffers": [np.arange(n, dtype=np.uint8) for n in (3, 300)],
    "ordered": collections.OrderedDict(a=1),
    "default": collections.defaultdict(list, {"b": [2]}),
    "empty": np.zeros((0, 3), np.uint8),
}


def assert_same(a: Any, b: Any) -> None:
    if isinstance(b, np.ndarray):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert np.array_equal(a, b)
    elif isinstance(b, dict):
        assert list(a) == list(b)
        for key in b:
            assert_same(a[key], b[key])
    elif isinstance(b, (list, tuple)):
        assert type(a) is type(b)
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_every_protocol_gives_what_was_pickled(tmp_path: Path, protocol: int) -> None:
    path = tmp_path / "x.pkl"
    path.write_bytes(pickle.dumps(VALUE, protocol))
    assert_same(load_pickle(path), VALUE)


def test_python_2_gives_what_was_pickled(tmp_path: Path) -> None:
    found = load_pickle(python2.dump(tmp_path / "x.pkl", VALUE))
    assert_same(found, VALUE)


def test_keys_become_text_and_values_stay(tmp_path: Path) -> None:
    path = tmp_path / "x.pkl"
    path.write_bytes(pickle.dumps({b"data": b"xyz", "names": [b"a", "b"], 3: {b"n01": 1}}, 2))
    assert load_pickle(path) == {"data": b"xyz", "names": [b"a", "b"], 3: {"n01": 1}}


@pytest.mark.parametrize("dtype", [object, "S3", "U4"])
def test_arrays_of_text(tmp_path: Path, dtype: Any) -> None:
    path = tmp_path / "x.pkl"
    for protocol in (2, 4, 5):
        path.write_bytes(pickle.dumps(np.array([["ab", "c"]], dtype), protocol))
        assert load_pickle(path).tolist() == np.array([["ab", "c"]], dtype).tolist()


class Call:
    """Pickles as a call of a function."""

    def __init__(self, function: Any, *arguments: Any, state: Any = None) -> None:
        self.parts = (function, arguments, state)

    def __reduce__(self) -> Any:
        return self.parts


def forged_object_pointers() -> bytes:
    """An array of objects whose pointers are eight chosen bytes: numpy's own unpickling would follow them."""
    kind = Call(np.dtype, "u8", False, True, state=(3, "<", None, None, None, -1, -1, 0))
    liar = Call(np.dtype, "O8", False, True, state=(3, "|", None, None, None, -1, -1, 0))
    make = np.zeros(1).__reduce__()[0]
    return pickle.dumps(
        [kind, Call(make, np.ndarray, (0,), b"b", state=(1, (1,), liar, False, b"\x41" * 8))], 4
    )


MARK = "hostile-was-here"


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (Call(os.system, f"touch {MARK}"), "posix.system"),
        (Call(eval, f"open('{MARK}', 'w')"), ".eval"),
        (Call(subprocess.Popen, ["touch", MARK]), ".Popen"),
        (Call(getattr, {}, "clear"), ".getattr"),
        (Call(np.load, MARK), "numpy.load"),
        ({"data": [Call(io.open, MARK, "w")]}, "io.open"),
        (Path("x"), "pathlib"),
        ({"data": np.dtype("u1")}, "_Dtype"),
        (np.zeros(2, [("a", "u1"), ("b", "f4")]), "the dtype 'V5'"),
        (np.array(["2020-01-01"], "M8[D]"), "the dtype 'M8'"),
        ({frozenset(): 1, (1, 2): 2}, "a key of type"),
        (dict, "an object of type function"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_what_is_not_admitted_is_named_and_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: Any, named: str, protocol: int
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "x.pkl"
    path.write_bytes(pickle.dumps(value, protocol))
    with pytest.raises(InputError) as caught:
        load_pickle(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: refused: this pickle asks for ")
    assert named in message
    assert "\n" not in message
    assert not (tmp_path / MARK).exists()


def test_a_name_is_admitted_in_its_module_only(tmp_path: Path) -> None:
    path = tmp_path / "x.pkl"
    path.write_bytes(b"\x80\x02cevil\ndict\n)R.")
    with pytest.raises(InputError, match=r"asks for evil\.dict, which"):
        load_pickle(path)


def test_forged_object_pointers_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.pkl"
    path.write_bytes(forged_object_pointers())
    with pytest.raises(InputError, match="an array of objects from bytes"):
        load_pickle(path)


def test_what_a_pickle_sets_on_a_maker_is_forgotten(tmp_path: Path) -> None:
    """BUILD sets attributes of whatever is on the stack; the next file must not see them."""
    path = tmp_path / "x.pkl"
    path.write_bytes(b"\x80\x02ccollections\nOrderedDict\n(N}X\x04\x00\x00\x00evilK\x01stb)R.")
    assert load_pickle(path) == {}
    from mtl_fast.data import pickles

    assert not any(hasattr(maker, "evil") for maker in pickles._MAKERS.values())


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"PK\x03\x04 an archive",
        b"<html>404</html>",
        pickle.dumps(VALUE, 4)[:-300],
        python2.dumps(VALUE)[:200],
        b"\x80\x04]\x94h\x00a.",
        b"\x80\x02cnumpy\ndtype\nX\x02\x00\x00\x00u1\x85R.",
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n)R.",
        b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7fabc.",
    ],
    ids=["empty", "zip", "html", "cut", "cut-2", "circle", "bare-dtype", "no-arguments", "huge"],
)
def test_damaged_files_are_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.pkl"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        load_pickle(path)
    assert str(caught.value).startswith(f"{path}")
    assert "\n" not in str(caught.value)


def test_wherever_a_file_is_cut_it_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "x.pkl"
    for whole in (pickle.dumps(VALUE, 2), pickle.dumps(VALUE, 5), python2.dumps(VALUE)):
        for cut in range(0, len(whole), 61):
            path.write_bytes(whole[:cut])
            with pytest.raises(InputError, match="cut short or damaged"):
                load_pickle(path)


def test_bytes_that_do_not_fill_the_shape_are_an_error(tmp_path: Path) -> None:
    path = tmp_path / "x.pkl"
    whole = pickle.dumps(np.zeros((7, 5), np.uint8), 2)
    assert whole.count(b"K\x07K\x05") == 1
    path.write_bytes(whole.replace(b"K\x07K\x05", b"K\x09K\x05"))
    with pytest.raises(InputError, match=r"an array of shape \(9, 5\) and uint8 does not fit its data"):
        load_pickle(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.pkl: cannot be read: No such file"):
        load_pickle(tmp_path / "none.pkl")


def test_shared_parts_are_made_once(tmp_path: Path) -> None:
    """Twenty lists, each holding the one before ten times, are 10^19 paths to walk."""
    value: Any = []
    for _ in range(19):
        value = [value] * 10
    path = tmp_path / "x.pkl"
    path.write_bytes(pickle.dumps(value, 4))
    assert len(load_pickle(path)) == 10
