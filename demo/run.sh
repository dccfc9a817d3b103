#!/bin/sh
# All steps on any machine, in minutes: draw animals, write a tiny LLaVA-NeXT checkpoint, train it with ZeRO-3 and 8-bit
# AdamW through the same scripts that train the 7B, measure it, and name pictures that have no label.
#   sh demo/run.sh
# Everything that it makes lies in temp/demo. Without an active environment it makes .venv and installs requirements.txt.
set -e
cd "$(dirname "$0")/.."
. scripts/environment.sh
install_requirements requirements.txt

demo=temp/demo
rm -rf "$demo"
mkdir -p "$demo"
"$python" demo/make_pictures.py "$demo/input" --seed 0 --train 250
"$python" demo/make_model.py "$demo/model" --seed 0

sh train.sh \
    --model_name_or_path "$demo/model" \
    --input_dir "$demo/input" \
    --temp_dir "$demo/cache" \
    --output_dir "$demo/sft-llava-demo" \
    --logging_dir "$demo/logs" \
    --per_device_train_batch_size 16 \
    --gradient_accumulation_steps 1 \
    --num_train_epochs 3 \
    --learning_rate 1e-3 --vision_learning_rate 1e-3 \
    --no_gradient_checkpointing \
    --save_steps 200 \
    --eval_steps 200 \
    "$@"

sh validation.sh \
    --model_name_or_path "$demo/sft-llava-demo" \
    --input_dir "$demo/input" \
    --temp_dir "$demo/cache" \
    --report_dir "$demo/logs/validation" \
    --logging_dir "$demo/logs" \
    --per_device_eval_batch_size 32

"$python" test.py "$demo/input/test_data" \
    --model_name_or_path "$demo/sft-llava-demo" \
    --output "$demo/predictions.csv"

"$python" - "$demo" > "$demo/summary.txt" <<'EOF_PYTHON'
import json, sys
demo = sys.argv[1]
report = json.load(open(f"{demo}/logs/validation/sft-llava-demo/report.json"))
low, high = report["accuracy_ci95"]
print(f"""held-out accuracy  {report["accuracy"]:.3f} (95 % interval {low:.3f} to {high:.3f}, n = {report["n"]}); chance {report["chance"]:.2f}
checkpoint         {demo}/sft-llava-demo
report             {demo}/logs/validation/sft-llava-demo/report.html
names of the unlabelled pictures   {demo}/predictions.csv
training curves    tensorboard --logdir={demo}/logs""")
EOF_PYTHON
echo
cat "$demo/summary.txt"
