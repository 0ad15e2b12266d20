"""Training: the same rows give the same document, which scores, explains itself, and can be registered."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import orjson
import pytest
from typer.testing import CliRunner

from contracts.failures import DomainValidationError
from deploy import cli
from deploy.cli import app
from deploy.cli_train import read_examples, read_spec
from governance.registry import Draft
from workers.offline import train as training
from workers.offline.train import ExtraMissingError

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
DATA, SPEC = EXAMPLES / "train-payments.csv", EXAMPLES / "train-payments.yaml"


def extra() -> None:
    """Skip where the extra is not installed, which says so."""
    for module in ("lightgbm", "sklearn"):
        pytest.importorskip(module, reason=f"NOT RUN: the extra `train` ({module}) is not installed")


@pytest.mark.parametrize("method", ["scorecard", "trees"])
@pytest.mark.parametrize("split", ["folds", "time"])
def test_the_example_trains_twice_to_the_same_draft(tmp_path: Path, method: str, split: str) -> None:
    extra()
    spec = tmp_path / "spec.yaml"
    spec.write_text(
        SPEC.read_text().replace("method: scorecard", f"method: {method}").replace("split: folds", f"split: {split}")
    )
    drafts = []
    for name in ("one.json", "two.json"):
        out = tmp_path / name
        result = CliRunner().invoke(app, ["train", str(DATA), "--spec", str(spec), "--out", str(out), "--json"])
        assert result.exit_code == 0, result.output
        drafts.append(out.read_bytes())
    assert drafts[0] == drafts[1]
    draft = Draft.model_validate(orjson.loads(drafts[0]))
    held = draft.evidence["held_out"]
    assert held["auc"] > 0.65
    assert {"ks", "ap", "brier", "calibration", "by_month"} <= held.keys()
    assert len(draft.evidence["data_sha256"]) == 64


def test_a_factor_without_words_is_told_and_the_exit_code_says_so(tmp_path: Path) -> None:
    extra()
    spec = tmp_path / "spec.yaml"
    spec.write_text(SPEC.read_text().replace(", code: AMOUNT, text: The amount is unusual", ""))
    arguments = ["train", str(DATA), "--spec", str(spec), "--out", str(tmp_path / "m.json"), "--json"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1
    assert orjson.loads(result.output)["missing_words"] == ["amount.value has no reason code"]


def test_without_the_extra_the_error_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name.partition(".")[0])

    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(ExtraMissingError, match=r"riskfleet\[train\]"):
        training._extra("lightgbm")


def test_rows_become_events_and_a_row_that_is_none_is_counted() -> None:
    spec = read_spec(SPEC)
    header = "month,id,amount,channel,attempts,country_match,outcome\n"
    rows = "2026-01-01T12:00:00Z,c,9.5,web,2,,paid\nsoon,c,9.5,web,2,,paid\n2026-01-01T12:00:00Z,c,9.5,web,2,no,\n"
    examples, refused = read_examples((header + rows).encode(), spec)
    assert refused == 2
    assert [(one.bad, one.event.attributes) for one in examples] == [(0, {"channel": "web", "attempts": 2.0})]
    with pytest.raises(DomainValidationError, match="no column 'outcome'"):
        read_examples(b"month,id,amount,channel,attempts,country_match\n", spec)


def test_a_spec_with_wrong_fields_is_told_where(tmp_path: Path) -> None:
    spec = tmp_path / "spec.yaml"
    spec.write_text(
        SPEC.read_text()
        .replace("method: scorecard", "method: magic")
        .replace("amount.value, code", "subject.name, code")
    )
    with pytest.raises(DomainValidationError, match=r"/training/method.*/training/inputs/0"):
        read_spec(spec)


def test_the_command_line_prints_the_name_of_the_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def lacks_it() -> None:
        raise ExtraMissingError(ExtraMissingError.__doc__ or "")

    monkeypatch.setattr(cli, "app", lacks_it)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    assert "riskfleet[train]" in capsys.readouterr().err
