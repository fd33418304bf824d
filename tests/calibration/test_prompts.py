"""Prompts and prompt embeddings."""

from __future__ import annotations

import pytest
import torch

from hswq.calibration import (
    Embeddings,
    load_embeddings,
    load_prompts,
    prompts_hash,
    save_embeddings,
)
from hswq.calibration.prompts import MAX_PROMPT_CHARACTERS
from hswq.errors import FormatError, InputError


def make_embeddings(count=3, tokens=5, width=8, pooled=6, negatives=1, dtype=torch.float16):
    generator = torch.Generator().manual_seed(7)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    return Embeddings(
        draw(count, tokens, width),
        draw(count, pooled),
        draw(negatives, tokens, width),
        draw(negatives, pooled),
    )


def test_shipped_prompts_are_128_different_lines():
    """A duplicate or lost line would make the default run weigh some images twice."""
    prompts = load_prompts()
    assert len(prompts) == len(set(prompts)) == 128
    # CLIP reads 77 tokens; even at two characters a token nothing may be cut off.
    assert max(len(prompt.split()) for prompt in prompts) < 60


def test_prompts_skip_comments_blank_lines_and_byte_order_mark(tmp_path):
    """A byte order mark, a Windows line end or a comment must not become part of a prompt."""
    path = tmp_path / "prompts.txt"
    path.write_bytes(
        b"\xef\xbb\xbf# comment\r\n\r\n  a red cube \r\n\t\n#x\nein gr\xc3\xbcner Ball"
    )
    assert load_prompts(path) == ["a red cube", "ein grüner Ball"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "holds no prompt"),
        (b"# only a comment\n\n", "holds no prompt"),
        (b"\xff\xfea\x00", "not UTF-8"),
        (b"a cat\n\x00\x00", "NUL"),
        (b"x" * (MAX_PROMPT_CHARACTERS + 1), f"more than {MAX_PROMPT_CHARACTERS}"),
    ],
)
def test_unusable_prompt_file_is_refused(tmp_path, content, words):
    """A checkpoint or an empty file given as prompts must not calibrate on nonsense."""
    path = tmp_path / "prompts.txt"
    path.write_bytes(content)
    with pytest.raises(InputError, match=words):
        load_prompts(path)


def test_longest_prompt_is_accepted(tmp_path):
    """The limit itself is still a prompt, with and without a line end."""
    path = tmp_path / "prompts.txt"
    longest = "x" * MAX_PROMPT_CHARACTERS
    path.write_text(f"{longest}\n{longest}")
    assert load_prompts(path) == [longest, longest]


def test_missing_prompt_file_is_refused(tmp_path):
    """The system's error must arrive as ours, with the path."""
    with pytest.raises(InputError, match=r"nowhere\.txt"):
        load_prompts(tmp_path / "nowhere.txt")


def test_prompts_hash_depends_on_order_and_borders():
    """Sample i takes prompt i, so another order or another split is another run."""
    hashes = {prompts_hash(p) for p in (["a", "b"], ["b", "a"], ["a b"], ["a\nb"], ["a"])}
    assert len(hashes) == 5
    assert prompts_hash(["a", "b"]) == prompts_hash(("a", "b"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_embeddings_survive_a_round_trip(tmp_path, dtype):
    """Bits lost on the way would make the run another one than the file says."""
    embeddings = make_embeddings(dtype=dtype)
    save_embeddings(tmp_path / "e.safetensors", embeddings)
    loaded = load_embeddings(tmp_path / "e.safetensors")
    for key, tensor in embeddings.tensors().items():
        assert loaded.tensors()[key].dtype == dtype
        assert torch.equal(loaded.tensors()[key], tensor)
    assert loaded.hash() == embeddings.hash()


def test_embeddings_hash_sees_one_changed_value():
    """Statistics of other embeddings must not merge."""
    first, second = make_embeddings(), make_embeddings()
    assert first.hash() == second.hash()
    second.pooled_prompt_embeds[1, 2] += 1
    assert first.hash() != second.hash()


@pytest.mark.parametrize("negatives", [1, 3])
def test_embeddings_of_a_sample_wrap_around(negatives):
    """Sample 4 of 3 takes row 1; one negative serves all, several go with their sample."""
    embeddings = make_embeddings(negatives=negatives)
    arguments = embeddings.sample(4, torch.device("cpu"), torch.float32)
    assert {key: tensor.dtype for key, tensor in arguments.items()} == dict.fromkeys(
        arguments, torch.float32
    )
    row = 1 % negatives
    assert torch.equal(arguments["prompt_embeds"], embeddings.prompt_embeds[1:2].float())
    assert torch.equal(
        arguments["pooled_prompt_embeds"], embeddings.pooled_prompt_embeds[1:2].float()
    )
    assert torch.equal(
        arguments["negative_prompt_embeds"],
        embeddings.negative_prompt_embeds[row : row + 1].float(),
    )
    assert torch.equal(
        arguments["negative_pooled_prompt_embeds"],
        embeddings.negative_pooled_prompt_embeds[row : row + 1].float(),
    )


@pytest.mark.parametrize(
    ("key", "shape"),
    [
        ("prompt_embeds", (3, 5)),
        ("prompt_embeds", (3, 0, 8)),
        ("pooled_prompt_embeds", (2, 6)),
        ("negative_prompt_embeds", (2, 5, 8)),
        ("negative_prompt_embeds", (1, 4, 8)),
        ("negative_pooled_prompt_embeds", (1, 7)),
    ],
)
def test_embeddings_of_a_wrong_shape_are_refused(key, shape):
    """The error must name the tensor before the sampler fails deep inside with a size mismatch."""
    tensors = make_embeddings().tensors() | {key: torch.zeros(shape)}
    with pytest.raises(InputError, match=key):
        Embeddings(**tensors)


@pytest.mark.parametrize(
    "tensor", [torch.full((3, 6), torch.nan), torch.zeros(3, 6, dtype=torch.int32)]
)
def test_embeddings_without_finite_floats_are_refused(tensor):
    """NaN would silence every layer, integers would be cast without a word."""
    with pytest.raises(InputError, match="pooled_prompt_embeds"):
        Embeddings(**make_embeddings().tensors() | {"pooled_prompt_embeds": tensor})


def test_damaged_embeddings_file_names_path_and_tensor(tmp_path):
    """A file lacking a tensor, or holding a wrong one, is told by its path and key."""
    from safetensors.torch import save_file

    path = tmp_path / "e.safetensors"
    save_file({"pooled_prompt_embeds": torch.zeros(1, 8)}, path)
    with pytest.raises(FormatError, match=r"e\.safetensors lacks 'prompt_embeds'"):
        load_embeddings(path)
    save_file(make_embeddings().tensors() | {"pooled_prompt_embeds": torch.zeros(2, 6)}, path)
    with pytest.raises(FormatError, match=r"e\.safetensors: 'pooled_prompt_embeds'"):
        load_embeddings(path)
