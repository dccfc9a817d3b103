"""benchmarks/on_gpu.py on CPU ranks with the demo's model, so that it works on the day when there is a GPU."""

import re

import pytest


@pytest.mark.slow
def test_on_gpu_runs_on_cpu_ranks(demo, run, tmp_path):
    done = run(
        f"python benchmarks/on_gpu.py --rows projector --model_name_or_path {demo.model} --input_dir {demo.input} "
        f"--work {tmp_path}/work --effective_batch 8 --pictures 8 --rounds 1 --output {tmp_path}/on_gpu.md "
        '--train_flags "--max_steps 4 --eval_pictures 10"',
        NUM_PROCESSES=1,
    )
    assert done.code == 0, done.output[-3000:]
    table = (tmp_path / "on_gpu.md").read_text()
    assert "A try on CPU ranks" in table and "torch " in table
    for view, sizes, tokens in (("tiles", "4x2x1", 100), ("whole", "8x1x1", 60)):
        row = re.search(rf"\| projector \| {view} \| {sizes} \| ([\d.]+) \| ([\d.]+) \| ([\d,]+) \| no GPU \|", table)
        assert row, table
        seconds, pictures, rate = (float(cell.replace(",", "")) for cell in row.groups())
        assert seconds > 0 and pictures > 0 and rate > tokens * pictures
        assert re.search(rf"\| {view} \| [\d.]+ \| [\d.]+ \|", table), "scorer and generate()"
