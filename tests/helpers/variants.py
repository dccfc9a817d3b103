"""Every look-alike of the hub's folder through 2-rank ZeRO-3, the save, bare transformers and validation. Slow.

python tests/helpers/variants.py [FOLDER]    # a line a variant; exit code 1 if one fails. 1.5 minutes each on 2 cores
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "helpers")]

import replica  # noqa: E402

BARE = """
import sys
from transformers import AutoProcessor, LlavaNextForConditionalGeneration
model, info = LlavaNextForConditionalGeneration.from_pretrained(sys.argv[1], output_loading_info=True)
AutoProcessor.from_pretrained(sys.argv[1])
print(len(info["missing_keys"]), "missing,", len(info["unexpected_keys"]), "unexpected,", model.dtype)
"""


def sh(command):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "NUM_PROCESSES": "2", "VIRTUAL_ENV": sys.prefix}
    environment["PATH"] = f"{sys.prefix}/bin:{environment['PATH']}"
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout.strip().splitlines(), done.stderr.strip().splitlines()


def main():
    work = Path(sys.argv[1] if sys.argv[1:] else tempfile.mkdtemp(prefix="variants-"))
    source = replica.build(work / "hub")
    replica.pictures(work / "input")
    failed = False
    for name in [*replica.VARIANTS, *replica.BROKEN]:
        started = time.perf_counter()
        model, out = replica.build_variant(source, work / name, name), work / f"{name}-sft"
        flags = f"--input_dir {work}/input --temp_dir {work}/cache --logging_dir {work}/logs".split()
        command = ["sh", "train.sh", *flags, "--model_name_or_path", str(model), "--output_dir", str(out)]
        command += ["--max_steps", "2", "--save_strategy", "no", "--eval_strategy", "no"]
        command += ["--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "1"]
        code, said, errors = sh(command)
        if name in replica.BROKEN:
            ok = code == 2 and "is missing: `hf download" in errors[-1]
            print(f"{name}: {'ok' if ok else 'FAILED'}: {errors[-1]}", flush=True)
        elif code:
            ok = False
            print(f"{name}: FAILED to train: {errors[-5:]}", flush=True)
        else:
            _, loaded, _ = sh([sys.executable, "-c", BARE, str(out)])
            code, said, errors = sh(
                ["sh", "validation.sh", *flags, "--model_name_or_path", str(out), "--report_dir", f"{work}/report"]
            )
            n = json.loads(said[-1])["n"] if code == 0 else errors[-3:]
            ok = loaded == ["0 missing, 0 unexpected, torch.bfloat16"] and n == 2
            seconds = time.perf_counter() - started
            print(f"{name}: {'ok' if ok else 'FAILED'}: {loaded}; validated {n} pictures; {seconds:.0f} s", flush=True)
        failed |= not ok
    sys.exit(failed)


if __name__ == "__main__":
    main()
