"""train.sh and validation.sh as a user types them: ranks, SEED's literal command, what is saved, and mistakes."""

import csv
import itertools
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import psutil
import pytest
import torch

from animals.checkpoint.check import read_shards
from animals.command import UserError
from tests.conftest import start

# The command of the first README (August 2025), word for word but for paths and the step count.
FIRST_COMMAND = """
accelerate launch --config_file=./scripts/deepspeed_zero3.yaml --num_processes 1 \
    train.py \
    --model_name_or_path {model} --input_dir {input} --temp_dir {temp} --max_steps 2 \
    --per_device_train_batch_size 4 \
    --gradient_accumulation_steps 4 \
    --output_dir {out} \
    --torch_dtype bfloat16 \
    --gradient_checkpointing \
    --num_train_epochs 1 \
    --save_strategy "steps" \
    --save_steps 100 \
    --learning_rate 2e-5 \
    --save_total_limit 5 \
    --lr_scheduler_type cosine \
    --weight_decay 0.01 \
    --warmup_ratio 0.03 \
    --optim adamw_bnb_8bit \
    --per_device_eval_batch_size 8 \
    --logging_steps 10 \
    --logging_dir "{logs}" \
    --report_to "tensorboard"
"""
FLOAT32 = "on the CPU in float32, not bfloat16"
SAYS_SO = int(not torch.cuda.is_available() and os.environ.get("BF16_ON_CPU") != "1")  # how often a command prints it
DTYPE = "float32" if SAYS_SO else "bfloat16"


@pytest.fixture(scope="module")
def two_ranks(demo, others_pictures, run, tmp_path_factory):
    """Somebody else's pictures through 2-rank ZeRO-3: paths and the console's output."""
    tmp = tmp_path_factory.mktemp("two_ranks")
    out, logs, flags = tmp / "my-run", tmp / "logs", f"--input_dir {others_pictures} --temp_dir {tmp}/cache"
    done = run(
        f"sh train.sh {flags} --model_name_or_path {demo.model} --output_dir {out} --logging_dir {logs} "
        "--num_train_epochs 3 --save_steps 1 --save_total_limit 2 --logging_steps 1 --gradient_accumulation_steps 2",
        NUM_PROCESSES=2,
        code=0,
    )
    return SimpleNamespace(out=out, logs=logs, flags=flags, output=done.output)


def test_two_ranks_train_with_zero3_on_other_peoples_pictures(two_ranks):
    assert "DeepSpeed ZeRO stage 3" in two_ranks.output and "adamw_bnb_8bit" in two_ranks.output
    assert "4 per device x 2 accumulated x 2 CPU ranks = 16 pictures per step" in two_ranks.output
    assert ">>cat</s><<" in two_ranks.output
    assert f"sh validation.sh --model_name_or_path {two_ranks.out}" in two_ranks.output
    assert "Warning" not in two_ranks.output
    assert list(two_ranks.logs.rglob("events.out.tfevents.*"))
    assert len(list(two_ranks.out.glob("checkpoint-*"))) == 2, "save_total_limit"


def test_on_a_cpu_everything_runs_in_float32(two_ranks):
    """Although train.sh asks for bfloat16. The tests of validation.sh and test.py below look at the same."""
    assert two_ranks.output.count(FLOAT32) == SAYS_SO
    ran, config = (json.loads((two_ranks.out / f"{name}.json").read_text()) for name in ("run", "config"))
    assert (ran["model"]["dtype"], ran["training"]["bf16"], config["dtype"]) == (DTYPE, not SAYS_SO, DTYPE)


def test_saved_checkpoint_is_plain(two_ranks, demo):
    """A process that imports nothing of ours: no missing and no unexpected key, the input checkpoint's names."""
    code = """
import sys
from transformers import AutoProcessor, LlavaNextForConditionalGeneration
model, info = LlavaNextForConditionalGeneration.from_pretrained(sys.argv[1], output_loading_info=True)
processor = AutoProcessor.from_pretrained(sys.argv[1])
print(len(info["missing_keys"]), len(info["unexpected_keys"]), model.dtype, processor.tokenizer.padding_side)
"""
    command = [sys.executable, "-c", code, str(two_ranks.out)]
    out = subprocess.run(command, cwd="/", capture_output=True, text=True, check=True).stdout
    assert out.splitlines()[-1] == f"0 0 torch.{DTYPE} left"
    ours, theirs = (read_shards(folder)[0].keys() for folder in (two_ranks.out, demo.model))
    assert ours == theirs


def test_validation_is_the_same_on_1_2_and_3_ranks(two_ranks, run, tmp_path):
    """21 held-out pictures: 2 does not divide them, batches of 4 divide nothing."""
    reports, tables = [], []
    for ranks in (1, 2, 3):
        done = run(
            f"sh validation.sh {two_ranks.flags} --model_name_or_path {two_ranks.out} --report_dir {tmp_path}/{ranks} "
            f"--logging_dir {tmp_path}/logs --per_device_eval_batch_size 4",
            NUM_PROCESSES=ranks,
            code=0,
        )
        assert done.output.count(FLOAT32) == SAYS_SO
        last = json.loads(done.output.strip().splitlines()[-1])
        assert {"accuracy", "n", "macro_f1", "images_per_second"} <= set(last) and last["n"] == 21
        folder = tmp_path / str(ranks) / "my-run"
        report = json.loads((folder / "report.json").read_text())
        assert report["dtype"] == DTYPE
        reports.append({key: report[key] for key in ("n", "accuracy", "accuracy_ci95", "macro_f1", "confusion_matrix")})
        with open(folder / "predictions.csv", newline="") as file:
            tables.append({row["image"]: row for row in csv.DictReader(file)})
    assert reports[0] == reports[1] == reports[2]
    assert len(tables[0]) == 21 and tables[0].keys() == tables[1].keys() == tables[2].keys()
    near = 1e-5 if SAYS_SO else 0  # float32 shows who else was in a picture's batch
    for image, row in tables[0].items():
        for other in (tables[1][image], tables[2][image]):
            assert other["prediction"] == row["prediction"]
            assert abs(float(other["probability"]) - float(row["probability"])) <= near


def test_names_pictures_without_labels(two_ranks, others_pictures, run, tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"not a picture")
    done = run(
        f"python test.py {others_pictures}/validation_data/cat {tmp_path}/broken.jpg --output {tmp_path}/names.csv "
        f"--model_name_or_path {two_ranks.out}",
        code=0,
    )
    assert done.output.count(FLOAT32) == SAYS_SO
    with open(tmp_path / "names.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8
    labels = list(rows[0])[list(rows[0]).index("butterfly") :]
    for row in rows[:-1]:
        assert row["prediction"] in labels and not row["error"]
        assert abs(sum(float(row[label]) for label in labels) - 1) < 1e-4
    assert rows[-1]["error"] and not rows[-1]["prediction"]


def test_first_command_runs_as_it_was_written(demo, run, tmp_path):
    paths = {"model": demo.model, "input": demo.input, "temp": demo.cache}
    run(FIRST_COMMAND.format(**paths, out=tmp_path / "sft", logs=tmp_path / "logs"), code=0)
    assert (tmp_path / "sft" / "model.safetensors").is_file()
    assert list((tmp_path / "logs").rglob("events.out.tfevents.*"))


@pytest.mark.parametrize("recipe", ["deepspeed_zero3.yaml", "ddp.yaml --train_parts projector"])
def test_a_lone_rank_ends_with_its_launcher(demo, tmp_path, recipe):
    """kill -9 of the process that train.sh became: nothing goes on writing."""
    process = start(
        f"sh train.sh --input_dir {demo.input} --temp_dir {demo.cache} --model_name_or_path {demo.model} --output_dir "
        f"{tmp_path}/sft --logging_dir {tmp_path}/logs --logging_steps 1 --eval_strategy no --eval_on_start False "
        f"--config_file scripts/{recipe}"
    )
    output = list(itertools.takewhile(lambda line: not line.startswith("{'loss'"), process.stdout))
    others = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    assert process.wait() == -9, "".join(output[-30:])
    assert psutil.wait_procs(others, timeout=10)[1] == []


def test_a_model_without_states_is_published_or_refused_and_others_may_read_it(demo, run, tmp_path):
    """--save_only_model: nothing continues from it and nothing is lost; a rehearsal beside it may halve the batch."""
    out, umask = tmp_path / "sft", os.umask(0o027)
    command = (
        f"sh train.sh --input_dir {demo.input} --temp_dir {demo.cache} --model_name_or_path {demo.model} --output_dir "
        f"{out} --logging_dir {tmp_path}/logs --eval_strategy no --eval_on_start False --save_only_model True "
        "--save_steps 1 --config_file scripts/ddp.yaml --train_parts projector --gradient_accumulation_steps 1 "
        "--max_steps"
    )
    try:
        run(f"{command} 2", code=0)
    finally:
        os.umask(umask)
    weights = sorted(out.rglob("*.safetensors"))
    assert len(weights) == 5 and {file.stat().st_mode & 0o777 for file in weights} == {0o640}
    (out / "model.safetensors").unlink()
    done = run(f"{command} 2", code=0)
    assert "is the last step" in done.output and (out / "model.safetensors").is_file()
    done = run(f"{command} 3", code=2)
    assert f"error: {out}/checkpoint-2: found a model without the optimizer's states" in done.output
    assert f"--model_name_or_path {out}/checkpoint-2 and another --output_dir" in done.output
    done = run(f"{command} 3 --rehearse --per_device_train_batch_size 2", code=0)
    assert (out / "checkpoint-2" / "complete.json").is_file() and "Next: the run itself" in done.output


def parse(*flags):
    from train import parse

    return parse(["--output_dir", "somewhere", *flags])


def test_flags_of_both_generations_mean_the_same(monkeypatch):
    monkeypatch.setenv("BF16_ON_CPU", "1")
    for dtype, warmup in (("--torch_dtype", "--warmup_ratio"), ("--dtype", "--warmup_steps")):
        flags = [dtype, "float16", warmup, "0.1", "--logging_dir", "there", "--bf16", "False"]
        config, args, model_args, _ = parse(*flags)
        assert (model_args.dtype, args.warmup_steps, config.logging_dir) == ("float16", 0.1, "there")


def test_defaults_protect_the_answer(arithmetic):
    _, args, model_args, _ = parse("--attn_implementation", "sdpa")
    assert args.max_length is None and args.assistant_only_loss and model_args.dtype == arithmetic
    assert args.bf16 == (arithmetic == "bfloat16")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--learning_rat", "1"], r"unknown flag --learning_rat \(did you mean --learning_rate\?\)"),
        (["--max_len", "77"], "unknown flag --max_len"),
        (["--num_train_epochs", "many"], "invalid float value"),
        (["--prompt_text=hi"], "unknown flag --prompt_text=hi"),
        (["stray"], "stray"),
        (["--weigh_nothing", "1"], "unknown flag --weigh_nothing; "),  # nothing is near
        (["--language", "zh"], "unknown flag --language"),  # training makes no page
        (["--attn_implementation", "eager"], "found eager; expected sdpa"),  # the scorer's mask needs it
        (["--attn_implementation=kernels-community/flash-attn3"], "found kernels-community/flash-attn3; expected sdpa"),
    ],
)
def test_unknown_shortened_and_unusable_flags_are_errors(flags, message):
    with pytest.raises(UserError, match=message):
        parse(*flags)


def test_a_mistake_in_a_flag_ends_the_launcher_with_2(demo, run):
    done = run(f"sh train.sh --model_name_or_path {demo.model} --input_dir {demo.input} --temp_dir {demo.cache} --lr 1")
    assert done.code == 2 and "Traceback" not in done.output
    assert done.output.count("error: unknown flag --lr") == 1, done.output
