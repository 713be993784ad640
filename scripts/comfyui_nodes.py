"""Write what a running ComfyUI says of the nodes that our workflows have, for the tests.

    python scripts/comfyui_nodes.py http://127.0.0.1:8188 tests/train/sampling/comfyui_nodes.json

Per node: inputs (links and values) and outputs, name → type, in ComfyUI's order. A list is the
choices of a value; one of files on that machine is left empty.
"""

import json
import sys
from pathlib import Path
from typing import Any
from urllib.request import urlopen

from train.sampling.comfyui import NODES

FILES = ("_name", "image")


def definition(node: dict[str, Any]) -> dict[str, Any]:
    """Of one node of `/object_info`."""
    inputs: dict[str, Any] = {}
    for group in ("required", "optional"):
        for name in node["input_order"].get(group, ()):
            kind, *about = node["input"][group][name]
            if kind == "COMBO":
                kind = about[0]["options"]
            if isinstance(kind, list) and name.endswith(FILES) and name != "sampler_name":
                kind = []
            inputs[name] = kind
    optional = node["input_order"].get("optional", [])
    outputs = list(zip(node["output_name"], node["output"], strict=True))
    return {"inputs": inputs, "optional": optional, "outputs": outputs}


def main(url: str, output: str) -> None:
    """Ask the server at `url` and write the file `output`."""
    with urlopen(f"{url}/object_info") as answer:
        nodes = json.load(answer)
    with urlopen(f"{url}/system_stats") as answer:
        version = json.load(answer)["system"]["comfyui_version"]
    found = {"comfyui": version} | {kind: definition(nodes[kind]) for kind in sorted(NODES)}
    Path(output).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
