"""Publish as the environment says, and print which modules were entered: `python -m tests.publish.entered`.

A module is entered when one of its functions runs, in whichever thread; what runs while modules are imported is not
counted, nor is what child processes do.
"""

import json
import os
import sys
import threading
from types import FrameType

from builder.publish import publish
from builder.settings import Settings

_entered: dict[str, set[str]] = {}
_thread = threading.local()


def _count(frame: FrameType, event: str, _argument: object) -> None:
    imports = getattr(_thread, "imports", 0)
    if frame.f_code.co_name == "<module>":
        _thread.imports = imports + {"call": 1, "return": -1}.get(event, 0)
    elif event == "call" and not imports:
        # Some frames have no name, or another object by that name.
        module = frame.f_globals.get("__name__")
        if isinstance(module, str) and module.partition(".")[0] == "builder":
            _entered.setdefault(module, set()).add(frame.f_code.co_qualname)


if __name__ == "__main__":
    threading.setprofile(_count)
    sys.setprofile(_count)
    publish(Settings.from_environ(os.environ))
    sys.setprofile(None)
    threading.setprofile(None)
    json.dump({module: sorted(functions) for module, functions in sorted(_entered.items())}, sys.stdout)
