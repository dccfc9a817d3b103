"""Kill a run, cut its files short, give it a bad loss: no work is lost, and a message says what happened.

`sh tests/helpers/soak.sh` kills each run 20 times, on 1 and 2 ranks.
"""

import contextlib
import functools
import json
import os
import random
import shutil
import signal
import threading
import time
from types import SimpleNamespace

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from animals.checkpoint.steps import check_resume, delete_incomplete, missing_files, newest_complete
from animals.command import UserError
from animals.files import read_json
from tests.conftest import sh, start

STEPS = 24


def command(demo, out, *more):
    return (
        f"sh train.sh --model_name_or_path {demo.model} --input_dir {demo.input} --temp_dir {demo.cache} "
        f"--output_dir {out} --logging_dir {out}-logs --max_steps {STEPS} --save_steps 3 --save_total_limit 2 "
        f"--logging_steps 1 --per_device_train_batch_size 8 --gradient_accumulation_steps 1 --eval_strategy no "
        f"--learning_rate 1e-3 --vision_learning_rate 1e-3 {' '.join(more)}"
    )


def run_until(line, command, then, **environment):
    """Start command, call then(process) when a line of its output starts with `line`. -> (exit code, output)"""
    process = start(command, **environment)
    guard = threading.Timer(3600, process.kill)
    guard.start()
    output = ""
    try:
        for text in process.stdout:
            output += text
            if text.startswith(line) and then:
                then(process)
                then = None
        return process.wait(), output
    finally:
        guard.cancel()


@pytest.fixture(scope="module")
def uninterrupted_on(demo, run, tmp_path_factory):
    """-> a function of the number of ranks: output_dir of a run that nothing has interrupted."""

    @functools.cache
    def finish(ranks):
        out = tmp_path_factory.mktemp(f"uninterrupted-{ranks}") / "sft"
        done = run(command(demo, out), NUM_PROCESSES=ranks, code=0)
        assert len(done.output.splitlines()) < 200 and "Warning" not in done.output
        return out

    return finish


def wait_for_a_save(out, process):
    """Until the run writes a checkpoint that it began after this call, and another one is complete."""
    started = time.time()
    while process.poll() is None:
        with contextlib.suppress(FileNotFoundError):  # a folder that is deleted meanwhile
            incomplete = [path for path in out.glob("checkpoint-*") if missing_files(path)]
            if newest_complete(out)[0] and any(path.stat().st_mtime >= started for path in incomplete):
                return
        time.sleep(0.002)


@pytest.mark.parametrize(
    ("ranks", "saving"),
    [pytest.param(1, False, marks=pytest.mark.slow), pytest.param(2, False, marks=pytest.mark.slow), (2, True)],
    ids=["1", "2", "2-saving"],
)
def test_killed_and_restarted_ends_with_the_same_bits(demo, uninterrupted_on, ranks, saving, tmp_path, request):
    """kill -9 and SIGTERM in turn after the first step, or always -9 and while it saves; the last start is left alone.

    saving: with --save_total_limit 1, and a complete checkpoint is there after each kill.
    """
    out, rng, outputs, incomplete = tmp_path / "sft", random.Random(0), [], 0
    run = command(demo, out, *(["--save_steps 1 --save_total_limit 1"] if saving else []))
    for kill in range(request.config.getoption("--kills")):
        number = signal.SIGTERM if kill % 2 == 0 and not saving else signal.SIGKILL

        def end(process, number=number, most=(0.3 if kill else 0) if saving else 4):
            if saving:
                wait_for_a_save(out, process)
            time.sleep(rng.uniform(0, most))
            process.send_signal(number)

        code, output = run_until("{'loss'", run, end, NUM_PROCESSES=ranks)
        outputs.append(output)
        newest, passed_over = newest_complete(out)
        if code == 0:  # the run was faster than the signal
            shutil.rmtree(out)
        elif number == signal.SIGTERM:
            assert code == 143, output[-3000:]
            assert f"stopped after step {newest.rsplit('-', 1)[1]}" in output and "{'loss'" in output
        else:
            assert code == -9
            assert newest or not saving, output[-3000:]
            incomplete += len(passed_over)
    assert incomplete or not saving, "no kill met a checkpoint that was being written"
    code, output = run_until("nothing", run, None, NUM_PROCESSES=ranks)
    assert code == 0, output[-3000:]
    assert any("resuming from" in text for text in [*outputs[1:], output])
    ours, theirs = (folder / "model.safetensors" for folder in (out, uninterrupted_on(ranks)))
    assert ours.read_bytes() == theirs.read_bytes()
    assert not (out / ".saving").exists() and newest_complete(out)[1] == []


@pytest.mark.parametrize(
    ("ranks", "signals"),
    [
        (2, [signal.SIGTERM, signal.SIGINT]),
        pytest.param(2, [signal.SIGTERM] * 10, marks=pytest.mark.slow),
        pytest.param(1, [signal.SIGINT] * 5, marks=pytest.mark.slow),
    ],
)
def test_a_signal_to_every_process_saves(demo, tmp_path, ranks, signals):
    """As from systemd. Data workers get it, too, and a rank twice: the launcher passes it on. Then the run goes on."""
    flags = f"--dataloader_num_workers 2 --save_steps 100 --max_steps {8 + 4 * len(signals)}"
    run, rng = command(demo, tmp_path / "sft", flags), random.Random(0)
    for number in signals:
        everyone = []

        def end(process, number=number, everyone=everyone):
            time.sleep(rng.uniform(0, 1))
            launcher = psutil.Process(process.pid)
            everyone += [launcher, *launcher.children(recursive=True)]
            for one in everyone:
                one.send_signal(number)

        code, output = run_until("{'loss'", run, end, NUM_PROCESSES=ranks)
        assert code == 128 + number, output[-3000:]
        newest, passed_over = newest_complete(tmp_path / "sft")
        assert f"stopped after step {newest.rsplit('-', 1)[1]}" in output and not passed_over
        assert len(everyone) >= 3 * ranks and psutil.wait_procs(everyone, timeout=10)[1] == []
    code, output = run_until("nothing", run, None, NUM_PROCESSES=ranks)
    assert code == 0 and "resuming from" in output, output[-3000:]


@pytest.mark.parametrize("saved", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_dead_rank_ends_the_run_and_says_so(demo, tmp_path, saved):
    out = tmp_path / "sft"

    def kill_one(process):
        while saved and not newest_complete(out)[0]:
            time.sleep(0.01)
        ranks = [p for p in psutil.Process(process.pid).children() if "train.py" in " ".join(p.cmdline())]
        ranks[1].kill()

    run = command(demo, out, f"--save_steps {1 if saved else 100}")
    code, output = run_until("{'loss'", run, kill_one, NUM_PROCESSES=2)
    assert code == 137
    last = output.strip().splitlines()[-1]
    assert last.startswith("error: rank 1 was killed by signal 9")
    assert last.endswith(f"`sh train.sh` with the same flags continues from {newest_complete(out)[0]}") == saved


def test_two_runs_do_not_share_an_output_folder(demo, tmp_path):
    """The second training, rehearsal or dry run is refused; the first goes on to its end."""
    run, refused = command(demo, tmp_path / "sft", "--config_file scripts/ddp.yaml --train_parts projector"), []

    def start_again(process):
        refused.extend(sh(f"{run} {more}", code=2).output for more in ("", "--rehearse", "--dry_run"))

    code, output = run_until("{'loss'", run, start_again)
    line = f"error: {tmp_path}/sft: found another run that writes to it; expected none; wait until it ends, or choose "
    assert refused == [f"{line}another --output_dir\n"] * 3
    assert code == 0 and sorted(path.name for path in tmp_path.iterdir()) == ["sft", "sft-logs"], output[-3000:]


def test_balanced_micro_batches_in_bfloat16_resume_to_the_bit(demo, run, tmp_path):
    flags = "--gradient_accumulation_steps 2 --max_steps 4 --save_steps 2 --bf16 True"
    run(command(demo, tmp_path / "all", flags), BF16_ON_CPU=1, code=0)
    shutil.copytree(tmp_path / "all" / "checkpoint-2", tmp_path / "half" / "checkpoint-2")
    done = run(command(demo, tmp_path / "half", flags), BF16_ON_CPU=1, code=0)
    assert "half/checkpoint-2" in done.output, done.output[-3000:]
    complete, half = (tmp_path / name / "model.safetensors" for name in ("all", "half"))
    assert complete.read_bytes() == half.read_bytes()
    assert {value.dtype for value in load_file(half).values()} == {torch.bfloat16}


def test_no_broken_checkpoint_is_resumed_and_none_hides_a_good_one(uninterrupted_on, tmp_path):
    """Each file of the newest checkpoint in turn is cut short, then removed."""
    newest, _ = newest_complete(str(uninterrupted_on(2)))
    assert newest.endswith(f"checkpoint-{STEPS}")
    files = [os.path.relpath(os.path.join(d, f), newest) for d, _, names in os.walk(newest) for f in names]
    assert len(files) > 10 and any("global_step" in name for name in files)
    older = uninterrupted_on(2) / f"checkpoint-{STEPS - 3}"
    for name in files:
        for harm in ("cut", "remove"):
            copy = tmp_path / "run"
            shutil.copytree(older, copy / older.name, copy_function=os.link)
            shutil.copytree(newest, copy / f"checkpoint-{STEPS}", copy_function=os.link)
            victim = copy / f"checkpoint-{STEPS}" / name
            content = victim.read_bytes()
            victim.unlink()  # a link: writing would harm the other runs' file
            if harm == "cut":
                victim.write_bytes(content[:-1])
            found, passed_over = newest_complete(str(copy))
            assert found == str(copy / older.name), (name, harm)
            assert len(passed_over) == 1 and f"checkpoint-{STEPS}" in passed_over[0]
            delete_incomplete(copy)  # as the next save does; rotation would keep it as the newest
            assert os.listdir(copy) == [older.name]
            shutil.rmtree(copy)


def test_changed_essentials_are_named(uninterrupted_on, tmp_path):
    newest, _ = newest_complete(str(uninterrupted_on(2)))
    record = read_json(os.path.join(newest, "run.json"))
    check_resume(record, newest)
    with pytest.raises(UserError, match="world_size was 2, is 4 .* effective_batch was 16, is 32"):
        check_resume({**record, "world_size": 4, "effective_batch": 32}, newest)
    with pytest.raises(UserError, match="vision_learning_rate was 0.001, is 0.0002 .* data was"):
        check_resume({**record, "data": "other", "config": {**record["config"], "vision_learning_rate": 2e-4}}, newest)
    lora = {**record, "model": {**record["model"], "use_peft": True}}  # an older version recorded all parts
    (tmp_path / "run.json").write_text(json.dumps(lora))
    check_resume({**lora, "config": {**record["config"], "train_parts": "none"}}, tmp_path)
    with pytest.raises(UserError, match="train_parts was .*, is 'vision'"):
        check_resume({**lora, "config": {**record["config"], "train_parts": "vision"}}, tmp_path)


def test_a_bad_loss_names_step_and_pictures(demo, run, tmp_path):
    model = shutil.copytree(demo.model, tmp_path / "model")
    for file in model.glob("*.safetensors"):
        weights = load_file(file)
        for name in [name for name in weights if name.endswith("lm_head.weight")]:
            weights[name][:] = float("nan")
        save_file(weights, file, {"format": "pt"})
    bad = SimpleNamespace(model=model, input=demo.input, cache=demo.cache)
    done = run(
        command(bad, tmp_path / "sft", "--dataloader_num_workers 2 --eval_on_start False"), NUM_PROCESSES=2, code=2
    )
    assert "error: step 1: the loss is nan on " in done.output and str(demo.input) in done.output


def test_accuracy_while_training_is_validations(demo, run, tmp_path):
    flags = "--eval_strategy steps --eval_steps 2 --save_steps 2 --max_steps 2 --eval_pictures 60"
    best = "--load_best_model_at_end --metric_for_best_model accuracy"
    done = run(command(demo, tmp_path / "sft", flags, best).replace("--eval_strategy no", ""), NUM_PROCESSES=2, code=0)
    *_, line = [line for line in done.output.splitlines() if "'eval_accuracy'" in line]  # the last one
    logged = float(line.split("'eval_accuracy': '")[1].split("'")[0])
    done = run(
        f"sh validation.sh --model_name_or_path {tmp_path}/sft/checkpoint-2 --input_dir {demo.input} "
        f"--temp_dir {demo.cache} --on_eval_pictures --eval_pictures 60 --report_dir {tmp_path} "
        f"--logging_dir {tmp_path}"
    )
    report = json.loads(done.output.strip().splitlines()[-1])
    assert report["n"] == 60 and report["accuracy"] == pytest.approx(logged, abs=1e-4)
