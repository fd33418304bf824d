"""Run the C++ kernels' AVX-512 build on a CPU that lacks it, in the emulator Bochs.

    python -m tests.kernels.native.emulate_avx512 VMLINUZ

Boots a Linux kernel with check_threads.cpp as its only work (some minutes), and compares what it
printed for each instruction set. Needs root (for a device node), the Debian packages bochs,
bochs-term, isolinux, syslinux-common, xorriso and cpio, and a kernel that was unpacked, not
installed: apt-get download linux-image-*-cloud-amd64, dpkg -x; its vmlinuz is the argument.
Ends with status 1 unless all three instruction sets print the same hashes.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.kernels import builds

HERE = Path(__file__).parent
ISOLINUX = Path("/usr/lib/ISOLINUX/isolinux.bin")
LDLINUX = Path("/usr/lib/syslinux/modules/bios/ldlinux.c32")
# The emulated XSAVES sizes its area otherwise than Linux expects, which then turns AVX off.
BOOT = """DEFAULT check
LABEL check
  KERNEL vmlinuz
  APPEND initrd=initrd console=ttyS0 quiet clearcpuid=xsaves,xsavec mitigations=off panic=-1 nosmp
"""
MACHINE = """megs: 256
cpu: model=corei7_skylake_x, ips=50000000, ignore_bad_msrs=1
romimage: file=/usr/share/bochs/BIOS-bochs-latest
vgaromimage: file=/usr/share/bochs/VGABIOS-lgpl-latest
ata0-master: type=cdrom, path={folder}/boot.iso, status=inserted
boot: cdrom
com1: enabled=1, mode=file, dev={folder}/output
log: {folder}/log
display_library: term
"""


def build_program(folder: Path) -> Path:
    build = builds.Build(builds.ROOT / "csrc", folder / "objects", ["-static"])
    sources = [source for source in build.sources() if source.stem != "bindings"]
    sources.append(HERE / "check_threads.cpp")
    build.compile(sources)
    program = folder / "check_threads"
    build.link(program, sources)
    return program


def build_image(folder: Path, kernel: Path) -> None:
    root, image = folder / "root", folder / "image"
    (root / "dev").mkdir(parents=True)
    image.mkdir()
    os.mknod(root / "dev" / "console", 0o600 | 0o020000, os.makedev(5, 1))
    subprocess.run(["cc", "-static", "-o", str(root / "init"), str(HERE / "emulate.c")], check=True)
    shutil.copy(build_program(folder), root)
    with (image / "initrd").open("wb") as archive:
        names = "\n".join(str(path.relative_to(root)) for path in sorted(root.rglob("*")))
        subprocess.run(
            ["cpio", "-o", "-H", "newc"], cwd=root, input=names.encode(), stdout=archive, check=True
        )
    shutil.copy(kernel, image / "vmlinuz")
    for file in (ISOLINUX, LDLINUX):
        shutil.copy(file, image)
    (image / "isolinux.cfg").write_text(BOOT)
    subprocess.run(
        [
            *("xorriso", "-as", "mkisofs", "-quiet", "-o", str(folder / "boot.iso")),
            *("-b", "isolinux.bin", "-c", "boot.cat", "-no-emul-boot", "-boot-load-size", "4"),
            *("-boot-info-table", str(image)),
        ],
        check=True,
    )


def main(kernel: Path) -> int:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build_image(folder, kernel)
        (folder / "machine").write_text(MACHINE.format(folder=folder))
        # Debian's Bochs starts in its debugger: c continues. Its display needs a terminal.
        (folder / "commands").write_text("c\n")
        emulator = f"bochs -q -f {folder}/machine -rc {folder}/commands"
        subprocess.run(
            ["script", "-qc", emulator, os.devnull],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            check=False,
        )
        lines = (folder / "output").read_text(errors="replace").splitlines()
    found: dict[str, list[str]] = {}
    isa = ""
    for line in lines:
        words = line.split()
        if line.startswith("isa "):
            isa = words[1]
            found[isa] = []
        elif line.startswith(f"status of {isa}: 0"):
            isa = ""
        elif isa and len(words) == 2:
            found[isa].append(line)
    sys.stdout.write("\n".join(lines[-70:]) + "\n")
    same = len(found) == 3 and isa == "" and len(set(map(tuple, found.values()))) == 1
    sys.stdout.write(f"{'the same bits' if same else 'DIFFERENT'} on {', '.join(found)}\n")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
