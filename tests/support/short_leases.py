"""crcli with leases that are short: `python -m tests.support.short_leases TTL ARGUMENT…`."""

from __future__ import annotations

import sys

from crcli.image.lease import Lease
from crcli.main import main

if __name__ == "__main__":
    Lease.claim.__func__.__kwdefaults__["ttl_s"] = float(sys.argv[1])  # type: ignore[attr-defined]
    sys.exit(main(sys.argv[2:]))
