"""`sdcli selftest`: check that generating works on this machine, and print its devices."""

from __future__ import annotations

from typing import Any

from sdcli.cli.options.shared import DeviceOpt, DTypeOpt, JsonOpt, QuietOpt, VerboseOpt
from sdcli.cli.ui.console import Console
from sdcli.errors import SdcliError
from sdcli.generation.settings import RunSettings


def command(
    device: DeviceOpt = "auto",
    dtype: DTypeOpt = "auto",
    as_json: JsonOpt = False,
    quiet: QuietOpt = False,
    verbose: VerboseOpt = False,
) -> None:
    """Check every step of generation with a tiny model, offline, in seconds, and print devices and versions.

    No files are left. The exit code is 1 if a check fails.
    """
    console = Console(quiet=quiet, verbose=verbose, json=as_json)
    from sdcli.generation.selftest import checks, machine

    failed = total = 0
    for check in checks(RunSettings(device=device, dtype=dtype)):
        total += 1
        failed += check.error is not None
        console.result(
            f"ok {check.name}" if check.error is None else f"FAILED {check.name}: {check.error}",
            check=check.name,
            status="ok" if check.error is None else "failed",
            seconds=round(check.seconds, 3),
            **({} if check.error is None else {"error": check.error}),
        )
        console.detail(f"{check.name}: {check.seconds:.2f} s")
    facts = machine()
    console.result("\n".join(_lines(facts)), machine=facts)
    if failed:
        raise SdcliError(f"{failed} of {total} checks failed")


def _lines(facts: dict[str, Any]) -> list[str]:
    lines = []
    for name, kind in facts["devices"].items():
        memory = facts["memory"].get(name, {})
        room = f", memory {_gib(memory['total'])}, free {_gib(memory['free'])}" if memory.get("total") else ""
        lines.append(f"device {name}: {kind}, auto dtype {facts['auto_dtype'][name]}{room}")
    bfloat16 = "in hardware" if facts["cpu_bfloat16"] else "only emulated"
    lines.append(f"cpu: {facts['cores']} cores, {facts['threads']} threads, bfloat16 {bfloat16}")
    lines.append(", ".join(f"{name} {version}" for name, version in facts["versions"].items()))
    return lines


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
