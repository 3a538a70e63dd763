"""Weight files of others: what is read, what is refused, without running what is inside."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mtl_fast.errors import InputError
from mtl_fast.training.foreign_files import is_npy, read_npy, read_pth, state_of

ARRAYS = {
    "four": np.arange(24, dtype=np.float32).reshape(2, 2, 3, 2),
    "fortran": np.asfortranarray(np.arange(6, dtype=np.float64).reshape(2, 3)),
    "big": np.arange(3, dtype=">f4"),
}


class Hostile:
    """Runs when a careless reader opens it."""

    ran = False

    def __reduce__(self) -> Any:
        return (setattr, (Hostile, "ran", True))


def npy(path: Path, content: object, protocol: int | None = None) -> Path:
    """As numpy.save writes an object, in a protocol of one's choice."""
    array = np.empty((), dtype=object)
    array[()] = content
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
        # Newer protocols than its default need numpy's own array to be pickled as an object.
        file.write(pickle.dumps(array, protocol=protocol))
    return path


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_dictionaries_of_every_protocol(protocol: int, tmp_path: Path) -> None:
    """Python 2 had 0 to 2; there text is bytes, here the names."""
    content = {key.encode() if protocol < 3 else key: value for key, value in ARRAYS.items()}
    tensors = read_npy(npy(tmp_path / "a.npy", content, protocol))
    assert tensors.keys() == ARRAYS.keys()
    for key, array in ARRAYS.items():
        assert tensors[key].dtype == torch.float32
        assert torch.equal(tensors[key], torch.from_numpy(array.astype(np.float32)))
        tensors[key].add_(1)  # memory of its own


def test_what_numpy_save_writes(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", ARRAYS, allow_pickle=True)  # type: ignore[arg-type]
    assert is_npy(tmp_path / "a.npy")
    assert read_npy(tmp_path / "a.npy").keys() == ARRAYS.keys()


def error_of(read: Any, path: Path) -> str:
    with pytest.raises(InputError) as caught:
        read(path)
    text = str(caught.value)
    assert text.startswith(str(path))
    assert "\n" not in text
    return text


def test_hostile_and_damaged_dictionaries_are_named(tmp_path: Path) -> None:
    path = npy(tmp_path / "a.npy", {"a": Hostile()})
    assert "asks for builtins.setattr, which data do not need" in error_of(read_npy, path)
    assert not Hostile.ran
    payload = npy(path, ARRAYS).read_bytes()
    for size in (len(payload) - 5, 200, 130):
        path.write_bytes(payload[:size])
        assert "cut short or damaged" in error_of(read_npy, path)
    for size in (100, 8, 0):
        path.write_bytes(payload[:size])
        assert "has no header of a .npy file" in error_of(read_npy, path)
    np.save(path, np.ones((2, 3)))
    assert "holds an array [2, 3] of float64, not a dictionary" in error_of(read_npy, path)
    assert "holds list, not a dictionary" in error_of(read_npy, npy(path, [1]))
    assert "'a' is str, not a tensor" in error_of(read_npy, npy(path, {"a": "x"}))
    assert "'a' holds numbers that are not finite" in error_of(read_npy, npy(path, {"a": np.array([np.inf])}))
    for read in (read_npy, read_pth, is_npy):
        assert "cannot be read (No such file" in error_of(read, tmp_path / "nowhere")


def test_hostile_and_damaged_pth_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    torch.save({"a": Hostile()}, path)
    said = error_of(read_pth, path)
    assert "refused: it asks for setattr, which weights do not need" in said
    assert "weights_only" not in said  # no advice to run it
    assert not Hostile.ran
    torch.save({"a": torch.ones(3)}, path)
    payload = path.read_bytes()
    for damaged in (payload[: len(payload) // 2], payload[:30], b"", b"no weights, but text", b"\x80\x02]"):
        path.write_bytes(damaged)
        error_of(read_pth, path)
    path.write_bytes(payload)
    assert torch.equal(read_pth(path)["a"], torch.ones(3))


def test_two_names_for_one_tensor_are_an_error(tmp_path: Path) -> None:
    content = {"a.module.b": torch.ones(1), "a.b": torch.ones(1)}
    assert "with and without 'module'" in error_of(lambda path: state_of(path, content), tmp_path)


def test_a_state_is_float32_and_has_no_module_in_its_names(tmp_path: Path) -> None:
    content = {"net.module.a": torch.ones(2, dtype=torch.float64), "module.n": torch.tensor(7)}
    state = state_of(tmp_path, content)
    assert {name: tensor.dtype for name, tensor in state.items()} == {
        "net.a": torch.float32,
        "n": torch.int64,
    }


def test_an_array_of_text_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"'names' is an array of <U3, not of numbers"):
        read_npy(npy(tmp_path / "a.npy", {"names": np.array(["one", "two"])}))
