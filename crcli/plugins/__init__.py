"""The one door for plug-ins: `spec` is the contract, `load_hooks` the way to call them.

pluggy and the contract are imported only when a plug-in is installed, or when one asks for `hookimpl`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from crcli.plugins.loader import Hooks, load_hooks

if TYPE_CHECKING:
    from crcli.plugins.spec import DumpTarget, Failure, RestoreTarget, hookimpl

__all__ = ["DumpTarget", "Failure", "Hooks", "RestoreTarget", "hookimpl", "load_hooks"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from crcli.plugins import spec

        return getattr(spec, name)
    raise AttributeError(name)
