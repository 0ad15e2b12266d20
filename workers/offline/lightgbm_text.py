"""Trees out of LightGBM's own text format (`Booster.save_model`), without LightGBM.

Promises: thresholds and leaf values keep every digit; what the trees of a model document cannot say (linear leaves,
several classes, other objectives than a probability) is refused. Learns nothing.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from contracts.failures import InvalidModelStateError

_HIGHEST = sys.float_info.max
"""Stands for a threshold of infinity, which separates nothing but NaN from numbers; JSON has no infinity."""
_OBJECTIVES = ("binary", "cross_entropy")


@dataclass(frozen=True, slots=True)
class LearnedTrees:
    """What a text says: the trees of a document, in the order of boosting, and how their sum is read."""

    trees: tuple[dict[str, Any], ...]
    features: tuple[str, ...]
    sigmoid: float
    average: bool


def parse_booster(text: str) -> LearnedTrees:
    """Read a model. Raises InvalidModelStateError that says what it has that a document cannot have."""
    head, *blocks = text.split("\nTree=")
    header = _fields(head)
    if header.get("num_class", "1") != "1" or header.get("num_tree_per_iteration", "1") != "1":
        raise InvalidModelStateError("the model has several classes; a document has one")
    name, _, rest = header.get("objective", "binary").partition(" ")
    if name not in _OBJECTIVES:
        raise InvalidModelStateError(f"the objective {name[:64]!r} gives no probability; train with 'binary'")
    sigmoid = dict(part.partition(":")[::2] for part in rest.split()).get("sigmoid", "1")
    if not blocks:
        raise InvalidModelStateError("the model has no trees")
    try:
        trees = tuple(_tree(_fields("Tree=" + block.split("\nend of trees", 1)[0])) for block in blocks)
        return LearnedTrees(
            trees, tuple(header.get("feature_names", "").split()), float(sigmoid), "average_output" in head.split("\n")
        )
    except (KeyError, ValueError, IndexError):
        raise InvalidModelStateError("the text is no model of LightGBM, or of a release that writes another") from None


def _fields(block: str) -> dict[str, str]:
    return dict(line.partition("=")[::2] for line in block.split("\n") if "=" in line)


def _tree(fields: Mapping[str, str]) -> dict[str, Any]:
    if fields.get("is_linear", "0") != "0":
        raise InvalidModelStateError("the model has linear leaves; train without linear_tree")
    leaves = _floats(fields["leaf_value"])
    if len(leaves) == 1:
        return {"split": [], "at": [], "rule": [], "left": [], "right": [], "node": [], "leaf": leaves}
    rules = _ints(fields["decision_type"])
    at = [min(max(each, -_HIGHEST), _HIGHEST) for each in _floats(fields["threshold"])]
    left, right = _ints(fields["left_child"]), _ints(fields["right_child"])
    tree: dict[str, Any] = {
        "split": _ints(fields["split_feature"]),
        "at": at,
        "rule": rules,
        "left": left,
        "right": right,
        "node": _expected(left, right, leaves, _ints(fields["leaf_count"])),
        "leaf": leaves,
    }
    sets = list(_sets(fields))
    return tree | {"sets": sets} if sets else tree


def _sets(fields: Mapping[str, str]) -> Iterator[list[int]]:
    if int(fields.get("num_cat", "0")):
        bounds, words = _ints(fields["cat_boundaries"]), _ints(fields["cat_threshold"])
        for first, last in pairwise(bounds):
            yield words[first:last]


def _expected(left: Sequence[int], right: Sequence[int], leaves: Sequence[float], counts: Sequence[int]) -> list[float]:
    """The mean of the leaves below each node, by how much training data reached them; seven digits are plenty."""
    order, waiting = [], [0]
    while waiting:
        node = waiting.pop()
        order.append(node)
        if len(order) > len(left):
            raise ValueError("a node is its own ancestor")
        waiting += [child for child in (left[node], right[node]) if child >= 0]
    weight, mean = {}, {}
    for number, (value, count) in enumerate(zip(leaves, counts, strict=True)):
        weight[-number - 1], mean[-number - 1] = max(count, 1), value
    for node in reversed(order):
        sides = (left[node], right[node])
        weight[node] = sum(weight[side] for side in sides)
        mean[node] = math.fsum(weight[side] * mean[side] for side in sides) / weight[node]
    return [float(f"{mean[node]:.7g}") for node in range(len(left))]


def _ints(text: str) -> list[int]:
    return [int(part) for part in text.split()]


def _floats(text: str) -> list[float]:
    return [float(part) for part in text.split()]
