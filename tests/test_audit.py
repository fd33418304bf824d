"""The audit of the packages: what passes without a result, and what is asked about."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SPEC = importlib.util.spec_from_file_location("audit", ROOT / ".ci" / "audit.py")
audit = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(audit)


def pip_audit(folder: Path, code: int, output: str, errors: str) -> str:
    """A program that ends as pip-audit might."""
    path = folder / "pip-audit"
    path.write_text(
        f"#!{sys.executable}\nimport sys\n"
        f"print({output!r})\nprint({errors!r}, file=sys.stderr)\nsys.exit({code})\n"
    )
    path.chmod(0o755)
    return str(path)


PACKAGES = {"dependencies": [{"name": "a", "version": "1", "vulns": []}]}
VULNERABLE = {"id": "CVE-1", "fix_versions": ["2"]}


@pytest.mark.parametrize(
    ("output", "errors", "code", "words"),
    [
        (json.dumps(PACKAGES), "", 0, "audited 1 packages"),
        (
            json.dumps({"dependencies": [{"name": "a", "version": "1", "vulns": [VULNERABLE]}]}),
            "Found 1 known vulnerability",
            1,
            "a 1: CVE-1, fixed in 2",
        ),
        ("", "ERROR:pip_audit._cli:Could not connect to PyPI's vulnerability feed", 0, "NOT AUD"),
        ("", "Trace\nrequests.exceptions.ConnectionError: HTTPSConnectionPool(", 0, "NOT AUDITED"),
        ("", "usage: pip-audit [-h]\npip-audit: error: unrecognized arguments: -r", 1, "FAILED"),
        ("", "pip_audit._service.interface.ServiceError", 1, "FAILED"),
        ("", "", 1, "FAILED: pip-audit ended with code 1 and no result: no output"),
    ],
)
def test_only_a_missing_network_passes(tmp_path, capsys, output, errors, code, words):
    """A tool that breaks would audit nothing for months, and CI would stay green."""
    constraints = tmp_path / "constraints.txt"
    constraints.write_text("a==1\n")
    program = pip_audit(tmp_path, int(bool(errors) or not output), output, errors)
    assert audit.main(program, str(constraints)) == code
    assert words in capsys.readouterr().out


def test_packages_that_others_brought_are_audited():
    """Only a third of what is installed stands in the constraints."""
    constraints = "# Pins.\nA_b==1\nother==3; python_version < '3.11'\n"
    frozen = "a-b==1\ntorch==2.13.0+cpu\nurllib3==2.0\nlocal @ file:///x\n"
    assert audit.requirements(constraints, frozen).splitlines() == [
        "a-b==1",
        "torch==2.13.0",
        "urllib3==2.0",
        "other==3; python_version < '3.11'",
    ]
    assert audit.requirements(constraints, "").splitlines() == constraints.splitlines()[1:]
