"""URLs of stores: what is taken, and how what is not is refused."""

from __future__ import annotations

import subprocess
import sys

import pytest

from crcli.errors import UsageError
from crcli.image.names import ImageRef, parse_image
from crcli.store import open_store
from crcli.store.address import StoreAddress, split_name


@pytest.mark.parametrize(
    ("url", "scheme", "place", "options"),
    [
        ("/var/lib/crcli", "file", "/var/lib/crcli", {}),
        ("/var//lib/../lib/crcli/", "file", "/var/lib/crcli", {}),
        ("//var/lib/crcli", "file", "/var/lib/crcli", {}),
        ("/what?/100%#1", "file", "/what?/100%#1", {}),
        ("file:///var/lib/crcli", "file", "/var/lib/crcli", {}),
        ("file://localhost/var/lib/crcli", "file", "/var/lib/crcli", {}),
        ("file:///with%20space", "file", "/with space", {}),
        ("s3://bucket", "s3", "bucket", {}),
        ("s3://bucket/", "s3", "bucket", {}),
        ("s3://bucket/a//b/", "s3", "bucket/a/b", {}),
        (
            "s3://bucket/p?endpoint_url=http://10.0.0.1:9000&profile=lab",
            "s3",
            "bucket/p",
            {"endpoint_url": "http://10.0.0.1:9000", "profile": "lab"},
        ),
    ],
)
def test_good_urls(url: str, scheme: str, place: str, options: dict[str, str]) -> None:
    """Each way to write a store is taken apart as expected, and its canonical form means the same."""
    address = StoreAddress.parse(url)
    assert address == StoreAddress(scheme, place, options)
    assert StoreAddress.parse(address.url) == address


@pytest.mark.parametrize(
    ("url", "hint"),
    [
        ("", "file:///absolute/path"),
        ("images", "file:///"),
        ("relative/path", "file:///"),
        ("gs://bucket/prefix", "s3://bucket/prefix"),
        ("file://host/path", "file:///host/path"),
        ("file://", "file:///absolute/path"),
        ("file:///path?region=x", "%3F"),
        ("file:///", "file:///absolute/path"),
        ("/..", "file:///absolute/path"),
        ("/no\udcfftext", "file:///absolute/path"),
        ("/var/lib/crcli\r", "file:///absolute/path"),
        ("file:///nu%00ll", "file:///absolute/path"),
        ("s3://", "s3://bucket/prefix"),
        ("s3:///prefix", "s3://bucket/prefix"),
        ("s3://key:secret@bucket/prefix", "~/.aws/credentials"),
        ("s3://bucket/#1", "%23"),
        ("s3://bucket?nonsense=1", "endpoint_url"),
        ("s3://bucket?region", "name=value"),
        ("s3://bucket?endpoint_url=10.0.0.1:9000", "http://10.0.0.1:9000"),
        ("s3://bucket?endpoint_url=http://key:secret@host", "~/.aws/credentials"),
        ("s3://bucket?addressing_style=odd", "virtual"),
        ("s3://bucket:port/x", "s3://bucket/prefix"),
    ],
)
def test_bad_urls(url: str, hint: str) -> None:
    """Anything else is wrong usage (exit 2), and the hint shows a right one."""
    with pytest.raises(UsageError) as caught:
        open_store(url)
    assert caught.value.exit_code == 2
    assert hint in caught.value.hint


@pytest.mark.parametrize("url", ["file:/path", "s3:/bucket"])
def test_no_folder_is_made_of_a_url_that_lacks_a_slash(url: str) -> None:
    """It is told how URLs look, and not to write one of a folder called `s3:` here."""
    with pytest.raises(UsageError) as found:
        StoreAddress.parse(url)
    assert "For that directory" not in found.value.hint


def test_bad_endpoint_on_the_command_line() -> None:
    """An endpoint from the command line is looked at as one from the URL is."""
    with pytest.raises(UsageError, match="localhost:9000"):
        open_store("s3://bucket", endpoint_url="localhost:9000")


@pytest.mark.parametrize(
    ("store", "full"),
    [
        ("file:///var/lib/crcli", "file:///var/lib/crcli/agent@1"),
        ("s3://bucket/p", "s3://bucket/p/agent@1"),
        (
            "s3://bucket?region=x&endpoint_url=http://h:1/",
            "s3://bucket/agent@1?region=x&endpoint_url=http://h:1/",
        ),
    ],
)
def test_names_in_stores(store: str, full: str) -> None:
    """A name stands in a store's URL before the options."""
    assert split_name(full) == (store, "agent@1")


def test_a_plain_path_has_no_options() -> None:
    """The same folder with `?` in its name is meant by an image's path and by a store's."""
    store, ref = parse_image("/what?/agent")
    assert store is not None and StoreAddress.parse(store).place == "/what?" and ref == ImageRef("agent")


def test_nothing_heavy_is_imported() -> None:
    """Opening and using a directory store imports neither boto3 nor what it stands on."""
    script = (
        "import sys, tempfile\nfrom crcli.store import open_store\n"
        "store = open_store(tempfile.mkdtemp())\nstore.put('key', b'value')\nlist(store.list())\n"
        "heavy = {'boto3', 'botocore', 'urllib3', 'ssl', 'asyncio', 'concurrent.futures', 'ctypes'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
