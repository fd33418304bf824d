"""Known vulnerabilities of the project's packages: pip-audit's findings fail, its gaps are named.

    python .ci/audit.py PIP-AUDIT CONSTRAINTS [PYTHON]

Audited are the pinned packages and, where the Python of an installed environment is given, those
that it has besides, which the pinned ones brought. The database of vulnerabilities is on the net.
Where it cannot be reached, nothing was audited: that is said, and is no failure of the code under
test. Whatever else ends pip-audit without a result is one.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

# What pip-audit ends with where no connection comes about: its own words, or those of requests.
_NO_NETWORK = re.compile(
    r"Could not connect to PyPI's vulnerability feed"
    r"|^requests\.exceptions\.(ConnectionError|ConnectTimeout|ReadTimeout|ProxyError): ",
    re.MULTILINE,
)
_PIN = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)==([^\s;+]+)")


def requirements(constraints: str, frozen: str) -> str:
    """Return the pins of an environment, and those of the constraints that it lacks.

    Builds for one machine ('2.13.0+cpu') stand in the database without that ending.
    """
    installed = {_name(it[1]): f"{it[1]}=={it[2]}" for it in _PIN.finditer(frozen)}
    besides = [
        line
        for line in constraints.splitlines()
        if (found := _PIN.match(line)) and _name(found[1]) not in installed
    ]
    return "\n".join([*installed.values(), *besides]) + "\n"


def _name(text: str) -> str:
    return re.sub(r"[-_.]+", "-", text).lower()


def main(program: str, constraints: str, python: str = "") -> int:
    """Audit, print one line a finding, and return the exit code."""
    frozen = ""
    if python:
        command = [python, "-m", "pip", "freeze", "--all", "--exclude-editable"]
        frozen = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    with tempfile.TemporaryDirectory() as folder:
        listed = Path(folder) / "requirements.txt"
        listed.write_text(requirements(Path(constraints).read_text("utf-8"), frozen), "utf-8")
        command = [program, "--no-deps", "--disable-pip", "--format", "json", "-r", str(listed)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        packages = json.loads(result.stdout)["dependencies"]
    except (ValueError, LookupError):
        reason = (result.stderr.strip().splitlines() or ["no output"])[-1]
        if _NO_NETWORK.search(result.stderr):
            print(f"NOT AUDITED: pip-audit could not ask its database: {reason}")
            return 0
        print(f"FAILED: pip-audit ended with code {result.returncode} and no result: {reason}")
        return 1
    skipped = [it["name"] for it in packages if "skip_reason" in it]
    found = [(it, vuln) for it in packages for vuln in it.get("vulns", ())]
    for package, vulnerability in found:
        fixed = ", ".join(vulnerability["fix_versions"]) or "no version"
        print(f"{package['name']} {package['version']}: {vulnerability['id']}, fixed in {fixed}")
    if skipped:
        print(f"NOT AUDITED: {len(skipped)} of {len(packages)}: {', '.join(skipped)}")
    print(f"audited {len(packages) - len(skipped)} packages: {len(found)} known vulnerabilities")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
