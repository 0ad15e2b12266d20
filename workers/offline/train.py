"""Training: from labelled events to a model's document, with the evidence that its approval is asked with.

A scorecard is logistic regression over weights of evidence (Siddiqi, 2006), its bins cut by a small decision tree per
input; trees are LightGBM's. Both read events by the functions that score them, so training and serving cannot differ.
Metrics are of rows that the judged model was not fitted on: the last quarter by time, or folds; the document itself is
fitted on all rows, and calibrated on the raw sums of the held-out ones (Platt).

Promises: the same rows, spec and seed give the same document. An absent value never lowers a scorecard's score. Writes
no file and signs nothing: the registry signs what somebody else approves.
"""

from __future__ import annotations

import hashlib
import importlib
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal

from pydantic import Field

from contracts.events import Event, canonical_json
from contracts.failures import DomainValidationError, RiskfleetError
from contracts.ports import Artifact
from contracts.state import Pin, SubjectHistory
from workers.judgement.content import Content
from workers.judgement.models import coverage, load_model, raw_of
from workers.judgement.models_calibration import Platt
from workers.judgement.models_inputs import UNKNOWN, Input, UnreadableInputError, is_number, name_of, read_value
from workers.judgement.models_trees import encoded
from workers.offline.lightgbm_text import parse_booster

SMOOTHING: Final = 5.0
"""Average rows that every bin has besides its own: a small bin says little."""

_LATE_SHARE: Final = 0.25
_MIN_ROWS: Final = 50


class ExtraMissingError(RiskfleetError):
    """Training needs the extra `train`: pip install 'riskfleet[train]'."""


class TreesSpec(Content):
    """LightGBM's parameters."""

    rounds: Annotated[int, Field(ge=1, le=1_000)] = 150
    leaves: Annotated[int, Field(ge=2, le=255)] = 15
    learning_rate: Annotated[float, Field(gt=0, le=1)] = 0.05
    min_rows: Annotated[int, Field(ge=1)] = 20
    column_share: Annotated[float, Field(gt=0, le=1)] = 0.8
    row_share: Annotated[float, Field(gt=0, le=1)] = 0.8
    l2: Annotated[float, Field(ge=0)] = 1.0
    single_names: Annotated[int, Field(ge=1, le=1_024)] = 4
    """Inputs of at most this many categories are split one name against the rest."""


class ScorecardSpec(Content):
    """How fine the bins are, and how strongly coefficients are held down (1 / C of logistic regression)."""

    bins: Annotated[int, Field(ge=2, le=32)] = 6
    min_share: Annotated[float, Field(gt=0, le=0.5)] = 0.04
    penalty: Annotated[float, Field(gt=0)] = 1.0


class TrainingSpec(Content):
    """What to train. `split`: "time" judges on the last quarter by `occurred_at`, "folds" on each of `folds` parts."""

    method: Literal["scorecard", "trees"]
    inputs: Annotated[tuple[Input, ...], Field(min_length=1, max_length=256)]
    split: Literal["time", "folds"] = "folds"
    folds: Annotated[int, Field(ge=2, le=20)] = 5
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 1
    trees: TreesSpec = TreesSpec()
    scorecard: ScorecardSpec = ScorecardSpec()


@dataclass(frozen=True, slots=True)
class Example:
    """An event with what became of it (1 = bad)."""

    event: Event
    history: SubjectHistory
    bad: int


@dataclass(frozen=True, slots=True)
class Trained:
    """A document, its evidence, and the sentences that would keep it from being submitted."""

    content: dict[str, Any]
    evidence: dict[str, Any]
    missing_words: tuple[str, ...]


Rows = list[list[float | None]]
Fit = Callable[[Sequence[int]], dict[str, Any]]


def train(examples: Sequence[Example], spec: TrainingSpec, digest: str) -> Trained:
    """Train. `digest`: SHA-256 of the data, for the evidence. Raises DomainValidationError when the rows do not do."""
    numpy = _extra("numpy")
    inputs = tuple(_with_categories(each, examples) for each in spec.inputs)
    usable, rows = _read(examples, inputs)
    bad = numpy.array([each.bad for each in usable])
    if len(usable) < _MIN_ROWS or not 0 < bad.sum() < len(usable):
        raise DomainValidationError(f"training needs {_MIN_ROWS} readable rows and both outcomes among them")

    def fit(places: Sequence[int]) -> dict[str, Any]:
        some, labels = [rows[place] for place in places], bad[list(places)]
        return (_fit_card if spec.method == "scorecard" else _fit_trees)(some, labels, inputs, spec)

    parts = _parts(usable, bad, spec)
    raws: dict[int, float] = {}
    for fitted, held_out in parts:
        raw = _raw(fit(fitted), usable)
        raws |= {place: raw(place) for place in held_out}
    places = sorted(raws)
    calibration = _platt([raws[place] for place in places], bad[places])
    content = fit(range(len(usable))) | {"calibration": calibration}
    artifact = Artifact("model", Pin(name="trained", version=0, digest=_digest(content)), content)
    load_model(artifact)
    evidence: dict[str, Any] = {
        "data_sha256": digest,
        "rows": len(examples),
        "unreadable_rows": len(examples) - len(usable),
        "bad_share": round(float(bad.mean()), 6),
        "method": spec.method,
        "seed": spec.seed,
        "split": "fitted on the first three quarters by time" if spec.split == "time" else f"{len(parts)} folds",
        "held_out": _metrics([usable[place] for place in places], [raws[place] for place in places], calibration),
    }
    if len(parts) > 1:
        evidence["held_out"] |= _by_fold(parts, raws, bad)
    return Trained(content, evidence, coverage(artifact))


def _extra(module: str) -> Any:
    """A library of the extra. Raises ExtraMissingError that names it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0]:
            raise  # it is there, and something that it needs is not
        raise ExtraMissingError(ExtraMissingError.__doc__ or "") from None


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(canonical_json(dict(content))).hexdigest()


def _with_categories(each: Input, examples: Sequence[Example]) -> Input:
    """An input with names gets all that occur at least twice, by name, unless the spec lists them."""
    if each.categories is not None or each.per is not None:
        return each
    values = [name_of(read_value(each.feature, None, one.event, one.history)) for one in examples]
    counted = Counter(value for value in values if isinstance(value, str))
    if not counted or any(is_number(value) for value in values):
        return each
    names = sorted(name for name, count in counted.items() if count > 1)
    return each.model_copy(update={"categories": tuple(names[:1_024]), "unknown": "missing"})


def _read(examples: Sequence[Example], inputs: Sequence[Input]) -> tuple[list[Example], Rows]:
    """The rows that can be read, as scoring reads them."""
    usable, rows = [], []
    for one in examples:
        try:
            rows.append([encoded(each, one.event, one.history) for each in inputs])
            usable.append(one)
        except UnreadableInputError:
            continue
    return usable, rows


def _parts(usable: Sequence[Example], bad: Any, spec: TrainingSpec) -> list[tuple[list[int], list[int]]]:
    """(fitted, held out) of each part."""
    if spec.split == "time":
        order = sorted(range(len(usable)), key=lambda place: usable[place].event.occurred)
        cut = round(len(order) * (1 - _LATE_SHARE))
        return [(order[:cut], order[cut:])]
    selection = _extra("sklearn.model_selection")
    folds = selection.StratifiedKFold(spec.folds, shuffle=True, random_state=spec.seed)
    return [(fitted.tolist(), held.tolist()) for fitted, held in folds.split(bad.reshape(-1, 1), bad)]


def _raw(content: Mapping[str, Any], usable: Sequence[Example]) -> Callable[[int], float]:
    """Raw sums by the document, read by what reads it when it decides."""
    model = load_model(Artifact("model", Pin(name="part", version=0, digest=_digest(content)), content))
    return lambda place: raw_of(model, usable[place].event, usable[place].history)


def _platt(raws: Sequence[float], bad: Any) -> dict[str, Any]:
    linear, numpy = _extra("sklearn.linear_model"), _extra("numpy")
    curve = linear.LogisticRegression(C=1e6, max_iter=1_000).fit(numpy.array(raws).reshape(-1, 1), bad)
    slope = float(curve.coef_[0, 0])
    if slope <= 0:
        raise DomainValidationError("the inputs tell nothing about the outcome: held-out rows are ranked no better")
    return {"method": "platt", "a": round(slope, 9), "b": round(float(curve.intercept_[0]), 9)}


# --- trees ------------------------------------------------------------------------------------------


def _fit_trees(rows: Rows, bad: Any, inputs: Sequence[Input], spec: TrainingSpec) -> dict[str, Any]:
    numpy, lightgbm = _extra("numpy"), _extra("lightgbm")
    table = numpy.array([[math.nan if value is None else value for value in row] for row in rows])
    parameters = {
        "objective": "binary",
        "num_leaves": spec.trees.leaves,
        "learning_rate": spec.trees.learning_rate,
        "min_data_in_leaf": spec.trees.min_rows,
        "feature_fraction": spec.trees.column_share,
        "bagging_fraction": spec.trees.row_share,
        "bagging_freq": 1,
        "lambda_l2": spec.trees.l2,
        "max_cat_to_onehot": spec.trees.single_names,
        "seed": spec.seed,
        "num_threads": 1,
        "deterministic": True,
        "force_row_wise": True,
        "verbosity": -1,
    }
    named = [place for place, each in enumerate(inputs) if each.categories is not None]
    names = [f"i{place}" for place in range(len(inputs))]
    data = lightgbm.Dataset(table, bad, categorical_feature=named, feature_name=names)
    learned = parse_booster(lightgbm.train(parameters, data, spec.trees.rounds).model_to_string())
    return {
        "type": "trees",
        "inputs": [each.model_dump(exclude_none=True) for each in inputs],
        "trees": list(learned.trees),
        "sigmoid": learned.sigmoid,
        "average": learned.average,
        "calibration": {"method": "platt", "a": 1.0, "b": 0.0},
    }


# --- scorecards -------------------------------------------------------------------------------------


def _fit_card(rows: Rows, bad: Any, inputs: Sequence[Input], spec: TrainingSpec) -> dict[str, Any]:
    numpy, linear = _extra("numpy"), _extra("sklearn.linear_model")
    columns = [_Column(each, [row[n] for row in rows], bad, spec.scorecard) for n, each in enumerate(inputs)]
    kept = [column for column in columns if len(column.weights) > 1]
    while kept:
        table = numpy.array([column.weighed for column in kept]).T
        fitted = linear.LogisticRegression(C=1 / spec.scorecard.penalty, max_iter=1_000).fit(table, bad)
        positive = [column for column, c in zip(kept, fitted.coef_[0], strict=True) if c > 0]
        if len(positive) == len(kept):
            factors = [column.factor(float(c)) for column, c in zip(kept, fitted.coef_[0], strict=True)]
            base = round(float(fitted.intercept_[0]), 6)
            curve = {"method": "platt", "a": 1.0, "b": 0.0}
            return {"type": "scorecard", "base": base, "factors": factors, "calibration": curve}
        kept = positive  # an input that helps only by another's error is left out
    raise DomainValidationError("no input tells anything about the outcome")


class _Column:
    """One input in bins, each with its weight of evidence: log odds of bad there over those of all rows."""

    def __init__(self, each: Input, values: Sequence[float | None], bad: Any, spec: ScorecardSpec) -> None:
        self.input = each
        self.limits = [] if each.categories is not None else _limits(values, bad, spec)
        bins = [self._bin(value) for value in values]
        counts: dict[int | None, list[int]] = defaultdict(lambda: [0, 0])
        for place, label in zip(bins, bad.tolist(), strict=True):
            counts[place][label] += 1
        share = float(bad.mean())
        self.weights = {place: _evidence(good, evil, share) for place, (good, evil) in counts.items()}
        # Not knowing never helps: an applicant who leaves a field out is no better than the average one.
        self.weights[None] = max(self.weights.get(None, 0.0), 0.0)
        self.weighed = [self.weights[place] for place in bins]

    def _bin(self, value: float | None) -> int | None:
        if value is None or (self.input.categories is not None and value == UNKNOWN):
            return None
        if self.input.categories is not None:
            return int(value)
        return sum(value >= limit for limit in self.limits)

    def factor(self, coefficient: float) -> dict[str, Any]:
        """The line of the card."""

        def points(place: int | None) -> dict[str, Any]:
            number = round(coefficient * self.weights.get(place, 0.0), 6)
            words = {"code": self.input.code, "text": self.input.text} if number > 0 else {}
            return {"points": number} | {name: word for name, word in words.items() if word is not None}

        line: dict[str, Any] = {"feature": self.input.feature, "missing": points(None)}
        if self.input.per is not None:
            line["per"] = self.input.per
        if self.input.categories is not None:
            named = enumerate(self.input.categories[:256])
            return line | {"values": {name: points(place) for place, name in named}}
        bins = [{"below": limit} | points(place) for place, limit in enumerate(self.limits)]
        return line | {"bins": [*bins, points(len(self.limits))]}


def _limits(values: Sequence[float | None], bad: Any, spec: ScorecardSpec) -> list[float]:
    """Where a small decision tree of this input alone cuts."""
    tree, numpy = _extra("sklearn.tree"), _extra("numpy")
    known = [place for place, value in enumerate(values) if value is not None]
    least = max(2, round(spec.min_share * len(values)))
    if len(known) < 2 * least:
        return []
    cutter = tree.DecisionTreeClassifier(
        max_leaf_nodes=spec.bins, min_samples_leaf=least, criterion="entropy", random_state=0
    )
    cutter.fit(numpy.array([[values[place]] for place in known]), bad[known])
    return sorted(
        {
            float(f"{at:.9g}")
            for at, left in zip(cutter.tree_.threshold, cutter.tree_.children_left, strict=True)
            if left >= 0
        }
    )


def _evidence(good: int, bad: int, share: float) -> float:
    smoothed = (bad + SMOOTHING * share) / (good + SMOOTHING * (1 - share))
    return math.log(smoothed * (1 - share) / share)


# --- metrics ----------------------------------------------------------------------------------------


def _metrics(rows: Sequence[Example], raws: Sequence[float], calibration: Mapping[str, Any]) -> dict[str, Any]:
    numpy, metrics = _extra("numpy"), _extra("sklearn.metrics")
    curve = Platt.model_validate(dict(calibration))
    probable = numpy.array([curve.score(raw) / 100 for raw in raws])
    bad = numpy.array([row.bad for row in rows])
    fpr, tpr, _ = metrics.roc_curve(bad, raws)
    return {
        "rows": len(rows),
        "auc": round(float(metrics.roc_auc_score(bad, raws)), 4),
        "ks": round(float((tpr - fpr).max()), 4),
        "ap": round(float(metrics.average_precision_score(bad, raws)), 4),
        "brier": round(float(metrics.brier_score_loss(bad, probable)), 4),
        "recall_top_1_percent": _top_recall(bad, numpy.array(raws)),
        "calibration": _table(probable, bad),
        "by_month": _by_month(rows, probable, bad),
    }


def _top_recall(bad: Any, raws: Any) -> float:
    top = (-raws).argsort(kind="stable")[: max(1, len(raws) // 100)]
    return round(float(bad[top].sum() / bad.sum()), 4)


def _by_fold(parts: Sequence[tuple[list[int], list[int]]], raws: Mapping[int, float], bad: Any) -> dict[str, Any]:
    metrics = _extra("sklearn.metrics")
    aucs, distances = [], []
    for _, held in parts:
        fpr, tpr, _ = metrics.roc_curve(bad[held], [raws[place] for place in held])
        aucs.append(float(metrics.auc(fpr, tpr)))
        distances.append(float((tpr - fpr).max()))
    return {
        "auc_mean_of_folds": round(math.fsum(aucs) / len(aucs), 4),
        "ks_mean_of_folds": round(math.fsum(distances) / len(distances), 4),
    }


def _table(probable: Any, bad: Any) -> list[dict[str, Any]]:
    """By tenths of the score: how many, how probable, how many were bad."""
    numpy = _extra("numpy")
    parts = numpy.array_split(numpy.argsort(probable, kind="stable"), min(10, len(bad)))
    return [
        {"rows": len(p), "predicted": round(float(probable[p].mean()), 4), "bad_share": round(float(bad[p].mean()), 4)}
        for p in parts
    ]


def _by_month(rows: Sequence[Example], probable: Any, bad: Any) -> dict[str, dict[str, Any]]:
    """Per month of `occurred_at`: how many, the mean prediction, how many were bad, and the AUC where it exists."""
    metrics = _extra("sklearn.metrics")
    months: dict[str, list[int]] = defaultdict(list)
    for place, row in enumerate(rows):
        months[row.event.occurred_at[:7]].append(place)
    found: dict[str, dict[str, Any]] = {}
    for month, places in sorted(months.items())[:36]:
        predicted, share = round(float(probable[places].mean()), 4), round(float(bad[places].mean()), 4)
        found[month] = {"rows": len(places), "predicted": predicted, "bad_share": share}
        if 0 < bad[places].sum() < len(places):
            found[month]["auc"] = round(float(metrics.roc_auc_score(bad[places], probable[places])), 4)
    return found
