"""Add a LoRA adapter to the weights of its base model, as a plain checkpoint.

python scripts/merge_lora.py sft-llava-1.6-7b --merge merged
"""

import os
import shlex
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from animals.checkpoint.check import adapter_config, require_checkpoint
from animals.checkpoint.load import load_model, load_processor
from animals.checkpoint.save import SHARD_SIZE, add_other_files
from animals.checkpoint.steps import CHOSEN
from animals.checkpoint.task import read_task
from animals.command import Parser, UserError, run


def merge(adapter, out, dtype="bfloat16"):
    """Write base + adapter as a plain checkpoint to the folder `out`, which must be new or empty."""
    if adapter_config(adapter) is None:
        raise UserError(f"{adapter}: found no adapter_config.json; expected what `sh train.sh --use_peft` leaves")
    if os.path.exists(out) and os.listdir(out):
        raise UserError(f"--merge {out}: found files there; expected a new folder; name another one")
    require_checkpoint(adapter)
    model = load_model(adapter, dtype).merge_and_unload(safe_merge=True)
    model.save_pretrained(out, max_shard_size=SHARD_SIZE)
    add_other_files(out, adapter, load_processor(adapter), read_task(adapter))
    if (chosen := Path(adapter, CHOSEN)).is_file():  # from it validation.sh knows the pictures on which it was chosen
        shutil.copy(chosen, out)


def main():
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("adapter", help="folder that `sh train.sh --use_peft` left, or a checkpoint-N in it")
    parser.add_argument("--merge", metavar="OUT", required=True, help="new folder for the plain checkpoint")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"], help="of the merged weights")
    args = parser.parse_args()
    merge(args.adapter, args.merge, args.dtype)
    print(f"wrote {args.merge}. Next:\n    sh validation.sh --model_name_or_path {shlex.quote(args.merge)}")


if __name__ == "__main__":
    run(main)
