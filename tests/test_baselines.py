"""The table of baselines: each row against a direct computation on the same pictures, with a tiny random CLIP."""

import json
import shutil
from pathlib import Path
from string import ascii_lowercase

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from statsmodels.stats.proportion import proportion_confint

from animals.checkpoint.load import load_model, load_processor
from animals.command import UserError
from animals.pictures.read import list_pictures, load_picture
from animals.scoring.features import fit
from animals.scoring.metrics import compare
from animals.scoring.report import read_report
from animals.scoring.scorer import Scorer, load_scorer
from config import Config
from scripts import baselines

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
    places = f"--input_dir {root}/input --temp_dir {root}/temp"
    run(f"python data_process_utils.py {places} --model_name_or_path {demo.model}")
    run(f"sh validation.sh {data} {flags}", code=0)
    command = f"python scripts/baselines.py {root}/reports/{demo.checkpoint.name} {data}"
    every = f"--untuned {demo.model} --probe --hidden_probe --clip_model {tiny_clip}"
    done = run(f"{command} {every}", NUM_PROCESSES=2, code=0)
    assert done.output.count("the baseline `untuned`, which has no report on these pictures yet") == 4
    assert f"--hidden_probe: {demo.model} reads {41 + 42} pictures on one GPU, about " in done.output
    return root, command, done.output


def read(root, checkpoint, folder="reports"):
    """(report.json, its baselines by name, the rows of predictions.csv)"""
    report, rows = read_report(str(root / folder / checkpoint.name))
    return report, {row["name"]: row for row in report.get("baselines", [])}, rows


def test_each_row_is_what_a_direct_computation_gives(table, demo, tiny_clip):
    root, _, output = table
    report, found, rows = read(root, demo.checkpoint)
    assert list(rows[0])[:6] == ["image", "label", "prediction", "probability", "correct", "sha256"]
    truth, ours = [row["label"] for row in rows], np.array([row["correct"] for row in rows])
    pictures = [load_picture(row["image"]) for row in rows]
    ways = {"end_counted": "reports", "end_ignored": "reports/without_end"}
    ways = {way: [row["prediction"] for row in read(root, demo.model, folder)[2]] for way, folder in ways.items()}
    said = {"majority": ["cat"] * len(rows), "untuned": better(found, "untuned", ways, truth)}
    said["generated"] = generated(demo.model, pictures)
    said["probe"] = probe(root, demo, rows)
    said["hidden"] = hidden(root, demo, rows)
    ways = {view: zero_shot(tiny_clip, pictures, view == "squeezed") for view in ("centre_crop", "squeezed")}
    assert all(len(set(answers)) > 2 for answers in ways.values()), "a CLIP that answers one label tests little"
    said["clip"] = better(found, "clip", ways, truth)
    assert list(found) == list(said) and (report["majority"], report["majority_label"]) == (5 / 42, "cat")
    effect = report["design_effect"]
    for name, answers in said.items():
        other = np.array([answer == label for answer, label in zip(answers, truth, strict=True)])
        assert found[name]["accuracy"] == pytest.approx(other.mean()), name
        interval = proportion_confint(other.sum() / effect, 42 / effect, method="wilson")
        assert found[name]["accuracy_ci95"] == pytest.approx(interval)
        versus = compare(ours.tolist(), other.tolist(), [row["group"] for row in rows])
        assert {key: found[name][key] for key in ("difference_ci95", "verdict")}.items() <= versus.items()
        assert found[name]["difference"] == pytest.approx(ours.mean() - other.mean())
        assert f"{name:<12} {other.mean():>8.4f}" in output
    [*_, last] = rows  # the near-duplicate of the picture before it
    assert effect > 1 and last["group"] == rows[-2]["group"], "all intervals are widened"


def better(found, name, ways, truth):
    """The answers of the better way, which the row must name."""
    right = {way: sum(map(str.__eq__, answers, truth)) for way, answers in ways.items()}
    best = max(right, key=right.__getitem__)
    assert found[name]["variant"] == best
    return ways[best]


def zero_shot(folder, pictures, squeezed):
    from transformers import CLIPModel, CLIPProcessor

    model, processor = CLIPModel.from_pretrained(folder).eval(), CLIPProcessor.from_pretrained(folder)
    pictures = [picture.resize((32, 32), Image.Resampling.BICUBIC) if squeezed else picture for picture in pictures]
    scores = []
    for one in (
        "itap of A.", "a bad photo of the B.", "an origami B.", "a photo of the large B.", "A in a video game.",
        "art of the B.", "a photo of the small B.",
    ):  # fmt: skip
        sentences = [one.replace("A", "an B" if label == "elephant" else "a B").replace("B", label) for label in LABELS]
        with torch.inference_mode():
            out = model(**processor(text=sentences, images=pictures, padding=True, return_tensors="pt"))
        scores.append(out.text_embeds)
    text = torch.stack(scores).mean(0)
    scores = out.image_embeds @ (text / text.norm(dim=-1, keepdim=True)).T
    return [LABELS[k] for k in scores.argmax(1).tolist()]


def generated(path, pictures):
    """One picture at a time, without our Scorer."""
    processor, model, said = load_processor(str(path)), load_model(str(path), "float32"), []
    text = processor.apply_chat_template(Config().conversation(), Config().chat_template, tokenize=False)
    longest = max(len(processor.tokenizer(label)["input_ids"]) for label in LABELS) + 1  # and </s>
    for picture in pictures:
        inputs = processor(images=picture, text=text, add_special_tokens=False, return_tensors="pt")
        with torch.inference_mode():
            out = model.generate(**inputs, do_sample=False, max_new_tokens=longest)[0, inputs["input_ids"].shape[1] :]
        word = processor.decode(out, skip_special_tokens=True).strip().lower()
        said.append(word if word in LABELS else None)
    return said


def hidden(root, demo, rows):
    """The features are output_hidden_states[-1] at the prompt's last token, one picture at a time."""
    processor, model, wanted = load_processor(str(demo.model)), load_model(str(demo.model), "float32"), []
    text = processor.apply_chat_template(Config().conversation(), Config().chat_template, tokenize=False)
    paths = [p for folder in FOLDERS for p in list_pictures(str(root / "input" / "train_data" / folder))]
    for path in [*paths, *(row["image"] for row in rows)]:
        inputs = processor(images=load_picture(path), text=text, add_special_tokens=False, return_tensors="pt")
        with torch.inference_mode():
            wanted.append(model(**inputs, output_hidden_states=True).hidden_states[-1][0, -1].numpy())
    kept = np.concatenate([np.load(path)["features"] for path in (root / "temp" / "features").glob("hidden-*/*.npz")])
    assert np.allclose(np.sort(kept, axis=0), np.sort(wanted, axis=0), atol=1e-3)
    answers = [FOLDERS[Path(p).parent.name] for p in paths]
    return fit(np.stack(wanted[: len(paths)]), answers, np.stack(wanted[len(paths) :]))[0]


def test_generated_words_are_the_models_own(table, demo):
    """In batches as one by one, with a model that has learned to say labels."""
    report, _, rows = read(table[0], demo.checkpoint)
    found, further = baselines.generated(str(demo.checkpoint), Config(), report | {"dtype": "float32"}, rows)
    assert found == generated(demo.checkpoint, [load_picture(row["image"]) for row in rows])
    assert np.mean([answer == row["label"] for answer, row in zip(found, rows, strict=True)]) > 0.7
    assert further == {"model": str(demo.checkpoint)}


def test_the_untuned_model_is_asked_in_three_orders(table, demo):
    root, _, output = table
    row = read(root, demo.checkpoint)[1]["untuned"]
    folder = "reports" if row["variant"] == "end_counted" else "reports/without_end"
    others = [read(root, demo.model, f"{folder}/order_{seed}")[0] for seed in (1, 2)]
    assert row["orders"] == [row["accuracy"], *(report["accuracy"] for report in others)]
    assert all(sorted(r["labels"]) == sorted(LABELS) != r["labels"] for r in others) and others[0] != others[1]
    assert f"{np.mean(row['orders']):>8.4f}  on average over 3 orders of the labels" in output
    page = (root / "reports" / demo.checkpoint.name / "report.html").read_text(encoding="utf-8")
    assert 'data-key="orders.mean"' in page


def test_without_the_end_a_label_gets_its_own_tokens_alone(table, demo):
    """The end is in the one sum and not in the other; answers that begin another one need it."""
    pictures = [load_picture(row["image"]) for row in read(table[0], demo.checkpoint)[2][:2]]
    whole, config = load_scorer(str(demo.model), Config(), "float32"), Config()
    short, model = load_scorer(str(demo.model), config, "float32", end=False)
    found = short.score(model, short.collate(pictures))
    processor = load_processor(str(demo.model))
    for k, label in enumerate(LABELS):
        text = processor.apply_chat_template(config.conversation(label), config.chat_template, tokenize=False)
        inputs = processor(images=pictures[:1], text=[text], add_special_tokens=False, return_tensors="pt")
        ids, n = inputs["input_ids"][0], len(short.answers[k])
        with torch.inference_mode():
            log_p = model(**inputs).logits[0].log_softmax(-1)
        each = [log_p[place - 1, ids[place]].item() for place in range(len(ids) - n, len(ids))]
        assert found[0, k].item() == pytest.approx(sum(each[:-1]), abs=1e-3)
        assert whole[0].score(model, whole[0].collate(pictures))[0, k].item() == pytest.approx(sum(each), abs=1e-3)
    config.folder_to_label = {"a": "cat", "b": "cat cat"}
    with pytest.raises(UserError, match="found answers that begin another one"):
        Scorer(processor, config, end=False)


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
    kept = np.concatenate([block for block in blocks if block.shape[1] == 256])  # not CLIP's
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
        if other == demo.model:
            assert after == {name: before[name] for name in ("majority", "untuned", "generated")} and same_rows == rows
        else:  # that report alone
            assert list(after) == ["majority", "untuned"] and "variant" not in after["untuned"]
            assert after["untuned"]["accuracy"] == read(root, demo.model)[0]["accuracy"]
    page = (root / "reports" / demo.checkpoint.name / "report.html").read_text(encoding="utf-8")
    assert 'data-key="baselines.untuned.accuracy"' in page


def test_a_report_of_other_files_is_made_again(table, demo, tmp_path, capsys):
    """The same folder with other grids of tiles sees other things: its old report says nothing about it."""
    root, report, rows = table[0], *read(table[0], demo.checkpoint)[::2]
    config = Config(input_dir=f"{root}/input", temp_dir=f"{root}/temp", logging_dir=f"{root}/logs")
    model, made = shutil.copytree(demo.model, tmp_path / "before"), []
    pictures = [(row["image"], row["sha256"], row["label"]) for row in rows]
    for view in (None, None, [[96, 96], [96, 192]]):
        for name in ("config.json", "preprocessor_config.json") if view else ():
            content = json.loads((model / name).read_text()) | {"image_grid_pinpoints": view}
            (model / name).write_text(json.dumps(content))
        folder = baselines.find_report(str(model), config, report, pictures, f"{tmp_path}/reports")
        made.append((read_report(folder)[0]["checkpoint"], "scoring" in capsys.readouterr().err))
    (first, _), *_, (last, _) = made
    assert made == [(first, True), (first, False), (last, True)] and len({first, last, report["checkpoint"]}) == 3


def test_what_is_missing_is_said_before_anything_loads(run, table, tmp_path):
    command = table[1]
    done = run(f"{command} --untuned {tmp_path} --probe --clip_model {tmp_path}")
    assert done.code == 2 and "Traceback" not in done.output
    assert "error: --untuned, --probe: " in done.output
    assert f"error: --clip_model {tmp_path}: found no config.json there; expected the folder of a CLIP" in done.output
    assert "error: --prompt: found" in run(f"{command} --probe --prompt Which?", code=2).output
    missing = run(f"python scripts/baselines.py {tmp_path}", code=2).output
    assert "expected a folder with report.json and predictions.csv" in missing
