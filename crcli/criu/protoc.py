"""Modules that protoc made, run with upb alone: protobuf's compiled part, where it has one.

Such a module imports what protobuf has for text, for services and for those without upb: with CRIU's own that
takes 15 ms, a tenth of what a command needs before it reaches CRIU. All that the module then does is to hand
the description of its file to upb, and to have upb make classes. So it is given stand-ins for what it imports
that do just this, in upb's own pool: whoever imports the same module in the usual way gets the same classes.
"""

from __future__ import annotations

import builtins
import os
from importlib.machinery import SourceFileLoader
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence


class Modules:
    """Modules of a folder, and those that they import, each run when it is first asked for.

    Whatever is not as we know it raises, with no harm done to who then imports the module itself.
    """

    def __init__(self, folder: str) -> None:
        """Raises ImportError where upb is not here."""
        from google._upb import _message
        from google.protobuf import __path__ as beside
        from google.protobuf.internal.enum_type_wrapper import EnumTypeWrapper
        from google.protobuf.message import Message

        self._folder = folder
        self._beside = beside[0]
        self._upb: Any = _message
        self._base = Message
        self._enum = EnumTypeWrapper
        self._found: dict[str, ModuleType] = {}
        self._builtins = {**vars(builtins), "__import__": self._imported}
        self._stand_ins = {
            "builder": SimpleNamespace(
                BuildMessageAndEnumDescriptors=lambda file, into: None,
                BuildTopDescriptorsAndMessages=self._build,
            ),
            "descriptor": SimpleNamespace(_USE_C_DESCRIPTORS=True),
            "descriptor_pool": SimpleNamespace(Default=lambda: _message.default_pool),
            "runtime_version": SimpleNamespace(
                ValidateProtobufRuntimeVersion=lambda *version: None, Domain=SimpleNamespace(PUBLIC=0)
            ),
            "symbol_database": SimpleNamespace(Default=lambda: None),
        }

    def module(self, name: str, folder: str | None = None) -> ModuleType:
        """The module of this name."""
        if (found := self._found.get(name)) is None:
            path = os.path.join(folder or self._folder, f"{name}.py")
            code = SourceFileLoader(name, path).get_code(name)
            if code is None:
                raise ImportError(f"{path} cannot be read")
            found = ModuleType(name)
            vars(found)["__builtins__"] = self._builtins
            exec(code, vars(found))
            self._found[name] = found
        return found

    def _imported(
        self,
        name: str,
        into: Any = None,
        local: Any = None,
        wanted: Sequence[str] | None = (),
        level: int = 0,
    ) -> Any:
        """What such a module imports: another of its folder, or something of protobuf."""
        if not name.startswith("google.protobuf"):
            return self.module(name)
        return SimpleNamespace(
            **{
                one: self.module(one, self._beside) if one.endswith("_pb2") else self._stand_ins[one]
                for one in wanted or ()
            }
        )

    def _build(self, file: Any, name: str, into: dict[str, Any]) -> None:
        """Give the module `name` what its file describes, as google.protobuf.internal.builder would."""
        for one, enum in file.enum_types_by_name.items():
            into[one] = self._enum(enum)
            into.update((value.name, value.number) for value in enum.values)
        into.update(file.extensions_by_name)
        for one, message in file.message_types_by_name.items():
            into[one] = self._class(name, message, "")

    def _class(self, module: str, description: Any, prefix: str) -> Any:
        """The class of a message, with those of messages inside it."""
        inside = {
            name: self._class(module, nested, f"{prefix}{description.name}.")
            for name, nested in description.nested_types_by_name.items()
        }
        about = {
            "DESCRIPTOR": description,
            "__module__": module,
            "__qualname__": prefix + description.name,
        }
        return self._upb.MessageMeta(description.name, (self._base,), {**inside, **about})
