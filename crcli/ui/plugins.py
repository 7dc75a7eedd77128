"""What `crcli plugins` shows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from crcli.ui.table import show_table
from crcli.ui.text import printable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from crcli.findings import Finding
    from crcli.notice.base import SourceKind
    from crcli.plugins.loader import PluginInfo


def show(plugins: Sequence[PluginInfo], kinds: Sequence[SourceKind], findings: Sequence[Finding]) -> None:
    """Print the plug-ins, what failed when they were called, and the sources of notices."""
    if plugins:
        rows = [
            (one.name, f"{one.package} {one.version}".strip(), one.error or ", ".join(one.hooks))
            for one in plugins
        ]
        show_table(("PLUG-IN", "PACKAGE", "HOOKS"), rows)
    else:
        print("no plug-ins are installed here")
    for finding in findings:
        if finding.name == "plugin-failed":
            print(printable(finding.message))
    print()
    show_table(("NOTICE", "PACKAGE", "SEES"), [(one.shown, one.package, one.sees) for one in kinds])
