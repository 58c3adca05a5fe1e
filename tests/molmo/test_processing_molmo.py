import copy
import itertools
import json
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from joint_controller.data.registry import VQA_DATASETS
from joint_controller.molmo.image_processing_molmo import MolmoImageProcessor
from joint_controller.molmo.processing_molmo import IMAGE_TOKENS, MolmoProcessor, build_word_tokenizer


WORDS = ["what", "color", "is", "the", "star", "?", "red", "blue", "there", "a", "how", "many"]
QUESTIONS = ["What color is the star?", "Is there a star?", "How many?"]


@pytest.fixture(scope="module")
def processor() -> MolmoProcessor:
    image_processor = MolmoImageProcessor(
        base_image_input_size=[32, 32],
        image_patch_size=4,
        image_token_length_h=4,
        image_token_length_w=4,
        max_crops=9,
        overlap_margins=[2, 0],
    )
    return MolmoProcessor(image_processor, build_word_tokenizer(WORDS))


@pytest.fixture(scope="module")
def published(shared_dir) -> MolmoProcessor:
    return MolmoProcessor.from_pretrained(shared_dir / "molmo" / "molmoe-1b")


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    generator = np.random.default_rng(0)
    sizes = [(64, 64), (20, 50), (30, 90)]
    return [Image.fromarray(generator.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]


def test_golden_image_tokens_and_their_place_in_the_sequence(published, shared_dir):
    folder = shared_dir / "molmo" / "golden" / "preprocess"
    question = json.loads((folder / "prompts.json").read_text())["prompts"][0]
    for case in json.loads((folder / "index.json").read_text()):
        golden = np.load(folder / case["file"])
        inputs = published(Image.open(folder / case["image"]), question["question"], max_crops=case["max_crops"])
        image_tokens = golden["image_tokens"].tolist()
        assert inputs["input_ids"][0].tolist() == [50279, *image_tokens, *question["input_ids"]], case["file"]
        shifted = np.where(golden["image_input_idx"] < 0, -100, golden["image_input_idx"] + 1)
        assert np.array_equal(inputs["image_input_idx"][0].numpy(), shifted), case["file"]
        assert np.array_equal(inputs["image_masks"][0].numpy(), golden["image_masks"]), case["file"]
        count = published.count_vision_tokens(case["height"], case["width"], max_crops=case["max_crops"])
        assert count == len(image_tokens) == case["num_image_tokens"], case["file"]


def test_golden_prompts(published, shared_dir):
    prompts = json.loads((shared_dir / "molmo" / "golden" / "preprocess" / "prompts.json").read_text())
    for prompt in prompts["prompts"]:
        assert published.format_prompt(prompt["question"], "vqa2") == prompt["prompt"]
        inputs = published(text=prompt["question"])
        assert inputs["input_ids"].tolist() == [[prompts["bos_id"], *prompt["input_ids"]]]


def test_published_processor_survives_saving(published, tmp_path):
    published.save_pretrained(tmp_path)
    reloaded = MolmoProcessor.from_pretrained(tmp_path)
    assert reloaded.tokenizer.get_vocab() == published.tokenizer.get_vocab()
    assert reloaded.image_processor.to_dict() == published.image_processor.to_dict()
    assert reloaded.tokenizer.pad_token_id == published.tokenizer.pad_token_id == 1


def test_save_and_reload_gives_the_same_inputs(processor, images, tmp_path):
    processor.save_pretrained(tmp_path)
    for reloaded in (MolmoProcessor.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)):
        assert isinstance(reloaded, MolmoProcessor)
        expected, inputs = (some(images, QUESTIONS, tier="medium") for some in (processor, reloaded))
        assert expected.keys() == inputs.keys()
        for name, values in expected.items():
            assert torch.equal(values, inputs[name]), name


@pytest.mark.parametrize("which", ["processor", "published"])
def test_special_tokens_in_a_question_are_text(which, request):
    processor = request.getfixturevalue(which)
    tokenizer, flag = processor.tokenizer, processor.tokenizer.backend_tokenizer.encode_special_tokens
    special = {*processor._image_token_ids, *tokenizer.all_special_ids} - {tokenizer.unk_token_id}
    question = "Is <im_patch> a <|endoftext|> or an <im_start>? <im_col><im_end>"
    for one in (processor, pickle.loads(pickle.dumps(processor)), copy.deepcopy(processor)):
        assert not special.intersection(one.question_ids(question))
        assert not special.intersection(one(text=question)["input_ids"][0, 1:].tolist())
    # The user's tokenizer goes on as before.
    assert tokenizer.backend_tokenizer.encode_special_tokens == flag
    assert processor._image_token_ids[2] in tokenizer(question, add_special_tokens=False)["input_ids"]


def test_ids_of_prompts_are_those_of_the_tokenizer(published):
    for question in ["What color is the star?", " Is it  red , or\nblue?", "", "naïve 日本 😀 it's"]:
        prompt = published.format_prompt(question, "okvqa")
        ids = published.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        assert published.prompt_ids(question, "okvqa") == ids
    with pytest.raises(ValueError, match="`style` is 'vqa3'"):
        published.prompt_ids("a?", "vqa3")


def test_padding_and_truncation_that_a_tokenizer_is_set_to_do_not_change_prompts(processor):
    tokenizer = build_word_tokenizer(WORDS)
    tokenizer.backend_tokenizer.enable_padding(length=50)
    tokenizer.backend_tokenizer.enable_truncation(max_length=2)
    ids = MolmoProcessor(processor.image_processor, tokenizer).prompt_ids(QUESTIONS[0])
    assert ids == processor.prompt_ids(QUESTIONS[0]) and len(ids) > 2


def test_what_is_returned_for_a_tiling_is_the_callers_own(processor):
    expected = list(processor.image_layout_ids((2, 3)))
    processor.image_layout_ids((2, 3)).clear()
    assert processor.image_layout_ids([2, 3]) == expected
    positions = processor.image_processor.image_input_idx((2, 3))
    kept = positions.clone()
    positions.zero_()
    assert torch.equal(processor.image_processor.image_input_idx((2, 3)), kept)


def test_every_patch_token_is_filled_exactly_once(processor, images):
    patch_id = processor.tokenizer.convert_tokens_to_ids("<im_patch>")
    inputs = processor(images, QUESTIONS, tier=["high", "low", "medium"])
    for input_ids, positions in zip(inputs["input_ids"], inputs["image_input_idx"], strict=True):
        patch_positions = (input_ids == patch_id).nonzero().flatten()
        assert torch.equal(positions[positions >= 0].sort().values, patch_positions)
        assert (positions[positions < 0] == -100).all()


def test_batch_of_unequal_prompts_equals_one_by_one(processor, images):
    tiers = ["high", "low", "medium"]
    styles = ["vqa2", "vqa2", "okvqa"]
    batch = processor(images, QUESTIONS, style=styles, tier=tiers)
    assert batch["input_ids"].shape == batch["attention_mask"].shape
    for index, (image, question, style, tier) in enumerate(zip(images, QUESTIONS, styles, tiers, strict=True)):
        alone = processor(image, question, style=style, tier=tier)
        assert alone["attention_mask"].all()
        length, views = alone["input_ids"].shape[1], alone["pixel_values"].shape[1]
        padding = batch["input_ids"].shape[1] - length
        assert torch.equal(batch["input_ids"][index, padding:], alone["input_ids"][0])
        assert (batch["input_ids"][index, :padding] == processor.tokenizer.pad_token_id).all()
        assert batch["attention_mask"][index].tolist() == [0] * padding + [1] * length
        positions = alone["image_input_idx"][0]
        assert torch.equal(
            batch["image_input_idx"][index, :views], torch.where(positions < 0, -100, positions + padding)
        )
        assert torch.equal(batch["pixel_values"][index, :views], alone["pixel_values"][0])
        assert torch.equal(batch["image_masks"][index, :views], alone["image_masks"][0])
        assert (batch["pixel_values"][index, views:] == -1).all()
        assert (batch["image_masks"][index, views:] == -1).all()
        assert (batch["image_input_idx"][index, views:] == -100).all()
    assert (batch["attention_mask"] == 0).any(), "the questions were meant to differ in length"


def test_vision_tokens_are_counted_without_pixels(processor):
    image_ids = set(processor.tokenizer.convert_tokens_to_ids(list(IMAGE_TOKENS)))
    for (width, height), tier in itertools.product([(64, 64), (90, 20), (10, 70)], ["low", "medium", "high"]):
        inputs = processor(Image.new("RGB", (width, height)), QUESTIONS[0], tier=tier)
        in_sequence = sum(token in image_ids for token in inputs["input_ids"][0].tolist())
        assert processor.count_vision_tokens(height, width, tier=tier) == in_sequence, (width, height, tier)
    assert [processor.count_vision_tokens(80, 80, tier=tier) for tier in ("low", "medium", "high")] == [44, 80, 134]


def test_text_alone(processor):
    inputs = processor(text=QUESTIONS)
    assert set(inputs) == {"input_ids", "attention_mask"}
    texts = processor.batch_decode(inputs["input_ids"], skip_special_tokens=True)
    assert texts[1] == "user : vqa2 : is there a star ? assistant :"


def test_sequence_begins_with_eos_where_the_tokenizer_has_no_bos(processor):
    tokenizer = build_word_tokenizer(WORDS)
    tokenizer.bos_token = None
    inputs = MolmoProcessor(processor.image_processor, tokenizer)(text="Is there a star?")
    assert inputs["input_ids"][0, 0] == tokenizer.eos_token_id


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "`text` is empty"),
        ({"text": []}, "`text` is empty"),
        ({"text": ["a?", None]}, "question 1 of the batch is a NoneType"),
        ({"text": "a?", "style": ["vqa2", "vqa2"]}, "2 styles are given for 1 questions"),
        ({"text": "a?", "style": "vqa3"}, "`style` is 'vqa3': Molmo was trained with a_okvqa_da, a_okvqa_mc, "),
        ({"text": ["a?", "b?"], "style": ["vqa2", ""]}, "`style` is ''"),
        ({"text": ["a?", "b?"], "images": Image.new("RGB", (4, 4))}, "1 images are given for 2 questions"),
        ({"text": "a?", "images": Image.new("RGB", (4, 4)), "tier": "best"}, "`tier` is 'best'"),
    ],
)
def test_bad_input_is_refused(processor, arguments, message):
    with pytest.raises(ValueError) as error:
        processor(**arguments)
    assert message in str(error.value)


def test_the_styles_of_all_known_data_sets_are_known(processor):
    for style in {"vqa2", *(dataset.style for dataset in VQA_DATASETS.values())}:
        assert processor.format_prompt("Is {this} it?", style) == f" User: {style}: Is {{this}} it? Assistant:"


def test_tokenizer_without_image_tokens_is_refused(processor):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    bare = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    with pytest.raises(ValueError, match="the tokenizer lacks <im_start>, <im_end>, <im_patch>, <im_col>"):
        MolmoProcessor(processor.image_processor, bare)


def test_a_tokenizer_that_is_not_fast_is_refused(processor):
    from transformers import PreTrainedTokenizer

    class Slow(PreTrainedTokenizer):
        vocab_size = 0

        def get_vocab(self):
            return {}

    with pytest.raises(ValueError, match=r"the tokenizer is a Slow: give a fast one \(PreTrainedTokenizerFast\)"):
        MolmoProcessor(processor.image_processor, Slow())


def test_word_tokenizer_puts_image_tokens_behind_the_words():
    tokenizer = build_word_tokenizer(WORDS)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id) == (
        0,
        0,
        1,
        2,
    )
    image_ids = tokenizer.convert_tokens_to_ids(list(IMAGE_TOKENS))
    assert image_ids == list(range(len(tokenizer) - 5, len(tokenizer)))
    assert len(tokenizer) == 3 + len({"user", ":", "vqa2", "assistant", *WORDS}) + 5


def test_word_tokenizer_encodes_prompts_and_answers():
    tokenizer = build_word_tokenizer(WORDS)
    prompt = tokenizer(" User: vqa2: what color is the star ? Assistant:")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(prompt) == ("user : vqa2 : what color is the star ? assistant :".split(" "))
    assert prompt == tokenizer(MolmoProcessor.format_prompt("What COLOR is the star?"))["input_ids"]
    answer = tokenizer(" red")["input_ids"]
    assert len(answer) == 1
    assert tokenizer.decode(answer) == "red"
    assert tokenizer.decode([*answer, tokenizer.eos_token_id], skip_special_tokens=True) == "red"
    assert tokenizer(" zebra")["input_ids"] == [tokenizer.unk_token_id]


@pytest.mark.parametrize("word", ["light blue", "it's", "", "<pad>"])
def test_word_tokenizer_refuses_what_is_not_one_word(word):
    with pytest.raises(ValueError, match="not single words"):
        build_word_tokenizer(["red", word])


@pytest.mark.parametrize("question", ["What color is the star?", "  is it red ? ", "a", "", " \n"])
def test_the_tokens_of_a_question_are_known_in_its_prompt(processor, question):
    """Against the tokenizer on the question alone: of words, the same tokens."""
    ids, of_question = processor.prompt_tokens(question)
    assert ids == processor.prompt_ids(question)
    assert ids[of_question] == processor.tokenizer(question, add_special_tokens=False)["input_ids"]
