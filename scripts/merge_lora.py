"""Fold a LoRA adapter into a plain checkpoint.

python scripts/merge_lora.py sft-llava-1.6-7b --merge merged
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from animals.command import run
from animals.training.lora import merge


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("adapter", help="folder that `sh train.sh --use_peft` left, or a checkpoint-N in it")
    parser.add_argument("--merge", metavar="OUT", required=True, help="new folder for the plain checkpoint")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"], help="of the merged weights")
    args = parser.parse_args()
    merge(args.adapter, args.merge, args.dtype)
    print(f"wrote {args.merge}. Next:\n    sh validation.sh --model_name_or_path {args.merge}")


if __name__ == "__main__":
    run(main)
