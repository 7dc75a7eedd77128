"""Finds the plug-ins that are installed here, and calls their hooks one by one.

A plug-in that cannot be loaded, or fails, is a finding and never the end of a command. `CRCLI_NO_PLUGINS=1`
leaves all of them out.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from crcli.errors import CrcliError
from crcli.findings import Finding, Severity
from crcli.plugins.names import GROUP, PREFIX
from crcli.records import Struct, asdict, field

if TYPE_CHECKING:
    from collections.abc import Iterator
    from importlib.metadata import EntryPoint

_MAY_REFUSE = ("dump_before_freeze", "restore_before")

_BUILT_IN = {"notice_sources": "crcli.notice.builtin"}
"""What crcli implements of the contract itself: the hook, without its prefix, and the module."""


class PluginInfo(Struct):
    """One plug-in: its name, the package that brings it, the hooks it implements, or why it does not work."""

    name: str
    package: str
    version: str
    hooks: list[str] = field(default_factory=list)
    error: str = ""

    def as_json(self) -> dict[str, Any]:
        """The plug-in as `crcli plugins --json` prints it."""
        return asdict(self)


class Hooks:
    """The hooks of the plug-ins that work. `findings` grows by what goes wrong."""

    def __init__(self, plugins: list[PluginInfo], manager: Any = None) -> None:
        self.plugins = plugins
        self.findings: list[Finding] = [
            _finding("plugin-broken", one.name, f"cannot be used: {one.error}", one.package)
            for one in plugins
            if one.error
        ]
        self._manager = manager

    @property
    def is_empty(self) -> bool:
        """Whether nobody is there to be called."""
        return self._manager is None

    def call(self, hook: str, **arguments: Any) -> None:
        """Call a hook of the contract, without its prefix: `hooks.call("dump_frozen", target=target)`.

        Raises a plug-in's CrcliError where the contract lets it refuse; all else becomes a finding. What
        crcli implements itself comes first.
        """
        if hook in _BUILT_IN:
            getattr(import_module(_BUILT_IN[hook]), PREFIX + hook)(**arguments)
        if self._manager is None:
            return
        for implementation in getattr(self._manager.hook, PREFIX + hook).get_hookimpls():
            try:
                implementation.function(*(arguments[name] for name in implementation.argnames))
            except CrcliError as error:
                if hook in _MAY_REFUSE:
                    raise
                self._note(implementation.plugin_name, hook, error)
            except (Exception, SystemExit) as error:
                self._note(implementation.plugin_name, hook, error)

    def _note(self, plugin: str, hook: str, error: BaseException) -> None:
        what = f"failed in crcli_{hook}: {type(error).__name__}: {error}"
        self.findings.append(_finding("plugin-failed", plugin, what, hook))


def load_hooks() -> Hooks:
    """Load every plug-in that is installed; costs next to nothing where there is none."""
    if os.environ.get("CRCLI_NO_PLUGINS") or not _any_installed():
        return Hooks([])
    from importlib.metadata import entry_points

    return _load(sorted(entry_points(group=GROUP), key=lambda entry: entry.name))


def _any_installed() -> bool:
    """Whether some package here names the group: a look at the files that importlib.metadata would parse.

    Importing importlib.metadata alone takes 20 ms and more; this takes one.
    """
    return any(_names_group(folder) for place in sys.path for folder in _packages(place))


def _packages(place: str) -> Iterator[str]:
    try:
        with os.scandir(place or ".") as entries:
            yield from (e.path for e in entries if e.name.endswith((".dist-info", ".egg-info")))
    except OSError:
        return


def _names_group(folder: str) -> bool:
    try:
        with open(os.path.join(folder, "entry_points.txt"), "rb") as file:
            return f"[{GROUP}]".encode() in file.read()
    except OSError:
        return False


def _load(entries: list[EntryPoint]) -> Hooks:
    import pluggy

    manager = pluggy.PluginManager("crcli")
    _declare(manager, pluggy.HookspecMarker("crcli"))
    plugins = []
    for entry in entries:
        package = entry.dist.name if entry.dist is not None else ""
        info = PluginInfo(entry.name, package, entry.dist.version if entry.dist is not None else "")
        plugins.append(info)
        try:
            plugin = entry.load()
            manager.register(plugin, name=entry.name)
        except (Exception, SystemExit) as error:
            info.error = f"{type(error).__name__}: {error}"
            continue
        _examine(manager, plugin, info)
    return Hooks(plugins, manager)


def _declare(manager: Any, marker: Any) -> None:
    """Tell pluggy of the contract, which is written without it."""
    from crcli.plugins import spec

    for name, function in vars(spec).items():
        if name.startswith(PREFIX):
            marker(function)
    manager.add_hookspecs(spec)


def _examine(manager: Any, plugin: Any, info: PluginInfo) -> None:
    """Note which hooks a plug-in implements; one that implements what is not in the contract is broken."""
    callers = manager.get_hookcallers(plugin) or []
    info.hooks = sorted(caller.name for caller in callers if caller.spec is not None)
    unknown = sorted(caller.name for caller in callers if caller.spec is None)
    if unknown:
        info.error = f"implements hooks that this crcli does not have: {', '.join(unknown)}"
    elif not info.hooks:
        info.error = "implements no hook"


def _finding(name: str, plugin: str, message: str, where: str) -> Finding:
    return Finding(
        name,
        Severity.NOTE,
        f"the plug-in {plugin} {message}",
        {"plugin": plugin, "where": where},
        "goes on without it",
        "`crcli plugins` lists the plug-ins; CRCLI_NO_PLUGINS=1 leaves them out",
    )
