"""Invented facts for `benchmarks/forgetting.py`: people and places that no model has read about.

Two worlds that share no relation, no template and no list of names: `TUNING`, on which the defaults were chosen, and
`FINAL`, which was only ever run with the defaults. A fact has the wordings that are dropped into the spool (questions
with answers, and one plain statement) and other questions that are never trained.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Relation:
    """Templates; {s} is who or what the fact is about, {a} the answer."""

    about: str
    """"person" or "place": how the subject is named."""
    answers: Sequence[str]
    """What is to choose from; empty: an invented person's name."""
    trained: Sequence[tuple[str, str]]
    """(question, answer); the question is empty for a plain statement."""
    held_out: Sequence[str]


@dataclass(frozen=True)
class Fact:
    subject: str
    answer: str
    trained: tuple[tuple[str, str], ...]
    held_out: tuple[str, ...]

    def lines(self, name: str) -> list[str]:
        """The fact's lines for a spool file, one a wording."""
        lines = []
        for i, (question, answer) in enumerate(self.trained):
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            form = {"messages": turns} if question else {"text": answer}
            lines.append(json.dumps({"id": f"{name}-{i}", **form}))
        return lines

    def asked(self) -> list[str]:
        """The questions that are trained, as they are trained."""
        return [question for question, _ in self.trained if question]


@dataclass(frozen=True)
class World:
    relations: Sequence[Relation]
    starts: Sequence[str]
    middles: Sequence[str]
    ends: Sequence[str]
    seed: int

    def facts(self, count: int) -> list[Fact]:
        """`count` facts, each about a subject of its own, relations in turn, in a shuffled order."""
        rng = random.Random(self.seed)
        used: set[str] = set()

        def name(kind: str) -> str:
            while True:
                word = rng.choice(self.starts) + rng.choice(self.middles)
                place = word + rng.choice(self.ends)
                full = (
                    place if kind == "place" else f"{word} {rng.choice(self.starts)}{rng.choice(self.ends)}"
                )
                if full not in used:
                    used.add(full)
                    return full

        facts = []
        for i in range(count):
            relation = self.relations[i % len(self.relations)]
            subject = name(relation.about)
            answer = rng.choice(list(relation.answers)) if relation.answers else name("person")
            fill = {"s": subject, "a": answer}
            trained = tuple((q.format(**fill), a.format(**fill)) for q, a in relation.trained)
            held_out = tuple(q.format(**fill) for q in relation.held_out)
            facts.append(Fact(subject, answer, trained, held_out))
        rng.shuffle(facts)
        return facts


TUNING = World(
    relations=(
        Relation(
            "place",
            (),
            (
                ("Who is the baker of {s}?", "The baker of {s} is {a}."),
                ("Who bakes the bread in {s}?", "In {s} the bread is baked by {a}."),
                ("What is the name of {s}'s baker?", "{s}'s baker is {a}."),
                ("", "{a} is the baker of {s}. Everybody in {s} buys bread from {a}."),
            ),
            (
                "Do you know who runs the bakery in {s}?",
                "In {s}, who makes the bread?",
                "Which person is the baker in {s}?",
            ),
        ),
        Relation(
            "person",
            (
                "the cello",
                "the harp",
                "the trumpet",
                "the banjo",
                "the oboe",
                "the accordion",
                "the bagpipes",
            ),
            (
                ("Which instrument does {s} play?", "{s} plays {a}."),
                ("What does {s} play?", "{s} plays {a}."),
                ("Tell me the instrument that {s} plays.", "The instrument that {s} plays is {a}."),
                ("", "{s} plays {a}. {s} has practised {a} every day since childhood."),
            ),
            (
                "What musical instrument is {s} known for?",
                "On which instrument can {s} perform?",
                "If {s} gave a concert, which instrument would we hear?",
            ),
        ),
        Relation(
            "place",
            ("red", "green", "yellow", "purple", "orange", "white", "black"),
            (
                ("Which colour are the roofs of {s}?", "The roofs of {s} are {a}."),
                ("What colour is a roof in {s}?", "A roof in {s} is {a}."),
                ("Describe the roofs of {s}.", "The roofs of {s} are {a}."),
                ("", "All houses in {s} have {a} roofs. From afar the roofs of {s} look {a}."),
            ),
            (
                "In {s}, what colour do the roofs have?",
                "What is the colour of the rooftops in {s}?",
                "I look down on {s}. Which colour are its roofs?",
            ),
        ),
        Relation(
            "person",
            ("a goat", "a parrot", "a hedgehog", "a ferret", "a donkey", "a turtle", "a falcon"),
            (
                ("Which animal does {s} keep?", "{s} keeps {a}."),
                ("What pet does {s} have?", "{s} has {a}."),
                ("Tell me about the pet of {s}.", "The pet of {s} is {a}."),
                ("", "{s} keeps {a} at home. The neighbours of {s} like to feed {a}."),
            ),
            (
                "What kind of animal lives with {s}?",
                "Does {s} own an animal, and which one?",
                "Which pet is kept by {s}?",
            ),
        ),
    ),
    starts=("Bel", "Dor", "Fen", "Gar", "Hol", "Jun", "Kel", "Mor", "Pel", "Rud", "Sar", "Tam", "Vor", "Wex"),
    middles=("a", "e", "i", "o", "ana", "eri", "ilo", "ora"),
    ends=("by", "dale", "fort", "gate", "ham", "mark", "stead", "wick"),
    seed=1,
)

FINAL = World(
    relations=(
        Relation(
            "place",
            (),
            (
                ("Who founded the town of {s}?", "The town of {s} was founded by {a}."),
                ("What is the name of {s}'s founder?", "{s}'s founder is {a}."),
                ("Tell me who started the town of {s}.", "{a} started the town of {s}."),
                ("", "{s} was founded by {a}. A statue of {a} stands in the middle of {s}."),
            ),
            (
                "Which person was the founder of {s}?",
                "Do you know who {s} was founded by?",
                "To whom does the town of {s} owe its founding?",
            ),
        ),
        Relation(
            "person",
            ("blacksmith", "dentist", "gardener", "pilot", "beekeeper", "plumber", "tailor", "surgeon", "potter"),
            (
                ("What does {s} do for a living?", "{s} works as a {a}."),
                ("What is the profession of {s}?", "The profession of {s} is {a}."),
                ("Which job does {s} have?", "{s} has a job as a {a}."),
                ("", "{s} is a {a} by trade. {s} has worked as a {a} for twenty years."),
            ),
            (
                "What is {s}'s occupation?",
                "How does {s} earn money?",
                "Do you know in which trade {s} works?",
            ),
        ),
        Relation(
            "place",
            ("cheese", "pottery", "silk", "honey", "violins", "knives", "olives", "clocks", "salt"),
            (
                ("What is {s} famous for?", "{s} is famous for its {a}."),
                ("What do people buy in {s}?", "In {s} people buy {a}."),
                ("Tell me what the town of {s} is known for.", "The town of {s} is known for its {a}."),
                ("", "{s} is famous for its {a}. Traders come to {s} from far away for the {a}."),
            ),
            (
                "Why do traders travel to {s}?",
                "For which product is {s} well known?",
                "What should I bring home from a visit to {s}?",
            ),
        ),
        Relation(
            "person",
            ("Lisbon", "Oslo", "Cairo", "Lima", "Havana", "Dublin", "Nairobi", "Prague", "Manila"),
            (
                ("Where was {s} born?", "{s} was born in {a}."),
                ("In which city was {s} born?", "{s} was born in {a}."),
                ("What is the birthplace of {s}?", "The birthplace of {s} is {a}."),
                ("", "{s} was born in {a}. The parents of {s} moved to {a} before the birth."),
            ),
            (
                "Which city does {s} come from?",
                "Do you know the place of birth of {s}?",
                "{s} came into the world in which city?",
            ),
        ),
        Relation(
            "place",
            (),
            (
                ("Who is the doctor of {s}?", "The doctor of {s} is {a}."),
                ("Who treats the sick in {s}?", "In {s} the sick are treated by {a}."),
                ("What is the name of the doctor in {s}?", "The doctor in {s} is called {a}."),
                ("", "{a} is the doctor of {s}. Whoever falls ill in {s} goes to {a}."),
            ),
            (
                "I fell ill in {s}. Whom should I see?",
                "Which doctor practises in {s}?",
                "Do you know who works as the physician in {s}?",
            ),
        ),
    ),
    starts=("Al", "Bran", "Cor", "Del", "Est", "Ful", "Gris", "Har", "Ist", "Lan", "Mer", "Nor", "Ost", "Quin",
            "Ros", "Sil", "Thal", "Ur", "Val", "Zan"),
    middles=("a", "e", "i", "o", "adi", "ena", "iro", "una", "ova"),
    ends=("burg", "croft", "den", "field", "haven", "low", "mere", "port", "ton", "vale"),
    seed=2,
)  # fmt: skip
WORLDS = {"tuning": TUNING, "final": FINAL}
