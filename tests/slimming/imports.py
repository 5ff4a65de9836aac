"""What a run of the main job imports on its way, for a server that forks runs; computes nothing."""

import os

os.environ["NNCF_CI"] = "1"

import importlib

for name in ("nncf", "openvino", "onnx", "timm", "lissom.export.openvino_cut", "lissom.export.openvino_shared"):
    importlib.import_module(name)
for name in ("lissom.slimming", "lissom.techniques.int8", "tests.slimming.standin"):
    importlib.import_module(name)
