"""The raw tenant id stays an argument: no key, queue name, pattern or predicate is put together from it.

`TenantScope` makes every name that belongs to a tenant. Elsewhere its id may be handed on as a value of its own (a
column, a field of an envelope, a member of a set), and may stand in a sentence for a person, never in a text that a
server reads as a name.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Final

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("contracts", "gateway", "governance", "resilience", "workers", "deploy")
MAKERS: Final = {"contracts/tenancy.py"}
"""The only modules in which names are made from a tenant id."""

RAW_NAMES: Final = {"tenant", "tenant_id", "tenants"}
SPOKEN_NAMES: Final = RAW_NAMES | {"scope"}
"""In a text a scope is its tenant id."""

CLIENTS: Final = ("deploy/cli",)
"""The command line speaks as any client does: in sentences, and in paths that the server takes apart again."""

EXCEPTIONS: Final = {
    ("contracts/events.py", "event_id_of"): "an identity is a hash, and the tenant is what it is bound to",
    ("contracts/topology.py", "tenant_ingest"): "the binding of the queue whose name TenantScope made",
    ("resilience/management.py", "_permit_upstream"): "the broker's permissions are patterns over the tenant's names",
    ("deploy/stream.py", "submit_amqp"): "an upstream of the demonstration, which knows the public contract alone",
    ("gateway/ingress.py", "delivery_digest"): "a message's name is a hash over its tenant too",
    ("gateway/refusals.py", "_record"): "a record's name is a hash over its tenant too",
    ("governance/postgres/corrections.py", "_number"): "the number of a lock is a hash over its tenant too",
    ("governance/postgres/tenants.py", "upstream_user"): "the one maker of a broker user's name",
}
"""Where a name is made all the same: (module, function) and why."""

NAMES: Final = {"rf:": {"resilience/redis.py"}, "risk.ingest.": {"contracts/topology.py"}}
"""Beginnings of names that TenantScope makes, and modules that hold such a name of no tenant."""


def _raw(node: ast.expr, names: set[str]) -> bool:
    """Whether an expression is a tenant id, or turns something into one."""
    match node:
        case ast.Name(id=name):
            return name in names
        case ast.Attribute(attr=name):
            return name in names
        case ast.Call(func=ast.Name(id="str"), args=[inner]):
            return _raw(inner, SPOKEN_NAMES)
        case ast.Call(func=ast.Name(id="quote" | "escape" | "repr"), args=[inner, *_]):
            return _raw(inner, SPOKEN_NAMES)
        case ast.Call(func=ast.Attribute(value=inner, attr="encode" | "lower" | "strip")):
            return _raw(inner, SPOKEN_NAMES)
        case ast.IfExp(body=left, orelse=right):
            return _raw(left, names) or _raw(right, names)
        case ast.BoolOp(values=values):
            return any(_raw(value, names) for value in values)
    return False


def _joins(node: ast.AST) -> bool:
    """Whether this expression puts a text together from a tenant id."""
    match node:
        case ast.JoinedStr(values=[ast.FormattedValue(conversion=-1, format_spec=None)]):
            return False
        case ast.JoinedStr(values=values):
            return any(isinstance(value, ast.FormattedValue) and _raw(value.value, SPOKEN_NAMES) for value in values)
        case ast.BinOp(op=ast.Add() | ast.Mod(), left=left, right=right):
            inside = [*right.elts] if isinstance(right, ast.Tuple) else [right]
            return _raw(left, RAW_NAMES) or any(_raw(value, RAW_NAMES) for value in inside)
        case ast.Call(func=ast.Attribute(attr="format" | "format_map"), args=values, keywords=words):
            return any(_raw(value, SPOKEN_NAMES) for value in [*values, *(word.value for word in words)])
        case ast.Call(func=ast.Attribute(attr="join"), args=[ast.List(elts=values) | ast.Tuple(elts=values)]):
            return any(_raw(value, SPOKEN_NAMES) for value in values)
        case ast.Call(func=ast.Attribute(attr="replace"), args=[_, value, *_]):
            return _raw(value, SPOKEN_NAMES)
    return False


def _spoken(node: ast.AST) -> bool:
    """Sentences for people: what is raised, logged, printed or returned as a finding."""
    match node:
        case ast.Raise():
            return True
        case ast.Call(func=ast.Attribute(value=ast.Name(id="log" | "console" | "errors"))):
            return True
        case ast.Call(func=ast.Name(id="say" | "_done" | "_command")):
            return True
    return False


def _walk(tree: ast.Module) -> Iterator[tuple[str, ast.AST]]:
    """Every node that is not part of a sentence, with the function that it stands in."""
    waiting: list[tuple[str, ast.AST]] = [("", tree)]
    while waiting:
        function, node = waiting.pop()
        yield function, node
        inner = node.name if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) else function
        waiting += [(inner, child) for child in ast.iter_child_nodes(node) if not _spoken(child)]


def built(tree: ast.Module) -> list[tuple[str, int, str]]:
    """(function, line, text) of every text that is put together from a tenant id."""
    return [
        (function, node.lineno, ast.unparse(node))
        for function, node in _walk(tree)
        if isinstance(node, ast.expr) and _joins(node)
    ]


def named(tree: ast.Module) -> list[tuple[str, int, str]]:
    """(beginning, line, text) of every literal that begins like a name of TenantScope's; a sentence is no name."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " not in node.value:
            found += [(start, node.lineno, node.value) for start in NAMES if node.value.startswith(start)]
    return found


@cache
def modules() -> dict[str, ast.Module]:
    """Every module of the product by its path."""
    paths = (path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py")))
    return {str(path.relative_to(ROOT)): ast.parse(path.read_text()) for path in paths}


@cache
def texts() -> dict[tuple[str, str], list[str]]:
    """Every text that is put together from a tenant id, by module and function."""
    found: dict[tuple[str, str], list[str]] = {}
    for module, tree in modules().items():
        for function, line, text in built(tree):
            found.setdefault((module, function), []).append(f"{line}: {text}")
    return found


def test_only_a_tenant_scope_puts_names_together() -> None:
    found = {
        place: lines
        for place, lines in texts().items()
        if place not in EXCEPTIONS and place[0] not in MAKERS and not place[0].startswith(CLIENTS)
    }
    assert found == {}, "take the name from TenantScope, or hand the id on as a value of its own"


def test_every_exception_is_still_needed() -> None:
    assert set(EXCEPTIONS) - texts().keys() == set()


def test_names_of_tenants_begin_in_one_place() -> None:
    found = {
        f"{module}:{line} {text}"
        for module, tree in modules().items()
        if module not in MAKERS
        for start, line, text in named(tree)
        if module not in NAMES[start]
    }
    assert found == set()


@pytest.mark.parametrize(
    "source",
    [
        'key = f"rf:f:{scope.tenant_id}"',
        'key = f"rf:f:{scope}"',
        'key = f"{state.scope}:x"',
        'key = "rf:f:" + scope.tenant_id',
        'key = scope.tenant_id + ":x"',
        'key = "rf:f:" + str(scope)',
        'key = "rf:%s" % tenant',
        'key = "rf:%s:%s" % (tenant, event_id)',
        'key = "rf:{}".format(scope.tenant_id)',
        'key = "rf:{t}".format(t=scope)',
        'queue = ".".join(["risk", tenant])',
        'queue = ".".join((scope.tenant_id, "x"))',
        "query = text(f\"SELECT 1 FROM events WHERE tenant = '{tenant}'\")",
        'query = TEMPLATE.replace("$tenant", tenant)',
        'def f(tenant_id):\n    return f"risk.ingest.{tenant_id}"',
        'path = f"/x/{quote(tenant)}"',
        'digest = hashlib.sha256(b"x" + tenant.encode())',
        'key = "rf:" + (scope.tenant_id if scope else "")',
    ],
)
def test_the_rule_bites(source: str) -> None:
    assert built(ast.parse(source))


@pytest.mark.parametrize(
    "source",
    [
        'row = {"tenant": scope.tenant_id, "event_id": event_id}',
        "rows = [(scope.tenant_id, event_id) for scope, event_id in keys]",
        "key = scope.state_key(event_id)",
        'raise ConflictError(f"there is a tenant {scope} already")',
        'log.info("x", tenant=scope.tenant_id)',
        "if event.tenant_id != scope.tenant_id:\n    pass",
        "places = {EVERYWHERE} | {scope.tenant_id}",
    ],
)
def test_the_rule_lets_values_pass(source: str) -> None:
    assert built(ast.parse(source)) == []


@pytest.mark.parametrize(
    "source", ['k = "rf:x"', 'k = f"rf:{slot}"', 'q = "risk.ingest.acme"', 'q = f"risk.ingest.{n}"']
)
def test_the_rule_of_beginnings_bites(source: str) -> None:
    assert named(ast.parse(source))
