"""Whose seconds a method is given at equal time, so that the pairs of a comparison have trained for one time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

__all__ = ["check_time_references", "time_references"]


def time_references(firsts: Mapping[str, str]) -> dict[str, str]:
    """The method whose seconds each method is given at equal time.

    That is the first of its `against`, or of the recipe's, which may be itself. A method whose seconds another is given
    is never trained again: its own seconds are its own too. Of methods that are each the other's first, the one that
    stands first in the recipe is the reference.

    Args:
        firsts: the first of the `against` of each method, or the method itself where it has none, in recipe's order.
    """
    own = dict(firsts)
    for name in own:
        met, current = set(), own[name]
        while current != name and current not in met:
            met.add(current)
            current = own[current]
        if current == name:
            own[name] = name
    references = {first for name, first in own.items() if first != name}
    return {name: name if name in references else first for name, first in own.items()}


def check_time_references(references: Mapping[str, str], pairs: Mapping[str, Sequence[str]]) -> None:
    """Raise ValueError where the seconds of a method are asked for that is not among those to run, or where methods are
    paired and no two of a pair would have trained for one time.

    Args:
        references: what `time_references` gives, of the methods to run.
        pairs: for each of them those that it is paired with at equal steps.
    """
    for name, reference in references.items():
        if reference not in references:
            raise ValueError(
                f"Equal time needs the runs of {reference!r}, whose seconds {name!r} is given: add it to --methods."
            )
    paired = [(name, other) for name, others in pairs.items() for other in others]
    if paired and all(references[name] != references[other] for name, other in paired):
        name, other = paired[0]
        raise ValueError(
            f"At equal time no two of these methods are compared ({name!r} is given the seconds of "
            f"{references[name]!r}, and {other!r} those of {references[other]!r}): give them the same first method in "
            "`against`, or leave out --budget seconds."
        )
