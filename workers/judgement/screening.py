"""Names against a sanctions list that the operator loads (CSV layout of OFAC's SDN list, aliases in a file of its own).

A list is registered, approved and activated as a version of kind `lists`: `content_of` makes its content of the
publisher's files, and `load_names` reads it back.

Promises: one name costs a bounded number of comparisons; the same list and name give the same answer, ties by place on
the list. Blocking: every word of a name leads to the entries that have it, or a word one edit away (words are indexed
with each letter left out, after Garbe's symmetric deletion); rare words count more, and the best `_COMPARED` entries
are compared whole, as written without spaces and with their words sorted, by normalised optimal string alignment. Does
not transliterate, and does not know which alias is weak. A hit is a question for a person, never a proof.
"""

from __future__ import annotations

import csv
import hashlib
import heapq
import math
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import Field
from rapidfuzz import process
from rapidfuzz.distance import OSA

from contracts.failures import InvalidModelStateError
from contracts.ports import Artifact
from workers.judgement.content import Content, ContentKey, key_of, read

SIMILAR: Final = 0.87
"""Similarity (0–1) from which two names are taken for one."""

_SHORTEST: Final = 4
_COMPARED: Final = 16
_MAX_POSTINGS: Final = 200
_BREAK: Final = re.compile(r"[\W_]+")  # our own pattern, linear
_MAX_NAME: Final = 256
_MAX_ENTRIES: Final = 200_000
_NULL: Final = "-0-"


@dataclass(frozen=True, slots=True)
class Listed:
    """A name on the list: the number of its entry, the name as written, and whether it is an alias."""

    number: str
    name: str
    alias: bool


@dataclass(frozen=True, slots=True)
class Hit:
    """The most similar name on the list, and how similar it is (0–1)."""

    listed: Listed
    similarity: float


@dataclass(frozen=True, slots=True)
class SanctionsList:
    """A list ready to be asked; `digest` is SHA-256 (hex) over numbers and names in order."""

    digest: str
    names: Sequence[Listed]
    joined: Sequence[str]
    ordered: Sequence[str]
    exact: Mapping[str, int]
    words: Mapping[str, tuple[int, ...]]
    near: Mapping[str, tuple[str, ...]]


def read_names(names: Path, aliases: Path | None = None) -> Sequence[Listed]:
    """The names of the list's two files. Raises InvalidModelStateError that names the file and line."""
    return (*_rows(names, 1, alias=False), *(_rows(aliases, 3, alias=True) if aliases is not None else ()))


def _rows(path: Path, column: int, *, alias: bool) -> Iterator[Listed]:
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        for line, row in enumerate(csv.reader(file), 1):
            if len(row) == 1 and row[0].strip("\x1a \t") == "":
                continue  # the end mark of the publisher's files
            if len(row) <= column or not row[0].strip().isdecimal():
                raise InvalidModelStateError(f"{path.name} line {line} is not a row of a sanctions list")
            name = row[column].strip()
            if name and name != _NULL:
                yield Listed(row[0].strip(), name, alias)


class NamesContent(Content):
    """The content of `lists` of type `names`: (number of the entry, name as written, whether it is an alias)."""

    type: Literal["names"]
    source: Annotated[str, Field(min_length=1, max_length=512)]
    entries: Annotated[
        tuple[tuple[Annotated[str, Field(max_length=32)], Annotated[str, Field(max_length=512)], bool], ...],
        Field(min_length=1, max_length=_MAX_ENTRIES),
    ]


def content_of(names: Sequence[Listed], source: str) -> dict[str, Any]:
    """The content of a version that holds these names; `source` says where they are from, and as of when."""
    return {"type": "names", "source": source, "entries": [[each.number, each.name, each.alias] for each in names]}


def load_names(artifact: Artifact) -> SanctionsList:
    """The list of an artifact, indexed once per digest. Raises InvalidModelStateError when it is not one."""
    return _load(key_of(artifact))


@lru_cache(maxsize=4)  # tens of megabytes each
def _load(key: ContentKey) -> SanctionsList:
    return index_names([Listed(*entry) for entry in read(NamesContent, key).entries])


def index_names(names: Sequence[Listed]) -> SanctionsList:
    """Index names. Raises InvalidModelStateError for an empty list, or one longer than is compared in time."""
    kept = [(each, words) for each in names if (words := fold(each.name))]
    if not 0 < len(kept) <= _MAX_ENTRIES:
        raise InvalidModelStateError(f"a sanctions list has 1 to {_MAX_ENTRIES:,} names")
    blocks: dict[str, list[int]] = {}
    near: dict[str, list[str]] = {}
    exact: dict[str, int] = {}
    for place, (_, words) in enumerate(kept):
        exact.setdefault(_sorted(words), place)
        for block in set(_blocks(words)):
            blocks.setdefault(block, []).append(place)
    for word in dict.fromkeys(word for _, words in kept for word in words):
        for shorter in {word, *_shorter(word)}:
            near.setdefault(shorter, []).append(word)
    digest = hashlib.sha256("\n".join(f"{each.number}|{each.name}" for each, _ in kept).encode()).hexdigest()
    return SanctionsList(
        digest,
        tuple(each for each, _ in kept),
        tuple("".join(words) for _, words in kept),
        tuple(_sorted(words) for _, words in kept),
        exact,
        {block: tuple(places) for block, places in blocks.items()},
        {shorter: tuple(words) for shorter, words in near.items()},
    )


def screen(listed: SanctionsList, name: str, similar: float = SIMILAR) -> Hit | None:
    """The most similar name from `similar` on, or None. Raises ValueError for a name longer than 256 characters."""
    if len(name) > _MAX_NAME:
        raise ValueError("a name longer than 256 characters is not screened")
    words = fold(name)
    if not words:
        return None
    ordered = _sorted(words)
    place = listed.exact.get(ordered)
    if place is not None:
        return Hit(listed.names[place], 1.0)
    places = _candidates(listed, words)
    joined = "".join(words)
    # One edit of a short name is below any share that would be right for long ones.
    least = min(similar, 1 - 1.5 / len(joined)) if len(joined) >= _SHORTEST else similar
    best: Hit | None = None
    for wanted, forms in ((joined, listed.joined), (ordered, listed.ordered)):
        found = process.extractOne(
            wanted, [forms[place] for place in places], scorer=OSA.normalized_similarity, score_cutoff=least
        )
        if found is not None and (best is None or found[1] > best.similarity):
            best = Hit(listed.names[places[found[2]]], found[1])
            if len(words) == 1:
                break
    return best


def fold(name: str) -> tuple[str, ...]:
    """The words of a name without marks, case and punctuation."""
    plain = name.casefold().replace("'", "").replace("`", "")
    if not plain.isascii():
        decomposed = unicodedata.normalize("NFKD", plain)
        plain = "".join(letter for letter in decomposed if not unicodedata.combining(letter))
    return tuple(_BREAK.sub(" ", plain).split())


def _sorted(words: Sequence[str]) -> str:
    return " ".join(sorted(words))


def _candidates(listed: SanctionsList, words: Sequence[str]) -> Sequence[int]:
    """Entries that share words, or words one edit away, with the name: the most telling first."""
    found: dict[str, float] = {}
    for block in _blocks(words):
        if block in listed.words:
            found[block] = 1.0
    for word in words:
        if word not in listed.words or len(words) == 1:
            near = {other for shorter in (word, *_shorter(word)) for other in listed.near.get(shorter, ())}
            for other in near.difference(found):
                if (
                    OSA.distance(word, other, score_cutoff=1) <= 1
                ):  # two words may lose the same letters and differ by two
                    found[other] = 0.7
    total = len(listed.names)
    rarest = sorted(found, key=lambda block: (len(listed.words[block]), block))
    weight: dict[int, float] = {}
    seen = 0
    for block in rarest:
        places = listed.words[block]
        if seen and seen + len(places) > _MAX_POSTINGS:
            break
        seen += len(places)
        gain = math.log(total / len(places)) * found[block]
        for place in places:
            weight[place] = weight.get(place, 0.0) + gain
    return heapq.nlargest(_COMPARED, weight, key=lambda place: (weight[place], -place))


def _blocks(words: Sequence[str]) -> Iterator[str]:
    """The words, and each two neighbours written as one: a space is lost as easily as a letter."""
    yield from words
    for first, second in pairwise(words):
        yield first + second
        if second < first:
            yield second + first


def _shorter(word: str) -> Iterator[str]:
    if len(word) > 2:
        yield from (word[:place] + word[place + 1 :] for place in range(min(len(word), 24)))
