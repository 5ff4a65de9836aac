"""Networks, one file an architecture family. Importing this room registers every one of them with timm."""

from __future__ import annotations

import importlib

from lissom.registry import parts

for _module in sorted({part.module for part in parts("network")}):
    importlib.import_module(_module)
