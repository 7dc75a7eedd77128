"""What the user asked of an S3 store, before anything heavy is imported."""

from __future__ import annotations

from typing import TYPE_CHECKING

from crcli.records import Struct

if TYPE_CHECKING:
    from collections.abc import Mapping


class S3Settings(Struct, frozen=True):
    """Options of the URL, the command line and CRCLI_* variables; None leaves it to the AWS settings.

    Everything else that the AWS tools honour (AWS_PROFILE, AWS_ENDPOINT_URL_S3, AWS_CA_BUNDLE, the `s3`
    section of ~/.aws/config, roles, …) is resolved by botocore itself when the client is made.
    """

    endpoint_url: str | None = None
    region: str | None = None
    profile: str | None = None
    addressing_style: str | None = None
    sse: str | None = None
    sse_kms_key_id: str | None = None
    patience_s: float = 20.0

    @classmethod
    def gather(cls, options: Mapping[str, str], environ: Mapping[str, str], patience_s: float) -> S3Settings:
        """Collect the settings; an option wins over a variable."""
        key_id = options.get("sse_kms_key_id") or environ.get("CRCLI_S3_SSE_KMS_KEY_ID")
        return cls(
            endpoint_url=options.get("endpoint_url"),
            region=options.get("region"),
            profile=options.get("profile"),
            addressing_style=options.get("addressing_style"),
            sse=options.get("sse") or environ.get("CRCLI_S3_SSE") or ("aws:kms" if key_id else None),
            sse_kms_key_id=key_id,
            patience_s=patience_s,
        )

    @property
    def encryption(self) -> dict[str, str]:
        """The parameters that ask for encryption at rest, for every request that creates an object."""
        parameters = {"ServerSideEncryption": self.sse, "SSEKMSKeyId": self.sse_kms_key_id}
        return {name: value for name, value in parameters.items() if value}
