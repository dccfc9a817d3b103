"""Runs that end before their last step: by --early_stopping_patience, by --max_hours. What they publish and report."""

import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from animals.files import read_json
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


def measured(out, step):
    """The accuracies of evaluation after evaluation until `step`."""
    logs = read_json(out / f"checkpoint-{step}" / "trainer_state.json")["log_history"]
    return [log["eval_accuracy"] for log in logs if "eval_accuracy" in log]


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
    validation = f"sh validation.sh {where} --model_name_or_path {stopped.out} --per_device_eval_batch_size 32"
    done = run(validation, code=0)
    report, html = read_json(tmp_path / "sft" / "report.json"), (tmp_path / "sft" / "report.html").read_text()
    chosen, n = report["chosen"], report["n"] - 20
    assert (chosen["n_chosen_on"], chosen["n_others"], report["step"]) == (20, n, stopped.best)
    assert 20 * stopped.accuracy + n * chosen["accuracy_others"] == pytest.approx(report["correct"])
    assert "chosen as the best of its run on 20 of these pictures" in done.output
    assert f"on the others it is {chosen['accuracy_others']:.4f} (95 % interval" in done.output
    assert 'data-key="chosen.n_chosen_on">20<' in html and f'data-key="chosen.n_others">{n}<' in html
    run(f"{validation} --on_eval_pictures --eval_pictures 20 --language zh", code=0)
    chosen = read_json(tmp_path / "sft" / "report.json")["chosen"]
    assert (chosen["n_others"], chosen["accuracy_others"]) == (0, None)
    assert "这些就是本报告的全部图片" in (tmp_path / "sft" / "report.html").read_text()


def test_a_model_that_was_not_chosen_has_nothing_to_say():
    rows = [{"sha256": "a", "correct": True, "group": 0}]
    assert chosen_on({}, rows) is None
    assert chosen_on({"metric": "loss", "pictures": ["b"]}, rows) is None


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
    done = run(again.replace("patience 2", "patience 3"), code=2)
    assert "best_checkpoint was 'accuracy on 20 of" in done.output


def test_max_hours_saves_and_publishes_and_the_next_run_goes_on(demo, run, tmp_path):
    """On DDP, where the library would load nothing from the best checkpoint. The best by the loss is not the last."""
    out, last = tmp_path / "sft", "--max_steps 3 --eval_strategy no"
    parts = "--config_file scripts/ddp.yaml --train_parts projector --learning_rate 3e-2"
    start = command(demo, out, parts, last)
    done = run(f"{start} --max_hours 0.0001", code=0, NUM_PROCESSES=2)
    assert "stopped after step 1 of 3; `sh train.sh` again continues from there" in done.output
    assert same_model(out, out / "checkpoint-1") and not (out / "chosen.json").exists()
    (out / "chosen.json").write_text("{}")  # of an older model
    done = run(start, code=0, NUM_PROCESSES=2)
    assert f"resuming from {out}/checkpoint-1" in done.output
    assert same_model(out, out / "checkpoint-3") and not (out / "chosen.json").exists()
