"""benchmarks/on_gpu.py on CPU ranks with the demo's model, so that it works on the day when there is a GPU."""

import re

import pytest


@pytest.mark.slow
def test_on_gpu_runs_on_cpu_ranks(demo, run, tmp_path):
    command = (
        f"python benchmarks/on_gpu.py --model_name_or_path {demo.model} --input_dir {demo.input} --effective_batch 8 "
        f"--work {tmp_path}/work --pictures 8 --rounds 1 --output {tmp_path}/on_gpu.md "
        '--train_flags "--max_steps 4 --eval_pictures 10" --rows'
    )
    done = run(f"{command} everything", code=2)
    names = ["full, 4 x 2", "full, 8 x 1", "lora, 4 x 2", "projector, 4 x 2"]
    assert str([f"{view}, {name}" for view in ("tiles", "whole") for name in names]) in done.output
    run(f"{command} 'tiles, full, 8 x 1' 'whole, projector'", NUM_PROCESSES=1, code=0)
    table = (tmp_path / "on_gpu.md").read_text()
    assert "A try on CPU ranks" in table and "torch " in table
    for row, tokens in (("tiles, full, 8 x 1", 100), ("whole, projector, 4 x 2", 60)):
        cells = re.search(rf"^{row} +([\d.]+) +([\d.]+) +([\d,]+) +(?:no GPU +){{3}}([\d.]+)$", table, re.M)
        assert cells, table
        seconds, pictures, rate, host = (float(cell.replace(",", "")) for cell in cells.groups())
        assert pictures == pytest.approx(8 / seconds, rel=0.05) and rate > tokens * pictures and host > 0
        assert re.search(rf"\| {row[:5]} \| [\d.]+ \| [\d.]+ \|", table), "scorer and generate()"
