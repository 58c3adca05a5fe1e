"""Batches of prompts as the model takes them, and answers decoded to their ends."""

from collections.abc import Sequence

import torch
from torch.nn.utils.rnn import pad_sequence

from ..image_processing_molmo import DROPPED_POSITION
from .encoding import EncodedSample
from .inference import Decoding


def collate_prompts(encoded: Sequence[EncodedSample], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Inputs of a prefill of B prompts: `input_ids` and `attention_mask` `(B, L)`, padded on the left;
    `image_features` `(B, 1, N, hidden)` and `image_input_idx` `(B, 1, N)`."""
    if len(encoded) == 1:  # nothing to pad: a request that is served alone does not wait for that
        [one] = encoded
        return {
            "input_ids": one.input_ids[None],
            "attention_mask": torch.ones_like(one.input_ids)[None],
            "image_features": one.image_features[None, None],
            "image_input_idx": one.image_input_idx[None, None],
        }
    input_ids = [one.input_ids for one in encoded]
    masks = [torch.ones_like(ids) for ids in input_ids]
    length = max(map(len, input_ids))
    positions = [one.image_input_idx + length - len(one.input_ids) for one in encoded]
    return {
        "input_ids": pad_sequence(input_ids, True, pad_token_id, padding_side="left"),
        "attention_mask": pad_sequence(masks, True, 0, padding_side="left"),
        "image_features": pad_sequence([one.image_features for one in encoded], True)[:, None],
        "image_input_idx": pad_sequence(positions, True, DROPPED_POSITION)[:, None],
    }


def finish_answers(decoding: Decoding, eos_token_id: int, max_new_tokens: int) -> list[list[int]]:
    """Decodes a batch greedily on from the first tokens: those of each answer, up to and with the end-of-sequence
    token, or `max_new_tokens`."""
    rows = list(range(len(decoding.tokens)))  # rows of the batch whose answers have not ended
    answers: list[list[int]] = [[] for _ in rows]
    while True:
        unfinished = []
        for position, (row, token) in enumerate(zip(rows, decoding.tokens.tolist(), strict=True)):
            answers[row].append(token)
            if token != eos_token_id and len(answers[row]) < max_new_tokens:
                unfinished.append(position)
        if not unfinished:
            return answers
        if len(unfinished) < len(rows):
            decoding.keep(unfinished)
            rows = [rows[position] for position in unfinished]
        decoding.step()
