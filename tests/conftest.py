import os
from pathlib import Path

import pytest
import torch
from transformers import CLIPVisionConfig, OlmoeConfig


REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """What is kept per machine is kept for the tests alone, also by the commands that they start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JOINT_CONTROLLER_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


# Without a GPU, Triton's kernels are interpreted: to be asked for before Triton is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# The models here are tiny, and `pytest -n` runs one process a core.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Folder with golden data of the reference implementation; tests that need it are skipped where it is not."""
    folder = Path(os.environ.get("JOINT_CONTROLLER_SHARED", REPOSITORY.parent / "shared"))
    if not (folder / "molmo" / "golden").is_dir():
        pytest.skip(f"no golden data in '{folder}': set JOINT_CONTROLLER_SHARED to the folder that holds them")
    return folder


@pytest.fixture(scope="session")
def tiny_molmo_config():
    """A Molmo of the embedded executor's geometry (views of 8×8 patches, 4×4 tokens a view), much narrower."""
    from joint_controller.molmo import MolmoConfig

    return MolmoConfig(
        text_config=OlmoeConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=16,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_experts=8,
            num_experts_per_tok=4,
            max_position_embeddings=512,
            initializer_range=0.2,
            pad_token_id=1,
            eos_token_id=0,
        ),
        vision_config=CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=32,
            patch_size=4,
            initializer_range=0.2,
        ),
        additional_vocab_size=8,
        vit_layers=[-1, -2],
        projector_intermediate_size=32,
        max_crops=9,
        overlap_margins=[2, 0],
        initializer_range=0.2,
    )


@pytest.fixture(scope="session")
def tiny_molmo(tiny_molmo_config):
    """Random weights, float32, evaluation mode. Shared by all tests: do not change it."""
    from joint_controller.molmo import MolmoForConditionalGeneration

    torch.manual_seed(0)
    return MolmoForConditionalGeneration(tiny_molmo_config).eval()


@pytest.fixture(scope="session")
def tiny_processor(tiny_molmo_config):
    """Processor for `tiny_molmo`: a word-level tokenizer that fills its base vocabulary, images in up to 9 crops."""
    from joint_controller.molmo import MolmoImageProcessor, MolmoProcessor, build_word_tokenizer

    words = ["what", "color", "shape", "is", "the", "a", "red", "green", "blue", "star", "circle", "left", "of", "?"]
    unfilled = build_word_tokenizer(words).convert_tokens_to_ids("<im_start>")
    fillers = [f"word{index}" for index in range(tiny_molmo_config.text_config.vocab_size - unfilled)]
    image_processor = MolmoImageProcessor(
        base_image_input_size=(32, 32),
        image_patch_size=4,
        image_token_length_h=4,
        image_token_length_w=4,
        max_crops=9,
        overlap_margins=(2, 0),
    )
    return MolmoProcessor(image_processor, build_word_tokenizer([*words, *fillers]))
