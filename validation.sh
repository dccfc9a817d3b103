#!/bin/sh
# Measure a checkpoint on the held-out pictures, on all GPUs it finds (one process each; no DeepSpeed).
#   sh validation.sh                                       what train.sh left
#   sh validation.sh --model_name_or_path model            the untuned model
#   NUM_PROCESSES=2 sh validation.sh                       two GPUs (without a GPU: two CPU ranks)
cd "$(dirname "$0")" || exit 1
. scripts/environment.sh

# Each line puts one flag before what was given on the command line, which therefore comes last and wins.
set -- --model_name_or_path sft-llava-1.6-7b "$@"       # the checkpoint to measure
set -- --per_device_eval_batch_size 8 "$@"              # pictures a forward pass; halved by itself if they do not fit
set -- --report_dir logs/validation "$@"                # a folder a checkpoint is made in it

exec "$python" scripts/launch.py validation.py "$@"
