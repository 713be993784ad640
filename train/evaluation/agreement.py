"""How well clips agree with their prompts, by a CLIP model that the user has."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import CLIPModel, CLIPProcessor

from shared.errors import UserError
from shared.io.mp4 import Clip

_FRAMES = 8


class PromptAgreement:
    """A CLIP model on the CPU. UserError where the folder has none, or not all of its weights."""

    def __init__(self, folder: Path) -> None:
        try:
            found: Any = CLIPModel.from_pretrained(
                folder,
                dtype=torch.float32,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
            )
            self._processor: Any = CLIPProcessor.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError) as error:
            raise UserError(
                f"--clip-model: {folder} can't be loaded ({error}). Expected a folder with "
                "config.json, model.safetensors, tokenizer and preprocessor_config.json, such as "
                "a download of openai/clip-vit-base-patch32."
            ) from error
        self._model, loaded = found
        wrong = [*loaded["missing_keys"], *loaded["mismatched_keys"]]
        if wrong:
            raise UserError(
                f"--clip-model: {folder} has no fitting weights for {len(wrong)} tensors of "
                f"CLIPModel, such as {min(map(str, wrong))}. Download the folder again."
            )
        self._model.requires_grad_(False).eval()

    @torch.inference_mode()
    def score(self, clip: Clip, prompt: str) -> float:
        """100 × cosine of the prompt's and a frame's embedding, mean over 8 frames of the clip.

        A prompt is cut after the tokens that CLIP takes (77).
        """
        frames = clip[np.linspace(0, len(clip) - 1, _FRAMES).round().astype(int)]
        inputs = self._processor(
            text=[prompt], images=list(frames), return_tensors="pt", padding=True, truncation=True
        )
        found = self._model(**inputs)
        return 100 * float((found.image_embeds @ found.text_embeds.T).mean())
