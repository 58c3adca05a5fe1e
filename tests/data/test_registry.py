"""Each published data set by name: from a file in its published schema to rows of ours."""

import datasets
import pytest
from datasets import Dataset, Features, Image, List, Value
from published import (
    PUBLISHED_FEATURES,
    coco_2014_vqa_row,
    encoded_image,
    okvqa_row,
    published_table,
    text_vqa_row,
)

from joint_controller.data.registry import VQA_DATASETS, render_choices
from joint_controller.data.sources import SOURCE_FEATURES, read_source
from joint_controller.evaluation.scoring import score_answer


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def read(tmp_path):
    """Rows of a data set whose split is in one Parquet shard, named as on the Hub."""

    def read_rows(name: str, published_split: str, rows: list[dict], split: str | None = None) -> list[dict]:
        folder = tmp_path / name / (VQA_DATASETS[name].configuration or "data")
        folder.mkdir(parents=True)
        published_table(name, rows).to_parquet(folder / f"{published_split}-00000-of-00001.parquet")
        dataset = read_source(f"{name}={tmp_path / name}", split or published_split)
        assert dataset.features == SOURCE_FEATURES and dataset.column_names == list(SOURCE_FEATURES)
        streamed = read_source(f"{name}={tmp_path / name}", split or published_split, streaming=True)
        assert streamed.features == SOURCE_FEATURES
        assert list(streamed) == list(dataset)
        return list(dataset)

    return read_rows


def without_image(row: dict) -> dict:
    return {column: value for column, value in row.items() if column != "image"}


def test_every_entry_is_published_with_its_columns_and_types():
    assert set(VQA_DATASETS) == set(PUBLISHED_FEATURES)
    for name, entry in VQA_DATASETS.items():
        assert entry.name == name
        for column, feature in entry.columns.items():
            if (name, column) in {("st_qa", "answers"), ("tally_qa", "qa")}:
                continue
            assert PUBLISHED_FEATURES[name][column] == feature, (name, column)


def test_text_vqa_has_ten_answers(read):
    rows = read("text_vqa", "validation", [text_vqa_row(number) for number in range(3)])
    assert without_image(rows[2]) == {
        "sample_id": "text_vqa/validation/34604",
        "question": "what is written on sign 2?",
        "answers": ["stop"] * 6 + ["stop sign"] * 3 + ["answer 2"],
        "style": "text_vqa",
        "metric": "vqa_accuracy",
        "question_type": "unknown",
        "defect": None,
    }
    assert rows[2]["image"] == encoded_image(1)
    assert score_answer(rows[2]["metric"], "Stop", rows[2]["answers"]) == 1.0


def test_coco_2014_vqa_has_ten_answers_in_a_struct_each(read):
    rows = read("coco_2014_vqa", "validation", [coco_2014_vqa_row(number) for number in range(3)])
    assert without_image(rows[1]) == {
        "sample_id": "coco_2014_vqa/validation/42001",
        "question": "Is the ball in picture 1 blue?",
        "answers": ["yes"] * 7 + ["no"] * 2 + ["answer 1"],
        "style": "vqa2",
        "metric": "vqa_accuracy",
        "question_type": "is the",
        "defect": None,
    }
    # The official metric: two of ten, leave-one-out: 8 × 2/3 and 2 × 1/3 over 10.
    assert score_answer(rows[1]["metric"], "no", rows[1]["answers"]) == pytest.approx((8 * 2 / 3 + 2 / 3) / 10)


@pytest.mark.parametrize("split", ["val2014", "validation", "val"])
def test_okvqa_is_found_by_its_published_name_and_by_ours(read, split):
    rows = read("okvqa", "val2014", [okvqa_row(0)], split)
    assert without_image(rows[0]) == {
        "sample_id": "okvqa/val2014/2971475",
        "question": "What sport can you use 0 of this for?",
        "answers": ["race"] * 4 + ["motocross"] * 4 + ["ride"] * 2,
        "style": "okvqa",
        "metric": "vqa_accuracy",
        "question_type": "five",
        "defect": None,
    }


def test_coco_caption_has_five_captions(read):
    captions = [f"A bicycle in {place}." for place in ("a kitchen", "a yard", "a barn", "a hall", "a shed")]
    published = {
        "question_id": "COCO_val2014_000000203564.jpg",
        "image": encoded_image(1),
        "question": "Please carefully observe the image and come up with a caption for the image",
        "answer": captions,
        "id": 37,
        "license": 4,
        "file_name": "COCO_val2014_000000203564.jpg",
        "height": 400,
        "width": 500,
    }
    rows = read("coco_caption", "val", [published], "validation")
    assert rows[0]["sample_id"] == "coco_caption/val/COCO_val2014_000000203564.jpg"
    assert rows[0]["answers"] == captions
    assert (rows[0]["style"], rows[0]["metric"], rows[0]["question_type"]) == ("coco_captioning", "cider", "caption")
    assert rows[0]["question"] == published["question"]


def test_doc_qa_has_some_right_answers_and_several_types(read):
    published = {
        "questionId": "49153",
        "question": "What is the 'actual' value per 1000, during the year 1975?",
        "question_types": ["figure/diagram", "table/list"],
        "image": encoded_image(1),
        "docId": 14465,
        "ucsf_document_id": "pybv0228",
        "ucsf_document_page_no": "81",
        "answers": ["0.28", ".28"],
        "data_split": "val",
    }
    rows = read("doc_qa", "validation", [published])
    assert rows[0]["sample_id"] == "doc_qa/validation/49153"
    assert rows[0]["answers"] == ["0.28", ".28"]
    assert rows[0]["question_type"] == "figure/diagram/table/list"
    assert (rows[0]["style"], rows[0]["metric"]) == ("doc_qa", "anls")
    assert score_answer("anls", "0.28", rows[0]["answers"]) == 1.0


def test_tally_qa_makes_a_row_of_each_question_on_an_image(read):
    published = [
        {
            "image": encoded_image(number),
            "qa": [
                {"question": f"How many cats {question}?", "answer": question, "is_simple": question == 0}
                for question in range(num_questions)
            ],
        }
        for number, num_questions in enumerate((2, 0, 1))
    ]
    rows = read("tally_qa", "test", published)
    assert [row["sample_id"] for row in rows] == [f"tally_qa/test/{name}" for name in ("0-0", "0-1", "2-0")]
    assert [row["image"] for row in rows] == [encoded_image(number) for number in (0, 0, 2)]
    # One answer, a number, as a string.
    assert [row["answers"] for row in rows] == [["0"], ["1"], ["0"]]
    assert [row["question_type"] for row in rows] == ["simple", "complex", "simple"]
    assert (rows[0]["style"], rows[0]["metric"]) == ("tally_qa", "exact_count")
    assert score_answer("exact_count", "1", rows[1]["answers"]) == 1.0


def test_counts_may_be_written_as_strings(tmp_path):
    features = Features(
        {
            "image": Image(),
            "qa": List({"question": Value("string"), "answer": Value("string"), "is_simple": Value("bool")}),
        }
    )
    questions = [[{"question": "How many?", "answer": "3", "is_simple": True}]]
    Dataset.from_dict({"image": [encoded_image(1)], "qa": questions}, features=features).to_parquet(
        tmp_path / "test.parquet"
    )
    assert read_source(f"tally_qa={tmp_path / 'test.parquet'}", "test")[0]["answers"] == ["3"]


def test_science_qa_renders_hint_and_choices(read):
    published = {
        "image": encoded_image(1),
        "question": "Which of these states is farthest north?",
        "choices": ["West Virginia", "Louisiana", "Arizona", "Oklahoma"],
        "answer": 2,
        "hint": "Look at the map.",
        "subject": "social science",
        "topic": "geography",
        "lecture": "Maps have four cardinal directions.",
        "solution": "To find the answer, look at the compass rose.",
    }
    rows = read(
        "science_qa_img", "test", [published, {**published, "hint": "", "answer": 0}, {**published, "answer": 4}]
    )
    assert rows[0]["sample_id"] == "science_qa_img/test/000000"
    assert rows[0]["question"] == (
        "Look at the map.\nWhich of these states is farthest north?\n"
        "A. West Virginia\nB. Louisiana\nC. Arizona\nD. Oklahoma"
    )
    assert rows[0]["answers"] == ["C", "Arizona"]
    assert (rows[0]["style"], rows[0]["metric"]) == ("science_qa", "multiple_choice")
    assert rows[0]["question_type"] == "social science"
    assert score_answer("multiple_choice", "C", rows[0]["answers"]) == 1.0
    assert score_answer("multiple_choice", "Arizona", rows[0]["answers"]) == 1.0
    assert score_answer("multiple_choice", "A", rows[0]["answers"]) == 0.0
    assert rows[1]["question"].startswith("Which of these") and rows[1]["answers"] == ["A", "West Virginia"]
    assert [row["defect"] for row in rows[:2]] == [None, None]
    assert rows[2]["defect"] == "answers: the right choice is number 4 of 4, counted from 0"


MMMU_ROW = {
    "id": "validation_Accounting_1",
    "question": "<image 1> Baxter Company has a relevant range of production. Which is the expected cost?",
    "options": "['$6', '$7', '$8', '$9']",
    "image_1": encoded_image(1),
    "answer": "B",
    "question_type": "multiple-choice",
    "subfield": "Managerial Accounting",
}


def test_mmmu_multiple_choice(read):
    rows = read("mmmu", "validation", [MMMU_ROW])
    assert rows[0]["sample_id"] == "mmmu/validation/validation_Accounting_1"
    assert rows[0]["image"] == encoded_image(1)
    assert rows[0]["question"] == (
        "Baxter Company has a relevant range of production. Which is the expected cost?\nA. $6\nB. $7\nC. $8\nD. $9"
    )
    assert rows[0]["answers"] == ["B", "$7"]
    assert (rows[0]["style"], rows[0]["metric"]) == ("a_okvqa_mc", "multiple_choice")
    assert rows[0]["question_type"] == "multiple-choice" and rows[0]["defect"] is None


def test_mmmu_open_questions_are_scored_by_exact_match(read):
    open_row = {**MMMU_ROW, "question": "Find V in <image 1> in volts.", "options": "[]", "question_type": "open"}
    rows = read("mmmu", "dev", [{**open_row, "answer": "8.4"}, {**open_row, "answer": "['1/2', '0.5']"}])
    assert [row["answers"] for row in rows] == [["8.4"], ["1/2", "0.5"]]
    assert rows[0]["question"] == "Find V in the image in volts."
    assert (rows[0]["style"], rows[0]["metric"], rows[0]["question_type"]) == ("vqa2", "exact_match", "open")
    assert rows[0]["defect"] is None


@pytest.mark.parametrize(
    ("change", "defect"),
    [
        ({"question": "<image 1> and <image 2> show"}, "image: the question is on image_1, image_2, and one image"),
        ({"question": "See <image 3>."}, "image: the question is on image_3, and one image"),
        ({"options": "['<image 2>', '<image 3>']"}, "image: the question is on image_1, image_2, image_3"),
        ({"options": "['a', 'b'"}, "question: its options are not a list (['a', 'b')"),
        ({"answer": "E"}, "answers: the right choice is 'E' of ['A', 'B', 'C', 'D']"),
    ],
)
def test_mmmu_rows_that_cannot_be_asked_say_why(read, change, defect):
    rows = read("mmmu", "validation", [MMMU_ROW, {**MMMU_ROW, **change}])
    assert rows[0]["defect"] is None
    assert rows[1]["defect"].startswith(defect)


def test_image_names_leave_the_ends_of_a_question(read):
    questions = ["<image 1>", "What is shown? <image 1>", "<image 1>\n<image 1> Which?", "In <image 1>, which?"]
    rows = read("mmmu", "dev", [{**MMMU_ROW, "question": question, "options": "['x']"} for question in questions])
    assert [row["question"] for row in rows] == [
        render_choices(question, ["x"]) for question in ("", "What is shown?", "Which?", "In the image, which?")
    ]


UNLABELLED = [
    ("text_vqa", {**text_vqa_row(0), "answers": []}),
    ("text_vqa", {**text_vqa_row(0), "answers": [""] * 10}),
    ("coco_2014_vqa", {**coco_2014_vqa_row(0), "answers": None}),
    ("coco_caption", {"question_id": "COCO_test2014_000000000001.jpg", "question": "Caption?"}),
    ("doc_qa", {"questionId": "57344", "question": "What is it?"}),
    ("st_qa", {"question_id": "1", "question": "What is it?"}),
    ("mmmu", {**MMMU_ROW, "answer": "?"}),
]


@pytest.mark.parametrize(("name", "row"), UNLABELLED, ids=[name for name, _ in UNLABELLED])
def test_splits_without_answers_are_refused(read, name, row):
    with pytest.raises(ValueError, match=f"split 'test' of data set '{name}' has no answers"):
        read(name, "test", [row])
    with pytest.raises(ValueError, match="has no answers"):
        read_source(name, "test")


def test_sample_ids_of_all_data_sets_differ(read):
    rows = [
        read("text_vqa", "validation", [text_vqa_row(0)]),
        read("coco_2014_vqa", "validation", [coco_2014_vqa_row(0)]),
        read("okvqa", "val2014", [okvqa_row(0)]),
        read("mmmu", "validation", [MMMU_ROW]),
    ]
    assert len({row["sample_id"] for some in rows for row in some}) == 4
