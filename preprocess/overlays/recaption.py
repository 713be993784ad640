"""Other captions for a cache that is there: text embeddings only, in an overlay of their own."""

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from preprocess.cache.index import caption_digest, settled_index
from preprocess.cache.remove import is_unusable, sources
from preprocess.cache.text_cache import TextCache
from preprocess.cache.writer import ShardWriter
from preprocess.dataset.entries import Dataset, Rejected, load_dataset
from preprocess.dataset.rejected import reasons
from preprocess.dataset.toml_config import load_dataset_config
from preprocess.encode.config import StoredDtype
from preprocess.encode.fingerprint import encoder_fields
from preprocess.encode.passes import Times, text_pass
from preprocess.encode.ranks import Rank
from preprocess.overlays.base import base_cache, overlay_to_write
from shared.cli.console import bar, count, named
from shared.cli.support import say
from shared.device import check_device
from shared.errors import UserError
from shared.format.cache import CacheIndex, MemberReader, committed_shards
from shared.format.fingerprint import (
    FORMAT_VERSION,
    TEXT_CLEANING,
    Fingerprint,
    as_in_cache,
    group_of,
)
from shared.format.overlays import CAPTIONS, captions_folder
from shared.format.prompts import (
    NEGATIVE,
    VALIDATION,
    Prompt,
    current_validation,
    prompts_by_shard,
)
from shared.format.schema import DTYPES, JSON_MEMBER, TEXT_MEMBER, pack
from shared.interrupt import Interrupted, Interruption, catch_signals
from shared.io.hashing import FileHasher
from shared.models.spec import read_model_spec, resolve_model

if TYPE_CHECKING:
    from preprocess.encode.encoders import TextEncoder

SHARD_BYTES = 256_000_000


@dataclass(frozen=True, kw_only=True)
class RecaptionConfig:
    """One `wanprep recaption`."""

    name: str
    """Of the captions, as in `wantrain distill --captions NAME`."""
    shards: Path
    model: str
    """Its text encoder and tokenizer are used."""
    data_dir: Path
    metadata: Path | None
    """As `EncodeConfig` has them; the media themselves are not opened."""
    dataset_config: Path | None
    """Several datasets in place of one."""
    same_captions: bool
    """The cache's own captions instead of a dataset's."""
    negative_prompt: str | None
    """None: the one that the cache has."""
    text_encoder_dtype: StoredDtype | None
    """None: what the cache's own text was computed in."""
    prune: bool
    """Remove captions that the dataset does not give any more."""
    device: str
    rank: Rank = field(default_factory=Rank)


@dataclass
class Recaptioned:
    """How a run ended."""

    folder: Path
    samples: int = 0
    """Of the cache."""
    index: CacheIndex | None = None
    """Of the overlay; None where nothing is committed yet."""
    written: int = 0
    """Captions that this run wrote."""
    removed: int = 0
    left: int = 0
    """Captions that are not written yet."""
    without: tuple[str, ...] = ()
    """Files that the dataset gives no caption for, as they are named in the cache."""
    samples_without: int = 0
    unused: tuple[str, ...] = ()
    """Files of the dataset of which at least one caption fits no sample."""
    rejected: tuple[Rejected, ...] = ()
    signum: int | None = None
    """The signal that ended the run early."""


def recaption(config: RecaptionConfig, console: Console) -> Recaptioned:
    """Bring the captions `config.name` of a cache up to date with a dataset's.

    Raises UserError for what the user can mend. Latents are neither read nor written.
    """
    outcome = Recaptioned(folder=captions_folder(config.shards, config.name))
    with catch_signals("stopping: committing what is encoded ...") as signals:
        try:
            with base_cache(config.shards) as base:
                _recaption(config, console, base, signals, outcome)
        except Interrupted as interrupted:
            outcome.signum = interrupted.signum
    return outcome


def _recaption(
    config: RecaptionConfig,
    console: Console,
    base: CacheIndex,
    signals: Interruption,
    outcome: Recaptioned,
) -> None:
    # Which caption each sample of the cache gets.
    dataset = None if config.same_captions else _dataset(config)
    if dataset is None:
        say(console, f"captions the {len(base)} of {config.shards}")
    else:
        say(console, f"dataset  {dataset.origin}: {len(dataset.entries)} usable")
    check_device(config.device)
    wanted = _wanted(base, dataset, outcome)
    fingerprint = _fingerprint(config, base, console)
    cure = (
        "Give these captions another name (--name), or take the model that made the others "
        "(--pretrained-model-name-or-path)."
    )
    with overlay_to_write(
        outcome.folder,
        fingerprint,
        writer=config.rank.number,
        world=config.rank.world,
        cure=cure,
    ) as there:
        # What is missing of them.
        outcome.index = there
        mine = {row: text for row, text in wanted.items() if config.rank.owns(base.key(row))}
        todo = _missing(base, mine, there)
        bank = _MissingPrompts.of(config, base, there) if config.rank.number == 0 else None
        prompts = [] if bank is None else [text for _, text in bank.single] + bank.listed_texts
        outcome.left = len(todo)
        say(console, f"samples  {len(mine)}: {len(mine) - len(todo)} done, {len(todo)} to encode")
        gone = _leftover(base, wanted, there, outcome.rejected)
        if gone:
            say(
                console,
                f"leftover {len(gone)} that the dataset does not give any more: "
                + ("removed at the end" if config.prune else "they stay. To remove them: --prune"),
            )
        texts = TextCache(outcome.folder, fingerprint, config.rank.number)
        writer = ShardWriter(
            outcome.folder, fingerprint, shard_bytes=SHARD_BYTES, writer=config.rank.number
        )

        def text_encoder() -> "TextEncoder":
            from preprocess.encode.encoders import TextEncoder

            dtype = DTYPES[fingerprint["text"]["compute"]]
            folder = resolve_model(config.model, ("text_encoder", "tokenizer"))
            return TextEncoder(read_model_spec(folder), dtype=dtype, device=config.device)

        try:
            needed = list(dict.fromkeys(prompts + list(todo.values())))
            with bar(console, "encoding captions", len(needed)) as advance:
                text_pass(
                    needed,
                    texts,
                    text_encoder,
                    stored=DTYPES[fingerprint["text"]["dtype"]],
                    times=Times(),
                    on_progress=advance,
                )
            if bank is not None:
                with signals.deferred():
                    for entries in bank.encoded(texts):
                        writer.add_prompts(entries)
            for row, info in _infos(base, todo):
                info["caption"] = todo[row]
                members = {
                    JSON_MEMBER: json.dumps(info, ensure_ascii=False).encode(),
                    TEXT_MEMBER: pack(text=texts.get(todo[row])),
                }
                bucket = base.buckets[int(base.bucket_ids[row])]
                with signals.deferred():
                    writer.add_members(base.key(row), bucket, members)
                    outcome.written += 1
            with signals.deferred():
                writer.close()
                if gone and config.prune and config.rank.number == 0:
                    writer.add_tombstones(gone)
                    outcome.removed = len(gone)
                _finish(base, mine, outcome)
                texts.delete()
        except BaseException:  # a signal, a full disk: what is encoded is kept
            with signals.deferred(raise_after=False):
                writer.rescue()
                with suppress(OSError):
                    _finish(base, mine, outcome)
            raise


def _dataset(config: RecaptionConfig) -> Dataset:
    if config.dataset_config is not None:
        return load_dataset_config(config.dataset_config)
    return load_dataset(config.data_dir, config.metadata)


def _wanted(base: CacheIndex, dataset: Dataset | None, outcome: Recaptioned) -> dict[int, str]:
    """Row of the cache → its caption; says in `outcome` what has none and what is not used.

    A file is found by the name that it has in the cache. Where a clip has several captions there,
    so several samples, they get the file's new captions in turn, in the order of their keys: what
    one sample got is then the same in every run.
    """
    outcome.samples = len(base)
    given: dict[str, dict[str, None]] = {}
    if dataset is not None:
        outcome.rejected = dataset.rejected
        for entry in dataset.entries:
            if entry.path is None:
                continue
            given.setdefault(entry.source, {})[entry.caption] = None
    wanted: dict[int, str] = {}
    clips: dict[tuple[Any, ...], int] = {}
    used: dict[str, set[str]] = {}
    without: dict[str, int] = {}
    for row, info in _infos(base, range(len(base))):
        source, caption = str(info["source"]), info["caption"]
        if dataset is not None:
            if info["type"] == "text":  # it is its caption: another would be another sample
                continue
            new = list(given.get(source, ()))
            clip = (source, int(base.bucket_ids[row]), *info["frame_indices"])
            ordinal = clips[clip] = clips.get(clip, -1) + 1
            if not new:
                without[source] = without.get(source, 0) + 1
                continue
            caption = new[ordinal % len(new)]
            used.setdefault(source, set()).add(caption)
        wanted[row] = caption
    outcome.without = tuple(sorted(without))
    outcome.samples_without = sum(without.values())
    outcome.unused = tuple(
        source for source, new in given.items() if new.keys() - used.get(source, set())
    )
    if not wanted and not without:
        raise UserError(
            f"captions: the samples in {base.folder} are captions without media, which stay as "
            "they are. Edit their list and run `wanprep encode` again; for another text encoder: "
            "--same-captions."
        )
    if not wanted:
        raise UserError(
            f"captions: no file of {dataset.origin if dataset else base.folder} is in "
            f"{base.folder}. Files are named as in the dataset that was encoded, such as "
            f"{next(iter(outcome.without), '')!r}; --train-data-dir decides what they are relative "
            "to."
        )
    return wanted


def _infos(base: CacheIndex, rows: Iterable[int]) -> Iterator[tuple[int, dict[str, Any]]]:
    """`KEY.json` of rows, one at a time: a million of them would fill the memory."""
    reader = MemberReader(base)
    try:
        for row in rows:
            yield row, reader.info(row)
    finally:
        reader.close()


def _fingerprint(config: RecaptionConfig, base: CacheIndex, console: Console) -> Fingerprint:
    spec = read_model_spec(resolve_model(config.model, ("text_encoder", "tokenizer")))
    with console.status("digesting the text encoder's weights (read once, then remembered)"):
        hasher = FileHasher()
        fields = encoder_fields(spec, hasher)
        text = as_in_cache(fields, base.fingerprint, spec.folder, hasher)["text"]
    for name, component in (("encoder", "text_encoder"), ("tokenizer", "tokenizer")):
        if text[name] is None:
            raise UserError(
                f"model: {spec.folder / component} holds no weights. Download the whole "
                f"{component} folder, or set --pretrained-model-name-or-path (or MODEL_NAME) "
                "to a model that has it."
            )
    say(console, f"model    {spec.folder} on {config.device}")
    own = group_of(base.fingerprint, "text", base.folder)
    return {
        "format": FORMAT_VERSION,
        "overlay": CAPTIONS,
        "text": {
            **text,
            "dtype": own["dtype"],
            "compute": config.text_encoder_dtype or own["compute"],
            "max_length": spec.family.text_tokens,
            "cleaning": TEXT_CLEANING,
        },
    }


def _missing(base: CacheIndex, wanted: dict[int, str], there: CacheIndex | None) -> dict[int, str]:
    """Those that the overlay lacks, or has with another caption."""
    committed = _captions(there)
    return {
        row: caption
        for row, caption in wanted.items()
        if committed.get(base.key(row)) != caption_digest(caption)
    }


def _captions(there: CacheIndex | None) -> dict[str, bytes]:
    if there is None:
        return {}
    return {key: bytes(there.captions[row]) for row, key in enumerate(there.hex_keys())}


def _leftover(
    base: CacheIndex,
    wanted: dict[int, str],
    there: CacheIndex | None,
    rejected: Sequence[Rejected],
) -> list[str]:
    """Keys of samples that the overlay has a caption for and the dataset has not.

    As in `preprocess.cache.remove.unlisted`, a file whose entry cannot be used today was not taken
    out.
    """
    committed = _captions(there)
    rows = [row for row in range(len(base)) if row not in wanted and base.key(row) in committed]
    unusable = {one.source for one in rejected}
    return [key for key, source in sources(base, rows).items() if not is_unusable(source, unusable)]


@dataclass(frozen=True, kw_only=True)
class _MissingPrompts:
    """What the captions' prompt bank lacks of the cache's."""

    single: list[tuple[str, str]]
    """(role, prompt) of roles that have one prompt."""
    listed: list[Prompt]
    """The validation prompts, all of them; empty where the captions have the list already."""

    @classmethod
    def of(
        cls, config: RecaptionConfig, base: CacheIndex, there: CacheIndex | None
    ) -> "_MissingPrompts":
        """The cache's prompts, but for another negative one where that is asked for."""
        own = prompts_by_shard(base.folder, base.prompt_shards)
        found = [] if there is None else prompts_by_shard(there.folder, there.prompt_shards)
        wanted = _last_of_roles(own)
        if config.negative_prompt is not None:
            wanted[NEGATIVE] = config.negative_prompt
        last = _last_of_roles(found)
        listed, have = current_validation(own), current_validation(found)
        same = [prompt.key for prompt in listed] == [prompt.key for prompt in have]
        return cls(
            single=[(role, text) for role, text in wanted.items() if last.get(role) != text],
            listed=[] if same else listed,
        )

    @property
    def listed_texts(self) -> list[str]:
        return [prompt.prompt for prompt in self.listed]

    def encoded(self, texts: TextCache) -> Iterator[list[Prompt]]:
        """Entries for shards. What belongs to a picture stays in the cache's own bank, which
        brings it by the same key."""
        if self.single:
            yield [Prompt(role, text, texts.get(text)) for role, text in self.single]
        if self.listed:
            yield [
                replace(prompt, text=texts.get(prompt.prompt), cond=None, clip=None)
                for prompt in self.listed
            ]


def _last_of_roles(shards: list[list[Prompt]]) -> dict[str, str]:
    return {p.role: p.prompt for shard in shards for p in shard if p.role != VALIDATION}


def _finish(base: CacheIndex, mine: dict[int, str], outcome: Recaptioned) -> None:
    if committed_shards(outcome.folder):
        outcome.index = settled_index(outcome.folder)
    outcome.left = len(_missing(base, mine, outcome.index))


def unmatched_captions(done: Recaptioned) -> list[str]:
    """What became of samples without a new caption, and of captions without a sample."""
    lines = []
    if done.samples_without:
        lines.append(
            f"{count(done.samples_without, 'sample')} of {done.samples} without a caption of that "
            f"name keep their own: {named(done.without)}"
        )
    if done.unused:
        lines.append(
            f"{count(len(done.unused), 'file')} with captions that fit no sample in the shards: "
            f"{named(done.unused)}"
        )
    if done.rejected:
        lines.append(f"{len(done.rejected)} rejected of the list:")
        lines += reasons(done.rejected)
    return lines
