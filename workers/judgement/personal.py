"""Personal identifiers in free text: payment cards, IBANs, phone numbers, e-mail addresses, national ids.

Promises: linear time (RE2 finds candidates, check digits and number plans confirm them), positions in characters, and
no two hits over one place. A card is 12 to 19 digits with a known prefix and a right check digit (ISO/IEC 7812); an
IBAN passes ISO 13616; a phone number is of a length that the plan of its own or of a named region allows. Does not
find names or addresses, numbers written in words, or national ids of countries that are not in `_NATIONAL`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final, Literal, get_args

import re2

PersonalKind = Literal["card", "iban", "email", "national_id", "phone"]
PERSONAL_KINDS: Final[tuple[PersonalKind, ...]] = get_args(PersonalKind)
"""In order of precedence: a run of digits that is a good card number is no phone number."""

PHONE_REGIONS: Final = ("US", "GB", "DE", "FR", "CH", "AU", "DK", "BR")
"""Number plans that a number without a country code is tried with."""

_EMAIL: Final[Any] = re2.compile(r"[A-Za-z0-9._%+-]{1,64}@(?:[A-Za-z0-9-]{1,63}\.){1,8}[A-Za-z]{2,24}\b")
_IBAN: Final[Any] = re2.compile(r"(?i)\b[A-Z]{2}[0-9]{2}(?:[ -]?[A-Z0-9]{4}){2,7}(?:[ -]?[A-Z0-9]{1,3})?\b")
_CARD: Final[Any] = re2.compile(r"[0-9](?:[ -]?[0-9]){11,18}")
_NATIONAL_ID: Final[Any] = re2.compile(
    r"\b(?:[0-9]{3}-[0-9]{2}-[0-9]{4}|[0-9]{3}\.[0-9]{3}\.[0-9]{3}-[0-9]{2}|[XYZxyz0-9][0-9]{7}-?[A-Za-z]"
    r"|[A-Za-z]{6}[0-9]{2}[A-Za-z][0-9]{2}[A-Za-z][0-9]{3}[A-Za-z])\b"
)
_PHONE: Final[Any] = re2.compile(
    r"(?:\+|\b00)?\(?\+?[0-9]{1,5}\)?(?:[ .-]{0,2}(?:\([0-9]{1,4}\)|[0-9]{1,12})){0,6}(?:\s?(?:x|ext\.?)\s?[0-9]{1,6})?"
)
_DATED: Final[Any] = re2.compile(r"(?:19|20)[0-9]{2}[-./][01]?[0-9][-./][0-3]?[0-9]\b")
_DATE_OR_CODE: Final[Any] = re2.compile(
    r"[0-9]{1,2}[-./ ][0-9]{1,2}[-./ ](?:19|20)[0-9]{2}|[0-9]{5}-[0-9]{4}|(?:19|20)[0-9]{2} ?- ?(?:19|20)[0-9]{2}"
    r"|[0-9]{1,3}(?:\.[0-9]{1,3}){3}"
)
_TWO_GROUPS: Final[Any] = re2.compile(r"[0-9]+ [0-9]+")
_CALLED: Final[Any] = re2.compile(r"(?i)\b(?:phone|tel|telephone|mobile|cell|fax|call|desk|number)\b")
_OTHER_NUMBER: Final[Any] = re2.compile(
    r"(?i)\b(?:zip|post ?code|licen[cs]e|account|order|invoice|passport|reference)\b"
)
_CARD_PREFIXES: Final[tuple[tuple[tuple[str, ...], tuple[int, ...]], ...]] = (
    (("4",), (13, 16, 19)),
    (("34", "37"), (15,)),
    (("30", "36", "38", "39"), (14, 16)),
    (("35",), (16,)),
    (("2131", "1800"), (15,)),
    (tuple(str(n) for n in range(51, 56)) + tuple(str(n) for n in range(22, 28)), (16,)),
    (("60", "64", "65", "62"), (16, 19)),
    (("50", "56", "57", "58", "63", "67"), (12, 13, 14, 15, 16, 17, 18, 19)),
)


@dataclass(frozen=True, slots=True)
class Found:
    """One identifier: what it is, and where it stands (characters, end excluded)."""

    kind: PersonalKind
    start: int
    end: int


def find_personal(
    text: str, kinds: Sequence[PersonalKind] = PERSONAL_KINDS, regions: Sequence[str] = PHONE_REGIONS
) -> tuple[Found, ...]:
    """Every identifier of these kinds, by position. What is found as one kind is not looked at as a later one."""
    if not any(letter.isdigit() for letter in text) and "@" not in text:
        return ()
    taken: list[Found] = []
    for kind in PERSONAL_KINDS:
        for start, end in _CANDIDATES[kind](text, tuple(regions)) if kind != "phone" or "phone" in kinds else ():
            if all(end <= other.start or start >= other.end for other in taken):
                taken.append(Found(kind, start, end))
    return tuple(sorted((each for each in taken if each.kind in kinds), key=lambda each: each.start))


def prepare(regions: Sequence[str] = PHONE_REGIONS) -> None:
    """Load the number plans now (a tenth of a second), not inside the first check that is timed."""
    find_personal("4111 1111 1111 1111, GB82 WEST 1234 5698 7654 32, 536-90-4399 and 044 668 18 00", regions=regions)


def _emails(text: str, _: tuple[str, ...]) -> Iterator[tuple[int, int]]:
    return (found.span() for found in _EMAIL.finditer(text)) if "@" in text else iter(())


def _ibans(text: str, _: tuple[str, ...]) -> Iterator[tuple[int, int]]:
    from stdnum import iban

    for found in _IBAN.finditer(text):
        start, end = found.span()
        while end - start >= 15:  # the last group may be the next word of the sentence
            if iban.is_valid(text[start:end], check_country=False):
                yield start, end
                break
            end = max(text.rfind(" ", start, end), text.rfind("-", start, end))


def _cards(text: str, _: tuple[str, ...]) -> Iterator[tuple[int, int]]:
    for found in _CARD.finditer(text):
        start, end = found.span()
        alone = not (text[start - 1 : start].isalnum() or text[end : end + 1].isalnum())
        if alone and text[start - 1 : start] != "+" and is_card(text[start:end]):
            yield start, end


def is_card(written: str) -> bool:
    """Whether this is a payment card number: a known prefix, a length of its scheme, and a right check digit."""
    from stdnum import luhn

    digits = "".join(letter for letter in written if letter.isdigit())
    fits = any(len(digits) in lengths and digits.startswith(prefixes) for prefixes, lengths in _CARD_PREFIXES)
    return fits and luhn.is_valid(digits) and len(set(digits)) > 1


def _national_ids(text: str, _: tuple[str, ...]) -> Iterator[tuple[int, int]]:
    for found in _NATIONAL_ID.finditer(text):
        if any(is_valid(found.group()) for is_valid in _national()):
            yield found.span()


@lru_cache(maxsize=1)
def _national() -> tuple[Callable[[str], bool], ...]:
    from stdnum.br import cpf
    from stdnum.es import dni, nie
    from stdnum.it import codicefiscale
    from stdnum.us import ssn

    return (ssn.is_valid, cpf.is_valid, dni.is_valid, nie.is_valid, codicefiscale.is_valid)


def _phones(text: str, regions: tuple[str, ...]) -> Iterator[tuple[int, int]]:
    for found in _PHONE.finditer(text):
        start, end = found.span()
        written = text[start:end]
        if written.endswith(("-", ".", " ")) or not 7 <= sum(letter.isdigit() for letter in written) <= 20:
            continue
        before, after = text[max(start - 1, 0) : start], text[end : end + 1]
        if before.isalnum() or after.isalnum() or (before and before in "$€£#/_@") or (after and after in "_@%"):
            continue
        if _DATED.match(written) or _DATE_OR_CODE.fullmatch(written) or _is_address(text, start, end):
            continue
        if not _OTHER_NUMBER.search(text[max(start - 24, 0) : start]) and is_phone(written, regions):
            yield start, end


def _is_address(text: str, start: int, end: int) -> bool:
    """Whether this is the post code and house number of a street: two bare groups, and a word right behind."""
    behind = text[end : end + 2]
    bare = _TWO_GROUPS.fullmatch(text[start:end]) is not None
    return (
        bare and behind[:1] == " " and behind[1:].isalpha() and _CALLED.search(text[max(start - 16, 0) : start]) is None
    )


def is_phone(written: str, regions: tuple[str, ...] = PHONE_REGIONS) -> bool:
    """Whether a number plan allows it: its own when it names a country, else one of `regions`."""
    import phonenumbers

    international = written.startswith(("+", "00", "(+"))
    spoken = "+" + written.lstrip("(+0") if international and not written.startswith("+") else written
    for region in (None,) if international else regions:
        try:
            number = phonenumbers.parse(spoken, region)
        except phonenumbers.NumberParseException:
            continue
        reason = phonenumbers.is_possible_number_with_reason(number)
        if reason in (phonenumbers.ValidationResult.IS_POSSIBLE, phonenumbers.ValidationResult.IS_POSSIBLE_LOCAL_ONLY):
            return True
    return False


_CANDIDATES: Final[Mapping[PersonalKind, Callable[[str, tuple[str, ...]], Iterator[tuple[int, int]]]]] = {
    "card": _cards,
    "iban": _ibans,
    "email": _emails,
    "national_id": _national_ids,
    "phone": _phones,
}
