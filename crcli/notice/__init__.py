"""Who says that this node goes away: signals, clouds, Slurm, Kubernetes, a file, an HTTP hook.

`Notices` runs sources beside each other and hands out what they say. A source is made by a kind of source,
which comes through the plug-in door (`crcli_notice_sources`), ours as well.
"""

from __future__ import annotations

from crcli.notice.base import Notice, Source, SourceKind, Surroundings, Urgency
from crcli.notice.notices import Notices

__all__ = ["Notice", "Notices", "Source", "SourceKind", "Surroundings", "Urgency"]
