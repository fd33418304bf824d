"""Calibration of the transformer families: the statistics are those of diffusers' own pipelines."""

from __future__ import annotations

import json
import shutil
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import hswq
from hswq.calibration import Embeddings, load_prompts, save_embeddings
from hswq.config import BenchConfig
from hswq.driver import bench_files
from hswq.errors import FormatError, InputError, OptionError
from hswq.fast.__main__ import main
from hswq.formats.reader import Checkpoint
from hswq.models.denoiser import denoiser_config, load_denoiser
from hswq.models.detect import detect
from hswq.models.families import FAMILIES
from hswq.models.pipeline import build_pipeline
from hswq.models.trace import trace_map
from tests.checkpoints import flux_shapes, qwen_image_shapes, write_random, z_image_shapes
from tests.text_encoders import write_chat_tokenizer, write_t5_tokenizer, write_text_encoders

SHAPES = {"flux": flux_shapes, "z-image": z_image_shapes, "qwen-image": qwen_image_shapes}
PREFIX = "model.diffusion_model."
PIXELS = 64
# What diffusers' own documentation gives each pipeline.
GUIDED = {
    "flux": {"guidance_scale": 3.5},
    "z-image": {"guidance_scale": 0.0},
    "qwen-image": {"true_cfg_scale": 4.0, "negative_prompt": " "},
}


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Nothing in this file may ask for an address or open a connection."""

    def refuse(*arguments, **options):
        raise AssertionError(f"the network was used: {arguments}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(scope="module", params=SHAPES)
def family(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """The --pipeline folder of each family."""
    root = tmp_path_factory.mktemp("pipelines")
    return {name: write_text_encoders(name, root / name) for name in SHAPES}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """A single file of each family's transformer, as ComfyUI users have it."""
    root = tmp_path_factory.mktemp("files")
    return {
        name: write_random(root / f"{name}.safetensors", shapes(), prefix=PREFIX)
        for name, shapes in SHAPES.items()
    }


def options(folder: Path | None = None, **given: Any) -> hswq.CalibrationConfig:
    settings = {"preset": "seed", "samples": 2, "steps": 2, "latent": PIXELS // 8, **given}
    return hswq.CalibrationConfig(**settings, pipeline=None if folder is None else str(folder))


def transformer(path: Path) -> Any:
    with Checkpoint.open(path) as checkpoint:
        detection = detect(checkpoint)
        config, _ = denoiser_config(checkpoint, None, detection)
        return load_denoiser(
            *(checkpoint, trace_map(checkpoint, detection), config),
            *(torch.float32, torch.device("cpu"), FAMILIES[detection.family].class_name),
        )


def diffusers_pipeline(name: str, path: Path, folder: Path) -> Any:
    """The family's pipeline, put together by hand from the folder, as its users do."""
    parts: dict[str, Any] = {"vae": None, "transformer": transformer(path)}
    if name == "flux":
        scheduler = {"shift": 3.0, "use_dynamic_shifting": True, "max_shift": 1.15}
        parts |= {
            "text_encoder": transformers.CLIPTextModel.from_pretrained(folder / "text_encoder"),
            "tokenizer": transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer"),
            "text_encoder_2": transformers.T5EncoderModel.from_pretrained(
                folder / "text_encoder_2"
            ),
            "tokenizer_2": transformers.AutoTokenizer.from_pretrained(folder / "tokenizer_2"),
        }
    else:
        scheduler = {"shift": 3.0}
        kind = transformers.Qwen3Model
        if name == "qwen-image":
            kind = transformers.Qwen2_5_VLForConditionalGeneration
            scheduler = {
                "use_dynamic_shifting": True,
                "max_shift": 0.9,
                "max_image_seq_len": 8192,
                "shift_terminal": 0.02,
            }
        parts |= {
            "text_encoder": kind.from_pretrained(folder / "text_encoder"),
            "tokenizer": transformers.AutoTokenizer.from_pretrained(folder / "tokenizer"),
        }
    parts["scheduler"] = diffusers.FlowMatchEulerDiscreteScheduler(**scheduler)
    pipeline = getattr(diffusers, FAMILIES[name].sampler.class_name)(**parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sums(calibration: hswq.Calibration) -> dict[str, tuple[Any, ...]]:
    return {
        name: (
            calibration.calls(name),
            calibration.sensitivity(name),
            calibration.importance(name).tolist(),
        )
        for name in calibration.modules
    }


def test_statistics_are_those_of_diffusers_own_pipeline(family, files, folders):
    """The seed calibrated a misconfigured network: other noise levels, guidance or texts."""
    path, folder = files[family], folders[family]
    ours = hswq.calibrate_checkpoint(path, options(folder))
    pipeline = diffusers_pipeline(family, path, folder)
    with hswq.observe(pipeline.transformer) as theirs:
        for index, prompt in enumerate(load_prompts()[:2]):
            pipeline(
                prompt,
                num_inference_steps=2,
                height=PIXELS,
                width=PIXELS,
                generator=torch.Generator().manual_seed(index),
                output_type="latent",
                **GUIDED[family],
            )
    assert sums(ours) == sums(theirs)
    calls = {ours.calls(name) for name in ours.modules}
    assert calls == {8 if family == "qwen-image" else 4}


def test_embeddings_replace_text_encoders(family, files, folders, tmp_path):
    """Who encodes prompts elsewhere would get other statistics, or need the encoders after all."""
    path, folder = files[family], folders[family]
    pipeline = diffusers_pipeline(family, path, folder)
    tensors = {}
    # Attention takes other kernels where gradients are wanted.
    with torch.no_grad():
        given = {"prompt_2": None} if family == "flux" else {}
        encoded = [pipeline.encode_prompt(prompt, **given) for prompt in load_prompts()[:2]]
        if family == "flux":
            tensors["pooled_prompt_embeds"] = torch.cat([row[1] for row in encoded])
        if family == "qwen-image":
            negative = pipeline.encode_prompt(" ")[0]
            tensors["negative_prompt_embeds"] = negative
            tensors["negative_prompt_embeds_mask"] = torch.ones(negative.shape[:2]).bool()
    texts = [row[0][0] for row in encoded]
    tensors["prompt_embeds"] = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
    tensors["prompt_embeds_mask"] = torch.tensor(
        [[token < len(text) for token in range(max(map(len, texts)))] for text in texts]
    ).long()
    save_embeddings(tmp_path / "e.safetensors", Embeddings(**tensors))
    embedded = hswq.calibrate_checkpoint(path, options(embeddings=str(tmp_path / "e.safetensors")))
    prompted = hswq.calibrate_checkpoint(path, options(folder))
    assert sums(embedded) == sums(prompted)
    assert "embeddings" in embedded.settings
    assert "prompts" in prompted.settings


def write_vae(name: str, folder: Path) -> None:
    """A tiny VAE of the family's class, with its compression of 8."""
    torch.manual_seed(0)
    if name == "qwen-image":
        vae = diffusers.AutoencoderKLQwenImage(base_dim=8, num_res_blocks=1)
    else:
        blocks = {"block_out_channels": (8,) * 4, "norm_num_groups": 4, "latent_channels": 16}
        kinds = {
            "down_block_types": ("DownEncoderBlock2D",) * 4,
            "up_block_types": ("UpDecoderBlock2D",) * 4,
        }
        vae = diffusers.AutoencoderKL(**blocks, **kinds, scaling_factor=0.36, shift_factor=0.12)
    vae.save_pretrained(folder / "vae")


def test_every_family_is_painted_in_batches(family, files, folders, tmp_path):
    """Lists, padded prompts and unpadded ones join differently, and each image has its noise."""
    folder = shutil.copytree(folders[family], tmp_path / "pipeline")
    write_vae(family, folder)
    (tmp_path / "prompts.txt").write_text("a cat\na photo of a dog on the beach\na tree\n")
    given = {"calib_file": str(tmp_path / "prompts.txt"), "pipeline": str(folder), "steps": 2}
    output = tmp_path / "kept.safetensors"
    config = hswq.QuantizeConfig(
        **given, preset="seed", samples=1, latent=8, keep_ratio=1.0, container="plain"
    )
    hswq.quantize_checkpoint(files[family], output, config)
    given |= {"samples": 3, "seeds": 2, "latent": 8}
    single = bench_files(files[family], [output], BenchConfig(**given, batch=1))
    batched = bench_files(files[family], [output], BenchConfig(**given, batch=4))
    assert single.exact.images.shape == (6, 3, PIXELS, PIXELS)
    assert torch.allclose(single.exact.latents, batched.exact.latents, atol=1e-4)
    distances = torch.cdist(single.exact.latents.flatten(1), batched.exact.latents.flatten(1))
    assert distances.argmin(1).tolist() == list(range(6))
    naive, kept = single.entries
    assert float(kept.values["latent_mse"].max()) == 0.0
    assert float(naive.values["latent_mse"].min()) > 0.0


def test_defaults_are_the_familys(files, folders):
    """Flux at SDXL's guidance, or Turbo at 25 steps, is not how the models are run."""
    for name, steps, guidance in (("flux", 28, 3.5), ("z-image", 8, 0.0)):
        config = replace(options(folders[name], samples=1), steps=None)
        settings = hswq.calibrate_checkpoint(files[name], config).settings
        assert (settings["steps"], settings["guidance"]) == (steps, guidance)
    assert FAMILIES["qwen-image"].sampler.defaults({}) == (50, 4.0)
    assert FAMILIES["sdxl"].sampler.defaults({}) == (25, 5.0)


def test_schnell_is_told_by_its_missing_guidance(tmp_path, folders):
    """With dev's shifted schedule and 28 steps schnell is another sampler."""
    shapes = {key: shape for key, shape in flux_shapes().items() if "guidance_in" not in key}
    path = write_random(tmp_path / "schnell.safetensors", shapes)
    config = replace(options(folders["flux"]), steps=None)
    settings = hswq.calibrate_checkpoint(path, config).settings
    assert (settings["steps"], settings["guidance"]) == (4, 0.0)
    assert settings["sampler_config"]["shift"] == 1.0
    assert not settings["sampler_config"]["use_dynamic_shifting"]
    # A folder's own schedule goes before ours.
    folder = shutil.copytree(folders["flux"], tmp_path / "folder")
    (folder / "scheduler").mkdir()
    (folder / "scheduler/scheduler_config.json").write_text('{"shift": 2.0}')
    settings = hswq.calibrate_checkpoint(path, options(folder)).settings
    assert settings["sampler_config"]["shift"] == 2.0


def test_guidance_of_z_image_needs_negative_embeddings(files, folders, tmp_path):
    """The base model is run with guidance; diffusers' own error speaks of its arguments."""
    guided = hswq.calibrate_checkpoint(files["z-image"], options(folders["z-image"], guidance=4.0))
    plain = hswq.calibrate_checkpoint(files["z-image"], options(folders["z-image"]))
    assert sums(guided) != sums(plain)
    path = tmp_path / "e.safetensors"
    save_embeddings(path, Embeddings(torch.randn(2, 5, 32)))
    hswq.calibrate_checkpoint(files["z-image"], options(embeddings=str(path)))
    with pytest.raises(InputError, match=r"lack 'negative_prompt_embeds'"):
        hswq.calibrate_checkpoint(files["z-image"], options(embeddings=str(path), guidance=4.0))


def write_folder(name: str, path: Path, folder: Path, target: Path) -> Path:
    """Write a diffusers pipeline folder with all components but the VAE."""
    shutil.copytree(folder, target)
    transformer(path).to(torch.bfloat16).save_pretrained(target / "transformer")
    (target / "model_index.json").write_text(
        json.dumps({"_class_name": FAMILIES[name].sampler.class_name})
    )
    return target


@pytest.mark.parametrize("family", ["flux", "z-image"])
def test_diffusers_folder_gives_equal_statistics(family, files, folders, tmp_path):
    """The layout of a model would change its statistics."""
    folder = write_folder(family, files[family], folders[family], tmp_path / "folder")
    ours = hswq.calibrate_checkpoint(files[family], options(folders[family]))
    assert sums(hswq.calibrate_checkpoint(folder, options())) == sums(ours)


def encoder_files(name: str, folder: Path, target: Path) -> list[str]:
    """Copy text encoders out of a folder, as ComfyUI's users have them."""
    target.mkdir()
    files = []
    for encoder in FAMILIES[name].sampler.text_encoders:
        files.append(str(target / f"{encoder.name}.safetensors"))
        save_file(encoder_weights(folder / encoder.name), files[-1])
    return files


def encoder_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Read a text encoder, CLIP's weights by the names that its published files have."""
    weights = load_file(folder / "model.safetensors")
    clip = "embeddings.token_embedding.weight" in weights
    return {f"text_model.{key}" if clip else key: tensor for key, tensor in weights.items()}


def without_encoder_weights(folder: Path, target: Path) -> Path:
    shutil.copytree(folder, target)
    for path in target.rglob("model.safetensors"):
        path.unlink()
    return target


def test_text_encoders_come_from_local_files(family, files, folders, tmp_path):
    """ComfyUI's users have clip_l, t5xxl and qwen_3_4b as files, not as folders."""
    given = encoder_files(family, folders[family], tmp_path / "encoders")
    bare = without_encoder_weights(folders[family], tmp_path / "bare")
    with pytest.raises(InputError, match=r"holds no text_encoder.*--text-encoder FILE"):
        hswq.calibrate_checkpoint(files[family], options(bare))
    config = options(bare, text_encoder=tuple(reversed(given)))
    ours = hswq.calibrate_checkpoint(files[family], options(folders[family]))
    assert sums(hswq.calibrate_checkpoint(files[family], config)) == sums(ours)


def test_text_encoders_come_from_an_all_in_one_checkpoint(family, files, folders, tmp_path):
    """ComfyUI saves text encoders and VAE beside the transformer, under prefixes of its own."""
    state = load_file(files[family])
    for encoder in FAMILIES[family].sampler.text_encoders:
        weights = encoder_weights(folders[family] / encoder.name)
        state |= {encoder.prefix + key: tensor for key, tensor in weights.items()}
    state["vae.decoder.conv_in.weight"] = torch.zeros(4, 4, 3, 3)
    save_file(state, tmp_path / "all.safetensors")
    bare = without_encoder_weights(folders[family], tmp_path / "bare")
    ours = hswq.calibrate_checkpoint(files[family], options(folders[family]))
    theirs = hswq.calibrate_checkpoint(tmp_path / "all.safetensors", options(bare))
    assert sums(theirs) == sums(ours)


def test_fp8_text_encoder_is_dequantized(files, folders, tmp_path):
    """t5xxl_fp8_e4m3fn_scaled is what most users have; codes taken for values are noise."""
    clip, t5 = encoder_files("flux", folders["flux"], tmp_path / "encoders")
    weights = load_file(t5)
    rounded = dict(weights)
    for key, weight in weights.items():
        if "SelfAttention.q" in key or ".wo." in key:
            codes = (weight / 0.5).to(torch.float8_e4m3fn)
            weights[key] = codes
            rounded[key] = codes.float() * 0.5
            weights = {**weights, key.replace("weight", "scale_weight"): torch.tensor([0.5])}
    save_file({**weights, "scaled_fp8": torch.zeros(0).to(torch.float8_e4m3fn)}, t5)
    exact = str(tmp_path / "exact.safetensors")
    save_file(rounded, exact)
    results = [
        sums(
            hswq.calibrate_checkpoint(
                files["flux"], options(folders["flux"], text_encoder=(clip, file))
            )
        )
        for file in (t5, exact)
    ]
    assert results[0] == results[1]
    assert results[0] != sums(hswq.calibrate_checkpoint(files["flux"], options(folders["flux"])))


def test_encoders_and_denoiser_are_never_together(files, folders, monkeypatch):
    """T5 and Flux together do not fit on a card that holds either."""
    from hswq.models import pipeline as module

    built = []

    def watch(*arguments, **given):
        pipeline = build_pipeline(*arguments, **given)
        built.append((pipeline.text_encoder_2 is not None, pipeline.transformer is not None))
        return pipeline

    monkeypatch.setattr(module, "build_pipeline", watch)
    hswq.calibrate_checkpoint(files["flux"], options(folders["flux"]))
    assert built == [(True, False), (False, True)]


def test_flux_goes_through_the_command_line(files, folders, tmp_path, capfd):
    """From a single file to a quantized one, bfloat16 staying bfloat16."""
    output = tmp_path / "out.safetensors"
    arguments = ["quantize", "--input", str(files["flux"]), "--output", str(output)]
    arguments += ["--pipeline", str(folders["flux"]), "--samples", "1", "--steps", "1"]
    assert main([*arguments, "--latent", "8", "--scaled", "--json"]) == 0
    captured = capfd.readouterr()
    assert "encode" in captured.err
    assert json.loads(captured.out)["kept"]
    dtypes = {key: tensor.dtype for key, tensor in load_file(output).items()}
    assert set(dtypes.values()) == {
        *(torch.bfloat16, torch.float8_e4m3fn, torch.float32),
        # ComfyUI's markers.
        torch.uint8,
    }
    assert all(dtypes[key] == torch.bfloat16 for key in dtypes if key.endswith(".bias"))


# Errors.


def test_missing_tokenizer_is_told(files, folders, tmp_path):
    """T5's vocabulary is not shipped."""
    folder = shutil.copytree(folders["flux"], tmp_path / "folder")
    shutil.rmtree(folder / "tokenizer_2")
    with pytest.raises(InputError, match=r"no tokenizer 'tokenizer_2'.*--pipeline DIR"):
        hswq.calibrate_checkpoint(files["flux"], options(folder))


def test_tokenizer_of_another_encoder_is_told(files, folders, tmp_path):
    """The prompt would be encoded as other words, and nothing would fail."""
    folder = shutil.copytree(folders["z-image"], tmp_path / "z")
    shutil.rmtree(folder / "tokenizer")
    write_t5_tokenizer(folder / "tokenizer")
    with pytest.raises(InputError, match=r"tokenizer' has no token '<\|im_end\|>'.*Qwen3Model"):
        hswq.calibrate_checkpoint(files["z-image"], options(folder))
    folder = shutil.copytree(folders["flux"], tmp_path / "f")
    shutil.rmtree(folder / "tokenizer_2")
    write_chat_tokenizer(folder / "tokenizer_2")
    with pytest.raises(InputError, match=r"has 259 tokens, but the text_encoder_2.*knows 37"):
        hswq.calibrate_checkpoint(files["flux"], options(folder))


def test_tokenizer_with_code_of_its_own_is_not_run(files, folders, tmp_path):
    """transformers would ask at the terminal whether to run it."""
    folder = shutil.copytree(folders["z-image"], tmp_path / "z")
    path = folder / "tokenizer/tokenizer_config.json"
    config = json.loads(path.read_text()) | {
        "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]},
        "tokenizer_class": "Evil",
    }
    path.write_text(json.dumps(config))
    (folder / "tokenizer/evil.py").write_text("raise SystemExit('ran')")
    with pytest.raises(InputError, match="tokenizer' cannot be loaded"):
        hswq.calibrate_checkpoint(files["z-image"], options(folder))


def test_encoder_of_another_width_is_told(files, folders, tmp_path):
    """Qwen3 comes in many sizes, and torch's error names two numbers."""
    path = write_random(tmp_path / "wide.safetensors", z_image_shapes(text=48))
    with pytest.raises(InputError, match=r"give 32 channels of prompt_embeds.*reads 48"):
        hswq.calibrate_checkpoint(path, options(folders["z-image"]))


def test_files_that_are_no_text_encoders_are_told(files, folders, tmp_path):
    """A VAE, a LoRA or an encoder of another family, given in its place."""
    folder = folders["flux"]
    qwen = encoder_files("z-image", folders["z-image"], tmp_path / "q")[0]
    clip, t5 = encoder_files("flux", folder, tmp_path / "f")
    needed = r"is no text encoder of this family.*text_encoder_2 \(T5EncoderModel, 32 channels\)"
    for file in (qwen, str(files["flux"])):
        with pytest.raises(InputError, match=needed):
            hswq.calibrate_checkpoint(files["flux"], options(folder, text_encoder=(clip, file)))
    twice = shutil.copy(t5, tmp_path / "t5.safetensors")
    with pytest.raises(InputError, match=r"both hold the text_encoder_2"):
        hswq.calibrate_checkpoint(
            files["flux"], options(folder, text_encoder=(clip, t5, str(twice)))
        )
    gguf = tmp_path / "t5.gguf"
    gguf.write_bytes(b"GGUF\x03\0\0\0" + b"\0" * 64)
    with pytest.raises(FormatError, match="GGUF"):
        hswq.calibrate_checkpoint(files["flux"], options(folder, text_encoder=(clip, str(gguf))))


def test_incomplete_text_encoder_file_is_refused(files, folders, tmp_path):
    """transformers would fill the missing weights at random."""
    clip, t5 = encoder_files("flux", folders["flux"], tmp_path / "f")
    weights = load_file(t5)
    weights.pop("encoder.final_layer_norm.weight")
    save_file(weights, t5)
    with pytest.raises(InputError, match=r"lacks 1 weights.*final_layer_norm"):
        hswq.calibrate_checkpoint(files["flux"], options(folders["flux"], text_encoder=(clip, t5)))


def test_embeddings_of_another_family_are_told(files, tmp_path):
    """SDXL's have other widths, Z-Image's lack the pooled ones."""
    path = tmp_path / "e.safetensors"
    save_embeddings(path, Embeddings(torch.randn(1, 5, 32)))
    with pytest.raises(InputError, match=r"lack 'pooled_prompt_embeds'"):
        hswq.calibrate_checkpoint(files["flux"], options(embeddings=str(path)))
    save_embeddings(path, Embeddings(torch.randn(1, 5, 40), torch.randn(1, 24)))
    with pytest.raises(InputError, match=r"'prompt_embeds' has shape.*last dimension of 32"):
        hswq.calibrate_checkpoint(files["flux"], options(embeddings=str(path)))


def test_odd_latent_is_refused(files, folders):
    """Flux would quietly sample a smaller image, Z-Image fail."""
    for name in ("flux", "z-image"):
        with pytest.raises(InputError, match="use --latent 10"):
            hswq.calibrate_checkpoint(files[name], options(folders[name], latent=9))


def test_folder_that_is_none_is_refused(files, tmp_path):
    """A mistyped folder would be taken for one without a configuration."""
    with pytest.raises(InputError, match=r"--pipeline '.*nowhere' is no folder"):
        hswq.calibrate_checkpoint(files["flux"], options(tmp_path / "nowhere"))


def test_embeddings_exclude_text_encoders():
    """One of them would be ignored without a word."""
    with pytest.raises(OptionError, match="--embeddings and --text-encoder exclude"):
        hswq.CalibrationConfig(embeddings="e.safetensors", text_encoder=("t5.safetensors",))
    with pytest.raises(OptionError, match="a tuple of texts"):
        hswq.CalibrationConfig(text_encoder="t5.safetensors")
