"""A file is replaced whole or not at all, and nothing half written stays."""

from __future__ import annotations

import errno
import json
import os
import threading
from pathlib import Path

import pytest

from mtl_fast.files import replace_file, utf8


@pytest.mark.parametrize("shared", [False, True])
def test_parts_follow_each_other(shared: bool, tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"longer than what comes")
    replace_file(path, [b"ab", memoryview(b"cd"), b""], shared=shared)
    assert path.read_bytes() == b"abcd"
    assert [file.name for file in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("shared", [False, True])
def test_what_cannot_be_written_leaves_the_old_file_alone(
    call: str, shared: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a"
    replace_file(path, [b"old"])

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, full)
    with pytest.raises(OSError, match="No space left"):
        replace_file(path, [b"new"], shared=shared)
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["a"]


def test_the_first_error_is_told_where_nothing_can_be_removed_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_only(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(
        os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error"))
    )
    monkeypatch.setattr(Path, "unlink", read_only)
    with pytest.raises(OSError, match="Input/output error"):
        replace_file(tmp_path / "a", [b"new"])


def test_what_a_killed_run_left_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / ".a.partial").write_bytes(b"half of something long")
    replace_file(tmp_path / "a", [b"whole"])
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("a", b"whole")]


def test_many_writers_of_one_file_do_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "a"
    contents = [bytes([i]) * 100_000 for i in range(4)]
    replace_file(path, [contents[0]])
    writers = [
        threading.Thread(
            target=lambda c=c: [replace_file(path, [c[:7], c[7:]], shared=True) for _ in range(10)]
        )
        for c in contents
    ]
    for writer in writers:
        writer.start()
    seen = set()
    while any(writer.is_alive() for writer in writers):
        seen.add(path.read_bytes())
    assert seen <= set(contents)
    assert [file.name for file in tmp_path.iterdir()] == ["a"]


def test_text_is_utf8_whatever_a_name_holds_and_json_gives_it_back() -> None:
    assert utf8("Vögel 鳥") == "Vögel 鳥".encode()
    for name in ("a\udcff", "\\\udcff\\", '"\udc80"'):
        assert json.loads(utf8(json.dumps(name, ensure_ascii=False)).decode()) == name
