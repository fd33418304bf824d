"""Paint with an FP8 SDXL checkpoint in diffusers, the UNet's weights in eight bits.

    python examples/sdxl_diffusers.py model-v2.safetensors "a red fox in the snow" fox.png [FOLDER]

The file is one that `hswq quantize` wrote of a full checkpoint, V1 or V2, any container; FOLDER, a
diffusers pipeline folder with the model's configurations, is needed for others than SDXL's own.
"""

import sys

import torch
from diffusers import StableDiffusionXLPipeline

import hswq
from hswq.models.folders import SHIPPED

file, prompt, output, folder = [*sys.argv[1:], str(SHIPPED)][:4]
device = "cuda" if torch.cuda.is_available() else "cpu"
dtype = torch.float16 if device == "cuda" else torch.float32
pipeline = StableDiffusionXLPipeline.from_single_file(
    file,
    unet=hswq.load_unet(file, device=device, dtype=dtype, pipeline=folder),
    config=folder,
    torch_dtype=dtype,
    local_files_only=True,
).to(device)
pipeline(prompt).images[0].save(output)
