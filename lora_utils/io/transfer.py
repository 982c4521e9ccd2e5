"""One file over HTTP: its address checked, its size bounded, and given up at once when its caller is cancelled.

A stranger's URL must not reach this machine or its network. So each hop's host is resolved here, all of its addresses
are checked, and the request goes to the very address that was checked, under the host's name: a second resolution,
which could answer otherwise, never happens.
"""

import ipaddress
import socket
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import httpx2

from lora_utils.errors import UserError, shown

T = TypeVar("T")
MAX_BYTES = 10 * 10**9
MAX_SECONDS = 3600.0
MAX_REDIRECTS = 10
_TIMEOUT = httpx2.Timeout(60.0, connect=20.0)
_VALIDATORS = ("etag", "last-modified", "content-length")
_POLL_S = 0.1  # between looks at whether the caller was cancelled
_CHUNK_BYTES = 1 << 20
# IPv6 addresses that stand for an IPv4 address behind a translator (RFC 6052, RFC 8215).
_TRANSLATED = (ipaddress.ip_network("64:ff9b::/96"), ipaddress.ip_network("64:ff9b:1::/48"))


@dataclass(frozen=True, slots=True)
class Transfer:
    """What is asked for, and what is known of the copy that is kept."""

    url: str
    target: Path
    public_only: bool = False  # no address of this machine or a private network, on any hop
    token: str | None = None  # sent to the URL's own origin alone
    validators: Mapping[str, str] = field(default_factory=dict)  # headers that came with the copy, if there is one


@dataclass(slots=True)
class _Progress:
    """What the working thread and its caller tell each other."""

    stop: threading.Event = field(default_factory=threading.Event)
    stream: object | None = None  # httpcore's, which has the socket


def interruptible(work: Callable[[], T], give_up: Callable[[], None] = lambda: None) -> T:
    """Return what `work` returns, or raise what it raises. It runs in a thread of its own.

    So a cancel of this thread, which Python delivers between two instructions, is noticed while a server is silent:
    `give_up` is called, and the work is left to end by itself.
    """
    done, results, errors = threading.Event(), list[T](), list[BaseException]()

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:  # it is raised again by the caller's thread
            errors.append(error)
        finally:
            done.set()

    threading.Thread(target=run, daemon=True).start()
    try:
        while not done.wait(_POLL_S):
            pass
    except BaseException:
        give_up()
        done.wait(_POLL_S)
        raise
    if errors:
        raise errors[0]
    return results[0]


def transfer(wanted: Transfer) -> dict[str, str] | None:
    """Write a URL's content to the target. -> its validators; None where the copy that is kept is still the same

    Raises UserError for what can't be had, is too large, or may not be reached; the target isn't there then.
    """
    progress = _Progress()

    def give_up() -> None:
        progress.stop.set()
        _shut(progress.stream)
        wanted.target.unlink(missing_ok=True)

    def work() -> dict[str, str] | None:
        complete = False
        try:
            found = _read(wanted, progress)
            complete = not progress.stop.is_set()
            return found
        except UserError:
            raise
        except (httpx2.HTTPError, httpx2.InvalidURL, OSError, ValueError) as error:
            why = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
            raise UserError(f"{shown(wanted.url)} can't be downloaded: {shown(why)}.") from error
        finally:
            if not complete:
                wanted.target.unlink(missing_ok=True)

    return interruptible(work, give_up)


def _read(wanted: Transfer, progress: _Progress) -> dict[str, str] | None:
    """Follow the redirects and read what is at their end."""
    url = own = httpx2.URL(wanted.url)
    deadline = time.monotonic() + MAX_SECONDS
    # A proxy would be the one that is connected to, whatever it then reaches.
    with httpx2.Client(timeout=_TIMEOUT, trust_env=not wanted.public_only) as client:
        for _ in range(MAX_REDIRECTS):
            headers = {"If-None-Match": wanted.validators.get("etag", "")}
            if wanted.token and same_origin(url, own):
                headers["Authorization"] = f"Bearer {wanted.token}"
            request = client.build_request("GET", url, headers={name: each for name, each in headers.items() if each})
            if wanted.public_only:
                _pin(request, _public_address(url))
            reply = client.send(request, stream=True)
            progress.stream = reply.extensions.get("network_stream")
            try:
                if _is_unchanged(reply, wanted.validators):
                    return None
                if not reply.has_redirect_location:
                    reply.raise_for_status()
                    _write(reply, wanted, progress, deadline)
                    return {name: reply.headers[name] for name in _VALIDATORS if name in reply.headers}
                url = url.join(reply.headers["location"])
            finally:
                reply.close()
            if url.scheme not in ("http", "https"):
                raise UserError(f"{shown(wanted.url)} leads to {shown(str(url))}, which is no http address.")
    raise UserError(f"{shown(wanted.url)} is redirected more than {MAX_REDIRECTS} times.")


def same_origin(one: httpx2.URL, other: httpx2.URL) -> bool:
    """Return whether two URLs are of one server, by one scheme: over plain http anyone on the way reads a token."""
    return (one.scheme, one.netloc) == (other.scheme, other.netloc)


def _is_unchanged(reply: httpx2.Response, known: Mapping[str, str]) -> bool:
    """Return whether the copy that is kept is what a server has now, by its tag, or else by its date and length.

    The date isn't sent along: a server may take a file that is older than the copy for the same.
    """
    if not known or reply.status_code == httpx2.codes.NOT_MODIFIED:
        return bool(known)
    names = ("etag",) if "etag" in reply.headers else ("last-modified", "content-length")
    return reply.is_success and all(known.get(name, "") == reply.headers.get(name) for name in names)


def _write(reply: httpx2.Response, wanted: Transfer, progress: _Progress, deadline: float) -> None:
    with wanted.target.open("wb") as sink:
        for chunk in reply.iter_bytes(_CHUNK_BYTES):
            sink.write(chunk)
            if sink.tell() > MAX_BYTES:
                raise UserError(f"{shown(wanted.url)} is larger than {MAX_BYTES // 10**9} GB.")
            if progress.stop.is_set() or time.monotonic() > deadline:
                raise UserError(f"{shown(wanted.url)} took longer than {MAX_SECONDS / 60:.0f} minutes.")


def _pin(request: httpx2.Request, address: str) -> None:
    """Let a request go to this address. The host's name stays in its header, and in the certificate's check."""
    request.extensions = {**request.extensions, "sni_hostname": request.url.host}
    request.url = request.url.copy_with(host=address)


def _public_address(url: httpx2.URL) -> str:
    """Return an address of a URL's host. Raises UserError where one of them isn't public."""
    if url.scheme not in ("http", "https") or not url.host:
        raise UserError(f"{shown(str(url))} is no http or https address.")
    found = socket.getaddrinfo(url.host, url.port or (443 if url.scheme == "https" else 80), type=socket.SOCK_STREAM)
    addresses = [str(entry[4][0]) for entry in found]
    if not addresses or not all(map(is_public, addresses)):
        raise UserError(f"{shown(str(url))} leads into a private network; give a public http or https address.")
    return addresses[0]


def is_public(address: str) -> bool:
    """Return whether an IP address is one of the public internet, with what it may hold of another address within."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inside = [ip.ipv4_mapped, ip.sixtofour, *(ip.teredo or ())]
        if any(ip in network for network in _TRANSLATED):
            inside.append(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF))
        if any(each is not None and not each.is_global for each in inside):
            return False
        if ip.ipv4_mapped is not None:
            return True
    return ip.is_global and not ip.is_multicast


def _shut(stream: object | None) -> None:
    """Wake the thread that waits for a silent server."""
    found = getattr(stream, "get_extra_info", lambda _name: None)("socket")
    if isinstance(found, socket.socket):
        with suppress(OSError):  # it is closed already
            found.shutdown(socket.SHUT_RDWR)
