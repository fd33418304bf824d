"""How the families are sampled: the parts of their diffusers pipelines and how these are called."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class TextEncoder:
    """One text encoder of a family's pipeline, and its tokenizer.

    Attributes:
        name: folder in a diffusers pipeline, 'text_encoder' for example.
        class_name: class of transformers.
        tokenizer: folder of the tokenizer.
        prefix: what its keys start with in a single file that holds all components.
        signature: keys that a file of this encoder alone has, by which it is known; the first is
            its token embedding, [tokens, channels].
        tokens: special tokens that its tokenizer must know.
        widths: entry of its configuration that tells the channels of what it gives, by the name
            of the embeddings; several encoders may give channels of one.
        fixed_length: prompts are padded to its tokenizer's model_max_length, which must not be
            longer than its table of positions.
    """

    name: str
    class_name: str
    tokenizer: str
    prefix: str
    signature: tuple[str, ...]
    tokens: tuple[str, ...]
    widths: Mapping[str, str]
    fixed_length: bool = False


CLIP_SIGNATURE = ("text_model.embeddings.token_embedding.weight",)
CLIP_TOKENS = ("<|startoftext|>", "<|endoftext|>")


@dataclass(frozen=True)
class Sampler:
    """A family's diffusers pipeline; a family overrides the methods in which it differs.

    Attributes:
        class_name: the pipeline's class.
        text_encoders: its text encoders.
        hub: repository from which missing components are fetched where downloads are allowed.
        steps: sampler steps by default.
        guidance: guidance scale by default.
        scheduler: class of its scheduler.
        vae: class of its VAE.
        vae_prefix: what the VAE's keys start with in a single file.
        patch: pixels of the latent a token covers in each direction, which divides its edges.
        guided_halves: under classifier-free guidance a batch holds the rows without the prompt
            first, then as many with it.
    """

    class_name: str
    text_encoders: tuple[TextEncoder, ...]
    hub: str
    steps: int
    guidance: float
    scheduler: str = "FlowMatchEulerDiscreteScheduler"
    vae: str = "AutoencoderKL"
    vae_prefix: str = "vae."
    patch: int = 2
    guided_halves: bool = False

    def defaults(self, config: Mapping[str, Any]) -> tuple[int, float]:
        """Return steps and guidance for a denoiser of this configuration."""
        return self.steps, self.guidance

    def scheduler_overrides(
        self, detection: Any, config: Mapping[str, Any], shipped: bool
    ) -> dict[str, Any]:
        """Return entries that replace those of the scheduler's configuration.

        Args:
            detection: what `detect` said of the checkpoint.
            config: of the denoiser.
            shipped: whether the scheduler's configuration is hswq's own, not a folder's.
        """
        return {}

    def pipeline_options(self, index: Mapping[str, Any]) -> dict[str, Any]:
        """Return what the pipeline's constructor takes beside components.

        Args:
            index: content of model_index.json; empty where there is none.
        """
        return {}

    def widths(self, config: Mapping[str, Any]) -> dict[str, int | None]:
        """Return how many channels of which embeddings a denoiser reads.

        Args:
            config: of the denoiser; where it leaves an entry to diffusers, the answer is None.
        """
        raise NotImplementedError

    def embeddings(self, guidance: float) -> tuple[str, ...]:
        """Return the names of the embeddings that one sample needs."""
        return ("prompt_embeds",)

    def encode(self, pipeline: Any, prompt: str, guidance: float) -> dict[str, Tensor]:
        """Encode a prompt with the pipeline's text encoders; each embedding has batch size 1."""
        raise NotImplementedError

    def arguments(self, embeddings: dict[str, Tensor], guidance: float) -> dict[str, Any]:
        """Return the pipeline's keyword arguments for the embeddings of one sample."""
        return {name: embeddings[name] for name in self.embeddings(guidance)}

    def guided(self, guidance: float) -> dict[str, Any]:
        """Return the pipeline's keyword arguments for a guidance scale."""
        return {"guidance_scale": guidance}

    def prompted(self, prompt: str, guidance: float) -> dict[str, Any]:
        """Return the pipeline's keyword arguments for a prompt."""
        return {"prompt": prompt}
