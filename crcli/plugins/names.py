"""By what names plug-ins are found, and their hooks."""

from __future__ import annotations

GROUP = "crcli.plugins"
"""The group of entry points that packages name their plug-ins in."""

PREFIX = "crcli_"
"""What the names of hooks begin with."""
