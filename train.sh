#!/bin/sh
# Fine-tune on all GPUs of this machine.
#   sh train.sh                              with the flags below
#   sh train.sh --num_train_epochs 3         the command line wins over them
#   sh train.sh --use_peft --learning_rate 2e-4             LoRA: small adapters; see animals/training/lora.py, also for QLoRA on one GPU
#   sh train.sh --train_parts projector --learning_rate 1e-3 --config_file scripts/ddp.yaml    the projector alone; training/parts.py
#   sh train.sh --rehearse all               find the fastest recipe on this machine; then the next line, for that one
#   sh train.sh --rehearse                   measure memory, disk and hours on this machine first, in minutes
#   NUM_PROCESSES=2 sh train.sh              two GPUs (without a GPU: two processes on the CPU)
# Relative paths are this folder's, wherever it is started from.
cd "$(dirname "$0")" || exit 1
. scripts/environment.sh

# Each line adds a default before "$@", so that the command line wins.
set -- --model_name_or_path model "$@"                  # folder with the files of llava-hf/llava-v1.6-mistral-7b-hf
set -- --per_device_train_batch_size 4 "$@"             # the micro-batch: pictures per GPU in one forward pass
set -- --gradient_accumulation_steps 4 "$@"             # micro-batches per step; 4 x 4 x 4 GPUs = 64 pictures per step
set -- --output_dir sft-llava-1.6-7b "$@"               # the result, a plain Hugging Face checkpoint, and checkpoint-N/
set -- --torch_dtype bfloat16 "$@"                      # load the weights in bfloat16 (today's name: --dtype)
set -- --gradient_checkpointing "$@"                    # recompute activations in the backward pass instead of keeping them
set -- --train_sampling_strategy batch_rebalance "$@"   # a similar number of tokens in all micro-batches: less padding (training/batches.py)
set -- --num_train_epochs 1 "$@"                        # how often each training picture is used
set -- --save_strategy "steps" "$@"                     # save checkpoints every --save_steps steps
set -- --save_steps 100 "$@"                            # a checkpoint every 100 steps (about 61 GB each for the 7B)
set -- --learning_rate 2e-5 "$@"                        # the highest learning rate, reached after the warm-up
set -- --vision_learning_rate 2e-6 "$@"                 # a tenth for the vision tower, as those did who trained LLaVA-1.6 (scripts/README.md)
set -- --save_total_limit 5 "$@"                        # keep the newest 5 checkpoints, delete older ones
set -- --lr_scheduler_type cosine "$@"                  # cosine decay to 0
set -- --weight_decay 0.01 "$@"                         # decoupled, on all weights except biases and norms
set -- --warmup_ratio 0.03 "$@"                         # share of the steps that warm up (today's name: --warmup_steps 0.03)
set -- --optim adamw_bnb_8bit "$@"                      # AdamW with 8-bit states (bitsandbytes)
set -- --per_device_eval_batch_size 8 "$@"              # pictures per GPU in one forward pass of evaluation
set -- --eval_strategy steps "$@"                       # measure the accuracy while training ...
set -- --eval_steps 100 "$@"                            # ... whenever a checkpoint is saved, on --eval_pictures 500 held-out pictures
set -- --eval_on_start "$@"                             # ... and before the first step: the untuned model
set -- --logging_steps 10 "$@"                          # a log line every 10 steps
set -- --logging_dir "./logs" "$@"                      # TensorBoard's events, one subfolder per run
set -- --report_to "tensorboard" "$@"                   # also: tensorboard,wandb

exec "$python" scripts/launch.py train.py --config_file ./scripts/deepspeed_zero3.yaml "$@"
