"""Every refusal of S3 and every failure on the way to it, in crcli's words, with what to do next."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from botocore import exceptions as boto

from crcli.errors import NotFound, StoreError
from crcli.store.base import taken

_PASSING_CODES = frozenset(
    (
        "BadDigest",
        "BandwidthLimitExceeded",
        "ConditionalRequestConflict",
        "InternalError",
        "OperationAborted",
        "RequestTimeout",
        "RequestTimeoutException",
        "ServiceUnavailable",
        "SlowDown",
        "SlowDownRead",
        "SlowDownWrite",
        "Throttling",
        "ThrottlingException",
        "TooManyRequests",
        "TooManyRequestsException",
        "XAmzContentChecksumMismatch",
    )
)
_PASSING_STATUS = frozenset((408, 429, 500, 502, 503, 504))
_ABSENT = frozenset(("NoSuchKey", "404", "NotFound", "NoSuchVersion"))

_CREDENTIALS = (
    "Give credentials as the AWS tools take them: AWS_PROFILE, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
    "~/.aws/credentials, single sign-on, or a role."
)


_REMEDIES: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        ("NoSuchBucket",),
        "Create the bucket (`aws s3 mb s3://{bucket}`), or correct --store or --endpoint-url.",
    ),
    (("InvalidBucketName",), "Correct the bucket in --store."),
    (
        ("AccessDenied", "403", "Forbidden", "AllAccessDisabled"),
        "The credentials need s3:ListBucket on {bucket}, and s3:GetObject, s3:PutObject, s3:DeleteObject and "
        "s3:AbortMultipartUpload on {bucket}/{prefix}*.",
    ),
    (
        ("InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken"),
        f"The store does not accept these credentials. {_CREDENTIALS}",
    ),
    (
        ("ExpiredToken", "TokenRefreshRequired"),
        "The credentials have expired; renew them (`aws sso login`, or a new session token).",
    ),
    (
        ("RequestTimeTooSkewed", "RequestExpired"),
        "Set this host's clock (for example with chrony): in the store it is {date}.",
    ),
    (
        ("301", "307", "PermanentRedirect", "TemporaryRedirect", "AuthorizationHeaderMalformed"),
        "The bucket is in another region: add ?region={region} to --store, or set AWS_REGION.",
    ),
    (
        ("KMS",),
        "The KMS key must be enabled, in the bucket's region, and the credentials allowed to use it.",
    ),
    (
        ("507", "InsufficientStorage", "QuotaExceeded", "XMinioStorageFull"),
        "The store is full or over its quota: `crcli gc` removes what no image needs.",
    ),
    (("400",), "The store gave no reason; look at credentials, region and addressing style."),
)


@dataclass(frozen=True)
class Place:
    """Where a request went, for messages."""

    bucket: str
    prefix: str
    endpoint_url: str

    @property
    def url(self) -> str:
        """The store's URL."""
        return f"s3://{self.bucket}/{self.prefix}".rstrip("/")

    def __str__(self) -> str:
        return f"{self.url} at {self.endpoint_url}" if self.endpoint_url else self.url


def code_of(error: BaseException | None) -> str:
    """The code of a refusal (`NoSuchKey`, `412`, …), or nothing if the store did not answer."""
    if isinstance(error, boto.ClientError):
        return str(error.response.get("Error", {}).get("Code", ""))
    return ""


def status_of(error: BaseException | None) -> int:
    """The HTTP status of a refusal, or 0 if the store did not answer."""
    if isinstance(error, boto.ClientError):
        return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    return 0


def refuses_conditions(error: BaseException | None) -> bool:
    """Whether the store refused the condition of a write because it does not know conditional writes."""
    return status_of(error) == 501 or code_of(error) == "NotImplemented"


def says_it_was_done(error: BaseException | None) -> bool:
    """Whether a repeated write was refused as it would be if an earlier attempt had worked."""
    return status_of(error) == 412 or code_of(error) == "NoSuchUpload"


def passes(error: Exception) -> bool:
    """Whether trying again can help: throttling, trouble in the store, lost connections, damaged bytes."""
    if isinstance(error, boto.ClientError):
        return code_of(error) in _PASSING_CODES or status_of(error) in _PASSING_STATUS
    if isinstance(error, boto.SSLError):
        return not _tls_mismatch(error)
    return isinstance(
        error,
        (boto.HTTPClientError, boto.ConnectionError, boto.IncompleteReadError, boto.ResponseStreamingError),
    )


def translate(error: Exception, place: Place, key: str = "") -> StoreError:
    """Return the StoreError that says what happened at `place` (to the object `key`) and what to do."""
    if isinstance(error, StoreError):
        return error
    if isinstance(error, boto.ClientError):
        return _translate_refusal(error, place, key)
    message, hint = _explain_failure(error, place)
    return StoreError(message, hint=hint)


def _translate_refusal(error: Any, place: Place, key: str) -> StoreError:
    code = code_of(error) or str(status_of(error))
    if code in _ABSENT:
        return NotFound(f"no object {key} in {place.url}")
    if status_of(error) == 412:
        return taken(key)
    what = f"{error.operation_name} of {key}" if key else error.operation_name
    said = error.response.get("Error", {}).get("Message", "")
    message = f"{place} refused {what}: {code} {said}".rstrip()
    return StoreError(message, hint=_remedy(code, error.response, place))


def _remedy(code: str, response: Any, place: Place) -> str:
    """What the user can do about a refusal, or nothing."""
    headers = response.get("ResponseMetadata", {}).get("HTTPHeaders", {})
    facts = {
        "bucket": place.bucket,
        "prefix": place.prefix,
        "region": headers.get("x-amz-bucket-region") or response.get("Error", {}).get("Region") or "REGION",
        "date": headers.get("date") or "another time",
    }
    family = "KMS" if code.startswith("KMS") else code
    return next((text.format(**facts) for codes, text in _REMEDIES if family in codes), "")


def _explain_failure(error: Exception, place: Place) -> tuple[str, str]:
    """What happened, and what to do, when the request never got an answer."""
    if isinstance(error, (boto.NoCredentialsError, boto.PartialCredentialsError)):
        sudo = (
            " (sudo drops variables and changes ~; `sudo -E` keeps both.)"
            if "SUDO_USER" in os.environ
            else ""
        )
        return f"no credentials for {place}: {error}", _CREDENTIALS + sudo
    if isinstance(error, boto.ProfileNotFound):
        return str(
            error
        ), "`aws configure list-profiles` shows those that exist; check AWS_PROFILE and ?profile=."
    if isinstance(error, (boto.CredentialRetrievalError, boto.TokenRetrievalError, boto.SSOError)):
        return (
            f"credentials could not be had: {error}",
            "Renew them (`aws sso login`), or use another profile.",
        )
    if isinstance(error, boto.SSLError):
        return f"no TLS connection to {place}: {_innermost(error)}", _tls_hint(error)
    if isinstance(error, (boto.ConnectTimeoutError, boto.ReadTimeoutError)):
        return f"{place} does not answer in time", "Check the network and --endpoint-url, or try again later."
    if isinstance(error, boto.ProxyConnectionError):
        return f"no connection to the proxy for {place}: {error}", "Check HTTPS_PROXY and NO_PROXY."
    if isinstance(error, boto.HTTPClientError):
        return f"no connection to {place}: {_innermost(error)}", "Check the network and --endpoint-url."
    return f"{place} cannot be used: {error}", "Check --store, --endpoint-url and the AWS settings."


def _tls_mismatch(error: Exception) -> bool:
    """Whether the two sides will never agree, however often they try."""
    text = str(error)
    return "CERTIFICATE_VERIFY_FAILED" in text or "WRONG_VERSION_NUMBER" in text or "certificate" in text


def _tls_hint(error: Exception) -> str:
    if "WRONG_VERSION_NUMBER" in str(error):
        return "The server does not speak TLS on that port: write http:// in the endpoint's URL."
    return "Name the authority that signed the server's certificate: AWS_CA_BUNDLE=/path/to/ca.pem."


def _innermost(error: BaseException) -> BaseException:
    """The first cause of a chain of exceptions: the operating system's or TLS's own words."""
    inner = getattr(error, "kwargs", {}).get("error") or error.__cause__ or error.__context__
    reason = getattr(inner, "reason", None)
    return reason if isinstance(reason, BaseException) else inner or error
