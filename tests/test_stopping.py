"""Runs that end before their last step: by --early_stopping_patience, by --max_hours. What they publish and report."""

import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from animals.checkpoint.steps import check_resume, copy_model_to_output
from animals.command import UserError
from animals.files import read_json
from animals.scoring.report import read_report
from train import parse
from validation import chosen_on


def command(demo, out, *more):
    """Train what is already trained, at a rate that spoils it; steps of two pictures, one evaluation at each."""
    return (
        f"sh train.sh --model_name_or_path {demo.checkpoint} --input_dir {demo.input} --temp_dir {demo.cache} "
        f"--output_dir {out} --logging_dir {out}-logs --per_device_train_batch_size 2 --gradient_accumulation_steps 1 "
        "--max_steps 60 --logging_steps 50 --eval_steps 1 --save_steps 1 --save_total_limit 0 --eval_pictures 20 "
        f"--eval_on_start False --warmup_ratio 0 --learning_rate 3e-3 --vision_learning_rate 3e-3 {' '.join(more)}"
    )


def same_model(folder, other):
    one, two = (load_file(path / "model.safetensors") for path in (folder, other))
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def measured(out, step, metric="eval_accuracy"):
    """What evaluation after evaluation found until `step`."""
    logs = read_json(out / f"checkpoint-{step}" / "trainer_state.json")["log_history"]
    return [log[metric] for log in logs if metric in log]


@pytest.fixture(scope="module")
def stopped(demo, run, tmp_path_factory):
    """A run with a patience of two evaluations: its folder, its output, its last step and the best one."""
    out = tmp_path_factory.mktemp("stopped") / "sft"
    done = run(command(demo, out, "--early_stopping_patience 2"), code=0)
    last = max(int(path.name[11:]) for path in out.glob("checkpoint-*"))
    accuracies = measured(out, last)
    best = 1 + accuracies.index(max(accuracies))
    return SimpleNamespace(out=out, output=done.output, last=last, best=best, accuracy=max(accuracies))


def test_it_stops_and_publishes_the_best(stopped):
    assert stopped.last == stopped.best + 2 < 60
    assert f"stopped after step {stopped.last} of 60 by --early_stopping_patience 2" in stopped.output
    assert same_model(stopped.out, stopped.out / f"checkpoint-{stopped.best}")
    assert not same_model(stopped.out, stopped.out / f"checkpoint-{stopped.last}")
    chosen = read_json(stopped.out / "chosen.json")
    assert (chosen["step"], chosen["metric"], chosen["value"]) == (stopped.best, "accuracy", stopped.accuracy)
    assert len({*chosen["pictures"]}) == 20


def test_the_report_says_on_what_it_was_chosen(stopped, demo, run, tmp_path):
    where = f"--input_dir {demo.input} --temp_dir {demo.cache} --logging_dir {tmp_path}/logs --report_dir {tmp_path}"
    some = f"--model_name_or_path {stopped.out} --on_eval_pictures --eval_pictures 60 --per_device_eval_batch_size 30"
    done = run(f"sh validation.sh {where} {some}", code=0)
    (report, rows), html = read_report(tmp_path / "sft"), (tmp_path / "sft" / "report.html").read_text()
    pictures, chosen = read_json(stopped.out / "chosen.json")["pictures"], report["chosen"]
    others = [row["correct"] for row in rows if row["sha256"] not in pictures]
    assert (chosen["n_chosen_on"], chosen["n_others"], report["step"]) == (60 - len(others), len(others), stopped.best)
    assert chosen["accuracy_others"] == pytest.approx(sum(others) / len(others)) and 0 < len(others) < 60
    low, high = chosen["accuracy_others_ci95"]
    line = (
        f"chosen as the best of its run on {60 - len(others)} of these pictures, so its accuracy on them is probably "
    )
    line += f"a little too high; on the others it is {chosen['accuracy_others']:.4f} (95 % interval {low:.4f}"
    assert line in done.output
    for key, value in (("n_chosen_on", 60 - len(others)), ("n_others", len(others)), ("high", high)):
        assert f'<data value="{value}" data-key="chosen.{key}">' in html


def test_the_accuracy_of_none_is_none():
    rows = [{"sha256": "a", "correct": True, "group": 0}]
    assert chosen_on(set(), rows) is None and chosen_on({"b"}, rows) is None
    found = chosen_on({"a", "b"}, rows)
    assert found == {"n_chosen_on": 1, "n_others": 0, "accuracy_others": None, "accuracy_others_ci95": None}


def test_the_same_command_again_trains_nothing(stopped, demo, run):
    """A resumed run counts on: it stops where the other one did, and another patience is refused."""
    again = command(demo, stopped.out, "--early_stopping_patience 2")
    (stopped.out / "model.safetensors").unlink()
    done = run(again, code=0)
    assert f"checkpoint-{stopped.last} ended its run early" in done.output and "resuming" not in done.output
    assert same_model(stopped.out, stopped.out / f"checkpoint-{stopped.best}")
    shutil.rmtree(stopped.out / f"checkpoint-{stopped.last}")
    done = run(again, code=0)
    assert f"resuming from {stopped.out}/checkpoint-{stopped.last - 1}" in done.output
    assert f"stopped after step {stopped.last} of 60" in done.output
    assert same_model(stopped.out, stopped.out / f"checkpoint-{stopped.best}")
    record = read_json(stopped.out / "run.json")
    with pytest.raises(
        UserError, match=r"best_checkpoint was \['accuracy', 20, .*, 2\], is None \(the best one is chosen"
    ):
        check_resume({**record, "best_checkpoint": None}, stopped.out / f"checkpoint-{stopped.last}")
    args = SimpleNamespace(output_dir=str(stopped.out), load_best_model_at_end=False)
    copy_model_to_output(stopped.out / "checkpoint-1", args, {}, [])
    assert same_model(stopped.out, stopped.out / "checkpoint-1") and not (stopped.out / "chosen.json").exists()


def test_max_hours_saves_and_publishes_and_the_next_run_goes_on(demo, run, tmp_path):
    """On DDP, where the library would load nothing from the best checkpoint, which is the best by the loss."""
    out, parts = tmp_path / "sft", "--config_file scripts/ddp.yaml --train_parts projector --learning_rate 3e-2"
    start = command(demo, out, parts, "--max_steps 3 --load_best_model_at_end")
    done = run(f"{start} --max_hours 0.0001", code=0, NUM_PROCESSES=2)
    assert "--max_hours: a checkpoint is saved at the end of this step" in done.output
    assert "stopped after step 1 of 3; `sh train.sh` again continues from there" in done.output
    assert same_model(out, out / "checkpoint-1") and read_json(out / "chosen.json")["step"] == 1
    done = run(start, code=0, NUM_PROCESSES=2)
    assert f"resuming from {out}/checkpoint-1" in done.output
    losses, chosen = measured(out, 3, "eval_loss"), read_json(out / "chosen.json")
    assert (chosen["metric"], chosen["value"]) == ("loss", min(losses)) and len(losses) == 3
    assert same_model(out, out / f"checkpoint-{chosen['step']}") and chosen["step"] == 1 + losses.index(min(losses))
    assert not same_model(out / "checkpoint-2", out / "checkpoint-3")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--early_stopping_patience 0", "early_stopping_patience: found 0; expected a number from 1 to 1000"),
        ("--max_hours 0", "max_hours: found 0.0; expected a number from 0.0001"),
        ("--early_stopping_patience 2", "found --eval_strategy no .* --save_strategy steps --save_steps 500; expected"),
        ("--early_stopping_patience 2 --eval_strategy no --save_strategy no", "expected the same strategy"),
        ("--load_best_model_at_end --eval_strategy steps --eval_steps 2 --save_steps 4", "expected the same strategy"),
        ("--early_stopping_patience 2 --greater_is_better False", "greater_is_better: found it; expected no such flag"),
    ],
)
def test_mistakes_are_one_line_each(flags, message):
    with pytest.raises(UserError, match=rf"^.*{message}"):
        parse(["--output_dir", "somewhere", *flags.split()])


def test_what_is_no_mistake():
    """--rehearse all turns evaluation off; how many steps lie between evaluations is not read at the end of epochs."""
    words = ["--output_dir", "somewhere", "--early_stopping_patience", "2"]
    args = parse([*words, "--rehearse", "--eval_strategy", "no", "--save_strategy", "no"])[1]
    assert not args.load_best_model_at_end
    assert parse([*words, "--eval_strategy", "epoch", "--save_strategy", "epoch"])[1].load_best_model_at_end


def test_deepspeed_chooses_among_checkpoints_with_states(demo, run, tmp_path):
    done = run(command(demo, tmp_path / "sft", "--load_best_model_at_end --save_only_model"), code=2)
    assert done.output.count("error: ") == 1 and "error: --save_only_model: found the choice" in done.output
