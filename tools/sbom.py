"""A bill of materials of what CI and `make` install, as CycloneDX JSON: every package of requirements.lock.

python tools/sbom.py FILE.json

Made from the lock alone and the metadata of what is installed (licences, where there are any), by the standard
library: a generator from elsewhere would be one more thing to trust, for a file of this size. Does not know what a
package contains, nor vulnerabilities; tools that do read this file.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import uuid
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def bill(lock: str, version: str) -> dict[str, Any]:
    """The document. The same lock gives the same one, but for licences of what is not installed here."""
    components = [component(name, pinned) for name, pinned in re.findall(r"^([\w.-]+)==([^\s;\\]+)", lock, re.M)]
    whole = reference("abliterated", version)
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.UUID(hashlib.sha256(lock.encode()).hexdigest()[:32])}",
        "version": 1,
        "metadata": {
            "component": {
                "type": "application",
                "bom-ref": whole,
                "name": "abliterated",
                "version": version,
                "purl": whole,
                "licenses": [{"license": {"id": "Apache-2.0"}}],
            }
        },
        "components": components,
        "dependencies": [{"ref": whole, "dependsOn": [one["bom-ref"] for one in components]}],
    }


def component(name: str, pinned: str) -> dict[str, Any]:
    """One package."""
    found = {
        "type": "library",
        "bom-ref": reference(name, pinned),
        "name": name,
        "version": pinned,
        "purl": reference(name, pinned),
    }
    if told := licence(name):
        found["licenses"] = [told]
    return found


def reference(name: str, version: str) -> str:
    """The package's URL, as the purl specification has it."""
    return f"pkg:pypi/{re.sub(r'[-_.]+', '-', name).lower()}@{version}"


def licence(name: str) -> dict[str, Any] | None:
    """What the package itself says: an expression, or a short name."""
    try:
        told = metadata.metadata(name)
    except metadata.PackageNotFoundError:
        return None
    if expression := told.get("License-Expression"):
        return {"expression": expression}
    named = [line.rpartition(" :: ")[2] for line in told.get_all("Classifier") or [] if line.startswith("License ::")]
    short = named[0] if named else (told.get("License") or "").strip().split("\n")[0][:64]
    return {"license": {"name": short}} if short else None


def main() -> int:
    if len(sys.argv) != 2:
        sys.stderr.write("python tools/sbom.py FILE.json\n")
        return 2
    source = (ROOT / "client" / "abliterate" / "__init__.py").read_text()
    version = re.findall(r'__version__ = "([^"]+)"', source)[0]
    document = bill((ROOT / "requirements.lock").read_text(), version)
    target = Path(sys.argv[1])
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(document, indent=2) + "\n")
    sys.stdout.write(f"{target}: {len(document['components'])} packages\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
