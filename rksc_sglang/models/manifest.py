"""The list of a model directory's files, with sizes and SHA-256: is this the model we know?"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

MANIFEST = "manifest.json"

#: "size" compares file sizes (milliseconds), "full" the SHA-256 of every file (1 s for 600 MB).
Verify = Literal["size", "full"]


def damage(model_dir: Path, verify: Verify) -> str | None:
    """What is wrong with a model directory, or None."""
    try:
        files = json.loads((model_dir / MANIFEST).read_text())["files"]
        for name, expected in files.items():
            path = model_dir / name
            size = path.stat().st_size
            if size != expected["size"]:
                return f"{name} has {size} bytes, not {expected['size']}"
            if verify == "full" and sha256_of(path) != expected["sha256"]:
                return f"{name} has the wrong SHA-256"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (ValueError, KeyError, TypeError):
        return f"{MANIFEST} is not readable"
    return None


def write_manifest(model_dir: Path, about: Mapping[str, Any]) -> None:
    """Write down the files that are there now; ``about`` says where they come from."""
    manifest = {
        **about,
        "files": {
            path.name: {"size": path.stat().st_size, "sha256": sha256_of(path)}
            for path in sorted(model_dir.iterdir())
            if path.name != MANIFEST
        },
    }
    (model_dir / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
