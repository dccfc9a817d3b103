#!/bin/sh
# Measure a checkpoint on the held-out pictures, on all GPUs of this machine (one process per GPU; no DeepSpeed).
#   sh validation.sh                                       the model that train.sh saved
#   sh validation.sh --model_name_or_path model            the untuned model
#   NUM_PROCESSES=2 sh validation.sh                       two GPUs (without a GPU: two processes on the CPU)
# Relative paths are this folder's, wherever it is started from.
cd "$(dirname "$0")" || exit 1
. scripts/environment.sh

# Each line adds a default before "$@", so that the command line wins.
set -- --model_name_or_path sft-llava-1.6-7b "$@"       # the checkpoint to measure
set -- --per_device_eval_batch_size 8 "$@"              # pictures per forward pass; halved automatically if they do not fit
set -- --report_dir logs/validation "$@"                # each checkpoint's report gets a folder in it

exec "$python" scripts/launch.py validation.py "$@"
