"""Signals of prompt injection: text that speaks to a language model instead of about its subject.

Promises: linear time (RE2), bounded work, and no word of the text in the answer: only the names of signals. Each signal
has a weight; `strength` is 1 − Π(1 − weight), so that weak signals add up and none counts twice. Looks through
full-width letters, invisible characters and up to eight runs of base64 or hex. It is a filter and not a proof: what
keeps an outcome safe is that a model's answer can only ever raise the risk.
"""

from __future__ import annotations

import base64
import binascii
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import re2

DEFAULT_LIMIT: Final = 0.5
"""Strength from which text is taken for an attack."""

_MAX_RUNS: Final = 8
_READABLE: Final = 0.9
_GAP: Final = r"(?:\W+\w+){0,4}\W+"
_RULES: Final = (
    r"(?:instructions?|rules?|prompts?|guidelines?|polic(?:y|ies)|restrictions?|anweisungen|regeln|istruzioni|regole"
    r"|instrucciones|reglas|consignes|règles)"
)
_SIGNALS: Final[tuple[tuple[str, float, Any], ...]] = tuple(
    (name, weight, re2.compile("(?i)" + pattern))
    for name, weight, pattern in (
        (
            "override",
            0.8,
            (
                r"\b(?:ignor\w*|disregard|forget|override|bypass|oublie\w*|olvid\w*|vergiss|missachte|dimentica\w*)\b"
                rf"(?:{_GAP}|\W+){_RULES}\b"
            ),
        ),
        ("everything_before", 0.8, r"\b(?:ignore|disregard|forget)\W+(?:everything|all|anything)\b"),
        ("new_orders", 0.5, r"\b(?:new|updated|real|actual)\W+(?:system\W+)?(?:instructions?|prompt|orders)\W*:"),
        ("reveal_prompt", 0.8, rf"\b(?:reveal|print|show|repeat|output|leak){_GAP}(?:system|hidden)\W+prompt\b"),
        (
            "reveal_secrets",
            0.6,
            rf"\b(?:reveal|dump|exfiltrate|leak)\b{_GAP}(?:secrets?|credentials?|keys?|database)\b",
        ),
        (
            "persona",
            0.7,
            (
                r"\b(?:you\W+are\W+now|pretend\W+(?:to\W+be|you)|act\W+as)\b.{0,80}\b(?:no|un|without|any)\W*"
                r"(?:restrict\w*|rules|limits?|filter\w*|DAN\b)"
            ),
        ),
        (
            "unbound",
            0.7,
            (
                r"\b(?:no|without|free\W+of|ignore)\W+(?:any\W+|all\W+|content\W+)?(?:restrictions|filters?|"
                r"limitations|safety\W+(?:rules|policy|checks))\b"
            ),
        ),
        ("developer_mode", 0.8, r"\b(?:developer|debug|jailbreak|god|dan)\W+mode\b"),
        (
            "role_tag",
            0.8,
            (
                r"(?:<\|?\W*(?:system|assistant|im_start|im_end)\W*\|?>|\[/?(?:INST|SYS|system)\]|"
                r"(?:^|\n)\W*(?:###?\W*)?(?:system|assistant)\W{0,2}:)"
            ),
        ),
        ("thought_tag", 0.6, r"<\W*/?(?:think|thinking|reasoning|scratchpad)\W*>"),
        (
            "addresses_model",
            0.5,
            (
                r"\b(?:AI|LLM|language\W+model|assistant|chatbot|agents?)\b.{0,60}\b(?:must|should|"
                r"need\W+to|has\W+to|are\W+(?:required|instructed)\W+to)\b"
            ),
        ),
        (
            "send_out",
            0.5,
            (
                rf"\b(?:send|forward|e-?mail|post|upload){_GAP}(?:data|list|credentials|customers?|records|"
                r"summary|result)\b.{0,60}(?:https?://|\S+@\S+|\bexternal\b|\bwebhook\b)"
            ),
        ),
        (
            "dictates_verdict",
            0.7,
            (
                r"\b(?:approve|accept|score|rate|mark|classify)\b.{0,40}\b(?:this|it|me)\b.{0,40}\b"
                r"(?:as\W+(?:safe|low|approved|legitimate)|approved|risk\W+(?:of\W+)?(?:0|zero))\b"
            ),
        ),
    )
)
_RUN: Final[Any] = re2.compile(r"[A-Za-z0-9+/_-]{20,}={0,2}")


@dataclass(frozen=True, slots=True)
class Injection:
    """What speaks for an attack: names of signals, in order of the table, and their strength (0–1)."""

    signals: tuple[str, ...]
    strength: float


def look_for_injection(text: str) -> Injection:
    """The signals in a text, in what it hides and in what it encodes."""
    plain = unicodedata.normalize("NFKC", text)
    bare = "".join(letter for letter in plain if unicodedata.category(letter) != "Cf")
    views = [bare, *_decoded(bare)]
    hidden = "".join(chr(ord(letter) - 0xE0000) for letter in plain if 0xE0020 <= ord(letter) < 0xE007F)
    if hidden:
        views.append(hidden)
    found = [(name, weight) for name, weight, signal in _SIGNALS if any(signal.search(view) for view in views)]
    if hidden:
        found.append(("invisible_text", 0.8))
    rest = 1.0
    for _, weight in found:
        rest *= 1.0 - weight
    return Injection(tuple(name for name, _ in found), round(1.0 - rest, 4))


def _decoded(text: str) -> Iterator[str]:
    for number, run in enumerate(_RUN.finditer(text)):
        if number == _MAX_RUNS:
            return
        for decode in (_from_hex, _from_base64):
            raw = decode(run.group())
            said = raw.decode("utf-8", "ignore") if raw else ""
            if said and sum(letter.isalpha() or letter in " .,:'" for letter in said) >= _READABLE * len(raw):
                yield said


def _from_hex(run: str) -> bytes:
    try:
        return bytes.fromhex(run)
    except ValueError:
        return b""


def _from_base64(run: str) -> bytes:
    body = run.rstrip("=").replace("-", "+").replace("_", "/")
    try:
        return base64.b64decode(body + "=" * (-len(body) % 4), validate=True)
    except (binascii.Error, ValueError):
        return b""
