"""Make the bucket `crcli` on an S3 server that takes anybody's word: `make_bucket.py ENDPOINT_URL`.

It waits until the server listens.
"""

import sys

import boto3
from botocore.config import Config

boto3.client(
    "s3",
    endpoint_url=sys.argv[1],
    region_name="us-east-1",
    aws_access_key_id="anyone",
    aws_secret_access_key="anything",
    config=Config(retries={"mode": "standard", "total_max_attempts": 8}),
).create_bucket(Bucket="crcli")
