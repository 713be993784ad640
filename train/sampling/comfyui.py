"""A ComfyUI workflow for LoRAs: the files, sampler, noise levels and clip of their training.

In two forms: the one that ComfyUI's window opens, and the one that its server takes. Only nodes of
ComfyUI itself. `tests/train/sampling/comfyui_nodes.json` has their definitions.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shared.errors import UserError
from shared.io.durable import write_json
from shared.io.names import quoted
from shared.models.spec import TIMESTEPS
from shared.models.wan import PUBLISHED, WAN
from train.functional.schedule import Schedule, steps_by_expert
from train.model.lora_files import read_lora
from train.options import Expert
from train.sampling.config import TEACHER_GUIDANCE, TEACHER_STEPS
from train.saving.export import lora_path
from train.saving.provenance import Provenance, check_pair, read_provenance

UI_FILE, API_FILE = "workflow-comfyui.json", "workflow-comfyui-api.json"
SAMPLERS = {"renoise": "lcm", "euler": "euler", None: "euler"}
OWN_FILES = ("transformer.safetensors", "transformer_2.safetensors")
"""Names in place of a published base's."""
TEXT_ENCODER, CLIP_VISION = "umt5_xxl_fp8_e4m3fn_scaled.safetensors", "clip_vision_h.safetensors"
_HUB = "https://huggingface.co/Comfy-Org/{}/resolve/main/split_files/{}/{}"
_REPOSITORIES = {"wan2.2": "Wan_2.2_ComfyUI_Repackaged", "": "Wan_2.1_ComfyUI_repackaged"}

# Node → [inputs that are links, inputs that are values, outputs], each in ComfyUI's order. After
# "+", a value that only the window has.
NODES: Mapping[str, tuple[str, str, str]] = json.loads(
    Path(__file__).with_name("comfyui_nodes.json").read_text()
)
_FOLDERS = {
    "unet_name": "diffusion_models",
    "vae_name": "vae",
    "CLIPLoader": "text_encoders",
    "CLIPVisionLoader": "clip_vision",
}


@dataclass(frozen=True)
class _Output:
    """Of a node, by its position among the node's outputs."""

    node: int
    slot: int = 0


@dataclass(frozen=True)
class _Node:
    kind: str
    title: str
    inputs: Mapping[str, Any]
    """A value or an `_Output`."""


@dataclass
class _Graph:
    """Nodes in an order in which they can be computed; a node's number counts from 1."""

    nodes: list[_Node] = field(default_factory=list)

    def add(self, kind: str, title: str = "", **inputs: Any) -> _Output:
        """Its first output."""
        self.nodes.append(_Node(kind, title or kind, inputs))
        return _Output(len(self.nodes))


def simple_indices(steps: int) -> tuple[float, ...]:
    """Raw list, falling, in (0, 1000], of ComfyUI's scheduler `simple`.

    Of a table of the levels 1/1000 … 1000/1000, shifted, it takes the last, then those that lie
    int(k·1000/steps) before it (`simple_scheduler` in ComfyUI's comfy/samplers.py).
    """
    return tuple(TIMESTEPS - int(k * TIMESTEPS / steps) for k in range(steps))


def loras_of_run(provenance: Provenance) -> dict[Expert, str]:
    """Expert → LoRA, as runs name their files. A student needs the other expert's, too."""
    both: tuple[Expert, ...] = ("high", "low")
    pair = provenance.method == "distill" and provenance.expert in both
    experts = both if pair else (provenance.expert,)
    return {expert: lora_path(Path(), expert, "comfyui").name for expert in experts}


def read_for_comfyui(paths: Sequence[Path]) -> tuple[dict[Expert, str], Provenance, int]:
    """What `write_workflow` takes, of LoRA files. UserError for those that it can't be made of."""
    trained = [(path, read_provenance(path)) for path in paths]
    check_pair(trained)
    read = [read_lora(path) for path in paths]
    for file in read:
        if file.form not in ("comfyui", "kohya"):
            raise UserError(
                f"--lora: {file.path} is in the {file.form} format, which ComfyUI can't load. "
                f"Convert it first: wantrain export --lora {quoted(file.path)} --to comfyui "
                "--output lora-comfyui.safetensors"
            )
    loras = {provenance.expert: path.name for path, provenance in trained}
    first = trained[0][1]
    if first.method == "distill":
        loras = loras_of_run(first) | loras
    return loras, first, read[0].lora.width


def write_workflow(
    folder: Path, loras: Mapping[Expert, str], provenance: Provenance, width: int
) -> list[Path]:
    """Write both forms; the paths written.

    `loras`: expert → file in ComfyUI's folder of LoRAs; `provenance`: of one of them; `width`: of
    the transformer's hidden states, which tells models of a kind apart.
    """
    graph = _Graph()
    clip = _clip(graph, provenance)
    latent = _sampled(graph, clip, provenance, loras, _transformers(provenance, width))
    images = graph.add("VAEDecode", samples=latent, vae=clip.vae)
    fps = float(24 if provenance.mode == "ti2v" else WAN.frames_per_second)
    video = graph.add("CreateVideo", images=images, fps=fps)
    graph.add(
        "SaveVideo", video=video, filename_prefix="video/wandistill", format="auto", codec="auto"
    )
    paths = [folder / UI_FILE, folder / API_FILE]
    write_json(paths[0], _window_form(graph, _note(graph, provenance)))
    write_json(paths[1], _server_form(graph))
    return paths


@dataclass(frozen=True)
class _Clip:
    """What a sampler needs beside a model, and the VAE."""

    positive: _Output
    negative: _Output
    latent: _Output
    vae: _Output


def _clip(graph: _Graph, provenance: Provenance) -> _Clip:
    """A clip as large and long as the largest of the training, from a prompt and perhaps a frame.

    CLIP sees the centre of the frame, as it did for the shards.
    """
    mode, shape = provenance.mode, _shape(provenance)
    text = graph.add("CLIPLoader", clip_name=TEXT_ENCODER, type="wan", device="default")
    what = "the clip" if mode in ("t2v", "ti2v") else "what happens"
    prompt = f"Describe {what}, as the captions of the training do."
    positive = graph.add("CLIPTextEncode", "Prompt", clip=text, text=prompt)
    negative = graph.add("CLIPTextEncode", "Negative prompt", clip=text, text=WAN.negative_prompt)
    vae_name = "wan2.2_vae.safetensors" if mode == "ti2v" else "wan_2.1_vae.safetensors"
    vae = graph.add("VAELoader", vae_name=vae_name)
    if mode == "t2v":
        latent = graph.add("EmptyHunyuanLatentVideo", "Size and frames", **shape)
        return _Clip(positive, negative, latent, vae)
    image = graph.add("LoadImage", "First frame", image="example.png", upload="image")
    inputs: dict[str, Any] = {"vae": vae, "start_image": image, **shape}
    if mode == "ti2v":
        latent = graph.add("Wan22ImageToVideoLatent", "Size and frames", **inputs)
        return _Clip(positive, negative, latent, vae)
    seen = {"clip_vision_output": image}
    kind = "WanImageToVideo"
    if mode == "flf2v":
        kind = "WanFirstLastFrameToVideo"
        inputs["end_image"] = graph.add(
            "LoadImage", "Last frame", image="example.png", upload="image"
        )
        seen = {"clip_vision_start_image": image, "clip_vision_end_image": inputs["end_image"]}
    if provenance.boundary is None:  # Wan 2.1
        encoder = graph.add("CLIPVisionLoader", clip_name=CLIP_VISION)
        for name, frame in seen.items():
            inputs[name] = graph.add(
                "CLIPVisionEncode", clip_vision=encoder, image=frame, crop="center"
            )
    inputs |= {"positive": positive, "negative": negative}
    both = graph.add(kind, "Size and frames", **inputs).node
    return _Clip(_Output(both), _Output(both, 1), _Output(both, 2), vae)


def _sampled(
    graph: _Graph,
    clip: _Clip,
    provenance: Provenance,
    loras: Mapping[Expert, str],
    transformers: Sequence[str],
) -> _Output:
    """The latents after all steps, each by the expert that owns it."""
    few, shift = provenance.method == "distill", provenance.flow_shift
    indices = provenance.schedule.indices if few else simple_indices(TEACHER_STEPS)
    schedule = Schedule(indices=indices, shift=shift, boundary=provenance.boundary)
    steps, sampler = len(indices), SAMPLERS[provenance.pairing]
    inputs = {
        "cfg": 1.0 if few else TEACHER_GUIDANCE,
        "positive": clip.positive,
        "negative": clip.negative,
    }
    simple = _is_simple(schedule)
    if not simple:
        inputs["sampler"] = graph.add("KSamplerSelect", sampler_name=sampler)
        # In fixed notation: the node reads no exponents.
        levels = ", ".join(f"{level:.12f}" for level in (*schedule.sigmas, 0))
        sigmas = graph.add("ManualSigmas", "Trained noise levels", sigmas=levels)
    latent = clip.latent
    boundary = None if "full" in loras else schedule.boundary
    for expert, owned in steps_by_expert(schedule.timesteps, boundary).items():
        called = "" if expert == "full" else f", {expert} noise"
        file = transformers[-1 if expert == "low" else 0]
        model = graph.add("UNETLoader", f"Model{called}", unet_name=file, weight_dtype="default")
        if expert in loras:
            lora = {"lora_name": loras[expert], "strength_model": 1.0}
            model = graph.add("LoraLoaderModelOnly", f"LoRA{called}", model=model, **lora)
        inputs["model"] = graph.add("ModelSamplingSD3", model=model, shift=shift)
        inputs["latent_image"] = latent
        first, last = owned.start == 0, owned.stop == steps
        # With one seed, a re-noising sampler would add the same noise in both stages.
        inputs["noise_seed"] = 42 if first else 7_000_000
        inputs["control_after_generate"] = "randomize" if first else "fixed"
        if simple:
            latent = graph.add(
                "KSamplerAdvanced",
                f"Sampler{called}",
                **inputs,
                add_noise="enable" if first else "disable",
                steps=steps,
                sampler_name=sampler,
                scheduler="simple",
                start_at_step=owned.start,
                end_at_step=10000 if last else owned.stop,
                return_with_leftover_noise="disable" if last else "enable",
            )
        else:
            part = sigmas
            if not (first and last):
                split = graph.add(
                    "SplitSigmas", sigmas=sigmas, step=owned.stop if first else owned.start
                )
                part = split if first else _Output(split.node, 1)
            inputs |= {"sigmas": part, "add_noise": first}
            latent = graph.add("SamplerCustom", f"Sampler{called}", **inputs)
    return latent


def _is_simple(schedule: Schedule) -> bool:
    """Whether scheduler `simple` gives its levels, at a shift that the node's 2 decimals hold."""
    shift = round(schedule.shift, 2)
    return shift == schedule.shift and schedule.indices == simple_indices(len(schedule.indices))


def _shape(provenance: Provenance) -> dict[str, int]:
    """Of the training's bucket with the most pixels."""
    buckets = provenance.cache.get("buckets") or [(480, 832, 81)]
    height, width, frames = max(buckets, key=lambda b: (b[0] * b[1] * b[2], b[1]))
    return {"width": width, "height": height, "length": frames, "batch_size": 1}


def _transformers(provenance: Provenance, width: int) -> Sequence[str]:
    """ComfyUI's files of the base, the high-noise expert's first."""
    two = provenance.boundary is not None
    # Wan 2.2's experts for a first frame take a last one, too.
    mode = "i2v" if provenance.mode == "flf2v" and two else provenance.mode
    kind = (mode, two, width)
    large = max(_shape(provenance)[side] for side in ("width", "height")) > 1000
    fitting = [
        model.comfyui
        for model in PUBLISHED.values()
        if (model.mode, model.two_experts, model.width) == kind
    ]  # 480p, then 720p, where there are two
    return fitting[-1 if large else 0] if fitting else OWN_FILES


def _files(graph: _Graph) -> list[tuple[int, dict[str, str]]]:
    """(number of the loader, what ComfyUI asks of a file: name, folder, address) of published
    ones."""
    found = []
    for number, node in enumerate(graph.nodes, 1):
        for name, value in node.inputs.items():
            folder = _FOLDERS.get(name) or _FOLDERS.get(node.kind, "")
            if folder and value not in OWN_FILES and name.endswith("_name"):
                hub = next(hub for start, hub in _REPOSITORIES.items() if value.startswith(start))
                url = _HUB.format(hub, folder, value)
                found.append((number, {"name": value, "url": url, "directory": folder}))
    return found


def _note(graph: _Graph, provenance: Provenance) -> str:
    """What to do with the workflow, in Markdown."""
    loras = [node.inputs["lora_name"] for node in graph.nodes if node.kind == "LoraLoaderModelOnly"]
    shape = _shape(provenance)
    lines = [
        "**models/loras**",
        *(f"- {name}" for name in loras),
        *(
            f"\n**models/{file['directory']}**\n- [{file['name']}]({file['url']})"
            for _, file in _files(graph)
        ),
        f"\nTrained on clips of up to {shape['width']}×{shape['height']}, {shape['length']} "
        "frames. Files of the same weights in other precisions do, too.",
    ]
    if provenance.method == "distill":
        steps = ", ".join(f"{t:.1f}" for t in provenance.schedule.timesteps)
        lines.append(
            f"\n{len(provenance.schedule.indices)} steps at timesteps {steps}: leave shift, "
            "steps, sampler, scheduler and CFG 1 as they are, and the LoRAs at strength 1."
        )
    if provenance.mode == "ti2v":
        lines.append("\nWithout a first frame: bypass Load Image (Ctrl+B).")
    if base := provenance.recipe.get("base"):
        lines.append(f"\n**Trained on {base}**: load these weights, too.")
    return "\n".join(lines)


def _server_form(graph: _Graph) -> dict[str, Any]:
    """Number of a node → what its server's `/prompt` takes."""

    def plain(value: Any) -> Any:
        return [str(value.node), value.slot] if isinstance(value, _Output) else value

    def inputs(node: _Node) -> dict[str, Any]:
        links, values, _ = NODES[node.kind]
        names = [slot.partition(":")[0] for slot in links.split()]
        names += [name for name in values.split() if not name.startswith("+")]
        return {name: plain(node.inputs[name]) for name in names if name in node.inputs}

    return {
        str(number): {
            "class_type": node.kind,
            "inputs": inputs(node),
            "_meta": {"title": node.title},
        }
        for number, node in enumerate(graph.nodes, 1)
    }


def _window_form(graph: _Graph, note: str) -> dict[str, Any]:
    """What ComfyUI's window opens (its format 0.4): nodes in columns, each right of its sources."""
    links: list[list[Any]] = []
    columns: dict[int, int] = {}
    below: dict[int, int] = {}
    files: dict[int, list[dict[str, str]]] = {}
    for number, file in _files(graph):
        files.setdefault(number, []).append(file)
    shown = []
    for number, node in enumerate(graph.nodes, 1):
        slots, values, outputs = NODES[node.kind]
        inputs: list[dict[str, Any]] = []
        for slot in slots.split():
            name, _, kind = slot.partition(":")
            inputs.append({"name": name, "type": kind, "link": None})
            if isinstance(source := node.inputs.get(name), _Output):
                position = len(inputs) - 1
                inputs[-1]["link"] = len(links) + 1
                links.append([len(links) + 1, source.node, source.slot, number, position, kind])
        column = max((columns[link[1]] + 1 for link in links if link[3] == number), default=0)
        columns[number] = column
        names = values.replace("+", "").split()
        tall = {"text": 180, "image": 340}
        height = next((tall[n] for n in names if n in tall), 0) or 50 + 26 * (
            len(inputs) + len(names)
        )
        y = below.get(column, 0)
        below[column] = y + height + 50
        shown.append(
            {
                "id": number,
                "type": node.kind,
                "title": node.title,
                "pos": [400 * column, y],
                "size": [340, height],
                "flags": {},
                "order": number - 1,
                "mode": 0,
                "inputs": inputs,
                "outputs": [
                    {"name": output.partition(":")[0], "type": output.split(":")[-1], "links": []}
                    for output in outputs.split()
                ],
                "properties": {"Node name for S&R": node.kind}
                | ({"models": files[number]} if number in files else {}),
                "widgets_values": [node.inputs[name] for name in names],
            }
        )
        if node.title == node.kind:
            del shown[-1]["title"]
    for link in links:
        shown[link[1] - 1]["outputs"][link[2]]["links"].append(link[0])
    return {
        "last_node_id": len(shown) + 1,
        "last_link_id": len(links),
        "nodes": [
            *shown,
            {
                "id": len(shown) + 1,
                "type": "MarkdownNote",
                "title": "How to use",
                "pos": [-440, 0],
                "size": [400, 460],
                "flags": {},
                "order": len(shown),
                "mode": 0,
                "inputs": [],
                "outputs": [],
                "properties": {},
                "widgets_values": [note],
            },
        ],
        "links": links,
        "groups": [],
        "config": {},
        "extra": {},
        "version": 0.4,
    }
