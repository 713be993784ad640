"""Other captions for a cache that is there: text embeddings only, in an overlay of their own."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from rich.console import Console

from preprocess.cache.remove import is_unusable, sources
from preprocess.cache.text_cache import TextCache
from preprocess.dataset.entry import Dataset
from preprocess.dataset.left_out import account
from preprocess.dataset.toml_config import read_dataset
from preprocess.encode.config import device_here
from preprocess.encode.engine import text_encoder
from preprocess.encode.fingerprint import fields_in_cache, refuse_absent, text_group
from preprocess.encode.passes import text_pass
from preprocess.encode.speed import Times
from preprocess.encode.validation_prompts import last_of_roles, missing_roles
from preprocess.encode.work import committed_of
from preprocess.overlays.base import SHARD_BYTES, base_cache, overlay_session
from preprocess.overlays.config import RecaptionConfig
from shared.cache.rejected import Rejected, reasons
from shared.cache.session import Outcome, stoppable
from shared.cli.console import bar, count, named
from shared.cli.support import say
from shared.device import take_device
from shared.errors import UserError
from shared.format.cache import CacheIndex, MemberReader
from shared.format.columns import caption_digest
from shared.format.fingerprint import FORMAT_VERSION, Fingerprint, group_of
from shared.format.overlays import CAPTIONS, captions_of
from shared.format.prompts import NEGATIVE, Prompt, current_validation, prompts_by_shard
from shared.format.schema import DTYPES, JSON_MEMBER, TEXT_MEMBER, info_bytes, pack
from shared.io.store import Store
from shared.models.spec import ModelSpec, read_model_spec, resolve_model


@dataclass(kw_only=True)
class Recaptioned(Outcome):
    """How a run ended. `written`, `removed` and `left` count captions."""

    store: Store
    samples: int = 0
    """Of the cache."""
    without: tuple[str, ...] = ()
    """Files that the dataset gives no caption for, as they are named in the cache."""
    samples_without: int = 0
    unused: tuple[str, ...] = ()
    """Files of the dataset of which at least one caption fits no sample."""
    unusable: tuple[Rejected, ...] = ()
    """Of the dataset's list."""


def recaption(config: RecaptionConfig, store: Store, console: Console) -> Recaptioned:
    """Bring the captions `config.name` of a cache up to date with a dataset's.

    Raises UserError for what the user can mend. Latents are neither read nor written.
    """
    config = replace(config, device=device_here(config.device, config.rank))
    outcome = Recaptioned(store=captions_of(store, config.name))
    with stoppable(outcome) as signals, base_cache(store) as base:
        # Which caption each sample of the cache gets.
        dataset = None
        if config.same_captions:
            say(console, f"captions the {len(base)} of {store}")
        else:
            dataset = read_dataset(
                config.dataset_config, config.train_data_dir, config.train_data_meta
            )
            say(console, f"dataset  {dataset.origin}: {len(dataset.entries)} usable")
            for line in account(dataset.tallies, dataset.left_out):
                say(console, line)
        take_device(config.device)
        wanted = _wanted(base, dataset, outcome)
        spec = read_model_spec(resolve_model(config.model, ("text_encoder", "tokenizer")))
        fingerprint = _fingerprint(config, base, spec, console)
        cure = (
            "Give these captions another name (--name), or take the model that made the others "
            "(--pretrained-model-name-or-path)."
        )
        with overlay_session(
            outcome.store, config.rank, signals, outcome, fingerprint, cure=cure
        ) as session:
            # What the overlay lacks of them, and what it has too much.
            there, first = outcome.index, config.rank.number == 0
            mine = {row: text for row, text in wanted.items() if config.rank.owns(base.key(row))}
            todo = session.lacking(lambda index: _missing(base, mine, index))
            bank = _missing_prompts(config, base, there) if first else []
            gone = _leftover(base, wanted, there, outcome.unusable)
            _print_plan(console, len(mine), len(todo), len(gone), config.prune)

            # Text pass.
            texts, writer = TextCache.of(session), session.writer(SHARD_BYTES)
            text = fingerprint["text"]
            encoder = partial(text_encoder, spec, text["compute"], config.device)
            stored = DTYPES[text["dtype"]]
            with session.rescued(writer.rescue):
                prompts = (prompt.prompt for entries in bank for prompt in entries)
                needed = list(dict.fromkeys([*prompts, *todo.values()]))
                with bar(console, "encoding captions", len(needed)) as advance:
                    for _ in text_pass(needed, texts, encoder, stored=stored, times=Times()):
                        advance()

                # Embeddings to shards.
                with signals.deferred():
                    for entries in bank:
                        writer.add_prompts([replace(p, text=texts.get(p.prompt)) for p in entries])
                for row, info in _infos(base, todo):
                    members = {
                        JSON_MEMBER: info_bytes({**info, "caption": todo[row]}),
                        TEXT_MEMBER: pack(text=texts.get(todo[row])),
                    }
                    bucket = base.buckets[int(base.bucket_ids[row])]
                    with signals.deferred():
                        writer.add_members(base.key(row), bucket, members)
                        outcome.written += 1
                with signals.deferred():
                    writer.close()
                    if gone and config.prune and first:
                        writer.add_tombstones(gone)
                        outcome.removed = len(gone)
                    session.settle()
                    texts.delete()
    return outcome


def _print_plan(console: Console, samples: int, left: int, gone: int, prune: bool) -> None:
    say(console, f"samples  {samples}: {samples - left} done, {left} to encode")
    if gone:
        say(
            console,
            f"leftover {gone} that the dataset does not give any more: "
            + ("removed at the end" if prune else "they stay. To remove them: --prune"),
        )


def _wanted(base: CacheIndex, dataset: Dataset | None, outcome: Recaptioned) -> dict[int, str]:
    """Row of the cache → its caption; says in `outcome` what has none and what is not used.

    A file is found by the name that it has in the cache. Where a clip has several captions there,
    so several samples, they get the file's new captions in turn, in the order of their keys: what
    one sample got is then the same in every run.
    """
    given: dict[str, dict[str, None]] = {}
    if dataset is not None:
        outcome.unusable = dataset.rejected
        for entry in dataset.entries:
            if entry.path is not None:
                given.setdefault(entry.source, {})[entry.caption] = None
    wanted: dict[int, str] = {}
    clips: Counter[tuple[Any, ...]] = Counter()
    used: dict[str, set[str]] = {}
    without: Counter[str] = Counter()
    for row, info in _infos(base, range(len(base))):
        if dataset is None:
            wanted[row] = info["caption"]
            continue
        if info["type"] == "text":  # it is its caption: another would be another sample
            continue
        source = str(info["source"])
        clip = (source, int(base.bucket_ids[row]), *info["frame_indices"])
        if new := list(given.get(source, ())):
            wanted[row] = new[clips[clip] % len(new)]
            used.setdefault(source, set()).add(wanted[row])
        else:
            without[source] += 1
        clips[clip] += 1
    outcome.samples = len(base)
    outcome.without = tuple(sorted(without))
    outcome.samples_without = without.total()
    outcome.unused = tuple(
        source for source, new in given.items() if new.keys() - used.get(source, set())
    )
    if not wanted and not without:
        raise UserError(
            f"captions: the samples in {base.store} are text-only: their captions stay as "
            "they are. Edit their list and run `wanprep encode` again; for another text encoder: "
            "--same-captions."
        )
    if not wanted:
        raise UserError(
            f"captions: no file of {dataset.origin if dataset else base.store} is in "
            f"{base.store}. Files are named as in the dataset that was encoded, such as "
            f"{next(iter(outcome.without), '')!r}; --train-data-dir decides what they are relative "
            "to."
        )
    return wanted


def _infos(base: CacheIndex, rows: Iterable[int]) -> Iterator[tuple[int, dict[str, Any]]]:
    """`KEY.json` of rows, one at a time: a million of them would fill the memory."""
    with closing(MemberReader(base)) as reader:
        for row in rows:
            yield row, reader.info(row)


def _fingerprint(
    config: RecaptionConfig, base: CacheIndex, spec: ModelSpec, console: Console
) -> Fingerprint:
    text = fields_in_cache(spec, base, console)["text"]
    refuse_absent(spec, {"text": text})
    say(console, f"model    {spec.folder} on {config.device}")
    own = group_of(base.fingerprint, "text", base.store)
    return {
        "format": FORMAT_VERSION,
        "overlay": CAPTIONS,
        "text": text_group(spec, text, own["dtype"], config.text_encoder_dtype or own["compute"]),
    }


def _missing(base: CacheIndex, wanted: dict[int, str], there: CacheIndex | None) -> dict[int, str]:
    """Those that the overlay lacks, or has with another caption."""
    committed = {key: sample.caption for key, sample in committed_of(there).items()}
    return {
        row: caption
        for row, caption in wanted.items()
        if committed.get(base.key(row)) != caption_digest(caption)
    }


def _leftover(
    base: CacheIndex, wanted: dict[int, str], there: CacheIndex | None, rejected: Sequence[Rejected]
) -> list[str]:
    """Keys of samples that the overlay has a caption for and the dataset has not.

    As in `preprocess.cache.remove.unlisted`, a file whose entry cannot be used today was not taken
    out.
    """
    have = set() if there is None else set(there.hex_keys())
    rows = [row for row in range(len(base)) if row not in wanted and base.key(row) in have]
    unusable = {one.source for one in rejected}
    return [key for key, source in sources(base, rows).items() if not is_unusable(source, unusable)]


def _missing_prompts(
    config: RecaptionConfig, base: CacheIndex, there: CacheIndex | None
) -> list[list[Prompt]]:
    """What the captions' prompt bank lacks of the cache's, by shard, with texts to be encoded yet.

    The cache's prompts, but for another negative one where that is asked for. What belongs to a
    picture stays in the cache's own bank, which brings it by the same key.
    """
    own = prompts_by_shard(base.store, base.prompt_shards)
    found = [] if there is None else prompts_by_shard(there.store, there.prompt_shards)
    wanted = last_of_roles(own)
    if config.negative_prompt is not None:
        wanted[NEGATIVE] = config.negative_prompt
    unknown = torch.empty(0, 0)
    single = [Prompt(role, text, unknown) for role, text in missing_roles(wanted, found)]
    listed, have = current_validation(own), current_validation(found)
    if [prompt.key for prompt in listed] == [prompt.key for prompt in have]:
        listed = []
    bare = [replace(prompt, text=unknown, cond=None, clip=None) for prompt in listed]
    return [entries for entries in (single, bare) if entries]


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
    if done.unusable:
        lines.append(f"{len(done.unusable)} rejected of the list:")
        lines += reasons(done.unusable)
    return lines
