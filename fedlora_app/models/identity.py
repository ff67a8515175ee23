"""Which base an adapter is for: how it is named, and what tells its weights from any others."""

from __future__ import annotations

import hashlib
from importlib import metadata
from pathlib import Path
from typing import Any

from fedlora_app.data import packaged
from fedlora_app.models.pretrained import locate

WEIGHTS = {".safetensors", ".onnx"}


def base_identity(name: str) -> dict[str, str]:
    """Return what a run's folder says of its base.

    Parameters
    ----------
    name : str
        A packaged model, a local folder or a Hugging Face id.

    Returns
    -------
    dict
        ``name``; ``kind`` (packaged, folder or hub); ``package`` of a packaged one, with its
        version; ``commit`` of a hub's, where it is known; ``sha256`` of its files of weights, where
        they are on this machine.
    """
    source, local = locate(name)
    found = {"name": name, "kind": "hub"}
    files = Path(source) if local else _snapshot(source)
    if name.startswith(packaged.PREFIX):
        found["kind"] = "packaged"
        package = packaged.MODELS.get(name.removeprefix(packaged.PREFIX), ("", ""))[0]
        if package:
            found["package"] = f"{package}=={metadata.version(package)}"
    elif local:
        found |= {"kind": "folder", "name": str(Path(source).absolute())}
    elif files is not None:
        found["commit"] = files.name
    if files is not None and (digest := weights_digest(files)):
        found["sha256"] = digest
    return found


def weights_digest(place: Path) -> str:
    """Return the SHA-256 over the files of weights of a folder, or of the one file; "" for none."""
    files = [place] if place.is_file() else sorted(place.iterdir())
    held = [file for file in files if file.suffix in WEIGHTS and file.is_file()]
    total = hashlib.sha256()
    for file in held:
        with file.open("rb") as opened:
            total.update(hashlib.file_digest(opened, "sha256").digest())
    return total.hexdigest() if held else ""


def refuse_another(known: dict[str, Any], name: str) -> None:
    """Raise ValueError if the weights of this name are not those of the base that is known.

    On another base an adapter computes something, and it means nothing.
    """
    found = base_identity(name)
    if known.get("sha256") and found.get("sha256", known["sha256"]) != known["sha256"]:
        raise ValueError(
            f"the base {name!r}: expected the weights the run was trained on (SHA-256 "
            f"{known['sha256'][:12]}…, {known.get('package', known['name'])}), got others "
            f"({found['sha256'][:12]}…); name the right one with base=…, or, if the numbers in "
            "them are the same, take sha256 out of the run's model.json"
        )


def _snapshot(repository: str) -> Path | None:
    """Return where a hub's model lies on this machine, once it was loaded."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repository, "config.json")
    return Path(found).parent if isinstance(found, str) else None
