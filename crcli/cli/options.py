"""Options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

StoreOption = Annotated[
    str | None,
    typer.Option(
        "--store",
        metavar="URL",
        help="Where images live: file:///path or s3://bucket/prefix. "
        "Default: $CRCLI_STORE, the configuration file, then file:///var/lib/crcli/store.",
        show_default=False,
    ),
]

EndpointOption = Annotated[
    str | None,
    typer.Option("--endpoint-url", metavar="URL", help="The S3 server to use.", show_default=False),
]

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]

ImageArgument = Annotated[
    str,
    typer.Argument(
        metavar="IMAGE",
        help="NAME (the newest of that name), NAME@ID, or a full URL.",
        show_default=False,
    ),
]
