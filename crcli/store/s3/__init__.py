"""Objects in a bucket of S3 or of a store that speaks its protocol.

`settings` says what the user asked for, `client` makes botocore's client from it, `uploads` sends parts in
parallel, `errors` translates every refusal, `store` puts them behind the contract.
"""

from __future__ import annotations

from crcli.store.s3.settings import S3Settings
from crcli.store.s3.store import S3Store

__all__ = ["S3Settings", "S3Store"]
