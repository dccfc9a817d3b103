"""Train every other copy of the hub's folder with 2-rank ZeRO-3, save it, read it with bare transformers, score it.

python tests/helpers/variants.py [FOLDER]    # one line per copy; exit code 1 if one fails. 1.5 minutes each on 2 cores
"""

import json
import os
import shlex
import subprocess
import sys
import tempfile
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
    """-> exit code, lines on stdout, lines on stderr; of two ranks in bfloat16, as on GPUs."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "NUM_PROCESSES": "2", "BF16_ON_CPU": "1"}
    environment |= {"VIRTUAL_ENV": sys.prefix, "PATH": f"{sys.prefix}/bin:{os.environ['PATH']}"}
    done = subprocess.run(shlex.split(command), cwd=ROOT, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout.strip().splitlines(), done.stderr.strip().splitlines()


def main():
    work = Path(sys.argv[1] if sys.argv[1:] else tempfile.mkdtemp(prefix="variants-"))
    source = replica.build(work / "hub")
    replica.pictures(work / "input")
    flags = f"--input_dir {work}/input --temp_dir {work}/cache --logging_dir {work}/logs"
    steps = "--max_steps 2 --save_strategy no --eval_strategy no --gradient_accumulation_steps 1"
    steps += " --per_device_train_batch_size 1"
    failed = False
    for name in [*replica.VARIANTS, *replica.BROKEN]:
        model, out = replica.build_variant(source, work / name, name), work / f"{name}-sft"
        code, _, errors = sh(f"sh train.sh {flags} {steps} --model_name_or_path {model} --output_dir {out}")
        if name in replica.BROKEN:
            ok, found = code == 2 and "is missing: `hf download" in errors[-1], errors[-1]
        elif code:
            ok, found = False, f"could not train: {errors[-5:]}"
        else:
            _, loaded, _ = sh(f"'{sys.executable}' -c '{BARE}' {out}")
            code, printed, errors = sh(
                f"sh validation.sh {flags} --model_name_or_path {out} --report_dir {work}/report"
            )
            n = json.loads(printed[-1])["n"] if code == 0 else errors[-3:]
            ok = loaded == ["0 missing, 0 unexpected, torch.bfloat16"] and n == 2
            found = f"{loaded}; validated {n} pictures"
        print(f"{name}: {'ok' if ok else 'FAILED'}: {found}", flush=True)
        failed |= not ok
    sys.exit(failed)


if __name__ == "__main__":
    main()
