"""One file over HTTP: public addresses alone where that is asked for, validated copies, and cancels at once."""

import ctypes
import functools
import http.server
import socket
import threading
import time

import httpx2
import pytest

from lora_utils.errors import UserError, shown
from lora_utils.io import download, transfer
from lora_utils.io.access import CALLER, client_access
from lora_utils.io.transfer import Transfer, is_public

PRIVATE = ["127.0.0.1", "127.8.9.1", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254", "0.0.0.0"]
PRIVATE += ["100.64.0.1", "224.0.0.1", "255.255.255.255", "::1", "::", "fe80::1%eth0", "fc00::1", "fd12::1", "ff02::1"]
PRIVATE += ["::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "2002:7f00:1::"]
PRIVATE += ["192.0.2.1"]
PUBLIC = ["8.8.8.8", "1.1.1.1", "2606:4700:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"]


@pytest.mark.parametrize("address", PRIVATE)
def test_addresses_of_this_machine_and_its_networks_are_not_public(address):
    assert not is_public(address)


@pytest.mark.parametrize("address", PUBLIC)
def test_addresses_of_the_internet_are(address):
    assert is_public(address)


class Web:
    """A web server on this machine: answers by path, and what it was asked."""

    def __init__(self):
        self.asked, self.headers = [], []
        self.answers = {}

    def answer(self, path, body=b"abc", status=200, **headers):
        self.answers[path] = (status, body, {name.replace("_", "-"): value for name, value in headers.items()})


@pytest.fixture
def web():
    site = Web()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            site.asked.append(self.path)
            site.headers.append(dict(self.headers))
            status, body, headers = site.answers[self.path.partition("?")[0]]
            if headers.get("etag") and self.headers.get("If-None-Match") == headers["etag"]:
                status, body = 304, b""
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        site.url = f"http://127.0.0.1:{server.server_address[1]}"
        yield site
        server.shutdown()


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0.0.0.0", "[::1]", "0x7f000001", "2130706433", "127.1"])
def test_a_stranger_reaches_no_address_of_this_machine_however_it_is_written(host, web, tmp_path):
    web.answer("/w.zip")
    url = web.url.replace("127.0.0.1", host)
    with pytest.raises(UserError, match=r"leads into a private network|can't be downloaded"):
        download.download_weights(f"{url}/w.zip", tmp_path, access=client_access())
    assert web.asked == []


@pytest.mark.parametrize("source", ["/etc/hostname", "/no/such/file", "file:///etc/hostname", "ftp://x/y", "hostname"])
def test_a_stranger_cannot_tell_local_files_from_missing_ones(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hostname").write_text("x")
    with pytest.raises(UserError, match=r"there is no weights file .*; give a URL that starts with http"):
        download.download_weights(source, tmp_path, access=client_access())


def resolve_as(monkeypatch, **addresses):
    """Let names be these addresses, the real ones of this machine included."""
    real = socket.getaddrinfo

    def resolve(host, port, *given, **named):
        return real(addresses.get(str(host).replace(".", "_"), host), port, *given, **named)

    monkeypatch.setattr(transfer.socket, "getaddrinfo", resolve)


def test_each_redirect_is_checked_and_the_checked_address_is_the_one_connected_to(web, tmp_path, monkeypatch):
    """The first hop is let through, as a public server would be: what it leads to is not."""
    web.answer("/start", status=302, location="http://inside.example/secret")
    web.answer("/secret", b"secret")
    checked = []

    def public_once(address):
        checked.append(address)
        return len(checked) == 1

    resolve_as(monkeypatch, outside_example="127.0.0.1", inside_example="127.0.0.1")
    monkeypatch.setattr(transfer, "is_public", public_once)
    port = web.url.rpartition(":")[2]
    web.answer("/start", status=302, location=f"http://inside.example:{port}/secret")
    with pytest.raises(UserError, match=r"inside\.example:\d+/secret leads into a private network"):
        download.download_weights(f"http://outside.example:{port}/start", tmp_path, access=client_access())
    assert web.asked == ["/start"]
    assert web.headers[0]["Host"] == f"outside.example:{port}"
    assert checked == ["127.0.0.1", "127.0.0.1"]


def test_a_name_of_which_one_address_is_private_is_refused(monkeypatch, tmp_path):
    mixed = [(None, None, None, None, (address, 80)) for address in ("8.8.8.8", "10.0.0.1")]
    monkeypatch.setattr(transfer.socket, "getaddrinfo", lambda *_, **__: mixed)
    with pytest.raises(UserError, match="leads into a private network"):
        download.download_weights("http://mixed.example/w.zip", tmp_path, access=client_access())


def test_the_operator_may_open_private_addresses(web, tmp_path, monkeypatch):
    web.answer("/w.zip")
    monkeypatch.setenv("ALLOW_PRIVATE_ADDRESSES", "1")
    assert download.download_weights(f"{web.url}/w.zip", tmp_path, access=client_access()).read_bytes() == b"abc"


def test_a_token_is_sent_to_its_own_host_alone(web, tmp_path):
    other = web.url.replace("127.0.0.1", "localhost")
    web.answer("/a", status=302, location="/b")
    web.answer("/b", status=302, location=f"{other}/c")
    web.answer("/c")
    transfer.transfer(Transfer(f"{web.url}/a", tmp_path / "x", token="hf_secret"))
    assert [headers.get("Authorization") for headers in web.headers] == ["Bearer hf_secret", "Bearer hf_secret", None]


def test_a_host_without_its_encryption_is_another_origin():
    url = httpx2.URL("https://hub.example/a")
    assert transfer.same_origin(url, httpx2.URL("https://hub.example/b"))
    for other in ("http://hub.example/a", "https://hub.example:8443/a", "https://cdn.hub.example/a"):
        assert not transfer.same_origin(url, httpx2.URL(other)), other


def test_redirects_without_end_and_to_other_schemes_are_refused(web, tmp_path):
    web.answer("/a", status=302, location="/a")
    with pytest.raises(UserError, match="is redirected more than 10 times"):
        transfer.transfer(Transfer(f"{web.url}/a", tmp_path / "x"))
    web.answer("/f", status=302, location="file:///etc/passwd")
    with pytest.raises(UserError, match="which is no http address"):
        transfer.transfer(Transfer(f"{web.url}/f", tmp_path / "x"))


# --- the cache ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("validator", ["etag", "last-modified"])
def test_a_copy_is_used_as_long_as_the_server_has_the_same(validator, web, tmp_path):
    first, second = {"etag": ('"1"', '"2"'), "last-modified": ("Mon, 01 Jan 2024 00:00:00 GMT",) * 2}[validator]
    headers = {validator.replace("-", "_"): first}
    web.answer("/w.zip", b"one", **headers)
    path = download.download_weights(f"{web.url}/w.zip", tmp_path)
    stamp = path.stat().st_mtime_ns
    assert download.download_weights(f"{web.url}/w.zip", tmp_path).stat().st_mtime_ns == stamp
    web.answer("/w.zip", b"other", **{validator.replace("-", "_"): second})
    assert download.download_weights(f"{web.url}/w.zip", tmp_path).read_bytes() == b"other"


def test_an_empty_tag_is_none(web, tmp_path):
    web.answer("/w.zip", b"one", etag="")
    assert download.download_weights(f"{web.url}/w.zip", tmp_path).read_bytes() == b"one"


def test_without_a_validator_it_is_downloaded_again(web, tmp_path):
    web.answer("/w.zip", b"one")
    download.download_weights(f"{web.url}/w.zip", tmp_path)
    web.answer("/w.zip", b"two")
    assert download.download_weights(f"{web.url}/w.zip", tmp_path).read_bytes() == b"two"


def test_the_cache_stays_within_its_bytes_and_the_oldest_goes(web, tmp_path, monkeypatch):
    web.answer("/w.zip", bytes(1000))
    monkeypatch.setattr(download, "CACHE_BYTES", 3500)
    paths = []
    for index in range(6):
        paths.append(download.download_weights(f"{web.url}/w.zip?n={index}", tmp_path))
        time.sleep(0.01)
    assert [path.is_file() for path in paths] == [False, False, False, True, True, True]


@pytest.mark.parametrize(
    "name", ["lora", ".safetensors", "%2e%2e%2fetc", "a" * 400 + ".zip", "猫" * 200 + ".safetensors", "a b?c=d", ""]
)
def test_names_of_any_kind_become_files_in_the_cache(name, web, tmp_path):
    from urllib.parse import quote  # noqa: PLC0415

    path, _, query = name.partition("?")
    wanted = "/" + (path if "%" in path else quote(path))
    web.answer(wanted)
    found = download.download_weights(web.url + wanted + ("?" + query if query else ""), tmp_path)
    assert found.read_bytes() == b"abc"
    assert found.parent.parent == tmp_path


def test_what_is_no_lora_is_forgotten_and_the_callers_own_file_is_not(web, tmp_path):
    web.answer("/w.zip")
    path = download.download_weights(f"{web.url}/w.zip", tmp_path / "cache")
    download.forget_download(path, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []
    (tmp_path / "own.zip").write_bytes(b"x")
    download.forget_download(tmp_path / "own.zip", tmp_path / "cache")
    assert (tmp_path / "own.zip").is_file()


# --- cancels --------------------------------------------------------------------------------------------------------


class Cancelled(BaseException):
    pass


@pytest.mark.parametrize("begins", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\nabc"])
def test_a_cancel_ends_a_silent_download_within_a_second(begins, tmp_path):
    """As Cog cancels: by an exception in the thread, which waits for the server at that moment."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def talk():
            connection, _ = listener.accept()
            connection.sendall(begins)
            time.sleep(5)
            connection.close()

        threading.Thread(target=talk, daemon=True).start()
        url, ended = f"http://127.0.0.1:{listener.getsockname()[1]}/w.zip", []

        def fetch():
            try:
                download.download_weights(url, tmp_path / "cache", access=CALLER)
            except Cancelled:
                ended.append(time.monotonic())

        thread = threading.Thread(target=fetch)
        thread.start()
        time.sleep(0.5)
        began = time.monotonic()
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(Cancelled))
        thread.join(5)
        assert ended
        assert ended[0] - began < 1
    time.sleep(0.2)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


# --- messages -------------------------------------------------------------------------------------------------------


@functools.cache
def uri(size=100_000):
    return "data:application/zip;base64," + "A" * size


def test_a_data_uri_is_never_whole_in_a_message(tmp_path):
    with pytest.raises(UserError) as refused:
        download.download_weights(uri(), tmp_path)
    assert len(str(refused.value)) < 300
    assert "data:..." in str(refused.value)
    assert len(str(UserError(f"{uri()!r} and {uri()}"))) < 60
    assert shown("x" * 1000, 10) == "xxxxxxxxxx..."


def test_work_that_hangs_is_left_behind_by_a_cancel_and_its_error_is_raised_without_one():
    """As a silent hub's answer, which has no socket to shut."""
    hangs, ended = threading.Event(), []

    def wait():
        try:
            transfer.interruptible(hangs.wait)
        except Cancelled:
            ended.append(time.monotonic())

    thread = threading.Thread(target=wait)
    thread.start()
    time.sleep(0.3)
    began = time.monotonic()
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(Cancelled))
    thread.join(5)
    hangs.set()
    assert ended[0] - began < 1
    with pytest.raises(ZeroDivisionError):
        transfer.interruptible(lambda: 1 // 0)
