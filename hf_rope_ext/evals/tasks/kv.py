"""Key-value retrieval from JSON (Liu et al., 2023, Lost in the Middle, arXiv:2307.03172)."""

import json
import random
import uuid
from dataclasses import dataclass

from hf_rope_ext.evals.tasks.base import DepthTask, Draft, Place


@dataclass(frozen=True, kw_only=True)
class KeyValue(DepthTask):
    """The value of one key in a JSON object of random UUIDs (unit: a pair)."""

    smallest = 1

    max_new_tokens: int = 64

    def draft(self, draw: random.Random, size: int, place: Place) -> Draft:
        """Return an object of ``size`` pairs and a question about the pair at the depth."""
        pairs = [(draw_uuid(draw), draw_uuid(draw)) for _ in range(size)]
        position = round((place.depth or 0.0) * (size - 1))
        key, value = pairs[position]
        data = json.dumps(dict(pairs)).replace('", "', '",\n "')
        return Draft(
            prompt=(
                "Below is a JSON object. Give the value that belongs to the key.\n\n"
                f'{data}\n\nKey: "{key}"'
            ),
            answer="\nValue:",
            target=f' "{value}"',
            gold=(value,),
            metadata={"position": position},
        )


def draw_uuid(draw: random.Random) -> str:
    """Return a random version 4 UUID."""
    return str(uuid.UUID(int=draw.getrandbits(128), version=4))
