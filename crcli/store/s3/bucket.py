"""One bucket, spoken to patiently: requests are repeated where that helps, and refusals are translated."""

from __future__ import annotations

import threading
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

from crcli import waiting
from crcli.errors import StoreError
from crcli.store.base import check_key
from crcli.store.retrying import Retrier

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from crcli.store.s3.body import Body
    from crcli.store.s3.calls import Calls
    from crcli.store.s3.client import Connection
    from crcli.store.s3.settings import S3Settings

Result = TypeVar("Result")

FIRST_CONTACT_PATIENCE_S = 10.0
"""Patience with a store that has never answered: it is misspelt more often than it is busy."""

_SIGNS = {
    "complete_multipart_upload": "ETag",
    "create_multipart_upload": "UploadId",
    "get_object": "ETag",
    "head_object": "ETag",
    "list_multipart_uploads": "IsTruncated",
    "list_objects_v2": "IsTruncated",
    "put_object": "ETag",
    "upload_part": "ETag",
}
"""What the answers of all S3 servers have."""


class Bucket:
    """The objects of the bucket `name` whose keys begin with `prefix` (empty, or ending in a slash)."""

    def __init__(self, name: str, prefix: str, settings: S3Settings, calls: Calls) -> None:
        self.name = name
        self.prefix = prefix
        self.settings = settings
        self._calls = calls
        self._retrier = Retrier(tell=self._tell)
        self._making, self._renewing = threading.Lock(), threading.Lock()
        self._has_answered = False

    @property
    def connection(self) -> Connection:
        """The client, made by whoever asks first."""
        return self._connection if self.is_connected else self._calls.make(self._made)

    def _made(self) -> Connection:
        with self._making:
            return self._connection

    @cached_property
    def _connection(self) -> Connection:
        from crcli.store.s3.client import connect
        from crcli.store.s3.errors import FOREIGN

        try:
            connection = connect(self.settings)
        except (*FOREIGN, ValueError) as error:  # the latter for settings that are no numbers or URLs
            raise self._translated(error, "") from error
        self._retrier.max_attempts = connection.max_attempts
        return connection

    @property
    def is_connected(self) -> bool:
        """Whether the client has been made."""
        return "_connection" in self.__dict__

    def take_client_of(self, other: Bucket) -> None:
        """Use the client of the same bucket, closed by now, if it had one."""
        if other.is_connected:
            self.__dict__["_connection"] = other._connection
            self._retrier.max_attempts = other._connection.max_attempts
            self._has_answered = other._has_answered

    def of(self, key: str) -> dict[str, Any]:
        """The parameters that name the object."""
        return {"Bucket": self.name, "Key": self.prefix + check_key(key)}

    def checksum(self, body: Body) -> dict[str, str]:
        """The parameters by which the store sees whether it got `body` undamaged."""
        if self.connection.checksums:
            return {"ChecksumAlgorithm": "CRC32", "ChecksumCRC32": body.crc32()}
        return {"ContentMD5": body.md5()}

    def request(self, operation: str, parameters: dict[str, Any], key: str = "") -> dict[str, Any]:
        """Send a request, again where that helps; return the answer, or raise StoreError."""
        return self.patiently(lambda: self.send(operation, parameters), key)

    def pages(
        self, operation: str, parameters: dict[str, Any], resume: dict[str, str]
    ) -> Iterator[dict[str, Any]]:
        """Every page of a listing; `resume` maps parameters of the next request to fields of a page."""
        while True:
            page = self.request(operation, parameters)
            yield page
            if not page.get("IsTruncated"):
                return
            parameters = parameters | {name: page[field] for name, field in resume.items()}

    def send(self, operation: str, parameters: dict[str, Any]) -> dict[str, Any]:
        """Send a request once; raises what botocore raises, and StoreError where no S3 server answers.

        botocore takes a web page for an empty listing, or for an object that is there.
        """
        response: dict[str, Any] = getattr(self.connection.client, operation)(**parameters)
        if (sign := _SIGNS.get(operation, "ResponseMetadata")) not in response:
            from crcli.store.s3.errors import Place

            raise StoreError(
                f"{Place(self.name, self.prefix, self.connection.endpoint_url)} answers, but not as S3 does "
                f"(no {sign} for {operation})",
                hint="Does --endpoint-url name the S3 server, and not its console? Does a proxy or a login "
                "page answer in its place?",
            )
        self._has_answered = True
        return response

    def patiently(
        self, attempt: Callable[[], Result], key: str = "", given_up: threading.Event | None = None
    ) -> Result:
        """Return what `attempt` returns, tried again where that helps; raise StoreError where it does not.

        `given_up` ends the patience early.
        """
        from crcli.store.s3.errors import FOREIGN

        used: Connection | None = None

        def try_it() -> Result:
            nonlocal used
            used = self.__dict__.get("_connection")
            return self._calls.make(attempt)

        try:
            return self._retrier.call(try_it, lambda error: self._patience(error, used), given_up)
        except FOREIGN as error:
            raise self._translated(error, key) from error

    def _patience(self, error: Exception, used: Connection | None) -> float:
        from crcli.store.s3.client import READ_TIMEOUT_S
        from crcli.store.s3.errors import passes, status_of, was_silence

        if not passes(error):
            return self.settings.patience_s if self._is_renewed(error, used) else 0
        silent = was_silence(error)
        if silent and self.connection.pulse.is_felt:  # it answers others: this answer is lost
            return self.settings.patience_s + READ_TIMEOUT_S
        if silent or self._has_answered or status_of(error):
            return self.settings.patience_s
        return min(self.settings.patience_s, FIRST_CONTACT_PATIENCE_S)

    def _is_renewed(self, error: Exception, used: Connection | None) -> bool:
        """Whether the store did not take the credentials that were `used`, and there are others by now.

        Those of a session last for hours, and are renewed in the credentials file by somebody else.
        """
        from crcli.store.s3.client import connect
        from crcli.store.s3.errors import FOREIGN, refuses_credentials

        if used is None or not refuses_credentials(error):
            return False
        with self._renewing:
            if self._connection is not used:
                return True
            try:
                found = self._calls.make(lambda: connect(self.settings))
            except (*FOREIGN, ValueError):
                return False
            if found.keys() == used.keys():
                return False
            self.__dict__["_connection"] = found
            return True

    def _translated(self, error: Exception, key: str) -> StoreError:
        from crcli.store.s3.errors import Place, translate

        connection = self.__dict__.get("_connection")
        endpoint_url = connection.endpoint_url if connection else self.settings.endpoint_url or ""
        return translate(error, Place(self.name, self.prefix, endpoint_url), key)

    def _tell(self, error: Exception, patience_s: float) -> None:
        from crcli.store.s3.errors import FOREIGN

        if isinstance(error, FOREIGN):
            error = self._translated(error, "")
        waiting.say(f"{error}; trying again for up to {patience_s:.0f} s")

    def give_up(self) -> None:
        """End all patience: what fails from now on is not tried again, and silence not waited for."""
        self._retrier.stop()
        self._calls.give_up()

    def close(self) -> None:
        """Close the connections."""
        if self.is_connected:
            self._connection.client.close()
