"""What was found, for people: Markdown."""

import json
from collections.abc import Mapping
from typing import Any

GIB = 2**30
ROLES = ("critic", "generator")


def report(found: Mapping[str, Any]) -> str:
    """All of it."""
    parts = []
    for name, numbers in found.items():
        if name == "machine":
            parts += _machine(numbers)
        elif "runs" in numbers:
            parts += _toy(numbers["runs"])
        elif name == "vae":
            parts += _vae(numbers.get("vae", {}))
        elif name == "a14b-block":
            parts += _kernels(numbers)
    rows = [_row(name, numbers) for name, numbers in found.items() if "loop" in numbers]
    rows += [_in_loop(name, numbers) for name, numbers in found.items() if "encode" in numbers]
    if rows:
        head = (
            "| step | blocks | peak GiB: tensors (reserved), planned | critic, generator update "
            "| in passes | TFLOP/s in passes | MFU | made, pinned, first step |"
        )
        parts.append("\n".join([head, "|---" * 8 + "|", *rows]))
    left_out = [
        (name, numbers["left out"]) for name, numbers in found.items() if "left out" in numbers
    ]
    parts += ["\n".join(f"- {name}: left out: {why}" for name, why in left_out)] if left_out else []
    return "\n\n".join(parts)


def _machine(numbers: Mapping[str, Any]) -> list[str]:
    versions = ", ".join(f"{name} {of}" for name, of in numbers.get("versions", {}).items() if of)
    lines = [versions]
    if "matmul_flops" in numbers:
        lines.append(
            f"a {numbers['matmul_side']}³ product in bf16 {numbers['matmul_flops'] / 1e12:.3g} "
            f"TFLOP/s; pinned memory to the card {numbers['to_device_bytes'] / 1e9:.1f} GB/s; "
            f"noise of one sample {numbers['noise_seconds'] * 1000:.0f} ms of one CPU thread"
        )
    if of := numbers.get("attention"):
        rows = [
            f"attention {of['shape']}, torch chooses {of['chosen']}",
            "",
            "| kernel | forward, backward | two backwards equal | … deterministic |",
            "|---" * 4 + "|",
        ]  # fmt: skip
        for name, one in of["kernels"].items():
            if "left out" in one:
                rows.append(f"| {name} | left out: {one['left out']} | | |")
            else:
                times = f"{one['forward'] * 1e3:.1f}, {one['backward'] * 1e3:.1f} ms"
                same = one["equal_bits"], one["equal_bits_deterministic"]
                rows.append(f"| {name} | {times} | {same[0]} | {same[1]} |")
        lines.append("\n".join(rows))
    return lines


def _toy(runs: Mapping[str, Any]) -> list[str]:
    rows = ["| toy | largest difference from the CPU's loss | equal bits |", "|---" * 3 + "|"]
    for name, one in runs.items():
        if "left out" in one:
            rows.append(f"| {name} | left out: {one['left out']} | |")
        elif "report" in one:
            seconds = json.loads(one["report"])["loop"]["by_role"]
            shown = ", ".join(f"{seconds[role]:.3f} s" for role in ROLES)
            rows.append(f"| {name} | {shown} an update | |")
        else:
            difference = f"{one['difference']:.2e}" if "difference" in one else f"CPU: {one['cpu']}"
            rows.append(f"| {name} | {difference} | {one.get('equal_bits', '')} |")
    return ["\n".join(rows)]


def _vae(cases: Mapping[str, Any]) -> list[str]:
    rows = ["| VAE | seconds | peak GiB |", "|---" * 3 + "|"]
    for name, one in cases.items():
        shown = (
            f"left out: {one['left out']} | |"
            if "left out" in one
            else f"{one['seconds']:.2f} | {one['peak'] / GIB:.2f} |"
        )
        rows.append(f"| {name} | {shown}")
    return ["\n".join(rows)]


def _kernels(numbers: Mapping[str, Any]) -> list[str]:
    parts = []
    for role in ROLES:
        if role in numbers:
            of = numbers[role]
            rows = [f"| {role} update of one block, {of['seconds']:.3f} s | share |", "|---|---|"]
            rows += [f"| `{k}` | {s / of['seconds']:.1%} |" for k, s in of["kernels"].items()]
            parts.append("\n".join(rows))
    return parts


def _row(name: str, report: Mapping[str, Any]) -> str:
    loop, work, seconds = report["loop"], report["work"], report["seconds"]
    memory = f"{report['peak'] / GIB:.1f}"
    memory += f" ({report['reserved'] / GIB:.1f})" if report["reserved"] else ""
    memory += f", {report['planned'] / GIB:.1f}" if report["planned"] else ""
    mfu = report["ratios"]["utilisation"]
    updates = ", ".join(f"{loop['by_role'][role]:.2f} s" for role in ROLES)
    pinned = f"{seconds['pinning']:.1f} s" if "pinning" in seconds else "–"
    return (
        f"| {name} | {report['layers']} | {memory} "
        f"| {updates} | {1 / report['ratios']['over_passes']:.1%} | {work['in_passes'] / 1e12:.3g} "
        f"| {'' if mfu is None else f'{mfu:.1%}'} "
        f"| {seconds['build']:.1f} s, {pinned}, {loop['to_first_step']:.0f} s |"
    )


def _in_loop(name: str, numbers: Mapping[str, Any]) -> str:
    seconds = ", ".join(f"{numbers['by_role'][role]:.2f} s" for role in ROLES)
    return (
        f"| {name} | | {numbers['peak'] / GIB:.1f} "
        f"| {seconds}; of it encoding {numbers['encode']:.2f} s | | | | |"
    )
