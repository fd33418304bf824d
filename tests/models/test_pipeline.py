"""The pipeline of a checkpoint's own components, and the configurations that hswq ships."""

from __future__ import annotations

import json
import re
import shutil
import socket

import pytest
import torch
from diffusers import AutoencoderKL
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from benchmarks import make_checkpoint
from hswq.errors import FormatError, InputError
from hswq.formats.reader import Checkpoint
from hswq.models.detect import detect
from hswq.models.families import FAMILIES
from hswq.models.folders import SHIPPED
from hswq.models.pipeline import build_pipeline
from hswq.models.tokenizer import clip_vocabulary, shipped_tokenizer
from hswq.models.trace import trace_map
from tests.checkpoints import write_tiny_pipeline, write_tiny_sdxl

# diffusers' Euler scheduler converts a tensor the way numpy 2 deprecates.
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
)
PROMPT = "a photo of a cat"


def build(path, pipeline_dir, **options):
    settings = {
        "pipeline_dir": pipeline_dir,
        "dtype": torch.float32,
        "device": torch.device("cpu"),
    }
    with Checkpoint.open(path) as checkpoint:
        detection = detect(checkpoint)
        model_map = trace_map(checkpoint, detection, pipeline_dir)
        return build_pipeline(checkpoint, detection, model_map, **(settings | options))


def sample(pipeline, **inputs):
    inputs = inputs or {"prompt": PROMPT}
    generator = torch.Generator().manual_seed(0)
    result = pipeline(
        **inputs,
        num_inference_steps=2,
        height=64,
        width=64,
        generator=generator,
        output_type="latent",
    )
    return result.images


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Nothing in this file may ask for an address or open a connection."""

    def refuse(*arguments, **options):
        raise AssertionError(f"the network was used: {arguments}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(scope="session")
def configurations(tmp_path_factory):
    """A pipeline folder without any weights."""
    return write_tiny_pipeline(tmp_path_factory.mktemp("configurations"), weights=False)


def test_components_of_a_single_file_are_its_own(single_file, configurations):
    """Calibration would run on text encoders or a VAE that the checkpoint does not have."""
    pipeline = build(single_file, configurations, vae=True)
    for component in make_checkpoint.COMPONENTS:
        expected = make_checkpoint.filled_module(component, "tiny", torch.float16, 0).state_dict()
        loaded = getattr(pipeline, component).state_dict()
        assert loaded.keys() == expected.keys()
        wrong = [key for key in expected if not torch.equal(loaded[key], expected[key].float())]
        assert wrong == [], component


def test_equal_weights_sample_equally_from_every_layout(
    single_file, unet_file, folder, configurations, tmp_path
):
    """The layout of a file would change its statistics."""
    latents = sample(build(single_file, configurations))
    assert latents.shape == (1, 4, 8, 8)
    assert torch.isfinite(latents).all()
    assert latents.std() > 0.1
    assert torch.equal(sample(build(folder, None)), latents)
    assert torch.equal(sample(build(unet_file, folder)), latents)


def test_embeddings_need_no_text_encoder(single_file, unet_file, configurations):
    """A UNet-only file could not be calibrated, or the embeddings would lead elsewhere."""
    full = build(single_file, configurations)
    embeds = full.encode_prompt(PROMPT, do_classifier_free_guidance=True)
    names = ("prompt", "negative_prompt", "pooled_prompt", "negative_pooled_prompt")
    pipeline = build(unet_file, configurations, encoders=False)
    assert pipeline.text_encoder is None
    assert pipeline.tokenizer_2 is None
    inputs = {f"{name}_embeds": value for name, value in zip(names, embeds, strict=True)}
    assert torch.equal(sample(pipeline, **inputs), sample(full))


def test_pipeline_folder_does_not_replace_the_files_own_text_encoders(single_file, tmp_path):
    """Statistics would be those of another checkpoint's text encoders."""
    other = write_tiny_pipeline(tmp_path / "other", seed=5)
    pipeline = build(single_file, other)
    own = make_checkpoint.filled_module("text_encoder", "tiny", torch.float16, 0)
    for key, value in pipeline.text_encoder.state_dict().items():
        assert torch.equal(value, own.state_dict()[key].float())


def test_fp16_variant_of_a_folder_loads(unet_file, pipeline_dir, tmp_path):
    """Folders that hold only 'model.fp16.safetensors' would be refused."""
    folder = tmp_path / "variant"
    shutil.copytree(pipeline_dir, folder)
    for name, stem in (("text_encoder", "model"), ("text_encoder_2", "model")):
        file = folder / name / f"{stem}.safetensors"
        file.rename(folder / name / f"{stem}.fp16.safetensors")
    assert torch.equal(sample(build(unet_file, folder)), sample(build(unet_file, pipeline_dir)))


@pytest.mark.parametrize("layout", ["ldm", "diffusers"])
def test_v_prediction_reaches_the_scheduler(tmp_path, configurations, layout):
    """A v-prediction checkpoint would be sampled as if it predicted noise."""
    path = tmp_path / ("model.safetensors" if layout == "ldm" else "model")
    write_tiny_sdxl(path, layout=layout, v_pred=True, zero_snr=True)
    pipeline = build(path, configurations, encoders=False)
    config = pipeline.scheduler.config
    assert config.prediction_type == "v_prediction"
    assert config.rescale_betas_zero_snr
    assert config.timestep_spacing == "trailing"
    # Its schedule starts from (almost) pure noise: without rescaling the first sigma is 14.6.
    assert pipeline.scheduler.sigmas[0] > 1000


def test_epsilon_checkpoint_keeps_the_schedule_of_sdxl(single_file, configurations):
    """Without markers nothing about the schedule may change."""
    config = build(single_file, configurations, encoders=False).scheduler.config
    assert config.prediction_type == "epsilon"
    assert not config.rescale_betas_zero_snr
    assert config.timestep_spacing == "leading"
    assert (config.beta_start, config.beta_end) == (0.00085, 0.012)


@pytest.mark.parametrize(("levels", "factor"), [(4, 8), (3, 4)])
def test_latent_scale_is_right_without_the_vae(
    single_file, configurations, tmp_path, levels, factor
):
    """Images would be sampled at another size than --latent says."""
    folder = tmp_path / "pipeline"
    shutil.copytree(configurations, folder)
    vae = json.loads((folder / "vae/config.json").read_text())
    vae["block_out_channels"] = [8] * levels
    (folder / "vae/config.json").write_text(json.dumps(vae))
    pipeline = build(single_file, folder, encoders=False)
    assert pipeline.vae is None
    assert pipeline.vae_scale_factor == factor


def test_nothing_is_written_to_the_terminal(unet_file, pipeline_dir, capfd):
    """diffusers' bars and log lines would run through hswq's own."""
    sample(build(unet_file, pipeline_dir))
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_missing_text_encoder_names_the_cures(unet_file, configurations):
    """A user with a UNet-only file would not learn about --pipeline and --embeddings."""
    with pytest.raises(InputError, match=r"no text_encoder.*--pipeline DIR.*--embeddings FILE"):
        build(unet_file, configurations)


def test_missing_vae_names_the_cure(unet_file, configurations):
    """Embeddings do not replace a VAE."""
    with pytest.raises(InputError, match=r"no vae.*--pipeline DIR\.$"):
        build(unet_file, configurations, encoders=False, vae=True)


def test_hub_is_asked_only_when_downloads_are_allowed(unet_file, configurations, monkeypatch):
    """Something would be downloaded without leave, or nothing with it."""
    asked = []

    def from_pretrained(kind, source, **arguments):
        asked.append((kind.__name__, source, arguments["subfolder"]))
        config = make_checkpoint.configuration(arguments["subfolder"], "tiny")
        return kind(kind.config_class(**config)), {"missing_keys": []}

    for kind in (CLIPTextModel, CLIPTextModelWithProjection):
        monkeypatch.setattr(kind, "from_pretrained", classmethod(from_pretrained))
    build(unet_file, configurations, allow_download=True)
    assert asked == [
        ("CLIPTextModel", FAMILIES["sdxl"].sampler.hub, "text_encoder"),
        ("CLIPTextModelWithProjection", FAMILIES["sdxl"].sampler.hub, "text_encoder_2"),
    ]


def test_incomplete_text_encoder_is_refused(edited, configurations):
    """diffusers would leave the missing weight without memory and fail in the first step."""
    key = "conditioner.embedders.1.model.ln_final.bias"
    with pytest.raises(InputError, match=r"text_encoder_2.*lacks 1 weights.*final_layer_norm.bias"):
        build(edited(lambda tensors: tensors.pop(key)), configurations)


def test_incomplete_text_encoder_of_a_folder_is_refused(unet_file, pipeline_dir, tmp_path):
    """transformers would fill the missing weights at random, with a warning at most."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "incomplete"
    shutil.copytree(pipeline_dir, folder)
    file = folder / "text_encoder/model.safetensors"
    tensors = load_file(file)
    tensors.pop("text_model.final_layer_norm.weight")
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(InputError, match=r"lacks 1 weights.*final_layer_norm.weight"):
        build(unet_file, folder)


def test_text_encoder_that_does_not_fit_its_configuration_is_refused(
    single_file, configurations, tmp_path
):
    """diffusers' own traceback would reach the user."""
    folder = tmp_path / "pipeline"
    shutil.copytree(configurations, folder)
    config = json.loads((folder / "text_encoder/config.json").read_text())
    (folder / "text_encoder/config.json").write_text(json.dumps(config | {"hidden_size": 32}))
    with pytest.raises(InputError, match=r"text_encoder of .* does not fit.*--pipeline DIR"):
        build(single_file, folder)


def test_quantized_text_encoder_is_read_or_refused(edited, configurations):
    """Its codes would be taken for values, and the statistics be those of noise."""
    key = "conditioner.embedders.0.transformer.text_model.encoder.layers.0.mlp.fc1.weight"

    def cast(dtype):
        def change(tensors):
            tensors[key] = tensors[key].to(dtype)

        return edited(change)

    with pytest.raises(FormatError, match="is I8: only F8_E4M3 can be dequantized"):
        build(cast(torch.int8), configurations)
    build(cast(torch.int8), configurations, encoders=False)
    pipeline = build(cast(torch.float8_e4m3fn), configurations)
    expected = make_checkpoint.filled_module("text_encoder", "tiny", torch.float16, 0).state_dict()
    loaded = pipeline.text_encoder.state_dict()
    name = next(name for name in expected if key.endswith(name))
    assert torch.equal(loaded[name], expected[name].to(torch.float8_e4m3fn).float())


LONGEST = json.dumps({"model_max_length": 10**30})


@pytest.mark.parametrize(
    ("file", "content", "cure"),
    [
        ("tokenizer/vocab.json", "", "tokenizer"),
        ("tokenizer_2/vocab.json", "[]", "tokenizer"),
        ("tokenizer/merges.txt", "[]", "tokenizer"),
        ("tokenizer/merges.txt", None, "tokenizer"),
        ("tokenizer/tokenizer_config.json", "", "tokenizer"),
        ("tokenizer/tokenizer_config.json", "[]", "tokenizer"),
        ("tokenizer/tokenizer_config.json", None, "tokens a prompt"),
        ("tokenizer_2/tokenizer_config.json", LONGEST, "tokens a prompt"),
        ("tokenizer/tokenizer_config.json", '{"model_max_length": null}', "tokenizer"),
        ("text_encoder/config.json", "null", "an object is needed"),
        ("text_encoder/config.json", '{"vocab_size": "many"}', "configuration"),
        ("text_encoder_2/config.json", "", "JSON"),
        ("scheduler/scheduler_config.json", "{", "JSON"),
        ("scheduler/scheduler_config.json", '{"num_train_timesteps": "x"}', "scheduler"),
        ("scheduler/scheduler_config.json", '{"_class_name": -3}', "scheduler"),
        ("scheduler/scheduler_config.json", '{"beta_schedule": "x"}', "scheduler"),
        ("scheduler/scheduler_config.json", '{"prediction_type": "x"}', "scheduler"),
        ("scheduler/scheduler_config.json", '{"timestep_spacing": "x"}', "scheduler"),
        ("scheduler/scheduler_config.json", '{"beta_start": 1e300, "beta_end": 0}', "scheduler"),
        ("vae/config.json", '{"block_out_channels": -3}', "vae/config.json.*block_out_channels"),
    ],
)
def test_damaged_file_of_a_folder_is_named(
    single_file, configurations, tmp_path, file, content, cure
):
    """The libraries raise anything, bare Exceptions too: a user would be told of our own bug."""
    folder = tmp_path / "pipeline"
    shutil.copytree(configurations, folder)
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_text(content)
    with pytest.raises(InputError) as caught:
        build(single_file, folder)
    text = str(caught.value)
    assert re.search(cure, text)
    assert str(folder / file.split("/")[0]) in text
    assert re.search("--pipeline|cannot be read as JSON", text)


@pytest.mark.parametrize(
    "change",
    [
        {"norm_num_groups": 0},
        {"block_out_channels": []},
        {"attention_head_dim": "x"},
        {"act_fn": 5},
    ],
)
def test_unet_configuration_of_nonsense_is_refused(single_file, configurations, tmp_path, change):
    """The same for the configuration by which the map is traced."""
    folder = tmp_path / "pipeline"
    shutil.copytree(configurations, folder)
    path = folder / "unet/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match="configuration"):
        build(single_file, folder)


def test_damaged_weights_of_a_folder_are_refused(unet_file, pipeline_dir, tmp_path):
    """safetensors' own traceback would reach the user."""
    folder = tmp_path / "damaged"
    shutil.copytree(pipeline_dir, folder)
    (folder / "text_encoder/model.safetensors").write_bytes(b"nothing")
    with pytest.raises(InputError, match="cannot be loaded"):
        build(unet_file, folder)


def test_tokenizer_of_another_model_is_refused(single_file, configurations, tmp_path):
    """Tokens the text encoder does not know would end in an index error of torch."""
    folder = tmp_path / "pipeline"
    shutil.copytree(configurations, folder)
    shutil.rmtree(folder / "tokenizer")
    with pytest.raises(InputError, match=r"has 49408 tokens.*knows 518"):
        build(single_file, folder)


def test_text_encoders_of_another_model_are_refused(unet_file, pipeline_dir, tmp_path):
    """Widths that do not fit would end in a shape error of torch."""
    folder = tmp_path / "swapped"
    shutil.copytree(pipeline_dir, folder)
    shutil.rmtree(folder / "text_encoder_2")
    second = make_checkpoint.configuration("text_encoder_2", "tiny")
    config = second | make_checkpoint.configuration("text_encoder", "tiny")
    (folder / "text_encoder_2").mkdir()
    (folder / "text_encoder_2/config.json").write_text(json.dumps(config))
    model = CLIPTextModelWithProjection(CLIPTextModelWithProjection.config_class(**config))
    model.save_pretrained(folder / "text_encoder_2")
    with pytest.raises(InputError, match=r"16 \+ 16 channels.*reads 40"):
        build(unet_file, folder)


def test_vae_decodes_what_diffusers_decodes(single_file, folder, configurations):
    """A quality benchmark would look at images of another decoder."""
    pipeline = build(single_file, configurations, vae=True)
    theirs = AutoencoderKL.from_pretrained(folder / "vae", local_files_only=True).float()
    latents = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs.decode(latents).sample
        assert torch.equal(pipeline.vae.decode(latents).sample, expected)
    assert expected.shape == (1, 3, 32, 32)


def test_shipped_configurations_are_those_of_sdxl_base():
    """Published sizes: UNet 2,567,463,684; text encoders 123,060,480 and 694,659,840."""
    sizes = {
        component: sum(
            weight.numel() for weight in make_checkpoint.meta_module(component, "sdxl").parameters()
        )
        for component in make_checkpoint.COMPONENTS
    }
    assert sizes == {
        "unet": 2_567_463_684,
        "text_encoder": 123_060_480,
        "text_encoder_2": 694_659_840,
        "vae": 83_653_863,
    }


@pytest.mark.parametrize(("name", "pad"), [("tokenizer", 49407), ("tokenizer_2", 0)])
def test_shipped_tokenizer_gives_the_published_ids(name, pad):
    """Prompts would be fed to the text encoders as other words."""
    tokenizer = shipped_tokenizer(name)
    assert len(tokenizer) == 49_408
    tokens = tokenizer(PROMPT, padding="max_length", max_length=9).input_ids
    assert tokens == [49406, 320, 1125, 539, 320, 2368, 49407, pad, pad]
    assert tokenizer.model_max_length == 77


def test_shipped_vocabulary_is_complete_and_licensed():
    """A lost merge shifts every later token id."""
    lines = (SHIPPED / "tokenizer/merges.txt").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "#version: 0.2"
    vocabulary = clip_vocabulary(lines[1:])
    assert len(vocabulary) == len(lines) - 1 + 512 + 2 == 49_408
    assert (vocabulary["!"], vocabulary["!</w>"], vocabulary["cat</w>"]) == (0, 256, 2368)
    assert "MIT License" in (SHIPPED / "NOTICE").read_text(encoding="utf-8")
