"""The account of a foreign file: each tensor once, what is missing or unknown by name, a table to read."""

from __future__ import annotations

import re

import pytest
import torch

from mtl_fast.config import Config
from mtl_fast.errors import InputError
from mtl_fast.training.ledger import Entry, Imported, Ledger, table


def ledger() -> Ledger:
    return Ledger("file.npy", {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4), "c": torch.ones(1)})


def test_what_is_taken_or_left_out_is_accounted_for() -> None:
    account = ledger()
    taken = account.take("a", "ours", (3, 2), "transposed", lambda t: t.permute(1, 0))
    assert torch.equal(taken, torch.tensor([[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]))
    assert taken.is_contiguous()
    with pytest.raises(InputError, match=re.escape("file.npy: 'b' [4] and 1 more is unknown")):
        account.close()
    account.leave(lambda key: key in "ab", "not needed")
    with pytest.raises(InputError, match=re.escape("'c' [1] is unknown to this format")):
        account.close()
    account.leave("c".__eq__, "not needed")
    account.close()
    assert account.entries == [
        Entry("a", (2, 3), "ours", "transposed"),
        Entry("b", (4,), "", "left out: not needed"),
        Entry("c", (1,), "", "left out: not needed"),
    ]


def test_what_is_missing_or_of_another_shape_is_named() -> None:
    account = ledger()
    assert "a" in account
    assert account.width("a", 1) == 3
    for act, says in (
        (lambda: account.take("z", "ours", (1,)), "file.npy: has no 'z', which ours needs"),
        (lambda: account.take("b", "ours", (5,)), "'b' is [4], which does not fit ours [5]"),
        (
            lambda: account.take("b", "ours", (5, 1), "turned", lambda t: t.permute(1, 0)),
            "'b' is [4] (turned), which does not fit ours [5, 1]",
        ),
        (lambda: account.width("z", 0), "has no 'z', whose shape tells the network's width"),
    ):
        with pytest.raises(InputError, match=re.escape(says)):
            act()


def test_the_table_is_aligned_and_names_what_has_no_other_side() -> None:
    entries = [
        Entry("a", (2, 3), "ours", "transposed"),
        Entry("", (4,), "other", "0"),
        Entry("c", (), "", "left"),
    ]
    assert list(table(entries)) == [
        "source  shape  ours",
        "a       2×3    ours   transposed",
        "–       4      other  0",
        "c       –      –      left",
    ]


def test_a_model_says_how_much_was_taken() -> None:
    imported = Imported("pytorch", Config(), is_meta=True)
    imported.entries = [
        Entry("a", (2,), "x", ""),
        Entry("b", (2,), "", "left out"),
        Entry("", (1,), "y", "0"),
    ]
    text = "meta-trained model from pytorch: 1 tensors taken, 1 left out, 1 not in the source"
    assert str(imported) == text
    imported.stored_statistics = False
    assert str(imported) == text + "; no running statistics: norm 'episode' only"
    imported.take_head(torch.ones(7, 2), torch.ones(7))
    assert imported.config.episodes.n_way == 7
