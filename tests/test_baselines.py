"""The table of baselines: each row against a direct computation on the same pictures, with a tiny random CLIP."""

import json
import shutil
from pathlib import Path
from string import ascii_lowercase

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from statsmodels.stats.proportion import proportion_confint

from animals.checkpoint.load import load_model, load_processor
from animals.pictures.read import list_pictures, load_picture
from animals.scoring.metrics import compare
from animals.scoring.report import read_report
from config import Config
from scripts.baselines import fit

LABELS, FOLDERS = Config().labels, Config().folder_to_label
PER_CLASS = 4  # of the demo's pictures, in each split


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory):
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

    folder = tmp_path_factory.mktemp("clip")
    letters = [f"{letter}{end}" for letter in ascii_lowercase for end in ("", "</w>")]
    words = {word: i for i, word in enumerate([*letters, "<|startoftext|>", "<|endoftext|>"])}
    CLIPTokenizer(vocab=words, merges=[]).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    half = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = half | {"vocab_size": len(words), "bos_token_id": len(words) - 2, "eos_token_id": len(words) - 1}
    torch.manual_seed(1)
    vision = half | {"image_size": 32, "patch_size": 8}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if not any(part in name for part in ("norm", "bias", "class_embedding", "logit_scale")):
                weight += 0.2 * torch.randn_like(weight)  # with the initial ones it answers one label
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def table(run, demo, tiny_clip, tmp_path_factory):
    """(root, command, output) after a run with all baselines; the untuned checkpoint is scored by two ranks."""
    root = tmp_path_factory.mktemp("baselines")
    for split in ("train_data", "validation_data"):
        for folder in FOLDERS:
            (root / "input" / split / folder).mkdir(parents=True)
            for path in sorted((demo.input / split / folder).iterdir())[: PER_CLASS + (folder == "cat")]:
                (root / "input" / split / folder / path.name).symlink_to(path)
    last = sorted((root / "input" / "validation_data" / [*FOLDERS][-1]).iterdir())[-1]
    load_picture(str(last)).save(last.with_name("zz.jpg"), quality=60)  # a near-duplicate
    data = f"--input_dir {root}/input --temp_dir {root}/temp --logging_dir {root}/logs"
    flags = f"--report_dir {root}/reports --dtype float32 --model_name_or_path {demo.checkpoint}"
    done = run(f"sh validation.sh {data} {flags}", code=0)
    command = f"python scripts/baselines.py {root}/reports/{demo.checkpoint.name} {data}"
    done = run(f"{command} --untuned {demo.model} --probe --clip_model {tiny_clip}", NUM_PROCESSES=2, code=0)
    assert "the baseline `untuned`, which has no report on these pictures yet" in done.output
    return root, command, done.output


def read(root, checkpoint):
    """(report.json, its baselines by name, the rows of predictions.csv)"""
    report, rows = read_report(str(root / "reports" / checkpoint.name))
    return report, {row["name"]: row for row in report.get("baselines", [])}, rows


def test_each_row_is_what_a_direct_computation_gives(table, demo, tiny_clip):
    root, _, output = table
    report, found, rows = read(root, demo.checkpoint)
    assert list(rows[0])[:6] == ["image", "label", "prediction", "probability", "correct", "sha256"]
    truth, ours = [row["label"] for row in rows], np.array([row["correct"] for row in rows])
    said = {"majority": ["cat"] * len(rows), "untuned": [row["prediction"] for row in read(root, demo.model)[2]]}
    said["probe"] = probe(root, demo, rows)
    said["clip"] = zero_shot(tiny_clip, [load_picture(row["image"]) for row in rows])
    assert len(set(said["clip"])) > 2, "a CLIP that answers one label tests little"
    assert list(found) == list(said) and (report["majority"], report["majority_label"]) == (5 / 42, "cat")
    effect = report["design_effect"]
    for name, answers in said.items():
        other = np.array(answers) == truth
        assert found[name]["accuracy"] == pytest.approx(other.mean()), name
        interval = proportion_confint(other.sum() / effect, 42 / effect, method="wilson")
        assert found[name]["accuracy_ci95"] == pytest.approx(interval)
        versus = compare(ours.tolist(), other.tolist(), [row["group"] for row in rows])
        assert {key: found[name][key] for key in ("difference_ci95", "verdict")}.items() <= versus.items()
        assert found[name]["difference"] == pytest.approx(ours.mean() - other.mean())
        assert f"{name:<12} {other.mean():>8.4f}" in output
    [*_, last] = rows  # the near-duplicate of the picture before it
    assert effect > 1 and last["group"] == rows[-2]["group"], "all intervals are widened"


def zero_shot(folder, pictures):
    from transformers import CLIPModel, CLIPProcessor

    model, processor = CLIPModel.from_pretrained(folder).eval(), CLIPProcessor.from_pretrained(folder)
    sentences = [f"a photo of a {label}" for label in LABELS]
    with torch.inference_mode():
        out = model(**processor(text=sentences, images=pictures, padding=True, return_tensors="pt"))
    return [LABELS[k] for k in out.logits_per_image.argmax(1).tolist()]


def probe(root, demo, rows):
    """Features one picture at a time from the untuned model's own pieces; the fit by hand."""
    processor, model = load_processor(str(demo.model)), load_model(str(demo.model), "float32")
    tower, features = model.model.vision_tower, []
    paths = [p for folder in FOLDERS for p in list_pictures(str(root / "input" / "train_data" / folder))]
    for path in [*paths, *(row["image"] for row in rows)]:
        whole = processor.image_processor(load_picture(path), return_tensors="pt")["pixel_values"][0, :1]
        with torch.inference_mode():
            out = tower(whole, output_hidden_states=True)
        patches = out.hidden_states[model.config.vision_feature_layer][0, 1:]
        features.append(torch.cat([out.pooler_output[0], patches.mean(0)]).numpy())
    blocks = [np.load(path)["features"] for path in (root / "temp" / "features").glob("*/*.npz")]
    kept = np.concatenate([block for block in blocks if block.shape[1] != 16])  # 16: CLIP's
    assert np.allclose(np.sort(kept, axis=0), np.sort(features, axis=0), atol=1e-4)
    answers, train, held_out = [FOLDERS[Path(p).parent.name] for p in paths], *np.split(features, [len(paths)])
    predicted, strength = fit(train, answers, held_out)
    by_hand = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=1000)).fit(train, answers)
    assert by_hand.predict(held_out).tolist() == predicted
    return predicted


def test_a_report_of_the_untuned_checkpoint_will_do(run, table, demo):
    root, command, _ = table
    _, before, rows = read(root, demo.checkpoint)
    for other in (demo.model, root / "reports" / demo.model.name):
        done = run(f"{command} --untuned {other}")
        assert done.code == 0 and "scoring" not in done.output, done.output
        _, after, same_rows = read(root, demo.checkpoint)
        assert after == {name: before[name] for name in ("majority", "untuned")} and same_rows == rows
    page = (root / "reports" / demo.checkpoint.name / "report.html").read_text(encoding="utf-8")
    assert 'data-key="baselines.untuned.accuracy"' in page


def test_a_report_of_other_files_is_made_again(run, table, demo, tmp_path):
    """The same folder with other grids of tiles sees other things: its old report says nothing about it."""
    root, command, _ = table
    model = shutil.copytree(demo.model, tmp_path / "before")
    scored = []
    for view in (None, None, [[96, 96], [96, 192]]):
        for name in ("config.json", "preprocessor_config.json") if view else ():
            content = json.loads((model / name).read_text()) | {"image_grid_pinpoints": view}
            (model / name).write_text(json.dumps(content))
        done = run(f"{command} --untuned {model}", code=0)
        scored.append("scoring" in done.output)
        report, found, _ = read(root, demo.checkpoint)
        assert found["untuned"]["accuracy"] == read(root, model)[0]["accuracy"], "the row is that of the report"
        assert read(root, model)[0]["checkpoint"] == found["untuned"]["checkpoint"] != report["checkpoint"]
    assert scored == [True, False, True]


def test_what_is_missing_is_said_before_anything_loads(run, table, tmp_path):
    command = table[1]
    done = run(f"{command} --untuned {tmp_path} --probe --clip_model {tmp_path}")
    assert done.code == 2 and "Traceback" not in done.output
    assert "error: --untuned, --probe: " in done.output
    assert f"error: --clip_model {tmp_path}: found no config.json there; expected the folder of a CLIP" in done.output
    assert "error: --prompt: found" in run(f"{command} --probe --prompt Which?", code=2).output
    missing = run(f"python scripts/baselines.py {tmp_path}", code=2).output
    assert "expected a folder with report.json and predictions.csv" in missing
