"""Serve a checkpoint of the demo's pictures with vLLM as scripts/README.md says, and compare its answers with ours.

python tests/helpers/second_reader_vllm.py VLLM CHECKPOINT PREDICTIONS.csv [--quote]   # VLLM: path of the program

50 held-out pictures through vLLM's chat endpoint, in float32 on the CPU. Prints lines of Markdown; exit code 1 unless
- the prompt's tokens are the scorer's and bare transformers', with BOS once;
- the free answer has the tokens of bare transformers' greedy generation;
- with the labels as choices the answer is the prediction of validation.py (PREDICTIONS.csv), wherever the probabilities
  of the two likeliest labels are 0.05 apart or more.
--quote: run the documented request first, word for word, and print what it printed and the whole answer.
"""

import base64
import contextlib
import csv
import json
import math
import os
import re
import shlex
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
FOLDER, ADDRESS, PICTURE = "sft-llava-1.6-7b", "http://localhost:8000", "photo.jpg"  # as the document has them
APART = 0.05


def documented():
    """scripts/README.md -> the command that serves, a request as sh code, its body, Python for transformers."""
    text = (ROOT / "scripts" / "README.md").read_text(encoding="utf-8")
    text = text.partition("## Serve the model elsewhere\n")[2].partition("\n## ")[0]
    serve, request = re.findall(r"```sh\n(.*?)```", text, re.S)
    (code,) = re.findall(r"```python\n(.*?)```", text, re.S)
    body = re.search(r"<<EOF\n(.*?)\nEOF", request, re.S)[1]
    return serve.strip(), request, json.loads(re.sub(r'\$\(base64.*?\)"', '"', body)), code


@contextlib.contextmanager
def serving(program, folder):
    """vLLM's server while the block runs, on a free port; gives its address."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    words = shlex.split(documented()[0].replace(FOLDER, str(folder)))
    command = [program, *words[1:], "--dtype", "float32", "--enforce-eager", "--port", str(port)]
    address, log = f"http://localhost:{port}", ROOT / "temp" / "readers" / "vllm.log"
    with open(log, "w") as file:
        env = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1"}  # GiB
        process = subprocess.Popen(command, stdout=file, stderr=file, env=env)
        try:
            deadline = time.monotonic() + 900
            while True:
                with contextlib.suppress(OSError):
                    urllib.request.urlopen(f"{address}/health")
                    break
                if process.poll() is not None or time.monotonic() > deadline:
                    sys.exit(f"vLLM did not start; see {log}")
                time.sleep(1)
            yield address
        finally:
            process.terminate()
            process.wait()


def quote(address, picture):
    """Run the documented request; print what it printed, and the server's whole answer."""
    request = documented()[1].replace(ADDRESS, address).replace(PICTURE, shlex.quote(str(ROOT / picture)))
    with tempfile.TemporaryDirectory() as folder:
        printed = subprocess.run(
            ["sh", "-ec", request], cwd=folder, check=True, stdout=subprocess.PIPE, text=True
        ).stdout
        answer = Path(folder, "answer.json").read_text()
    print(f"\nThe documented request, with {picture}, printed:\n\n```\n{printed}```\n")
    print(f"Its answer.json:\n\n```\n{answer}\n```\n")


def ask(address, body):
    """The answer to one request: its choice, with the tokens of prompt and answer."""
    data = json.dumps(body | {"return_token_ids": True, "max_tokens": 8}).encode()
    request = urllib.request.Request(f"{address}/v1/chat/completions", data, {"Content-Type": "application/json"})
    answer = json.load(urllib.request.urlopen(request))
    return answer["choices"][0] | {"prompt": answer["prompt_token_ids"]}


def compare(address, folder, rows):
    """-> (prompts, greedy, apart, agree, close, close_agree, difference): counts of pictures that agree, the largest
    difference between a label's probability in `rows` (of predictions.csv) and that of its first token."""
    import torch
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from animals.checkpoint.load import load_processor
    from animals.checkpoint.task import settings_for
    from animals.scoring.scorer import Scorer
    from config import Config

    config = settings_for(Config(), folder)
    scorer, body = Scorer(load_processor(folder), config), documented()[2]
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    text = processor.apply_chat_template(config.conversation(), tokenize=False)
    counts = dict.fromkeys(("prompts", "greedy", "apart", "agree", "close", "close_agree"), 0)
    difference = 0
    for row in rows:
        picture = Image.open(row["image"])
        inputs = processor(images=picture, text=text, return_tensors="pt")
        prompt = inputs["input_ids"][0].tolist()
        greedy = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0].tolist()[len(prompt) :]
        url = f"data:image/jpeg;base64,{base64.b64encode(Path(row['image']).read_bytes()).decode()}"
        body["messages"][0]["content"][0]["image_url"]["url"] = url
        chosen = ask(address, body)
        free = ask(address, {key: value for key, value in body.items() if key != "structured_outputs"})
        ours = scorer.prompts([picture])["input_ids"][0].tolist()
        counts["prompts"] += ours == prompt == chosen["prompt"] == free["prompt"] and ours.count(1) == 1
        counts["greedy"] += free["token_ids"] == greedy
        probability = sorted((float(row[label]) for label in scorer.labels), reverse=True)
        kind = "apart" if probability[0] - probability[1] >= APART else "close"
        same = chosen["message"]["content"].strip() == row["prediction"]
        counts[kind] += 1
        counts["agree" if kind == "apart" else "close_agree"] += same
        first = {t["token"].strip(): math.exp(t["logprob"]) for t in chosen["logprobs"]["content"][0]["top_logprobs"]}
        difference = max([difference, *(abs(first.get(label, 0) - float(row[label])) for label in scorer.labels)])
        if free["token_ids"] != greedy or not same:
            print(f"{row['image']}: {greedy} {free['token_ids']} {chosen['message']['content']} {row}", file=sys.stderr)
    return counts, difference


def main(program, folder, predictions, *flags):
    import transformers

    with open(predictions, newline="") as file:
        rows = list(csv.DictReader(file))
    rows = rows[:: len(rows) // 50][:50]
    with serving(program, folder) as address:
        if flags:
            unsure = min(rows, key=lambda row: abs(float(row["probability"]) - 0.7))
            quote(address, unsure["image"])
        version = json.load(urllib.request.urlopen(f"{address}/version"))["version"]
        counts, difference = compare(address, folder, rows)
    n, agree, apart = len(rows), counts["agree"], counts["apart"]
    print(f"- {folder}, {n} held-out pictures, vLLM {version} against transformers {transformers.__version__}:")
    print(f"  - prompt's tokens equal {counts['prompts']}, greedy answers equal {counts['greedy']};")
    print(
        f"  - with choices, the answer is the prediction for {agree} of {apart} whose two likeliest labels are {APART}"
    )
    print(f"    apart or more, and for {counts['close_agree']} of the other {counts['close']};")
    print(f"  - the labels' probabilities differ by at most {difference:.4f} from predictions.csv's, which also")
    print("    count the answer's other tokens and </s>.")
    return counts["prompts"] == counts["greedy"] == n > 0 and agree == apart


if __name__ == "__main__":
    sys.exit(0 if main(*sys.argv[1:]) else 1)
