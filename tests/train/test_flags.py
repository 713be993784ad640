"""Each training flag of the seed document, by whole runs: changing it changes what it should.

What a flag of stage one changes is in tests/preprocess/dataset/test_media_flags.py.
"""

import re
import threading
from math import cos, pi
from pathlib import Path

import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanTransformerBlock
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from shared.errors import UserError
from tests.train.test_distill import distill, final_bytes, losses
from train.data.batches import MicroBatches
from train.optim.lr_schedule import learning_rate

ONE_UPDATE = (
    "--max_train_steps=1", "--gen_update_interval=1", "--mixed_precision=no",
    "--max_grad_norm=1e3", "--adam_epsilon=1e-8", "--no-gradient-checkpointing",
)  # fmt: skip


@pytest.fixture(scope="module")
def base(tiny_t2v: Path, t2v_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A critic update, then a generator update."""
    return distill(tiny_t2v, t2v_shards, tmp_path_factory.mktemp("base") / "out", *ONE_UPDATE)


def weights(out: Path, role: str) -> dict[str, torch.Tensor]:
    return load_file(out / "checkpoint-1" / f"{role}_weights.safetensors")


def moved(one: Path, other: Path) -> set[str]:
    """Roles whose weights differ."""
    roles = ("generator", "critic")
    pairs = {role: (weights(one, role), weights(other, role)) for role in roles}
    assert all(a.keys() == b.keys() for a, b in pairs.values())
    return {role for role, (a, b) in pairs.items() if any(not a[n].equal(b[n]) for n in a)}


BOTH = {"generator", "critic"}
# flag → roles whose weights are others after one update of each, the critic's first.
CHANGES: dict[str, set[str]] = {
    "--seed=43": BOTH,
    "--learning_rate=2e-3": {"generator"},
    "--learning_rate_critic=3e-3": BOTH,
    "--adam_weight_decay=5": BOTH,
    "--adam_epsilon=1e-2": BOTH,
    "--max_grad_norm=1e-9": BOTH,
    "--mixed_precision=bf16": BOTH,
    "--network_alpha=5": BOTH,
    "--no_uniform_sampling": BOTH,
    "--train_batch_size=3": BOTH,
    "--gradient_accumulation_steps=2": BOTH,
    "--boundary_type=high": BOTH,
    "--lr_warmup_steps=4": BOTH,
    "--lr_scheduler=cosine": set(),  # a run's first update is at the full rate
    "--train_mode=normal": set(),
    "--use_peft_lora": set(),
    "--config_path=config/wan2.2/wan_civitai_t2v.yaml": set(),
    "--dataloader_num_workers=2": set(),
    "--video_repeat=1": set(),
    "--uniform_sampling": set(),
}


@pytest.mark.parametrize("flag", CHANGES)
def test_what_a_flag_changes(
    base: Path, tiny_t2v: Path, t2v_shards: Path, tmp_path: Path, flag: str
) -> None:
    out = distill(tiny_t2v, t2v_shards, tmp_path / "out", *ONE_UPDATE, flag)
    assert moved(base, out) == CHANGES[flag]


def test_rank_and_targets_are_the_loras(tiny_t2v: Path, t2v_shards: Path, tmp_path: Path) -> None:
    def layers(*more: str) -> dict[str, tuple[int, ...]]:
        out = distill(tiny_t2v, t2v_shards, tmp_path / str(len(more)), *ONE_UPDATE, *more)
        return {name: tuple(t.shape) for name, t in weights(out, "generator").items()}

    whole = layers("--rank=5", "--target_name=q,k,v,ffn.0,ffn.2")
    assert {shape[0] for name, shape in whole.items() if "lora_A" in name} == {5}
    assert {name.split(".", 2)[2].rsplit(".lora", 1)[0] for name in whole} == {
        *(f"attn{n}.to_{x}" for n in (1, 2) for x in "qkv"),
        *("ffn.net.0.proj", "ffn.net.2"),
    }
    fewer = layers("--rank=5", "--target_name=q,ffn.2", "--lora_skip_name=cross_attn")
    assert {name.split(".", 2)[2].rsplit(".lora", 1)[0] for name in fewer} == {
        "attn1.to_q", "ffn.net.2",
    }  # fmt: skip
    with pytest.raises(UserError, match=r"--lora-skip-name: 'q_img' is in the name of no layer"):
        layers("--rank=5", "--lora_skip_name=q_img", "--target_name=q", "--seed=1")


def test_checkpointed_blocks_are_computed_again_to_the_same_end(
    base: Path,
    tiny_t2v: Path,
    t2v_shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    forwards: list[bool] = []
    forward = WanTransformerBlock.forward

    def counted(self: WanTransformerBlock, *args: object, **named: object) -> object:
        forwards.append(torch.is_grad_enabled())
        return forward(self, *args, **named)

    monkeypatch.setattr(WanTransformerBlock, "forward", counted)
    plain = distill(tiny_t2v, t2v_shards, tmp_path / "plain", *ONE_UPDATE)
    once = forwards.count(True)
    forwards.clear()
    again = distill(
        tiny_t2v, t2v_shards, tmp_path / "again", *ONE_UPDATE, "--gradient_checkpointing"
    )
    assert forwards.count(True) == 2 * once > 0
    for role in BOTH:
        for name, tensor in weights(plain, role).items():
            assert torch.allclose(tensor, weights(again, role)[name], atol=1e-6), name


def test_workers_read_ahead(
    tiny_t2v: Path, t2v_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: set[str] = set()
    load = MicroBatches.load

    def seen(self: MicroBatches, update: int, micro_step: int) -> object:
        threads.add(threading.current_thread().name.split("_")[0])
        return load(self, update, micro_step)

    monkeypatch.setattr(MicroBatches, "load", seen)
    for workers, expected in ((0, {"MainThread"}), (2, {"loader"})):
        threads.clear()
        flag = f"--dataloader_num_workers={workers}"
        distill(tiny_t2v, t2v_shards, tmp_path / str(workers), *ONE_UPDATE, flag)
        assert threads == expected


def test_epochs_checkpoints_and_folders_are_as_said(
    tiny_t2v: Path, t2v_shards: Path, tmp_path: Path
) -> None:
    """An epoch is 3 buckets' worth of updates at batch 2: 3 of videos, 1 of the picture."""
    few = (*ONE_UPDATE[1:], "--num_train_epochs=2", "--checkpointing_steps=3")
    out = distill(tiny_t2v, t2v_shards, tmp_path / "there" / "out", *few)
    assert len(losses(out)["generator"]) == 4
    assert sorted(p.name for p in out.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]
    resumed = distill(
        tiny_t2v, t2v_shards, out, *few, "--num_train_epochs=3", "--resume_from_checkpoint=latest"
    )
    assert len(losses(resumed)["generator"]) == 6
    whole = distill(tiny_t2v, t2v_shards, tmp_path / "whole", *few, "--num_train_epochs=3")
    assert final_bytes(resumed) == final_bytes(whole)


def test_video_repeat_replaces_that_of_the_shards(
    tiny_t2v: Path, t2v_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for repeat, updates in ((1, 4), (4, 11)):  # 5 videos in 2 shapes, a picture; batch 2
        distill(tiny_t2v, t2v_shards, tmp_path, f"--video_repeat={repeat}", "--dry_run")
        assert f"; {updates} updates an epoch" in capsys.readouterr().out


def test_train_mode_must_be_the_models(
    tiny_t2v: Path, t2v_shards: Path, tiny_i2v: Path, i2v_shards: Path, tmp_path: Path
) -> None:
    for model, shards, wrong, right in (
        (tiny_t2v, t2v_shards, "i2v", "normal"),
        (tiny_i2v, i2v_shards, "normal", "i2v"),
        (tiny_i2v, i2v_shards, "ti2v", "i2v"),
    ):
        distill(model, shards, tmp_path, f"--train_mode={right}", "--dry_run")
        with pytest.raises(
            UserError, match=rf"--train-mode: {wrong}, .* for \w+; expected {right}"
        ):
            distill(model, shards, tmp_path, f"--train_mode={wrong}", "--dry_run")


SAME_AS_SHARDS = (
    "--video_sample_size=64", "--image_sample_size=64", "--video_sample_stride=1",
    "--video_sample_n_frames=9", "--enable_bucket", "--token_sample_size=640",
    "--train_data_dir=elsewhere", "--vae_mini_batch=4",
)  # fmt: skip


def test_flags_of_stage_one_must_say_what_the_shards_are(
    tiny_t2v: Path, t2v_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The token size counts for nothing where clips keep all their frames."""
    distill(tiny_t2v, t2v_shards, tmp_path, *SAME_AS_SHARDS, "--dry_run")
    said = capsys.readouterr().err
    assert "for wanprep encode, ignored here: --train-data-dir, --vae-mini-batch, " in said
    for flag, found in {
        "--video_sample_stride=2": "1",
        "--video_sample_n_frames=81": "9",
        "--image_sample_size=640": "64",
        "--random_hw_adapt": "it off",
        "--training_with_video_token_length": "it off",
        "--fix_sample_size 64 64": "no fixed size",
    }.items():
        option = re.escape(flag.replace("_", "-").replace("=", " "))
        with pytest.raises(UserError, match=rf"^{option}: .* were encoded with {found}\. Leave it"):
            distill(tiny_t2v, t2v_shards, tmp_path, *flag.split(), "--dry_run")


def test_lists_are_taken_as_argparse_takes_them(
    tiny_t2v: Path, t2v_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--denoising_step_indices_list", "1000", "600", "300", "--validation_paths", "a", "b")
    distill(tiny_t2v, t2v_shards, tmp_path, *words, "--dry_run")
    shown = capsys.readouterr()
    assert re.search(
        r'"denoising_step_indices_list": \[\s+1000.0,\s+600.0,\s+300.0\s+\]', shown.out
    )
    assert "--validation-paths (" in shown.err


@pytest.mark.parametrize(
    ("scheduler", "closed_form"),
    [
        ("constant", lambda share: 1.0),
        ("constant_with_warmup", lambda share: 1.0),
        ("linear", lambda share: 1 - share),
        ("polynomial", lambda share: 1 - share * (1 - 1e-7 / 2e-3)),
        ("cosine", lambda share: (1 + cos(pi * share)) / 2),
        ("warmup_stable_decay", lambda share: min(1, 2 - 2 * share)),
    ],
)
def test_rates_follow_their_course(scheduler, closed_form) -> None:  # type: ignore[no-untyped-def]
    """Rising over 4 of 20 updates, to the full rate at the 4th; then the closed form."""
    rates = [learning_rate(2e-3, n, scheduler=scheduler, warmup=4, length=20) for n in range(20)]
    assert rates[:4] == pytest.approx([2e-3 * n / 4 for n in (1, 2, 3, 4)])
    assert rates[4:] == pytest.approx([2e-3 * closed_form((n - 4) / 16) for n in range(4, 20)])


def test_the_rates_of_a_run_are_its_schedulers_resumed_or_not(
    tiny_t2v: Path, t2v_shards: Path, tmp_path: Path
) -> None:
    """Each role by its own updates: 4 of the generator, 8 of the critic; cut after 2."""
    course = ("--lr_scheduler=linear", "--mixed_precision=no", "--max_train_steps=4")
    whole = distill(tiny_t2v, t2v_shards, tmp_path / "whole", *course, "--checkpointing_steps=2")
    events = EventAccumulator(str(whole / "logs"))
    events.Reload()
    for role, rate, count in (("generator", 1e-3, 4), ("critic", 2e-3, 8)):
        logged = [event.value for event in events.Scalars(f"learning_rate/{role}")]
        assert logged == pytest.approx([rate * (1 - n / count) for n in range(count)])
    again = distill(
        tiny_t2v, t2v_shards, whole, *course,
        "--resume_from_checkpoint", str(whole / "checkpoint-2"), "--output_dir", str(whole),
    )  # fmt: skip
    fresh = distill(tiny_t2v, t2v_shards, tmp_path / "fresh", *course)
    assert final_bytes(again) == final_bytes(fresh)
    with pytest.raises(UserError, match=r"--learning-rate: found 1e-08, expected more than 1e-07"):
        distill(
            tiny_t2v, t2v_shards, tmp_path / "x", "--lr_scheduler=polynomial",
            "--learning_rate=1e-8",
        )  # fmt: skip


def test_tf32_is_on_only_where_asked_for(tiny_t2v: Path, t2v_shards: Path, tmp_path: Path) -> None:
    asked: tuple[tuple[str, ...], ...] = (("--allow_tf32",), ())
    for flags in asked:
        out, on = tmp_path / f"out{len(flags)}", bool(flags)
        distill(tiny_t2v, t2v_shards, out, *ONE_UPDATE, *flags)
        assert torch.backends.cuda.matmul.allow_tf32 is on
