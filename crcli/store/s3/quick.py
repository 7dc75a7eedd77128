"""Requests that need not wait for botocore.

botocore works for 150 ms before it sends its first request: a third of the time in which a small tree is
back, a tenth of what the repeated dump of a large one takes. obstore, a client in Rust, needs 15. It knows
few of the AWS tools' settings, and tells a store's answer as text only. So it is used only where the settings
are plain, waits for a few seconds at most, and whatever it cannot do is asked again through botocore, which
explains it, and from then on does all.
"""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from crcli.errors import NotFound, StoreUnreachable
from crcli.store.base import ObjectInfo, check_key, is_key
from crcli.store.s3.plain import plain_access

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from obstore import ObjectMeta
    from obstore.store import ClientConfig, S3Config, S3Store

    from crcli.store.base import Buffer
    from crcli.store.s3.calls import Calls
    from crcli.store.s3.settings import S3Settings

Result = TypeVar("Result")

_CONNECT_S, _SILENCE_S, _WHOLE_S = 2.0, 5.0, 30.0
"""How long a connection, the next bytes of an answer, and all of it are waited for (seconds), at most."""

_AT_ONCE = 1000
"""Entries of a listing that come in one answer."""

_NOTHING = "no-such-object"
"""Where no store has an object: asked for it, an S3 server says so in its own words."""


class Page(NamedTuple):
    """What one answer to a listing tells of, in key order, and the key behind which the next begins; empty
    where there is no more."""

    entries: Sequence[ObjectInfo]
    next: str


_used_by = 0
"""The process whose threads obstore's are: one that was forked from it would wait for them for ever."""


class QuickRequests:
    """A bucket's objects below `prefix`. Every method returns None for what is not to be had so."""

    def __init__(self, bucket: str, prefix: str, settings: S3Settings, calls: Calls) -> None:
        self._bucket = bucket
        self._prefix = prefix
        self._settings = settings
        self._calls = calls
        self._making = threading.Lock()
        self._store: S3Store | None = None
        self._is_aws = False
        self._is_s3 = False
        self._is_over = bool(prefix) and not is_key(prefix.rstrip("/"))

    @property
    def is_usable(self) -> bool:
        """Whether anything is to be had so, as far as is known by now."""
        return not self._is_over and self._made() is not None

    def get(self, key: str) -> bytes | None:
        """The whole object. Raises NotFound if the store says that there is no such object."""
        path = self._prefix + check_key(key)

        return self._try(lambda store: self._read(store, path), key)

    def get_range(self, key: str, offset: int, length: int) -> memoryview | None:
        """Exactly `length` bytes (more than none) at `offset`. Raises NotFound like `get`.

        They stay where obstore has put them: a copy would take as long as all else, with Python's lock held.
        """
        path = self._prefix + check_key(key)

        def read(store: S3Store) -> memoryview | None:
            import obstore

            data = memoryview(obstore.get_range(store, path, start=offset, length=length))
            return data if len(data) == length else None

        return self._try(read, key)

    def stat(self, key: str) -> ObjectInfo | None:
        """The object's description."""
        path = self._prefix + check_key(key)

        def read(store: S3Store) -> ObjectInfo | None:
            import obstore

            found = obstore.head(store, path)
            return self._described(found) if found["e_tag"] else None

        return self._try(read, key)

    def page(self, prefix: str, after: str) -> Page | None:
        """Objects in the folder `prefix` that come behind the key `after`: as many as one answer tells of."""
        if not prefix.endswith("/"):
            return None  # obstore lists whole folders
        behind = self._prefix + after if after else None

        def read(store: S3Store) -> Page | None:
            import obstore

            entries = next(obstore.list(store, self._prefix + prefix, offset=behind, chunk_size=_AT_ONCE), [])
            found = sorted(map(self._described, entries), key=lambda info: info.key)
            last = found[-1].key if len(found) >= _AT_ONCE else ""
            if not found and not self._is_of_s3(store):
                return None  # a web page that it took for a listing tells of no objects
            if (found and found[0].key <= after) or (last and not is_key(last)):
                return None  # it pays no heed to `after`, or there is nothing to go on from
            return Page([info for info in found if is_key(info.key)], last)

        return self._try(read, prefix)

    def put(self, key: str, data: Buffer, *, if_absent: bool) -> bool | None:
        """Write a whole object; with `if_absent`, only if the store surely has none of that name.

        The store compares what it got with the SHA-256 that is signed. False: it was tried, and the object
        may have been written or not.
        """
        path = self._prefix + check_key(key)
        was_sent = False

        def write(store: S3Store) -> bool | None:
            nonlocal was_sent
            import obstore

            is_doubted = if_absent and not self._is_aws  # see `creating`: others may ignore the condition
            if is_doubted and not self._lacks(store, path):
                return None
            was_sent = True
            obstore.put(store, path, data, mode="create" if if_absent else "overwrite", use_multipart=False)
            return not is_doubted or self._read(store, path) == data

        done = None if self._settings.encryption else self._try(write, key)
        return bool(done) if was_sent else None

    def delete(self, key: str) -> bool | None:
        """Delete an object, which need not be there."""
        path = self._prefix + check_key(key)

        def delete(store: S3Store) -> bool:
            import obstore

            obstore.delete(store, path)
            return True

        return self._try(delete, key)

    def reopened(self, calls: Calls) -> QuickRequests:
        """The same, open again after `close`, with the client, if it was of use."""
        again = QuickRequests(self._bucket, self._prefix, self._settings, calls)
        again._store, again._is_aws, again._is_s3 = self._store, self._is_aws, self._is_s3
        return again

    def close(self) -> None:
        """Ask nothing any more."""
        self._is_over = True

    def _described(self, entry: ObjectMeta) -> ObjectInfo:
        key = entry["path"][len(self._prefix) :]
        return ObjectInfo(key, entry["size"], entry["last_modified"].timestamp())

    def _read(self, store: S3Store, path: str) -> bytes | None:
        """An object; None where what answers is no S3 server: those send an ETag."""
        import obstore

        found = obstore.get(store, path)
        self._is_s3 |= bool(found.meta["e_tag"])
        return found.bytes().to_bytes() if found.meta["e_tag"] else None

    def _lacks(self, store: S3Store, path: str) -> bool:
        """Whether the store says that it has no such object."""
        try:
            self._read(store, path)
        except FileNotFoundError as error:
            if not _is_absent(error):
                raise
            self._is_s3 = True
            return True
        return False

    def _is_of_s3(self, store: S3Store) -> bool:
        """Whether an S3 server answers, and not a console, a portal's login or what a redirect leads to."""
        return self._is_s3 or self._lacks(store, f"{self._prefix}{_NOTHING}")

    def _try(self, read: Callable[[S3Store], Result | None], key: str) -> Result | None:
        store = None if self._is_over else self._made()
        if store is None:
            return None
        try:
            return self._calls.make(lambda: read(store))
        except FileNotFoundError as error:
            if _is_absent(error):
                self._is_s3 = True
                raise NotFound(f"no object {key} in s3://{self._bucket}/{self._prefix}".rstrip("/")) from None
        except StoreUnreachable:
            raise  # nobody waits any more
        except Exception:
            pass  # its words are worth less than botocore's, who will be asked next
        self._is_over = True
        self._store = None
        return None

    def _made(self) -> S3Store | None:
        global _used_by
        with self._making:
            if _used_by not in (0, os.getpid()):
                return None
            if self._store is None and not self._is_over:
                self._store = self._make()
                self._is_over = self._store is None
                _used_by = os.getpid() if self._store is not None else _used_by
            return self._store

    def _make(self) -> S3Store | None:
        access = plain_access(self._bucket, self._settings, os.environ)
        if access is None:
            return None
        try:
            from obstore.store import S3Store
        except ImportError:  # no wheel for this machine
            return None
        url = access.endpoint_url
        self._is_aws = url is None
        config: S3Config = {
            "region": access.region,
            "access_key_id": access.key_id,
            "secret_access_key": access.secret,
            "virtual_hosted_style_request": url is None,
        }
        if url is not None:
            config["endpoint"] = url.rstrip("/")
        if access.token:
            config["session_token"] = access.token
        is_plain = (url or "").startswith("http:")
        client: ClientConfig = {
            "allow_http": is_plain,
            # Where none is shown, those of the host need not be read: 6 ms, with Python's lock held.
            "allow_invalid_certificates": is_plain,
            "connect_timeout": self._at_most(_CONNECT_S),
            "read_timeout": self._at_most(_SILENCE_S),
            "timeout": self._at_most(_WHOLE_S),
            "user_agent": "crcli",
        }
        return S3Store(self._bucket, config=config, client_options=client, retry_config={"max_retries": 0})

    def _at_most(self, seconds: float) -> str:
        """That long, or for as long as there is patience with the store at all."""
        return f"{1000 * min(seconds, self._settings.patience_s):.0f}ms"


def _is_absent(error: FileNotFoundError) -> bool:
    """Whether the store says that there is no such object, and not that there is no such bucket."""
    return "<Code>NoSuchKey</Code>" in str(error)
