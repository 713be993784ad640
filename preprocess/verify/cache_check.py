"""`wanprep verify`: everything that is wrong with a cache, named by shard, key and member.

Each tar is read once, from its start to its end. Nothing is changed, and what a running writer has
not committed is not looked at.
"""

import fcntl
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console

from preprocess.cache.remove import require_shards
from preprocess.verify.findings import OF_MEMBERS, OF_SHARDS, Finding, Severity
from preprocess.verify.sample_check import Expected, Problem
from preprocess.verify.shard_check import ShardReport, check_shard
from shared.cache.index import Entries, manifest_of
from shared.cache.shard_rows import Row
from shared.cache.writer import LOCK
from shared.cli.console import bar, count
from shared.errors import UserError, first_line
from shared.format.buckets import Bucket
from shared.format.cache import (
    INDEX,
    MANIFEST,
    MOST_MANIFEST,
    SHARD_NAME,
    TOMBSTONES,
    CacheIndex,
    Sidecar,
    Tombstones,
    age,
    check_format,
    open_cache,
)
from shared.format.columns import read_attributes
from shared.format.fingerprint import differences, of_cache
from shared.format.latent_rgb import ColourFit
from shared.format.overlays import CONDITIONS, made_by, overlays_in, positions
from shared.format.schema import MEMBERS
from shared.format.strict_json import read_object
from shared.io.durable import TEMPORARY_SUFFIX
from shared.io.hashing import digest_of
from shared.io.names import quoted
from shared.io.store import Store

_NEEDED_PROMPTS = ("empty", "negative")
# Codes that keep `wanprep index`, and so `wanprep remove`, from reading the shard at all.
_UNREADABLE = {*OF_MEMBERS, "count"}


@dataclass(kw_only=True)
class Verified:
    """What was read, and what was found."""

    store: Store
    shards: int
    samples: int
    """In the shards, the dead ones included."""
    beside: int
    """Captions and conditions in the shards beside them."""
    bytes: int
    findings: list[Finding]

    @property
    def errors(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.severity == "error"]


def verify(store: Store, console: Console) -> Verified:
    """Check a cache and all that lies beside it.

    Raises UserError where there are no shards, or where somebody compacts them just now.
    """
    if not any(store.folder.glob("*.tar")):
        require_shards(store)
    stores = [store, *overlays_in(store)]
    with ExitStack() as locks:
        for one in stores:
            if not locks.enter_context(_lock_beside(one.folder / LOCK)):
                raise UserError(
                    f"--shards: another wanprep removes or compacts shards in {one}. Wait for it "
                    "to end."
                )
        checks = [_Folder(store, one) for one in stores]
        total = sum(check.bytes for check in checks)
        with bar(console, "reading shards", total, of_bytes=True) as advance:
            for check in checks:
                check.run(advance)
    findings = [finding for check in checks for finding in check.findings]
    cache, *overlays = checks
    for overlay in overlays:
        findings += _beside(cache, overlay)
    return Verified(
        store=store,
        shards=sum(len(check.sidecars) for check in checks),
        samples=cache.samples,
        beside=sum(overlay.samples for overlay in overlays),
        bytes=total,
        findings=findings,
    )


@contextmanager
def _lock_beside(path: Path, *, wait: bool = False) -> Iterator[bool]:
    """A lock file held together with others, if it is there; False: somebody has it for himself.

    Nothing is written: a cache may lie on a read-only disk.
    """
    with ExitStack() as opened:
        free = True
        try:
            file = opened.enter_context(path.open("rb"))
            fcntl.flock(file, fcntl.LOCK_SH if wait else fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            free = False
        except OSError:  # nobody has ever taken it, or a file system without locks
            pass
        yield free


def _writers_at_work(folder: Path) -> bool:
    """Whether some `wanprep` adds to the folder: it holds the lock of its number."""
    with ExitStack() as locks:
        paths = folder.glob(f"{LOCK}-w*")
        return not all(locks.enter_context(_lock_beside(path)) for path in paths)


class _Folder:
    """A cache or an overlay: what is committed in it, and what is wrong with that."""

    def __init__(self, root: Store, store: Store) -> None:
        self.store = store
        self.folder = folder = store.folder
        self.findings: list[Finding] = []
        self.samples = 0
        self._prefix = "" if folder == root.folder else f"{folder.relative_to(root.folder)}/"
        self._rebuild = f"wanprep index --shards {quoted(root)}"
        self._writing = _writers_at_work(folder)
        # The index first: what is committed after it was read is newer, not lost.
        with _lock_beside(folder / f"{LOCK}-index", wait=True):  # for a moment
            self.manifest = self._read_manifest()
            self.index, self._order = self._read_index()
        self.sidecars = self._read_sidecars()
        self._tombstones = self._read_tombstones()
        self._writing = self._writing or _writers_at_work(folder)
        self._removed: dict[bytes, tuple[int, int]] = {}
        for dead in sorted(self._tombstones, key=lambda dead: age(dead.name)):
            self._removed |= {bytes.fromhex(key): age(dead.name) for key in dead.keys}
        # Shards of both frame rules may lie in a cache, and have its fingerprint.
        every = [sidecar.fingerprint for sidecar in self.sidecars]
        whole = [of_cache(fingerprint, every) for fingerprint in every]
        often = Counter(map(digest_of, whole))
        self.fingerprint: dict[str, Any] = max(
            whole, key=lambda fingerprint: often[digest_of(fingerprint)], default={}
        )
        self._mixed = {
            sidecar.shard
            for sidecar, fingerprint in zip(self.sidecars, whole, strict=True)
            if fingerprint != self.fingerprint
        }
        self.bytes = sum(sidecar.bytes for sidecar in self.sidecars)
        self._current = self._is_current()

    # What is read before any tar.

    def _read_manifest(self) -> dict[str, Any]:
        path = self.folder / MANIFEST
        try:
            manifest = read_object(path, "shards", most=MOST_MANIFEST, cure="")
            check_format(manifest, path)
            for name in ("shards", "prompts", "tombstones"):
                _ = {entry["name"]: entry["sha256"] for entry in manifest[name]}
        except (UserError, KeyError, TypeError) as error:
            self._add("manifest-damaged", MANIFEST, self._why(error, path), "a manifest")
            return {}
        return manifest

    def _read_index(self) -> tuple[CacheIndex | None, npt.NDArray[np.intp]]:
        """The index with every column read, and its rows in the order of their shards."""
        nothing = None, np.zeros(0, dtype=np.intp)
        if not self.manifest:
            return nothing
        path = self.folder / INDEX
        try:
            digest = read_attributes(path).get("digest")
        except (OSError, ValueError) as error:
            self._add("index-damaged", INDEX, first_line(error), "a Zarr group")
            return nothing
        if digest != self.manifest["index"]:
            self._stale(f"digest {digest}", f"{self.manifest['index']}, as {MANIFEST} says")
            return nothing
        listed = [entry["name"] for entry in self.manifest["shards"] + self.manifest["prompts"]]
        lost = [name for name in listed if not (self.folder / name).exists()]
        for name in lost:
            found = f"no such file, but {MANIFEST} lists it"
            cure = f"restore {name}, or leave its samples out: {self._rebuild}"
            self._add("tar-missing", name, found, "the shard", cure)
        if lost:
            return nothing
        try:
            index = open_cache(self.store)
            # All of it now: a writer may replace the file at any time after.
            return index, np.argsort(index.read_columns()["shard"], kind="stable")
        except UserError as error:
            self._add("index-damaged", INDEX, self._why(error, path), "an index")
            return nothing

    def _read_sidecars(self) -> list[Sidecar]:
        found = []
        listed = self._listed("shards") | self._listed("prompts")
        names = {path.name for path in self.folder.iterdir()}
        tars = {name.replace(".json", ".tar") for name in names if not name.startswith(TOMBSTONES)}
        for tar in sorted(filter(SHARD_NAME.fullmatch, tars)):
            path = Sidecar.path_for(self.folder / tar)
            if tar not in names:
                if tar not in listed:
                    cure = f"restore {tar}, or delete {path.name}"
                    self._add("tar-missing", tar, "no such file", "the tar of the sidecar", cure)
            elif path.name in names:
                found += self._read_sidecar(path, tar)
            elif tar in listed:
                cure = f"restore {path.name}, or run `wanprep encode` again and {self._rebuild}"
                self._add("sidecar-missing", tar, f"no {path.name}", "it", cure)
            else:
                cure = "nothing: the next run of its writer removes it"
                self._note_leftover(tar, f"no {path.name}", "it", cure)
        if leftovers := sorted(name for name in names if name.endswith(TEMPORARY_SUFFIX)):
            what = f"{count(len(leftovers), 'file')} that a run did not finish"
            self._note_leftover(leftovers[0], what, "none", "nothing: the next run removes them")
        return found

    def _note_leftover(self, file: str, found: str, expected: str, cure: str) -> None:
        if not self._writing:
            self._add("sidecar-missing", file, found, expected, cure, severity="note")

    def _read_sidecar(self, path: Path, tar: str) -> list[Sidecar]:
        cure = f"restore {path.name}, or delete it with {tar} and run `wanprep encode` again"
        try:
            sidecar = Sidecar.read(path)
            bucket = sidecar.bucket
            if bucket and not tar.startswith(f"h{bucket.height}-w{bucket.width}-f{bucket.frames}-"):
                raise ValueError(f"its bucket is {bucket}, which is not what its name says")
            Expected.of(sidecar.fingerprint, bucket)
            if sidecar.latent_rgb is not None:
                ColourFit.from_json(sidecar.latent_rgb)
        except (KeyError, TypeError, ValueError) as error:  # UserError is a ValueError
            self._add("sidecar-damaged", path.name, self._why(error, path), "a sidecar", cure)
            return []
        return [sidecar]

    def _read_tombstones(self) -> list[Tombstones]:
        found = []
        for path in sorted(self.folder.glob(f"{TOMBSTONES}-*.json")):
            try:
                found.append(Tombstones.read(path))
            except UserError as error:
                cure = (
                    f"restore {path.name}, or delete it, which brings the samples that it removed "
                    "back, and remove them again: wanprep remove"
                )
                self._add("tombstones-damaged", path.name, self._why(error, path), "keys", cure)
        return found

    def _is_current(self) -> bool:
        """Whether the index is of all that is committed."""
        if self.index is None:
            return False
        if any(f.code in OF_SHARDS and f.severity == "error" for f in self.findings):
            return False
        digest = Entries(sidecars=self.sidecars, tombstones=self._tombstones).digest
        if digest != self.index.digest:
            self._stale(f"digest {self.index.digest[:12]}…", f"{digest[:12]}… of what is committed")
            return False
        self._check_manifest()
        return True

    def _check_manifest(self) -> None:
        """The manifest's lists and numbers against what they are derived from."""
        assert self.index is not None
        entries = Entries(sidecars=self.sidecars, tombstones=self._tombstones)
        derived = manifest_of(entries, self.index.buckets, self.index.bucket_ids, None)
        derived["fingerprint"] = self.fingerprint  # what is mixed has a finding of its own
        for name in ("samples", "buckets", "shards", "prompts", "fingerprint"):
            if self.manifest.get(name) != derived[name]:
                found = f"{name} is not what the shards give"
                self._add("manifest-damaged", MANIFEST, found, "what `wanprep index` writes")

    def _stale(self, found: str, expected: str) -> None:
        if self._writing:
            cure = "nothing: the writer at work updates it"
            self._add("index-stale", INDEX, found, expected, cure, severity="note")
        else:
            self._add("index-stale", INDEX, found, expected)

    # The tars.

    def run(self, on_bytes: Callable[[int], None]) -> None:
        """Read every committed tar."""
        roles: set[str] = set()
        for sidecar in self.sidecars:
            if sidecar.shard in self._mixed:
                fields = differences(sidecar.fingerprint, self.fingerprint)
                named = ", ".join(f"{name} {value!r}" for name, value, _ in fields)
                expected = ", ".join(f"{value!r}" for _, _, value in fields)
                cure = "move the shards of one kind (tars with their .json) to another folder"
                self._add("fingerprint-mixed", sidecar.shard, named, expected, cure)
            path = self.folder / sidecar.shard
            try:
                expected_of = Expected.of(sidecar.fingerprint, sidecar.bucket)
                found = check_shard(self.store, sidecar, expected_of, on_bytes)
            except (OSError, UserError) as error:
                why = self._why(error, path)
                self._add("tar-damaged", sidecar.shard, why, "a tar to read", _redo_shard(sidecar))
                continue
            self.samples += len(found.rows) if sidecar.kind == "samples" else 0
            roles |= found.roles
            self._report(sidecar, found)
        if self.sidecars and not self._writing and self.fingerprint.get("overlay") != CONDITIONS:
            cure = f"run `{made_by(self.fingerprint)}` again: it encodes what is missing"
            for role in _NEEDED_PROMPTS:
                if role not in roles:
                    found_none = f"no prompt of role {role!r}"
                    self._add("prompt-missing", "prompts-*.tar", found_none, "one", cure)

    def _report(self, sidecar: Sidecar, found: ShardReport) -> None:
        """Findings of one tar, and what the index says of it."""
        whole = found.sound and not any(p.code in _UNREADABLE for _, p in found.problems)
        for key, problem in found.problems:
            self._add_problem(sidecar, key, problem, whole=whole)
        if found.damage is not None:
            lost = self._lost(sidecar, found.damage.offset)
            key = lost[0] if lost else found.last_key
            code = "tar-truncated" if found.damage.truncated else "tar-damaged"
            behind = f"; {count(len(lost), 'sample')} from there on" if lost else ""
            problem = Problem(code, f"{found.damage}{behind}", "a whole tar")
            self._add_problem(sidecar, key, problem, whole=False)
        readable = found.sound and found.damage is None
        if sidecar.kind != "samples" or self.index is None or not readable:
            return
        known = {entry["name"]: entry["sha256"] for entry in self.manifest["shards"]}
        if known.get(sidecar.shard) != sidecar.sha256:
            return
        rows = {self.index.key(int(row)): int(row) for row in self._rows(sidecar)}
        for key, row in rows.items():
            if key not in found.rows:
                self._add_row(sidecar, key, "a row", "none: the tar has no such sample")
            else:
                self._compare(sidecar, key, row, found.rows[key])
        if self._current:
            for key in found.rows.keys() - rows.keys():
                if not self._is_dead(key, sidecar):
                    self._add_row(sidecar, key, "no row", "one: the tar has the sample")

    def _compare(self, sidecar: Sidecar, key: str, row: int, found: Row) -> None:
        assert self.index is not None
        bucket = self.index.buckets[int(self.index.bucket_ids[row])]
        own = _index_row(self.index, row)
        if (own, bucket) != (found, sidecar.bucket):
            says, holds = _facts(own, bucket), _facts(found, sidecar.bucket)
            wrong = [name for name in says if says[name] != holds[name]]
            named = ", ".join(f"{name} {says[name]}" for name in wrong)
            self._add_row(sidecar, key, named, ", ".join(str(holds[name]) for name in wrong))

    def _rows(self, sidecar: Sidecar) -> npt.NDArray[np.intp]:
        """Rows of the index that lie in a shard."""
        assert self.index is not None
        if sidecar.shard not in self.index.shards:
            return np.zeros(0, dtype=np.intp)
        number = self.index.shards.index(sidecar.shard)
        ordered = self.index.shard_ids[self._order]
        first, last = np.searchsorted(ordered, [number, number + 1])
        return self._order[first:last]

    def _lost(self, sidecar: Sidecar, offset: int) -> list[str]:
        """Keys of the samples that lie, by the index, at or behind an offset; in that order."""
        if self.index is None or sidecar.kind != "samples":
            return []
        rows = self._rows(sidecar)
        ends = (self.index.offsets + self.index.lengths)[rows].max(axis=1, initial=0)
        behind = rows[ends > offset]
        return [self.index.key(int(row)) for row in behind[np.argsort(ends[ends > offset])]]

    def _is_dead(self, key: str, sidecar: Sidecar) -> bool:
        """Whether a newer shard or tombstone replaces what this shard says of the sample."""
        when = age(sidecar.shard)
        if self._removed.get(bytes.fromhex(key), (-1, -1)) > when:
            return True
        if self.index is None:
            return False
        wanted = np.frombuffer(bytes.fromhex(key), np.uint8).reshape(1, -1)
        row = int(positions(wanted, self.index.keys)[0])
        return row >= 0 and age(self.index.shards[int(self.index.shard_ids[row])]) > when

    # Making findings.

    def _add_problem(
        self, sidecar: Sidecar, key: str | None, problem: Problem, *, whole: bool
    ) -> None:
        severity: Severity = "error"
        cure = _redo_shard(sidecar)
        if key is not None and sidecar.kind == "samples" and whole:
            again = made_by(sidecar.fingerprint)
            folder = quoted(self.store)
            cure = f"wanprep remove --shards {folder} --sample {key}; then run `{again}` again"
            if self._is_dead(key, sidecar):
                severity, cure = "note", f"wanprep compact --shards {folder}: it is dead"
        self._add(**asdict(problem), file=sidecar.shard, cure=cure, key=key, severity=severity)

    def _add_row(self, sidecar: Sidecar, key: str, found: str, expected: str) -> None:
        found = f"the row for {sidecar.shard} has {found}" if found != "no row" else found
        self._add("index-row", INDEX, found, expected, key=key)

    def _add(
        self,
        code: str,
        file: str,
        found: str,
        expected: str,
        cure: str | None = None,
        *,
        severity: Severity = "error",
        **place: str | None,
    ) -> None:
        """Without a `cure` it is to build the index anew. `place`: key and member of a sample."""
        self.findings.append(
            Finding(
                severity=severity,
                code=code,
                file=self._prefix + file,
                found=self.store.shown(found),
                expected=expected,
                cure=self._rebuild if cure is None else cure,
                **place,
            )
        )

    def _why(self, error: Exception, path: Path) -> str:
        """The first line of an error, the file's folder left out."""
        if isinstance(error, KeyError):
            return f"no {error.args[0]!r}"
        text = self.store.shown(error).replace(self.store.shown(path), path.name)
        return text.split("\n")[0].rstrip(".")

    def _listed(self, name: str) -> set[str]:
        return {entry["name"] for entry in self.manifest.get(name, [])}


def _index_row(index: CacheIndex, row: int) -> Row:
    return Row(
        caption=bytes(index.captions[row]),
        type=int(index.types[row]),
        tokens=int(index.tokens[row]),
        repeats=int(index.repeats[row]),
        offset=index.offsets[row].tolist(),
        length=index.lengths[row].tolist(),
    )


def _facts(row: Row, bucket: Bucket | None) -> dict[str, Any]:
    """What a row says, by what findings call it."""
    facts: dict[str, Any] = {"caption": row.caption.hex()}
    facts |= {name: getattr(row, name) for name in ("type", "tokens", "repeats")}
    for member, offset, length in zip(MEMBERS, row.offset, row.length, strict=True):
        facts |= {f"{member} at": offset, f"{member} bytes": length}
    return {**facts, "bucket": str(bucket)}


def _beside(base: _Folder, overlay: _Folder) -> list[Finding]:
    """What does not fit between a cache and an overlay of it."""
    before = len(overlay.findings)
    own, latents = base.fingerprint.get("latents"), overlay.fingerprint.get("latents")
    if own and latents:
        for name, found, expected in differences({"latents": latents}, {"latents": own}):
            cure = f"delete {quoted(overlay.folder)} and run `wanprep add-condition` again"
            overlay._add("overlay-foreign", MANIFEST, f"{name} {found!r}", f"{expected!r}", cure)
    if base.index is not None and overlay.index is not None:
        orphans = int((positions(overlay.index.keys, base.index.keys) < 0).sum())
        if orphans:
            found = f"{count(orphans, 'sample')} that the cache does not have"
            cure = f"wanprep compact --shards {quoted(base.folder)}"
            overlay._add("overlay-orphans", INDEX, found, "none", cure, severity="note")
    return overlay.findings[before:]


def _redo_shard(sidecar: Sidecar) -> str:
    return (
        f"restore {sidecar.shard}, or delete it with its sidecar and run "
        f"`{made_by(sidecar.fingerprint)}` again: it encodes only what is missing"
    )
