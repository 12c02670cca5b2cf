"""Children's stories from templates of our own: as many as wanted, each a function of its random generator.

A story is about two friends, whose names come back in nearly every sentence. Names stand behind a space.
"""

from __future__ import annotations

import random
from collections.abc import Sequence


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NAMES = _words(
    """Anna Ben Clara David Emma Felix Grace Henry Ida Jack Kate Leo Mia Noah Olive Paul Rosa Sam Tina Max Lucy Tom Ella
    Finn Nora Oscar Ruby Simon Vera Will Zoe Adam Bella Carl Daisy Eric Flora George Hanna Ivan Julia Karl Lena Mark
    Nina Otto Peter Rita Sara Tim"""
)
ONSETS = _words(
    """Ba Be Bi Bo Da De Di Do Fa Fe Ga Go Ja Jo Ka Ke Ki Ko La Le Li Lo Ma Me Mi Mo Na Ne Ni No Pa Pe Po Ra Re Ri Ro Sa
    Si Ta Te Ti To Va Vi Wa Wi Za Zu"""
)
ENDINGS = _words(
    """bby dek fin gan hle jor kim las lvo mbo mel nda nix nto pel quin rah rdo ric rsha ska sno tam tto vak vin wen xel
    yra zak zel"""
)
# Names put together, of which one in eight is never in a story to learn from: every onset and ending is in some.
MADE_UP = [onset + ending for i, onset in enumerate(ONSETS) for j, ending in enumerate(ENDINGS) if (i + j) % 8]
HELD_OUT = [onset + ending for i, onset in enumerate(ONSETS) for j, ending in enumerate(ENDINGS) if not (i + j) % 8]

SLOTS = {
    "animal": "a small dog|an old cat|a brown rabbit|a grey mouse|a green frog|a shy fox|a fat duck|a little bird",
    "place": "the garden|the forest|the old mill|the river|the market|the hill|the school|the beach|the barn",
    "thing": "a red ball|a tin box|a blue kite|a loaf of bread|a silver key|a wooden boat|a warm coat|a paper crown",
    "mood": "happy|sad|tired|brave|curious|quiet|proud|hungry|afraid",
    "weather": "The sun was shining|It began to rain|The wind was strong|Snow fell on the roofs|The night was clear",
    "deed": "sang a song|told a story|baked a cake|built a bridge|drew a map|counted the stars|swept the floor",
}
OPENINGS = (
    "Once upon a time there was a child whose name was {a}. The best friend of {a} was {b}.",
    "In a village by {place} lived a girl called {a} and a boy called {b}. Every day {a} and {b} went to {place}.",
    "One morning {a} woke up and felt {mood}. So {a} ran to the house of {b} and knocked at the door.",
)
MIDDLES = (
    "{weather}, and {a} said to {b} that they should go to {place}.",
    "At {place} {b} found {thing}. \"Look,\" said {b}, \"this is for you, {a}.\"",
    "Then {a} saw {animal}. It looked {mood}, so {a} and {b} stayed with it for a while.",
    "\"I am {mood},\" said {a}. But {b} only laughed and {deed}.",
    "Because {b} was {mood}, {a} took {thing} and gave it to {b}.",
    "{animal} came out of {place} and asked {a} for {thing}.",
    "After that {a} {deed}, and {b} {deed} too.",
    "When it was late, {b} could not find {a} at {place}. \"Where is {a}?\" cried {b}.",
    "The mother of {b} gave {thing} to {a} and told {b} to be home before dark.",
    "{weather}. Still {b} walked to {place}, and {a} went with {b}.",
)  # fmt: skip
ENDINGS_OF_STORIES = (
    "In the evening {a} was {mood} no more, and {b} went home with {thing}.",
    "From that day on {a} and {b} were friends for ever.",
    "That night {a} dreamed of {place}, and {b} dreamed of {thing}.",
)


def story(rng: random.Random, names: Sequence[str]) -> str:
    """One story about two of that name."""
    middles = rng.sample(MIDDLES, rng.randint(4, 7))
    lines = [rng.choice(OPENINGS), *middles, rng.choice(ENDINGS_OF_STORIES)]
    swapped = {"a": names[1], "b": names[0]}
    told = []
    for line in lines:
        who = {"a": names[0], "b": names[1]} if rng.random() < 0.5 else swapped
        told.append(_filled(line, who, rng))
    return " ".join(told)


def _filled(line: str, who: dict[str, str], rng: random.Random) -> str:
    parts = line.split("{")
    text = parts[0]
    for part in parts[1:]:
        slot, _, rest = part.partition("}")
        filled = who.get(slot) or rng.choice(SLOTS[slot].split("|"))
        text += (filled[0].upper() + filled[1:] if not text else filled) + rest
    return text


def two_names(rng: random.Random, made_up: float) -> list[str]:
    """Two different names to learn from: of the list or, with this chance each, put together."""
    found: list[str] = []
    while len(found) < 2:
        name = rng.choice(MADE_UP if rng.random() < made_up else NAMES)
        if name not in found:
            found.append(name)
    return found
