"""Was it worth it? What others answer on the same pictures, for one table beside the model's own accuracy.

majority   the label that most held-out pictures have, always
untuned    the checkpoint before the fine-tuning (--untuned_model), from its own report
probe      logistic regression on the untuned checkpoint's frozen vision tower
clip       zero-shot CLIP (--clip_model): the label whose sentence is nearest to the picture

validation.py scores what has no report yet; features are kept (features.py); scikit-learn fits.
"""

import os

from animals.checkpoint.check import read_shards, require_checkpoint
from animals.checkpoint.steps import checkpoint_name
from animals.command import UserError
from animals.files import read_json
from animals.pictures.cache import load_split
from animals.ranks import main_process
from animals.scoring.features import Encoder, features, identity, load_tower, precision
from animals.scoring.metrics import compare, paired, wilson_interval
from animals.scoring.report import read_report

RIVALS = ("untuned", "probe", "clip")
STRENGTHS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)  # of C; smaller regularises more
CLIP_PROMPT = "a photo of a {label}"  # CLIP's own (openai/CLIP README)


def add_rival_flags(parser):
    parser.add_argument("--rivals", type=names, default=[], help=f"to compare with: {','.join(RIVALS)}")
    parser.add_argument("--linear_probe", action="store_true", help="the same as --rivals probe")
    parser.add_argument("--untuned_model", default="model", help="the checkpoint before the fine-tuning")
    parser.add_argument("--clip_model", help="folder of a CLIP, e.g. of openai/clip-vit-large-patch14-336")


def names(text):
    import argparse

    found = [name for name in text.split(",") if name]
    if wrong := sorted(set(found) - set(RIVALS)):
        raise argparse.ArgumentTypeError(f"found {', '.join(wrong)}; expected some of {','.join(RIVALS)}")
    return found


def wanted(args):
    """The rivals that the flags ask for, in the table's order."""
    return [name for name in RIVALS if name in args.rivals or (name == "probe" and args.linear_probe)]


def check_rivals(args):
    """Raises UserError, a line a problem, unless what the rivals need is there."""
    problems, asked = [], wanted(args)
    if {"untuned", "probe"} & set(asked):
        try:
            require_checkpoint(args.untuned_model)
        except UserError as error:
            problems.append(f"--untuned_model, for the rivals untuned and probe: {error}")
    if "clip" in asked:
        file = os.path.join(args.clip_model or "", "config.json")
        kind = read_json(file).get("model_type") if args.clip_model and os.path.isfile(file) else None
        if kind != "clip":
            problems.append(
                f"--clip_model {args.clip_model}: found {'no config.json there' if kind is None else f'a {kind!r}'}; "
                "expected a CLIP's folder: `hf download openai/clip-vit-large-patch14-336 --local-dir clip`"
            )
        else:
            problems += read_shards(args.clip_model)[1]
    if problems:
        raise UserError("\n".join(problems))


def untuned_rows(config, args, data):
    """The rows of the untuned checkpoint's report, paired with `data`; None unless it is of these and the question."""
    folder = os.path.join(args.report_dir, checkpoint_name(args.untuned_model))
    try:
        report, rows = read_report(folder)
        same = (report["model"], report.get("question")) == (args.untuned_model, config.question)
        return paired(triples(data), rows, folder) if same else None
    except UserError:
        return None


def rivals(config, args, data, right):
    """`rivals` of report.json, on every rank: a row each, the model's difference to it first. All ranks.

    data: the held-out pictures as load_split() has them; right: for each whether the model named it right.
    """
    from accelerate.utils import broadcast_object_list

    truth = [config.labels.index(label) for label in data["label"]]
    answers = {"majority": ([max(set(truth), key=truth.count)] * len(truth), {})}  # name -> (class numbers, more keys)
    for name in wanted(args):
        answers[name] = {"untuned": untuned, "probe": probe, "clip": clip}[name](config, args, data)
    table = [None]
    if main_process():
        table = [[row(name, truth, said, right) | more for name, (said, more) in answers.items()]]
    return broadcast_object_list(table)[0]


def row(name, truth, said, right):
    its = [t == s for t, s in zip(truth, said, strict=True)]
    versus = compare(right, its)
    return {
        "name": name,
        "accuracy": versus["other_accuracy"],
        "accuracy_ci95": wilson_interval(sum(its), len(its)),
        **{key: versus[key] for key in ("difference", "difference_ci95", "mcnemar_p", "only_this", "only_other")},
    }


# --- each answers on the main rank: (class number a picture, what else to say of it) ----------------------------------


def triples(data):
    """[(image, sha256, label)] as paired() takes them."""
    return list(zip((images[0] for images in data["images"]), data["sha256"], data["label"], strict=True))


def untuned(config, args, data):
    rows = untuned_rows(config, args, data) if main_process() else []
    return [config.labels.index(row["prediction"]) for row in rows], {"model": args.untuned_model}


def encoded(encoder, config, args, data):
    pictures = [images[0] for images in data["images"]]
    folder = os.path.join(config.temp_dir, "features")
    return features(
        encoder, pictures, data["sha256"][:], folder, args.per_device_eval_batch_size, args.dataloader_num_workers
    )


def probe(config, args, data):
    tower = load_tower(args.untuned_model)
    train = load_split(config, "train")
    known, held_out = encoded(tower, config, args, train), encoded(tower, config, args, data)
    if known is None:
        return [], {}
    said, strength = fit(known, [config.labels.index(label) for label in train["label"]], held_out)
    more = {"model": args.untuned_model, "n_train": len(known), "features": known.shape[1], "C": strength}
    return said, more


def fit(train, answers, held_out):
    """(predictions for `held_out`, the chosen C). Features float32 [n, features], answers [n]."""
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1):  # small products: threads wait for each other longer than they work
        search = classifier().fit(train, answers)
    return search.predict(held_out).tolist(), search.best_params_["logisticregression__C"]


def classifier():
    """regression() that chooses its C on a tenth of its data; scikit-learn's GridSearchCV, not yet fitted."""
    from sklearn.model_selection import GridSearchCV, ShuffleSplit

    choose = ShuffleSplit(1, test_size=0.1, random_state=0)
    return GridSearchCV(regression(), {"logisticregression__C": STRENGTHS}, cv=choose)


def regression(strength=1.0):
    """Logistic regression on scaled features with C = `strength`; scikit-learn's Pipeline, not yet fitted."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=1000))


def clip(config, args, data):
    """Zero-shot, as in Radford et al. 2021 (arXiv:2103.00020): the sentence of largest cosine with the picture."""
    import numpy as np
    import torch
    from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

    model = CLIPModel.from_pretrained(args.clip_model, dtype=precision()).eval()
    images = AutoImageProcessor.from_pretrained(args.clip_model, backend="pil")
    sentences = [CLIP_PROMPT.replace("{label}", label) for label in config.labels]
    words = AutoTokenizer.from_pretrained(args.clip_model)(sentences, padding=True, return_tensors="pt")
    with torch.inference_mode():
        text = model.float().get_text_features(**words).pooler_output.numpy()  # [labels, features]
    encoder = Encoder(
        identity(model.state_dict(), images),
        model.to(precision()),
        lambda pictures: images(pictures, return_tensors="pt")["pixel_values"],
        lambda module, pixels: module.get_image_features(pixel_values=pixels).pooler_output.float(),
    )
    pictures = encoded(encoder, config, args, data)  # the length of a picture's row does not move its argmax
    if pictures is None:
        return [], {}
    said = np.argmax(pictures @ (text / np.linalg.norm(text, axis=1, keepdims=True)).T, axis=1)
    return said.tolist(), {"model": args.clip_model, "prompt": CLIP_PROMPT}
