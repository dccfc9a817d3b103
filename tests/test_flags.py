"""Every flag has an effect, or is refused: numbers, empty texts, dashes, TRL's own flags, trackers, typing mistakes."""

import dataclasses
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from animals import command
from animals.command import RANGES, UserError, with_underscores
from scripts.launch import read_flags, split_words
from tests.conftest import ROOT

LARGE = "1" + "0" * 30
NOT_ZERO = """per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps num_train_epochs
max_steps learning_rate adam_epsilon save_steps eval_steps logging_steps dataloader_prefetch_factor ddp_timeout lora_r
lora_alpha torch_empty_cache_steps examples_per_class"""
TOO_HIGH = {"learning_rate": "11", "max_excluded": "1.1", "warmup_ratio": "1.5", "near_duplicate_distance": "17"}
TOO_HIGH |= dict.fromkeys(("adam_beta1", "adam_beta2", "lora_dropout"), "1")


@pytest.mark.parametrize("flag", RANGES)
def test_the_launcher_refuses_numbers_outside_their_range(flag):
    (low, high), outside = RANGES[flag], ["0"] * (flag in NOT_ZERO.split()) + [TOO_HIGH.get(flag, LARGE)]
    assert type(low) is type(high), "both bounds have the flag's type"
    for value in ["-2", "nan", "inf", LARGE, "abc", "1e-3" if isinstance(low, int) else "-0.1", "", *outside]:
        for words in ([f"--{flag}={value}"], [f"--{flag.replace('_', '-')}", value]):
            with pytest.raises(UserError, match=rf"^.*--{flag}\b.*\Z"):  # one line
                read_flags(True, ["--learning_rate", "2e-5", *words])


def test_what_is_right_is_accepted():
    words = "--max_steps -1 --save_steps 0.1 --eval_steps 100 --warmup-ratio 0.03 --warmup_steps 5 --save_total_limit 0"
    words += " --eval_pictures 0 --output-dir elsewhere --max_grad_norm 0"
    args = read_flags(True, words.split())
    assert (args.max_steps, args.save_steps, args.output_dir, args.warmup_ratio) == (-1, 0.1, "elsewhere", 0.03)


@pytest.mark.parametrize("flag", ["input_dir", "temp_dir", "logging_dir", "output_dir", "model_name_or_path", "answer"])
def test_no_path_is_empty(flag):
    with pytest.raises(UserError, match=f"^--{flag}: found an empty text"):
        read_flags(True, [f"--{flag}", ""])
    assert read_flags(True, ["--prompt", ""]).prompt == "", "no question: only the picture"


def test_dashes_are_underscores_in_flags_alone():
    words = ["--max-steps=a-b", "--temp-dir", "a-b", "-h", "--", "--my-cat.jpg"]
    assert with_underscores(words) == ["--max_steps=a-b", "--temp_dir", "a-b", "-h", "--", "--my-cat.jpg"]
    script, file, flags = split_words(["train.py", "--config-file", "scripts/ddp.yaml", "--max-steps", "1"])
    assert (script, file, flags) == ("train.py", "scripts/ddp.yaml", ["--max_steps", "1"])


@pytest.fixture(scope="module")
def parse():
    """train.py's parse(), on words after train.sh's own; -> the message of its UserError, or None."""
    import train

    lines = [line for line in (ROOT / "train.sh").read_text().splitlines() if line.startswith("set -- ")]
    own = [word.strip('"') for line in lines for word in line.split(' "$@"')[0].split()[2:]]
    assert own[:2] == ["--model_name_or_path", "model"]

    def message(words):
        try:
            train.parse([*own, "--use_cpu", *words.split()])
        except UserError as error:
            return str(error)

    return message


# What the trainer follows. A flag that a new release of transformers or TRL brings is in none of the tables.
FOLLOWED = """output_dir per_device_train_batch_size num_train_epochs max_steps learning_rate lr_scheduler_type
lr_scheduler_kwargs warmup_steps optim optim_args weight_decay adam_beta1 adam_beta2 adam_epsilon optim_target_modules
gradient_accumulation_steps average_tokens_across_devices max_grad_norm label_smoothing_factor bf16 tf32
activation_checkpointing activation_checkpointing_kwargs gradient_checkpointing gradient_checkpointing_kwargs
torch_compile torch_compile_backend torch_compile_mode use_cache neftune_noise_alpha torch_empty_cache_steps
logging_strategy logging_steps logging_first_step log_on_each_node include_num_input_tokens_seen log_level
log_level_replica disable_tqdm report_to eval_strategy eval_steps eval_delay per_device_eval_batch_size eval_on_start
save_only_model save_strategy save_steps save_total_limit load_best_model_at_end metric_for_best_model
ignore_data_skip restore_callback_states_from_checkpoint full_determinism seed data_seed use_cpu
dataloader_drop_last dataloader_num_workers dataloader_pin_memory dataloader_prefetch_factor dataloader_in_order
dataloader_multiprocessing_context train_sampling_strategy ddp_find_unused_parameters ddp_bucket_cap_mb
ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout deepspeed debug skip_memory_metrics
resume_from_checkpoint local_rank assistant_only_loss loss_type activation_offloading
model_name_or_path dtype attn_implementation use_peft load_in_8bit load_in_4bit"""
TRACKERS = "run_name project trackio_space_id trackio_bucket_id trackio_static_space_id"


def test_every_flag_of_the_libraries_is_in_one_table():
    from trl import ModelConfig, SFTConfig

    from animals.training.preflight import NEEDED, REFUSED

    ours = " ".join([FOLLOWED, TRACKERS, *REFUSED, *NEEDED.values()]).split()
    theirs = [field.name for kind in (SFTConfig, ModelConfig) for field in dataclasses.fields(kind) if field.init]
    assert sorted(ours) == sorted(theirs)


VALUES = {  # of the refused flags that take no True or False, another value than the default
    "max_length": "64", "packing_strategy": "wrapped", "pad_to_multiple_of": "8", "truncation_mode": "keep_end",
    "dataset_text_field": "caption", "dataset_kwargs": "{}", "length_column_name": "length", "label_names": "labels",
    "dataset_num_proc": "2", "chat_template_path": "x.jinja", "eos_token": "</s>", "pad_token": "<unk>",
    "model_init_kwargs": "{}", "model_revision": "v1", "router_aux_loss_coef": "0.1", "accelerator_config": "{}",
    "eval_accumulation_steps": "2", "include_for_metrics": "loss", "fsdp_config": "{}", "lora_task_type": "SEQ_CLS",
    "hub_strategy": "end",
}  # fmt: skip
DEFAULT_TRUE = ("logging_nan_inf_filter", "eval_do_concat_batches")


def test_flags_without_effect_are_refused_all_at_once(parse):
    from animals.training.preflight import REFUSED

    names = [name for name in " ".join(REFUSED).split() if name not in ("liger_kernel_config", "parallelism_config")]
    said = parse(" ".join(f"--{name} {VALUES.get(name, name not in DEFAULT_TRUE)}" for name in names)).splitlines()
    assert sorted(line.split()[0] for line in said) == sorted(f"--{name}:" for name in names)
    assert "--max_length: found it; expected no such flag: each picture is a sequence of its own" in said[0]
    assert parse("--packing False --max_steps 5 --do_train False") is None, "the defaults are accepted"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--lora_r 8 --use_dora", "--lora_r: found it without --use_peft"),
        ("--use_peft --lora_r 8", None),
        ("--use_peft --use_bnb_nested_quant", "--use_bnb_nested_quant: found it without --load_in_4bit"),
        ("--push_to_hub --hub_model_id me/cats", "--push_to_hub: found it; expected no such flag: it would push"),
        ("--run_name cats", "--run_name: found it with --report_to tensorboard"),
        ("--report_to none", None),
        ("--report_to cats", "--report_to: found cats; expected azure_ml, clearml"),
        ("--report_to tensorboard,clearml", "--report_to clearml: found no Python package for it"),
        ("--report_to tensorboard clearml", "--report_to clearml: found no Python package for it"),
        ("--report_to tensorboard, --run-name x", "--run_name: found it"),
        ("--save_strategy best", "--metric_for_best_model: found None; expected accuracy, macro_f1, loss"),
        ("--save_strategy best --metric_for_best_model f1", "--metric_for_best_model: found f1"),
        ("--save_strategy best --metric_for_best_model eval_macro_f1", None),
        ("--save-steps 0.5 --max-steps 4", None),
        ("--learning_rate nan --packing", "--learning_rate: found nan; expected a number from 1e-12 to 10\n--packing"),
        ("--lora_rank 8", "unknown flag --lora_rank (did you mean --lora_r?)"),
        ("--learnig_rate 1", "(did you mean --learning_rate?)"),
        ("--num-epochs 1", "unknown flag --num_epochs (did you mean --num_train_epochs?)"),
        ("--input-dirs x", "(did you mean --input_dir?)"),
        ("--save_limit 1", "(did you mean --save_total_limit?)"),
        ("--fish 1", "unknown flag --fish; `python"),
    ],
)  # fmt: skip
def test_what_train_says(parse, words, message):
    said = parse(words)
    assert said is None if message is None else said and said.startswith(message) or message in said


@pytest.mark.parametrize(
    ("words", "messages"),
    [
        ("--max_steps abc", ["argument --max_steps: invalid int value: 'abc'"]),
        ("--num_train_epochs nan --save-steps=0", ["--num_train_epochs: found nan", "--save_steps: found 0.0"]),
        ("--output_dir= --learning_rate -1", ["--output_dir: found an empty text", "--learning_rate: found -1.0"]),
        ("--config_file nowhere.yaml", [f"--config_file nowhere.yaml (looked up as {ROOT}/nowhere.yaml): not found"]),
        ("--temp_dir /proc/nothing/cache", ["--temp_dir /proc/nothing/cache: found /proc, where no file"]),
    ],
)  # fmt: skip
def test_a_careless_command_line_ends_at_once(run, words, messages, tmp_path):
    """As a user types it; nothing after it speaks of going on, and torch, which ends the command here, is not asked."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise SystemExit('torch was imported')")
    (tmp_path / "torch" / "version.py").write_text("cuda = None")
    done = run(f"sh train.sh {words}", PYTHONPATH=tmp_path, code=2)
    lines = done.output.splitlines()
    assert len(lines) == len(messages) and "sh train.sh" not in done.output, done.output
    assert all(line.startswith(f"error: {message}") for line, message in zip(lines, messages, strict=True)), lines


def test_logs_that_cannot_be_written_are_found_before_a_rank_starts(demo, run, tmp_path):
    where = f"--model_name_or_path {demo.model} --input_dir {demo.input} --temp_dir {demo.cache}"
    for script, more in (("train.sh", f"--output_dir {tmp_path}/sft"), ("validation.sh", f"--report_dir {tmp_path}")):
        done = run(f"sh {script} {where} {more} --logging_dir /proc/nothing/logs", code=2)
        errors = [line for line in done.output.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1 and "--logging_dir /proc/nothing/logs: found /proc, where" in errors[0], done.output


def test_relative_paths_are_named_with_the_place_where_they_were_looked_up(run):
    done = run("sh -c 'cd tests && sh ../train.sh --input_dir helpers/pets --model_name_or_path helpers/tiny'", code=2)
    for name in ("pets", "tiny"):
        assert f"helpers/{name} (looked up as {ROOT}/helpers/{name})" in done.output
    done = run("python test.py nowhere/cat.jpg --model_name_or_path temp/demo/model", code=2)
    assert f"nowhere/cat.jpg (looked up as {ROOT}/nowhere/cat.jpg): not found" in done.output
    done = run("python scripts/baselines.py nowhere/report", code=2)
    assert f"nowhere/report (looked up as {ROOT}/nowhere/report): found no readable report" in done.output


@pytest.mark.parametrize("script", ["data_process_utils.py", "test.py x.jpg", "validation.py", "scripts/audit.py"])
def test_a_missing_package_is_one_line(script, tmp_path):
    done = subprocess.run([sys.executable, "-S", *script.split()], cwd=ROOT, capture_output=True, text=True)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and line.startswith("error: found no Python package ") and "pip install -r" in line


def test_a_mistake_of_ours_keeps_its_traceback():
    for code in ("import animals.command, no_such_module", "import animals.command, animals.nothing"):
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 1 and "Traceback" in done.stderr
    lines = (ROOT / "requirements.txt").read_text().split()
    brings = metadata.packages_distributions()
    found = {name.lower() for module in command.PACKAGES.split() for name in brings.get(module, [])}
    assert {line.split("==")[0].lower() for line in lines} <= found


def test_another_python_is_one_line():
    assert command.python_problem((3, 11, 0)) == command.python_problem((3, 14, 9)) == ""
    for version in ((3, 10, 13), (3, 15, 0)):
        found = f"found Python 3.{version[1]} ({sys.executable}); expected 3.11"
        assert command.python_problem(version).startswith(found)


@pytest.mark.parametrize("script", ["scripts/launch.py train.py", "data_process_utils.py", "test.py x.jpg"])
def test_an_old_python(script):
    places = [Path("/usr/bin"), *Path.home().glob(".pyenv/versions/*/bin")]
    old = [place / f"python3.{n}" for n in (8, 9, 10) for place in places if (place / f"python3.{n}").is_file()]
    if not old:
        pytest.skip("this machine has no Python from 3.8 to 3.10")
    for path in old:
        done = subprocess.run([path, *script.split()], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 2 and done.stderr.startswith("error: found Python 3."), done.stderr
        assert len(done.stderr.splitlines()) == 1


def test_a_checkout_has_no_crlf(tmp_path):
    clone = ["git", "-c", "core.autocrlf=true", "clone", "--quiet", "--depth=1", f"file://{ROOT}", tmp_path / "repo"]
    if subprocess.run(clone, capture_output=True).returncode:
        pytest.skip("this folder is no repository, or there is no git")
    scripts = [*Path(tmp_path, "repo").glob("*.sh"), *Path(tmp_path, "repo", "scripts").iterdir()]
    assert len(scripts) > 8 and not [path for path in scripts if b"\r" in path.read_bytes()]


def test_going_on_is_promised_only_where_there_is_a_checkpoint(demo, tmp_path):
    """Two ranks that end with 3, started by the launcher's own function."""
    (tmp_path / "rank.py").write_text("raise SystemExit(3)")
    code = "import sys; from scripts import launch; script, *flags = sys.argv[1:]\n"
    code += "args = launch.read_flags(True, flags)\n"
    code += "launch.start_ranks(args, True, 'scripts/ddp.yaml', 2, script, flags, True)"
    for flags, promised in (
        ([f"--output_dir={tmp_path}/sft"], ""),
        ([f"--output_dir={demo.checkpoint}"],
         f"; `sh train.sh` with the same flags continues from {demo.checkpoint}/c"),
        ([f"--output_dir={demo.checkpoint}", "--rehearse"], ""),
    ):  # fmt: skip
        command = [sys.executable, "-c", code, tmp_path / "rank.py", *flags]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        line = next(line for line in done.stderr.splitlines() if line.startswith("error: rank "))
        assert done.returncode == 3 and line.partition("stand above")[2].startswith(promised), done.stderr
        assert bool(promised) == ("continues" in line)
