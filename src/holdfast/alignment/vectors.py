"""The attack vectors that a defender keeps: those of the last rounds, each with the member of the pool that made it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from holdfast.alignment.pool import Member
from holdfast.parameters import ParameterVector

BY_HAND = Member("a vector set by hand")
"""What stands for a vector that no attack made."""


class AttackVectors:
    """Attack vectors in force, the newest last; each is one buffer of the trained parameters' size.

    Attributes:
        by_hand: Whether a vector was set by hand, which then is the only one.
    """

    def __init__(self) -> None:
        self.by_hand = False
        self._kept: list[tuple[str, ParameterVector]] = []

    @property
    def newest(self) -> ParameterVector | None:
        """The vector that came in force last."""
        return self._kept[-1][1] if self._kept else None

    def made_by(self) -> set[str]:
        """The names of the members that have vectors here."""
        return {name for name, _ in self._kept}

    def of(self, member: Member) -> list[ParameterVector]:
        """Those of a member, the oldest first."""
        return [vector for name, vector in self._kept if name == member.name]

    def make_room(self, member: Member) -> None:
        """Forget what the next one of a member takes the place of: its memory is the new attack's."""
        own = self.of(member)
        self._kept = [(name, vector) for name, vector in self._kept if name not in (member.name, BY_HAND.name)]
        self._kept += [(member.name, vector) for vector in own[max(len(own) - member.rounds + 1, 0) :]]
        self.by_hand = False

    def add(self, member: Member, vector: ParameterVector) -> None:
        """Put a vector in force."""
        self._kept.append((member.name, vector))

    def set_by_hand(self, vector: ParameterVector | None) -> None:
        """Put one in force in the place of all, or none."""
        self._kept = [] if vector is None else [(BY_HAND.name, vector)]
        self.by_hand = vector is not None

    def state(self) -> dict[str, Any]:
        """What a checkpoint has to hold of them."""
        return {
            **{f"attack_vector_{number}": vector for number, (_, vector) in enumerate(self._kept)},
            "attack_vectors_of": [name for name, _ in self._kept],
            "attack_vector_set_by_hand": self.by_hand,
        }

    def load(self, state: Mapping[str, Any], members: Iterable[Member]) -> None:
        """Take up what `state` gave, of what these members keep: a run may go on with another pool."""
        rounds = {member.name: member.rounds for member in (BY_HAND, *members)}
        names = state["attack_vectors_of"]
        self._kept = [
            (name, state[f"attack_vector_{number}"])
            for number, name in enumerate(names)
            if names[number:].count(name) <= rounds.get(name, 0)
        ]
        self.by_hand = state["attack_vector_set_by_hand"]
