"""The demo's text: facts about countries, as plain sentences to learn and as questions to answer.

Every fact stands in the plain sentences. The questions are split by fact: what the validation and test files ask was
never asked in training, so a right answer there is knowledge from the sentences, given in the manner that the
training questions taught.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Kind = Literal["capital", "language", "continent"]

# Country, capital, language, continent.
_TABLE = """
Argentina|Buenos Aires|Spanish|South America
Australia|Canberra|English|Oceania
Austria|Vienna|German|Europe
Brazil|Brasilia|Portuguese|South America
Bulgaria|Sofia|Bulgarian|Europe
Canada|Ottawa|English|North America
Chile|Santiago|Spanish|South America
China|Beijing|Chinese|Asia
Colombia|Bogota|Spanish|South America
Croatia|Zagreb|Croatian|Europe
Cuba|Havana|Spanish|North America
Denmark|Copenhagen|Danish|Europe
Ecuador|Quito|Spanish|South America
Egypt|Cairo|Arabic|Africa
Ethiopia|Addis Ababa|Amharic|Africa
Finland|Helsinki|Finnish|Europe
France|Paris|French|Europe
Germany|Berlin|German|Europe
Ghana|Accra|English|Africa
Greece|Athens|Greek|Europe
Hungary|Budapest|Hungarian|Europe
Iceland|Reykjavik|Icelandic|Europe
India|New Delhi|Hindi|Asia
Iran|Tehran|Persian|Asia
Iraq|Baghdad|Arabic|Asia
Ireland|Dublin|English|Europe
Italy|Rome|Italian|Europe
Japan|Tokyo|Japanese|Asia
Jordan|Amman|Arabic|Asia
Kenya|Nairobi|Swahili|Africa
Mongolia|Ulaanbaatar|Mongolian|Asia
Morocco|Rabat|Arabic|Africa
Nepal|Kathmandu|Nepali|Asia
Norway|Oslo|Norwegian|Europe
Peru|Lima|Spanish|South America
Poland|Warsaw|Polish|Europe
Portugal|Lisbon|Portuguese|Europe
Romania|Bucharest|Romanian|Europe
Senegal|Dakar|French|Africa
Spain|Madrid|Spanish|Europe
Sweden|Stockholm|Swedish|Europe
Thailand|Bangkok|Thai|Asia
Tunisia|Tunis|Arabic|Africa
Uruguay|Montevideo|Spanish|South America
Vietnam|Hanoi|Vietnamese|Asia
"""

SENTENCES: dict[Kind, str] = {
    "capital": "The capital of {country} is {value}.",
    "language": "People in {country} speak {value}.",
    "continent": "The country of {country} lies in {value}.",
}
QUESTIONS: dict[Kind, tuple[str, ...]] = {
    "capital": ("What is the capital of {country}?", "Name the capital of {country}."),
    "language": ("What do people in {country} speak?", "Which language is spoken in {country}?"),
    "continent": ("Where does {country} lie?", "On which continent is {country}?"),
}


@dataclass(frozen=True)
class Fact:
    """One thing that is so."""

    country: str
    kind: Kind
    value: str

    @property
    def sentence(self) -> str:
        """The fact as the model reads it, and as it should answer."""
        return SENTENCES[self.kind].format(country=self.country, value=self.value)

    def question(self, form: int) -> str:
        """One of the ways to ask for it."""
        return QUESTIONS[self.kind][form].format(country=self.country)


@dataclass(frozen=True)
class Split:
    """The facts whose questions are trained on, validated with and tested with."""

    train: tuple[Fact, ...]
    valid: tuple[Fact, ...]
    test: tuple[Fact, ...]


def facts() -> list[Fact]:
    """All facts, in the order of the table."""
    found = []
    for line in _TABLE.strip().splitlines():
        country, capital, language, continent = line.split("|")
        found += [
            Fact(country, "capital", capital),
            Fact(country, "language", language),
            Fact(country, "continent", continent),
        ]
    return found


def split_facts(seed: int, held_out: int = 10) -> Split:
    """Hold out so many capitals for each of validation and test, and as many facts of the other kinds.

    No country gives more than one fact to validation and test together, so that the questions about a country that
    is asked for there are still familiar.
    """
    shuffled = facts()
    random.Random(seed).shuffle(shuffled)
    picked: list[Fact] = []
    for capital in (True, False):
        taken = {fact.country for fact in picked}
        fresh = {fact.country: fact for fact in shuffled if (fact.kind == "capital") is capital}
        picked += [fact for country, fact in fresh.items() if country not in taken][: 2 * held_out]
    train = tuple(fact for fact in shuffled if fact not in picked)
    return Split(train, tuple(picked[0::2]), tuple(picked[1::2]))


def documents(seed: int, count: int) -> list[str]:
    """Plain texts: the three facts of one country in any order. Every country comes equally often."""
    chance = random.Random(seed)
    every = facts()
    by_country = [every[start : start + 3] for start in range(0, len(every), 3)]
    texts: list[str] = []
    while len(texts) < count:
        chance.shuffle(by_country)
        texts += [" ".join(fact.sentence for fact in chance.sample(group, 3)) for group in by_country]
    return texts[:count]


def conversations(chosen: Sequence[Fact], forms: Sequence[int] = (0, 1)) -> list[dict[str, Any]]:
    """Chat rows: each fact asked for in these ways."""
    return [
        {
            "messages": [
                {"role": "user", "content": fact.question(form)},
                {"role": "assistant", "content": fact.sentence},
            ]
        }
        for fact in chosen
        for form in forms
    ]


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """One JSON object per line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
