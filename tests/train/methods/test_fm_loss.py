"""--fm-loss-weight from the command line; its maths is in test_dmd_float64."""

from pathlib import Path

from tests.train.test_distill import distill, final_bytes, losses


def test_it_moves_the_generator_and_leaves_the_first_critic_updates_alone(
    tiny_t2v: Path, t2v_shards: Path, tmp_path: Path
) -> None:
    runs = [
        distill(
            tiny_t2v, t2v_shards, tmp_path / weight, "--max-train-steps", "1",
            "--mixed-precision", "no", "--fm-loss-weight", weight,
        )
        for weight in ("0", "0.5")
    ]  # fmt: skip
    plain, mixed = map(losses, runs)
    assert mixed["critic"] == plain["critic"]
    assert mixed["generator"] != plain["generator"]
    assert final_bytes(runs[0]) != final_bytes(runs[1])
