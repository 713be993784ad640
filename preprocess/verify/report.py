"""The output of `wanprep verify`, as text and as JSON."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from itertools import groupby
from operator import attrgetter

from preprocess.verify.cache_check import Verified
from preprocess.verify.decode_samples import Decoded
from preprocess.verify.findings import Finding
from shared.cli.console import count
from shared.io.names import on_one_line


def lines(findings: Iterable[Finding]) -> Iterator[str]:
    """Each finding on a line, the cure below the last one that it mends."""
    for cure, alike in groupby(findings, key=attrgetter("cure")):
        yield from (on_one_line(str(finding)) for finding in alike)
        if cure:
            yield f"      cure: {cure}"


def summary(verified: Verified) -> str:
    """What was read, and whether it is sound."""
    beside = f" and {verified.beside} captions or conditions" if verified.beside else ""
    read = (
        f"{verified.store}: {count(verified.samples, 'sample')}{beside} in "
        f"{count(verified.shards, 'shard')}, {verified.bytes / 1e6:.1f} MB read"
    )
    return f"{read}; {'no errors' if not verified.errors else _numbers(verified)}"


def _numbers(verified: Verified) -> str:
    codes = Counter(finding.code for finding in verified.errors)
    listed = ", ".join(f"{code} {number}" for code, number in sorted(codes.items()))
    return f"{count(len(verified.errors), 'error')} ({listed})"


def failure(verified: Verified) -> str:
    """The last line where something is wrong."""
    files = {finding.file for finding in verified.errors}
    return (
        f"verify: {count(len(verified.errors), 'error')} in {count(len(files), 'file')} of "
        f"{verified.store}; each cure stands with its finding."
    )


def decoded(one: Decoded) -> str:
    """A line about a decoded sample."""
    near = "no source" if one.psnr is None else f"{one.psnr:.1f} dB"
    return f"{one.path}  {near}  {on_one_line(one.source)}"


def as_json(verified: Verified) -> str:
    """Everything that was found, for scripts."""
    value = {
        "shards": str(verified.store),
        "samples": verified.samples,
        "beside": verified.beside,
        "bytes": verified.bytes,
        "errors": len(verified.errors),
        "findings": [asdict(finding) for finding in verified.findings],
    }
    return json.dumps(value, indent=2, ensure_ascii=False)
