"""Processor of Molmo: image tokens and prompt in one sequence; and a word-level tokenizer for small Molmos."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import chain
from typing import Any

import torch
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import BatchFeature, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.processing_utils import ProcessorMixin

from .image_processing_molmo import MolmoImageProcessor


IMAGE_TOKENS = ("<im_start>", "<im_end>", "<im_patch>", "<im_col>", "<|image|>")
"""Names of the tokens of the additional vocabulary. Their ids differ between checkpoints."""

PROMPT = " User: {style}: {question} Assistant:"
"""The prompt of a question, in the published role format with a leading space."""

PROMPT_STYLES = tuple(
    """
    a_okvqa_da a_okvqa_mc ai2_diagram ai2_diagram_no_letter chart_qa clocks coco_captioning count_then_point doc_qa dv_qa
    figure_qa gqa info_qa long_caption ocr_vqa okvqa only_count pixmo_docs_charts pixmo_docs_diagrams pixmo_docs_other
    pixmo_docs_tables plot_qa point_count point_qa pointing science_qa scifi_charts scifi_charts_qa scifi_diagram
    scifi_document scifi_table st_qa synthetic_qa tabwmp_da tally_qa text_vqa transcript user_qa vqa2
    """.split()
)
"""Answer styles of Molmo's published training code. Any other name means nothing to a checkpoint."""


class MolmoProcessor(ProcessorMixin):
    r"""
    Puts an image and a question into the sequence that Molmo reads: the beginning-of-sequence token, the tokens that
    stand for the image (global view, then the tiled image), the prompt. What a question says is text: the name of a
    special token in it is not that token. Tokens that are added to the tokenizer later are not known to prompts.

    Args:
        image_processor ([`MolmoImageProcessor`]):
            Cuts images into views.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            A fast tokenizer that knows `<im_start>`, `<im_end>`, `<im_patch>` and `<im_col>` by name, a padding token,
            and a beginning-of-sequence or an end-of-sequence token (which then begins the sequence, as published).

    Raises:
        ValueError: If the tokenizer lacks one of these tokens, or is not a fast one.

    Example:

    ```python
    >>> inputs = processor(images=image, text="What color is the star?", tier="low")
    >>> model.generate(**inputs, max_new_tokens=8)
    ```
    """

    def __init__(self, image_processor: MolmoImageProcessor, tokenizer: PreTrainedTokenizerBase):
        super().__init__(image_processor, tokenizer)
        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            raise ValueError(
                f"the tokenizer is a {type(tokenizer).__name__}: give a fast one (PreTrainedTokenizerFast)."
            )
        vocabulary = tokenizer.get_vocab()
        missing = [token for token in IMAGE_TOKENS[:4] if token not in vocabulary]
        if missing:
            raise ValueError(f"the tokenizer lacks {', '.join(missing)}: add them as special tokens.")
        if tokenizer.pad_token_id is None:
            raise ValueError("the tokenizer has no padding token: set `tokenizer.pad_token`.")
        if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has neither a `bos_token` nor an `eos_token` to begin a sequence with.")
        self._image_token_ids = tuple(tokenizer.convert_tokens_to_ids(list(IMAGE_TOKENS[:4])))
        # A copy, since how special tokens in a text are read is a property of the whole tokenizer.
        self._text_tokenizer = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._text_tokenizer.encode_special_tokens = True
        self._text_tokenizer.no_padding()
        self._text_tokenizer.no_truncation()

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._text_tokenizer.encode_special_tokens = True  # a copied or pickled tokenizer has forgotten it

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", *self.image_processor.model_input_names]

    @property
    def bos_token_id(self) -> int:
        """Id of the token that begins every sequence."""
        if self.tokenizer.bos_token_id is not None:
            return self.tokenizer.bos_token_id
        return self.tokenizer.eos_token_id

    @staticmethod
    def format_prompt(question: str, style: str = "vqa2") -> str:
        """
        The prompt of a question, in the published role format with a leading space:
        `" User: vqa2: Is there a star? Assistant:"`.

        Args:
            question (`str`):
                The bare question.
            style (`str`, *optional*, defaults to `"vqa2"`):
                Answer style: one of `PROMPT_STYLES`.

        Raises:
            ValueError: If Molmo does not know the style.
        """
        if style not in PROMPT_STYLES:
            raise ValueError(f"`style` is {style!r}: Molmo was trained with {', '.join(PROMPT_STYLES)}.")
        return PROMPT.format(style=style, question=question)

    def prompt_ids(self, question: str, style: str = "vqa2") -> list[int]:
        """
        Ids of the tokens of a question's prompt ([`~MolmoProcessor.format_prompt`]), without the beginning of the
        sequence and the image.

        Args:
            question (`str`):
                The bare question.
            style (`str`, *optional*, defaults to `"vqa2"`):
                Answer style: one of `PROMPT_STYLES`.

        Raises:
            ValueError: If Molmo does not know the style.
        """
        return self.prompt_tokens(question, style)[0]

    def prompt_tokens(self, question: str, style: str = "vqa2") -> tuple[list[int], slice]:
        """As [`~MolmoProcessor.prompt_ids`], and which of the tokens are the question's. Special tokens in a text are text."""
        prompt = self.format_prompt(question, style)
        encoding = self._text_tokenizer.encode(prompt, add_special_tokens=False)
        start = len(PROMPT.partition("{question}")[0].format(style=style))
        end = start + len(question.rstrip())
        start += len(question) - len(question.lstrip())
        # A token may begin with the blank before a word.
        places = [place for place, (first, last) in enumerate(encoding.offsets) if last > start and first < end]
        return encoding.ids, slice(places[0], places[-1] + 1) if places and end > start else slice(0, 0)

    def question_ids(self, question: str) -> list[int]:
        """Ids of the tokens of a question as it stands in its prompt."""
        ids, of_question = self.prompt_tokens(question)
        return ids[of_question]

    def image_layout_ids(self, tiling: Sequence[int]) -> list[int]:
        """Ids of the tokens that stand for an image of this tiling: for the global view, then for the tiled image,
        start, patches with a column token after each row, end."""
        return list(_image_layout_ids(self.image_processor.token_grids(tiling), self._image_token_ids))

    def count_vision_tokens(
        self,
        height: int,
        width: int,
        max_crops: int | None = None,
        tier: str | None = None,
        tier_crops: Mapping[str, Sequence[int]] | None = None,
    ) -> int:
        """Tokens that will stand for an image, start, column and end tokens included, from its size in pixels alone.
        Arguments are those of [`MolmoImageProcessor.choose_tiling`]."""
        tiling = self.image_processor.choose_tiling(height, width, max_crops, tier, tier_crops)
        return self.image_processor.count_image_tokens(tiling)

    def __call__(
        self,
        images: Image.Image | Sequence[Image.Image] | None = None,
        text: str | Sequence[str] | None = None,
        style: str | Sequence[str] = "vqa2",
        max_crops: int | None = None,
        tier: str | Sequence[str] | None = None,
        tier_crops: Mapping[str, Sequence[int]] | None = None,
        return_tensors: str = "pt",
    ) -> BatchFeature:
        """
        Inputs of the model for a batch of questions, each about one image or all without images.

        Args:
            images (`PIL.Image.Image` or `Sequence[PIL.Image.Image]`, *optional*):
                One image per question.
            text (`str` or `Sequence[str]`):
                The bare questions.
            style (`str` or `Sequence[str]`, *optional*, defaults to `"vqa2"`):
                Answer style of all questions, or of each.
            max_crops, tier, tier_crops (*optional*):
                As in [`MolmoImageProcessor.preprocess`].
            return_tensors (`str`, *optional*, defaults to `"pt"`):
                `"pt"` for PyTorch tensors or `"np"` for NumPy arrays.

        Returns:
            [`~transformers.BatchFeature`] with
            - `input_ids` and `attention_mask` (questions, length), int64, padded on the left;
            - and with images `pixel_values` (questions, views, patches, 3 · patch²), `image_masks` (questions, views,
              patches) and `image_input_idx` (questions, views, tokens of a view), as [`MolmoImageProcessor`] describes
              them, the last one counted from the beginning of the padded sequence.

        Raises:
            ValueError: If there is no question, the numbers of questions, images, styles and tiers differ, or an image,
                a style, a tier or `max_crops` is not allowed.
        """
        if text is None or (not isinstance(text, str) and len(text) == 0):
            raise ValueError("`text` is empty: give at least one question.")
        questions = [text] if isinstance(text, str) else list(text)
        for index, question in enumerate(questions):
            if not isinstance(question, str):
                raise ValueError(f"question {index} of the batch is a {type(question).__name__}, not a string.")
        styles = [style] * len(questions) if isinstance(style, str) else list(style)
        if len(styles) != len(questions):
            raise ValueError(
                f"{len(styles)} styles are given for {len(questions)} questions: give one style, or one per question."
            )
        prompt_ids = [self.prompt_ids(*prompt) for prompt in zip(questions, styles, strict=True)]

        image_features: dict = {}
        image_ids: list[list[int]] = [[] for _ in questions]
        if images is not None:
            images = [images] if isinstance(images, Image.Image) else list(images)
            if len(images) != len(questions):
                raise ValueError(
                    f"{len(images)} images are given for {len(questions)} questions: give one image per question."
                )
            image_features = dict(self.image_processor(images, max_crops=max_crops, tier=tier, tier_crops=tier_crops))
            image_ids = [self.image_layout_ids(tiling) for tiling in image_features.pop("tilings").tolist()]

        sequences = [[self.bos_token_id, *image, *prompt] for image, prompt in zip(image_ids, prompt_ids, strict=True)]
        length = max(map(len, sequences))
        paddings = [length - len(sequence) for sequence in sequences]
        pad_token_id = self.tokenizer.pad_token_id
        data = {
            "input_ids": torch.tensor(
                [[pad_token_id] * padding + ids for padding, ids in zip(paddings, sequences, strict=True)]
            ),
            "attention_mask": torch.tensor([[0] * padding + [1] * (length - padding) for padding in paddings]),
            **image_features,
        }
        if images is not None:
            # The image's first token follows the padding and the beginning-of-sequence token.
            first = torch.tensor(paddings)[:, None, None] + 1
            positions = data["image_input_idx"]
            data["image_input_idx"] = positions.where(positions < 0, positions + first)
        return BatchFeature(data, tensor_type=return_tensors)


@lru_cache(maxsize=64)
def _image_layout_ids(
    grids: tuple[tuple[int, int], ...], image_token_ids: tuple[int, int, int, int]
) -> tuple[int, ...]:
    """See [`MolmoProcessor.image_layout_ids`]: by the rows and columns of patches of the two grids, and the ids of start,
    end, patch and column tokens."""
    start, end, patch, column = image_token_ids
    rows_of_grids = (([patch] * columns + [column]) * rows for rows, columns in grids)
    return tuple(chain.from_iterable([start, *tokens, end] for tokens in rows_of_grids))


def build_word_tokenizer(words: Sequence[str]) -> PreTrainedTokenizerFast:
    """
    Word-level tokenizer of a small Molmo: lower-cases, splits at white space and around every punctuation mark.

    Ids are: `<|endoftext|>` 0 (begins and ends sequences), `<pad>` 1, `<unk>` 2, the words of the prompt format and
    `words` from 3, and after all of these the image tokens, since Molmo embeds them in a table of their own: the base
    vocabulary's size is the id of `<im_start>`.

    Args:
        words (`Sequence[str]`):
            Words and punctuation marks. Repetitions are ignored.

    Raises:
        ValueError: If an entry is not a single word or mark, so that no text could ever be encoded to it.
    """
    normalizer = normalizers.Lowercase()
    splitter = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation("isolated")])

    def split(text: str) -> list[str]:
        return [piece for piece, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text))]

    several = [word for word in words if len(split(word)) != 1]
    if several:
        raise ValueError(f"`words` has the entries {several[:5]}, which are not single words: split them first.")
    control_tokens = ["<|endoftext|>", "<pad>", "<unk>"]
    prompt_words = split(MolmoProcessor.format_prompt(question=""))
    base_tokens = dict.fromkeys([*control_tokens, *prompt_words, *chain.from_iterable(map(split, words))])
    tokenizer = Tokenizer(
        models.WordLevel({token: index for index, token in enumerate(base_tokens)}, unk_token="<unk>")
    )
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = splitter
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens=list(IMAGE_TOKENS),
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
