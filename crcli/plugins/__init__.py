"""The one door for plug-ins: `spec` is the contract, `load_hooks` the way to call them.

pluggy is imported only when a plug-in is installed, or asks for `hookimpl`; the contract only when somebody
asks for it: its making takes 4 ms.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from crcli.plugins.loader import Hooks, load_hooks

if TYPE_CHECKING:
    from pluggy import HookimplMarker

    from crcli.plugins.spec import DumpTarget, Failure, RestoreTarget

    hookimpl: HookimplMarker

__all__ = ["DumpTarget", "Failure", "Hooks", "RestoreTarget", "hookimpl", "load_hooks"]


def __getattr__(name: str) -> Any:
    if name in ("DumpTarget", "Failure", "RestoreTarget"):
        from crcli.plugins import spec

        return getattr(spec, name)
    if name != "hookimpl":
        raise AttributeError(name)
    import pluggy

    return pluggy.HookimplMarker("crcli")
