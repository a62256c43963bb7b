"""Warnings of many fits, each once and with whom it is about."""

from mmfree_jax.experiments.scaling.grouped import grouped

LAWS, FAMILIES = ("line", "power", "floor"), ("A", "B")


def test_what_is_said_of_all_is_said_once_without_a_name():
    found = [(law, family, "12 runs is few") for law in LAWS for family in FAMILIES]
    assert grouped(found, (LAWS, FAMILIES)) == ["12 runs is few"]


def test_those_that_it_is_about_are_named():
    found = [
        ("", "", "x.csv, row 3 repeats"), ("line", "A", "26 rows left out"),
        ("power", "A", "26 rows left out"), ("floor", "B", "E spans 2.5 nats"),
    ]  # fmt: skip
    assert grouped(found, (LAWS, FAMILIES)) == [
        "x.csv, row 3 repeats", "line, power; A: 26 rows left out", "floor; B: E spans 2.5 nats"
    ]  # fmt: skip


def test_messages_that_differ_in_numbers_are_one_line():
    found = [(f"budget {10**k:.2g}: K spans {k}.0 decades",) for k in (17, 18)]
    assert grouped(found) == ["budget 1e+17 / 1e+18: K spans 17.0 / 18.0 decades"]
    found += [(f"budget {10**k:.2g}: K spans {k}.0 decades",) for k in (19, 16)]
    assert grouped(found) == ["budget 1e+16 to 1e+19: K spans 16.0 to 19.0 decades"]


def test_names_with_digits_are_not_numbers():
    found = [("a1.csv: 3 rows",), ("a2.csv: 3 rows",)]
    assert grouped(found) == ["a1.csv: 3 rows", "a2.csv: 3 rows"]
