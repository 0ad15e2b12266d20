"""The broker's management API: makes and checks the topology, and reads depths.

Declares through HTTP, so that one tool sees exchanges, queues, bindings, policies and permissions.
Not used by workers: they consume passively what `riskfleet topology apply` made.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import quote, unquote, urlsplit

import httpx

from contracts.failures import MessagingFailureError
from contracts.tenancy import TenantScope
from contracts.topology import DECISIONS, INGEST, REJECTED, Binding, Exchange, Policy, Queue, Topology, tenant_ingest

UPSTREAM_EXCHANGES: Final = (INGEST, DECISIONS, REJECTED)
"""What a tenant's broker user sees: the first one to publish to, the others to bind."""

NOTHING: Final = "^$"
"""The pattern of no name at all."""


@dataclass(frozen=True, slots=True)
class QueueLoad:
    """Messages (ready and unacked) in some queues, and the most consumers that one of them has."""

    messages: int
    consumers: int


class BrokerManagement:
    """A client of one virtual host. `url` is `http://user:password@host:port`; `vhost` as in the AMQP URL."""

    def __init__(self, url: str, vhost: str = "/", timeout_s: float = 10.0) -> None:
        """Nothing is connected yet."""
        parts = urlsplit(url)
        auth = (unquote(parts.username or "guest"), unquote(parts.password or "guest"))
        base = f"{parts.scheme}://{parts.hostname}:{parts.port or 15672}/api/"
        self._vhost = quote(vhost, safe="")
        self._client = httpx.AsyncClient(base_url=base, auth=auth, timeout=timeout_s)

    async def _call(self, method: str, path: str, body: object = None) -> Any:
        try:
            response = await self._client.request(method, path, json=body)
        except httpx.HTTPError as error:
            raise MessagingFailureError(
                f"the RabbitMQ management API does not answer ({type(error).__name__}); "
                "is the plugin enabled, and is RISKFLEET_RABBITMQ_MANAGEMENT_URL right?"
            ) from error
        if response.status_code == 404 and method == "GET":
            return None
        if response.status_code >= 400:
            raise MessagingFailureError(f"the management API refused {method} {path}: {response.text[:300]}")
        return response.json() if response.content else None

    async def apply(self, wanted: Topology) -> int:
        """Make everything that is wanted; existing things stay. Returns how many things were asserted.

        Raises MessagingFailureError when an existing queue or exchange has another type or arguments.
        """
        for exchange in wanted.exchanges:
            await self._call("PUT", f"exchanges/{self._vhost}/{exchange.name}", _exchange(exchange))
        await self._all(("PUT", f"policies/{self._vhost}/{policy.name}", _policy(policy)) for policy in wanted.policies)
        await self._all(("PUT", f"queues/{self._vhost}/{queue.name}", _queue(queue)) for queue in wanted.queues)
        await self._all(
            ("POST", f"bindings/{self._vhost}/e/{b.exchange}/q/{b.queue}", {"routing_key": b.key, "arguments": {}})
            for b in wanted.bindings
        )
        return len(wanted.exchanges) + len(wanted.policies) + len(wanted.queues) + len(wanted.bindings)

    async def _all(self, calls: Any) -> None:
        gate = asyncio.Semaphore(8)

        async def one(method: str, path: str, body: object) -> None:
            async with gate:
                await self._call(method, path, body)

        await asyncio.gather(*(one(*call) for call in calls))

    async def differences(self, wanted: Topology) -> list[str]:
        """What the broker lacks or holds otherwise, a sentence each; empty when all is as wanted."""
        exchanges = {e["name"]: e for e in await self._call("GET", f"exchanges/{self._vhost}")}
        queues = {q["name"]: q for q in await self._call("GET", f"queues/{self._vhost}")}
        bindings = {
            (b["source"], b["destination"], b["routing_key"])
            for b in await self._call("GET", f"bindings/{self._vhost}")
        }
        policies = {p["name"]: p for p in await self._call("GET", f"policies/{self._vhost}")}
        return [
            *(d for e in wanted.exchanges if (d := _exchange_difference(e, exchanges.get(e.name)))),
            *(d for q in wanted.queues if (d := _queue_difference(q, queues.get(q.name)))),
            *(_binding_missing(b) for b in wanted.bindings if (b.exchange, b.queue, b.key) not in bindings),
            *(d for p in wanted.policies if (d := _policy_difference(p, policies.get(p.name)))),
        ]

    async def depth(self, names: Sequence[str]) -> int:
        """Messages (ready and unacked) in these queues together; the API's counters lag by up to 5 s."""
        rows = await self._call("GET", f"queues/{self._vhost}?columns=name,messages")
        wanted = set(names)
        return sum(int(row.get("messages", 0)) for row in rows or () if row["name"] in wanted)

    async def standing(self, names: Sequence[str]) -> dict[str, QueueLoad | None]:
        """What each queue that there is holds and how many consume it, None for one that is not counted yet."""
        rows = await self._call("GET", f"queues/{self._vhost}?columns=name,messages,consumers")
        wanted = set(names)
        return {
            row["name"]: QueueLoad(int(row["messages"]), int(row.get("consumers", 0))) if "messages" in row else None
            for row in rows or ()
            if row["name"] in wanted
        }

    async def loads(self, names: Sequence[str]) -> QueueLoad:
        """What these queues hold together, and how many consume the busiest of them; up to 5 s old."""
        rows = await self._call("GET", f"queues/{self._vhost}?columns=name,messages,consumers")
        wanted = set(names)
        found = [row for row in rows or () if row["name"] in wanted]
        messages = sum(int(row.get("messages", 0)) for row in found)
        return QueueLoad(messages, max((int(row.get("consumers", 0)) for row in found), default=0))

    async def declare_temporary(self, name: str) -> None:
        """A quorum queue that the broker removes after a minute without use."""
        arguments = {"x-queue-type": "quorum", "x-expires": 60_000}
        await self._call("PUT", f"queues/{self._vhost}/{name}", {"durable": True, "arguments": arguments})

    async def delete_queue(self, name: str) -> None:
        """Remove a queue; its absence is no error."""
        if await self._call("GET", f"queues/{self._vhost}/{name}") is not None:
            await self._call("DELETE", f"queues/{self._vhost}/{name}")

    async def unbind(self, exchange: str, queue: str) -> None:
        """Remove the bindings of a queue to an exchange: what is published for it is unroutable from then on."""
        path = f"bindings/{self._vhost}/e/{exchange}/q/{queue}"
        for found in await self._call("GET", path) or ():
            await self._call("DELETE", f"{path}/{quote(found['properties_key'], safe='')}")

    async def delete_exchange(self, name: str) -> None:
        """Remove an exchange; its absence is no error."""
        if await self._call("GET", f"exchanges/{self._vhost}/{name}") is not None:
            await self._call("DELETE", f"exchanges/{self._vhost}/{name}")

    async def version(self) -> str:
        """The broker's version."""
        return str((await self._call("GET", "overview"))["rabbitmq_version"])

    async def open_upstream(self, scope: TenantScope, user: str, password: str) -> None:
        """A tenant's ingest queue and its own broker user; repeating it changes nothing but the password."""
        await self.apply(tenant_ingest(scope.ingest_queue, scope.tenant_id))
        await self.create_upstream_user(user, password, scope.tenant_id, UPSTREAM_EXCHANGES)

    async def suspend_upstream(self, user: str) -> None:
        """The user may do nothing any more and is disconnected; the tenant's queues and their messages stay."""
        await self._permit(user, NOTHING, NOTHING, NOTHING)
        # The broker remembers a channel's permissions for a while: only a new connection asks again.
        await self._call("DELETE", f"connections/username/{quote(user, safe='')}")

    async def resume_upstream(self, scope: TenantScope, user: str) -> None:
        """The user may again what a tenant's user may."""
        await self._permit_upstream(user, scope.tenant_id, UPSTREAM_EXCHANGES)

    async def create_upstream_user(self, user: str, password: str, tenant_id: str, exchanges: Sequence[str]) -> None:
        """A tenant's broker user: writes and reads topics of its tenant, owns `up.<tenant>.*`, nothing else.

        `exchanges` are the topic exchanges of the public contract; the first one is for writing only, the others are
        for reading only.
        """
        await self._call("PUT", f"users/{quote(user, safe='')}", {"password": password, "tags": ""})
        await self._permit_upstream(user, tenant_id, exchanges)

    async def _permit_upstream(self, user: str, tenant_id: str, exchanges: Sequence[str]) -> None:
        """Tenant ids have neither dots nor anything special in a pattern, and the dot ends them: acme is not acme-2.

        Topic permissions bind direct publishes and bindings only. A user may still reach another tenant's ingest
        queue through an exchange or dead-letter target of its own; there the user that the broker verified counts,
        and the door refuses.
        """
        ingest, *reading = (re.escape(name) for name in exchanges)
        own = rf"up\.{tenant_id}\..+"
        # Topics first: with permissions alone the user could use every key for a moment.
        for number, exchange in enumerate(exchanges):
            mine = rf"^{tenant_id}\."
            write, read = (mine, NOTHING) if number == 0 else (NOTHING, mine)
            topic = {"exchange": exchange, "write": write, "read": read}
            await self._call("PUT", f"topic-permissions/{self._vhost}/{quote(user, safe='')}", topic)
        await self._permit(user, f"^{own}$", f"^({ingest}|{own})$", f"^({'|'.join([*reading, own])})$")

    async def _permit(self, user: str, configure: str, write: str, read: str) -> None:
        permissions = {"configure": configure, "write": write, "read": read}
        await self._call("PUT", f"permissions/{self._vhost}/{quote(user, safe='')}", permissions)

    async def close(self) -> None:
        """Close the HTTP client."""
        await self._client.aclose()


def _exchange(exchange: Exchange) -> dict[str, Any]:
    return {"type": exchange.type, "durable": True, "auto_delete": False, "arguments": exchange.arguments}


def _queue(queue: Queue) -> dict[str, Any]:
    return {"durable": True, "auto_delete": False, "arguments": queue.arguments}


def _policy(policy: Policy) -> dict[str, Any]:
    return {
        "pattern": policy.pattern,
        "definition": policy.definition,
        "priority": policy.priority,
        "apply-to": "queues",
    }


def _exchange_difference(wanted: Exchange, found: Mapping[str, Any] | None) -> str | None:
    if found is None:
        return f"exchange {wanted.name} is missing"
    if found["type"] != wanted.type or found["arguments"] != wanted.arguments:
        return (
            f"exchange {wanted.name} is {found['type']} {found['arguments']}, wanted {wanted.type} {wanted.arguments}"
        )
    return None


def _queue_difference(wanted: Queue, found: Mapping[str, Any] | None) -> str | None:
    if found is None:
        return f"queue {wanted.name} is missing"
    kind = found.get("type", found.get("arguments", {}).get("x-queue-type", "classic"))
    return None if kind == wanted.type else f"queue {wanted.name} is {kind}, wanted {wanted.type}"


def _binding_missing(binding: Binding) -> str:
    return f"binding {binding.exchange} -{binding.key}-> {binding.queue} is missing"


def _policy_difference(wanted: Policy, found: Mapping[str, Any] | None) -> str | None:
    if found is None:
        return f"policy {wanted.name} is missing"
    if found["pattern"] != wanted.pattern or found["definition"] != wanted.definition:
        return f"policy {wanted.name} differs from this release"
    return None
