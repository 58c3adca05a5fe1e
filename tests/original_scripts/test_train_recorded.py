"""`joint-controller train` on recorded results: the original script's command line, and what comes of it."""

import json

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset
from PIL import Image
from recorded_world import TIER_RANGES, make_entry, write_results
from safetensors.torch import load_file

from joint_controller import JointControllerModel, JointPipeline, LatencyEstimatorConfig, LatencyEstimatorModel
from joint_controller.cli import main
from joint_controller.latency import read_latency_estimator
from joint_controller.molmo.knob_space import build_knob_space
from joint_controller.original_scripts import OriginalLatencyEstimatorModel, load_recorded_results
from joint_controller.scripts import train
from joint_controller.scripts.train import LOG_FILE, RESULTS_FILE


# The original command line, word by word but for the paths, the epochs and the device.
COMMAND = "--batch_size 8 --num_epochs 2 --lr 1e-4 --stage1_lr_ratio 1.0 --group_size 5 --device cpu --seed 42"


def run_train(results_dir, output_dir, *flags, dataset_names=("text_vqa", "coco_2014_vqa", "okvqa")):
    argv = ["train", "--results_dir", results_dir, "--dataset_names", *dataset_names, "--output_dir", output_dir]
    return main([str(part) for part in (*argv, *COMMAND.split(), *flags)])


def log_of(output_dir):
    text = (output_dir / LOG_FILE).read_text()
    entries = [json.loads(line[line.index("{") :]) for line in text.splitlines() if line.endswith("}")]
    return text, entries


def error_of(capsys, *args, **kwargs):
    capsys.readouterr()
    assert run_train(*args, **kwargs) == 2
    [line] = [
        line for line in capsys.readouterr().err.splitlines() if line.startswith("joint-controller train: error")
    ]
    return line


def write_original_estimator(path):
    """As the original scripts save it; one unit, which gives 40 ms and 1 ms a block, and 5 ms a decode step."""
    state = {
        "config_encoder.0.weight": torch.tensor([[0.0, 0.0, 0.0, 0.0, 1.0]]),
        "config_encoder.0.bias": torch.zeros(1),
        "prefill_head.0.weight": torch.ones(1, 1),
        "prefill_head.0.bias": torch.tensor([40.0]),
        "position_encoder.0.weight": torch.ones(1, 1),
        "position_encoder.0.bias": torch.zeros(1),
        "decode_head.0.weight": torch.zeros(1, 2),
        "decode_head.0.bias": torch.tensor([5.0]),
    }
    torch.save({"model_state_dict": state, "epoch": 3}, path)
    return path


@pytest.fixture(scope="module")
def results_dir(tmp_path_factory):
    return write_results(tmp_path_factory.mktemp("results"), num_samples=12)


@pytest.fixture(scope="module")
def model_path(tmp_path_factory, tiny_molmo, tiny_processor):
    folder = tmp_path_factory.mktemp("model")
    tiny_molmo.save_pretrained(folder)
    tiny_processor.save_pretrained(folder)
    return folder


def test_the_original_command_line_without_model_and_estimator(shared_dir, tmp_path, capsys):
    run = tmp_path / "run"
    assert run_train(shared_dir / "profiling_results_example", run) == 0
    controller = JointControllerModel.from_pretrained(run)
    assert not controller.sees_question and not controller.sees_image
    assert controller.knob_space == build_knob_space(TIER_RANGES, (4, 6, 8), (12, 14, 16))
    text, entries = log_of(run)
    assert "There are no results of okvqa" in text
    assert "The controller sees the latency budget alone" in text
    assert "Latencies are those that were recorded" in text and "Latencies are those of the model alone." in text
    assert (
        "Latencies are those of the model alone, as they were recorded, at batch 1." in (run / "README.md").read_text()
    )
    assert controller.config.max_new_tokens is None
    assert "it is lowered to 6" in text
    assert [entry["step"] for entry in entries if "eval_reward" in entry] == [1, 2]
    assert [entry["learning_rate"] for entry in entries if "learning_rate" in entry] == [1e-4, 5e-5]
    state = json.loads((run / "checkpoint-2" / "trainer_state.json").read_text())
    best = load_file(run / f"checkpoint-{state['best_global_step']}" / "model.safetensors")
    assert all(torch.equal(value, controller.state_dict()[name]) for name, value in best.items())
    assert json.loads((run / RESULTS_FILE).read_text())["num_executed"] == 0
    sweep = Dataset.from_parquet(str(run / "sweep.parquet"))
    policies = {"controller", "full", "static", "static by reward", "fits", "look-up", "per question type", "random"}
    assert set(sweep["policy"]) == policies | {"untrained"} and set(sweep["dataset"]) > {"all"}
    assert len(sweep) == 5 * 9 * len(set(sweep["dataset"]))
    # Nothing is predicted, but all outcomes are known.
    assert set(Dataset.from_parquet(str(run / "requests.parquet"))["upper_latency_ms"]) == {None}
    assert not (run / "latency_estimator").exists()
    shown = capsys.readouterr()
    assert "static" in shown.out and "The controller sees the latency budget alone" in shown.err


def test_the_original_command_line_with_model_and_estimator(shared_dir, tmp_path):
    run = tmp_path / "run"
    estimator_path = write_original_estimator(tmp_path / "best_latency_estimator.pt")
    flags = ["--model_path", "embedded", "--latency_estimator_path", estimator_path]
    assert run_train(shared_dir / "profiling_results_example", run, *flags) == 0
    controller = JointControllerModel.from_pretrained(run)
    assert controller.config.stage1_inputs == controller.config.stage2_inputs == "question_and_budget"
    assert controller.config.question_size == 192
    assert controller.knob_space["top_k"].values == (4, 6, 8)  # the embedded executor has 1 to 4
    text, entries = log_of(run)
    assert "embedded gives features and answers nothing" in text and "no stage sees the image" in text
    assert "The estimates are off the recorded latencies by" in text
    # 40 ms, a millisecond a block, and 5 ms for each of 2 to 5 output tokens.
    assert all(52 + 10 <= entry["eval_latency_ms"] <= 56 + 25 for entry in entries if "eval_latency_ms" in entry)
    assert isinstance(read_latency_estimator(run / "latency_estimator"), OriginalLatencyEstimatorModel)
    assert {path.name for path in run.glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-2"}


def test_of_an_estimator_of_whole_requests_the_models_share_is_taken(results_dir, tmp_path):
    knobs = {"tier": ["low", "medium", "high"], "top_k": [4, 8], "num_blocks": [12, 16]}
    estimator = LatencyEstimatorModel(LatencyEstimatorConfig(executor_type="molmo", fitted_knobs=knobs))
    for parameter in estimator.parameters():
        parameter.fill_(1e-3)
    estimator.save_pretrained(tmp_path / "whole")
    assert run_train(results_dir, tmp_path / "run", "--latency_estimator_path", tmp_path / "whole") == 0
    kept = read_latency_estimator(tmp_path / "run" / "latency_estimator")
    assert estimator.latency_scope == "request" and kept.latency_scope == "model"
    outcomes = load_recorded_results(results_dir).known_outcomes()
    assert torch.equal(kept.latency_ms(outcomes), estimator.in_scope("model").latency_ms(outcomes))
    with pytest.raises(ValueError, match="`image_pixels` is missing, which the stage 'image_processing' depends on"):
        estimator.latency_ms(outcomes)
    assert "of the model alone, estimated, at batch 1" in (tmp_path / "run" / "README.md").read_text()


@pytest.mark.slow
def test_stage_2_sees_the_images_where_they_are_at_hand(results_dir, model_path, tmp_path):
    for number in range(12):
        noise = np.random.default_rng(number).integers(0, 255, (40, 60, 3), dtype=np.uint8)
        path = tmp_path / "images" / f"COCO_val2014_{1000 + number:012}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(noise).save(path)
    flags = ["--model_path", model_path, "--image_dir", tmp_path / "images"]
    assert run_train(results_dir, tmp_path / "run", *flags, "--knob_values", "num_blocks=12,16", "top_k=8") == 0
    controller = JointControllerModel.from_pretrained(tmp_path / "run")
    assert controller.config.stage2_inputs == "image_question_and_budget" and controller.config.vision_size == 32
    assert controller.knob_space["top_k"].values == (8,)
    assert controller.knob_space["num_blocks"].values == (12, 16)
    text, _ = log_of(tmp_path / "run")
    assert "Stage 1 sees the question, the budget, stage 2 the image, the question, the budget." in text
    assert "Samples: 20 train, 2 validation, 2 test" in text
    (tmp_path / "images" / "COCO_val2014_000000001003.png").write_bytes(b"damaged")
    flags += ["--skip_bad_rows", "true"]
    assert run_train(results_dir, tmp_path / "skipping", *flags) == 0
    skipped = [json.loads(line) for line in (tmp_path / "skipping" / "skipped_rows.jsonl").read_text().splitlines()]
    assert {row["sample_id"] for row in skipped} == {"coco_2014_vqa/recorded/3", "text_vqa/recorded/3"}


@pytest.mark.slow
def test_a_controller_learns_from_recorded_outcomes_what_pays(results_dir, tmp_path):
    """At a budget that all settings meet, the answers decide; the number of blocks decides a third of them."""
    flags = ["--lr", "1e-2", "--num_epochs", "60", "--batch_size", "10", "--latency_budget_min_ms", "150"]
    flags += ["--latency_budget_max_ms", "300", "--save_every_n_epochs", "25"]
    assert run_train(results_dir, tmp_path / "run", *flags) == 0
    results = json.loads((tmp_path / "run" / RESULTS_FILE).read_text())["eval_reward_mean_over_budgets"]
    assert results["controller"] > results["untrained"] + 0.3
    steps = {int(path.name.split("-")[1]) for path in (tmp_path / "run").glob("checkpoint-*")}
    state = json.loads((tmp_path / "run" / "checkpoint-120" / "trainer_state.json").read_text())
    evaluated = {entry["step"]: entry["eval_reward"] for entry in state["log_history"] if "eval_reward" in entry}
    assert list(evaluated) == list(range(2, 121, 2))  # after every epoch of two batches
    rewards = list(evaluated.values())
    best = {step for index, step in enumerate(evaluated) if rewards[index] > max(rewards[:index], default=-np.inf)}
    assert steps == best | {50, 100, 120}


@pytest.mark.slow
def test_imported_results_train_the_same_controller(results_dir, tmp_path):
    argv = ["import-results", "--results_dir", str(results_dir), "--output_dir", str(tmp_path / "imported")]
    assert main(argv) == 0
    files = sorted(path.name for path in (tmp_path / "imported" / "outcomes").iterdir())
    for name, source in (("one", results_dir), ("two", tmp_path / "imported")):
        assert run_train(source, tmp_path / name) == 0
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert sorted(path.name for path in (tmp_path / "imported" / "outcomes").iterdir()) == files


@pytest.mark.slow
def test_stage_1_is_loaded_and_its_state_dicts_from_elsewhere_refused(results_dir, tmp_path, capsys):
    assert run_train(results_dir, tmp_path / "first") == 0
    flags = ["--load_stage1_checkpoint", tmp_path / "first", "--stage1_lr_ratio", "0"]
    assert run_train(results_dir, tmp_path / "second", *flags) == 0
    first, second = (JointControllerModel.from_pretrained(tmp_path / name) for name in ("first", "second"))
    for name, value in first.stage1.state_dict().items():
        assert torch.equal(value, second.stage1.state_dict()[name])
    torch.save({}, tmp_path / "stage1.pt")
    message = error_of(capsys, results_dir, tmp_path / "third", "--load_stage1_checkpoint", tmp_path / "stage1.pt")
    assert "state dict that the original scripts saved" in message and "cannot be converted" in message


@pytest.mark.slow
def test_a_run_goes_on_from_its_last_checkpoint(results_dir, tmp_path):
    assert run_train(results_dir, tmp_path / "whole", "--num_epochs", "4", "--save_every_n_epochs", "1") == 0
    assert run_train(results_dir, tmp_path / "run", "--num_epochs", "4", "--save_every_n_epochs", "1") == 0
    for path in (tmp_path / "run").glob("checkpoint-*"):
        if int(path.name.split("-")[1]) > 4:
            (path / "trainer_state.json").unlink()  # killed while it was written
    flags = ["--num_epochs", "4", "--save_every_n_epochs", "1", "--resume_from_checkpoint", "true"]
    assert run_train(results_dir, tmp_path / "run", *flags) == 0
    whole, run = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "run"))
    assert all(torch.equal(whole[name], run[name]) for name in whole)


@pytest.mark.slow
def test_samples_that_lack_settings_are_left_out_and_named(tmp_path, capsys):
    def change(folder_name, entry):
        return None if entry["sample_id"] == 5 and entry["tier"] == "high" else entry

    results = write_results(tmp_path / "results", ["text-vqa"], num_samples=10, change=change)
    assert run_train(results, tmp_path / "run", dataset_names=["text_vqa"]) == 0
    text, _ = log_of(tmp_path / "run")
    assert "1 samples were not recorded at all settings and are left out: text_vqa/recorded/5 lacks 4." in text
    assert "Samples: 7 train, 1 validation, 1 test" in text

    def lack_all(folder_name, entry):
        return None if entry["sample_id"] and entry["tier"] == "high" and entry["top_k"] == 8 else entry

    results = write_results(tmp_path / "gaps", ["text-vqa"], num_samples=10, change=lack_all)
    message = error_of(capsys, results, tmp_path / "gaps_run", dataset_names=["text_vqa"])
    assert "1 recorded sample(s) cannot be divided" in message
    assert run_train(results, tmp_path / "gaps_run", "--knob_values", "top_k=4", dataset_names=["text_vqa"]) == 0


@pytest.mark.slow
def test_a_pipeline_takes_a_controller_that_was_trained_on_results(tmp_path, model_path, tiny_molmo_config):
    """Results of the tiny executor's own knob values, so that it can answer afterwards."""
    values = {8: 4, 4: 2, 12: 3, 16: 4}

    def change(folder_name, entry):
        return {**entry, "top_k": values[entry["top_k"]], "num_active_blocks": values[entry["num_active_blocks"]]}

    results = write_results(tmp_path / "results", ["text-vqa"], change=change)
    for path in sorted((results / "text-vqa").iterdir()):
        content = json.loads(path.read_text())
        content.pop("summary")
        name = path.name
        for before, after in (("topk8", "topk4_"), ("topk4_b", "topk2_b"), ("topk4__", "topk4_")):
            name = name.replace(before, after)
        name = name.replace("blocks12", "blocks3").replace("blocks16", "blocks4")
        path.unlink()
        (path.parent / name).write_text(json.dumps(content))
    flags = ["--model_path", model_path, "--knob_values", "tier=low,medium"]
    assert run_train(results, tmp_path / "run", *flags, dataset_names=["text_vqa"]) == 0
    image = Image.fromarray(np.zeros((40, 40, 3), dtype=np.uint8))
    with pytest.raises(FileNotFoundError, match="trained on recorded latencies: give `latency_estimator_path`"):
        JointPipeline.from_pretrained(tmp_path / "run", model_path)
    estimator_path = write_original_estimator(tmp_path / "best_latency_estimator.pt")
    pipeline = JointPipeline.from_pretrained(
        tmp_path / "run", model_path, estimator_path, guardrail_quantile=None, max_new_tokens=2
    )
    answer = pipeline(image, "what color is the star?", latency_budget_ms=60)
    assert answer.setting in pipeline.executor.knob_space and 48 <= answer.latency_ms <= 54


# --- the command line -------------------------------------------------------------------------------------------------


def parse(*flags, recipe=None, tmp_path=None):
    argv = [str(flag) for flag in flags]
    if recipe is not None:
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        argv = ["--config", str(tmp_path / "recipe.yaml"), *argv]
    return train.make_parser().parse_args_and_config(argv)


def test_defaults_with_results_are_those_of_the_original_script():
    script_args, training_args, original_args = parse("--results_dir", "results", "--model_path", "model")
    assert (
        original_args.given == {"results_dir", "model_path"}
        and original_args.device == "cuda"
        and not training_args.use_cpu
    )
    assert training_args.output_dir == "./checkpoints/joint_controller"
    assert training_args.num_generations == 5
    assert training_args.per_device_train_batch_size == training_args.generation_batch_size == 32 * 5
    assert (training_args.num_train_epochs, training_args.learning_rate) == (100, 1e-4)
    assert (training_args.stage1_lr_ratio, training_args.seed, training_args.save_every_n_epochs) == (1.0, 42, 10)
    assert training_args.eval_strategy == training_args.save_strategy == "epoch"
    assert script_args.dataset_names == [] and script_args.model_path == "model"
    assert parse("--results_dir", "results")[0].model_path is None


def test_defaults_without_results_are_as_they_were():
    script_args, training_args, original_args = parse("--output_dir", "outputs")
    assert script_args.dataset_names == ["easy_vqa", "scenes"]
    assert (training_args.num_generations, training_args.learning_rate) == (8, 2e-3)
    assert training_args.eval_strategy == "steps" and training_args.save_every_n_epochs is None
    assert original_args.device is None and not training_args.use_cpu


def test_aliases_set_the_fields_with_and_without_results(tmp_path):
    flags = ["--batch_size", 8, "--num_epochs", 3, "--lr", "1e-3", "--group_size", 4, "--device", "cpu"]
    flags += ["--load_stage1_checkpoint", "folder", "--output_dir", "outputs"]
    for more in ([], ["--results_dir", "results"]):
        _, training_args, _ = parse(*flags, *more)
        assert training_args.per_device_train_batch_size == 32 and training_args.num_generations == 4
        assert (training_args.num_train_epochs, training_args.learning_rate) == (3, 1e-3)
        assert training_args.use_cpu and training_args.stage1_checkpoint == "folder"
    recipe = {"results_dir": "results", "lr": 0.01, "group_size": 6, "batch_size": 2, "device": "cpu"}
    _, training_args, _ = parse(recipe=recipe, tmp_path=tmp_path)
    assert (training_args.learning_rate, training_args.per_device_train_batch_size) == (0.01, 12)


def test_a_flag_beats_the_recipe_by_either_name(tmp_path):
    _, training_args, _ = parse(
        "--lr", "1e-3", recipe={"output_dir": "outputs", "learning_rate": 0.1}, tmp_path=tmp_path
    )
    assert training_args.learning_rate == 1e-3
    _, training_args, _ = parse("--learning_rate", "1e-3", recipe={"output_dir": "o", "lr": 0.1}, tmp_path=tmp_path)
    assert training_args.learning_rate == 1e-3
    _, training_args, _ = parse("--per_device_train_batch_size", 20, "--results_dir", "results")
    assert training_args.per_device_train_batch_size == 20 and training_args.num_generations == 5
    _, training_args, _ = parse(
        "--save_strategy", "no", "--load_best_model_at_end", "false", "--results_dir", "results"
    )
    assert training_args.save_every_n_epochs is None and training_args.eval_strategy == "steps"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--lr 1e-3 --learning_rate 1e-4", "`lr` 0.001 means `learning_rate` 0.001, but `learning_rate` is 0.0001"),
        (
            "--batch_size 8 --num_generations 4 --per_device_train_batch_size 8",
            "`batch_size` 8 means `per_device_train_batch_size` 32, but `per_device_train_batch_size` is 8",
        ),
        ("--device cuda --use_cpu true", "`device` cuda means `use_cpu` False, but `use_cpu` is True"),
        ("--device tpu", "invalid choice: 'tpu'"),
        ("--image_dir images", "`image_dir` is for recorded results: give `results_dir`"),
        ("--results_dir r --streaming true", "`streaming` has no effect on results that were recorded before"),
        ("--results_dir r --max_new_tokens 4", "`max_new_tokens` has no effect"),
        ("--save_every_n_epochs 0", "`save_every_n_epochs` is 0: give 1 or more"),
        (
            "--save_every_n_epochs 5 --save_strategy steps --load_best_model_at_end false",
            "`save_strategy` is 'steps': set it to 'epoch'",
        ),
    ],
)
def test_names_that_contradict_each_other_are_refused(flags, message):
    with pytest.raises(ValueError) as caught:
        parse("--output_dir", "outputs", *flags.split())
    assert message in str(caught.value)


def test_two_names_with_one_value_are_fine():
    _, training_args, _ = parse(
        *"--output_dir o --lr 1e-3 --learning_rate 1e-3 --num_epochs 2 --num_train_epochs 2".split()
    )
    assert (training_args.learning_rate, training_args.num_train_epochs) == (1e-3, 2)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_where_there_is_none_is_refused(results_dir, tmp_path, capsys):
    assert main(["train", "--results_dir", str(results_dir), "--output_dir", str(tmp_path / "run")]) == 2
    assert "`device` is 'cuda', but there is no CUDA device here: give `--device cpu`" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--image_dir", "images"], "`image_dir` is of no use without a model"),
        (["--stage2_inputs", "question_and_budget"], "nothing gives features of the question: give `model_path`"),
        (
            ["--stage2_inputs", "image_question_and_budget"],
            "nothing gives features of the question: give `model_path`",
        ),
        (["--model_path", "/no/such/model"], "'/no/such/model' does not exist"),
        (["--latency_estimator_path", "none.pt"], "latency estimator 'none.pt' does not exist"),
        (
            ["--latency_scope", "request"],
            "recorded results say what the model's stages took, not whole requests: leave",
        ),
        (["--num_threads", "0"], "`num_threads` is 0: give 1 or more"),
        (["--knob_values", "top_k=5"], "knob `top_k` has no value 5: choose from [4, 8]"),
        (["--knob_values", "top_k=four"], "knob `top_k` takes values of the type int32, got 'four'"),
        (["--knob_values", "crops=5"], "there is no knob `crops`: the executor has tier, top_k, num_blocks"),
        (["--dataset_names", "text_vqaa"], "there are no results of 'text_vqaa'"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(results_dir, tmp_path, capsys, flags, message):
    assert message in error_of(capsys, results_dir, tmp_path / "run", *flags)
    assert not (tmp_path / "run").exists()


def test_budgets_that_no_setting_fits_are_refused_before_training(results_dir, tmp_path, capsys):
    flags = ["--latency_budget_min_ms", "5", "--latency_budget_max_ms", "9"]
    assert "no setting can meet it" in error_of(capsys, results_dir, tmp_path / "low", *flags)
    message = error_of(capsys, results_dir, tmp_path / "sweep", "--sweep_budget_fractions", "0.1")
    assert "no setting fits a budget of" in message
    assert not list((tmp_path / "sweep").glob("checkpoint-*"))


def test_latencies_are_the_recorded_ones(results_dir, tmp_path):
    """The budget range goes from the slowest sample at the cheapest setting to the slowest of all."""
    assert run_train(results_dir, tmp_path / "run") == 0
    config = JointControllerModel.from_pretrained(tmp_path / "run").config
    text, _ = log_of(tmp_path / "run")
    cheapest, full = (
        [make_entry(number, *setting)["T_total"] for number in range(12)]
        for setting in (("low", 4, 12), ("high", 8, 16))
    )
    assert config.latency_budget_min_ms == pytest.approx(max(cheapest), rel=1e-6)
    assert config.latency_budget_max_ms == pytest.approx(max(full), rel=1e-6)
