import pytest
import torch

from joint_controller.data import generate_scene
from joint_controller.molmo.embedded.packing import AskedImage, PackedLayout, Packer, segment_logits


@pytest.fixture(scope="module", params=[(128, 128), (168, 128), (128, 256)], ids=str)
def asked(request) -> AskedImage:
    questions = [
        ("what color is the star ?", "red"),
        ("is the circle left of a star ?", "green"),
        ("what is a ?", "the"),
    ]
    return AskedImage(
        generate_scene(3, image_sizes={request.param: 1.0}).image, [(*question, "any") for question in questions]
    )


@pytest.mark.parametrize("tier", ["low", "medium", "high"])
def test_views_equal_those_of_the_processor(asked, tier, tiny_processor):
    packer = Packer(tiny_processor, num_questions=3)
    layout = PackedLayout.of(packer, asked.image.size, tier, torch.device("cpu"))
    expected = tiny_processor(images=asked.image, text="what", tier=tier)
    images = packer.pack(asked)["images"][None]
    views = layout.cut(torch.cat([255 - images, images]))  # in a batch with another image
    torch.testing.assert_close(views[1:], expected["pixel_values"], atol=1e-5, rtol=0)
    torch.testing.assert_close(layout.image_masks, expected["image_masks"], atol=0, rtol=0)


@pytest.mark.parametrize("tier", ["low", "medium", "high"])
def test_a_packed_question_gets_the_logits_that_it_gets_alone(asked, tier, tiny_molmo, tiny_processor):
    packer = Packer(tiny_processor, num_questions=3)
    layout = PackedLayout.of(packer, asked.image.size, tier, torch.device("cpu"))
    packed = packer.pack(asked)
    pixel_values = layout.cut(packed["images"][None])
    knobs = {"active_blocks": [0, 2, 3], "top_k": 2}
    with torch.inference_mode():
        logits = segment_logits(tiny_molmo, layout, packed["segments"][None], pixel_values=pixel_values, **knobs)
        for row, (question, _, _) in enumerate(asked.questions):
            inputs = tiny_processor(images=asked.image, text=question, tier=tier)
            alone = tiny_molmo(**inputs, **knobs).logits[0, -1]
            last_of_prompt = (packed["labels"][row] != -100).nonzero()[0, 0]
            torch.testing.assert_close(logits[0, row, last_of_prompt], alone, atol=1e-5, rtol=0)


def test_labels_are_the_answer_and_then_the_end_of_the_sequence(asked, tiny_processor):
    tokenizer = tiny_processor.tokenizer
    packed = Packer(tiny_processor, num_questions=4).pack(asked)
    for labels, (_, answer, _) in zip(packed["labels"], asked.questions, strict=False):
        expected = [tokenizer.convert_tokens_to_ids(answer), tokenizer.eos_token_id]
        assert labels[labels != -100].tolist() == expected
    assert (packed["labels"][3] == -100).all()


def test_an_answer_of_two_words_is_refused(asked, tiny_processor):
    packer = Packer(tiny_processor, num_questions=1)
    with pytest.raises(ValueError, match="'red star' does not fit"):
        packer.pack(AskedImage(asked.image, [("what is the color ?", "red star", "any")]))
