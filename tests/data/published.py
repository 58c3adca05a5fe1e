"""Small files of the published data sets, with exactly their columns and types."""

import io
import json
from pathlib import Path

from datasets import Dataset, Features, Image, List, Value
from PIL import Image as PILImage


STRING, INT64, INT32 = Value("string"), Value("int64"), Value("int32")
STRINGS = List(STRING)

# As `dataset_info` in the README.md of each repository has them.
PUBLISHED_FEATURES = {
    "text_vqa": Features(
        {
            "image_id": STRING,
            "question_id": INT32,
            "question": STRING,
            "question_tokens": STRINGS,
            "image": Image(),
            "image_width": INT32,
            "image_height": INT32,
            "flickr_original_url": STRING,
            "flickr_300k_url": STRING,
            "answers": STRINGS,
            "image_classes": STRINGS,
            "set_name": STRING,
            "ocr_tokens": STRINGS,
        }
    ),
    "coco_2014_vqa": Features(
        {
            "question_type": STRING,
            "multiple_choice_answer": STRING,
            "answers": List({"answer": STRING, "answer_confidence": STRING, "answer_id": INT64}),
            "image_id": INT64,
            "answer_type": STRING,
            "question_id": INT64,
            "question": STRING,
            "image": Image(),
        }
    ),
    "okvqa": Features(
        {
            "question_id": STRING,
            "image": Image(),
            "question": STRING,
            "answers": STRINGS,
            "question_type": STRING,
            "answer_type": STRING,
        }
    ),
    "coco_caption": Features(
        {
            "question_id": STRING,
            "image": Image(),
            "question": STRING,
            "answer": STRINGS,
            "id": INT64,
            "license": Value("int8"),
            "file_name": STRING,
            "coco_url": STRING,
            "height": INT32,
            "width": INT32,
            "date_captured": STRING,
        }
    ),
    "tally_qa": Features(
        {
            "image": Image(),
            "qa": List({"question": STRING, "answer": INT64, "is_simple": Value("bool"), "data_source": STRING}),
        }
    ),
    "doc_qa": Features(
        {
            "questionId": STRING,
            "question": STRING,
            "question_types": STRINGS,
            "image": Image(),
            "docId": INT64,
            "ucsf_document_id": STRING,
            "ucsf_document_page_no": STRING,
            "answers": STRINGS,
            "data_split": STRING,
        }
    ),
    "science_qa_img": Features(
        {
            "image": Image(),
            "question": STRING,
            "choices": STRINGS,
            "answer": Value("int8"),
            **{
                name: STRING
                for name in (
                    "hint",
                    "task",
                    "grade",
                    "subject",
                    "topic",
                    "category",
                    "skill",
                    "lecture",
                    "solution",
                )
            },
        }
    ),
    "st_qa": Features({"question_id": STRING, "question": STRING, "image": Image()}),
    "mmmu": Features(
        {
            "id": STRING,
            "question": STRING,
            "options": STRING,
            "explanation": STRING,
            **{f"image_{number}": Image() for number in range(1, 8)},
            "img_type": STRING,
            "answer": STRING,
            "topic_difficulty": STRING,
            "question_type": STRING,
            "subfield": STRING,
        }
    ),
}


def encoded_image(value: int, size: tuple[int, int] = (12, 8)) -> dict:
    buffer = io.BytesIO()
    PILImage.new("RGB", size, (value % 256, value // 256, 0)).save(buffer, format="PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def published_table(name: str, rows: list[dict]) -> Dataset:
    """Rows of a data set as published: columns that a row leaves out are null."""
    features = PUBLISHED_FEATURES[name]
    assert all(set(row) <= set(features) for row in rows)
    return Dataset.from_dict({column: [row.get(column) for row in rows] for column in features}, features=features)


def text_vqa_row(number: int) -> dict:
    """Two questions an image, ten answers each."""
    return {
        "image_id": f"{number // 2:016x}",
        "question_id": 34602 + number,
        "question": f"what is written on sign {number}?",
        "question_tokens": ["what", "is"],
        "image": encoded_image(number // 2),
        "image_width": 12,
        "image_height": 8,
        "answers": ["stop"] * 6 + ["stop sign"] * 3 + [f"answer {number}"],
        "set_name": "val",
    }


def coco_2014_vqa_row(number: int, image_id: int | None = None) -> dict:
    image_id = 42 + number // 2 if image_id is None else image_id
    answers = ["yes"] * 7 + ["no"] * 2 + [f"answer {number}"]
    return {
        "question_type": "is the",
        "multiple_choice_answer": "yes",
        "answers": [
            {"answer": answer, "answer_confidence": "maybe", "answer_id": answer_id}
            for answer_id, answer in enumerate(answers, start=1)
        ],
        "image_id": image_id,
        "answer_type": "yes/no",
        "question_id": image_id * 1000 + number % 2,
        "question": f"Is the ball in picture {number} blue?",
        "image": encoded_image(image_id),
    }


def okvqa_row(number: int) -> dict:
    return {
        "question_id": f"{297147 + number}5",
        "image": encoded_image(number),
        "question": f"What sport can you use {number} of this for?",
        "answers": ["race"] * 4 + ["motocross"] * 4 + ["ride"] * 2,
        "question_type": "five",
        "answer_type": "other",
    }


def write_official_text_vqa(folder: Path, subset: str, rows: list[dict]) -> None:
    """`TextVQA_0.5.1_<subset>.json` and `train_images/`."""
    (folder / "train_images").mkdir(parents=True, exist_ok=True)
    data = [{key: value for key, value in row.items() if key != "image"} for row in rows]
    document = {"dataset_type": subset, "dataset_name": "textvqa", "dataset_version": "0.5.1", "data": data}
    (folder / f"TextVQA_0.5.1_{subset}.json").write_text(json.dumps(document))
    for row in rows:
        (folder / "train_images" / f"{row['image_id']}.jpg").write_bytes(row["image"]["bytes"])


def write_official_coco(folder: Path, subset: str, prefix: str, rows: list[dict]) -> None:
    """Questions, annotations and images of VQA v2, or of OK-VQA, whose files have no prefix."""
    (folder / subset).mkdir(parents=True, exist_ok=True)
    header = {"info": {"version": "2.0"}, "data_type": "mscoco", "data_subtype": subset, "license": {"name": "CC"}}
    questions = [{key: row[key] for key in ("image_id", "question", "question_id")} for row in rows]
    annotations = [
        {key: value for key, value in row.items() if key not in ("question", "image")} for row in reversed(rows)
    ]
    (folder / f"{prefix}OpenEnded_mscoco_{subset}_questions.json").write_text(
        json.dumps({**header, "task_type": "Open-Ended", "questions": questions})
    )
    (folder / f"{prefix}mscoco_{subset}_annotations.json").write_text(
        json.dumps({**header, "annotations": annotations})
    )
    for row in rows:
        path = folder / subset / f"COCO_{subset}_{row['image_id']:012d}.jpg"
        path.write_bytes(row["image"]["bytes"])
