"""Workflows for ComfyUI: its node definitions, and the noise levels that its nodes would give.

The levels are computed here in numpy from ComfyUI 0.29's rules: `ModelSamplingDiscreteFlow`
(comfy/model_sampling.py), `simple_scheduler` and `KSampler.sample` (comfy/samplers.py),
`ManualSigmas` and `SplitSigmas` (comfy_extras/nodes_custom_sampler.py).
"""

import json
import re
from importlib.metadata import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.train.model.test_lora_adapter import ALL, trained
from tests.train.test_distill import distill
from train.cli.app import app as wantrain
from train.sampling.comfyui import API_FILE, UI_FILE, loras_of_run, write_workflow
from train.saving.export import lora_path
from train.saving.provenance import Provenance, read_provenance

DEFINED = json.loads((Path(__file__).parent / "comfyui_nodes.json").read_text())
PAIR = {"high": "lora-high-comfyui.safetensors", "low": "lora-low-comfyui.safetensors"}


def provenance(**others: Any) -> Provenance:
    values: dict[str, Any] = {
        "method": "distill",
        "expert": "low",
        "mode": "i2v",
        "denoising_step_indices_list": (1000.0, 750.0, 500.0, 250.0),
        "flow_shift": 5.0,
        "boundary": 0.9,
        "pairing": "renoise",
        "base": "0" * 64,
        "cache": {"buckets": [[832, 480, 49], [480, 832, 81], [704, 1280, 1]], "samples": 3},
        "rank": 8,
        "alpha": 4.0,
        "updates": 3,
        "recipe": {},
    }
    return Provenance(**values | others)


T2V = {"mode": "t2v", "flow_shift": 12.0, "boundary": 0.875}
ONE = {"expert": "full", "boundary": None}
PLAIN = {"method": "lora", "pairing": None, "denoising_step_indices_list": ()}
# (what was trained, width of the model, file of the first transformer, steps of the first expert)
CASES: dict[str, tuple[dict[str, Any], int, str, int]] = {
    "A14B i2v": ({}, 5120, "wan2.2_i2v_high_noise_14B_fp8_scaled", 2),
    "A14B t2v, Euler": (
        T2V | {"pairing": "euler", "expert": "high"},
        5120,
        "wan2.2_t2v_high_noise_14B_fp8_scaled",
        3,
    ),
    "A14B t2v, odd steps": (
        T2V | {"denoising_step_indices_list": (1000.0, 871.0, 333.3, 60.0, 1.5)},
        5120,
        "wan2.2_t2v_high_noise_14B_fp8_scaled",
        2,
    ),
    "the low-noise expert alone": (
        {"denoising_step_indices_list": (600.0, 200.0)},
        5120,
        "wan2.2_i2v_low_noise_14B_fp8_scaled",
        2,
    ),
    "one LoRA for two experts": (
        {"expert": "full"},
        5120,
        "wan2.2_i2v_high_noise_14B_fp8_scaled",
        4,
    ),
    "three even steps": (
        T2V | ONE | {"flow_shift": 5.0, "denoising_step_indices_list": (1000.0, 667.0, 334.0)},
        1536,
        "wan2.1_t2v_1.3B_fp16",
        3,
    ),
    "a shift of many digits": (
        T2V | ONE | {"flow_shift": 3.14159},
        1536,
        "wan2.1_t2v_1.3B_fp16",
        4,
    ),
    "TI2V 5B": (ONE | {"mode": "ti2v"}, 3072, "wan2.2_ti2v_5B_fp16", 4),
    "2.1 i2v": (ONE, 5120, "wan2.1_i2v_480p_14B_fp16", 4),
    "2.1 i2v, large": (
        ONE | {"cache": {"buckets": [[720, 1280, 81]], "samples": 1}},
        5120,
        "wan2.1_i2v_720p_14B_fp16",
        4,
    ),
    "2.1 first and last frame": (ONE | {"mode": "flf2v"}, 5120, "wan2.1_flf2v_720p_14B_fp16", 4),
    "A14B first and last frame": (
        {"mode": "flf2v"},
        5120,
        "wan2.2_i2v_high_noise_14B_fp8_scaled",
        2,
    ),
    "a plain LoRA": (PLAIN, 5120, "wan2.2_i2v_high_noise_14B_fp8_scaled", 15),
    "an own model": (T2V, 128, "transformer", 3),
}


def written(folder: Path, trained: Provenance, width: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The window's form and the server's."""
    ui, api = write_workflow(folder, loras_of_run(trained), trained, width)
    assert (ui.name, api.name) == (UI_FILE, API_FILE)
    return json.loads(ui.read_text()), json.loads(api.read_text())


def of_kind(api: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    return [node["inputs"] for node in api.values() if node["class_type"] == kind]


def comfyui_levels(api: dict[str, Any], sampler: dict[str, Any]) -> np.ndarray:
    """The levels that a sampler node walks through, by ComfyUI's rules."""
    shift = api[sampler["model"][0]]["inputs"]["shift"]
    if "sigmas" in sampler:
        source, slot = sampler["sigmas"]
        node = api[source]["inputs"]
        split = None
        if api[source]["class_type"] == "SplitSigmas":
            split, node = node["step"], api[node["sigmas"][0]]["inputs"]
        found = re.findall(r"[-+]?(?:\d*\.*\d+)", node["sigmas"])
        levels = np.array(list(map(float, found)), np.float32)
        if split is None:
            return levels
        return levels[split:] if slot else levels[: split + 1]
    assert sampler["scheduler"] == "simple"
    times = np.arange(1, 1001, dtype=np.float32) / np.float32(1000)
    table = np.float32(shift) * times / (1 + np.float32(shift - 1) * times)
    steps = sampler["steps"]
    levels = np.array([table[-(1 + int(x * 1000 / steps))] for x in range(steps)] + [0], np.float32)
    end = sampler["end_at_step"]
    if end < len(levels) - 1:
        levels = levels[: end + 1]
        if sampler["return_with_leftover_noise"] == "disable":
            levels[-1] = 0
    return levels[sampler["start_at_step"] :]


@pytest.mark.parametrize("case", CASES)
def test_comfyui_walks_the_trained_levels(case: str, tmp_path: Path) -> None:
    others, width, base, first = CASES[case]
    what = provenance(**others)
    _, api = written(tmp_path, what, width)
    samplers = of_kind(api, "KSamplerAdvanced") + of_kind(api, "SamplerCustom")
    walks = [comfyui_levels(api, sampler) for sampler in samplers]
    assert len(walks[0]) == first + 1
    together = np.concatenate([walks[0], *(walk[1:] for walk in walks[1:])])
    if what.method == "distill":
        raw = np.array(what.denoising_step_indices_list, np.float64) / 1000
        expected = what.flow_shift * raw / (1 + (what.flow_shift - 1) * raw)
        np.testing.assert_allclose(together[:-1], expected, rtol=3e-7)
        assert {sampler["cfg"] for sampler in samplers} == {1.0}
    else:
        assert len(together) == 41 and {sampler["cfg"] for sampler in samplers} == {5.0}
    if len(walks) == 2:  # one expert hands over to the other where the model changes
        assert walks[0][-1] == walks[1][0] < what.boundary <= walks[0][-2]  # type: ignore[operator]
        assert [s["add_noise"] in (True, "enable") for s in samplers] == [True, False]
        # KSampler's re-noising draws from seed + 1 on a CPU: neither may be another's
        assert abs(samplers[0]["noise_seed"] - samplers[1]["noise_seed"]) > 1
    assert together[-1] == 0
    nodes = (node["inputs"] for node in api.values())
    names = {node["sampler_name"] for node in nodes if "sampler_name" in node}
    assert names == {"lcm" if what.pairing == "renoise" else "euler"}
    models = [node["unet_name"] for node in of_kind(api, "UNETLoader")]
    assert len(models) == len(samplers) and models[0] == f"{base}.safetensors"
    for lora in of_kind(api, "LoraLoaderModelOnly"):
        assert lora["strength_model"] == 1
        loader = api[lora["model"][0]]["inputs"]["unet_name"]
        for expert in ("high", "low"):  # each LoRA is on its expert
            if expert in lora["lora_name"] and width != 128:
                assert f"{expert}_noise" in loader


@pytest.mark.parametrize("case", CASES)
def test_nodes_are_those_that_comfyui_defines(case: str, tmp_path: Path) -> None:
    others, width, _, _ = CASES[case]
    ui, api = written(tmp_path, provenance(**others), width)
    for number, node in api.items():
        defined = DEFINED[node["class_type"]]
        inputs = defined["inputs"]
        assert set(inputs) - set(defined["optional"]) <= set(node["inputs"]) <= set(inputs)
        for name, value in node["inputs"].items():
            kind = inputs[name]
            if isinstance(value, list):
                source, slot = value
                assert int(source) < int(number)
                assert DEFINED[api[source]["class_type"]]["outputs"][slot][1] == kind
            elif isinstance(kind, list):
                assert value in kind or not kind  # a list of files
            else:
                types = {"INT": int, "FLOAT": float, "STRING": str, "BOOLEAN": bool}
                assert isinstance(value, types[kind]), name

    # What the window shows, read back by ComfyUI's order of values, is what the server takes
    shown = {node["id"]: node for node in ui["nodes"] if node["type"] != "MarkdownNote"}
    links = {link[0]: link for link in ui["links"]}
    assert set(map(str, shown)) == set(api)
    for number, node in shown.items():
        defined = DEFINED[node["type"]]
        slots = {slot["name"]: slot for slot in node["inputs"]}
        values = iter(node["widgets_values"])
        read: dict[str, Any] = {}
        for name, kind in defined["inputs"].items():
            if name in slots:
                assert slots[name]["type"] == kind
                if (link := slots[name]["link"]) is not None:
                    _, source, slot, target, position, of_link = links[link]
                    assert (target, of_link) == (number, kind)
                    assert node["inputs"][position]["name"] == name
                    output = shown[source]["outputs"][slot]
                    assert output["name"] == DEFINED[shown[source]["type"]]["outputs"][slot][0]
                    assert link in output["links"]
                    read[name] = [str(source), slot]
            elif (value := next(values, None)) is not None:
                read[name] = value
                if name in ("noise_seed", "image"):  # the window's own value follows
                    assert next(values) in ("randomize", "fixed", "image")
        assert not list(values)
        assert read == api[str(number)]["inputs"]


def test_the_clip_is_the_training_s(tmp_path: Path) -> None:
    _, api = written(tmp_path, provenance(), 5120)
    (latent,) = of_kind(api, "WanImageToVideo")
    assert [latent[name] for name in ("width", "height", "length")] == [832, 480, 81]
    assert "clip_vision_output" not in latent
    _, api = written(tmp_path, provenance(**ONE), 5120)
    (latent,) = of_kind(api, "WanImageToVideo")
    assert api[latent["clip_vision_output"][0]]["inputs"]["crop"] == "center"
    _, api = written(tmp_path, provenance(**ONE, mode="flf2v"), 5120)
    (latent,) = of_kind(api, "WanFirstLastFrameToVideo")
    start, end = (api[latent[name][0]]["inputs"]["image"] for name in (
        "clip_vision_start_image", "clip_vision_end_image",
    ))  # fmt: skip
    assert [start, end] == [latent["start_image"], latent["end_image"]] and start != end
    ui, api = written(tmp_path, provenance(**ONE, mode="ti2v"), 3072)
    assert of_kind(api, "VAELoader") == [{"vae_name": "wan2.2_vae.safetensors"}]
    assert of_kind(api, "CreateVideo")[0]["fps"] == 24
    (model,) = (node for node in ui["nodes"] if node["type"] == "UNETLoader")
    (file,) = model["properties"]["models"]
    assert file["url"].endswith("/diffusion_models/wan2.2_ti2v_5B_fp16.safetensors")


def test_other_weights_are_named(tmp_path: Path) -> None:
    ui, _ = written(
        tmp_path, provenance(recipe={"base": "style.safetensors x 0.5 merged in"}), 5120
    )
    (note,) = (node for node in ui["nodes"] if node["type"] == "MarkdownNote")
    assert "style.safetensors x 0.5 merged in" in note["widgets_values"][0]


def test_a_run_leaves_what_the_command_writes(
    tiny_t2v: Path, t2v_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = distill(tiny_t2v, t2v_shards, tmp_path / "out", "--max-train-steps", "1")
    lora = lora_path(out, "low", "comfyui")
    assert read_provenance(lora).expert == "low"
    words = ["workflow", "--output", str(tmp_path / "again"), "--lora", str(lora)]
    wantrain(words, standalone_mode=False)
    for name in (UI_FILE, API_FILE):
        assert (tmp_path / "again" / name).read_bytes() == (out / name).read_bytes()
    assert API_FILE in capsys.readouterr().out
    api = json.loads((out / API_FILE).read_text())
    assert [node["lora_name"] for node in of_kind(api, "LoraLoaderModelOnly")] == [*PAIR.values()]


def test_a_lora_that_comfyui_cannot_load_is_refused(tiny_t2v: Path, tmp_path: Path) -> None:
    trained(tiny_t2v, "low", ALL, tmp_path)
    with pytest.raises(Exception, match="wantrain export --lora"):
        wantrain(
            ["workflow", "--lora", str(lora_path(tmp_path, "low", "diffusers"))],
            standalone_mode=False,
        )


@pytest.mark.parametrize(
    "template",
    ["video_wan2_2_14B_i2v", "video_wan2_2_14B_t2v", "video_wan2_2_5B_ti2v", "image_to_video_wan"],
)
def test_nodes_agree_with_comfyui_s_own_workflows(template: str, tmp_path: Path) -> None:
    """Slots and their types, values and the published files' names."""
    (found,) = (
        file
        for file in files("comfyui-workflow-templates-json") or ()
        if file.name == f"{template}.json"
    )
    stored = json.loads(Path(str(found.locate())).read_text())
    others, width = {
        "video_wan2_2_14B_i2v": ({}, 5120),
        "video_wan2_2_14B_t2v": (T2V, 5120),
        "video_wan2_2_5B_ti2v": (ONE | {"mode": "ti2v"}, 3072),
        "image_to_video_wan": (ONE, 5120),
    }[template]
    ui, _ = written(tmp_path, provenance(**others), width)
    theirs: dict[str, list[dict[str, Any]]] = {}
    for graph in (stored, *stored.get("definitions", {}).get("subgraphs", ())):
        for node in graph["nodes"]:
            theirs.setdefault(node["type"], []).append(node)
    compared = 0
    for node in (node for node in ui["nodes"] if node["type"] in theirs):
        for other in theirs[node["type"]]:
            values = {slot["name"] for slot in other["inputs"] if "widget" in slot}
            slots = [(s["name"], s["type"]) for s in other["inputs"] if s["name"] not in values]
            assert slots == [(slot["name"], slot["type"]) for slot in node["inputs"]]
            outputs = [slot["type"] for slot in node["outputs"]]
            assert [slot["type"] for slot in other["outputs"]][: len(outputs)] == outputs
            kinds = [type(value) for value in node["widgets_values"]]
            numbers = {int: float, bool: bool}  # 5.0 is written as 5
            assert [numbers.get(type(v), type(v)) for v in other["widgets_values"]][
                : len(kinds)
            ] == [numbers.get(kind, kind) for kind in kinds]
            compared += 1
    files_there = {"UNETLoader", "CLIPLoader", "VAELoader", "CLIPVisionLoader"} & set(theirs)
    for kind in files_there:  # the published files, under ComfyUI's own names
        (names,) = zip(*(n["widgets_values"][:1] for n in theirs[kind]), strict=True)
        assert {n["widgets_values"][0] for n in ui["nodes"] if n["type"] == kind} == set(names)
    assert compared > 9
