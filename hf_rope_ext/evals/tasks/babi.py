"""BABILong-style questions: bAbI facts, in order, in prose (arXiv:2406.10149, 1502.05698)."""

import random
from dataclasses import dataclass

from hf_rope_ext.checks import require_choice, require_integer
from hf_rope_ext.evals.tasks.base import DocumentTask, Draft, Place
from hf_rope_ext.evals.tasks.prose import sentences
from hf_rope_ext.evals.tasks.scorers import label_match

PEOPLE = ("Mary", "John", "Sandra", "Daniel")
ROOMS = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
THINGS = ("apple", "football", "milk")
GOES = ("went to", "moved to", "travelled to", "journeyed to")
TAKES = ("took", "picked up", "got", "grabbed")
EXAMPLES = {
    1: ("Sandra went to the garden.", "Where is Sandra?", "garden"),
    2: ("John took the milk. John moved to the office.", "Where is the milk?", "office"),
    3: (
        "Mary got the apple. Mary went to the hallway. Mary travelled to the kitchen.",
        "Where was the apple before the kitchen?",
        "hallway",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Babi(DocumentTask):
    """Where a person or thing is, or was before, from facts spread over prose (unit: a sentence).

    Args:
        facts: Number of facts needed for the answer: 1, 2 or 3 (bAbI tasks qa1 to qa3).
        steps: Total number of events.
        haystack: UTF-8 text file to spread the facts over; generated prose if empty.
    """

    max_new_tokens: int = 16
    facts: int = 1
    steps: int = 12
    haystack: str = ""

    def check(self) -> None:
        """Check the options."""
        require_choice("facts", self.facts, EXAMPLES)
        require_integer("steps", self.steps, 4)

    def draft(self, draw: random.Random, size: int, place: Place) -> Draft:
        """Return a story spread over ``size`` sentences of prose."""
        events, question, answer = tell(draw, self.facts, self.steps)
        text = sentences(size, self.haystack)
        places = sorted(draw.choices(range(size + 1), k=len(events)))
        for shift, (at, event) in enumerate(zip(places, events, strict=True)):
            text.insert(at + shift, event)
        story, asked, reply = EXAMPLES[self.facts]
        return Draft(
            prompt=(
                "A text tells where people go and what they carry; the rest of it does not matter. "
                "Answer the question with one word.\n\n"
                f"Text: {story}\nQuestion: {asked}\nAnswer: {reply}\n\n"
                f"Text: {' '.join(text)}\nQuestion: {question}"
            ),
            answer="\nAnswer:",
            target=f" {answer}",
            gold=(answer, *(room for room in ROOMS if room in question)),
            metadata={"question": question, "events": events},
        )

    def score(self, gold: tuple[str, ...], prediction: str) -> dict[str, float]:
        """Return 1 if the first sentence names the right room and no other.

        The other entries of ``gold`` are rooms that the question names; they are ignored.
        """
        return {"score": label_match(prediction, gold[0], ROOMS, gold[1:])}


def tell(draw: random.Random, facts: int, steps: int) -> tuple[list[str], str, str]:
    """Return events in order, a question about them, and its answer."""
    while True:
        story = _Story(draw)
        for _ in range(steps):
            story.step(with_things=facts > 1)
        answers = story.answers(facts)
        if answers:
            question, answer = draw.choice(answers)
            return story.events, question, answer


class _Story:
    """People who move and carry things, and the rooms that everything has been in."""

    def __init__(self, draw: random.Random) -> None:
        self.draw = draw
        self.events: list[str] = []
        self.room: dict[str, str] = {}
        self.holder: dict[str, str] = {}
        self.been: dict[str, list[str]] = {}

    def step(self, with_things: bool) -> None:
        draw = self.draw
        who = draw.choice(PEOPLE)
        free = [thing for thing in THINGS if thing not in self.holder]
        if with_things and who in self.room and free and draw.random() < 0.4:
            thing = draw.choice(free)
            # a thing starts where it is first taken, and stays where it is dropped
            places = self.been.setdefault(thing, [])
            if not places or places[-1] == self.room[who]:
                self.holder[thing] = who
                if not places:
                    places.append(self.room[who])
                self.events.append(f"{who} {draw.choice(TAKES)} the {thing}.")
                return
        held = [thing for thing, holder in self.holder.items() if holder == who]
        if held and draw.random() < 0.15:
            thing = draw.choice(held)
            del self.holder[thing]
            self.events.append(f"{who} dropped the {thing}.")
            return
        room = draw.choice([room for room in ROOMS if room != self.room.get(who)])
        self.room[who] = room
        for thing in held:
            self.been[thing].append(room)
        self.events.append(f"{who} {draw.choice(GOES)} the {room}.")

    def answers(self, facts: int) -> list[tuple[str, str]]:
        if facts == 1:
            return [(f"Where is {who}?", room) for who, room in self.room.items()]
        if facts == 2:
            return [
                (f"Where is the {thing}?", rooms[-1])
                for thing, rooms in self.been.items()
                if len(rooms) > 1
            ]
        return [
            (f"Where was the {thing} before the {rooms[-1]}?", rooms[-2])
            for thing, rooms in self.been.items()
            if len(rooms) > 2 and rooms.count(rooms[-1]) == 1
        ]
