"""More than one machine, and none but this one: 2-node ZeRO-3 by accelerate's launcher, and no call to any host."""

import os
import shutil
import socket
import subprocess
import sys

import pytest

from tests.conftest import ROOT, start

# The README's command for several machines.
COMMAND = (
    "accelerate launch --config_file=./scripts/deepspeed_zero3.yaml --deepspeed_multinode_launcher standard "
    "--num_machines 2 --num_processes 2 --machine_rank {rank} --main_process_ip {ip} --main_process_port {port} "
    "train.py --model_name_or_path {model} --input_dir {input} --temp_dir {temp} --output_dir {out} "
    "--logging_dir {out}-logs --per_device_train_batch_size 4 --gradient_accumulation_steps 2 --max_steps 2 "
    "--optim adamw_bnb_8bit --save_steps 2 --logging_steps 1"
)


@pytest.fixture
def machines():
    """Two network namespaces joined by a cable, each (prefix of a command, environment); loopback where not allowed.

    Yields (the two, the first one's address).
    """

    def ip(words, check=True):
        return subprocess.run(["ip", *words.split()], check=check, capture_output=True)

    names = [f"animals-{os.getpid()}-{i}" for i in (0, 1)]
    allowed = os.geteuid() == 0 and shutil.which("ip") and ip(f"netns add {names[0]}", check=False).returncode == 0
    if not allowed:
        yield [("", {}), ("", {})], "127.0.0.1"
        return
    try:
        ip(f"netns add {names[1]}")
        ip("link add cable0 type veth peer name cable1")
        for i, name in enumerate(names):
            ip(f"link set cable{i} netns {name}")
            for words in ("link set lo up", f"addr add 10.77.0.{i + 1}/24 dev cable{i}", f"link set cable{i} up"):
                ip(f"-n {name} {words}")
        yield [(f"ip netns exec {n} ", {"GLOO_SOCKET_IFNAME": f"cable{i}"}) for i, n in enumerate(names)], "10.77.0.1"
    finally:
        for name in names:
            ip(f"netns del {name}", check=False)


def test_two_machines_train_together(demo, machines, tmp_path):
    (both, ip), processes = machines, []
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    where = {"model": demo.model, "input": demo.input, "temp": demo.cache, "out": tmp_path / "sft"}
    (tmp_path / "ops" / "deepspeed_shm_comm").mkdir(parents=True)  # what a rank killed while compiling leaves:
    (tmp_path / "ops" / "deepspeed_shm_comm" / "lock").touch()  # torch would wait for ever until it goes
    for rank, (prefix, environment) in enumerate(both):
        command = prefix + COMMAND.format(rank=rank, ip=ip, port=port, **where)
        processes.append(start(command, OMP_NUM_THREADS=1, TORCH_EXTENSIONS_DIR=tmp_path / "ops", **environment))
    outputs = [process.communicate(timeout=3600)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs[0][-3000:] + outputs[1][-3000:]
    assert "4 per device x 2 accumulated x 2 CPU ranks = 16 pictures per step" in outputs[0]
    assert (tmp_path / "sft" / "model.safetensors").is_file()
    assert (tmp_path / "sft" / "checkpoint-2" / "complete.json").is_file()


def test_no_host_is_called(demo, run, tmp_path, monkeypatch):
    """Nothing in the environment says offline: train, validate, name a picture; nobody is asked anything."""
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    log, out = tmp_path / "hosts", tmp_path / "sft"
    guard = {"PYTHONPATH": str(ROOT / "tests" / "guard"), "GUARD_LOG": str(log)}
    where, logs = f"--input_dir {demo.input} --temp_dir {demo.cache}", f"--logging_dir {out}-logs"
    for command in (
        f"sh train.sh {where} --model_name_or_path {demo.model} --output_dir {out} {logs} --max_steps 1",
        f"sh validation.sh {where} --model_name_or_path {out} --report_dir {tmp_path} {logs}",
        f"python test.py {demo.input}/test_data --model_name_or_path {out} --output {tmp_path}/names.csv",
    ):
        run(command, **guard, code=0)
    assert not log.exists(), log.read_text()
    probe = [sys.executable, "-c", "import socket; socket.getaddrinfo('example.invalid', 80)"]
    subprocess.run(probe, env=os.environ | guard, capture_output=True)
    assert log.read_text() == "example.invalid\n", "the guard itself works"
