"""Measures backdoor behaviour on the exact ONNX file that ships."""

import os

# ONNX Runtime 1.32 on Linux sends usage events unless this is set before its first import. An audit of somebody's
# unreleased model tells nobody: a user who wants the events sets ORT_DISABLE_TELEMETRY=0 himself.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
