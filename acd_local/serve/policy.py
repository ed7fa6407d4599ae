"""Decides who may ask what: which hosts and origins, with which token, and what may be changed of the guard."""

from __future__ import annotations

import hmac
import ipaddress
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from acd_local.serve.openai import Refused

OPEN = ("/", "/health")  # paths that tell nothing of anybody, and need no token
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


def is_loopback(host: str) -> bool:
    """Tell whether only this machine reaches an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@dataclass(frozen=True)
class Access:
    """Who may ask.

    Attributes:
        host: the address that is listened at.
        names: further names by which clients may call this server.
        token: what they have to know; None: nothing.
    """

    host: str
    names: tuple[str, ...] = ()
    token: str | None = None

    def check(self, headers: Mapping[str, str], path: str) -> None:
        """Look at a request before anything is done.

        A page in a browser reaches local servers too: by a name that it lets point here (the Host header tells), or
        by asking from its own origin (the Origin header tells).

        Args:
            headers: names in small letters.

        Raises:
            Refused: it may not ask.
        """
        host = headers.get("host", "").lower()
        if not self._is_ours(host):
            raise Refused("this server is not known by that name (Host): see --allow-host", status=403, kind="host")
        origin = headers.get("origin")
        if origin is not None and origin.lower() not in (f"http://{host}", f"https://{host}"):  # TLS: a proxy's
            raise Refused("pages of other origins may not ask this server", status=403, kind="origin")
        if self.token is not None and path not in OPEN and not self._knows(headers.get("authorization", "")):
            raise Refused("the token is missing or wrong (Authorization: Bearer ...)", status=401, kind="token")

    def _is_ours(self, host: str) -> bool:
        name = _name_of(host)
        if not name or name in (*_LOOPBACK, self.host.lower(), *(_name_of(name.lower()) for name in self.names)):
            return bool(name)
        # A page's own name can be made to point here, an address cannot.
        return not is_loopback(self.host) and _is_address(name)

    def _knows(self, authorization: str) -> bool:
        scheme, _, token = authorization.partition(" ")
        # Both are compared as bytes: compare_digest takes no other text than ASCII.
        same = hmac.compare_digest(token.strip().encode(), (self.token or "").encode())
        return same and scheme.lower() == "bearer"


def _name_of(host: str) -> str:
    """Find the name or address in a Host header; "" where it is none."""
    found = re.fullmatch(r"(?:\[([^\s\[\]]+)\]|([^\s:/?#@\[\]]+))(?::[0-9]*)?", host)
    return "" if found is None else found[1] or found[2]


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


@dataclass(frozen=True)
class GuardPolicy:
    """What a request may say of the guard.

    Attributes:
        locked: nothing but what holds anyway.
        holds: the values of `openai.GUARD` that hold where a request says nothing.
        pairs: names of the pairs there are.
    """

    locked: bool
    holds: Mapping[str, Any]
    pairs: tuple[str, ...]

    def check(self, guard: Mapping[str, Any]) -> str | None:
        """Look at the fields of the guard that a request gave; return the pair that it asks for.

        Raises:
            Refused: the server is locked and one is another value, or there is no such pair.
        """
        for name, value in guard.items():
            if self.locked and value != self.holds[name]:
                raise Refused(f"this server's guard is locked: leave {name} out", name, status=403, kind="locked")
        pair: str | None = guard.get("pair")
        if pair is not None and pair not in self.pairs:
            # Names alone: a path from a request must not reach the disk.
            raise Refused(f"there is no such pair; known: {', '.join(self.pairs)}", "pair")
        return pair
