"""Every refusal of S3 and every failure on the way to it, in crcli's words, with what to do next."""

from __future__ import annotations

import os
import re
from typing import Any
from urllib.parse import urlsplit

from botocore import exceptions as boto
from urllib3.exceptions import HTTPError

from crcli.errors import NotFound, StoreError, StoreUnreachable
from crcli.records import Struct
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
_GATEWAY_STATUS = frozenset((502, 503, 504))
"""What those answer who stand before a store that is not there; a store that is too busy has not decided."""
_REFUSED_CREDENTIALS = frozenset(
    ("400", "ExpiredToken", "InvalidAccessKeyId", "InvalidToken", "TokenRefreshRequired")
)
_WRITES = frozenset(("CompleteMultipartUpload", "PutObject"))
_ABSENT = frozenset(("NoSuchKey", "404", "NotFound", "NoSuchVersion"))
_WITHOUT_REASON = frozenset(("HeadBucket", "HeadObject"))
"""What an S3 server answers with no more than a number. To all else that is somebody else's word."""

FOREIGN = (boto.BotoCoreError, boto.ClientError, HTTPError, OSError)
"""What botocore raises, with what it lets through of the layers below while a body is read."""

_LOST_ON_THE_WAY = (
    boto.HTTPClientError,
    boto.ConnectionError,
    boto.IncompleteReadError,
    boto.ResponseStreamingError,
    HTTPError,
    ConnectionError,
    TimeoutError,
)

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

_REDIRECTS = frozenset(("301", "302", "303", "307", "308"))
_PASSES = "It was asked several times; try again later."
_NO_REASON = "An S3 server would give its reason: does --endpoint-url name one?"


class Place(Struct, frozen=True):
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
        return str(error.response.get("Error", {}).get("Code") or "")
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


def refuses_credentials(error: BaseException | None) -> bool:
    """Whether others may be taken. Of what it is asked to describe (HEAD) a store does not say why."""
    return code_of(error) in _REFUSED_CREDENTIALS


def was_silence(error: Exception) -> bool:
    """Whether an answer was waited for in vain."""
    return isinstance(error, boto.ReadTimeoutError)


def passes(error: Exception) -> bool:
    """Whether trying again can help: throttling, trouble in the store, lost connections, damaged bytes."""
    if isinstance(error, boto.ClientError):
        return code_of(error) in _PASSING_CODES or status_of(error) in _PASSING_STATUS
    if isinstance(error, boto.SSLError) and _is_for_ever(error):
        return False
    if _is_no_header(error):
        return False
    return isinstance(error, _LOST_ON_THE_WAY)


def translate(error: Exception, place: Place, key: str = "") -> StoreError:
    """Return the StoreError that says what happened at `place` (to the object `key`) and what to do."""
    if isinstance(error, StoreError):
        return error
    if isinstance(error, boto.ClientError):
        return _translate_refusal(error, place, key)
    message, hint = _explain_failure(error, place)
    message = re.sub(r"//[^/\s]*@", "//", message)  # a user and password in the URL of the server
    return (StoreUnreachable if _is_silence(error) else StoreError)(message, hint=hint)


def _is_silence(error: Exception) -> bool:
    """Whether the store had no say in it: what is between us and it failed, or it is not there."""
    return isinstance(error, (*_LOST_ON_THE_WAY, OSError)) and not isinstance(error, boto.SSLError)


def _translate_refusal(error: Any, place: Place, key: str) -> StoreError:
    code = code_of(error) or str(status_of(error))
    if code in _ABSENT and (not code.isdigit() or error.operation_name in _WITHOUT_REASON):
        return NotFound(f"no object {key} in {place.url}")
    if status_of(error) == 412 and error.operation_name in _WRITES:
        return taken(key)
    what = f"{error.operation_name} of {key}" if key else error.operation_name
    said = error.response.get("Error", {}).get("Message", "")
    message = f"{place} refused {what}: {code} {said}".rstrip()
    kind = StoreUnreachable if status_of(error) in _GATEWAY_STATUS else StoreError
    return kind(message, hint=_remedy(code, error.response, place))


def _remedy(code: str, response: Any, place: Place) -> str:
    """What the user can do about a refusal, or nothing."""
    headers = response.get("ResponseMetadata", {}).get("HTTPHeaders", {})
    facts = {
        "bucket": place.bucket,
        "prefix": place.prefix,
        "region": headers.get("x-amz-bucket-region") or response.get("Error", {}).get("Region") or "REGION",
        "date": headers.get("date") or "another time",
    }
    if code in _REDIRECTS and facts["region"] == "REGION":
        to = urlsplit(headers.get("location", ""))  # often https: where http was said
        there = f"{to.scheme or 'https'}://{to.netloc}" if to.netloc else "another address"
        return f"The server sends to {there}: name the S3 server itself with --endpoint-url."
    family = "KMS" if code.startswith("KMS") else code
    remedy = next((text.format(**facts) for codes, text in _REMEDIES if family in codes), "")
    if not remedy and code.isdigit():
        return _PASSES if int(code) in _PASSING_STATUS else _NO_REASON
    return remedy or (_PASSES if code in _PASSING_CODES else "")


def _explain_failure(error: Exception, place: Place) -> tuple[str, str]:
    """What happened, and what to do, when the request never got an answer."""
    match error:
        case boto.NoCredentialsError() | boto.PartialCredentialsError():
            return f"no credentials for {place}: {error}", _CREDENTIALS + _sudo_remark()
        case boto.ProfileNotFound():
            return str(error), "`aws configure list-profiles` shows them; check AWS_PROFILE and ?profile=."
        case boto.CredentialRetrievalError() | boto.TokenRetrievalError() | boto.SSOError():
            return f"credentials could not be had: {error}", "Renew them (`aws sso login`) or use others."
        case _ if _is_no_header(error):
            return f"{place} cannot be used: the credentials hold a line break", _CREDENTIALS
        case FileNotFoundError() | PermissionError() | IsADirectoryError():
            return f"{place} cannot be used: {error}", "A file that the AWS settings name cannot be read."
        case boto.SSLError():
            return f"no TLS connection to {place}: {_innermost(error)}", _tls_remedy(error)
        case boto.ConnectTimeoutError() | boto.ReadTimeoutError():
            return f"{place} does not answer in time", "Check the network and --endpoint-url."
        case boto.ProxyConnectionError():
            return f"no connection to the proxy for {place}: {error}", "Check HTTPS_PROXY and NO_PROXY."
        case boto.HTTPClientError() | boto.EndpointConnectionError() | HTTPError() | OSError():
            return f"no connection to {place}: {_innermost(error)}", "Check the network and --endpoint-url."
        case _:
            return f"{place} cannot be used: {error}", "Check --store, --endpoint-url and the AWS settings."


def _sudo_remark() -> str:
    """A common surprise, for those whom it concerns."""
    if "SUDO_USER" not in os.environ:
        return ""
    return " (sudo drops variables and changes ~; `sudo -E` keeps both.)"


def _is_no_header(error: Exception) -> bool:
    """Whether a request was never sent because of a value, which is secret, that cannot stand in a header."""
    inner = _innermost(error)
    return isinstance(inner, ValueError) and str(inner).startswith("Invalid header value")


def _is_for_ever(error: boto.SSLError) -> bool:
    """Whether the two sides will never agree, however often they try."""
    if isinstance(_innermost(error), FileNotFoundError):
        return True  # certificates that the settings name
    return "CERTIFICATE_VERIFY_FAILED" in str(error) or "WRONG_VERSION_NUMBER" in str(error)


def _tls_remedy(error: boto.SSLError) -> str:
    if "WRONG_VERSION_NUMBER" in str(error):
        return "The server does not speak TLS on that port: write http:// in the endpoint's URL."
    if isinstance(_innermost(error), FileNotFoundError):
        return "AWS_CA_BUNDLE or ca_bundle in ~/.aws/config names a file that is not there."
    return "Name the authority that signed the server's certificate: AWS_CA_BUNDLE=/path/to/ca.pem."


def _innermost(error: BaseException) -> BaseException:
    """What the operating system or TLS said, below the wrappers of botocore and urllib3."""
    below = (
        getattr(error, "kwargs", {}).get("error"),
        getattr(error, "reason", None),
        error.__cause__,
        *error.args,
    )
    inner = next((candidate for candidate in below if isinstance(candidate, BaseException)), None)
    return _innermost(inner) if inner is not None else error
