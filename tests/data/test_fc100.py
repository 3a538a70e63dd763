"""The table of FC100: it is a partition of CIFAR-100 by super-class."""

from __future__ import annotations

from collections import Counter

from mtl_fast.data import fc100


def test_every_super_class_has_five_classes() -> None:
    assert (len(fc100.FINE), len(fc100.COARSE)) == (100, 20)
    assert list(fc100.FINE) == sorted(fc100.FINE)
    assert list(fc100.COARSE) == sorted(fc100.COARSE)
    assert Counter(fc100.COARSE_OF_FINE) == dict.fromkeys(range(20), 5)


def test_splits_share_nothing_and_leave_nothing_out() -> None:
    supers = [i for ids in fc100.SUPER_CLASSES.values() for i in ids]
    assert sorted(supers) == list(range(20))
    assert [len(fc100.class_names(split)) for split in ("train", "val", "test")] == [60, 20, 20]
    assert set().union(*(fc100.class_names(split) for split in ("train", "val", "test"))) == set(range(100))


def test_classes_lie_in_their_super_class() -> None:
    """A few that anyone knows, from every part of the table."""
    known = {
        "apple": "fruit_and_vegetables",
        "bee": "insects",
        "bus": "vehicles_1",
        "dolphin": "aquatic_mammals",
        "lamp": "household_electrical_devices",
        "mouse": "small_mammals",
        "palm_tree": "trees",
        "rose": "flowers",
        "snake": "reptiles",
        "tank": "vehicles_2",
        "woman": "people",
        "worm": "non-insect_invertebrates",
    }
    everything = {
        name: fc100.super_class_names(split)[i]
        for split in ("train", "val", "test")
        for i, name in fc100.class_names(split).items()
    }
    assert {name: everything[name] for name in known} == known
