"""Requests that do not wait for botocore: the same objects, and the same words when something is wrong."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from crcli.errors import NotFound, ObjectExists, StoreError
from crcli.store import open_store, retrying
from crcli.store.s3 import S3Settings, S3Store, quick
from crcli.store.s3.client import connect
from crcli.store.s3.plain import plain_access
from crcli.store.s3.uploads import PART_SIZE
from tests.support.faulty_proxy import (
    FaultyProxy,
    answer,
    damage_request,
    hold_until,
    lose_answer,
    reset_midway,
    truncate_answer,
)

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Iterator
    from pathlib import Path
    from typing import Any

    from crcli.store import Store
    from tests.support.s3servers import S3Server

PACK = os.urandom(100_000)
KEYS = {"AWS_ACCESS_KEY_ID": "AKID", "AWS_SECRET_ACCESS_KEY": "secret"}


@pytest.fixture(params=["moto", "swift"])
def server(request: pytest.FixtureRequest, s3: Callable[[str], S3Server]) -> S3Server:
    """A server whose settings are plain."""
    return s3(request.param)


@pytest.fixture
def url(server: S3Server, prefix: str) -> str:
    """A store that somebody else has written."""
    writer = open_store(server.url(prefix))
    writer.put("packs/one", PACK)
    writer.put("images/a", b"first")
    writer.put("images/b", b"second")
    writer.put("imagesque", b"in no folder")
    writer.close()
    return server.url(prefix)


@pytest.fixture
def store(url: str) -> Iterator[S3Store]:
    """The store, opened by somebody who only reads."""
    opened = open_store(url, patience_s=5)
    assert isinstance(opened, S3Store)
    yield opened
    opened.close()


def has_asked_botocore(store: Store) -> bool:
    """Whether its client was made."""
    assert isinstance(store, S3Store)
    return store._bucket.is_connected


def test_what_is_read(store: S3Store) -> None:
    """Objects, ranges, descriptions and listings are read without botocore."""
    assert store.get("images/a") == b"first"
    assert store.get_range("packs/one", 1000, 70_000) == PACK[1000:71_000]
    assert store.stat("packs/one").size == len(PACK)
    assert [(info.key, info.size) for info in store.list("images/")] == [("images/a", 5), ("images/b", 6)]
    assert list(store.list("nothing/")) == []
    assert not has_asked_botocore(store)


def test_what_is_written(store: S3Store) -> None:
    """Objects of up to two parts are written, and objects deleted, without botocore."""
    store.put("images/c", b"third")
    store.put("images/c", b"third again")
    store.put("images/d", b"fourth", if_absent=True)
    with store.writer("packs/two") as writer:
        writer.write(PACK)
        writer.commit()
    with store.writer("packs/large") as writer:
        for _ in range(PART_SIZE // len(PACK) + 3):
            writer.write(PACK)
        writer.commit()
    store.delete("images/a")
    store.delete("images/a")
    assert store.get("images/c") == b"third again"
    assert store.get("packs/two") == PACK
    assert store.get("packs/large") == PACK * (PART_SIZE // len(PACK) + 3)
    assert [info.key for info in store.list("images/")] == ["images/b", "images/c", "images/d"]
    assert not has_asked_botocore(store)


def test_what_is_written_in_parts(store: S3Store) -> None:
    """An object of more than two parts is botocore's, what was held back included."""
    data = os.urandom(2 * PART_SIZE + 5)
    with store.writer("packs/larger") as writer:
        writer.write(data)
        writer.commit()
    assert has_asked_botocore(store)
    assert store.get("packs/larger") == data


def test_a_store_that_is_opened_again(store: S3Store) -> None:
    """A store that was closed does nothing any more; opened again, it has the client that it had."""
    store.put("images/c", b"third")
    store.close()
    again = store.reopened()
    again.put("images/c", b"again")
    assert again.get("images/c") == b"again"
    assert not has_asked_botocore(again)
    assert again._quick._store is store._quick._store
    again.close()


def test_what_is_not_written_after_all(store: S3Store) -> None:
    """Parts that were held back are forgotten with the rest."""
    with store.writer("packs/no") as writer:
        writer.write(bytes(PART_SIZE + 1))
    assert not has_asked_botocore(store)
    assert [info.key for info in store.list("packs/")] == ["packs/one"]


def test_a_name_that_is_taken(store: S3Store) -> None:
    """Who wants a name that somebody has is told so, and nothing is changed."""
    with pytest.raises(ObjectExists):
        store.put("images/a", b"mine", if_absent=True)
    assert store.get("images/a") == b"first"


def test_encryption_is_left_to_botocore(s3: Callable[[str], S3Server], prefix: str) -> None:
    """Whoever wants objects encrypted gets them so: obstore is not told how."""
    server = s3("moto")
    store = open_store(f"{server.url(prefix)}?sse=AES256")
    store.put("images/c", b"third")
    assert has_asked_botocore(store)
    head = server.client().head_object(Bucket=server.bucket, Key=f"{prefix}/images/c")
    assert head["ServerSideEncryption"] == "AES256"
    store.close()


def test_an_endpoint_with_a_slash_behind_it(server: S3Server, url: str) -> None:
    """Endpoints are written with and without one."""
    store = open_store(url, endpoint_url=f"{server.endpoint_url}/")
    assert store.get("images/a") == b"first"
    assert not has_asked_botocore(store)
    store.close()


def test_it_says_what_botocore_says(store: S3Store) -> None:
    """Descriptions are the same whoever asks."""
    before = [store.stat("packs/one"), *store.list("images/")]
    store.warm()
    assert has_asked_botocore(store)
    assert [store.stat("packs/one"), *store.list("images/")] == before


def test_an_object_that_is_not_there(store: S3Store) -> None:
    """An absent object is told by its key, without asking twice."""
    with pytest.raises(NotFound, match="images/none"):
        store.get("images/none")
    with pytest.raises(NotFound, match="images/none"):
        store.get_range("images/none", 0, 10)
    assert not has_asked_botocore(store)
    with pytest.raises(NotFound, match="images/none"):
        store.stat("images/none")


def test_an_object_that_is_too_short(store: S3Store) -> None:
    """A range that an object does not have is refused, as by botocore."""
    with pytest.raises(StoreError, match="asked for"):
        store.get_range("images/a", 2, 10)
    with pytest.raises(StoreError):
        store.get_range("images/a", 100, 10)


def test_a_bucket_that_is_not_there(server: S3Server) -> None:
    """A missing bucket is explained by botocore's answer."""
    store = open_store("s3://crcli-no-such-bucket/x")
    with pytest.raises(StoreError, match="NoSuchBucket") as caught:
        store.get("key")
    assert "Create the bucket" in caught.value.hint


def test_a_long_listing(store: S3Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A listing that does not fit into one answer is whole, and read as far as somebody wants it."""
    monkeypatch.setattr(quick, "_AT_ONCE", 2)
    for name in "cdefg":
        store.put(f"images/{name}", b"more")
    assert [info.key for info in store.list("images/")] == [f"images/{name}" for name in "abcdefg"]
    assert next(store.list("images/", "images/c")).key == "images/d"
    assert not has_asked_botocore(store)


def test_what_is_looked_for_in_several_folders(server: S3Server, url: str) -> None:
    """No listing would tell of it, and botocore is not needed, as one of all that there is would."""
    with FaultyProxy(server) as proxy:
        store = open_store(url, endpoint_url=proxy.endpoint_url)
        assert store.missing(["packs/one", "images/a", "images/b"]) == set()
        assert (proxy.count("HEAD"), len(proxy.requests)) == (3, 3)
        assert not has_asked_botocore(store)
        store.close()


def test_what_lies_side_by_side_is_listed(server: S3Server, url: str) -> None:
    """One request tells of all that lie in a folder below another; what lies elsewhere is asked for by
    itself, and so is what lies at the top, among what is everybody's."""
    with FaultyProxy(server) as proxy:
        store = open_store(url, endpoint_url=proxy.endpoint_url)
        keys = [f"packs/ab/ab{number:02}" for number in range(5)]
        for key in (*keys, "packs/ab/aa", "indexes/a", "indexes/b", "indexes/c", "indexes/d", "indexes/e"):
            store.put(key, b"?")
        proxy.requests.clear()
        assert store.missing([*keys, "images/a"]) == set()
        assert (proxy.count("HEAD"), len(proxy.requests)) == (1, 2)
        assert not has_asked_botocore(store)
        gone = {"packs/ab/ab0", "packs/ab/ab001", "packs/ab/ac", "packs/cd/gone", "images/gone"}
        assert store.missing([*keys, *gone]) == gone
        proxy.requests.clear()
        assert store.missing([f"indexes/{name}" for name in "abcde"]) == set()
        assert (proxy.count("HEAD"), len(proxy.requests)) == (5, 5)
        store.close()


def test_of_a_listing_so_much_is_read_as_saves_requests(
    server: S3Server, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What lies far apart is asked for by itself, and what lies before all of it not told of."""
    monkeypatch.setattr("crcli.store.s3.store._WORTH_A_LISTING", 2)
    monkeypatch.setattr("crcli.store.s3.store._WORTH_ANOTHER_PAGE", 2)
    monkeypatch.setattr(quick, "_AT_ONCE", 3)
    with FaultyProxy(server) as proxy:
        store = open_store(url, endpoint_url=proxy.endpoint_url)
        for number in range(1, 22):
            store.put(f"packs/ab/{number:03}", b"?")
        proxy.requests.clear()
        keys = [f"packs/ab/{number:03}" for number in (10, 11, 13, 14, 16, 20)]
        assert store.missing(keys) == set()  # two, two, one, and then the last one by itself
        assert (proxy.count("HEAD"), len(proxy.requests)) == (1, 4)
        proxy.requests.clear()
        assert store.missing(keys[:2]) == set()  # after which no more is listed, though there is more
        assert len(proxy.requests) == 1
        assert not has_asked_botocore(store)
        gone = "packs/ab/0100"
        proxy.requests.clear()
        assert store.missing([*keys[:2], gone]) == {gone}  # it would have come before the end of the answer
        assert proxy.count("GET") == 1
        store.close()


def test_a_listing_by_the_beginning_of_a_name(store: S3Store) -> None:
    """What is listed need not be a folder."""
    assert [info.key for info in store.list("images")] == ["images/a", "images/b", "imagesque"]
    assert [info.key for info in store.list()] == ["images/a", "images/b", "imagesque", "packs/one"]


@pytest.mark.parametrize(
    "fault",
    [answer(503, "SlowDown"), answer(403, "AccessDenied"), reset_midway, lose_answer, truncate_answer],
    ids=["throttled", "denied", "reset", "answer lost", "truncated"],
)
def test_faults(server: S3Server, url: str, fault: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever goes wrong is asked again through botocore, which then does all."""
    monkeypatch.setattr(retrying, "FIRST_PAUSE_S", 0.01)
    with FaultyProxy(server) as proxy:
        store = open_store(url, endpoint_url=proxy.endpoint_url, patience_s=5)
        proxy.inject(fault, times=1)
        assert store.get_range("packs/one", 5, 50_000) == PACK[5:50_005]
        assert has_asked_botocore(store)
        asked = len(proxy.requests)
        assert store.get("images/a") == b"first"
        assert len(proxy.requests) == asked + 1
        store.close()


@pytest.mark.parametrize("if_absent", [False, True])
@pytest.mark.parametrize(
    "fault",
    [answer(503, "SlowDown"), answer(403, "AccessDenied"), reset_midway, lose_answer, damage_request],
    ids=["throttled", "denied", "reset", "answer lost", "damaged"],
)
def test_faults_of_writes(
    s3: Callable[[str], S3Server], prefix: str, fault: Any, if_absent: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was not written, or perhaps, is written by botocore, and is ours, also if a condition was set."""
    monkeypatch.setattr(retrying, "FIRST_PAUSE_S", 0.01)
    server = s3("swift")  # it compares what it got with what was signed
    with FaultyProxy(server) as proxy:
        store = open_store(server.url(prefix), endpoint_url=proxy.endpoint_url, patience_s=5)
        proxy.inject(fault, times=1, method="PUT")
        store.put("images/new", PACK, if_absent=if_absent)
        assert has_asked_botocore(store)
        assert store.get("images/new") == PACK
        store.close()


@pytest.mark.parametrize("is_ours", [True, False])
def test_a_name_that_was_perhaps_taken_by_us(
    server: S3Server, prefix: str, is_ours: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When no answer came, what stands under the name then says whether it is ours."""
    monkeypatch.setattr(retrying, "FIRST_PAUSE_S", 0.01)
    with FaultyProxy(server) as proxy:
        store = open_store(server.url(prefix), endpoint_url=proxy.endpoint_url, patience_s=5)

        def lose(*arguments: Any) -> None:
            lose_answer(*arguments)
            if not is_ours:
                open_store(server.url(prefix)).put("claim", b"theirs")

        proxy.inject(lose, times=1, method="PUT")
        if is_ours:
            store.put("claim", b"ours", if_absent=True)
        else:
            with pytest.raises(ObjectExists):
                store.put("claim", b"ours", if_absent=True)
        store.close()


def test_a_store_that_keeps_silent(server: S3Server, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer that does not come is not waited for long."""
    import threading

    released: threading.Event = threading.Event()
    monkeypatch.setattr(quick, "_SILENCE_S", 0.2)
    with FaultyProxy(server) as proxy:
        store = open_store(url, endpoint_url=proxy.endpoint_url, patience_s=5)
        proxy.inject(hold_until(released), times=1)
        assert store.get("images/a") == b"first"
        released.set()
        store.close()


def test_wrong_keys(s3: Callable[[str], S3Server], prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys that the store does not accept are reported with what to do."""
    server = s3("swift")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(StoreError, match="SignatureDoesNotMatch") as caught:
        open_store(server.url(prefix)).get("key")
    assert "does not accept" in caught.value.hint


READ_IN_A_CHILD = """
import os, sys
from crcli.store import open_store
url, forked = sys.argv[1:]
store = open_store(url)
assert store.get("images/a") == b"first"
if os.fork():
    _, status = os.wait()
    assert store.get("images/b") == b"second" and not store._bucket.is_connected
    os._exit(os.waitstatus_to_exitcode(status))
other = store.reopened() if forked == "reopened" else open_store(url) if forked == "anew" else store
right = other.get("images/b") == b"second" and other._bucket.is_connected
os._exit(0 if right else 3)
"""


@pytest.mark.parametrize("how", ["same", "reopened", "anew"])
def test_a_forked_process_reads_too(server: S3Server, url: str, how: str) -> None:
    """A process that is forked after reads does not wait for threads that it does not have."""
    subprocess.run([sys.executable, "-c", READ_IN_A_CHILD, url, how], check=True, timeout=60)


# --- whose settings are plain ------------------------------------------------------------------------------

FILES = {
    "keys": "[default]\naws_access_key_id = FILE\naws_secret_access_key = hidden\naws_session_token=t\n",
    "two profiles": "[default]\naws_access_key_id=FILE\naws_secret_access_key=hidden\n[other]\nregion=x\n",
    "a region": "[default]\nregion = eu-west-1\noutput = json\n",
    "an endpoint": "[default]\nendpoint_url = http://127.0.0.1:1\n",
    "a role": "[default]\nrole_arn = arn:aws:iam::1:role/r\nsource_profile = other\n",
    "a style": "[default]\nregion = eu-west-1\ns3 =\n  addressing_style = virtual\n",
    "a process": "[default]\ncredential_process = /bin/false\n",
    "rubbish": "no section\n",
    "": "",
}
PLAIN: list[tuple[dict[str, str], str, str, dict[str, str]]] = [
    (KEYS, "", "", {}),
    (KEYS | {"AWS_SESSION_TOKEN": "token"}, "", "", {}),
    (KEYS | {"AWS_ENDPOINT_URL": "http://127.0.0.1:9000"}, "", "", {}),
    (
        KEYS | {"AWS_ENDPOINT_URL": "http://127.0.0.1:9000", "AWS_ENDPOINT_URL_S3": "http://10.0.0.1"},
        "",
        "",
        {},
    ),
    (KEYS | {"AWS_ENDPOINT_URL": "http://127.0.0.1:9000"}, "", "", {"endpoint_url": "http://127.0.0.2:1"}),
    (KEYS | {"AWS_REGION": "eu-north-1", "AWS_DEFAULT_REGION": "eu-south-1"}, "", "", {}),
    (KEYS | {"AWS_DEFAULT_REGION": "eu-south-1"}, "", "a region", {}),
    (KEYS, "", "a region", {}),
    (KEYS, "", "a region", {"region": "ap-east-1"}),
    (KEYS, "keys", "", {}),
    (KEYS, "a role", "", {}),
    ({}, "keys", "a region", {}),
    ({}, "two profiles", "", {}),
    (KEYS | {"AWS_CA_BUNDLE": "/x", "AWS_ENDPOINT_URL": "http://127.0.0.1:9000"}, "", "", {}),
    (KEYS | {"https_proxy": "http://p:1", "AWS_ENDPOINT_URL": "http://127.0.0.1:9000"}, "", "", {}),
]
NOT_PLAIN: list[tuple[dict[str, str], str, str, dict[str, str]]] = [
    ({}, "", "", {}),
    ({"AWS_ACCESS_KEY_ID": "AKID"}, "keys", "", {}),
    ({}, "a role", "", {}),
    ({}, "a process", "", {}),
    ({}, "keys", "a role", {}),
    (KEYS, "", "an endpoint", {}),
    (KEYS, "", "a style", {}),
    (KEYS, "", "rubbish", {}),
    ({}, "rubbish", "", {}),
    (KEYS, "", "", {"profile": "default"}),
    (KEYS, "", "", {"addressing_style": "virtual"}),
    (KEYS | {"AWS_PROFILE": "default"}, "", "", {}),
    (KEYS | {"AWS_CA_BUNDLE": "/x"}, "", "", {}),
    (KEYS | {"REQUESTS_CA_BUNDLE": "/x"}, "", "", {}),
    (KEYS | {"https_proxy": "http://p:1"}, "", "", {}),
    (KEYS | {"HTTP_PROXY": "http://p:1", "AWS_ENDPOINT_URL": "http://127.0.0.1:9000"}, "", "", {}),
    (KEYS | {"AWS_USE_FIPS_ENDPOINT": "true"}, "", "", {}),
    (KEYS | {"AWS_MAX_ATTEMPTS": "3"}, "", "", {}),
    (KEYS | {"AWS_SKIP_SIGNATURE": "true"}, "", "", {}),
    (KEYS | {"AWS_DEFAULT_REGION": "cn-north-1"}, "", "", {}),
    (KEYS | {"AWS_ENDPOINT_URL": "http://[1"}, "", "", {}),
    (KEYS | {"AWS_ENDPOINT_URL": "http://127.0.0.1:port"}, "", "", {}),
    (KEYS | {"AWS_ENDPOINT_URL": "http://127.0.0.1:99999"}, "", "", {}),
    (KEYS | {"AWS_ACCESS_KEY_ID": "AKID\n"}, "", "", {}),
    (KEYS | {"AWS_SESSION_TOKEN": "token\r"}, "", "", {}),
    ({"AWS_WEB_IDENTITY_TOKEN_FILE": "/x", "AWS_ROLE_ARN": "arn:aws:iam::1:role/r"}, "", "", {}),
]


def settle(case: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> S3Settings:
    """Have this process's environment, and nothing else, hold the settings of a case."""
    variables, credentials, config, options = case
    for name in [*os.environ]:
        if name.startswith("AWS_") or name.upper().endswith(("_PROXY", "_CA_BUNDLE")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name, text in (("AWS_SHARED_CREDENTIALS_FILE", credentials), ("AWS_CONFIG_FILE", config)):
        (folder / name).write_text(FILES[text])
        monkeypatch.setenv(name, f"{folder}/{name}")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return S3Settings(**options)


@pytest.mark.parametrize("case", PLAIN, ids=range(len(PLAIN)))
def test_plain_settings_are_understood_as_botocore_does(
    case: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Endpoint, region and keys are those that botocore finds."""
    settings = settle(case, tmp_path, monkeypatch)
    access = plain_access("bucket", settings, os.environ)
    assert access is not None
    monkeypatch.delenv("AWS_CA_BUNDLE", raising=False)
    connection = connect(settings)
    keys = connection.client._get_credentials().get_frozen_credentials()
    assert (access.key_id, access.secret, access.token) == (keys.access_key, keys.secret_key, keys.token)
    assert access.region == connection.region
    aws = (f"https://s3.{access.region}.amazonaws.com", "https://s3.amazonaws.com")
    assert connection.endpoint_url in ((access.endpoint_url,) if access.endpoint_url else aws)


@pytest.mark.parametrize("case", NOT_PLAIN, ids=range(len(NOT_PLAIN)))
def test_other_settings_are_left_to_botocore(
    case: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What takes botocore to understand is not guessed at."""
    assert plain_access("bucket", settle(case, tmp_path, monkeypatch), os.environ) is None


@pytest.mark.parametrize("bucket", ["with.dots", "arn:aws:s3:::x", "a--use1-az1--x-s3", "Upper"])
def test_special_buckets_are_left_to_botocore(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names that mean more than a bucket, or that make a host's name of several parts."""
    settings = settle((KEYS, "", "", {}), tmp_path, monkeypatch)
    assert plain_access(bucket, settings, os.environ) is None


def test_keys_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files are looked for where the AWS tools look."""
    settings = settle(({}, "", "", {}), tmp_path, monkeypatch)
    monkeypatch.delenv("AWS_SHARED_CREDENTIALS_FILE")
    monkeypatch.delenv("AWS_CONFIG_FILE")
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".aws").mkdir()
    (tmp_path / ".aws/credentials").write_text(FILES["keys"])
    access = plain_access("bucket", settings, os.environ)
    assert access is not None and (access.key_id, access.token) == ("FILE", "t")
