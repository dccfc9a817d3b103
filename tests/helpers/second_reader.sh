#!/bin/sh
# Train the replica for 2 steps with 2-rank ZeRO-3 in both views, then read what was saved with transformers of the past,
# each in a virtual environment of its own under temp/readers, and compare tokens, pixels and fp32 logits with today. Slow.
#   sh tests/helpers/second_reader.sh                    4.46.0, 4.50.0 and 4.57.6
#   sh tests/helpers/second_reader.sh 4.52.4             another one
set -e
cd "$(dirname "$0")/../.."
. scripts/environment.sh
install_requirements requirements-dev.txt
export HF_HUB_OFFLINE=1
readers=temp/readers
rm -rf "$readers/hub" "$readers/input" "$readers/sft"
mkdir -p "$readers"
"$python" tests/helpers/replica.py "$readers/hub" --pictures "$readers/input"
for view in tiles whole; do
    NUM_PROCESSES=2 sh train.sh --model_name_or_path "$readers/hub" --input_dir "$readers/input" --image_view $view \
        --temp_dir "$readers/cache" --logging_dir "$readers/logs" --output_dir "$readers/sft/$view" --max_steps 2 \
        --save_strategy no --eval_strategy no --per_device_train_batch_size 1 --gradient_accumulation_steps 1
    "$python" tests/helpers/second_reader.py "$readers/sft/$view" "$readers/today-$view.npz"
done
[ $# -gt 0 ] || set -- 4.46.0 4.50.0 4.57.6
for version; do
    reader="$readers/$version"
    "$reader/bin/python" -c "import transformers, torch" 2> /dev/null || {
        "$python" -m venv "$reader"
        # shellcheck disable=SC2046
        "$reader/bin/pip" install --quiet "transformers==$version" \
            $(grep -hE '^(torch|pillow|sentencepiece|protobuf)==' requirements.txt requirements-dev.txt)
    }
    for view in tiles whole; do
        "$reader/bin/python" tests/helpers/second_reader.py "$readers/sft/$view" "$readers/$version-$view.npz"
        "$python" tests/helpers/second_reader.py --compare "$readers/$version-$view.npz" "$readers/today-$view.npz"
    done
done
