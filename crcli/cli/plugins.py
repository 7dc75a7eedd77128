"""`crcli plugins`: what is installed here, and whether it works."""

from __future__ import annotations

from crcli.cli.options import JsonOption


def plugins(as_json: JsonOption = False) -> None:
    """List the plug-ins that are installed here, the hooks they implement, and what is wrong with them.

    Then the sources of notices that the node goes away, those of plug-ins and crcli's own.
    """
    from crcli.notice.choose import known_kinds
    from crcli.plugins.loader import load_hooks
    from crcli.ui import plugins as ui
    from crcli.ui.reports import show_json

    hooks = load_hooks()
    kinds = known_kinds(hooks)
    if as_json:
        show_json(
            {
                "plugins": [plugin.as_json() for plugin in hooks.plugins],
                "notices": [kind.as_json() for kind in kinds],
                "findings": [finding.as_json() for finding in hooks.findings],
            }
        )
    else:
        ui.show(hooks.plugins, kinds, hooks.findings)
