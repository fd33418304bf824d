"""Known vulnerabilities of the pinned packages: pip-audit's findings fail, its gaps are named.

    python .ci/audit.py PIP-AUDIT CONSTRAINTS

The database of vulnerabilities is on the net. Where it cannot be asked, nothing was audited: that
is said, and is no failure of the code under test.
"""

from __future__ import annotations

import json
import subprocess
import sys


def main(program: str, constraints: str) -> int:
    """Audit, print one line a finding, and return the exit code."""
    command = [program, "--no-deps", "--disable-pip", "--format", "json", "-r", constraints]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        packages = json.loads(result.stdout)["dependencies"]
    except (ValueError, LookupError):
        reason = (result.stderr.strip().splitlines() or ["no output"])[-1]
        print(f"NOT AUDITED: pip-audit could not ask its database: {reason}")
        return 0
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
