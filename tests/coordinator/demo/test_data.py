from __future__ import annotations

from collections import Counter

from coordinator.demo.data import conversations, documents, facts, split_facts


def test_no_held_out_fact_is_asked_in_training() -> None:
    split = split_facts(0)
    assert len(split.train) + len(split.valid) + len(split.test) == len(facts())
    asked = {row["messages"][0]["content"] for row in conversations(split.train)}
    answered = {row["messages"][1]["content"] for row in conversations(split.train)}
    for held_out in (split.valid, split.test):
        for row in conversations(held_out):
            assert row["messages"][0]["content"] not in asked
            assert row["messages"][1]["content"] not in answered
    assert not set(split.valid) & set(split.test)


def test_half_of_what_is_held_out_are_capitals() -> None:
    split = split_facts(0)
    for held_out in (split.valid, split.test):
        assert sum(fact.kind == "capital" for fact in held_out) == 10
        assert len(held_out) == 20


def test_no_country_is_held_out_twice() -> None:
    split = split_facts(0)
    countries = Counter(fact.country for fact in (*split.valid, *split.test))
    assert set(countries.values()) == {1}


def test_every_fact_stands_in_the_texts_equally_often() -> None:
    texts = documents(0, 90)
    assert {sum(fact.sentence in text for text in texts) for fact in facts()} == {2}


def test_a_seed_names_its_data() -> None:
    assert documents(3, 50) == documents(3, 50) != documents(4, 50)
    assert split_facts(3) == split_facts(3) != split_facts(4)
