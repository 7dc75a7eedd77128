"""Faults on the way to a store and in it: what passes is survived, what lasts is reported in time."""

from __future__ import annotations

import json
import os
import socket
import ssl
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
from botocore.exceptions import ClientError

from crcli.errors import ObjectExists, StoreError
from crcli.main import main
from crcli.store import open_store, retrying
from crcli.store.s3 import S3Store, calls
from crcli.store.s3 import client as client_module
from tests.support.faulty_proxy import (
    Exchange,
    FaultyProxy,
    Trickle,
    answer,
    damage_request,
    hold_until,
    lose_answer,
    pass_on,
    reset_midway,
    send_elsewhere,
    swallow_answer,
    truncate_answer,
    web_page,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from crcli.store import Store
    from tests.support.s3servers import S3Server

MIB = 1 << 20
PASSING = {
    "throttled": answer(503, "SlowDown"),
    "overloaded": answer(429, "TooManyRequests"),
    "broken": answer(500, "InternalError"),
    "behind a gateway": answer(502, ""),
    "reset": reset_midway,
    "answer lost": lose_answer,
}


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Come back soon: nobody here needs a rest."""
    monkeypatch.setattr(retrying, "FIRST_PAUSE_S", 0.01)


class Behind:
    """A store behind a faulty proxy."""

    def __init__(self, server: S3Server, prefix: str) -> None:
        self.server = server
        self.proxy = FaultyProxy(server)
        self._prefix = prefix

    def open(self, patience_s: float = 20, *, is_quick: bool = False) -> Store:
        """The store, as seen through the proxy; botocore does all, unless what is quick may come first."""
        store = open_store(
            self.server.url(self._prefix), endpoint_url=self.proxy.endpoint_url, patience_s=patience_s
        )
        assert isinstance(store, S3Store)
        assert is_quick or store._bucket.connection
        return store


@pytest.fixture(params=["moto", "swift"])
def behind(request: pytest.FixtureRequest, s3: Callable[[str], S3Server], prefix: str) -> Iterator[Behind]:
    """A server, and a proxy before it that does no harm yet."""
    there = Behind(s3(request.param), prefix)
    yield there
    there.proxy.close()


@pytest.mark.parametrize("is_quick", [False, True])
@pytest.mark.parametrize("fault", PASSING.values(), ids=PASSING.keys())
def test_passing_faults(behind: Behind, fault: Any, is_quick: bool) -> None:
    """Every request survives faults that pass, and the objects are right afterwards."""
    store = behind.open(is_quick=is_quick)
    data = os.urandom(MIB) * 10
    for method in ("PUT", "GET", "HEAD", "DELETE"):
        behind.proxy.inject(fault, method=method, times=2)
    store.put("small", b"value")
    store.put("claimed", b"ours", if_absent=True)
    for operation in ("uploads", "partNumber=1", "partNumber=2"):
        behind.proxy.inject(fault, containing=operation)
    with store.writer("large") as writer:
        writer.write(data)
        writer.commit()
    assert store.get("small") == b"value"
    assert store.get_range("small", 1, 2) == b"al"
    assert store.get("large") == data
    assert store.stat("small").size == 5
    assert [info.key for info in store.list()] == ["claimed", "large", "small"]
    store.delete("small")
    assert [info.key for info in store.list()] == ["claimed", "large"]
    store.close()


def test_our_own_object_is_not_somebody_elses(behind: Behind) -> None:
    """A conditional put whose answer was lost has worked: the object that the next attempt meets is ours."""
    store = behind.open()
    behind.proxy.inject(lose_answer, method="PUT")
    store.put("claim", b"ours", if_absent=True)
    assert behind.proxy.count("PUT") == 2
    assert store.get("claim") == b"ours"
    behind.proxy.inject(lose_answer, method="PUT")
    with pytest.raises(ObjectExists):
        store.put("claim", b"theirs", if_absent=True)
    store.close()


@pytest.mark.parametrize("if_absent", [False, True])
def test_an_upload_that_was_completed_unheard(behind: Behind, if_absent: bool) -> None:
    """When the answer to completing an upload is lost, the object counts as written, and is whole."""
    store = behind.open()
    behind.proxy.inject(lose_answer, method="POST", containing="uploadId=")
    data = os.urandom(9 * MIB)
    with store.writer("key", if_absent=if_absent) as writer:
        writer.write(data)
        writer.commit()
    assert behind.proxy.count("POST", "uploadId=") == 2
    assert store.get("key") == data
    store.close()


def test_truncated_answers(behind: Behind) -> None:
    """An answer that ends early is noticed and asked for again, for whole objects and for ranges."""
    store = behind.open()
    data = os.urandom(3 * MIB)
    store.put("key", data)
    behind.proxy.inject(truncate_answer, method="GET", times=2)
    assert store.get("key") == data
    behind.proxy.inject(truncate_answer, method="GET", times=2)
    assert store.get_range("key", MIB, MIB) == data[MIB : 2 * MIB]
    assert behind.proxy.count("GET") == 6
    store.close()


def test_silence_is_waited_out(behind: Behind, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that gets no answer in time is sent again."""
    monkeypatch.setattr(client_module, "SILENCE_S", 0.5)
    store = behind.open()
    store.put("key", b"value")
    released = threading.Event()
    behind.proxy.inject(hold_until(released), method="GET")
    assert store.get("key") == b"value"
    released.set()
    store.close()


LONELY = ("PUT", "POST", "partNumber=1", "uploadId=", "GET", "HEAD", "DELETE", "list-type")


@pytest.mark.parametrize("where", LONELY)
def test_a_lost_answer_is_asked_for_again(
    behind: Behind, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Within the patience with a store that is silent for ever; what it was asked for may have been done."""
    monkeypatch.setattr(client_module, "SILENCE_S", 0.7)
    monkeypatch.setattr(client_module, "_LOOK_S", 0.05)
    store = behind.open(patience_s=20)  # less than READ_TIMEOUT_S, and a slow server may seem silent too
    behind.proxy.inject(swallow_answer, **{"method" if where.isupper() else "containing": where})
    data = os.urandom(9 * MIB)
    with store.writer("large", if_absent=True) as writer:
        writer.write(data)
        writer.commit()
    store.put("small", b"value", if_absent=True)
    assert store.get("large") == data
    assert store.stat("small").size == 5
    assert [info.key for info in store.list()] == ["large", "small"]
    store.delete("small")
    assert not behind.proxy.waiting, "no answer was lost"
    store.close()


def test_an_answer_is_waited_for_while_others_come(behind: Behind, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that works off one request after the other is slow, not silent: nothing is sent twice."""
    monkeypatch.setattr(client_module, "SILENCE_S", 1)
    monkeypatch.setattr(client_module, "_LOOK_S", 0.05)
    store = behind.open()
    works = threading.Lock()

    def work_off(exchange: Exchange) -> None:
        body = exchange.read_body()
        with works:
            time.sleep(0.4)
            exchange.answer(*exchange.forward(body))

    behind.proxy.inject(work_off, method="PUT", times=float("inf"))
    data = os.urandom(40 * MIB)
    store.put("key", data)
    assert store.get("key") == data
    assert behind.proxy.count("PUT") == 5
    store.close()


def test_a_lost_answer_among_others_is_asked_for_again(
    behind: Behind, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though it was waited for longer than there is patience, because the store lived."""
    monkeypatch.setattr(client_module, "SILENCE_S", 0.5)
    monkeypatch.setattr(client_module, "READ_TIMEOUT_S", 2)
    monkeypatch.setattr(client_module, "_LOOK_S", 0.05)
    store = behind.open(patience_s=1)
    behind.proxy.inject(swallow_answer, method="GET")
    store.put("key", b"value")
    with ThreadPoolExecutor(1) as threads:
        asked = threads.submit(store.get, "key")
        while not asked.done():
            if behind.proxy.count("GET"):
                assert store.get("key") == b"value"
            time.sleep(0.05)
    assert asked.result() == b"value"
    store.close()


def test_bytes_that_come_are_a_sign_of_life(behind: Behind, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who waits beside a large download on a slow line waits on: nothing is asked for twice."""
    monkeypatch.setattr(client_module, "SILENCE_S", 0.7)
    monkeypatch.setattr(client_module, "_LOOK_S", 0.05)
    store = behind.open()
    data = os.urandom(MIB)
    store.put("large", data)
    store.put("small", b"value")
    begun = threading.Event()

    def send_slowly(exchange: Exchange) -> None:
        response, body = exchange.forward(exchange.read_body())
        exchange.answer(response, body, 0)
        begun.set()
        for at in range(0, MIB, MIB // 16):
            time.sleep(0.15)
            exchange.handler.wfile.write(body[at : at + MIB // 16])

    def answer_late(exchange: Exchange) -> None:
        time.sleep(1.5)
        pass_on(exchange)

    behind.proxy.inject(send_slowly, method="GET", containing="large")
    behind.proxy.inject(answer_late, method="GET", containing="small")
    with ThreadPoolExecutor(1) as threads:
        large = threads.submit(store.get, "large")
        begun.wait()
        assert store.get("small") == b"value"
        assert large.result() == data
    assert behind.proxy.count("GET") == 2
    store.close()


def test_a_download_that_stands_still_for_a_while(behind: Behind, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is waited for as a line that takes no bytes is: nothing is asked for twice."""
    monkeypatch.setattr(client_module, "SILENCE_S", 0.5)
    store = behind.open()
    store.put("key", b"value")

    def stand_still(exchange: Exchange) -> None:
        response, body = exchange.forward(exchange.read_body())
        exchange.answer(response, body, 1)
        time.sleep(1.5)
        exchange.handler.wfile.write(body[1:])

    behind.proxy.inject(stand_still, method="GET")
    assert store.get("key") == b"value"
    assert behind.proxy.count("GET") == 1
    store.close()


def test_a_refusal_before_the_body_over_tls(
    s3: Callable[[str], S3Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What comes in place of `100 Continue`, all in one record of TLS, is heard, not waited for."""
    import trustme

    monkeypatch.setattr(client_module, "SILENCE_S", 3)
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    server = s3("moto")
    monkeypatch.setenv("AWS_CA_BUNDLE", str(tmp_path / "ca.pem"))
    over = threading.Event()

    def refuse(listener: socket.socket) -> None:
        with context.wrap_socket(listener.accept()[0], server_side=True) as peer:
            asked = b""
            while not asked.endswith(b"\r\n\r\n"):
                asked += peer.recv(65536)
            body = b"<Error><Code>SlowDown</Code></Error>"
            peer.sendall(b"HTTP/1.1 503 Slow Down\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
            over.wait()

    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as threads:
        served = threads.submit(refuse, listener)
        try:
            store = open_store(
                server.url(), endpoint_url=f"https://127.0.0.1:{listener.getsockname()[1]}", patience_s=0
            )
            assert isinstance(store, S3Store)
            assert store._bucket.connection
            with pytest.raises(StoreError) as caught:
                store.put("key", os.urandom(4 * MIB))
            assert isinstance(caught.value.__cause__, ClientError)
        finally:
            over.set()
            served.result()
            store.close()


def test_a_line_that_takes_no_bytes_for_a_while(behind: Behind, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is waited for as an answer is, and longer than for a connection: nothing is sent twice."""
    monkeypatch.setattr(client_module, "CONNECT_TIMEOUT_S", 0.5)
    store = behind.open()
    data = os.urandom(20 * MIB)

    def take_late(exchange: Exchange) -> None:
        time.sleep(1.5)  # with its buffers full
        pass_on(exchange)

    behind.proxy.inject(take_late, method="PUT", times=float("inf"))
    store.put("key", data)
    assert store.get("key") == data
    assert behind.proxy.count("PUT") == 3
    store.close()


@pytest.mark.parametrize("size", [1000, 9 * MIB])
def test_bytes_damaged_on_the_way(s3: Callable[[str], S3Server], prefix: str, size: int) -> None:
    """A server that checks digests refuses a body that changed on the way; sent again it arrives whole."""
    behind = Behind(s3("swift"), prefix)
    store = behind.open()
    data = os.urandom(size)
    behind.proxy.inject(damage_request, method="PUT")
    store.put("key", data)
    assert store.get("key") == data
    store.close()
    impatient = behind.open(patience_s=0.5)
    impatient.warm()
    behind.proxy.inject(damage_request, method="PUT", times=1000)
    with pytest.raises(StoreError):
        impatient.put("other", data)
    impatient.close()
    assert [info.key for info in open_store(behind.server.url(prefix)).list()] == ["key"]
    behind.proxy.close()


def test_lasting_trouble_is_reported_in_time(behind: Behind) -> None:
    """When patience is over the store's own words come through, whatever was asked."""
    store = behind.open(patience_s=0.4)
    store.warm()
    behind.proxy.inject(answer(503, "SlowDown"), times=100_000)
    for attempt in (
        lambda: store.put("key", b"value"),
        lambda: store.put("key", b"value", if_absent=True),
        lambda: store.get("key"),
        lambda: list(store.list()),
        lambda: store.put("large", bytes(20 * MIB)),
    ):
        with pytest.raises(StoreError, match=r"SlowDown|503"):
            attempt()
    store.close()


def test_lasting_trouble_is_said_before_it_is_over(
    behind: Behind, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A command says on stderr what it waits for, and for how long; with --json there is its object alone."""
    monkeypatch.setattr(retrying, "TELL_AFTER_S", 0)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "4")
    behind.proxy.inject(answer(503, "SlowDown"), times=100_000)
    command = ["ls", "--store", behind.server.url("none"), "--endpoint-url", behind.proxy.endpoint_url]
    assert main(command) == 30
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("crcli:")]
    assert ["; trying again for up to" in line for line in said] == [True, False]
    assert main([*command, "--json"]) == 30
    out, err = capsys.readouterr()
    assert err == "" and json.loads(out)["error"]["code"] == "store"


@pytest.mark.alone
def test_a_failed_part_stops_the_writer(behind: Behind) -> None:
    """A part that cannot be sent fails a later write or commit, and the upload is aborted."""
    store = behind.open()
    behind.proxy.inject(answer(403, "AccessDenied"), containing="partNumber=2")
    with pytest.raises(StoreError, match="AccessDenied"), store.writer("key") as writer:
        for _ in range(30):
            writer.write(bytes(8 * MIB))
            time.sleep(0.02)
        writer.commit()
    store.close()
    assert behind.proxy.count("DELETE", "uploadId=") == 1
    assert behind.open().sweep(time.time()) == 0


def test_close_does_not_wait_out_patience(behind: Behind) -> None:
    """close ends the waiting of requests that would be tried again."""
    store = behind.open(patience_s=600)
    store.warm()
    behind.proxy.inject(answer(503, "SlowDown"), method="PUT", times=100_000)
    errors: list[Exception] = []

    def put() -> None:
        try:
            store.put("large", bytes(20 * MIB))
        except StoreError as error:
            errors.append(error)

    thread = threading.Thread(target=put)
    thread.start()
    time.sleep(1)
    store.close()
    thread.join(60)
    assert errors and not thread.is_alive()


ASKED: dict[str, Callable[[Store], object]] = {
    "get": lambda store: store.get("key"),
    "range": lambda store: store.get_range("key", 1, 2),
    "list": lambda store: list(store.list("folder/")),
    "stat": lambda store: store.stat("key"),
    "missing": lambda store: store.missing(["key", "other"]),
    "put": lambda store: store.put("new", b"value"),
    "claim": lambda store: store.put("new", b"value", if_absent=True),
    "upload": lambda store: store.put("large", bytes(20 * MIB)),
    "delete": lambda store: store.delete("key"),
    "warm": lambda store: store.warm(),
}


@pytest.mark.parametrize("is_quick", [False, True], ids=["botocore", "obstore"])
@pytest.mark.parametrize("what", ASKED)
def test_a_store_that_is_given_up_is_not_waited_for(behind: Behind, what: str, is_quick: bool) -> None:
    """Who waits for an answer that has begun and does not end goes on, and the store can be closed."""
    store = behind.open(is_quick=is_quick)
    trickle = Trickle()
    behind.proxy.inject(trickle, times=float("inf"))
    errors: list[Exception] = []

    def ask() -> None:
        try:
            ASKED[what](store)
        except StoreError as error:
            errors.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    assert trickle.begun.wait(60)
    store.give_up()
    thread.join(60)
    assert errors and not thread.is_alive()
    store.close()


@pytest.mark.parametrize("is_quick", [False, True], ids=["botocore", "obstore"])
@pytest.mark.parametrize("what", [what for what in ASKED if what != "delete"])
def test_a_web_page_is_no_store(behind: Behind, what: str, is_quick: bool) -> None:
    """It is neither an empty listing, nor an object, nor a sign that one was written."""
    store = behind.open(is_quick=is_quick)
    behind.proxy.inject(web_page, times=float("inf"))
    with pytest.raises(StoreError, match="not as S3 does"):
        ASKED[what](store)
    store.close()


@pytest.mark.parametrize("is_quick", [False, True], ids=["botocore", "obstore"])
@pytest.mark.parametrize("what", [what for what in ASKED if what not in ("delete", "stat", "missing")])
def test_a_page_that_is_not_there_is_no_object_that_is_not_there(
    behind: Behind, what: str, is_quick: bool
) -> None:
    """Who stands before a store that is gone, or at another address, says 404 and no more. To take it for the
    store's word would be to start a job afresh, or to call an image damaged."""
    store = behind.open(is_quick=is_quick)
    behind.proxy.inject(partial(web_page, status=404), times=float("inf"))
    with pytest.raises(StoreError, match="404") as caught:
        ASKED[what](store)
    assert type(caught.value) is StoreError and "--endpoint-url" in caught.value.hint
    store.close()


@pytest.mark.parametrize("is_quick", [False, True], ids=["botocore", "obstore"])
@pytest.mark.parametrize("what", ["get", "list", "stat", "claim"])
def test_where_a_store_sends_to_is_not_asked(behind: Behind, what: str, is_quick: bool) -> None:
    """A redirect is said at once, with the address."""
    store = behind.open(is_quick=is_quick)
    behind.proxy.inject(send_elsewhere, times=float("inf"))
    with pytest.raises(StoreError, match="302") as caught:
        ASKED[what](store)
    assert f"sends to {behind.proxy.endpoint_url}:" in caught.value.hint
    store.close()


@pytest.mark.parametrize("is_quick", [False, True], ids=["botocore", "obstore"])
@pytest.mark.parametrize("what", ["get", "list", "stat"])
def test_who_only_reads_is_not_told_of_a_taken_name(behind: Behind, what: str, is_quick: bool) -> None:
    """What a proxy answers with 412 is a refusal like any other."""
    store = behind.open(is_quick=is_quick)
    behind.proxy.inject(answer(412, ""), times=float("inf"))
    with pytest.raises(StoreError, match="412") as caught:
        ASKED[what](store)
    assert not isinstance(caught.value, ObjectExists)
    assert "--endpoint-url" in caught.value.hint
    store.close()


def test_a_store_that_is_waited_for_is_named(
    behind: Behind, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Once, when the first answer takes long; with --json nothing is said."""
    monkeypatch.setattr(calls, "LAST_S", 0.1)
    url = behind.server.url("none")
    command = ["ls", "--store", url, "--endpoint-url", behind.proxy.endpoint_url]
    for more, said in ([], [f"crcli: waiting for {url}"]), (["--json"], []):
        released = threading.Event()
        behind.proxy.inject(hold_until(released))
        threading.Timer(1, released.set).start()
        assert main([*command, *more]) == 0
        assert [line for line in capsys.readouterr().err.splitlines() if "waiting" in line] == said


def test_a_pause_of_an_upload_ends_when_the_store_is_given_up(
    behind: Behind, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the pause has an end of its own."""
    monkeypatch.setattr(retrying, "FIRST_PAUSE_S", 10_000)
    monkeypatch.setattr(retrying, "LONGEST_PAUSE_S", 10_000)
    monkeypatch.setattr(retrying.random, "uniform", lambda _, high: high)
    store = behind.open(patience_s=100_000)
    behind.proxy.inject(answer(503, "SlowDown"), method="POST", times=float("inf"))
    with store.writer("large") as writer:
        writer.write(bytes(20 * MIB))
        while not behind.proxy.count("POST"):
            time.sleep(0.01)
    store.close()


def test_credentials_are_not_retried(s3: Callable[[str], S3Server], monkeypatch: pytest.MonkeyPatch) -> None:
    """A refusal that will not pass is reported after one request."""
    server = s3("swift")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    behind = Behind(server, "x")
    store = behind.open()
    with pytest.raises(StoreError, match="SignatureDoesNotMatch"):
        store.put("key", b"value")
    assert len(behind.proxy.requests) == 1
    store.close()
    behind.proxy.close()


def test_max_attempts_of_the_aws_tools(behind: Behind, monkeypatch: pytest.MonkeyPatch) -> None:
    """AWS_MAX_ATTEMPTS bounds the attempts here too, and they are not multiplied by botocore's."""
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "3")
    store = behind.open()
    behind.proxy.inject(answer(500, "InternalError"), times=100)
    with pytest.raises(StoreError, match="InternalError"):
        store.get("key")
    assert len(behind.proxy.requests) == 3
    store.close()


@pytest.mark.parametrize("value", ["x", "1.5", ""])
def test_attempts_that_are_no_number_are_named(
    behind: Behind, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    """Who set it hears which setting it is."""
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", value)
    with pytest.raises(StoreError, match="AWS_MAX_ATTEMPTS"):
        behind.open().get("key")


# --- credentials that do not last --------------------------------------------------------------------------


@pytest.mark.parametrize("is_warm", [False, True])
def test_credentials_that_were_renewed_are_taken(
    s3: Callable[[str], S3Server], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, prefix: str, is_warm: bool
) -> None:
    """Those of a session expire within hours, and a job runs for days: what stands in the credentials file
    by then is taken, by all who ask at once. Else no lease could be renewed, and jobs would stand still."""
    server = s3("moto")
    file = tmp_path / "credentials"
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))

    def log_in(key_id: str) -> None:
        lines = (f"aws_access_key_id = {key_id}", "aws_secret_access_key = x", "aws_session_token = y")
        file.write_text("\n".join(("[default]", *lines, "")))

    def expire(exchange: Exchange) -> None:
        is_old = "Credential=OLD/" in exchange.handler.headers.get("Authorization", "")
        (answer(400, "ExpiredToken") if is_old else pass_on)(exchange)

    log_in("OLD")
    with FaultyProxy(server) as proxy:
        store = open_store(server.url(prefix), endpoint_url=proxy.endpoint_url, patience_s=5)
        if is_warm:
            store.warm(for_writing=True)
        store.put("key", b"value")
        proxy.inject(expire, times=1000)
        with pytest.raises(StoreError, match="Expired") as caught:
            store.get("key")
        assert "expired" in caught.value.hint
        log_in("NEW")
        with ThreadPoolExecutor(8) as threads:
            assert set(threads.map(lambda _: store.get("key"), range(16))) == {b"value"}
        assert store.stat("key").size == 5
        store.put("key", b"another")
        log_in("OLD")
        assert store.get("key") == b"another", "nobody looks for others while these are good"
        store.close()
