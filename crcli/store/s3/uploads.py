"""Objects of unknown size, sent in parts by a few threads while they are still being written."""

from __future__ import annotations

import threading
from functools import cached_property
from typing import TYPE_CHECKING, Any

from crcli.errors import StoreError
from crcli.store.base import check_key
from crcli.store.s3.body import Body
from crcli.store.s3.creating import complete_upload, put_soon

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future, ThreadPoolExecutor
    from types import TracebackType

    from crcli.store.base import Buffer
    from crcli.store.s3.bucket import Bucket
    from crcli.store.s3.quick import QuickRequests

PART_SIZE = 8 << 20
PARTS_IN_FLIGHT = 8
"""Parts of one store that wait or are being sent, over all its writers: 64 MiB. Each open writer holds at
most two more, the last not full yet. `write` blocks until there is room: memory is bounded, come what may."""
UPLOAD_THREADS = 8
HELD_PARTS = 1
"""So many full parts wait for what follows, where an object that ends with that can go in one request by the
client that need not be waited for (see `quick`): longer ones are worth botocore's start."""
MOST_PARTS = 10_000
"""The protocol's limit: an object has at most 78 GiB."""


class UploadThreads:
    """The threads that send parts, and the bound on how many parts they may hold."""

    def __init__(self) -> None:
        self._slots = threading.BoundedSemaphore(PARTS_IN_FLIGHT)
        self._making = threading.Lock()

    @property
    def _threads(self) -> ThreadPoolExecutor:
        with self._making:
            return self._made

    @cached_property
    def _made(self) -> ThreadPoolExecutor:
        from concurrent.futures import ThreadPoolExecutor  # which who only reads need not import

        return ThreadPoolExecutor(UPLOAD_THREADS, thread_name_prefix="s3-upload")

    def submit(self, task: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """Run `task` in a thread."""
        return self._threads.submit(task, *arguments)

    def submit_part(self, task: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """Run `task`, which holds a part, in a thread; blocks until there is room for the part."""
        self._slots.acquire()
        try:
            future = self._threads.submit(task, *arguments)
        except BaseException:
            self._slots.release()
            raise
        future.add_done_callback(lambda _: self._slots.release())
        return future

    def close(self) -> None:
        """Wait for everything that was submitted; nothing more is taken."""
        if "_made" in self.__dict__:
            self._threads.shutdown(wait=True)


class MultipartUpload:
    """An upload that has begun. It becomes an object by `complete`, or nothing by `abort`."""

    def __init__(self, bucket: Bucket, threads: UploadThreads, key: str) -> None:
        self._bucket = bucket
        self._threads = threads
        self._key = key
        self._given_up = threading.Event()
        self._id: Future[str] = threads.submit(self._begin)
        self._parts: list[Future[dict[str, Any]]] = []
        self._size = 0

    def add(self, body: Body) -> None:
        """Send `body` as the next part, once there is room; raises what an earlier one failed with."""
        self._raise_failure()
        if len(self._parts) == MOST_PARTS:
            raise StoreError(f"{self._key} grows beyond {MOST_PARTS} parts of {PART_SIZE >> 20} MiB")
        self._size += len(body)
        self._parts.append(self._threads.submit_part(self._send, len(self._parts) + 1, body))

    def complete(self, *, if_absent: bool) -> None:
        """Wait for all parts, and make the object of them."""
        parts = [part.result() for part in self._parts]
        complete_upload(self._bucket, self._key, self._id.result(), parts, self._size, if_absent=if_absent)

    def abort(self) -> None:
        """Send nothing more; a thread has the store forget the rest. Neither waits nor raises."""
        self._given_up.set()
        for part in self._parts:
            part.cancel()
        try:
            self._threads.submit(self._forget)
        except RuntimeError:
            pass  # the store is closed already; `sweep` will find the upload

    def _begin(self) -> str:
        algorithm = {"ChecksumAlgorithm": "CRC32"} if self._bucket.connection.checksums else {}
        parameters = {**self._bucket.of(self._key), **self._bucket.settings.encryption, **algorithm}
        answer = self._bucket.patiently(
            lambda: self._bucket.send("create_multipart_upload", parameters), self._key, self._given_up
        )
        return str(answer["UploadId"])

    def _send(self, number: int, body: Body) -> dict[str, Any]:
        """Send one part; return what completing the upload has to say about it."""
        where = {**self._bucket.of(self._key), "UploadId": self._id.result(), "PartNumber": number}
        checksum = self._bucket.checksum(body)

        def attempt() -> dict[str, Any]:
            body.seek(0)
            return self._bucket.send("upload_part", {**where, **checksum, "Body": body})

        part = {
            "PartNumber": number,
            "ETag": self._bucket.patiently(attempt, self._key, self._given_up)["ETag"],
        }
        if "ChecksumCRC32" in checksum:
            part["ChecksumCRC32"] = checksum["ChecksumCRC32"]
        return part

    def _raise_failure(self) -> None:
        futures: list[Future[Any]] = [self._id, *self._parts[-PARTS_IN_FLIGHT - UPLOAD_THREADS :]]
        for future in futures:
            if future.done() and (error := future.exception()):
                raise error

    def _forget(self) -> None:
        """Abort the upload once none of its parts is on the way: one that arrives later would stay."""
        try:
            upload_id = self._id.result()
            for part in self._parts:
                if not part.cancelled():
                    part.exception()
            self._bucket.request(
                "abort_multipart_upload", {**self._bucket.of(self._key), "UploadId": upload_id}
            )
        except StoreError:
            pass  # never begun; or the store is gone, and `sweep` will find the upload


class S3Writer:
    """An object on its way: one request if it ends within a part, a multipart upload otherwise."""

    def __init__(
        self, bucket: Bucket, quick: QuickRequests, threads: UploadThreads, key: str, *, if_absent: bool
    ) -> None:
        self._bucket = bucket
        self._quick = quick
        self._threads = threads
        self._key = check_key(key)
        self._if_absent = if_absent
        self._held: list[Body] = []
        self._pending = Body()
        self._upload: MultipartUpload | None = None

    def write(self, data: Buffer) -> None:
        """Take `data`; parts that are full are sent as soon as more follows them."""
        view = memoryview(data).cast("B")
        while view:
            if len(self._pending) == PART_SIZE:
                self._send_pending()
            room = PART_SIZE - len(self._pending)
            self._pending.append(_lasting(view[:room]))
            view = view[room:]

    def commit(self) -> None:
        """Send what is left, wait for every part, and make the object of them."""
        if self._upload is None and not self._held:
            put_soon(self._bucket, self._quick, self._key, self._pending, if_absent=self._if_absent)
        elif self._upload is not None or not self._put_held():
            self._begun().add(self._pending)
            self._begun().complete(if_absent=self._if_absent)
        self._forget()

    def abort(self) -> None:
        """Forget what was written; an upload that had begun is aborted in the background."""
        upload = self._upload
        self._forget()
        if upload is not None:
            upload.abort()

    def __enter__(self) -> S3Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()

    def _send_pending(self) -> None:
        body, self._pending = self._pending, Body()
        if self._upload is None and len(self._held) < HELD_PARTS and self._may_hold():
            self._held.append(body)
        else:
            self._begun().add(body)

    def _may_hold(self) -> bool:
        return not self._if_absent and not self._bucket.is_connected and self._quick.is_usable

    def _put_held(self) -> bool:
        """Send all in one request; say whether that worked."""
        if self._bucket.is_connected:
            return False
        whole = b"".join(map(bytes, (*self._held, self._pending)))
        return bool(self._quick.put(self._key, whole, if_absent=False))

    def _begun(self) -> MultipartUpload:
        """The upload, of which the parts that were held are the first."""
        if self._upload is None:
            self._upload = MultipartUpload(self._bucket, self._threads, self._key)
            for body in self._held:
                self._upload.add(body)
            self._held = []
        return self._upload

    def _forget(self) -> None:
        self._upload, self._held, self._pending = None, [], Body()


def _lasting(view: memoryview) -> memoryview:
    """The same bytes where nobody will change them: a copy, unless they are a bytes object's."""
    return view if isinstance(view.obj, bytes) else memoryview(bytes(view))
