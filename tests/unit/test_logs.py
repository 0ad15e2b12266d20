"""What a process logs: fields that are allowed, and of libraries no text at all."""

from __future__ import annotations

import json
import logging

from deploy.logs import LibraryLine


def test_a_librarys_line_says_where_and_which_error_and_never_its_text() -> None:
    logger = logging.getLogger("some.library")
    try:
        raise ValueError("card 4111111111111111")
    except ValueError as error:
        info = (ValueError, error, error.__traceback__)
        record = logger.makeRecord(logger.name, logging.ERROR, "a.py", 7, "body %s", ("secret",), info, "send")
    text = LibraryLine("ingress").format(record)
    line = json.loads(text)
    assert (line["event"], line["level"], line["role"]) == ("some.library", "error", "ingress")
    assert line["exception_class"] == "ValueError"
    assert line["error_detail"].startswith("test_logs.py:")
    assert line["timestamp"].endswith("Z")
    assert [found for found in ("4111", "secret", "\n") if found in text] == []


def test_a_librarys_line_without_an_error_says_where_it_was_written() -> None:
    record = logging.getLogger("some.library").makeRecord("some.library", 40, "a.py", 7, "x", (), None, "send")
    assert json.loads(LibraryLine("ingress").format(record))["error_detail"] == "a.py:7:send"
