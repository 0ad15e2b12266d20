"""The command `riskfleet train`: a CSV file and a spec become a draft for the registry.

Promises: rows become events before anything is learned from them, so that a model reads in training what it will read
when it decides; what cannot be an event is counted and left out. Writes one file.
"""

from __future__ import annotations

import csv
import hashlib
from pathlib import Path
from typing import Annotated, Any

import orjson
import typer
from pydantic import Field, ValidationError

from contracts.events import Event, parse_event, pointers_of
from contracts.failures import DomainValidationError, RiskfleetError
from contracts.state import SubjectHistory
from deploy.printing import console, print_fields, print_json
from governance.registry import Draft
from workers.judgement.content import Content
from workers.offline.train import Example, ExtraMissingError, Trained, TrainingSpec, train


class LabelSpec(Content):
    """Which column says what became of a row, and which of its values are bad."""

    column: str
    bad: Annotated[tuple[str, ...], Field(min_length=1)]


class RowSpec(Content):
    """How a row becomes an event: fields from columns (`amount.value: Amount`), and what is the same in every row."""

    columns: dict[str, str]
    constants: dict[str, Any] = Field(default_factory=dict)
    missing: tuple[str, ...] = ("", "NA")


class FileSpec(Content):
    """A spec file: the draft's words, the rows, and the training."""

    name: str
    owner: str
    purpose: str
    use_tag: str
    limitations: str
    reason: str
    label: LabelSpec
    event: RowSpec
    training: TrainingSpec


def attach(app: typer.Typer) -> None:
    """Add the command."""
    app.command("train")(train_model)


def train_model(
    data: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="CSV with a header line.")],
    spec: Annotated[Path, typer.Option("--spec", exists=True, dir_okay=False, help="What to train, as YAML.")],
    out: Annotated[Path, typer.Option("--out", help="Where the draft for 'riskfleet registry register' goes.")] = Path(
        "model.json"
    ),
    seed: Annotated[int | None, typer.Option(min=0, help="Default: the spec's.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """Train a scorecard or trees; exit 1 when a factor has no words, since the registry would refuse that model."""
    told = read_spec(spec)
    if seed is not None:
        told = told.model_copy(update={"training": told.training.model_copy(update={"seed": seed})})
    content = data.read_bytes()
    examples, refused = read_examples(content, told)
    trained = train(examples, told.training, hashlib.sha256(content).hexdigest())
    out.write_bytes(orjson.dumps(draft_of(told, trained, refused), option=orjson.OPT_INDENT_2))
    held = trained.evidence["held_out"]
    found = {"file": str(out), "refused_rows": refused, "seed": told.training.seed, **trained.evidence}
    if as_json:
        print_json(found | {"missing_words": trained.missing_words})
    else:
        shown = {name: value for name, value in found.items() if name != "held_out"}
        print_fields(shown | {name: value for name, value in held.items() if not isinstance(value, list | dict)})
        console.print("\n".join(trained.missing_words), style="red", highlight=False)
    raise typer.Exit(1 if trained.missing_words else 0)


def read_spec(file: Path) -> FileSpec:
    """A spec. Raises DomainValidationError that names the wrong places, ExtraMissingError without a YAML reader."""
    try:
        import yaml
    except ModuleNotFoundError:
        raise ExtraMissingError(ExtraMissingError.__doc__ or "") from None
    try:
        return FileSpec.model_validate(yaml.safe_load(file.read_text()))
    except yaml.YAMLError:
        raise DomainValidationError(f"{file} is not YAML") from None
    except ValidationError as error:
        places = "; ".join(f"{pointer} {reason}" for pointer, reason in pointers_of(error))
        raise DomainValidationError(f"{file} is no spec: {places}") from None


def read_examples(content: bytes, spec: FileSpec) -> tuple[list[Example], int]:
    """The rows as events, in their order, and how many could not be one. Raises DomainValidationError for no column."""
    table = csv.DictReader(content.decode("utf-8-sig").splitlines())
    wanted = {spec.label.column, *spec.event.columns.values()}
    absent = sorted(wanted - set(table.fieldnames or ()))
    if absent:
        raise DomainValidationError(f"the file has no column {absent[0]!r}")
    named = {each.feature for each in spec.training.inputs if each.categories is not None}
    examples, refused = [], 0
    for number, row in enumerate(table, start=1):
        label = row[spec.label.column]
        try:
            if label in spec.event.missing:
                raise DomainValidationError("the row has no label")
            event = _event(row, number, spec.event, named)
        except RiskfleetError:
            refused += 1
            continue
        examples.append(Example(event, SubjectHistory(), int(label in spec.label.bad)))
    return examples, refused


def _event(row: dict[str, str], number: int, spec: RowSpec, named: set[str]) -> Event:
    document: dict[str, Any] = {
        "occurred_at": "2026-01-01T00:00:00Z",
        "subject": {"type": "row", "id": str(number)},
        **{name: dict(value) if isinstance(value, dict) else value for name, value in spec.constants.items()},
    }
    for field, column in spec.columns.items():
        cell = row[column]
        if cell in spec.missing:
            continue
        *parents, leaf = field.split(".", 1)
        target = document
        for parent in parents:
            target = target.setdefault(parent, {})
        number_wanted = field == "risk_score" or (field.startswith("attributes.") and field not in named)
        target[leaf] = _number(cell) if number_wanted else cell
    return parse_event(document)


def _number(cell: str) -> float | str:
    try:
        return float(cell)
    except ValueError:
        return cell


def draft_of(spec: FileSpec, trained: Trained, refused: int) -> dict[str, Any]:
    """The draft as `riskfleet registry register` takes it. Raises DomainValidationError when its words do not do."""
    words = spec.model_dump(include={"name", "owner", "purpose", "use_tag", "limitations", "reason"})
    draft = {
        "kind": "model",
        **words,
        "content": trained.content,
        "evidence": trained.evidence | {"refused_rows": refused},
    }
    try:
        Draft.model_validate(draft)
    except ValidationError as error:
        places = "; ".join(f"{pointer} {reason}" for pointer, reason in pointers_of(error))
        raise DomainValidationError(f"the draft would be refused: {places}") from None
    return draft
