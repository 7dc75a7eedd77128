"""What a user's script does with boto3: `python -m tests.bench.client up|down FILE BUCKET KEY`.

Prints how long the transfer itself took (seconds), the start of Python and of boto3 left out.
"""

from __future__ import annotations

import sys
import time

import boto3


def main(direction: str, path: str, bucket: str, key: str) -> None:
    """Move one file with boto3's transfer manager, as it comes."""
    client = boto3.client("s3")
    began = time.monotonic()
    if direction == "up":
        client.upload_file(path, bucket, key)
    else:
        client.download_file(bucket, key, path)
    print(time.monotonic() - began)


if __name__ == "__main__":
    main(*sys.argv[1:])
