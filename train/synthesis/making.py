"""What an expert makes of a group of clips: states for the next expert, or finished samples."""

from collections.abc import Callable, Iterator, Set
from contextlib import AbstractContextManager

import torch

from shared.errors import UserError
from shared.format.fingerprint import condition_tensor
from shared.format.schema import DTYPES, MEDIA_TYPES, Sample
from train.data.batches import MicroBatches, StoredBatch, load_prompt_bank
from train.memory.forward_only import loaded
from train.methods.flow_matching import with_clean_frames
from train.model.roles import Roles
from train.options import Expert
from train.synthesis.clips import Clip, Group, info_of
from train.synthesis.handover import HandedOver, Handover
from train.synthesis.job import Job

_VIDEO = MEDIA_TYPES.index("video")


class Maker:
    """Takes groups through the levels of a job's experts. Stores nothing."""

    def __init__(self, job: Job, handover: Handover) -> None:
        self._job = job
        self._handover = handover
        self._device = torch.device(job.device)
        self._dtype = DTYPES[job.fingerprint["latents"]["dtype"]]
        bank = load_prompt_bank(job.source.index, job.spec.family)
        self._negative = bank.negative.to(self._device)
        self._reader = MicroBatches.of_whole_samples(job.source.data, job.spec, bank)

    def loaded(self, expert: Expert, say: Callable[[str], None]) -> AbstractContextManager[Roles]:
        """The expert on its device, as long as the block lasts."""
        job, attention = self._job, self._job.config.attention_backend
        base = job.bases[expert]
        return loaded(job.spec, expert, base, job.config.memory, attention, self._device, say)

    def made(
        self,
        roles: Roles,
        group: Group,
        places: range,
        missing: Set[str],
        advance: Callable[[int], None],
    ) -> Iterator[tuple[Clip, HandedOver | Sample]]:
        """Of each clip what the expert hands over or, after the last level, the sample; of the
        samples only those that are `missing`. `advance` is called with the passes of each step.
        """
        clips, last = group.clips, places.stop == len(self._job.sampler.sigmas)
        stored = self._read(group)
        x_t, states = self._sampled(roles, group, stored, places, advance)
        for number, clip in enumerate(clips):
            if not last:
                yield clip, HandedOver(x_t[number].cpu(), states[number])
            elif clip.key in missing:
                latents = x_t[number].to("cpu", self._dtype)
                yield clip, self._sample(stored, group, number, latents, states[number])

    def _sampled(
        self,
        roles: Roles,
        group: Group,
        stored: StoredBatch,
        places: range,
        advance: Callable[[int], None],
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """x_t behind the last of `places` (B, C, T, H, W), and each clip's states so far (S, C, T,
        H, W), on the CPU as they are stored."""
        job, clips = self._job, group.clips
        sampler = job.sampler
        batch = stored.to(self._device)
        keys = [clip.noise for clip in clips]
        if places.start == 0:
            noise = sampler.noise(keys, batch.latents.shape[1:], 0).to(self._device)
            x_t = with_clean_frames(batch, noise)
            before = [self._none(x_t) for _ in clips]
        else:
            there = [self._handover.expect(clip.key) for clip in clips]
            x_t = torch.stack([one.x_t for one in there]).to(self._device)
            before = [one.states for one in there]
        states: list[torch.Tensor] = []  # each (B, C, T, H, W)
        path = sampler.path(roles, batch, keys, self._negative, x_t, places.start)
        for place, x_t in enumerate(path, start=places.start):
            if place > places.start:
                advance(len(clips) * sampler.passes_each)
            if place == places.stop:
                break
            if place in sampler.states:
                states.append(x_t.to("cpu", self._dtype))
        if not bool(torch.isfinite(x_t).all()):
            raise UserError(
                f"model: {job.spec.folder} gave NaN or infinite values for clip {clips[0].key} (or "
                "one sampled with it). Try --mixed-precision no, or without --base-precision."
            )
        return x_t, [
            torch.cat([own, *(state[number, None] for state in states)])
            for number, own in enumerate(before)
        ]

    def _none(self, x_t: torch.Tensor) -> torch.Tensor:
        return torch.empty(0, *x_t.shape[1:], dtype=self._dtype)

    def _read(self, group: Group) -> StoredBatch:
        """The group's samples. Of ti2v, videos keep their first frame."""
        job, data = self._job, self._job.source.data
        rows = [clip.row for clip in group.clips]
        from_image = job.config.train_mode != "normal" and group.bucket.frames > 1
        conditioned = [from_image and int(data.types[row]) == _VIDEO for row in rows]
        return self._reader.whole_samples(rows, tuple(range(len(rows))), conditioned=conditioned)

    def _sample(
        self, stored: StoredBatch, group: Group, number: int, latents: torch.Tensor,
        states: torch.Tensor,
    ) -> Sample:  # fmt: skip
        clip = group.clips[number]
        original = self._job.source.info(clip.row)
        cond, image = stored.condition, stored.image
        own = None if cond is None else cond[number].clone()
        name = condition_tensor(self._job.spec.mode)
        return Sample(
            key=clip.key,
            info=info_of(clip, original),
            latents=latents,
            text=stored.texts[number].clone(),
            cond=own if name == "cond" else None,
            first_last=own if name == "first_last" else None,
            clip=None if image is None else image[number].clone(),
            states=states if len(states) else None,
        )
