"""The sampling run on a tiny SDXL pipeline with random weights and given embeddings."""

from __future__ import annotations

import logging
import random

import pytest
import torch

from hswq.calibration import Calibration, Embeddings, SamplingRun, check_calibration
from hswq.config import CalibrationConfig
from hswq.errors import InputError
from hswq.models.families import FAMILIES

# diffusers' schedulers hand torch tensors to numpy 2 through the old protocol.
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
)

SAMPLER = FAMILIES["sdxl"].sampler
WIDTH, POOLED = 16, 8
STEPS = 2


def make_pipeline(dtype=torch.float32):
    """Return a StableDiffusionXLPipeline without text encoders and VAE, from seeded weights."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

    torch.manual_seed(3)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=1,
        attention_head_dim=8,
        use_linear_projection=True,
        cross_attention_dim=WIDTH,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=POOLED + 6 * 4,
    )
    return StableDiffusionXLPipeline(
        vae=None,
        text_encoder=None,
        text_encoder_2=None,
        tokenizer=None,
        tokenizer_2=None,
        unet=unet.eval().to(dtype),
        scheduler=EulerDiscreteScheduler(),
        add_watermarker=False,
    )


@pytest.fixture(scope="module")
def pipeline():
    return make_pipeline()


def make_embeddings(count=4, width=WIDTH, pooled=POOLED):
    generator = torch.Generator().manual_seed(11)
    shapes = ((count, 7, width), (count, pooled), (1, 7, width), (1, pooled))
    return Embeddings(*(torch.randn(shape, generator=generator) for shape in shapes))


def make_config(**options):
    return CalibrationConfig(**{"samples": 2, "steps": STEPS, "latent": 8, **options})


def run_calibration(pipeline, sampler, config, conditioning, *, samples=None, **options):
    run = SamplingRun(pipeline, sampler, config, conditioning, samples)
    calibration = run.observe(run.indices, **options)
    check_calibration(calibration, run.dtype)
    return calibration


def file_bytes(calibration, folder):
    calibration.save(folder / "statistics.safetensors")
    return (folder / "statistics.safetensors").read_bytes()


def test_every_layer_sees_every_step(pipeline, caplog):
    """A layer that the hooks miss, or that is counted twice, gets a wrong importance."""
    with caplog.at_level(logging.INFO):
        calibration = run_calibration(pipeline, SAMPLER, make_config(), make_embeddings())
    layers = {
        name: module
        for name, module in pipeline.unet.named_modules()
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)
    }
    assert list(calibration.modules) == list(layers)
    for name, layer in layers.items():
        # With guidance one call holds both halves.
        assert calibration.calls(name) == 2 * STEPS, name
        assert calibration.skipped(name) == 0
        assert calibration.importance(name).shape == (layer.weight.shape[1],)
        assert calibration.sensitivity(name) >= 0
    assert calibration.samples == (0, 1)
    ours = [record for record in caplog.records if record.name.startswith("hswq.calibration")]
    assert [record.levelname for record in ours] == ["INFO"]


def test_runs_over_parts_of_the_samples_merge_to_the_same_file(pipeline, tmp_path):
    """Dividing a run over processes, or resuming one, must not change a byte."""
    config, embeddings = make_config(samples=4), make_embeddings()
    whole = file_bytes(run_calibration(pipeline, SAMPLER, config, embeddings), tmp_path)
    first = run_calibration(pipeline, SAMPLER, config, embeddings, samples=[3, 0])
    second = run_calibration(make_pipeline(), SAMPLER, config, embeddings, samples=[1, 2])
    assert file_bytes(first.merge(second), tmp_path) == whole
    assert file_bytes(second.merge(first), tmp_path) == whole
    assert file_bytes(Calibration.load(tmp_path / "statistics.safetensors"), tmp_path) == whole


def test_equal_runs_write_equal_files(pipeline, tmp_path):
    """Global random state, a date or a path in the file would make two runs differ."""
    config, embeddings = make_config(), make_embeddings()
    first = file_bytes(run_calibration(pipeline, SAMPLER, config, embeddings), tmp_path)
    torch.manual_seed(99)
    random.seed(99)
    assert file_bytes(run_calibration(pipeline, SAMPLER, config, embeddings), tmp_path) == first


@pytest.mark.parametrize(
    ("option", "value"),
    [("seed", 1), ("steps", 3), ("guidance", 1.0), ("guidance", 2.0), ("latent", 12)],
)
def test_every_setting_reaches_the_sampler_and_the_file(pipeline, option, value):
    """An option that is dropped, or that is not recorded, lets unlike runs merge."""
    config, embeddings = make_config(samples=1), make_embeddings()
    first = run_calibration(pipeline, SAMPLER, config, embeddings)
    other = run_calibration(
        pipeline, SAMPLER, make_config(samples=1, **{option: value}), embeddings
    )
    assert other.settings[option] == value
    assert first.settings != other.settings
    assert any(
        not torch.equal(first.importance(name), other.importance(name)) for name in first.modules
    )


def test_sample_takes_its_own_noise_and_prompt_and_wraps_around(pipeline, caplog):
    """Sample 5 of 4 prompts takes prompt 1 with noise of seed 5, not the sums of sample 1."""
    embeddings, config = make_embeddings(), make_config()
    second = run_calibration(pipeline, SAMPLER, config, embeddings, samples=[1])
    with caplog.at_level(logging.INFO):
        sixth = run_calibration(pipeline, SAMPLER, config, embeddings, samples=[5])
    assert "4 prompts for samples up to 5" in caplog.text
    # The text projections see the prompt alone, the first convolution the noise alone.
    text = next(name for name in second.modules if name.endswith("attn2.to_k"))
    assert torch.equal(second.importance(text), sixth.importance(text))
    assert not torch.equal(second.importance("conv_in"), sixth.importance("conv_in"))
    same_noise = run_calibration(pipeline, SAMPLER, make_config(seed=4), embeddings, samples=[1])
    assert torch.equal(same_noise.importance("conv_in"), sixth.importance("conv_in"))


def test_prompts_are_given_as_prompts(pipeline, monkeypatch):
    """Without embeddings the pipeline's own text encoders must get prompt i modulo their number."""
    seen = []
    embeddings = make_embeddings()

    def encode(prompt, **_):
        seen.append(prompt)
        return tuple(
            embeddings.sample(0, torch.device("cpu"), torch.float32)[key]
            for key in (
                "prompt_embeds",
                "negative_prompt_embeds",
                "pooled_prompt_embeds",
                "negative_pooled_prompt_embeds",
            )
        )

    monkeypatch.setattr(pipeline, "encode_prompt", encode)
    calibration = run_calibration(pipeline, SAMPLER, make_config(samples=3), ["a cat", "a dog"])
    assert seen == ["a cat", "a dog", "a cat"]
    assert "prompts" in calibration.settings
    assert "embeddings" not in calibration.settings


def test_settings_say_what_the_statistics_depend_on(pipeline):
    """Runs with another sampler or other embeddings must not merge."""
    config = make_config(samples=1)
    first = run_calibration(pipeline, SAMPLER, config, make_embeddings())
    assert first.settings["sampler"] == "EulerDiscreteScheduler"
    assert first.settings["sampler_config"]["prediction_type"] == "epsilon"
    assert not [key for key in first.settings["sampler_config"] if key.startswith("_")]
    assert first.settings["dtype"] == "float32"
    other = run_calibration(pipeline, SAMPLER, config, make_embeddings(count=5), samples=[1])
    with pytest.raises(InputError, match=r"settings \(embeddings\)"):
        first.merge(other)


def test_progress_counts_every_step(pipeline):
    """A bar that stops short or starts anew with each sample gives a wrong estimate."""
    seen = []
    run_calibration(
        pipeline,
        SAMPLER,
        make_config(),
        make_embeddings(),
        progress=lambda *step: seen.append(step),
    )
    total = 2 * STEPS
    assert seen == [("calibrate", done, total) for done in range(1, total + 1)]


def hooks_of(module):
    return sum(len(layer._forward_hooks) for layer in module.modules())


def test_interrupted_run_leaves_no_hooks(pipeline):
    """Ctrl-C in a sampler step must leave the pipeline as it was."""

    def interrupt(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_calibration(pipeline, SAMPLER, make_config(), make_embeddings(), progress=interrupt)
    assert hooks_of(pipeline.unet) == 0


def test_run_that_overflows_everywhere_is_refused():
    """Statistics of NaN latents would be taken for real; the cure is another dtype."""
    pipeline = make_pipeline()
    with torch.no_grad():
        pipeline.unet.conv_in.weight.fill_(torch.inf)
    with pytest.raises(InputError, match=r"float32.*--calib-dtype bf16"):
        run_calibration(pipeline, SAMPLER, make_config(), make_embeddings())
    assert hooks_of(pipeline.unet) == 0


def test_run_that_overflows_once_warns(caplog):
    """One lost sample of two leaves usable statistics, but the user must know."""
    pipeline = make_pipeline()
    calls = []

    def overflow_at_first(module, args, output):
        calls.append(0)
        return output * torch.inf if len(calls) == 1 else output

    pipeline.unet.conv_in.register_forward_hook(overflow_at_first)
    calibration = run_calibration(pipeline, SAMPLER, make_config(), make_embeddings())
    assert "1 of 2 samples ended in NaN or Inf" in caplog.text
    assert calibration.calls("conv_out") == STEPS
    assert calibration.skipped("conv_out") == STEPS


@pytest.mark.parametrize(
    ("embeddings", "words"),
    [
        (make_embeddings(width=24), r"'prompt_embeds'.*24\].*of 16"),
        (make_embeddings(pooled=12), r"'pooled_prompt_embeds'.*12\].*of 8"),
    ],
)
def test_embeddings_of_another_model_are_refused(pipeline, embeddings, words):
    """Otherwise the UNet fails inside a product with two sizes and no names."""
    with pytest.raises(InputError, match=words):
        run_calibration(pipeline, SAMPLER, make_config(), embeddings)


@pytest.mark.parametrize("samples", [[], [-1], [2, 2]])
def test_unusable_samples_are_refused(pipeline, samples):
    """A sample twice would weigh double and could not be merged again."""
    with pytest.raises(InputError, match="distinct indices"):
        run_calibration(pipeline, SAMPLER, make_config(), make_embeddings(), samples=samples)


def test_latent_that_the_sampler_cannot_take_is_refused(pipeline, monkeypatch):
    """diffusers takes edges of 8 pixels; a VAE of factor 4 needs an even latent."""
    monkeypatch.setattr(pipeline, "vae_scale_factor", 4)
    with pytest.raises(InputError, match="use --latent 10"):
        run_calibration(pipeline, SAMPLER, make_config(latent=9), make_embeddings())
