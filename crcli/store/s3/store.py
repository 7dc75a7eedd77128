"""A bucket, or a part of one, as a store."""

from __future__ import annotations

from collections import Counter
from functools import partial
from itertools import chain, compress
from typing import TYPE_CHECKING, Any

from crcli.errors import StoreError
from crcli.store.base import ObjectInfo, check_key, check_prefix, is_key, is_there
from crcli.store.leaving import asking
from crcli.store.s3.body import Body
from crcli.store.s3.bucket import Bucket
from crcli.store.s3.calls import Calls
from crcli.store.s3.creating import put_soon
from crcli.store.s3.quick import QuickRequests
from crcli.store.s3.survey import Survey, survey
from crcli.store.s3.uploads import PART_SIZE, S3Writer, UploadThreads

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from concurrent.futures import ThreadPoolExecutor

    from crcli.store.address import StoreAddress
    from crcli.store.base import Buffer
    from crcli.store.s3.settings import S3Settings

_HEADS_AT_ONCE = 16
"""So many objects are asked for at once."""

_WORTH_A_LISTING, _WORTH_ANOTHER_PAGE = 5, _HEADS_AT_ONCE + 1
"""So many objects in one folder are looked for in a listing, which is as much work for a store as to ask for
four; it goes on while each answer tells of so many, since fewer can be asked for at once."""


class S3Store:
    """The objects of a bucket whose names begin with `prefix`/. The client is made by the first request."""

    def __init__(self, address: StoreAddress, settings: S3Settings, like: S3Store | None = None) -> None:
        """`like` is the same store, open before: its client is used again."""
        bucket, _, prefix = address.place.partition("/")
        self._address = address
        self._settings = settings
        self._calls = Calls(address.url)
        self._bucket = Bucket(bucket, prefix + "/" if prefix else "", settings, self._calls)
        self._quick = QuickRequests(bucket, self._bucket.prefix, settings, self._calls)
        if like is not None:
            self._bucket.take_client_of(like._bucket)
            self._quick = like._quick.reopened(self._calls)
        self._threads = UploadThreads()

    @property
    def url(self) -> str:
        """`s3://bucket/prefix`, and the options that were written behind it."""
        return self._address.url

    @property
    def creates_atomically(self) -> bool:
        """AWS promises it. Others may look, and write a moment later."""
        return self._bucket.connection.is_aws

    def warm(self, *, for_writing: bool = False) -> None:
        """Make the client, resolve credentials, and have the bucket answer one cheap request."""
        try:
            self._bucket.request("list_objects_v2", self._below() | {"MaxKeys": 1})
        except StoreError as error:
            from crcli.store.s3.errors import code_of

            if code_of(error.__cause__) != "AccessDenied":
                raise  # who may not list may still be allowed to read and write

    def room(self) -> None:
        """A bucket has no bound, and does not say who may write into it."""

    def put(self, key: str, data: Buffer, *, if_absent: bool = False) -> None:
        """Send `data` in one request, or in parallel parts if it is larger than one."""
        if memoryview(data).nbytes <= PART_SIZE:
            put_soon(self._bucket, self._quick, check_key(key), Body.of(data), if_absent=if_absent)
            return
        with self.writer(key, if_absent=if_absent) as writer:
            writer.write(data)
            writer.commit()

    def writer(self, key: str, *, if_absent: bool = False) -> S3Writer:
        """Begin an object; nothing is sent before the first part is full."""
        return S3Writer(self._bucket, self._quick, self._threads, key, if_absent=if_absent)

    def get(self, key: str) -> bytes:
        """Read the object in one request."""
        quick = None if self._bucket.is_connected else self._quick.get(key)
        return self._read(key, {}) if quick is None else quick

    def get_range(self, key: str, offset: int, length: int) -> Buffer:
        """Ask for exactly these bytes."""
        if length == 0:
            self.stat(key)
            return b""
        quick = None if self._bucket.is_connected else self._quick.get_range(key, offset, length)
        if quick is not None:
            return quick
        data = self._read(key, {"Range": f"bytes={offset}-{offset + length - 1}"})
        if len(data) != length:
            raise StoreError(
                f"{key} gave {len(data)} bytes where {length} were asked for, at {offset}",
                hint="The object is damaged or was replaced; `crcli verify` reads the whole image.",
            )
        return data

    def fetch_again(self, key: str, offset: int, length: int) -> None:
        """There is no cache here."""

    def mapped(self, key: str, offset: int, length: int) -> None:
        """Nothing is here."""

    def is_near(self, key: str, offset: int, length: int) -> bool:
        """Nothing is."""
        return False

    def stat(self, key: str) -> ObjectInfo:
        """Ask for the object's headers."""
        quick = None if self._bucket.is_connected else self._quick.stat(key)
        if quick is not None:
            return quick
        head = self._bucket.request("head_object", self._bucket.of(key), key)
        return ObjectInfo(key, head["ContentLength"], head["LastModified"].timestamp())

    def missing(self, keys: Iterable[str]) -> set[str]:
        """List a folder in which several of them are, from the first to the last of them, for as long as each
        answer tells of many; and ask for the others by themselves.

        Folders at the top of a store are not listed: most of what is there is somebody else's. A store whose
        listings are not up to date is asked for what is new as well.
        """
        wanted = set(keys)
        if not wanted:
            return wanted
        counts = Counter(map(_folder_of, wanted))
        folders = {at for at, count in counts.items() if count >= _WORTH_A_LISTING and at.count("/") > 1}
        alone = {key for key in wanted if _folder_of(key) not in folders}
        with asking(min(_HEADS_AT_ONCE, len(wanted)), "s3-head", self) as threads:
            told = threads.map(partial(self._told_of, wanted), folders)
            there = self._those_there(threads, alone).union(*told)
            return wanted - there - self._those_there(threads, wanted - there - alone)

    def _told_of(self, wanted: set[str], folder: str) -> set[str]:
        """Those of the wanted objects of which a listing of the folder tells, as far as each answer tells of
        many."""
        here = {key for key in wanted if _folder_of(key) == folder}
        left = set(here)
        for page in self._pages(folder, after=min(here)[:-1]):
            there = left.intersection(info.key for info in page)
            left -= there
            if not left or len(there) < _WORTH_ANOTHER_PAGE or page[-1].key > max(left):
                break
        return here - left

    def _those_there(self, threads: ThreadPoolExecutor, keys: Iterable[str]) -> set[str]:
        """Those of the objects that are there, each asked for."""
        some = list(keys)
        return set(compress(some, threads.map(partial(is_there, self), some)))

    def list(self, prefix: str = "", after: str = "") -> Iterator[ObjectInfo]:
        """List page by page, as far as the caller reads."""
        return chain.from_iterable(self._pages(check_prefix(prefix), after))

    def _pages(self, prefix: str, after: str = "") -> Iterator[Sequence[ObjectInfo]]:
        """What each answer to a listing tells of."""
        while not self._bucket.is_connected and (page := self._quick.page(prefix, after)) is not None:
            yield page.entries
            if not page.next:
                return
            after = page.next
        yield from self._pages_by_botocore(prefix, after)

    def _pages_by_botocore(self, prefix: str, after: str) -> Iterator[Sequence[ObjectInfo]]:
        behind = {"StartAfter": self._bucket.prefix + after} if after else {}
        resume = {"ContinuationToken": "NextContinuationToken"}
        for page in self._bucket.pages("list_objects_v2", self._below(prefix) | behind, resume):
            found = [(entry["Key"][len(self._bucket.prefix) :], entry) for entry in page.get("Contents", ())]
            yield [
                ObjectInfo(key, entry["Size"], entry["LastModified"].timestamp())
                for key, entry in found
                if is_key(key) and key > after
            ]

    def delete(self, key: str) -> None:
        """Delete the object (in a versioned bucket: hide it)."""
        if self._bucket.is_connected or not self._quick.delete(key):
            self._bucket.request("delete_object", self._bucket.of(key), key)

    def sweep(self, before: float, is_ours: Callable[[str], bool] = is_key) -> int:
        """Abort multipart uploads that were begun before then and never completed."""
        pages = self._bucket.pages(
            "list_multipart_uploads",
            self._below(),
            {"KeyMarker": "NextKeyMarker", "UploadIdMarker": "NextUploadIdMarker"},
        )
        uploads = [upload for page in pages for upload in page.get("Uploads", ())]
        ours = [one for one in uploads if is_ours(one["Key"][len(self._bucket.prefix) :])]
        old = [upload for upload in ours if upload["Initiated"].timestamp() <= before]
        for upload in old:
            where = {"Bucket": self._bucket.name, "Key": upload["Key"], "UploadId": upload["UploadId"]}
            self._bucket.request("abort_multipart_upload", where)
        return len(old)

    def survey(self) -> Survey:
        """Find out what the bucket can do; a small object is written and removed again."""
        return survey(self._bucket)

    def give_up(self) -> None:
        """End all patience: what fails from now on is not tried again, and silence not waited for."""
        self._bucket.give_up()

    def reopened(self) -> S3Store:
        """With the client, whose making takes as long as the dump of a small tree; connections are new."""
        return S3Store(self._address, self._settings, self)

    def close(self) -> None:
        """Let uploads end (aborts included), and close the connections."""
        self._bucket.give_up()
        self._quick.close()
        self._threads.close()
        self._calls.close()
        self._bucket.close()

    def _below(self, prefix: str = "") -> dict[str, Any]:
        return {"Bucket": self._bucket.name, "Prefix": self._bucket.prefix + prefix}

    def _read(self, key: str, part: dict[str, str]) -> bytes:
        parameters = self._bucket.of(key) | part

        def attempt() -> bytes:
            with self._bucket.send("get_object", parameters)["Body"] as body:
                data: bytes = body.read()
                return data

        return self._bucket.patiently(attempt, key)


def _folder_of(key: str) -> str:
    """The folder that an object is in, with a slash at its end."""
    return key.rpartition("/")[0] + "/"
