#!/bin/sh
# Train the replica and its whole view for 2 steps with 2-rank ZeRO-3, read what was saved with older transformers, each in
# a virtual environment of its own under temp/readers, and compare tokens, pixels and float32 logits with today's. Slow.
#   sh tests/helpers/second_reader.sh                    4.46.0, 4.50.0 and 4.57.6
#   sh tests/helpers/second_reader.sh 4.52.4             another one
set -e
cd "$(dirname "$0")/../.."
. scripts/environment.sh
install_requirements requirements-dev.txt
export HF_HUB_OFFLINE=1 BF16_ON_CPU=1  # the type that a run on GPUs saves
readers=temp/readers
rm -rf "$readers/tiles" "$readers/whole" "$readers/input" "$readers/sft"
mkdir -p "$readers"
"$python" tests/helpers/replica.py "$readers/tiles" --pictures "$readers/input"
"$python" scripts/whole_view.py "$readers/tiles" "$readers/whole"
for view in tiles whole; do
    NUM_PROCESSES=2 sh train.sh --model_name_or_path "$readers/$view" --input_dir "$readers/input" --max_steps 2 \
        --temp_dir "$readers/cache" --logging_dir "$readers/logs" --output_dir "$readers/sft/$view" \
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
