"""Where objects live: directories and S3, behind one contract (base.py)."""

from __future__ import annotations

from crcli.store.base import Buffer, ObjectInfo, ObjectWriter, Store
from crcli.store.open import open_store

__all__ = ["Buffer", "ObjectInfo", "ObjectWriter", "Store", "open_store"]
