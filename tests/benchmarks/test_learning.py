"""The learning benchmark measures what it says, with diffusers' pipeline as the reference."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline, WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttnProcessor

from shared.models.toy_model import toy_folder
from train.functional.schedule import Schedule
from train.model.lora_adapter import LoraSpec
from train.model.lora_files import LoraWeights
from train.sampling.sample import student_scheduler
from train.saving.export import write_loras
from train.saving.provenance import Provenance

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import short_text  # noqa: E402
from learning import (  # noqa: E402
    CALIBRATED,
    DECAY,
    EXPERIMENTS,
    METRICS,
    REGRESSION,
    Arm,
    Bench,
    markdown,
    passes,
    quick,
)
from toy_students import (  # noqa: E402
    NOISE_SEED,
    Sampler,
    ToyBench,
    TwoExperts,
    mean_and_error,
    sliced_wasserstein,
    step_levels,
)
from which_expert import Half, draw  # noqa: E402

INDICES = (1000.0, 750.0, 500.0, 250.0)
TARGETS = ("attn1.to_q", "attn2.to_v", "ffn.net.0.proj")


def test_the_distance_of_a_shift_is_its_root_mean_square() -> None:
    one = torch.randn(500, 3, 4, generator=torch.Generator().manual_seed(0))
    moved = one + torch.tensor([3.0, 0.0, 4.0, 0.0])
    assert sliced_wasserstein(one, moved, projections=20_000) == pytest.approx(2.5, rel=0.02)
    assert sliced_wasserstein(one, one[torch.randperm(500)]) < 1e-12


def test_the_distance_of_two_gaussians_is_that_of_their_deviations() -> None:
    """W2 of N(0, 1) and N(0, 3²) in one dimension is 2; so it is along every direction here."""
    generator = torch.Generator().manual_seed(1)
    one, other = (torch.randn(20_000, 5, generator=generator) for _ in range(2))
    assert sliced_wasserstein(one, 3 * other, projections=200) == pytest.approx(2.0, rel=0.02)


def test_mean_and_standard_error() -> None:
    mean, error = mean_and_error([1.0, 2.0, 4.0, 5.0])
    assert mean == 3.0
    assert error == pytest.approx((10 / 3 / 4) ** 0.5)
    assert mean_and_error([1.0])[1] != mean_and_error([1.0])[1]  # nan


def _provenance(expert: str, spec: LoraSpec) -> Provenance:
    return Provenance(
        method="distill",
        expert=expert,  # type: ignore[arg-type]
        mode="t2v",
        denoising_step_indices_list=INDICES,
        flow_shift=12.0,
        boundary=0.875,
        pairing="euler",
        base="",
        cache={"samples": 0, "buckets": []},
        rank=spec.rank,
        alpha=spec.alpha,
        updates=1,
        recipe={},
    )


def _lora(folder: Path, expert: str, seed: int, transformer: torch.nn.Module) -> Path:
    """A LoRA with B ≠ 0 and rank ≠ alpha: as a checkpoint's weights and as diffusers' file."""
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)
    spec = LoraSpec(rank=8, alpha=3, targets=TARGETS)
    weights = {}
    for block in range(4):
        for target in TARGETS:
            out, into = transformer.get_parameter(f"blocks.{block}.{target}.weight").shape
            for letter, shape in (("A", (8, into)), ("B", (out, 8))):
                values = 0.4 * torch.randn(shape, generator=generator)
                weights[f"blocks.{block}.{target}.lora_{letter}.weight"] = values
    save_file(weights, folder / f"{expert}.safetensors")
    write_loras(folder, LoraWeights.uniform(weights, spec.alpha), _provenance(expert, spec))
    return folder / f"{expert}.safetensors"


def test_students_are_drawn_as_the_pipeline_draws_them(tmp_path: Path) -> None:
    """Own sampler, merged LoRAs, short text and expert switch = WanPipeline with loaded LoRAs."""
    bench = ToyBench("toy", 3)
    files = {
        expert: _lora(tmp_path, expert, seed, bench.transformer())
        for seed, expert in enumerate(("high", "low"))
    }
    high, low = (bench.transformer((files[expert], 3 / 8)) for expert in ("high", "low"))
    both = TwoExperts(high, low, bench.boundary)
    found = bench.draw(both, Sampler(indices=INDICES, shift=12), seed=2)
    assert (
        found - bench.draw(bench.transformer(), Sampler(indices=INDICES, shift=12), 2)
    ).std() > (0.1)

    pipe = WanPipeline.from_pretrained(toy_folder("toy"), torch_dtype=torch.float32)
    for expert in ("high", "low"):
        pipe.load_lora_weights(
            str(tmp_path / f"lora-{expert}-diffusers.safetensors"),
            adapter_name=expert,
            load_into_transformer_2=expert == "low",
        )
    schedule = Schedule(indices=INDICES, shift=12.0, boundary=bench.boundary)
    pipe.scheduler = student_scheduler(schedule, "euler", torch.Generator())
    pipe.set_progress_bar_config(disable=True)
    noise = torch.randn(3, 16, 5, 8, 8, generator=torch.Generator().manual_seed(NOISE_SEED + 2000))
    expected = pipe(
        prompt=bench.captions, height=64, width=64, num_frames=17, latents=noise,
        num_inference_steps=4, guidance_scale=1.0, max_sequence_length=512, output_type="latent",
    ).frames  # fmt: skip
    assert (found - expected).norm() / expected.norm() < 1e-4


def test_guided_sampling_is_the_pipelines(tmp_path: Path) -> None:
    bench = ToyBench("toy", 2)
    sampler = Sampler(indices=(1000.0, 700.0, 300.0), shift=5, guidance=2)
    found = bench.draw(bench.transformer(), sampler, seed=0)
    pipe = WanPipeline.from_pretrained(toy_folder("toy"), torch_dtype=torch.float32)
    schedule = Schedule(indices=sampler.indices, shift=5.0, boundary=bench.boundary)
    pipe.scheduler = student_scheduler(schedule, "euler", torch.Generator())
    pipe.set_progress_bar_config(disable=True)
    noise = torch.randn(2, 16, 5, 8, 8, generator=torch.Generator().manual_seed(NOISE_SEED))
    expected = pipe(
        prompt=bench.captions, negative_prompt="", height=64, width=64, num_frames=17,
        latents=noise, num_inference_steps=3, guidance_scale=2.0, max_sequence_length=512,
        output_type="latent",
    ).frames  # fmt: skip
    assert (found - expected).norm() / expected.norm() < 1e-4


def test_two_halves_of_a_path_are_the_path() -> None:
    """What `which_expert.py` draws of one model's halves is what one sampler draws."""
    toy = ToyBench("toy-experts", 3)
    few = tuple(step_levels([index / 1000 for index in INDICES], 12).tolist())
    for guidance in (1.0, 3.0):
        halves = [
            Half(model=toy.both({}), levels=levels, guidance=guidance)
            for levels in (few[:4], few[3:])
        ]
        whole = toy.draw(toy.both({}), Sampler(indices=INDICES, shift=12, guidance=guidance), 2)
        assert torch.allclose(draw(toy, halves, 2), whole, atol=1e-5)


def test_short_text_changes_no_velocity_and_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Text of any length, none at all and all 512 tokens, in one batch and alone."""
    transformer = WanTransformer3DModel.from_pretrained(toy_folder("toy-experts") / "transformer")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 16, 3, 8, 10, generator=generator)
    text = torch.randn(3, 512, 64, generator=generator)
    text[0, 7:], text[1] = 0, 0
    timestep = torch.tensor([900.0, 500.0, 20.0])

    def found(rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        out = transformer(x[rows], timestep[rows], text[rows]).sample
        value = transformer.blocks[1].attn2.to_v.weight
        return out, torch.autograd.grad(out.square().sum(), value)[0]

    for rows in (slice(0, 2), slice(1, 2), slice(3)):
        expected = found(rows)
        with monkeypatch.context() as patched:
            patched.setattr(WanTransformer3DModel, "forward", short_text.forward)
            patched.setattr(WanAttnProcessor, "__call__", short_text.attend)
            for one, other in zip(found(rows), expected, strict=True):
                assert (one - other).norm() / other.norm() < 2e-5


def test_what_decides_a_result_is_in_its_files_name(tmp_path: Path) -> None:
    experiment = quick(EXPERIMENTS["full"])
    bench = object.__new__(Bench)
    bench.experiment, bench.work = experiment, tmp_path
    bench.shards, bench.weights = tmp_path / "shards", "toy-1"
    arm = Arm(expert="full")
    folder = bench.training(arm, 0).folder
    assert folder == bench.training(arm, 0).folder
    assert folder != bench.training(arm, 1).folder
    assert folder != bench.training(Arm(expert="full", flags=("--adam-beta1", "0.5")), 0).folder
    draws = {
        bench.many_steps(0).file,
        bench.many_steps(1).file,
        bench.few_steps(0, guidance=1, renoise=True).file,
        bench.few_steps(0, guidance=2, renoise=True).file,
        bench.few_steps(0, guidance=2, renoise=False).file,
        bench.student(0, arms=(arm,), updates=1).file,
        bench.student(0, arms=(arm,), updates=2).file,
    }
    assert len(draws) == 7


def test_a_decaying_run_is_one_for_each_length(tmp_path: Path) -> None:
    """A schedule that ends with the run makes every length a run of its own; others share one."""
    bench = object.__new__(Bench)
    bench.experiment, bench.work = EXPERIMENTS["recipes"], tmp_path
    bench.shards, bench.weights = tmp_path / "shards", "toy-1"
    constant, decaying = Arm(expert="low"), Arm(expert="low", flags=DECAY)
    assert bench.training(constant, 0, 10) == bench.training(constant, 0, 160)
    short, long = (bench.training(decaying, 0, updates) for updates in (10, 160))
    assert short.folder != long.folder
    assert short.command[short.command.index("--max-train-steps") + 1] == "10"


def test_what_an_arm_asks_for_is_made_before_it(tmp_path: Path) -> None:
    bench = object.__new__(Bench)
    bench.experiment, bench.work = EXPERIMENTS["recipes"], tmp_path
    bench.shards, bench.weights = tmp_path / "shards", "toy-1"
    made = [command[2] for _, command in bench.preparations()]
    assert made == ["synthesize", "calibrate", "calibrate"]
    arm = Arm(expert="high", flags=CALIBRATED)
    assert str(bench.guidance_file) in bench.training(arm, 0).command
    students = {"DMD": EXPERIMENTS["recipes"].students["DMD"]}
    bench.experiment = replace(bench.experiment, students=students)
    assert bench.preparations() == []


def test_passes_are_those_of_the_loop() -> None:
    """Counted update by update; at shift 12 high owns three steps, low the last."""
    recipes = EXPERIMENTS["recipes"]
    for expert, ends in (("low", [1]), ("high", [1, 2, 3])):
        # a critic's pass with its backward is 3; a generator's backward 2, its scores 1 and 2
        of_critic = sum(end + 3 for end in ends) / len(ends)
        of_generator = sum(end + 2 + 1 + 2 for end in ends) / len(ends)
        counted = 7 * recipes.batch * (5 * of_critic + of_generator)
        assert passes(recipes, Arm(expert=expert), 0.875, 7) == counted
    regression = Arm(expert="low", flags=REGRESSION)
    assert passes(recipes, regression, 0.875, 7) == 7 * 32 * 3
    more = ("--train-batch-size", "8", "--gradient-accumulation-steps", "2")
    regression = Arm(expert="low", flags=(*REGRESSION, *more))
    assert passes(recipes, regression, 0.875, 7) == 7 * 16 * 3


def test_other_steps_are_other_runs_of_the_experts_that_have_any(tmp_path: Path) -> None:
    """At shift 12 both 1000 and 500 belong to the high-noise expert of t2v; 250 is low's."""
    bench = object.__new__(Bench)
    bench.work, bench.seeds, bench.boundary = tmp_path, range(1), 0.875
    bench.shards, bench.weights = tmp_path / "shards", "toy-1"
    recipes, commands, files = EXPERIMENTS["recipes"], [], set()
    for indices, experts in (((1000.0,), 1), ((1000.0, 250.0), 2), ((1000.0, 500.0), 1)):
        bench.experiment = replace(recipes, indices=indices)
        arms = bench.arms("regression")
        assert len(arms) == experts and arms[0].expert == "high"
        commands.append(bench.training(arms[0], 0).command)
        files.add(bench.student(0, arms=arms, updates=10).file)
        files.add(bench.few_steps(0, guidance=4, renoise=False).file)
        files.add(str(bench.teacher_shards))
    assert len(files) == 9
    assert "--denoising-step-indices-list" in commands[1] and "1000.0 250.0" in commands[1]
    bench.experiment = recipes
    assert len(bench.arms("regression")) == 2
    plain = bench.training(bench.arms("regression")[0], 0).command
    assert "--denoising-step-indices-list" not in plain  # names of runs that exist stay


def test_the_table_shows_means_with_their_errors() -> None:
    row = {metric: [0.1, 0.5] for metric in METRICS}
    cells = markdown({"d  student": row, "a  one seed": {m: [0.25] for m in METRICS}}).splitlines()
    assert "0.300 ± 0.200" in cells[2] and cells[2].count("±") == len(METRICS)
    assert "0.250" in cells[3] and "±" not in cells[3]


@pytest.mark.long
def test_the_quick_benchmark_runs_and_is_not_done_twice(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/learning.py", "full", "--quick", "--seeds", "1"]
    command += ["--work", str(tmp_path)]

    def made() -> dict[str, int]:
        return {str(p): p.stat().st_mtime_ns for p in tmp_path.rglob("*.safetensors")}

    first = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    before = made()
    again = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert made() == before
    tables = ["\n".join(x for x in out.splitlines() if x[:1] == "|") for out in (first, again)]
    assert tables[0] == tables[1]
    assert tables[0].count("student") == 2
    rows = json.loads((tmp_path / "full.json").read_text())["rows"]
    assert all(len(row["accuracy"]) == 1 for row in rows.values())
    trained = [row["distance"] for name, row in rows.items() if name.startswith("d")]
    assert trained[0] != trained[1]  # each checkpoint's own weights were used
