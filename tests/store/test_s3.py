"""What only S3 stores promise: settings as the AWS tools take them, and refusals in words."""

from __future__ import annotations

import os
import re
import socket
import threading
from typing import TYPE_CHECKING, Any

import pytest
from botocore import exceptions as boto

from crcli.config import StoreChoice
from crcli.errors import NotFound, ObjectExists, StoreError, StoreUnreachable
from crcli.guard.doctor import places
from crcli.image.gc import collect_garbage
from crcli.store import open_store
from crcli.store.address import StoreAddress
from crcli.store.s3 import S3Store
from crcli.store.s3 import bucket as bucket_module
from crcli.store.s3 import client as client_module
from crcli.store.s3.body import CRUMB, SEND_AT_ONCE, Body
from crcli.store.s3.errors import Place, translate
from crcli.store.s3.settings import S3Settings
from crcli.store.s3.uploads import PART_SIZE, PARTS_IN_FLIGHT
from tests.support.faulty_proxy import FaultyProxy, hold_until

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.support.s3servers import S3Server

    Choose = Callable[[str], S3Server]

MIB = 1 << 20


@pytest.fixture(autouse=True)
def short_first_contact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do not wait long for stores that are meant not to answer."""
    monkeypatch.setattr(bucket_module, "FIRST_CONTACT_PATIENCE_S", 0.5)


def refusal(url: str, **options: Any) -> StoreError:
    """The error with which warming a store fails."""
    store = open_store(url, **options)
    with pytest.raises(StoreError) as caught:
        store.warm()
    store.close()
    assert caught.value.exit_code == 30
    return caught.value


@pytest.mark.parametrize("variable", ["AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID"])
def test_wrong_credentials(s3: Choose, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    """A server that checks signatures refuses wrong credentials at once, and the hint is about them."""
    server = s3("swift")
    monkeypatch.setenv(variable, "wrong")
    error = refusal(server.url("x"))
    assert "SignatureDoesNotMatch" in error.message
    assert "credentials" in error.hint


def test_no_credentials(s3: Choose, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without credentials nothing is sent, and the hint lists the ways to give them."""
    server = s3("swift")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("SUDO_USER", raising=False)
    assert "AWS_PROFILE" in refusal(server.url("x")).hint
    assert "sudo" not in refusal(server.url("x")).hint
    monkeypatch.setenv("SUDO_USER", "somebody")
    assert "sudo -E" in refusal(server.url("x")).hint


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("AWS_ENDPOINT_URL", "nonsense"),
        ("AWS_ENDPOINT_URL", "http://[1"),
        ("AWS_ENDPOINT_URL", "http://127.0.0.1:port"),
        ("AWS_MAX_ATTEMPTS", "many"),
        ("AWS_ACCESS_KEY_ID", "with a line break\n"),
    ],
)
def test_settings_that_make_no_sense(
    s3: Choose, monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    """Variables that no client can use are refused like any other store that cannot be used."""
    server = s3("moto")
    monkeypatch.setenv(variable, value)
    assert refusal(server.url("x")).hint


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"AWS_ENDPOINT_URL": "http://user:SECRET@127.0.0.1:9/a?b"}, "not a valid URI"),
        ({"AWS_SESSION_TOKEN": "SECRET\nb"}, "line break"),
        (
            {"AWS_WEB_IDENTITY_TOKEN_FILE": "/nowhere", "AWS_ROLE_ARN": "role", "AWS_ACCESS_KEY_ID": ""},
            "cannot be used: .*/nowhere",
        ),
    ],
)
def test_what_is_secret_is_not_shown(
    s3: Choose, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], words: str
) -> None:
    """What is wrong with the settings is said at once, without passwords and tokens, and not as the network's
    fault."""
    url = s3("moto").url("x")
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    error = refusal(url)
    assert re.search(words, error.message), error.message
    assert "SECRET" not in error.message and "network" not in error.hint


def test_unknown_profile(s3: Choose) -> None:
    """A profile that does not exist is named."""
    error = refusal(s3("swift").url("x") + "?profile=nowhere")
    assert "nowhere" in error.message
    assert "list-profiles" in error.hint


@pytest.mark.parametrize("leg", ["moto", "swift"])
def test_no_bucket(s3: Choose, leg: str) -> None:
    """A missing bucket is not a missing object: the store is refused (exit 30), with a way to create it."""
    s3(leg)
    error = refusal("s3://no-such-bucket/x")
    assert not isinstance(error, NotFound)
    assert "aws s3 mb s3://no-such-bucket" in error.hint
    store = open_store("s3://no-such-bucket/x")
    with pytest.raises(StoreError, match="NoSuchBucket"):
        store.put("key", b"value")
    store.close()


def test_untrusted_certificate(s3: Choose, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server whose certificate nobody vouches for is refused at once; the hint names AWS_CA_BUNDLE."""
    server = s3("moto-tls")
    monkeypatch.delenv("AWS_CA_BUNDLE")
    error = refusal(server.url("x"))
    assert "CERTIFICATE_VERIFY_FAILED" in error.message
    assert "AWS_CA_BUNDLE" in error.hint
    monkeypatch.setenv("AWS_CA_BUNDLE", "/nowhere.pem")
    assert "not there" in refusal(server.url("x")).hint


def test_tls_and_plain_mixed_up(s3: Choose) -> None:
    """https:// to a server of plain HTTP is told apart from a broken connection."""
    server = s3("swift")
    assert (
        "http://" in refusal(server.url(), endpoint_url=server.endpoint_url.replace("http:", "https:")).hint
    )


def test_nobody_listens(s3: Choose) -> None:
    """An endpoint where nobody listens, or that has no address, is reported soon in the system's words."""
    server = s3("moto")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        assert "Connection refused" in refusal(server.url(), endpoint_url=f"http://127.0.0.1:{port}").message
    error = refusal(server.url(), endpoint_url="http://name.invalid")
    assert "name.invalid" in error.message
    assert "--endpoint-url" in error.hint


def test_credentials_in_an_endpoint_are_not_shown(s3: Choose, monkeypatch: pytest.MonkeyPatch) -> None:
    """The AWS tools take an endpoint with a password in it; messages go into logs and reports."""
    server = s3("moto")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://alice:s3cret@127.0.0.1:{port}/path")
        error = refusal(server.url())
    assert f"http://127.0.0.1:{port}/path" in error.message
    assert "s3cret" not in f"{error.message} {error.hint}"


def test_a_store_that_never_answers(s3: Choose, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that takes a connection and says nothing is given up after the time limit."""
    monkeypatch.setattr(client_module, "SILENCE_S", 0.3)
    server = s3("moto")
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        error = refusal(server.url(), endpoint_url=f"http://127.0.0.1:{silent.getsockname()[1]}")
    assert "does not answer in time" in error.message


def test_listing_may_be_forbidden(s3: Choose, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who may not list can still warm a store: writing and reading may be allowed."""
    from tests.support.faulty_proxy import answer

    server = s3("moto")
    with FaultyProxy(server) as proxy:
        proxy.inject(answer(403, "AccessDenied"), method="GET", containing="list-type=2", times=2)
        store = open_store(server.url("x"), endpoint_url=proxy.endpoint_url)
        store.warm(for_writing=True)
        with pytest.raises(StoreError) as caught:
            list(store.list())
        store.close()
    assert "s3:ListBucket on crcli-test" in caught.value.hint
    assert "crcli-test/x/*" in caught.value.hint


def response(status: int, code: str, **headers: str) -> Any:
    """What botocore makes of a refusal."""
    metadata = {"HTTPStatusCode": status, "HTTPHeaders": headers}
    return boto.ClientError({"Error": {"Code": code}, "ResponseMetadata": metadata}, "PutObject")


@pytest.mark.parametrize(
    ("refused", "kind", "hint"),
    [
        (response(404, "NoSuchKey"), NotFound, ""),
        (response(412, "PreconditionFailed"), ObjectExists, "wrote it first"),
        (response(403, "RequestTimeTooSkewed", date="Thu, 1 Jan 1970"), StoreError, "Thu, 1 Jan 1970"),
        (
            response(301, "PermanentRedirect", **{"x-amz-bucket-region": "eu-west-3"}),
            StoreError,
            "region=eu-west-3",
        ),
        (response(400, "ExpiredToken"), StoreError, "expired"),
        (response(400, "KMS.DisabledException"), StoreError, "KMS key"),
        (response(507, "InsufficientStorage"), StoreError, "crcli gc"),
        (response(418, "Teapot"), StoreError, ""),
    ],
)
def test_refusals(refused: Exception, kind: type[StoreError], hint: str) -> None:
    """Each refusal that a user can do something about says what."""
    error = translate(refused, Place("bucket", "prefix/", "https://store"), "key")
    assert type(error) is kind
    assert hint in error.hint
    assert "key" in error.message


def test_every_error_of_botocore_is_translated() -> None:
    """Whatever botocore raises becomes a StoreError that says where it happened, with a hint."""
    for name, kind in vars(boto).items():
        if isinstance(kind, type) and issubclass(kind, boto.BotoCoreError):
            error = translate(kind.__new__(kind), Place("bucket", "", "https://store"))
            assert type(error) in (StoreError, StoreUnreachable), name
            assert error.hint, name


class Sent(Exception):
    """Instead of sending a request, its URL."""


def address_of(store: Any) -> str:
    """Where a request for an object would go."""

    def instead(request: Any, **_: Any) -> None:
        raise Sent(request.url)

    store._bucket.connection.client.meta.events.register("before-send.s3", instead)
    with pytest.raises(Sent) as caught:
        store.stat("key")
    return str(caught.value)


def test_settings_of_the_aws_tools(
    s3: Choose, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, prefix: str
) -> None:
    """Credentials, endpoint, region and addressing style of a profile in ~/.aws are used."""
    server = s3("swift")
    config = tmp_path / "config"
    config.write_text(
        f"[profile lab]\nregion = us-east-1\nendpoint_url = {server.endpoint_url}\n"
        f"aws_access_key_id = {server.env['AWS_ACCESS_KEY_ID']}\n"
        f"aws_secret_access_key = {server.env['AWS_SECRET_ACCESS_KEY']}\n"
        "[profile hosted]\naws_access_key_id = id\naws_secret_access_key = secret\n"
        "endpoint_url = https://objects.example\ns3 =\n  addressing_style = virtual\n"
    )
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    monkeypatch.delenv("AWS_DEFAULT_REGION")
    hosted = open_store("s3://crcli-test/x?profile=hosted")
    assert address_of(hosted) == "https://crcli-test.objects.example/x/key"
    hosted.close()
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    by_option = open_store(f"{server.url(prefix)}?profile=lab")
    by_option.put("key", b"value")
    by_option.close()
    monkeypatch.setenv("AWS_PROFILE", "lab")
    by_variable = open_store(server.url(prefix))
    assert by_variable.get("key") == b"value"
    by_variable.close()


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("s3://bkt/p?region=eu-north-1", "https://bkt.s3.eu-north-1.amazonaws.com/p/key"),
        (
            "s3://bkt/p?region=eu-north-1&addressing_style=path",
            "https://s3.eu-north-1.amazonaws.com/bkt/p/key",
        ),
        ("s3://bkt/p?endpoint_url=http://10.0.0.1:9000", "http://10.0.0.1:9000/bkt/p/key"),
        ("s3://bkt/p?endpoint_url=http://localhost:9000", "http://localhost:9000/bkt/p/key"),
        ("s3://bkt/p?endpoint_url=https://s.example&addressing_style=virtual", "https://bkt.s.example/p/key"),
    ],
)
def test_addresses(monkeypatch: pytest.MonkeyPatch, url: str, expected: str) -> None:
    """AWS is spoken to in virtual-host style, other endpoints in path style, unless told otherwise."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "id")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/dev/null")
    store = open_store(url)
    assert address_of(store) == expected
    assert StoreAddress.parse(store.url) == StoreAddress.parse(url)
    store.close()


@pytest.mark.parametrize(
    ("endpoint_url", "variable", "signed"),
    [
        ("https://objects.example", "", False),
        ("http://127.0.0.1:9000", "", False),
        ("http://10.0.0.1:9000", "", None),
        ("https://objects.example", "payload_signing_enabled = true", True),
    ],
)
def test_payloads_are_signed_where_it_matters(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, endpoint_url: str, variable: str, signed: bool | None
) -> None:
    """Bodies go unsigned over TLS and loopback only; the user's own setting wins."""
    config = tmp_path / "config"
    config.write_text(f"[default]\ns3 =\n  max_concurrent_requests = 1\n  {variable}\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    connection = client_module.connect(S3Settings(endpoint_url=endpoint_url))
    assert (connection.client.meta.config.s3 or {}).get("payload_signing_enabled") is signed


@pytest.mark.parametrize("size", [10, 9 * MIB])
def test_encryption_at_rest(s3: Choose, monkeypatch: pytest.MonkeyPatch, prefix: str, size: int) -> None:
    """Objects are encrypted with the key that the URL or the environment asks for."""
    server = s3("moto")
    by_option = open_store(f"{server.url(prefix)}?sse=aws:kms&sse_kms_key_id=alias/a")
    by_option.put("option", bytes(size))
    by_option.close()
    monkeypatch.setenv("CRCLI_S3_SSE_KMS_KEY_ID", "alias/b")
    by_variable = open_store(server.url(prefix))
    with by_variable.writer("variable") as writer:
        writer.write(bytes(size))
        writer.commit()
    by_variable.close()
    for key, key_id in (("option", "alias/a"), ("variable", "alias/b")):
        head = server.client().head_object(Bucket=server.bucket, Key=f"{prefix}/{key}")
        assert (head["ServerSideEncryption"], head["SSEKMSKeyId"]) == ("aws:kms", key_id)


@pytest.mark.parametrize("leg", ["moto", "swift"])
def test_without_newer_checksums(s3: Choose, monkeypatch: pytest.MonkeyPatch, leg: str, prefix: str) -> None:
    """With AWS_REQUEST_CHECKSUM_CALCULATION=when_required stores that know only MD5 can be used."""
    monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
    store = open_store(s3(leg).url(prefix))
    store.put("small", b"value", if_absent=True)
    store.put("large", bytes(9 * MIB), if_absent=True)
    assert store.get("small") == b"value"
    assert store.get("large") == bytes(9 * MIB)
    store.close()


def test_long_listings(s3: Choose, prefix: str) -> None:
    """A listing goes on where a page of 1000 ends."""
    from concurrent.futures import ThreadPoolExecutor

    server = s3("moto")
    client = server.client()
    names = [f"{number:04d}" for number in range(1003)]
    with ThreadPoolExecutor(4) as threads:
        list(
            threads.map(
                lambda n: client.put_object(Bucket=server.bucket, Key=f"{prefix}/{n}", Body=b""), names
            )
        )
    store = open_store(server.url(prefix))
    assert [info.key for info in store.list()] == names
    store.close()


def test_stores_do_not_see_each_other(s3: Choose, prefix: str) -> None:
    """A store sees only what is below its prefix, not what merely begins alike."""
    server = s3("moto")
    one, other = open_store(server.url(prefix)), open_store(server.url(prefix + "-other"))
    one.put("key", b"1")
    other.put("key", b"2")
    server.client().put_object(Bucket=server.bucket, Key=f"{prefix}/not a key", Body=b"")
    assert [info.key for info in one.list()] == ["key"]
    assert one.get("key") == b"1"
    one.close()
    other.close()


def test_memory_in_flight_is_bounded(s3: Choose, prefix: str) -> None:
    """While the store does not answer, a writer takes what may be in flight and a part more, then blocks."""
    server = s3("moto")
    released, taken = threading.Event(), []
    with FaultyProxy(server) as proxy:
        proxy.inject(hold_until(released), method="PUT", containing="partNumber", times=1000)
        store = open_store(server.url(prefix), endpoint_url=proxy.endpoint_url)
        writer = store.writer("key")
        piece, pieces = bytes(PART_SIZE), PARTS_IN_FLIGHT + 4

        def write() -> None:
            for _ in range(pieces):
                writer.write(piece)
                taken.append(1)
            writer.commit()

        thread = threading.Thread(target=write)
        thread.start()
        thread.join(1.5)
        assert len(taken) == PARTS_IN_FLIGHT + 1
        released.set()
        thread.join(30)
        assert not thread.is_alive()
        assert store.stat("key").size == pieces * PART_SIZE
        store.close()


def test_a_body_reads_as_its_pieces() -> None:
    """A body gives its bytes in order, tells where it stands, and can be read again."""
    sizes = [0, 1, 7, CRUMB, 0, 3, CRUMB - 1, SEND_AT_ONCE + 5, 2, 2 * SEND_AT_ONCE, 0]
    pieces = [os.urandom(size) for size in sizes]
    body = Body()
    for piece in pieces:
        body.append(memoryview(piece))
    assert bytes(body) == b"".join(pieces)
    for _ in range(2):
        assert len(body) == sum(sizes)
        assert b"".join(iter(body.read, b"")) == b"".join(pieces)
        assert body.tell() == len(body)
        body.seek(0)
    assert Body.of(b"123456789").crc32() == "y/Q5Jg=="  # the check value of CRC-32
    with pytest.raises(ValueError, match="rewound"):
        body.seek(1)


def test_signed_payloads(s3: Choose, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, prefix: str) -> None:
    """Where bodies are signed, as over plain HTTP to another host, a server that checks takes them."""
    config = tmp_path / "config"
    config.write_text("[default]\ns3 =\n  payload_signing_enabled = true\n")
    server = s3("swift")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
    store = open_store(server.url(prefix))
    for key, size in (("small", 100), ("middle", MIB), ("large", 9 * MIB)):
        data = os.urandom(size)
        with store.writer(key) as writer:
            writer.write(data[:50])
            writer.write(data[50:])
            writer.commit()
        assert store.get(key) == data
    store.close()


@pytest.mark.parametrize(
    ("leg", "conditions"),
    [("moto", "honoured"), ("moto-ignores", "ignored"), ("moto-refuses", "refused"), ("swift", "honoured")],
)
def test_doctor_asks_what_a_store_can_do(s3: Choose, leg: str, conditions: str) -> None:
    """The doctor finds out what becomes of conditional writes, names the settings without any secret, and
    leaves nothing behind."""
    server = s3(leg)
    (check,) = places._store(StoreChoice(server.url("doctor"), None, "--store"))
    found = check.evidence
    assert (check.status, found["conditional_writes"]) == ("ok", conditions)
    assert found["round_trip_ms"] > 0 and found["endpoint"].startswith(("http://", "https://"))
    assert found["credentials_from"] == "env" and found["region"]
    assert os.environ["AWS_SECRET_ACCESS_KEY"] not in str(found)
    store = open_store(server.url("doctor"))
    assert list(store.list()) == []
    store.close()


def test_doctor_says_why_a_store_cannot_be_used(s3: Choose, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that refuses is something that the host lacks, with the store's own hint as its remedy."""
    server = s3("swift")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    (check,) = places._store(StoreChoice(server.url("doctor"), None, "--store"))
    assert check.status == "lacks" and "credentials" in check.remedy


def test_uploads_of_others_are_left_alone(s3: Choose, prefix: str) -> None:
    """In a bucket that is not crcli's alone somebody else's upload may take days: it is not aborted."""
    server = s3("moto")
    store = open_store(server.url(prefix))
    assert isinstance(store, S3Store)
    client, bucket = store._bucket.connection.client, store._bucket.name
    for key in ("films/holiday.mkv", "packs/films/holiday.mkv", f"packs/ab/{'ab' * 16}", "packs"):
        client.create_multipart_upload(Bucket=bucket, Key=f"{prefix}/{key}")
    collect_garbage(store)
    left = client.list_multipart_uploads(Bucket=bucket, Prefix=f"{prefix}/").get("Uploads", ())
    assert {upload["Key"] for upload in left} == {
        f"{prefix}/{key}" for key in ("films/holiday.mkv", "packs/films/holiday.mkv", "packs")
    }
    store.close()
