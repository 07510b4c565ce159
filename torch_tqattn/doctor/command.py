"""`python -m torch_tqattn doctor`: what a bug report needs; runs every operator on every device that is here."""

import argparse
from collections.abc import Iterable

import torch

from . import operators, seed_operators
from .machine import DEVICES, description, is_here
from .probe import Check, Probe


def checks() -> list[Check]:
    return [*operators.checks(), *seed_operators.checks()]


def examine(check: Check, device: str) -> bool:
    """Run one check and print its line; whether it is well."""
    # The name first: should the process not survive, it is what the report ends with.
    print(f"  {check.name:<72}", end="", flush=True)
    probe, complaint = Probe(device), ""
    try:
        check.run(probe)
        error, bound = probe.worst()
    except Exception as raised:
        complaint = f"{type(raised).__name__}: {raised}"
    duration = "" if probe.seconds is None else f"{1000 * probe.seconds:.1f} ms"
    if complaint:
        print(f"{duration:>12}  FAILED", *complaint.splitlines(), sep="\n    ", flush=True)
        return False
    is_well = error <= bound  # and no NaN
    print(f"{duration:>12} {error:10.2e} {bound:10.2e}  {'ok' if is_well else 'FAILED'}", flush=True)
    return is_well


def examine_device(device: str, wanted: Iterable[Check]) -> int:
    """How many of these checks failed on the device; printed as they end."""
    print(f"\n{device + ':':<74}{'first call':>12} {'error':>10} {'bound':>10}")
    with torch.no_grad():
        return [examine(check, device) for check in wanted].count(False)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.description = __doc__
    parser.epilog = (
        "An error is relative to the same computation in float64, and may be twice that of plain float32 PyTorch. Of "
        "rows that are stored it says by how much what storing loses differs from what the reference loses. The time "
        "is that of the first call, which on a GPU compiles shaders."
    )
    parser.add_argument(
        "--device", nargs="+", choices=DEVICES, help="check these; FAILED if one is not here (all here)"
    )


def run(arguments: argparse.Namespace) -> None:
    """Print the report; exit code 1 if a check failed or a device that was asked for is not here."""
    for name, text in description():
        print(f"{name + ':':<14}{text}", flush=True)
    failed = count = 0
    for device in arguments.device or [device for device in DEVICES if is_here(device)]:
        if not is_here(device):
            print(f"\n{device}: FAILED: there is no such device")
            failed, count = failed + 1, count + 1
            continue
        wanted = checks()
        failed, count = failed + examine_device(device, wanted), count + len(wanted)
    print(f"\n{failed} of {count} checks FAILED" if failed else f"\nall {count} checks passed")
    if failed:
        raise SystemExit(1)
