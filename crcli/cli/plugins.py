"""`crcli plugins`: what is installed here, and whether it works."""

from __future__ import annotations

from crcli.cli.options import JsonOption


def plugins(as_json: JsonOption = False) -> None:
    """List the plug-ins that are installed here, the hooks they implement, and what is wrong with them."""
    from crcli.plugins.loader import load_hooks
    from crcli.ui.reports import show_json
    from crcli.ui.table import show_table

    found = load_hooks().plugins
    if as_json:
        show_json({"plugins": [plugin.as_json() for plugin in found]})
    elif not found:
        print("no plug-ins are installed here")
    else:
        rows = [
            (one.name, f"{one.package} {one.version}".strip(), one.error or ", ".join(one.hooks))
            for one in found
        ]
        show_table(("PLUG-IN", "PACKAGE", "HOOKS"), rows)
