"""Where onnxruntime ran each node, from its profile."""

from __future__ import annotations

import json
from pathlib import Path

import onnxruntime


def placement(session: onnxruntime.InferenceSession) -> dict[str, tuple[str, str]]:
    """End the profiling of a session: by node, its operator and the provider that ran it."""
    path = Path(session.end_profiling())
    events = json.loads(path.read_text())
    path.unlink()
    return {
        event["name"].removesuffix("_kernel_time"): (event["args"]["op_name"], event["args"]["provider"])
        for event in events
        if event.get("cat") == "Node" and "provider" in event.get("args", {})
    }


def copies(placed: dict[str, tuple[str, str]]) -> list[str]:
    """The nodes that copy between the memories of two providers."""
    return [name for name, (op, _) in placed.items() if op.startswith("Memcpy")]
