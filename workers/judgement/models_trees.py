"""Gradient-boosted trees as data: what LightGBM has learned, evaluated exactly as LightGBM does, without it.

A node sends a value left when it is not above the threshold `at`, or when its category is in the set `at` (bits of
32-bit words); `rule` is LightGBM's decision type: 1 = category, 2 = a missing value goes left, 4 = zero is missing,
8 = NaN is missing. An absent value is NaN. Children below zero are leaves: −1 is leaf 0, −2 is leaf 1.

Method: all trees at once by bit sets (Lucchese et al., "QuickScorer", SIGIR 2015), whole numbers being the sets: each
input strikes out the leaves that its value cannot reach, and the leftmost leaf that is left is a tree's answer. What
each input contributed is read off the path to that leaf (Saabas, "Interpreting random forests", 2014): the change of
the expected value at a split belongs to the split's input, so contributions and the expected value add up to the raw
sum. Saabas favours splits near the leaves: it describes the path that was taken and is not a Shapley value.

Promises: work per event does not depend on what the event holds; a document with cycles, lost nodes or absurd sizes
is refused with a sentence that names the tree.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import getitem
from struct import Struct
from typing import Annotated, Final, Literal, Self

from pydantic import Field, model_validator

from contracts.events import Event
from contracts.state import SubjectHistory
from contracts.velocity import Velocity
from workers.judgement.content import Content
from workers.judgement.models_calibration import Calibration, logistic
from workers.judgement.models_inputs import UNKNOWN, Input, UnreadableInputError, is_number, name_of, read_value

MAX_INPUTS: Final = 256
MAX_TREES: Final = 1_000
MAX_LEAVES: Final = 255
MAX_ALL_LEAVES: Final = 32_768
GROUP_LEAVES: Final = 4_096
"""Leaves whose bit sets are kept together: memory grows with its product with the number of thresholds."""

ZERO: Final = 1.0000000180025095e-35
"""What LightGBM takes for zero: its 1e-35 is a single-precision number."""

_CATEGORY, _LEFT, _ZERO, _NAN = 1, 2, 4, 8
_UNIT: Final = 2.0**30
_RAW_UNIT: Final = 2.0**50
"""Leaves are added as whole numbers: the raw value in 128 bits, then what each input contributed, in 64 bits each.
1,000 trees of at most 2·10⁶ fit, and the sum has the same bits on every machine whatever the order."""
_HALF: Final = 1 << 63
_HALF_RAW: Final = 1 << 127

Child = Annotated[int, Field(ge=-MAX_LEAVES, le=MAX_LEAVES)]
Word = Annotated[int, Field(ge=0, lt=2**32)]
Raw = Annotated[float, Field(ge=-1e6, le=1e6)]
_Nodes = Field(max_length=MAX_LEAVES)


class Tree(Content):
    """One tree, node by node. `node` is the expected raw value at each node, for contributions only."""

    split: Annotated[tuple[Annotated[int, Field(ge=0, lt=MAX_INPUTS)], ...], _Nodes]
    at: Annotated[tuple[float, ...], _Nodes]
    rule: Annotated[tuple[Annotated[int, Field(ge=0, lt=16)], ...], _Nodes]
    left: Annotated[tuple[Child, ...], _Nodes]
    right: Annotated[tuple[Child, ...], _Nodes]
    node: Annotated[tuple[Raw, ...], _Nodes]
    leaf: Annotated[tuple[Raw, ...], Field(min_length=1, max_length=MAX_LEAVES)]
    sets: Annotated[tuple[Annotated[tuple[Word, ...], Field(max_length=64)], ...], _Nodes] = ()

    @model_validator(mode="after")
    def _fits(self) -> Self:
        nodes = len(self.leaf) - 1
        if {len(each) for each in (self.split, self.at, self.rule, self.left, self.right, self.node)} != {nodes}:
            raise ValueError("a tree has one node fewer than leaves, and every list of nodes is as long")
        seen = [child for pair in zip(self.left, self.right, strict=True) for child in pair]
        if sorted(seen) != [*range(-len(self.leaf), 0), *range(1, nodes)] and nodes:
            raise ValueError("every node but the first, and every leaf, has exactly one parent")
        if sum(1 for _ in self.reached()) != nodes:
            raise ValueError("a node is its own ancestor")
        for rule, at in zip(self.rule, self.at, strict=True):
            if rule & (_ZERO | _NAN) == _ZERO | _NAN:
                raise ValueError("a node takes either zero or NaN for missing")
            if rule & _CATEGORY and at not in range(len(self.sets)):
                raise ValueError("a node names a set of categories that is not there")
        return self

    def reached(self) -> Iterator[int]:
        """The nodes from the first one on, parents before children."""
        waiting = [0] if self.split else []
        while waiting:
            node = waiting.pop()
            yield node
            waiting += [child for child in (self.left[node], self.right[node]) if child >= 0]


class Trees(Content):
    """The content of a model of type `trees`.

    `average`: the raw sum is divided by the number of trees (random forests). `sigmoid`: the probability is
    1 / (1 + exp(−sigmoid · raw)).
    """

    type: Literal["trees"]
    inputs: Annotated[tuple[Input, ...], Field(min_length=1, max_length=MAX_INPUTS)]
    trees: Annotated[tuple[Tree, ...], Field(min_length=1, max_length=MAX_TREES)]
    average: bool = False
    sigmoid: Annotated[float, Field(gt=0, le=1e3)] = 1.0
    calibration: Calibration

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if len({each.label for each in self.inputs}) != len(self.inputs):
            raise ValueError("reads an input twice")
        if sum(len(tree.leaf) for tree in self.trees) > MAX_ALL_LEAVES:
            raise ValueError(f"the trees have more than {MAX_ALL_LEAVES:,} leaves together")
        for number, tree in enumerate(self.trees):
            for split, rule in zip(tree.split, tree.rule, strict=True):
                if split >= len(self.inputs):
                    raise ValueError(f"tree {number} splits by an input that the model does not have")
                if bool(rule & _CATEGORY) != (self.inputs[split].categories is not None):
                    raise ValueError(f"tree {number} splits {self.inputs[split].label} as what it is not")
        return self


Values = Sequence[float | None]
"""One per input: a number, or the place of a category (UNKNOWN for a name that is none); None when absent."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A raw sum, the value that was expected before anything was known, and what each input added to that."""

    raw: float
    expected: float
    contributions: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class _Numbers:
    """Bit sets of one numeric input: by how many thresholds lie below the value; absent; zero where that is missing."""

    index: int
    thresholds: tuple[float, ...]
    masks: tuple[int, ...]
    zeros: Mapping[int, int] | None
    absent: int


@dataclass(frozen=True, slots=True)
class _Names:
    """Bit sets of one input with categories; whatever is in no set goes right everywhere."""

    index: int
    masks: Mapping[float | None, int]
    otherwise: int


Exit = int | bytes
"""A leaf as its bit; trees of more than 64 leaves have it as bytes."""


@dataclass(frozen=True, slots=True)
class _Group:
    """Trees whose leaves share one bit set; a tree's leaves begin at a byte. Tables are keyed by a leaf's bit."""

    alive: int
    ones: int
    size: int
    unpack: Callable[[bytes], tuple[Exit, ...]]
    numbers: tuple[_Numbers, ...]
    names: tuple[_Names, ...]
    leaves: tuple[Mapping[Exit, int], ...]

    def total(self, values: Values) -> int:
        """What the leaf of each tree gives, packed, added up."""
        alive = self.alive
        for each in self.numbers:
            value = values[each.index]
            if value is None:
                alive &= each.absent
            elif each.zeros is not None and -ZERO <= value <= ZERO:
                alive &= each.zeros[bisect_left(each.thresholds, value)]
            else:
                alive &= each.masks[bisect_left(each.thresholds, value)]
        for named in self.names:
            alive &= named.masks.get(values[named.index], named.otherwise)
        # The leftmost leaf of every tree at once: each tree has one left, so nothing is borrowed between trees.
        exits = self.unpack((alive & ~(alive - self.ones)).to_bytes(self.size, "little"))
        return sum(map(getitem, self.leaves, exits))


class Forest:
    """Trees ready to be asked."""

    def __init__(self, content: Trees) -> None:
        self.content = content
        self._share = 1.0 / len(content.trees) if content.average else 1.0
        fields = Struct(f"<{len(content.inputs) + 2}Q")
        self._unpack, self._unpack_size = fields.unpack, fields.size
        self._offset = _HALF_RAW + sum(_HALF << 64 * (index + 2) for index in range(len(content.inputs)))
        self._groups = tuple(_grouped(group) for group in _split(content.trees))
        self._expected = math.fsum(tree.node[0] if tree.node else tree.leaf[0] for tree in content.trees) * self._share

    def values(self, event: Event, history: SubjectHistory, velocity: Velocity | None = None) -> list[float | None]:
        """What the inputs are for an event. Raises UnreadableInputError for a value of the wrong type or an unknown
        name where the input refuses those: such an event has no score, rather than a good one.
        """
        return [encoded(each, event, history, velocity) for each in self.content.inputs]

    def raw(self, values: Values) -> float:
        """The raw sum, as `Booster.predict(raw_score=True)` has it."""
        return self.answer(values).raw

    def probability(self, raw: float) -> float:
        """The probability of a raw sum, as `Booster.predict` has it. Not calibrated: `score` is."""
        return logistic(self.content.sigmoid * raw)

    def answer(self, values: Values) -> Answer:
        """The raw sum with what each input contributed to it, to a millionth."""
        total = self._offset + sum([group.total(values) for group in self._groups])
        low, high, *fields = self._unpack(total.to_bytes(self._unpack_size, "little"))
        raw = (low + (high << 64) - _HALF_RAW) / _RAW_UNIT * self._share
        share = self._share / _UNIT
        return Answer(raw, self._expected, tuple([(each - _HALF) * share for each in fields]))

    def score(self, raw: float) -> float:
        """0–100, by the stored calibration."""
        return self.content.calibration.score(raw)


def encoded(each: Input, event: Event, history: SubjectHistory, velocity: Velocity | None = None) -> float | None:
    """What an input is for an event, as a number. Raises UnreadableInputError as `Forest.values` does."""
    value = read_value(each.feature, each.per, event, history, velocity)
    if value is None:
        return None
    if each.categories is None:
        if isinstance(value, bool):
            return float(value)
        if not is_number(value):
            raise UnreadableInputError(f"{each.label} is not a number")
        return float(value)
    name = name_of(value)
    if isinstance(name, str) and name in each.categories:
        return each.categories.index(name)
    if each.unknown == "refuse" or not isinstance(name, str):
        raise UnreadableInputError(f"{each.label} is none of the model's categories")
    return UNKNOWN


def _split(trees: Sequence[Tree]) -> Iterator[list[Tree]]:
    group: list[Tree] = []
    leaves = 0
    for tree in trees:
        if group and leaves + len(tree.leaf) > GROUP_LEAVES:
            yield group
            group, leaves = [], 0
        group.append(tree)
        leaves += len(tree.leaf)
    yield group


@dataclass(frozen=True, slots=True)
class _Strike:
    """What a node that sends a value right rules out: the leaves below its left child."""

    rule: int
    at: float
    categories: frozenset[int]
    leaves: int

    def right(self, value: float | None) -> bool:
        """The node's own rule, for one value (None is NaN)."""
        if value is None:
            if self.rule & _NAN:
                return not self.rule & _LEFT
            value = 0.0
        if self.rule & _ZERO and -ZERO <= value <= ZERO:
            return not self.rule & _LEFT
        return not value <= self.at


def _grouped(trees: Sequence[Tree]) -> _Group:
    strikes: dict[int, list[_Strike]] = {}
    leaves = []
    alive, ones, place = 0, 0, 0
    widths = [_width(len(tree.leaf)) for tree in trees]
    for tree, width in zip(trees, widths, strict=True):
        order, paths = _walk(tree)
        bit = {leaf: 1 << number for number, leaf in enumerate(order)}
        leaves.append({_key(bit[leaf], width): _packed(tree.leaf[leaf], paths[leaf]) for leaf in order})
        for node, below in _left_leaves(tree).items():
            ruled_out = sum(bit[leaf] for leaf in below) << place
            strikes.setdefault(tree.split[node], []).append(_strike(tree, node, ruled_out))
        alive |= ((1 << len(order)) - 1) << place
        ones |= 1 << place
        place += 8 * width
    numbers, names = [], []
    for index, nodes in sorted(strikes.items()):
        if nodes[0].rule & _CATEGORY:
            names.append(_names(index, nodes))
        else:
            numbers.append(_numbers(index, nodes))
    unpack = Struct("<" + "".join(_CODES.get(width, f"{width}s") for width in widths)).unpack
    return _Group(alive, ones, place // 8, unpack, tuple(numbers), tuple(names), tuple(leaves))


def _strike(tree: Tree, node: int, ruled_out: int) -> _Strike:
    categories: frozenset[int] = frozenset()
    if tree.rule[node] & _CATEGORY:
        words = tree.sets[int(tree.at[node])]
        categories = frozenset(32 * n + bit for n, word in enumerate(words) for bit in range(32) if word >> bit & 1)
    return _Strike(tree.rule[node], tree.at[node], categories, ruled_out)


def _walk(tree: Tree) -> tuple[list[int], dict[int, dict[int, float]]]:
    """The leaves from left to right, and per leaf what each input on its path contributes."""
    order: list[int] = []
    paths: dict[int, dict[int, float]] = {}
    root = 0 if tree.split else -1
    waiting: list[tuple[int, dict[int, float], float]] = [(root, {}, tree.node[0] if tree.node else tree.leaf[0])]
    while waiting:
        place, gained, expected = waiting.pop()
        if place < 0:
            order.append(-place - 1)
            paths[-place - 1] = gained
            continue
        split = tree.split[place]
        for child in (tree.right[place], tree.left[place]):  # the left one is taken from the stack first
            value = tree.node[child] if child >= 0 else tree.leaf[-child - 1]
            more = gained | {split: gained.get(split, 0.0) + value - expected}
            waiting.append((child, more, value))
    return order, paths


_CODES: Final = {1: "B", 2: "H", 4: "I", 8: "Q"}


def _width(leaves: int) -> int:
    """Bytes of a tree's leaves."""
    return next((width for width in _CODES if leaves <= 8 * width), (leaves + 7) // 8)


def _key(bit: int, width: int) -> Exit:
    return bit if width in _CODES else bit.to_bytes(width, "little")


def _packed(raw: float, gained: Mapping[int, float]) -> int:
    """Signed fields in one number: they may borrow from each other, and the offset at the end evens that out."""
    return round(raw * _RAW_UNIT) + sum(round(gain * _UNIT) << 64 * (index + 2) for index, gain in gained.items())


def _left_leaves(tree: Tree) -> dict[int, list[int]]:
    """Per node the leaves below its left child."""
    below: dict[int, list[int]] = {}
    for node in reversed(list(tree.reached())):
        sides = [below[child] if child >= 0 else [-child - 1] for child in (tree.left[node], tree.right[node])]
        below[node] = [*sides[0], *sides[1]]
    return {
        node: below[tree.left[node]] if tree.left[node] >= 0 else [-tree.left[node] - 1] for node in range(len(below))
    }


def _numbers(index: int, nodes: Sequence[_Strike]) -> _Numbers:
    thresholds = tuple(sorted({node.at for node in nodes}))
    ruled_out: dict[float, int] = {}
    for node in nodes:
        ruled_out[node.at] = ruled_out.get(node.at, 0) | node.leaves
    masks, struck = [-1], 0
    for threshold in thresholds:
        struck |= ruled_out[threshold]
        masks.append(~struck)
    zeros: dict[int, int] | None = None
    if any(node.rule & _ZERO for node in nodes):
        zeros = {}
        for value in (-ZERO, 0.0, ZERO, *(each for each in thresholds if -ZERO <= each <= ZERO)):
            for near in (value, min(ZERO, math.nextafter(value, 1.0))):
                zeros[bisect_left(thresholds, near)] = _mask(nodes, near)
    return _Numbers(index, thresholds, tuple(masks), zeros, _mask(nodes, None))


def _mask(nodes: Sequence[_Strike], value: float | None) -> int:
    struck = 0
    for node in nodes:
        if node.right(value):
            struck |= node.leaves
    return ~struck


def _names(index: int, nodes: Sequence[_Strike]) -> _Names:
    everywhere = 0
    for node in nodes:
        everywhere |= node.leaves
    masks: dict[float | None, int] = {}
    for category in frozenset().union(*(node.categories for node in nodes)):
        struck = 0
        for node in nodes:
            if category not in node.categories:
                struck |= node.leaves
        masks[category] = ~struck
    return _Names(index, masks, ~everywhere)
